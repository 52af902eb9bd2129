"""Verdicts from the shape of the motion within the tail of a trajectory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopscope.dynamics.trajectories.motion import Motions, measure_motions
from loopscope.dynamics.trajectories.noise import Noise
from loopscope.dynamics.trajectories.settings import LONG_TAIL, LOUD, DisplacementSettings
from loopscope.dynamics.trajectories.tail import tail_length, take_tails
from loopscope.dynamics.verdicts import KINDS, MOVING_CODES, SETTLED_CODES, Doubt, Kind, Verdict

_SHORTEST_HALF = 12
"""Recurrences: in fewer, even rest and motion are hard to tell apart."""
_SHORTEST_END = 24
"""Recurrences: in fewer, the last turns of an approach look like a drift or an orbit."""
_IN_FEW_DIRECTIONS = 0.4
"""Of `floor_factor`: noise that does not fill the directions that white noise would."""
_GEOMETRIC = 1e-8
"""Share of the variance: a rotation that leaves no more falls geometrically, as fits of such motions leave 1e-13."""
_BEND = 1 / (25 * 720)
"""A size that falls by a e-folds within the window is off a straight line by a^4 / 720 of its square. That, times the
recurrences and the directions that the noise takes, has to be 25 times what is left, five standard errors, to tell an
exponential from another curve."""
_BRIEF = 32
"""Recurrences in a tail, fewer than which show that a state that is far away approaches a point only if the last two
thirds of them do too."""
_ENDLESS = 1e200
"""A ratio above this has a length of 0 below the line."""
_MADE_BY_ROUNDING = (Kind.ORBIT, Kind.SLIDER, Kind.DIVERGING)
"""What rounding alone can look like, so that such motion has to be `visible` to count: small cycles, and slow hops one
way. `BOUNDED` is left out on purpose: several rotations without a common period are neither."""


@dataclass(frozen=True, slots=True, eq=False)
class TailMotions:
    """Motions within the tail, its later half and its last two thirds; the latter two of some tokens only."""

    whole: dict[DisplacementSettings, _Findings]
    """What each of the settings says of it."""
    later: tuple[Int[Tensor, " row"], Motions]
    shorter: tuple[Int[Tensor, " other"], Motions]


def measure_tails(
    states: Float[Tensor, "token recurrence width"],
    settings: DisplacementSettings,
    noise: Noise,
    first_recurrence: int = 1,
    *,
    others: Sequence[DisplacementSettings] = (),
    shorter: bool = False,
    kinds_only: bool = False,
) -> TailMotions:
    """All that a verdict needs of finite trajectories of one length, by these settings or by `others`, which differ in
    `floor_factor` and `unexplained` alone; `noise` is what was measured of each token's noise.

    `shorter` also measures the last two thirds of the tail, which say whether a verdict depends on the window;
    `kinds_only` leaves out what decides no kind.
    """
    window = tail_length(states.shape[1], settings.window, first_recurrence)
    tails = take_tails(states, window, first_recurrence)
    whole = measure_motions(tails, noise, settings, kinds_only=kinds_only)

    def within(length: int, chosen: Tensor, ends: Tensor | None = None) -> tuple[Tensor, Motions]:
        """Of the chosen tokens, or of none where so few recurrences tell nothing."""
        rows = (chosen & (length >= _SHORTEST_HALF)).nonzero()[:, 0]
        some = tails.last(max(length, _SHORTEST_HALF), rows)
        its_ends = None if ends is None else ends[rows]
        plain = kinds_only or ends is None
        return rows, measure_motions(some, noise.take(rows), settings, kinds_only=plain, ends=its_ends)

    # Halves cost as much again, so they are measured only where some settings would look at them.
    found = {each: _findings(whole, each) for each in (settings, *others)}
    unsettled = whole.fitted & ~torch.stack([each.settled for each in found.values()]).all(0)
    later = within(window // 2, unsettled, found[settings].kind != Kind.FIXED_POINT.code)
    # Nothing is held against what could not be told.
    told = _decided(found[settings], later, settings)[0] != Kind.UNKNOWN.code
    third = within(2 * window // 3, whole.fitted & told & shorter)
    return TailMotions(found, later, third)


def displacement_kinds(motions: TailMotions, settings: DisplacementSettings) -> Int[Tensor, " token"]:
    """The kinds alone, as places in `KINDS`, by the settings or one of the others that the motions were measured
    for."""
    return _decided(motions.whole[settings], motions.later, settings)[0]


def plain_kinds(
    states: Float[Tensor, "token recurrence width"],
    settings: DisplacementSettings,
    first_recurrence: int,
    noise: Noise,
) -> Int[Tensor, " token"]:
    """The same where rest that is seen and rest that noise hides count as one: nothing but the level is measured of
    tokens that rest."""
    window = tail_length(states.shape[1], settings.window, first_recurrence)
    level = take_tails(states, window, first_recurrence).displacement().amax(-1).sqrt()
    loud = (noise.floor >= LOUD) & (level > settings.rounding_factor * noise.rounding)
    kinds = torch.where(loud, Kind.UNKNOWN.code, Kind.AT_FLOOR.code)
    rows = (level > noise.rest(settings)).nonzero()[:, 0]
    if len(rows):
        motions = measure_tails(states[rows], settings, noise.take(rows), first_recurrence, kinds_only=True)
        kinds[rows] = displacement_kinds(motions, settings)
    return kinds


def displacement_verdicts(motions: TailMotions, settings: DisplacementSettings) -> list[Verdict]:
    """A verdict for each token, from what `measure_tails` says of it.

    What has no shape over the whole tail may be an approach that ends within it; then its later half decides, if it has
    a clear answer. A verdict that the last two thirds of the tail do not share, where they were measured, is marked as
    unstable. So is, without a measured noise, motion that is new in a recurrence by no more than some roundings: one
    mode in hundreds that noise drives looks like a true one.
    """
    whole = motions.whole[settings]
    kinds, later, taken = _decided(whole, motions.later, settings)
    rows, shorter = motions.shorter
    kinds[rows] = _findings(shorter, settings).kind
    findings = whole.tokens()
    for row, finding, ends in zip(motions.later[0].tolist(), later.tokens(), taken.tolist(), strict=True):
        findings[row] = finding if ends else findings[row]
    return [_verdict(finding, KINDS[code]) for finding, code in zip(findings, kinds.tolist(), strict=True)]


def same_limit(one: Kind, other: Kind) -> bool:
    """Whether two kinds say the same of the limit: rest is rest, seen or hidden by noise."""
    return one == other or (one.settles and other.settles)


class _Motion(SimpleNamespace):
    """The numbers of one token's motion, as `Motions.rows` gives them, and what sentences say of them."""

    @property
    def times(self) -> str:
        what = "times the measured noise floor" if self.measured else "times what one rounding does"
        return f"{self.level / self.unit:.2g} {what}"

    @property
    def falls(self) -> float:
        return float(1 / self.trend)

    @property
    def lengthens(self) -> str:
        return f"{1 / self.shrinking:.3g}-fold" if self.shrinking else "from nothing"

    @property
    def shrinks(self) -> str:
        return f"{self.shrinking:.3g}-fold" if self.shrinking < _ENDLESS else "to nothing"

    @property
    def grows(self) -> str:
        return f"{self.norm_growth:.3g}-fold" if self.norm_growth < _ENDLESS else "from nothing"

    @property
    def power(self) -> float:
        return max(0.0, float(self.slowing))

    @property
    def new_units(self) -> float:
        return float(self.innovation / self.unit)

    @property
    def new_roundings(self) -> float:
        return float(self.innovation / self.rounding)

    @property
    def begins(self) -> str:
        return {
            Kind.FIXED_POINT: "It approaches a point",
            Kind.ORBIT: "It is periodic",
            Kind.SLIDER: "It moves on",
            Kind.DIVERGING: "It moves away",
            Kind.BOUNDED: "It keeps turning without a period",
        }[KINDS[self.limit]]


