"""What the state of every layer and prompt does between the horizons, and what prompts have in common."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from functools import lru_cache
from itertools import groupby

import numpy as np
import xarray
from numpy.typing import NDArray

from loopscope._util.wording import spans
from loopscope.answers.answer import Criterion
from loopscope.answers.token_kinds import token_kinds
from loopscope.dynamics.trajectories.settings import LOUD
from loopscope.dynamics.verdicts import MOVING_CODES, SETTLED_CODES
from loopscope.study import StudyView

SUMMABLE_RATIO = 2**-1.25
"""The ratio of two steps, at 2H and at H, that shrink like t^-1.25. Steps that shrink faster add up to a finite way.
The limit is 1/t, a ratio of 1/2; what is left between the two is what a mean over tokens scatters, and what a drift
shows whose slowing began late. No setting: it follows from the harmonic series."""
_UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
UNRELATED = 1.0
"""Distance of a prompt's states at the two horizons, over the norm, from which on two steps say nothing of the way
between them: states that have nothing to do with each other are 1.4 apart."""
_PARTED = 0.5
"""Where more of a prompt's tokens are seen to move than this, that its layers settle on average is no finding."""


class Settling(StrEnum):
    """How a state behaves towards the second horizon, from the best to the worst."""

    FIXED_POINT = "fixed point"
    AT_FLOOR = "at the rounding floor"
    NOT_YET = "not yet: its steps still shrink"
    CANNOT_TELL = "cannot tell"
    DIRECTION_ONLY = "direction only: the norm grows"
    NO_FIXED_POINT = "no fixed point"
    DIVERGED = "diverged"

    @property
    def settles(self) -> bool:
        """It reaches a fixed point, as far as the arithmetic can show."""
        return self in (Settling.FIXED_POINT, Settling.AT_FLOOR)

    @property
    def decided(self) -> bool:
        """The horizons are long enough to say."""
        return self not in (Settling.NOT_YET, Settling.CANNOT_TELL)

    @property
    def words(self) -> str:
        """For a reader; the value is what results files hold."""
        if self is Settling.NOT_YET:
            return "not yet: its steps shrink"  # by 2H they may be down to nothing
        return "at the noise floor" if self is Settling.AT_FLOOR else str(self)


_ORDER = tuple(Settling)


def noise_floor(data: xarray.Dataset) -> xarray.DataArray:
    """The relative step that rounding alone keeps up, dimensions (layer, prompt); NaN where it is not known.

    What one recurrence makes, or, where a twin ran, what this model makes of it: the mean over tokens of the twin's
    distance. Tokens whose twin parts have no noise floor: there rounding grows to what is no noise.
    """
    made = data["noise_floor"].transpose("layer", "prompt")
    if "twin_floor" not in data:
        return made
    floor = data["twin_floor"].transpose("layer", "prompt", "token")
    parting = parts(data).transpose("prompt", "token").values
    measured = floor.copy(data=np.where((floor.values < LOUD) & ~parting, floor.values, np.nan)).mean("token")
    return made.copy(data=np.fmax(measured.values, made.values))


def _loud(data: xarray.Dataset) -> xarray.DataArray:
    """Whether rounding alone moves most tokens so far that noise and chaos look the same, (layer, prompt)."""
    if "twin_floor" not in data:
        return xarray.zeros_like(data["noise_floor"], dtype=bool)
    floor = data["twin_floor"]
    return (floor >= LOUD).sum("token") > _PARTED * floor.notnull().sum("token")


def parts(data: xarray.Dataset) -> xarray.DataArray:
    """Whether a token's twin leaves it: its distance grows, three standard errors from not, (prompt, token)."""
    return data["twin_growth"] > 3 * data["twin_growth_error"]


