"""Linear CKA: how alike the states of two visits are, up to rotation and scale."""

from __future__ import annotations

from typing import ClassVar

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from loopscope.measures.base import BatchInfo, Measure, Plan, Variable, on_arrays, variable
from loopscope.measures.memory import Memory
from loopscope.measures.similarity import cycle_visits
from loopscope.models.subject import SubjectInfo
from loopscope.models.visits import Visit


@on_arrays
def linear_cka(states: Float[Tensor, "visit token width"]) -> Float[Tensor, "visit visit"]:
    """`||Y'X||² / (||X'X|| ||Y'Y||)`, Frobenius norms, of states X and Y less their means over tokens, for every two
    visits (Kornblith et al., arXiv 1905.00414). 1: one is the other turned and scaled; NaN of states that are all the
    same."""
    centred = states.double() - states.double().mean(1, keepdim=True)
    # ||Y'X||² is the product of the two Gram matrices over tokens, entry by entry.
    gram = (centred @ centred.mT).flatten(1)
    product = gram @ gram.T
    size = product.diagonal().sqrt()
    cka: Tensor = product / (size[:, None] * size)
    return cka


class VisitCKA(Measure):
    """Keeps the states of prelude, the first few recurrences and coda, as the cycle similarity does."""

    part = "support"
    variables: ClassVar[dict[str, Variable]] = {
        "visit_cka": variable(
            "visit visit_other",
            "linear CKA of the states of two visits over a prompt's tokens, mean over prompts",
            summed=True,
        )
    }

    def __init__(self, batch: BatchInfo) -> None:
        super().__init__(batch)
        self._recurrences = min(batch.plan.cycle_recurrences, batch.recurrences)
        self._states: list[Tensor] = []

    @classmethod
    def absent(cls, info: SubjectInfo, plan: Plan) -> str | None:
        return None if plan.support_every else "it was not asked for (--support-every)"

    @classmethod
    def memory(cls, batch: BatchInfo) -> Memory:
        visits = cycle_visits(batch)
        # In float64, and a Gram matrix of each visit, of one prompt at a time.
        one = 16 * visits * batch.tokens * batch.info.width + 8 * visits * batch.tokens**2
        return Memory(kept=visits * batch.bytes[0], result=one)

    def visit(self, visit: Visit) -> None:
        if visit.stage != "recurrent" or visit.recurrence <= self._recurrences:
            self._states.append(visit.residual)

    def result(self) -> xr.Dataset:
        visits = len(self._states)
        total, weight = torch.zeros(2, visits, visits, dtype=torch.float64, device=self.batch.mask.device)
        for prompt, keep in enumerate(self.batch.mask):
            found = linear_cka(torch.stack([states[prompt][keep] for states in self._states]))
            finite = torch.isfinite(found)
            total += torch.where(finite, found, 0.0)
            weight += finite
        return self.dataset({"visit_cka": total, "visit_cka_weight": weight})