class _Finding(NamedTuple):
    """Of one token."""

    kind: Kind
    motion: _Motion
    may: bool
    """It may be amplified rounding."""
    sentence: str
    shaped: bool
    """A shape explains the motion."""
    doubt: Doubt | None
    """Of what cannot be told."""


class _Findings:
    """What is said of each motion: the first rule that holds. Tensors are (token,) each."""

    def __init__(self, motions: Motions, settings: DisplacementSettings) -> None:
        self.motions, self.settings = motions, settings
        self.rest, self.amplified = motions.noise.rest(settings), motions.noise.amplified(settings)
        """Steps, over the norm: motion up to the first is rest, and what a shape leaves is noise up to the second."""
        self.grows = motions.norm_growth >= settings.norm_growth
        new = motions.innovation / motions.noise.rounding
        small = (motions.level <= settings.gain * motions.noise.rounding) & ~motions.noise.measured
        self.may = small & (new >= settings.least_new) & (new <= settings.may_be_new)
        """It cannot be excluded that it is rounding which the recurrence amplifies."""
        self.seems = self.may & (new <= settings.new)
        """It may be rounding that the recurrence amplifies: what is new in a recurrence is that of a few roundings."""
        self.kind = torch.full((len(motions.level),), Kind.UNKNOWN.code)
        self.settled = torch.ones(len(motions.level), dtype=torch.bool)
        """The later half of the tail need not be asked."""
        self._rule = torch.full_like(self.kind, -1)
        """Which of the rules spoke; -1 none yet."""
        self._rules: list[tuple[str, bool, Doubt | None]] = []

    def say(
        self,
        where: Bool[Tensor, " token"],
        kind: Kind | Tensor,
        sentence: str,
        *,
        shaped: bool = False,
        settled: bool | Tensor = True,
        doubt: Doubt | None = None,
    ) -> None:
        """The next rule, of tokens that no earlier one spoke of; its sentence is a format of a `_Motion`, `it`."""
        new = where & (self._rule < 0)
        self._rule[new] = len(self._rules)
        self._rules.append((sentence, shaped, doubt))
        self.kind = torch.where(new, kind.code if isinstance(kind, Kind) else kind, self.kind)
        self.settled = torch.where(new, settled, self.settled)

    def tokens(self) -> list[_Finding]:
        """One by one."""
        # Where the motion is small anyway, it makes no difference which of the two it is.
        large = torch.isin(self.kind, torch.tensor(MOVING_CODES)) | (self.motions.level > self.amplified)
        may = (self.may & large).tolist()
        rows = zip(self.kind.tolist(), self.motions.rows(), may, self._rule.tolist(), strict=True)
        return [_Finding(KINDS[kind], _Motion(**motion), may, *self._rules[rule]) for kind, motion, may, rule in rows]


