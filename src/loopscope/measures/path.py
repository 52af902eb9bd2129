"""Path independence: does the same prompt end in the same place from another initial state?"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from loopscope.measures.base import Arrays, Frame, Measure, Named, masked_mean
from loopscope.measures.functions import cosine_of_norms, distance, residual_norm
from loopscope.visits import Observer, Visit

__all__ = ["PathIndependence"]


class PathIndependence(Measure):
    """Observes the first run; `second` observes the other one, which is advanced one recurrence behind it."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.second: Observer = _Second(self)
        self._first: list[tuple[Tensor, Tensor] | None] = [None] * frame.info.recurrent
        shape = (2, frame.info.recurrent, frame.recurrences, frame.prompts)
        self._values = np.full(shape, np.nan, dtype=np.float64)

    def visit(self, visit: Visit) -> None:
        if visit.stage == "recurrent":
            self._first[visit.layer] = (visit.residual, residual_norm(visit.residual))

    def compare(self, visit: Visit) -> None:
        """The same visit of the second run."""
        first = self._first[visit.layer]
        assert first is not None  # the first run was advanced before
        norm = residual_norm(visit.residual)
        # Relative to the mean of the two norms, so that neither run is the reference.
        size = (first[1] + norm) / 2
        away = masked_mean(distance(visit.residual, first[0]) / size, self.frame.mask)
        turned = masked_mean(cosine_of_norms(visit.residual, norm, *first), self.frame.mask)
        self._values[0, visit.layer, visit.recurrence] = away.double().cpu().numpy()
        self._values[1, visit.layer, visit.recurrence] = turned.double().cpu().numpy()

    def finish(self) -> Arrays:
        dims = ("layer", "recurrence", "prompt")
        return Arrays({"path_distance": Named(dims, self._values[0]), "path_cosine": Named(dims, self._values[1])})


class _Second(Observer):
    def __init__(self, owner: PathIndependence) -> None:
        self._owner = owner

    def visit(self, visit: Visit) -> None:
        if visit.stage == "recurrent":
            self._owner.compare(visit)
