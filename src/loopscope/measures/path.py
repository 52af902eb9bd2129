"""Path independence: the same prompts from two initial states (method, section 4)."""

from __future__ import annotations

from typing import ClassVar

import torch
import xarray as xr
from torch import Tensor

from loopscope.measures.base import BatchInfo, Measure, Needs, Variable, masked_mean, variable
from loopscope.measures.functions import distances, residual_norm
from loopscope.measures.memory import Memory
from loopscope.models.visits import Observer, Visit


class PathIndependence(Measure):
    """Observes the first run; `second` observes the other one, which is advanced one recurrence behind it."""

    part = "path-independence"
    variables: ClassVar[dict[str, Variable]] = {
        "path_distance": variable(
            "layer recurrence prompt", "distance of the trajectories from two initial states, over the mean norm"
        ),
        "path_cosine_distance": variable(
            "layer recurrence prompt", "1 - cosine of the trajectories from two initial states"
        ),
    }
    needs = Needs(loop=True, second_run=True)

    def __init__(self, batch: BatchInfo) -> None:
        super().__init__(batch)
        self.second: Observer = _Second(self)
        self._first: list[tuple[Tensor, Tensor] | None] = [None] * batch.info.recurrent
        shape = (2, batch.info.recurrent, batch.recurrences, batch.prompts)
        self._values = batch.unknown(*shape, dtype=torch.float64)

    @classmethod
    def memory(cls, batch: BatchInfo) -> Memory:
        states, wide = batch.bytes
        # The second run's state, and the prelude's output that it goes on receiving.
        return Memory(kept=(batch.info.recurrent + 2) * states, visit=8 * wide)

    def visit(self, visit: Visit) -> None:
        if visit.stage == "recurrent":
            self._first[visit.layer] = (visit.residual, residual_norm(visit.residual.double()))

    def compare(self, visit: Visit) -> None:
        """The same visit of the second run."""
        first = self._first[visit.layer]
        assert first is not None  # the first run was advanced before
        state = visit.residual.double()
        norm = residual_norm(state)
        away, turned = distances(state, norm, *first)
        # Relative to the mean of the two norms, so that neither run is the reference.
        size = (first[1] + norm) / 2
        found = masked_mean(torch.stack([away / size, turned]), self.batch.mask)
        self._values[:, visit.layer, visit.recurrence] = found

    def result(self) -> xr.Dataset:
        return self.dataset({"path_distance": self._values[0], "path_cosine_distance": self._values[1]})


class _Second(Observer):
    def __init__(self, owner: PathIndependence) -> None:
        self._owner = owner

    def visit(self, visit: Visit) -> None:
        if visit.stage == "recurrent":
            self._owner.compare(visit)
