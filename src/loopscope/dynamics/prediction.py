"""What eigenvalues say of the way a token's state will go, and what damping makes of them.

No torch and no model is needed: the answers and the report read studies with this.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import numpy as np
from jaxtyping import Bool, Complex, Float, Inexact, Int
from numpy import ndarray

from loopscope._util.ranges import Positive, Range, check_ranges
from loopscope.errors import ConfigError

AnyEigenvalues = Inexact[ndarray, "*shape pair"]
Values = Float[ndarray, "*shape"]
Eigenvalues = Complex[ndarray, "prompt token pair"]
TokenValues = Float[ndarray, "prompt token"]

_SECTIONS = 60
"""Of the interval that holds the best eta, by the golden ratio each: to 3e-13, which moves no radius."""


class PredictedKind(StrEnum):
    """What a token's state tends to near the point at which the eigenvalues were taken."""

    FIXED_POINT = "fixed point"
    DAMPED_ROTATION = "damped rotation"
    """A fixed point, which is reached in turns that look like an orbit for a while."""
    SLIDER = "slider"
    """An eigenvalue near 1: the state creeps along a line of points of which none holds it."""
    ORBIT = "orbit"
    """A pair on or outside the unit circle: the fixed point repels in turns, and the state goes around it."""
    PERIOD_TWO = "period two"
    """The same with an eigenvalue near or beyond -1: the state alternates between two sides."""
    UNSTABLE = "unstable"
    """A real eigenvalue above 1: the state leaves the fixed point. Where to, its eigenvalues do not say."""
    FAR = "no fixed point here"
    """The point moves too much in one recurrence for its eigenvalues to be those of a fixed point."""
    UNRESOLVED = "cannot tell"
    """The eigenvalue's error leaves several kinds open, or there is no eigenvalue."""

    @property
    def settles(self) -> bool:
        """The fixed point attracts, in turns or without."""
        return self in (PredictedKind.FIXED_POINT, PredictedKind.DAMPED_ROTATION)

    @property
    def known(self) -> bool:
        """The eigenvalues are those of a fixed point, and good enough to say something of it."""
        return self not in (PredictedKind.FAR, PredictedKind.UNRESOLVED)


PREDICTED_KINDS = tuple(PredictedKind)
"""In the order in which a study numbers them."""
KNOWN_CODES = tuple(code for code, kind in enumerate(PREDICTED_KINDS) if kind.known)
"""Places in `PREDICTED_KINDS` of those that say something."""
_SETTLING = [kind for kind in PREDICTED_KINDS if kind.settles]


@dataclass(frozen=True, kw_only=True)
class StabilityCriterion:
    """When an eigenvalue counts as on the unit circle, as real, as known. Stored with what is predicted.

    Raises `ConfigError` for a value outside its range.
    """

    horizon: Annotated[int, Range(2)] = 128
    """Recurrences over which trajectories are judged. A modulus within 1 / horizon of 1 changes a distance by less than
    a factor e in that many, and an angle below 2 pi / horizon makes less than one turn: neither can be told from 1, or
    from no angle, by anyone who looks."""
    visible_turn: Positive = 0.3
    """A fixed point is reached in a rotation if so much of the distance is left after one turn. With less, what comes
    around is lost in what was there before; `demo:injected` keeps 0.1 and shows no turns."""
    largest_step: Positive = 0.02
    """Above this relative step the point is no fixed point. A state that grows in proportion to the recurrences moves
    by 1 / 128 at the horizon, and is a slider."""

    def __post_init__(self) -> None:
        check_ranges(self, "The criterion ")


@dataclass(frozen=True, eq=False)
class Prediction:
    """For every token, (prompt, token); NaN, -1 and `PredictedKind.UNRESOLVED` at padding."""

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
    """`PredictedKind` as text."""
    period: TokenValues
    """Recurrences of one turn, 2 for a negative eigenvalue, NaN for a positive one."""
    criterion: StabilityCriterion


def predict(
    eigenvalues: Eigenvalues,
    errors: Float[ndarray, "prompt token pair"],
    relative_step: TokenValues,
    criterion: StabilityCriterion | None = None,
) -> Prediction:
    """Rate, kind and period for every token, of its own leading eigenvalue or that of a slower token before it.

    **Arguments**

    - `eigenvalues`, `errors`: by decreasing modulus, with the estimated error of each; NaN at padding.
    - `relative_step`: how far the point moves in one recurrence, relative to its norm; NaN at padding. A token stands
      nearer to a fixed point than none before it.

    A kind is given if all eigenvalues within the error have it. Nothing is predicted of a token before which another
    one's eigenvalues were not taken: that may be the slowest.
    """
    criterion = criterion or StabilityCriterion()
    eigenvalues = np.where(follows_untaken(eigenvalues, relative_step)[..., None], np.nan, eigenvalues)
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
        kind=np.where(known, kind, PredictedKind.UNRESOLVED.value),
        period=np.where(known, period(leading), np.nan),
        criterion=criterion,
    )


def follows_untaken(eigenvalues: Eigenvalues, relative_step: TokenValues) -> Bool[ndarray, "prompt token"]:
    """Whether the token, or one before it, has a point and no eigenvalues."""
    missing: ndarray = np.isnan(eigenvalues).all(-1) & ~np.isnan(relative_step)
    return np.logical_or.accumulate(missing, axis=1)


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


def spectral_radius(eigenvalues: AnyEigenvalues) -> Values:
    """The largest modulus; NaN where there is no eigenvalue."""
    moduli = np.where(np.isnan(eigenvalues), -np.inf, np.abs(eigenvalues)).max(-1)
    return np.where(moduli < 0, np.nan, moduli)