def _decided(
    whole: _Findings, later: tuple[Tensor, Motions], settings: DisplacementSettings
) -> tuple[Int[Tensor, " token"], _Findings, Bool[Tensor, " row"]]:
    """The kinds, what is said of the later halves, and of which of them that is the verdict.

    An approach is over where the later half rests, and leads to an orbit or a drift where that has such a shape.
    """
    rows, motions = later
    half = _findings(motions, settings)
    there, orbits, slides = whole.kind[rows], half.kind == Kind.ORBIT.code, half.kind == Kind.SLIDER.code
    onwards = (orbits | slides) & (motions.window >= _SHORTEST_END)
    rests = torch.isin(half.kind, torch.tensor(SETTLED_CODES)) | orbits
    ends = torch.where(there == Kind.FIXED_POINT.code, onwards, rests)
    taken = ~whole.settled[rows] & half.settled & ends
    return whole.kind.index_copy(0, rows[taken], half.kind[taken]), half, taken


def _findings(motions: Motions, settings: DisplacementSettings) -> _Findings:
    """From the surest to the vaguest: rest, a shape that explains the motion, the lengths of its steps, its size."""
    found = _Findings(motions, settings)
    _say_resting(found)
    m, noise, limit, rest = motions, motions.noise, motions.best.limit, found.rest
    slides, goes_on = limit == Kind.SLIDER.code, ~noise.parted
    # Where rounding grows without end, a point, a closed curve and a drift are what it cannot be.
    away = "runs of it that differ by rounding alone part, to {it.floor:.2g} of its norm"
    grown = "Its norm grows {it.grows} while time doubles"
    found.say(noise.parted & found.grows, Kind.DIVERGING, f"{grown}, and {away}.")
    approaches, drifts = _approaches(found), _drifts(found)
    _say_drifting(found, goes_on & (limit == Kind.FIXED_POINT.code) & ~approaches & drifts)
    # Curves bend like an approach whose steps shrink as a power of time since some moment.
    bends = goes_on & slides & ~approaches & (m.shrinking >= settings.shrinking_late)
    power = "its steps shrink like time to the power -{it.slowing:.2g}"
    adds_up = f"It approaches a point: {power}, which adds up to a limit."
    found.say(bends & (m.slowing >= settings.adds_up), Kind.FIXED_POINT, adds_up)
    near = f"I{power[1:]}: too near to -1 to tell whether they add up to a limit."
    found.say(bends & (m.slowing > settings.slowing), Kind.UNKNOWN, near, doubt=Doubt.SLOWING)
    # Steps that shrink contradict a motion that goes on, and those of an orbit are as long at the end as at the start.
    uneven = (m.best.evenness < 1 / settings.even) | (m.best.evenness > settings.even)
    contradicted = (approaches & (slides | (limit == Kind.ORBIT.code))) | uneven
    may = torch.where(noise.parted, limit == Kind.DIVERGING.code, ~contradicted)
    _say_shaped(found, _explained(found) & may)
    chaotic = f"It keeps moving by {{it.level:.2g}} of its norm, and {away}: it is chaotic."
    found.say(noise.parted, Kind.BOUNDED, chaotic)
    _say_drifting(found, approaches & drifts)
    shrink = "It approaches a point: its steps shrink {it.shrinks} within the tail."
    found.say(approaches, Kind.FIXED_POINT, shrink, settled=m.late_step <= rest)
    found.say(
        slides & (m.ballistic >= settings.ballistic) & (m.unexplained <= settings.unsteady),
        Kind.SLIDER,
        "It moves on, not quite steadily: {it.shape.words} leaves {it.unexplained:.2g} of its variance.",
    )
    more = m.left > found.amplified
    found.say(
        more & (m.trend <= 1 / settings.shrinking),
        Kind.FIXED_POINT,
        "It approaches a point, in many turns: its steps shrink steadily, {it.falls:.3g}-fold.",
    )
    found.say(
        more & (m.trend <= 1 / settings.steady),
        Kind.UNKNOWN,
        "Its many turns become smaller, {it.falls:.3g}-fold, too little to tell whether they end at a point.",
        doubt=Doubt.SLIGHT,
    )
    found.say(
        more & (m.trend >= settings.steady) & ~found.seems,
        Kind.DIVERGING,
        "It moves away, in many turns: its steps lengthen steadily, {it.trend:.3g}-fold.",
    )
    found.say(
        (m.shrinking <= 1 / settings.shrinking) & (m.spreading >= settings.spreading) & ~found.seems,
        Kind.DIVERGING,
        "Its steps lengthen {it.lengthens} within the tail.",
    )
    _say_shapeless(found)
    return found


