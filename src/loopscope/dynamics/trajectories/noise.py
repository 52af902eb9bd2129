"""What noise makes of each token's motion: one rounding of the dtype, and where it was measured, this model's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopscope.dynamics.trajectories.settings import DisplacementSettings
from loopscope.dynamics.trajectories.states import rounding_step
from loopscope.dynamics.trajectories.tail import Components
from loopscope.models.inspection.facts import Dtype

_MODES = 8
"""Components that the linear map is fitted to, at most: what noise excites strongly is a few modes."""
_SAMPLES = 5
"""Recurrences for each of them, at least, or the map would follow the noise."""


@dataclass(frozen=True, slots=True, eq=False)
class Noise:
    """Steps are the distance of two states that differ by nothing but noise, over the norm."""

    rounding: float
    """Step of one rounding of the dtype."""
    floor: Float[Tensor, " token"]
    """Measured step, the distance of a twin that is nudged by one rounding at every recurrence; NaN where there was no
    twin."""
    parted: Bool[Tensor, " token"]
    """The twin has left: rounding grows without end, and what it becomes is no noise."""

    @classmethod
    def of(cls, dtype: Dtype, tokens: int) -> Noise:
        """Nothing was measured."""
        return cls(rounding_step(dtype), torch.full((tokens,), math.nan), torch.zeros(tokens, dtype=torch.bool))

    @classmethod
    def together(cls, several: Sequence[Noise]) -> Noise:
        """Of the tokens of all, one after the other."""
        return cls(
            several[0].rounding,
            torch.cat([each.floor for each in several]),
            torch.cat([each.parted for each in several]),
        )

    def take(self, rows: Int[Tensor, " row"]) -> Noise:
        """Of some tokens."""
        return Noise(self.rounding, self.floor[rows], self.parted[rows])

    @property
    def measured(self) -> Bool[Tensor, " token"]:
        """Its noise was measured, and is noise."""
        return ~(self.floor.isnan() | self.parted)

    @property
    def unit(self) -> Float[Tensor, " token"]:
        """The step that noise makes: the measured one, or that of one rounding."""
        return torch.where(self.measured, self.floor.double(), self.rounding).clamp_min(self.rounding)

    def rest(self, settings: DisplacementSettings) -> Float[Tensor, " token"]:
        """Motion up to this is rest."""
        floor = torch.where(self.measured, self.floor.double(), 0.0)
        return (settings.rest * floor).clamp_min(settings.rounding_factor * self.rounding)

    def amplified(self, settings: DisplacementSettings) -> Float[Tensor, " token"]:
        """What a shape leaves of a motion is noise up to this."""
        return torch.where(self.measured, self.rest(settings), settings.floor_factor * self.rounding)


def innovation_step(parts: Components) -> Float[Tensor, " token"]:
    """Step of what the best linear map from one recurrence to the next leaves of each motion.

    Noise that a contraction has amplified is foreseen but for what was new in the last recurrence, and that is of the
    size of a few roundings however large the motion has become; chaos, which no linear map foresees, leaves a share of
    itself. The map is fitted by least squares to the leading components (a vector autoregression of order one); the
    others count as unforeseen.
    """
    modes = max(1, min(_MODES, parts.scores.shape[-1], (parts.window - 1) // _SAMPLES))
    leading = parts.scores[..., -modes:]
    before, after = leading[:, :-1], leading[:, 1:]
    before, after = before - before.mean(1, keepdim=True), after - after.mean(1, keepdim=True)
    found: Tensor = torch.linalg.lstsq(before, after, driver="gelsd").solution
    left = (after - before @ found).square().sum((-1, -2)) / max(1, parts.window - 2 - modes)
    others = (parts.energy - leading.square().sum((-1, -2))).clamp_min(0.0) / (parts.window - 1)
    step: Tensor = (2 * (left + others)).sqrt()
    return step
