"""What eigenvalues say of the way a token's state will go."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import Complex, Float, Int
from numpy import ndarray

from loopscope.errors import ConfigError
from loopscope.spectra.damping import spectral_radius

__all__ = [
    "PREDICTED_KINDS",
    "Kind",
    "Prediction",
    "StabilityCriterion",
    "period",
    "predict",
    "predicted_rate",
    "stability_margin",
]

Eigenvalues = Complex[ndarray, "prompt token pair"]
TokenValues = Float[ndarray, "prompt token"]


class Kind(StrEnum):
    """What a token's state tends to near the point at which the eigenvalues were taken."""

    FIXED_POINT = "fixed point"
    DAMPED_ROTATION = "damped rotation"
    """A fixed point, which is reached in turns that look like an orbit for a while."""
    SLIDER = "slider"
    """An eigenvalue near 1: the state creeps along a line of points of which none holds it."""
    ORBIT = "orbit"
    """A pair on or outside the unit circle: the fixed point repels in turns, and the state goes around it."""
    PERIOD_TWO = "period two"
    """The same with an eigenvalue near or beyond -1: the state jumps to and fro."""
    UNSTABLE = "unstable"
    """A real eigenvalue above 1: the state leaves the fixed point. Where to, its eigenvalues do not say."""
    FAR = "no fixed point here"
    """The point moves too much in one recurrence for its eigenvalues to be those of a fixed point."""
    UNRESOLVED = "cannot tell"
    """The eigenvalue's error leaves several kinds open, or there is no eigenvalue."""


PREDICTED_KINDS = tuple(Kind)
"""In the order in which a study numbers them."""


@dataclass(frozen=True, kw_only=True)
class StabilityCriterion:
    """When an eigenvalue counts as on the unit circle, as real, as known. Stored with what is predicted.

    Raises `ConfigError` for a value outside its range.
    """

    horizon: int = 128
    """Recurrences over which trajectories are judged. A modulus within 1 / horizon of 1 changes a distance by less than
    a factor e in so many, and an angle below 2 pi / horizon makes less than one turn: neither can be told from 1, or
    from no angle, by anyone who looks."""
    visible_turn: float = 0.3
    """A fixed point is reached in a rotation if so much of the distance is left after one turn. With less, what comes
    around is lost in what was there before; `demo:injected` keeps 0.1 and shows no turns."""
    largest_step: float = 0.02
    """Above this relative step the point is no fixed point. A state that grows in proportion to the recurrences moves
    by 1 / 128 at the horizon, and is a slider."""

    def __post_init__(self) -> None:
        if self.horizon < 2:
            raise ConfigError(f"The criterion horizon must be at least 2, got {self.horizon}.")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"The criterion {field.name} must be a positive finite number, got {value}.")


@dataclass(frozen=True, eq=False)
class Prediction:
    """For every token, (prompt, token); NaN, -1 and `Kind.UNRESOLVED` at padding."""

    rate: TokenValues
    """Factor by which the distance to the fixed point shrinks in a recurrence: the largest spectral radius of the token
    and those before it. Above 1 it grows."""
    error: TokenValues
    """Estimated error of the rate."""
    source: Int[ndarray, "prompt token"]
    """The token whose eigenvalue it is."""
    eigenvalue: Complex[ndarray, "prompt token"]
    """Its leading eigenvalue; of a pair, the one with positive imaginary part."""
    kind: ndarray
    """`Kind` as text."""
    period: TokenValues
    """Recurrences of one turn, 2 for a negative eigenvalue, NaN for a positive one."""
    criterion: StabilityCriterion


def predicted_rate(eigenvalues: Eigenvalues) -> TokenValues:
    """The running maximum over earlier tokens of the spectral radius; NaN at padding.

    A token's state follows the states before it, so that it settles no faster than the slowest of them (method, section
    6).
    """
    radius = spectral_radius(eigenvalues)
    return np.where(np.isnan(radius), np.nan, np.fmax.accumulate(radius, axis=1))


def stability_margin(eigenvalues: Complex[ndarray, "*shape pair"]) -> Float[ndarray, "*shape"]:
    """`1 - max |lambda|`: how much the spectral radius has to grow until stability is lost; negative where it is."""
    return 1 - spectral_radius(eigenvalues)