def _say_resting(found: _Findings) -> None:
    """Of motions too small, or approaches too plain, to look for a shape."""
    m, noise, none = found.motions, found.motions.noise, ~found.motions.fitted
    moves = "it moves by {it.level:.2g} of its norm, {it.times}."
    found.say(m.level == 0, Kind.FIXED_POINT, "Its last {it.window} states are the same.")
    shrink = "Its steps shrink {it.shrinks} within the tail."
    found.say(none & (m.level > found.rest), Kind.FIXED_POINT, shrink)
    exact = m.level <= found.settings.rounding_factor * noise.rounding
    found.say(none & exact, Kind.FIXED_POINT, f"It rests: {moves}")
    _say_hovering(found, none, f"It hovers: {moves}")


def _say_hovering(found: _Findings, where: Tensor, sentence: str, *, shaped: bool = False) -> None:
    """Of motions that may be noise."""
    loud = (
        "Rounding alone moves it by {it.floor:.2g} of its norm; only a finer dtype tells whether that is noise or "
        "chaos."
    )
    found.say(where & (found.motions.noise.floor >= LOUD), Kind.UNKNOWN, loud, doubt=Doubt.LOUD)
    found.say(where, Kind.AT_FLOOR, sentence, shaped=shaped)


def _say_drifting(found: _Findings, where: Tensor) -> None:
    grown = "Its norm grows {it.grows} while time doubles, in steps that have no limit."
    found.say(where & found.grows, Kind.DIVERGING, grown)
    slow = "It moves on: its steps shrink like time to the power -{it.power:.2g}, and have no limit."
    found.say(where, Kind.SLIDER, slow)