def damped(eigenvalues: AnyEigenvalues, eta: float) -> AnyEigenvalues:
    """`1 - eta + eta lambda`: the eigenvalues of the damped loop."""
    _check_eta(eta)
    moved: np.ndarray = 1 - eta + eta * eigenvalues
    return moved


def undamped(eigenvalues: AnyEigenvalues, eta: float) -> AnyEigenvalues:
    """The inverse of `damped`: what the eigenvalues of a damped loop were without the damping."""
    _check_eta(eta)
    moved: np.ndarray = 1 - (1 - eigenvalues) / eta
    return moved


def damping_needed(eigenvalues: AnyEigenvalues, radius: float = 1.0) -> Values:
    """The largest eta in (0, 1] with `|1 - eta + eta lambda| <= radius` for all eigenvalues; NaN where none is.

    With `mu = 1 - lambda` the condition is `eta^2 |mu|^2 - 2 eta Re mu + 1 - radius^2 <= 0`: eta lies between

        (Re mu -+ sqrt((Re mu)^2 - |mu|^2 (1 - radius^2))) / |mu|^2.

    The intervals of all eigenvalues are intersected with (0, 1]. For a radius up to 1 there is none if an eigenvalue
    has a real part of 1 or more: damping moves it along a line through 1, which leads into the circle on the other side
    only. With radius 1 the upper end is `2 Re mu / |mu|^2`, and the damped loop is on the brink of stability; a smaller
    radius asks for a rate. Flatten tokens into the last dimension for one eta that does for all of them.
    """
    if not 0 < radius <= 1:
        raise ConfigError(f"radius must be above 0 and at most 1, got {radius}.")
    mu = 1 - eigenvalues
    missing = np.isnan(mu)
    square = np.abs(mu) ** 2
    under = mu.real**2 - square * (1 - radius**2)
    stays = square == 0  # an eigenvalue of 1 stays where it is
    safe = np.where(stays | missing, 1.0, square)
    root = np.sqrt(np.clip(under, 0, None))
    low = np.where(stays, 0.0, (mu.real - root) / safe)
    high = np.where(stays, 1.0, (mu.real + root) / safe)
    possible = np.where(stays, radius == 1, (under >= 0) & (mu.real > 0)) | missing
    largest = np.minimum(np.where(missing, np.inf, high).min(-1), 1.0)
    least = np.where(missing, -np.inf, low).max(-1)
    exists = possible.all(-1) & ~missing.all(-1) & (least <= largest)
    return np.where(exists, largest, np.nan)


def best_damping(eigenvalues: AnyEigenvalues) -> tuple[Values, Values]:
    """The eta in (0, 1] that makes the damped loop's spectral radius smallest, and that radius; NaN without
    eigenvalues.

    `|1 - eta + eta lambda|` is convex in eta, and so is the largest of several, which the golden section minimises. An
    eta near 0 with a radius of 1 means that no damping makes the loop stable.
    """
    shape, flat = eigenvalues.shape[:-1], eigenvalues.reshape(-1, eigenvalues.shape[-1])
    low, high = np.zeros(len(flat)), np.ones(len(flat))
    share = (np.sqrt(5) - 1) / 2
    for _ in range(_SECTIONS):
        left, right = high - share * (high - low), low + share * (high - low)
        rises = _radius(flat, left) < _radius(flat, right)
        low, high = np.where(rises, low, left), np.where(rises, right, high)
    # The section comes close to an end of the interval and never reaches it.
    whole = _radius(flat, np.ones(len(flat))) <= _radius(flat, (low + high) / 2)
    eta = np.where(whole, 1.0, (low + high) / 2)
    known = ~np.isnan(flat).all(-1)
    best, radius = (np.where(known, each, np.nan).reshape(shape) for each in (eta, _radius(flat, eta)))
    return best, radius


def _kinds(
    eigenvalue: Complex[ndarray, "prompt token"], error: TokenValues, step: TokenValues, criterion: StabilityCriterion
) -> ndarray:
    modulus, angle = np.abs(eigenvalue), np.abs(np.angle(eigenvalue))
    with np.errstate(divide="ignore", invalid="ignore"):
        swing = np.minimum(error / modulus, np.pi)
    kind = _kinds_of(modulus, angle, criterion)
    settles = np.isin(kind, _SETTLING)
    for longer in (-1, 1):
        for turned in (-1, 1):
            # An error may be larger than what it is of.
            size = np.maximum(modulus + longer * error, 0.0)
            other = _kinds_of(size, np.clip(angle + turned * swing, 0, np.pi), criterion)
            # A rotation that may or may not be visible is a fixed point either way.
            also_settles = settles & np.isin(other, _SETTLING)
            kind = np.where((other == kind) | also_settles, kind, PredictedKind.UNRESOLVED.value)
    return np.where(step > criterion.largest_step, PredictedKind.FAR.value, kind)


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
            PredictedKind.UNRESOLVED.value,
            PredictedKind.DAMPED_ROTATION.value,
            PredictedKind.FIXED_POINT.value,
            PredictedKind.PERIOD_TWO.value,
            PredictedKind.ORBIT.value,
            PredictedKind.SLIDER.value,
        ],
        default=PredictedKind.UNSTABLE.value,
    )


def _radius(eigenvalues: ndarray, eta: ndarray) -> ndarray:
    """Of the damped loop, with an eta for each token."""
    moved: ndarray = 1 - eta[:, None] * (1 - eigenvalues)
    largest: ndarray = np.where(np.isnan(moved), -np.inf, np.abs(moved)).max(-1)
    return largest


def _check_eta(eta: float) -> None:
    if not 0 < eta <= 1:
        raise ConfigError(f"eta must be above 0 and at most 1, got {eta}.")
