"""Rest beyond the horizon: whether the run to the second horizon has anything more to show."""

from __future__ import annotations

from typing import ClassVar

import torch
import xarray as xr
from torch import Tensor

from loopscope.dynamics.trajectories.settings import DisplacementSettings
from loopscope.dynamics.trajectories.states import known_dtype, rounding_step
from loopscope.dynamics.trajectories.twins import PARTED
from loopscope.measures.base import BatchInfo, Measure, Needs, Plan, Variable, variable
from loopscope.measures.functions import distance, residual_norm
from loopscope.measures.memory import Memory
from loopscope.models.subject import SubjectInfo
from loopscope.models.visits import Visit

_EVERY = 8
"""Recurrences between two looks, for which a device is waited for."""
_AS_FAR = 1.5
"""A state rests while it is at most this many times as far from where it was at the horizon as its twin is from it, and
the twin as far in the later half of the time as in the earlier: it is once, as all of these are two draws of one noise,
and 0.8 to 1.4 times for the 600 tokens and layers of a prompt. A drift by a fortieth of the noise floor in a recurrence
makes it 1.3 times after 32, growth by a fortieth 1.5 times."""


def longest_rest(horizon: int) -> int:
    """Recurrences of rest after which a run can still end before twice the horizon."""
    last = (horizon - 3) // _EVERY * _EVERY
    return last - _from(horizon)


def _from(horizon: int) -> int:
    """Recurrences beyond the horizon before which nothing ends: what is judged has to be kept from its beginning."""
    return max(0, horizon - DisplacementSettings().window)


class Rest(Measure):
    """Compares each state beyond the horizon with that at the horizon, and with how far the twin is; where every token
    has rested long enough, the run ends two recurrences later (`BatchInfo.stopped`)."""

    variables: ClassVar[dict[str, Variable]] = {
        "stopped_at": variable(
            "prompt",
            "recurrences after which the run to twice the horizon ended, since every token of the prompt's batch had "
            "rested at its noise floor; -1 if it went on",
            "recurrences",
        )
    }
    needs = Needs(loop=True, long_run=True, twin=True, also=("twin",))
    otherwise = "the runs of this model cannot be nudged"

    def __init__(self, batch: BatchInfo) -> None:
        super().__init__(batch)
        batch.rest = self
        layers, self._first = batch.info.recurrent, batch.plan.horizon
        self._there: list[Tensor | None] = [None] * layers
        self._away = torch.full((layers, self._first, *batch.mask.shape), torch.nan, device=batch.mask.device)
        dtype = known_dtype(batch.info.dtype, otherwise="float32")
        self._apart = min(PARTED, DisplacementSettings().gain * rounding_step(dtype))

    @classmethod
    def absent(cls, info: SubjectInfo, plan: Plan) -> str | None:
        return None if plan.stop_at_rest else "the run was to go on to twice the horizon (--stop-at-rest)"

    @classmethod
    def memory(cls, batch: BatchInfo) -> Memory:
        (states, wide), layers = batch.bytes, batch.info.recurrent
        return Memory(kept=layers * (states + batch.plan.horizon * batch.mask.numel() * 4), visit=3 * wide)

    def visit(self, visit: Visit) -> None:
        if visit.stage != "recurrent" or visit.recurrence < self._first:
            return
        if visit.recurrence == self._first:
            self._there[visit.layer] = visit.residual
            return
        there = self._there[visit.layer]
        assert there is not None  # the horizon was announced
        away = distance(visit.residual, there) / residual_norm(visit.residual)
        self._away[visit.layer, visit.recurrence - self._first - 1] = away

    def look(self, recurrence: int) -> None:
        """After that many recurrences, and those of the twin."""
        beyond, least = recurrence - self._first, self.batch.plan.stop_at_rest
        if (
            self.batch.stopped is not None
            or beyond < _from(self._first) + least
            or beyond % _EVERY
            or beyond + 2 >= self._first
        ):
            return
        assert self.batch.twin is not None
        begin, half = beyond - least, beyond - least // 2
        its_early, its_late, late = (
            each[:, :, self.batch.mask].double().square().mean(1)
            for each in (
                self.batch.twin.distance[:, begin:half],
                self.batch.twin.distance[:, half:beyond],
                self._away[:, half:beyond],
            )
        )
        # Twins that have parted are as far from each other as the run is from everywhere.
        near = its_late <= self._apart**2
        rests = (late <= _AS_FAR**2 * its_late) & (its_late <= _AS_FAR**2 * its_early) & near
        if bool(rests.all()):
            self.batch.stopped = recurrence + 2

    def result(self) -> xr.Dataset:
        stopped = -1 if self.batch.stopped is None else self.batch.stopped
        return self.dataset({"stopped_at": torch.full((self.batch.prompts,), stopped, dtype=torch.int64)})