@lru_cache(maxsize=2)  # a dozen answers ask for it
def settling(view: StudyView, criterion: Criterion) -> xarray.DataArray:
    """The `Settling` of every layer and prompt, as an array of its integer rank, dimensions (layer, prompt).

    Rank r stands for `list(Settling)[r]`. A state reaches a fixed point if it stays within the tolerances from H to 2H
    and in the steps into both, and if these steps are down to rounding or shrink faster than 1/t: steps of equal
    length, however short, have no limit. The lengths of the two steps are compared, not divided by the norm, whose
    growth would make steps look smaller. If the direction is settled while the norm grows, in steps that add up without
    limit and make most of the movement, only the direction has settled. If rounding alone explains the steps that are
    left, it is at the floor. Steps that shrink faster than 1/t, and are not small, are not yet there. What slows down
    less, and small motion that leads nowhere, are not told from an approach or from amplified rounding here; nor is a
    state that has gone farther than its own norm, whose steps may lengthen again.
    """
    data = view.dataset
    drift = data["horizon_drift"].transpose("layer", "prompt")
    steps = data["horizon_relative_step"].transpose("horizon", "layer", "prompt")
    last = steps.sel(horizon="second", drop=True)
    growth = data["horizon_norm_growth"]
    movement = np.maximum(drift, steps.max("horizon", skipna=False))
    noise = _rounding(view)
    turned = np.arccos(data["horizon_drift_cosine"].clip(-1, 1))
    ratio = step_ratio(data)

    shrinks = ratio < SUMMABLE_RATIO
    # Errors that nothing pulls back add up like a random walk, to sqrt(H) times one of them, and no more than twice
    # that by chance; steps that lead on in one direction go farther.
    aimless = drift <= 2 * np.sqrt(view.horizon) * np.maximum(last, noise)
    floor = at_rest(view, criterion) & aimless
    norm_settled = abs(growth - 1) <= criterion.norm_growth_tolerance
    small = (movement <= criterion.drift_tolerance) & norm_settled
    outwards = turned * growth < growth - 1  # as shares of the norm at H: way around against way out
    direction = (
        (growth > 1 + criterion.norm_growth_tolerance) & (turned <= criterion.direction_tolerance) & outwards & ~shrinks
    )
    missing = (data["diverged_at"] >= 0) | ~np.isfinite(movement + growth + turned)

    cases = [
        (missing, Settling.DIVERGED),
        (small & (floor | shrinks), Settling.FIXED_POINT),
        (direction, Settling.DIRECTION_ONLY),
        (floor & _loud(data), Settling.CANNOT_TELL),
        (floor, Settling.AT_FLOOR),
        (shrinks & (drift <= UNRELATED), Settling.NOT_YET),
        ((ratio < criterion.slowing_ratio) | (small & aimless), Settling.CANNOT_TELL),
    ]
    ranks = np.select(
        [np.broadcast_to(case.transpose("layer", "prompt").values, drift.shape) for case, _ in cases],
        [_ORDER.index(kind) for _, kind in cases],
        default=_ORDER.index(Settling.NO_FIXED_POINT),
    )
    return xarray.DataArray(ranks, dims=("layer", "prompt"), coords={"layer": data["layer"]}, name="settling")


def _rounding(view: StudyView) -> xarray.DataArray:
    """The noise floor or, without a measured one, rounding of the state itself, which there is at least."""
    return noise_floor(view.dataset).fillna(_UNIT_ROUNDOFF.get(view.dtype, 0.0))


def at_rest(view: StudyView, criterion: Criterion) -> xarray.DataArray:
    """Whether the step into 2H is as rounding alone makes it, (layer, prompt)."""
    last = view.dataset["horizon_relative_step"].sel(horizon="second", drop=True).transpose("layer", "prompt")
    return last <= criterion.floor_factor * _rounding(view)


def slows_down(view: StudyView, criterion: Criterion) -> NDArray[np.bool_]:
    """Whether the steps of every layer are shorter at 2H than at H, (prompt,)."""
    return np.asarray(step_ratio(view.dataset).max("layer").values < criterion.slowing_ratio)


def step_ratio(data: xarray.Dataset) -> xarray.DataArray:
    """Length of the step into 2H over that of the step into H, dimensions (layer, prompt)."""
    length = data["horizon_relative_step"] * data["horizon_residual_norm"]
    with np.errstate(divide="ignore", invalid="ignore"):  # a state that is exactly fixed makes steps of length 0
        return length.sel(horizon="second", drop=True) / length.sel(horizon="first", drop=True)


@lru_cache(maxsize=2)
def prompt_settling(view: StudyView, criterion: Criterion) -> list[Settling]:
    """The settling of each prompt: that of its worst layer, unless its tokens' verdicts contradict it.

    The horizons compare a few states, the verdicts all states of a tail. Where the former see a prompt settle, or on
    its way, and the latter most of its tokens move, or the other way round, neither is believed. Where the former leave
    it open, it has no fixed point if the latter see most tokens move, and settles if these see all settle after small
    motion.
    """
    kinds = horizon_settling(view, criterion)
    if "verdict" not in view.dataset:
        return kinds
    all_settle, most_move = prompts_by_verdict(view)
    small = view.dataset["horizon_drift"].max("layer").values <= criterion.drift_tolerance

    def agreed(kind: Settling, settle: bool, move: bool, near: bool) -> Settling:
        if kind is Settling.CANNOT_TELL and settle and near:
            return Settling.FIXED_POINT
        if kind is Settling.CANNOT_TELL and move:
            return Settling.NO_FIXED_POINT
        against = settle if kind in (Settling.NO_FIXED_POINT, Settling.DIRECTION_ONLY) else move
        return Settling.CANNOT_TELL if against and kind is not Settling.DIVERGED else kind

    told = (each.tolist() for each in (all_settle, most_move, small))
    return [agreed(*each) for each in zip(kinds, *told, strict=True)]


