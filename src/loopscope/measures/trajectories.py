"""Trajectories of chosen tokens through the recurrent block, projected on their principal components."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from loopscope.measures.base import BatchInfo, Measure, Needs, Plan, Variable, variable
from loopscope.measures.memory import Memory
from loopscope.models.subject import SubjectInfo
from loopscope.models.visits import Visit


def principal_components(
    states: Float[np.ndarray, "state width"], components: int
) -> tuple[Float[np.ndarray, "state component"], Float[np.ndarray, " component"]]:
    """Scores on the leading principal components, and each one's share of the variance.

    From the singular value decomposition of the centred states, in float64. The sign of a component, which is
    arbitrary, is set so that its largest score is positive. Components beyond min(states, width) are NaN.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # states of a diverging model, told apart below
        centred = states.astype(np.float64) - states.mean(axis=0, dtype=np.float64)
    scores = np.full((len(states), components), np.nan)
    share = np.full(components, np.nan)
    if not np.isfinite(centred).all():
        return scores, share
    # torch's, for it keeps to the number of threads that the user asked for.
    directions, sizes, _ = (part.numpy() for part in torch.linalg.svd(torch.from_numpy(centred), full_matrices=False))
    kept = min(components, len(sizes))
    found = directions[:, :kept] * sizes[:kept]
    sign = np.sign(found[np.abs(found).argmax(axis=0), np.arange(kept)])
    scores[:, :kept] = found * np.where(sign == 0, 1.0, sign)
    total = (sizes**2).sum()
    share[:kept] = sizes[:kept] ** 2 / total if total > 0 else np.nan
    return scores, share


class Trajectories(Measure):
    """Keeps the states of a few tokens at every visit of the recurrent block."""

    part = "trajectories"
    variables: ClassVar[dict[str, Variable]] = {
        "trajectory": variable(
            "tracked layer recurrence component", "principal-component scores of one token's states", "residual stream"
        ),
        "trajectory_variance": variable("tracked component", "share of the variance that each component explains"),
    }
    needs = Needs(loop=True)

    def __init__(self, batch: BatchInfo) -> None:
        super().__init__(batch)
        self.components = batch.plan.components
        tracked = _tracked(batch)
        self._rows = torch.tensor([row for row, _ in tracked], device=batch.mask.device)
        self._tokens = torch.tensor([token for _, token in tracked], device=batch.mask.device)
        shape = (len(tracked), batch.info.recurrent, batch.recurrences, batch.info.width)
        self._states = batch.unknown(*shape, dtype=torch.float64)

    @classmethod
    def memory(cls, batch: BatchInfo) -> Memory:
        kept = 8 * len(_tracked(batch)) * batch.info.recurrent * batch.recurrences * batch.info.width
        return Memory(kept=kept, result=4 * kept // max(1, len(_tracked(batch))))

    @classmethod
    def absent(cls, info: SubjectInfo, plan: Plan) -> str | None:
        return None if plan.tracked else "no token was tracked (--track)"

    @classmethod
    def applies(cls, batch: BatchInfo) -> bool:
        return bool(_tracked(batch))

    def visit(self, visit: Visit) -> None:
        if visit.stage == "recurrent":
            chosen: Tensor = visit.residual[self._rows, self._tokens]
            self._states[:, visit.layer, visit.recurrence - 1] = chosen

    def result(self) -> xr.Dataset:
        tracked, layers, recurrences, width = self._states.shape
        scores = np.empty((tracked, layers, recurrences, self.components))
        shares = np.empty((tracked, self.components))
        for index, states in enumerate(self._states.cpu().numpy()):
            found, shares[index] = principal_components(states.reshape(-1, width), self.components)
            scores[index] = found.reshape(layers, recurrences, self.components)
        return self.dataset({"trajectory": scores, "trajectory_variance": shares})


def _tracked(batch: BatchInfo) -> list[tuple[int, int]]:
    """(row of the batch, token) of the tokens that are tracked in it."""
    rows = ((batch.row(prompt), token) for prompt, token in batch.plan.tracked)
    return [(row, token) for row, token in rows if row is not None]
