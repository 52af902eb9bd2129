"""Effective rank: how many directions the states of a visit spread over."""

from __future__ import annotations

from typing import ClassVar

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from loopscope.measures.base import BatchInfo, Measure, Variable, depth_count, depth_of, on_arrays, variable
from loopscope.measures.functions import squared_singular_values
from loopscope.models.visits import Visit


@on_arrays
def effective_rank(states: Float[Tensor, "*shape token width"]) -> Float[Tensor, "*shape"]:
    """`exp(-sum_j p_j log p_j)` with `p_j = s_j / sum s`, s the singular values of the (token, width) matrix: from 1,
    where all states lie on one line, to min(T, D), where they fill all directions alike (Roy and Vetterli, "The
    effective rank", EUSIPCO 2007).
    """
    return _of_squares(squared_singular_values(states))


def _of_squares(squares: Float[Tensor, "*shape value"]) -> Float[Tensor, "*shape"]:
    # Eigenvalues of a Gram matrix carry errors of some 1e-16 of the largest, and their roots of 1e-8: what may be noise
    # is taken for 0, or a matrix of lower rank would seem to have a little more. A true value below that is lost,
    # which lowers the rank by a share of 1e-7 at most.
    noise = squares.shape[-1] * torch.finfo(squares.dtype).eps * squares.amax(-1, keepdim=True)
    values = torch.where(squares > noise, squares, 0.0).sqrt()
    rank: Tensor = torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1).exp()
    return rank


class EffectiveRank(Measure):
    """A number a visit and prompt."""

    part = "stages"
    variables: ClassVar[dict[str, Variable]] = {
        "effective_rank": variable(
            "depth prompt",
            "exp of the entropy of the normalised singular values of the (token, width) matrix of states",
            "directions",
        )
    }

    def __init__(self, batch: BatchInfo) -> None:
        super().__init__(batch)
        self._ranks = batch.unknown(depth_count(batch), batch.prompts, dtype=torch.float64)

    def visit(self, visit: Visit) -> None:
        depth = depth_of(self.batch, visit.stage, visit.layer, visit.recurrence)
        self._ranks[depth] = _of_squares(self.batch.squared_singular_values(visit))

    def result(self) -> xr.Dataset:
        return self.dataset({"effective_rank": self._ranks})