def _say_shaped(found: _Findings, where: Tensor) -> None:
    """Of motions that their shapes explain."""
    m, settings, noise, best = found.motions, found.settings, found.motions.noise, found.motions.best
    slides = where & (best.limit == Kind.SLIDER.code)
    small = where & torch.isin(best.limit, torch.tensor([kind.code for kind in _MADE_BY_ROUNDING]))
    least = torch.where(noise.measured, settings.rest, settings.visible)
    hovers = "It hovers: its motion is {it.times}."
    _say_hovering(found, small & (m.level < least * noise.unit), hovers, shaped=True)
    # Amplified rounding would seem to have such a shape: over a window that is no longer than its memory, a mode that
    # noise drives turns, drifts or grows, but leaves more than a true one does.
    most = settings.unexplained_mode * torch.where(slides, m.window / 32, 1.0)
    leaves = (m.unexplained > most) | (m.left > settings.memory * m.innovation)
    seems = (
        "It follows {it.shape.words}, but rounding that a slow mode amplifies would seem to as well: it is {it.times}, "
        "of which {it.new_units:.2g} are new in each recurrence."
    )
    found.say(small & found.seems & leaves, Kind.UNKNOWN, seems, shaped=True, doubt=Doubt.AMPLIFIED)
    as_well = (best.rival == Kind.FIXED_POINT.code) & (best.margin < settings.margin)
    rivals = "It moves slowly: {it.shape.words} and an approach to a point explain it about as well."
    found.say(slides & as_well, Kind.UNKNOWN, rivals, shaped=True, doubt=Doubt.RIVALS)
    follows = "it follows {it.shape.words}, which leaves {it.unexplained:.2g} of its variance."
    # An approach to within such noise is none that anybody means, as rest in it is none.
    loud = f"What is left is {{it.left:.2g}} of its norm, noise or chaos, which only a finer dtype tells: {follows}"
    hides = (best.limit == Kind.FIXED_POINT.code) & (m.left >= LOUD) & (m.left <= found.rest)
    found.say(where & hides, Kind.UNKNOWN, loud, shaped=True, doubt=Doubt.LOUD)
    turns = f"It turns, but too few times to tell whether it is periodic: {follows}"
    found.say(where & (best.limit == Kind.UNKNOWN.code), Kind.UNKNOWN, turns, shaped=True, doubt=Doubt.FEW_TURNS)
    # What comes down to an orbit shrinks like what comes down to a point, at first, but leaves more than noise; and
    # within noise that hides how an exponential bends, the two look the same.
    folds = [-shape.numbers[-1] if shape and shape.hardly_shrinks else math.inf for shape in best.shape]
    shrinks = torch.tensor(folds, dtype=torch.float64)
    slight = shrinks.isfinite() & (best.limit == Kind.FIXED_POINT.code) & (m.unexplained > _GEOMETRIC)
    slight &= (m.left > found.amplified) | (m.unexplained > _BEND * m.window * best.directions_left * shrinks**4)
    less = f"Its turns become smaller, too little to tell whether they end at a point: {follows}"
    found.say(where & slight, Kind.UNKNOWN, less, shaped=True, doubt=Doubt.SLIGHT)
    grown = f"Its norm grows {{it.grows}} while time doubles: {follows}"
    found.say(slides & found.grows, Kind.DIVERGING, grown, shaped=True)
    found.say(where, best.limit, f"{{it.begins}}: {follows}", shaped=True)


