"""Verdicts from the shape of the motion within the tail of a trajectory."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.dynamics.trajectories.limits import limit_of
from loopscope.dynamics.trajectories.motion import Motion, measure_motions
from loopscope.dynamics.trajectories.noise import Noise
from loopscope.dynamics.trajectories.settings import DisplacementSettings
from loopscope.dynamics.trajectories.tail import tail_length, take_tails
from loopscope.dynamics.verdicts import Doubt, Kind, Verdict
from loopscope.models.inspection.facts import Dtype

_SHORTEST_HALF = 12
"""Recurrences: in fewer, even rest and motion are hard to tell apart."""
_SHORTEST_END = 24
"""Recurrences: in fewer, the last turns of an approach look like a drift or an orbit."""
_IN_FEW_DIRECTIONS = 0.4
"""Of `floor_factor`: noise that does not fill the directions that white noise would."""
_LONG = 64
"""Recurrences of the tail: in fewer, a turn or a burst that is still to come cannot be seen."""
_LOUD = 0.05
"""Noise of this share of the norm is no rest that anybody means: small chaos would look the same."""
_MADE_BY_ROUNDING = (Kind.ORBIT, Kind.SLIDER, Kind.DIVERGING)
"""What rounding alone can look like, so that such motion has to be `visible` to count: small cycles, and slow hops one
way. `BOUNDED` is left out on purpose: several rotations without a common period are neither."""


@dataclass(frozen=True, slots=True)
class TokenMotions:
    """One token's motion within the tail, its later half and its last two thirds; None where that was not needed."""

    whole: Motion
    later: Motion | None = None
    shorter: Motion | None = None


def displacement_verdicts(measured: Sequence[TokenMotions], settings: DisplacementSettings) -> list[Verdict]:
    """A verdict for each token, from what `measure_tails` says of it.

    What has no shape over the whole tail may be an approach that ends within it; then its later half decides, if it has
    a clear answer. A verdict that the last two thirds of the tail do not share, where they were measured, is marked as
    unstable. So is, without a measured noise, motion that is new in a recurrence by no more than some roundings: one
    mode in hundreds that noise drives looks like a true one.
    """
    verdicts = []
    for motions in measured:
        finding = _decide(motions.whole, motions.later, settings)
        kind = finding.kind if motions.shorter is None else _decide(motions.shorter, None, settings).kind
        if kind.settles and finding.kind == Kind.BOUNDED:
            # Now and then noise that a slow mode remembers is far out at the beginning of a tail.
            reason = f"{finding.reason} Its last two thirds rest, so that it may be noise that a slow mode remembers."
            finding = finding._replace(kind=Kind.UNKNOWN, reason=reason, doubt=Doubt.REMEMBERED)
        verdict = _verdict(finding)
        doubts = [] if same_limit(verdict.kind, kind) else ["window"]
        if verdict.kind.moves and _amplified(finding.motion, settings):
            doubts.append("noise")
        verdicts.append(dataclasses.replace(verdict, unstable=tuple(doubts)))
    return verdicts


def displacement_kinds(
    states: Float[Tensor, "token recurrence width"],
    dtype: Dtype,
    settings: DisplacementSettings,
    first_recurrence: int,
    noise: Noise,
) -> list[Kind]:
    """The kinds alone, of which most are plain: nothing but the level is measured of tokens that rest."""
    window = tail_length(states.shape[1], settings.window, first_recurrence)
    level = take_tails(states, window, first_recurrence).displacement().amax(-1).sqrt()
    moves = level > noise.rest(settings)
    loud = (noise.floor >= _LOUD) & (level > settings.rounding_factor * noise.rounding)
    kinds = [Kind.UNKNOWN if one else Kind.AT_FLOOR for one in loud.tolist()]
    rows = moves.nonzero()[:, 0]
    if len(rows):
        found = measure_tails(states[rows], dtype, settings, first_recurrence, kinds_only=True, noise=noise.take(rows))
        for row, motions in zip(rows.tolist(), found, strict=True):
            kinds[row] = decide_kind(motions, settings)
    return kinds


