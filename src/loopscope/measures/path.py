"""Path independence: the same prompts from several initial states (method, section 4)."""

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
    """Observes the measured run; `beside` observes those from other initial states, which are advanced one recurrence
    behind it."""

    part = "path-independence"
    variables: ClassVar[dict[str, Variable]] = {
        "path_distance": variable(
            "layer recurrence prompt",
            "distance between the trajectories from two initial states, over the mean norm; with more initial "
            "states, that of the farthest",
        ),
        "path_cosine_distance": variable(
            "layer recurrence prompt", "1 - cosine of the trajectories from two initial states; with more, the largest"
        ),
        "start_distance": variable(
            "start start_other prompt token",
            "distance between the states of the last recurrent layer after the measured recurrences, from two "
            "initial states, over the mean norm; the first start is the run's own",
        ),
    }
    needs = Needs(loop=True, second_run=True)

    def __init__(self, batch: BatchInfo) -> None:
        super().__init__(batch)
        starts = batch.plan.other_starts
        self.beside = tuple(_Beside(self, place) for place in range(starts))
        self._first: list[tuple[Tensor, Tensor] | None] = [None] * batch.info.recurrent
        shape = (2, starts, batch.info.recurrent, batch.recurrences, batch.prompts)
        self._values = batch.unknown(*shape, dtype=torch.float64)
        self._ends: list[Tensor] = []

    @classmethod
    def memory(cls, batch: BatchInfo) -> Memory:
        states, wide = batch.bytes
        starts = batch.plan.other_starts
        # Of each other run the state, the prelude's output that it goes on receiving, and the end.
        return Memory(kept=(batch.info.recurrent + 1 + 3 * starts) * states, visit=8 * wide, result=8 * wide)

    def visit(self, visit: Visit) -> None:
        if visit.stage == "recurrent":
            self._first[visit.layer] = (visit.residual, residual_norm(visit.residual.double()))
            self._keep_end(visit)

    def compare(self, visit: Visit, start: int) -> None:
        """The same visit of the run from another initial state."""
        first = self._first[visit.layer]
        assert first is not None  # the first run was advanced before
        away, turned = _apart(visit.residual, *first)
        found = masked_mean(torch.stack([away, turned]), self.batch.mask)
        self._values[:, start, visit.layer, visit.recurrence - 1] = found
        self._keep_end(visit)

    def _keep_end(self, visit: Visit) -> None:
        if visit.layer == self.batch.info.recurrent - 1 and visit.recurrence == self.batch.recurrences:
            self._ends.append(visit.residual)

    def result(self) -> xr.Dataset:
        # As runs diverge, a distance is no number; then the farthest is none either.
        path, turned = self._values.amax(1)
        return self.dataset(
            {"path_distance": path, "path_cosine_distance": turned, "start_distance": self._between_ends()}
        )

    def _between_ends(self) -> Tensor:
        ends = [(end, residual_norm(end.double())) for end in self._ends]
        found = torch.stack([torch.stack([_apart(one, other, norm)[0] for other, norm in ends]) for one, _ in ends])
        return found.where(self.batch.mask, torch.nan).to(self.batch.stored)


def _apart(states: Tensor, reference: Tensor, reference_norm: Tensor) -> tuple[Tensor, Tensor]:
    """Distance over the mean of the two norms, so that neither run is the reference, and 1 - cosine, (batch, token)."""
    wide = states.double()
    norm = residual_norm(wide)
    away, turned = distances(wide, norm, reference, reference_norm)
    return away / ((reference_norm + norm) / 2), turned


class _Beside(Observer):
    def __init__(self, owner: PathIndependence, start: int) -> None:
        self._owner, self._start = owner, start

    def visit(self, visit: Visit) -> None:
        if visit.stage == "recurrent":
            self._owner.compare(visit, self._start)