@lru_cache(maxsize=2)
def horizon_settling(view: StudyView, criterion: Criterion) -> list[Settling]:
    """The same by the horizons alone."""
    return [_ORDER[rank] for rank in settling(view, criterion).max("layer").values]


@lru_cache(maxsize=2)
def prompts_by_verdict(view: StudyView) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether all of a prompt's tokens settle (see `token_kinds`), and whether most are seen to move."""
    codes = token_kinds(view.study)
    there = (codes >= 0).sum(-1)
    settle, move = (np.isin(codes, which).sum(-1) for which in (SETTLED_CODES, MOVING_CODES))
    return (settle == there) & (there > 0), move > _PARTED * there


def late_prompts(view: StudyView, criterion: Criterion) -> NDArray[np.bool_]:
    """Prompts that do not settle by the horizon, and whose step into twice that is as rounding makes it, (prompt,)."""
    not_yet = np.array([kind is Settling.NOT_YET for kind in prompt_settling(view, criterion)], dtype=bool)
    return np.asarray(not_yet & at_rest(view, criterion).all("layer").values)


@lru_cache(maxsize=2)
def parted_prompts(view: StudyView, criterion: Criterion) -> NDArray[np.bool_]:
    """Prompts that the horizons leave open, since the steps are small and do not shrink, while the verdicts see some
    tokens move: these make the steps, (prompt,)."""
    left_open = np.array([kind is Settling.CANNOT_TELL for kind in horizon_settling(view, criterion)], dtype=bool)
    if "verdict" not in view.dataset:
        return np.zeros_like(left_open)
    undecided = np.array([kind is Settling.CANNOT_TELL for kind in prompt_settling(view, criterion)], dtype=bool)
    moves = np.isin(token_kinds(view.study), MOVING_CODES).any(-1)
    return np.asarray(left_open & undecided & moves & ~slows_down(view, criterion))


def common_settling(view: StudyView, criterion: Criterion) -> Settling | None:
    """What enough of the prompts that can be told have in common, or None if it depends on the prompt.

    Prompts that are at the floor and prompts that settle above it agree on the matter: together they count as at
    the floor; and those that keep moving and those that diverge as without a fixed point. A prompt that cannot be told
    does not disagree; if that is most of them, nothing is told of the model.
    """
    kinds = prompt_settling(view, criterion)
    decided = [kind for kind in kinds if kind.decided]
    if 2 * len(decided) < len(kinds):
        return Counter(kind for kind in kinds if not kind.decided).most_common(1)[0][0]
    needed = criterion.prompts_needed * len(decided)
    kind, count = Counter(decided).most_common(1)[0]
    if count >= needed:
        return kind
    if sum(one.settles for one in decided) >= needed:
        return Settling.AT_FLOOR
    without = (Settling.NO_FIXED_POINT, Settling.DIVERGED)
    return Settling.NO_FIXED_POINT if sum(one in without for one in decided) >= needed else None


def settling_by_layer(ranks: xarray.DataArray, criterion: Criterion) -> dict[str, str]:
    """`{"layers 0–2": "fixed point (64 of 64 prompts)"}`: what most prompts show by the horizons, neighbours that agree
    drawn together. A layer on which too few prompts agree is said to depend on the prompt."""
    total = ranks.sizes["prompt"]

    def describe(layer: int) -> str:
        counts = np.bincount(ranks.values[layer], minlength=len(_ORDER))
        most = int(counts.argmax())
        if counts[most] < criterion.prompts_needed * total:
            parts = (f"{count} {_ORDER[rank].words}" for rank, count in enumerate(counts) if count)
            return f"mixed ({', '.join(parts)})"
        return f"{_ORDER[most].words} ({counts[most]} of {total} prompts)"

    described = {}
    for text, group in groupby(range(ranks.sizes["layer"]), describe):
        layers = list(group)
        described[f"{'layer' if len(layers) == 1 else 'layers'} {spans(layers)}"] = text
    return described