def _say_shapeless(found: _Findings) -> None:
    """Of all others, by their size."""
    m, settings, noise = found.motions, found.settings, found.motions.noise
    moves = "its motion of {it.level:.2g} of its norm has no shape and is {it.times}"
    new = "what is new in a recurrence is {it.new_roundings:.2g} times that"
    # Of motion that does not spread, not the largest lag: in a short tail, one of many is far above the others.
    spreads = m.spreading >= settings.spreading
    lags, ordered = m.displacement.shape[-1], m.displacement.sort(-1).values
    median = (ordered[:, (lags - 1) // 2] + ordered[:, lags // 2]) / 2
    size = torch.where(spreads, m.level, median)
    contracted = f"It hovers: {moves}, but {new}: rounding, which a contraction has amplified."
    found.say(found.seems & (size <= LOUD), Kind.AT_FLOOR, contracted)
    finer = f"It moves: {moves}; {new}, so that it may be rounding, which a finer dtype would tell."
    found.say(found.seems, Kind.UNKNOWN, finer, settled=False, doubt=Doubt.LOUD)
    grown = "Its norm grows {it.grows} while time doubles, in no shape."
    found.say(found.grows, Kind.DIVERGING, grown)
    filled = noise.measured | (m.filling >= settings.filling)
    most = found.amplified * torch.where(filled, 1.0, _IN_FEW_DIRECTIONS)
    _say_hovering(found, size <= most, f"It hovers: {moves}.")
    wanders = (
        "It wanders: its squared displacement still grows {it.spreading:.2g}-fold from short lags to long ones, in no "
        "direction of its own."
    )
    found.say(spreads, Kind.UNKNOWN, wanders, settled=False, doubt=Doubt.WANDERS)
    beside = (
        f"It moves: {moves}; but a twin stayed near for {{it.window}} recurrences, so that it is no noise, and chaos "
        "only if that is slow."
    )
    found.say(noise.measured, Kind.UNKNOWN, beside, settled=False, doubt=Doubt.SHAPELESS)
    found.say(torch.ones_like(spreads), Kind.BOUNDED, f"It keeps moving: {moves}.", settled=False)


def _approaches(found: _Findings) -> Tensor:
    """The steps shrink as they do on the way to a point, whatever the way looks like."""
    m, settings = found.motions, found.settings
    still = (m.shrinking_late >= settings.shrinking_late) | (m.late_step <= found.rest)
    return (m.shrinking >= settings.shrinking) & still & (m.later_level <= settings.nearer * m.level)


def _drifts(found: _Findings) -> Tensor:
    """No shape of an approach is exact, and the steps shrink too slowly to add up to a limit."""
    m, settings = found.motions, found.settings
    other = (m.best.limit == Kind.SLIDER.code) & (m.best.margin >= settings.margin)
    one_way = (m.unexplained <= settings.unsteady) & (m.ballistic >= settings.one_way)
    return (other | (m.left > found.amplified)) & one_way & (m.slowing <= settings.slowing)


def _explained(found: _Findings) -> Tensor:
    """The best shape is no chance, and what it leaves is noise, or little."""
    m, settings = found.motions, found.settings
    # How little has to be left depends on what it can be: rounding, amplified rounding, or nothing but other motion.
    points, fills = m.best.limit == Kind.FIXED_POINT.code, m.filling_left >= settings.filling
    noisy = torch.where(points, settings.unexplained_noise, settings.unexplained_small)
    amplifies = torch.where(fills, noisy, settings.unexplained)
    most = torch.where(m.left <= found.amplified, amplifies, settings.unexplained_structure)
    most = torch.where(m.left <= found.rest, noisy, most)
    return (m.best.p_value <= settings.significance) & (m.unexplained <= most)


def _verdict(finding: _Finding, shorter: Kind) -> Verdict:
    """`shorter` is the kind of the last two thirds of the tail."""
    kind, it, may, sentence, shaped, doubt = finding
    reason = sentence.format(it=it)
    if shorter.settles and kind == Kind.BOUNDED:
        # Now and then noise that a slow mode remembers is far out at the beginning of a tail.
        reason = f"{reason} Its last two thirds rest, so that it may be noise that a slow mode remembers."
        kind, doubt = Kind.UNKNOWN, Doubt.REMEMBERED
    brief = it.window < _BRIEF and it.level >= LOUD and it.measured
    if brief and kind == Kind.FIXED_POINT and not shorter.settles:
        # Any motion slows down for a while, and noise is not what makes them differ.
        reason = f"{reason} But that is in {it.window} recurrences, of which the last two thirds do not show it."
        kind, doubt = Kind.UNKNOWN, Doubt.BRIEF
    if it.window < LONG_TAIL and kind != Kind.UNKNOWN:
        reason = f"So far, in {it.window} recurrences: {reason[0].lower()}{reason[1:]}"
    unstable = [] if same_limit(kind, shorter) else ["window"]
    if may and (kind.moves or kind == Kind.AT_FLOOR):
        unstable.append("noise")
    # The step that noise makes: all of it where the motion is noise, what is left where a shape was found, and at least
    # the measured one or that of one rounding.
    floor = it.displacement[0] if kind == Kind.AT_FLOOR else it.left if shaped else 0.0
    described = shaped and kind in (Kind.FIXED_POINT, Kind.ORBIT, Kind.DIVERGING)
    orbits = kind == Kind.ORBIT
    return Verdict(
        kind=kind,
        reason=reason,
        method="displacement",
        doubt=doubt,
        floor=max(floor, it.unit),
        level=it.level,
        period=it.shape.period if described else math.nan,
        amplitude=it.amplitude if orbits else math.nan,
        speed=it.speed if kind == Kind.SLIDER else math.nan,
        rate=it.shape.rate if described and not orbits else math.nan,
        p_value=it.p_value,
        unstable=tuple(unstable),
        evidence={
            "rounding": it.rounding,
            "measured_floor": it.floor,
            "innovation": it.innovation,
            "window": float(it.window),
            "unexplained": it.unexplained,
            "margin": it.margin,
            "filling": it.filling,
            "spreading": it.spreading,
            "shrinking": it.shrinking,
            "norm_growth": it.norm_growth,
        },
        displacement=tuple(it.displacement),
    )
