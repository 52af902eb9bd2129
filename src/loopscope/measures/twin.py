"""The twin: the same prompts, nudged by one rounding at every recurrence from the horizon on, beside the run that is
not nudged.

At a fixed point both runs are the same stationary noise, independent of each other, so that their distance is the step
that noise makes there: a noise floor of this model in this dtype, whatever the colour of the noise and however
non-normal the recurrence. Where the loop is chaotic the two part. On a stable orbit, and on a drift, they stay beside
each other while both move.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from loopscope.dynamics.trajectories.noise import Noise
from loopscope.dynamics.trajectories.states import known_dtype, rounding_step
from loopscope.dynamics.trajectories.twins import PARTED, floor_of, growth_of, have_parted
from loopscope.measures.base import BatchInfo, Measure, Needs, Variable, masked_mean, variable
from loopscope.measures.functions import distance, residual_norm
from loopscope.measures.memory import Memory
from loopscope.models.native.interventions import initial_noise
from loopscope.models.visits import Observer, Visit


class Nudges:
    """Factors 1 + e by which the loop state is multiplied, e normal and of the size of one rounding, independent from
    recurrence to recurrence.

    Each prompt's depend on its token ids and the seed alone. One draw serves all recurrences: rolled along the width it
    is uncorrelated with itself.
    """

    def __init__(self, batch: BatchInfo) -> None:
        self._batch = batch
        dtype = known_dtype(batch.info.dtype, otherwise="float32")
        # Two states that differ by one rounding each are `rounding_step` apart.
        size = rounding_step(dtype) / math.sqrt(2)
        tokens, mask = batch.batch.input_ids, batch.mask
        noise = initial_noise(tokens, mask, batch.info.width, std=1.0, seed=batch.plan.seed + 2)
        self._noise = size * noise.to(batch.mask.device, torch.float64 if dtype == "float64" else torch.float32)

    def factors(self, recurrence: int) -> Float[Tensor, "batch token width"]:
        return 1 + self._noise.roll(recurrence, -1)


class Twin(Measure):
    """How far the nudged run is: the measured noise floor, how fast the two part, and until when they have not."""

    part = "twin"
    variables: ClassVar[dict[str, Variable]] = {
        "twin_distance": variable(
            "layer long_recurrence prompt",
            "distance over the norm between the run and its twin, which is nudged by one rounding at every "
            "recurrence from the horizon on; root mean square over tokens; NaN before the horizon",
        ),
        "twin_floor": variable(
            "layer prompt token",
            "measured noise floor: twin_distance of one token, root mean square over the second half of the twin's run",
        ),
        "twin_growth": variable(
            "prompt token",
            "finite-time Lyapunov exponent: slope of the logarithm of the twin's distance at the last recurrent "
            "layer, until it reaches a tenth of its final size",
            "e-folds per recurrence",
        ),
        "twin_growth_error": variable("prompt token", "standard error of twin_growth", "e-folds per recurrence"),
        "twin_parted": variable(
            "prompt token",
            "recurrences from the first nudge until the twins are a tenth of the norm apart at the last "
            "recurrent layer; later states are made by rounding; -1 if they never are",
            "recurrences",
        ),
    }
    needs = Needs(loop=True, long_run=True, twin=True)
    otherwise = "the runs of this model cannot be nudged"

    def __init__(self, batch: BatchInfo) -> None:
        super().__init__(batch)
        batch.twin = self
        self.nudged: Observer = _Nudged(self)
        layers, self._first = batch.info.recurrent, batch.plan.horizon
        self._seen: list[tuple[Tensor, Tensor] | None] = [None] * layers
        # From the first nudge on.
        self.distance = torch.full((layers, self._first, *batch.mask.shape), torch.nan, device=batch.mask.device)

    @classmethod
    def memory(cls, batch: BatchInfo) -> Memory:
        (states, wide), layers = batch.bytes, batch.info.recurrent
        distances = layers * batch.plan.horizon * batch.mask.numel() * 4
        # The states that are compared, those of the twin itself, and its nudges.
        return Memory(kept=distances + (layers + 1) * states + wide, visit=3 * wide, result=4 * distances)

    def visit(self, visit: Visit) -> None:
        if visit.stage == "recurrent" and visit.recurrence > self._first:
            self._seen[visit.layer] = (visit.residual, residual_norm(visit.residual))

    def compare(self, visit: Visit) -> None:
        """The same visit of the nudged run."""
        seen = self._seen[visit.layer]
        assert seen is not None  # the run itself was advanced before
        self.distance[visit.layer, visit.recurrence - self._first - 1] = distance(visit.residual, seen[0]) / seen[1]
        self._seen[visit.layer] = None

    @property
    def _done(self) -> Tensor:
        """Of the recurrences until the run ended."""
        return self.distance[:, : self.batch.end - self._first]

    def noise(self, layer: int) -> Noise:
        """What it says of each token at a layer; tokens of all prompts in order."""
        rounding = rounding_step(known_dtype(self.batch.info.dtype, otherwise="float32"))
        distance = self._done[layer][:, self.batch.mask]
        floor = floor_of(distance)
        return Noise(rounding, floor.cpu(), have_parted(distance, floor, rounding).cpu())

    def result(self) -> xr.Dataset:
        if self.distance.isnan().all():
            return self.dataset({})
        mask, last = self.batch.mask, self._done[-1].double()
        floor = torch.stack([floor_of(distance) for distance in self._done])
        over_tokens = masked_mean(self.distance.double().square(), mask).sqrt()
        growth, error = growth_of(last)
        far = last >= PARTED
        parted = torch.where(far.any(0), far.int().argmax(0) + 1, -1).masked_fill(~mask, -1)
        arrays = {
            "twin_distance": torch.cat((torch.full_like(over_tokens, torch.nan), over_tokens), dim=1).float(),
            "twin_floor": floor.masked_fill(~mask, torch.nan).float(),
            "twin_growth": growth.masked_fill(~mask, torch.nan).float(),
            "twin_growth_error": error.masked_fill(~mask, torch.nan).float(),
            "twin_parted": parted,
        }
        return self.dataset({name: values.cpu().numpy() for name, values in arrays.items()})


class _Nudged(Observer):
    def __init__(self, owner: Twin) -> None:
        self._owner = owner

    def visit(self, visit: Visit) -> None:
        if visit.stage == "recurrent":
            self._owner.compare(visit)