def measure_tails(
    states: Float[Tensor, "token recurrence width"],
    dtype: Dtype,
    settings: DisplacementSettings,
    first_recurrence: int = 1,
    *,
    others: Sequence[DisplacementSettings] = (),
    shorter: bool = False,
    kinds_only: bool = False,
    noise: Noise | None = None,
) -> list[TokenMotions]:
    """All that a verdict needs of finite trajectories of one length, by these settings or by `others`, which may have
    other thresholds. Shapes are fitted to all tokens together, which are decided one by one; `noise` is what was
    measured of it.

    `shorter` also measures the last two thirds of the tail, which say whether a verdict depends on the window;
    `kinds_only` leaves out what decides no kind.
    """
    window = tail_length(states.shape[1], settings.window, first_recurrence)
    tails = take_tails(states, window, first_recurrence)
    noise = noise or Noise.of(dtype, len(states))
    whole = measure_motions(tails, noise, settings, kinds_only=kinds_only)

    def within(length: int, rows: list[int], ends: list[bool] | None = None) -> dict[int, Motion]:
        if not rows or length < _SHORTEST_HALF:
            return {}
        some = torch.tensor(rows)
        motions = measure_motions(
            tails.last(length, some),
            noise.take(some),
            settings,
            kinds_only=kinds_only or ends is None,
            ends=None if ends is None else torch.tensor(ends),
        )
        return dict(zip(rows, motions, strict=True))

    # Halves cost as much again, so they are measured only where some settings would look at them.
    moving = [token for token, motion in enumerate(whole) if motion.shape is not None]
    unsettled = [
        token for token in moving if not all(_decide_one(whole[token], each).settled for each in (settings, *others))
    ]
    half = within(
        window // 2,
        unsettled,
        [_decide_one(whole[token], settings).kind != Kind.FIXED_POINT for token in unsettled],
    )
    # Nothing is held against what could not be told.
    told = [token for token in moving if _decide(whole[token], half.get(token), settings).kind != Kind.UNKNOWN]
    third = within(2 * window // 3, told) if shorter else {}
    return [TokenMotions(motion, half.get(token), third.get(token)) for token, motion in enumerate(whole)]


def decide_kind(motions: TokenMotions, settings: DisplacementSettings) -> Kind:
    """The kind alone, by the settings or one of the others that the motions were measured for."""
    return _decide(motions.whole, motions.later, settings).kind


def same_limit(one: Kind, other: Kind) -> bool:
    """Whether two kinds say the same of the limit: rest is rest, seen or hidden by noise."""
    return one == other or (one.settles and other.settles)


class _Finding(NamedTuple):
    kind: Kind
    reason: str
    motion: Motion
    settled: bool = True
    """The later half of the tail need not be asked."""
    shaped: bool = False
    """A shape explains the motion."""
    doubt: Doubt | None = None
    """Of what cannot be told."""


def _decide(whole: Motion, later: Motion | None, settings: DisplacementSettings) -> _Finding:
    finding = _decide_one(whole, settings)
    if finding.settled or later is None:
        return finding
    return _with_later_half(finding, _decide_one(later, settings))


def _with_later_half(whole: _Finding, later: _Finding) -> _Finding:
    """An approach is over where the later half rests, and leads to an orbit or a drift where that has such a shape."""
    if whole.kind == Kind.FIXED_POINT:
        ends = later.kind in (Kind.ORBIT, Kind.SLIDER) and later.motion.window >= _SHORTEST_END
    else:
        ends = later.kind.settles or later.kind == Kind.ORBIT
    return later if later.settled and ends else whole


def _decide_one(motion: Motion, settings: DisplacementSettings) -> _Finding:
    rest = motion.rest(settings)
    if motion.level == 0:
        return _Finding(Kind.FIXED_POINT, f"Its last {motion.window} states are the same.", motion)
    if motion.shape is None and motion.level > rest:
        return _Finding(Kind.FIXED_POINT, f"Its steps shrink {motion.shrinking:.3g}-fold within the tail.", motion)
    if motion.shape is None:
        return _resting(motion, settings)
    if motion.parted:
        return _parted(motion, settings)
    # From the surest to the vaguest: a shape that explains the motion, then the lengths of its steps, then its size.
    approaches = _approaches(motion, settings, rest)
    kind = limit_of(motion.shape, settings)
    if kind == Kind.FIXED_POINT and not approaches and _drifts(motion, settings):
        return _drifting(motion, settings)
    if kind == Kind.SLIDER and not approaches and motion.shrinking >= settings.shrinking_late:
        # Curves bend like an approach whose steps shrink as a power of time since some moment.
        if motion.slowing >= settings.adds_up:
            reason = (
                f"It approaches a point: its steps shrink like time to the power -{motion.slowing:.2g}, which adds up "
                "to a limit."
            )
            return _Finding(Kind.FIXED_POINT, reason, motion)
        if motion.slowing > settings.slowing:
            reason = (
                f"Its steps shrink like time to the power -{motion.slowing:.2g}: too near to -1 to tell whether they "
                "add up to a limit."
            )
            return _Finding(Kind.UNKNOWN, reason, motion, doubt=Doubt.SLOWING)
    # Steps that shrink contradict a motion that goes on, and those of an orbit are as long at the end as at the start.
    contradicted = (approaches and kind in (Kind.ORBIT, Kind.SLIDER)) or (
        not 1 / settings.even <= motion.evenness <= settings.even
    )
    if _is_explained(motion, kind, settings) and not contradicted:
        return _shaped(motion, kind, settings)
    if approaches and _drifts(motion, settings):
        return _drifting(motion, settings)
    if approaches:
        reason = f"It approaches a point: its steps shrink {motion.shrinking:.3g}-fold within the tail."
        return _Finding(Kind.FIXED_POINT, reason, motion, settled=motion.late_step <= rest)
    if kind == Kind.SLIDER and motion.ballistic >= settings.ballistic and motion.unexplained <= settings.unsteady:
        reason = (
            f"It moves on, not quite steadily: {motion.shape.words} leaves {motion.unexplained:.2g} of its variance."
        )
        return _Finding(Kind.SLIDER, reason, motion)
    seems = _amplified(motion, settings)
    if motion.noise > motion.amplified(settings) and motion.trend <= 1 / settings.steady:
        reason = f"It approaches a point, in many turns: its steps shrink steadily, {1 / motion.trend:.3g}-fold."
        return _Finding(Kind.FIXED_POINT, reason, motion)
    if motion.noise > motion.amplified(settings) and motion.trend >= settings.steady and not seems:
        reason = f"It moves away, in many turns: its steps lengthen steadily, {motion.trend:.3g}-fold."
        return _Finding(Kind.DIVERGING, reason, motion)
    if motion.shrinking <= 1 / settings.shrinking and motion.spreading >= settings.spreading and not seems:
        return _Finding(Kind.DIVERGING, f"Its steps lengthen {1 / motion.shrinking:.3g}-fold within the tail.", motion)
    return _shapeless(motion, settings)


def _resting(motion: Motion, settings: DisplacementSettings) -> _Finding:
    size = f"it moves by {motion.level:.2g} of its norm, {_times(motion)}"
    if motion.level <= settings.rounding_factor * motion.rounding:
        return _Finding(Kind.FIXED_POINT, f"It rests: {size}.", motion)
    if motion.floor >= _LOUD:
        reason = (
            f"Rounding alone moves it by {motion.floor:.2g} of its norm; only a finer dtype tells whether that is "
            "noise or chaos."
        )
        return _Finding(Kind.UNKNOWN, reason, motion, doubt=Doubt.LOUD)
    return _Finding(Kind.AT_FLOOR, f"It hovers: {size}.", motion)


def _parted(motion: Motion, settings: DisplacementSettings) -> _Finding:
    """Rounding grows without end: a point, a closed curve and a drift are what it cannot be."""
    assert motion.shape is not None
    away = f"runs of it that differ by rounding alone part, to {motion.floor:.2g} of its norm"
    if motion.norm_growth >= settings.norm_growth:
        reason = f"Its norm grows {motion.norm_growth:.3g}-fold while time doubles, and {away}."
        return _Finding(Kind.DIVERGING, reason, motion)
    if limit_of(motion.shape, settings) == Kind.DIVERGING and _is_explained(motion, Kind.DIVERGING, settings):
        return _shaped(motion, Kind.DIVERGING, settings)
    reason = f"It keeps moving by {motion.level:.2g} of its norm, and {away}: it is chaotic."
    return _Finding(Kind.BOUNDED, reason, motion)


def _times(motion: Motion) -> str:
    if motion.measured:
        return f"{motion.level / motion.unit:.2g} times the measured noise floor"
    return f"{motion.level / motion.unit:.2g} times what one rounding does"


def _approaches(motion: Motion, settings: DisplacementSettings, rest: float) -> bool:
    """The steps shrink as they do on the way to a point, whatever the way looks like."""
    still = motion.shrinking_late >= settings.shrinking_late or motion.late_step <= rest
    nearer = motion.later_level <= settings.nearer * motion.level
    return motion.shrinking >= settings.shrinking and still and nearer


def _drifts(motion: Motion, settings: DisplacementSettings) -> bool:
    """The shape of an approach is not exact, and the steps shrink too slowly to add up to a limit."""
    exact = motion.noise <= motion.amplified(settings)
    one_way = motion.unexplained <= settings.unsteady and motion.ballistic >= settings.one_way
    return not exact and one_way and motion.slowing <= settings.slowing


def _drifting(motion: Motion, settings: DisplacementSettings) -> _Finding:
    if motion.norm_growth >= settings.norm_growth:
        reason = f"Its norm grows {motion.norm_growth:.3g}-fold while time doubles, in steps that have no limit."
        return _Finding(Kind.DIVERGING, reason, motion)
    reason = f"It moves on: its steps shrink like time to the power -{max(0.0, motion.slowing):.2g}, and have no limit."
    return _Finding(Kind.SLIDER, reason, motion)


def _is_explained(motion: Motion, kind: Kind, settings: DisplacementSettings) -> bool:
    """The best shape is no chance, and what it leaves is noise, or little."""
    if motion.p_value > settings.significance:
        return False
    # How little has to be left depends on what it can be: rounding, amplified rounding, or nothing but other motion.
    noisy = settings.unexplained_noise if kind == Kind.FIXED_POINT else settings.unexplained_small
    if motion.noise <= motion.rest(settings):
        return motion.unexplained <= noisy
    if motion.noise <= motion.amplified(settings):
        fills = motion.residual_filling >= settings.filling
        return motion.unexplained <= (noisy if fills else settings.unexplained)
    return motion.unexplained <= settings.unexplained_structure


def _shaped(motion: Motion, kind: Kind, settings: DisplacementSettings) -> _Finding:
    assert motion.shape is not None
    least = settings.rest if motion.measured else settings.visible
    if kind in _MADE_BY_ROUNDING and motion.level < least * motion.unit:
        reason = f"It hovers: its motion is {_times(motion)}."
        return _Finding(Kind.AT_FLOOR, reason, motion, shaped=True)
    words = motion.shape.words
    if kind in _MADE_BY_ROUNDING and _seems(motion, kind, settings):
        reason = (
            f"It follows {words}, but rounding that a slow mode amplifies would seem to as well: it is "
            f"{_times(motion)}, of which {motion.innovation / motion.unit:.2g} are new in each recurrence."
        )
        return _Finding(Kind.UNKNOWN, reason, motion, shaped=True, doubt=Doubt.AMPLIFIED)
    left = f"which leaves {motion.unexplained:.2g} of its variance"
    if kind == Kind.SLIDER and motion.rival == Kind.FIXED_POINT and motion.margin < settings.margin:
        reason = f"It moves slowly: {words} and an approach to a point explain it about as well."
        return _Finding(Kind.UNKNOWN, reason, motion, shaped=True, doubt=Doubt.RIVALS)
    if kind == Kind.SLIDER and motion.norm_growth >= settings.norm_growth:
        reason = f"Its norm grows {motion.norm_growth:.3g}-fold while time doubles: it follows {words}, {left}."
        return _Finding(Kind.DIVERGING, reason, motion, shaped=True)
    begins = {
        Kind.FIXED_POINT: "It approaches a point",
        Kind.ORBIT: "It is periodic",
        Kind.SLIDER: "It moves on",
        Kind.DIVERGING: "It moves away",
        Kind.BOUNDED: "It keeps turning without a period",
    }
    return _Finding(kind, f"{begins[kind]}: it follows {words}, {left}.", motion, shaped=True)


def _amplified(motion: Motion, settings: DisplacementSettings) -> bool:
    """It may be rounding that the recurrence amplifies: what is new in a recurrence is that of a few roundings."""
    small = motion.level <= settings.gain * motion.rounding
    new = settings.least_new <= motion.innovation / motion.rounding <= settings.new
    return not motion.measured and small and new


def _seems(motion: Motion, kind: Kind, settings: DisplacementSettings) -> bool:
    """Amplified rounding would seem to have such a shape: over a window that is no longer than its memory, a mode that
    noise drives turns, drifts or grows, but leaves more than a true one does."""
    most = settings.unexplained_mode * (motion.window / 32 if kind == Kind.SLIDER else 1)
    left = motion.unexplained > most or motion.noise > settings.memory * motion.innovation
    return _amplified(motion, settings) and left


def _shapeless(motion: Motion, settings: DisplacementSettings) -> _Finding:
    moves = f"its motion of {motion.level:.2g} of its norm has no shape and is {_times(motion)}"
    # Of motion that does not spread, not the largest lag: in a short tail, one of many is far above the others.
    spreads = motion.spreading >= settings.spreading
    size = motion.level if spreads else statistics.median(motion.displacement)
    new = f"what is new in a recurrence is {motion.innovation / motion.rounding:.2g} times that"
    if _amplified(motion, settings):
        if size <= _LOUD:
            reason = f"It hovers: {moves}, but {new}: rounding, which a contraction has amplified."
            return _Finding(Kind.AT_FLOOR, reason, motion)
        reason = f"It moves: {moves}; {new}, so that it may be rounding, which a finer dtype would tell."
        return _Finding(Kind.UNKNOWN, reason, motion, settled=False, doubt=Doubt.LOUD)
    if motion.norm_growth >= settings.norm_growth:
        reason = f"Its norm grows {motion.norm_growth:.3g}-fold while time doubles, in no shape."
        return _Finding(Kind.DIVERGING, reason, motion)
    filled = motion.measured or motion.filling >= settings.filling
    if size <= motion.amplified(settings) * (1.0 if filled else _IN_FEW_DIRECTIONS):
        return _Finding(Kind.AT_FLOOR, f"It hovers: {moves}.", motion)
    if spreads:
        reason = (
            f"It wanders: its squared displacement still grows {motion.spreading:.2g}-fold from short lags to long "
            "ones, in no direction of its own."
        )
        return _Finding(Kind.UNKNOWN, reason, motion, settled=False, doubt=Doubt.WANDERS)
    if motion.measured:
        reason = (
            f"It moves: {moves}; but a twin stayed near for {motion.window} recurrences, so that it is no noise, "
            "and chaos only if that is slow."
        )
        return _Finding(Kind.UNKNOWN, reason, motion, settled=False, doubt=Doubt.SHAPELESS)
    return _Finding(Kind.BOUNDED, f"It keeps moving: {moves}.", motion, settled=False)


def _floor(finding: _Finding) -> float:
    """The step that noise makes: all of it where the motion is noise, what is left where a shape was found, and at
    least that of one rounding."""
    motion = finding.motion
    if finding.kind == Kind.AT_FLOOR:
        return max(motion.displacement[0], motion.unit)
    return max(motion.noise, motion.unit) if finding.shaped else motion.unit


def _verdict(finding: _Finding) -> Verdict:
    motion, shape = finding.motion, finding.motion.shape
    orbits, slides = finding.kind == Kind.ORBIT, finding.kind == Kind.SLIDER
    described = shape is not None and finding.shaped and finding.kind in (Kind.FIXED_POINT, Kind.ORBIT, Kind.DIVERGING)
    nan = float("nan")
    reason = finding.reason
    if motion.window < _LONG and finding.kind != Kind.UNKNOWN:
        reason = f"So far, in {motion.window} recurrences: {reason[0].lower()}{reason[1:]}"
    return Verdict(
        kind=finding.kind,
        reason=reason,
        method="displacement",
        doubt=finding.doubt,
        floor=_floor(finding),
        level=motion.level,
        period=shape.period if shape is not None and described else nan,
        amplitude=motion.amplitude if orbits else nan,
        speed=motion.speed if slides else nan,
        rate=shape.rate if shape is not None and described and not orbits else nan,
        p_value=motion.p_value,
        evidence={
            "rounding": motion.rounding,
            "measured_floor": motion.floor,
            "innovation": motion.innovation,
            "window": float(motion.window),
            "unexplained": motion.unexplained,
            "margin": motion.margin,
            "filling": motion.filling,
            "spreading": motion.spreading,
            "shrinking": motion.shrinking,
            "norm_growth": motion.norm_growth,
        },
        displacement=motion.displacement,
    )