def period(eigenvalues: Complex[ndarray, "*shape"]) -> Float[ndarray, "*shape"]:
    """`2 pi / |arg lambda|` recurrences of a turn: 2 for a negative eigenvalue, NaN for a positive one."""
    angle = np.abs(np.angle(eigenvalues))
    return np.where(angle > 0, 2 * np.pi / np.where(angle > 0, angle, 1.0), np.nan)


def predict(
    eigenvalues: Eigenvalues,
    errors: Float[ndarray, "prompt token pair"],
    relative_step: TokenValues,
    criterion: StabilityCriterion | None = None,
) -> Prediction:
    """Rate, kind and period for every token, of its own leading eigenvalue or that of a slower token before it.

    **Arguments**

    - `eigenvalues`, `errors`: by decreasing modulus, with the estimated error of each; NaN at padding.
    - `relative_step`: how far the point moves in one recurrence, relative to its norm. A token stands nearer to a fixed
      point than none before it.

    A kind is given if all eigenvalues within the error have it.
    """
    criterion = criterion or StabilityCriterion()
    radius = spectral_radius(eigenvalues)
    rate = predicted_rate(eigenvalues)
    known = ~np.isnan(radius)
    source = np.maximum.accumulate(np.where(known & (radius >= rate), np.arange(radius.shape[1]), -1), axis=1)
    rows = np.arange(len(radius))[:, None]
    leading = np.where(eigenvalues[..., 0].imag < 0, eigenvalues[..., 0].conj(), eigenvalues[..., 0])[rows, source]
    error = errors[..., 0][rows, source]
    step = np.fmax.accumulate(relative_step, axis=1)
    kind = _kinds(leading, error, step, criterion)
    return Prediction(
        rate=rate,
        error=np.where(known, error, np.nan),
        source=np.where(known, source, -1),
        eigenvalue=np.where(known, leading, np.nan),
        kind=np.where(known, kind, Kind.UNRESOLVED.value),
        period=np.where(known, period(leading), np.nan),
        criterion=criterion,
    )


def _kinds(
    eigenvalue: Complex[ndarray, "prompt token"], error: TokenValues, step: TokenValues, criterion: StabilityCriterion
) -> ndarray:
    modulus, angle = np.abs(eigenvalue), np.abs(np.angle(eigenvalue))
    with np.errstate(divide="ignore", invalid="ignore"):
        swing = np.minimum(error / modulus, np.pi)
    kind = _kinds_of(modulus, angle, criterion)
    settles = np.isin(kind, (Kind.FIXED_POINT, Kind.DAMPED_ROTATION))
    for longer in (-1, 1):
        for turned in (-1, 1):
            other = _kinds_of(modulus + longer * error, np.clip(angle + turned * swing, 0, np.pi), criterion)
            # A rotation that may or may not be visible is a fixed point either way.
            also_settles = settles & np.isin(other, (Kind.FIXED_POINT, Kind.DAMPED_ROTATION))
            kind = np.where((other == kind) | also_settles, kind, Kind.UNRESOLVED.value)
    return np.where(step > criterion.largest_step, Kind.FAR.value, kind)


def _kinds_of(modulus: TokenValues, angle: TokenValues, criterion: StabilityCriterion) -> ndarray:
    """Of eigenvalues that are known exactly, with the angle in [0, pi]."""
    near, small = 1 / criterion.horizon, 2 * np.pi / criterion.horizon
    turns = angle >= small
    flips = angle > np.pi - small
    with np.errstate(divide="ignore", over="ignore"):
        left = modulus ** (2 * np.pi / np.maximum(angle, small))
    inside = modulus < 1 - near
    return np.select(
        [
            np.isnan(modulus),
            inside & turns & (left >= criterion.visible_turn),
            inside,
            flips,
            turns,
            modulus <= 1 + near,
        ],
        [
            Kind.UNRESOLVED.value,
            Kind.DAMPED_ROTATION.value,
            Kind.FIXED_POINT.value,
            Kind.PERIOD_TWO.value,
            Kind.ORBIT.value,
            Kind.SLIDER.value,
        ],
        default=Kind.UNSTABLE.value,
    )
