"""Stages of inference: entropy and magnitude of the residual stream, in every visit (arXiv 2604.11791, section 5)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from loopscope.measures.base import (
    BatchInfo,
    Measure,
    Variable,
    depth_count,
    depth_of,
    masked_mean,
    on_arrays,
    variable,
)
from loopscope.measures.functions import residual_norm, squared_singular_values, widen
from loopscope.measures.memory import Memory
from loopscope.models.visits import Visit

TokenStates = Float[Tensor, "*shape token width"]
Values = Float[Tensor, "*shape"]


@on_arrays
def residual_entropy(states: TokenStates) -> Values:
    """`-sum_j p_j log p_j` with `p_j = s_j^2 / sum s^2`, s the singular values of the (token, width) matrix, in nats.

    Rows are not normalised: massive activations must count.
    """
    return _entropy(squared_singular_values(states))


def _entropy(squares: Float[Tensor, "*shape value"]) -> Values:
    entropy: Tensor = torch.special.entr(squares / squares.sum(-1, keepdim=True)).sum(-1)
    return entropy


@on_arrays
def relative_residual_entropy(states: TokenStates) -> Values:
    """`residual_entropy` over the most there can be, `log min(T, D)`; in [0, 1], NaN for a single token."""
    most = torch.tensor(min(states.shape[-2:]), dtype=torch.float64).log()
    return residual_entropy(states) / torch.where(most > 0, most, torch.nan)


@on_arrays
def massive_activation(states: TokenStates) -> Values:
    """Largest |entry| over the median |entry| (the lower of two middle ones) of a (token, width) matrix."""
    return _massive(states)[0]


@on_arrays
def massive_activation_place(states: TokenStates) -> Tensor:
    """(token, dimension) of the largest |entry|, (..., 2)."""
    return _massive(states)[1]


def _massive(states: TokenStates) -> tuple[Tensor, Tensor]:
    """Both of the above, from one pass over the entries."""
    entries = widen(states).abs().flatten(-2)
    largest, place = entries.max(-1)
    return largest / _lower_median(entries), torch.stack((place // states.shape[-1], place % states.shape[-1]), -1)


def _lower_median(values: Float[Tensor, "*shape entry"]) -> Values:
    """The median, the lower of two middle ones. On a CPU numpy selects it ten times as fast as torch."""
    if values.device.type != "cpu" or values.requires_grad:
        return values.median(-1).values
    middle = (values.shape[-1] - 1) // 2
    return torch.as_tensor(np.partition(values.numpy(), middle, axis=-1)[..., middle])


class StageMeasures(Measure):
    """One row of numbers a visit and prompt."""

    part = "stages"
    variables: ClassVar[dict[str, Variable]] = {
        "residual_entropy": variable(
            "depth prompt", "entropy of the squared singular values of the (token, width) matrix of states", "nats"
        ),
        "relative_residual_entropy": variable("depth prompt", "residual_entropy over log min(T, D)"),
        "mean_token_norm": variable("depth prompt", "mean norm over the prompt's tokens", "residual stream"),
        "largest_token_norm": variable("depth prompt", "largest norm of the prompt's tokens", "residual stream"),
        "massive_activation": variable("depth prompt", "largest over median absolute entry of the states"),
        "massive_token": variable("depth prompt", "the token of that entry, counted from 0", "token"),
        "massive_dimension": variable("depth prompt", "the dimension of that entry, counted from 0", "dimension"),
    }

    def __init__(self, batch: BatchInfo) -> None:
        super().__init__(batch)
        alike: dict[int, list[int]] = {}
        for prompt, length in enumerate(batch.counts.tolist()):
            alike.setdefault(length, []).append(prompt)
        # Prompts of one length at once: with each by itself, this was most of what a short one takes.
        self._alike = {length: torch.tensor(rows, device=batch.mask.device) for length, rows in alike.items()}
        self._most = batch.counts.clamp(max=batch.info.width).double().log()
        self._values = batch.unknown(len(STAGE_NAMES), depth_count(batch), batch.prompts, dtype=torch.float64)

    @classmethod
    def memory(cls, batch: BatchInfo) -> Memory:
        states, wide = batch.bytes
        gram = 8 * batch.prompts * min(batch.tokens, batch.info.width) ** 2
        return Memory(visit=states + 2 * wide + 2 * gram)

    def visit(self, visit: Visit) -> None:
        depth = depth_of(self.batch, visit.stage, visit.layer, visit.recurrence)
        states = visit.residual.masked_fill(~self.batch.mask.unsqueeze(-1), 0.0)
        entropy = _entropy(self.batch.squared_singular_values(visit))
        norms = residual_norm(states)
        massive = norms.new_empty(self.batch.prompts)
        place = massive.new_empty(self.batch.prompts, 2, dtype=torch.int64)
        for length, rows in self._alike.items():
            massive[rows], place[rows] = _massive(states[rows, :length])
        values = (
            entropy,
            torch.where(self._most > 0, entropy / self._most, torch.nan),
            masked_mean(norms, self.batch.mask),
            norms.amax(-1),
            massive,
            place[:, 0],
            place[:, 1],
        )
        self._values[:, depth] = torch.stack([value.double() for value in values])

    def result(self) -> xr.Dataset:
        return self.dataset(dict(zip(STAGE_NAMES, self._values, strict=True)))


STAGE_NAMES = tuple(StageMeasures.variables)
"""Per visit and prompt, in the order of the rows."""
