"""Settings of the two methods: every threshold with its reason. They are stored with what they judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from loopscope._util.ranges import Positive, Range, check_ranges
from loopscope.errors import ConfigError

Method = Literal["displacement", "cosine"]
_Share = Annotated[float, Range(above=0, below=1)]


@dataclass(frozen=True, kw_only=True)
class DisplacementSettings:
    """How a trajectory is judged by what its motion within the tail looks like."""

    window: Annotated[int, Range(16, 2**14)] = 256
    """The tail that is judged: the second half of the trajectory, at most this many recurrences. Slow motion is told
    better by a long one, at a cost that grows with its square."""
    least_recurrences: Annotated[int, Range(16)] = 16
    """Fewer than this give no verdict: a period of 4 would be seen three times in the tail."""
    rounding_factor: Positive = 4.0
    """Motion within this multiple of the dtype's own rounding is rest. A recurrence rounds more than once, and
    rounding is not random: states that should rest hop between neighbouring numbers, four roundings apart at
    most in what we made."""
    rest: Positive = 2.0
    """Motion within this multiple of the measured noise floor, the distance of a twin, is rest. At a fixed point the
    largest displacement is 1.0 to 1.4 times that distance, of an approach that is not over at least five times (random
    models of five designs, float32)."""
    floor_factor: Positive = 30.0
    """Shapeless motion within this multiple of the rounding is noise that a model amplifies. Huginn-0125 in bfloat16
    hovers at 6 to 12 times its rounding; a mode with eigenvalue 0.99 amplifies white noise sevenfold."""
    gain: Positive = 10_000.0
    """Rounding that a contraction amplifies makes motion of up to this multiple of it."""
    new: Positive = 16.0
    """Such motion has no more new in a recurrence, that the last one does not foretell, than this multiple of the
    rounding: a recurrence rounds more than once, but not a hundred times."""
    least_new: Positive = 0.8
    """And no less than this: what rounding drives has at least one rounding in each recurrence."""
    filling: Positive = 0.2
    """Noise moves in many directions at once. Motion beyond `rounding_factor` counts as noise only if it takes at least
    this share of the directions that white noise would take in the same window (participation ratio of the principal
    components), or stays within two fifths of `floor_factor`."""
    significance: _Share = 1e-4
    """Motion has a shape if noise alone would fit one so well with at most this probability, after correction for how
    many were tried. With 10,000 tokens, one is expected to be taken for shaped by chance; what it is called then rests
    on the other thresholds."""
    margin: Positive = 3.0
    """A slider must be likelier than the best approach to a point by a factor of e to this, 20; below, it does not
    tell. Taking a fixed point for a slider would be worse."""
    unexplained: _Share = 0.05
    """A shape explains the motion if at most this share of its variance is left."""
    unexplained_noise: _Share = 0.25
    """The same for an approach of which no more is left than noise, however small it is."""
    unexplained_small: _Share = 0.12
    """The same for other motion, which noise alone may seem to show."""
    unexplained_mode: _Share = 0.03
    """The same for an orbit or divergence of which no more is new in a recurrence than rounding makes; for a slider in
    a window of 32, and in proportion to it in others: what noise drives forgets."""
    memory: Positive = 4.0
    """And what such a motion leaves is at most this multiple of what is new in a recurrence."""
    unexplained_structure: _Share = 0.002
    """The same where what is left is more than amplified rounding, so that it must be motion of another shape: a
    second rotation of a tenth of the first one's size is seen."""
    least_periods: Positive = 2.5
    """An orbit has to repeat this often within the tail. Twice could be chance; and a slow turn through less than
    that is a way, not a cycle."""
    growth: Positive = 1.3
    """Steps that lengthen by this factor over the tail, in the shape of an exponential, show an unstable point. Below,
    they are those of a slider within what an arc bends."""
    norm_growth: Positive = 1.8
    """Steady motion in one direction is divergence rather than sliding if the norm grows by this factor over the tail.
    A norm in proportion to time doubles over the second half of any trajectory; a slider has this growth only if it has
    travelled more than three times its norm."""
    summable: Annotated[float, Range()] = -0.15
    """Steps that shrink like t^(q-1) add up to a limit if q < 0. Between this and 0 the trajectory does not tell q
    from 0 (logarithmic drift), which is a slider's."""
    slowing: Positive = 1.1
    """Steps that follow (t + s)^-a have no limit if a is at most 1; this much is allowed for the fit. Looked at where
    no approach fits exactly, since exponentials come near to a logarithm."""
    adds_up: Positive = 1.25
    """And from this power on they have one. Between the two it cannot be told."""
    one_way: Positive = 1.5
    """Exponent that the mean squared displacement of such steps has at least, between lags W/4 and W/2."""
    ballistic: Positive = 1.7
    """A drift that is not quite steady has a mean squared displacement that grows with at least this power of the lag,
    2 without the unsteadiness; a random walk has 1."""
    unsteady: _Share = 0.08
    """And a straight way or an arc leaves at most this share of its variance."""
    steady: Positive = 1.3
    """Motion in many turns approaches a point, or leaves it, if its steps change steadily by this factor over the tail:
    eight standard errors from none, in both halves."""
    shrinking: Positive = 2.5
    """Steps whose mean square root falls by this factor from the first third of the tail to the last are those of an
    approach, whatever its shape. Steps like 1/t, which have no limit, fall by 1.6 over the second half of a
    trajectory."""
    shrinking_late: Positive = 1.15
    """The steps of an approach go on shrinking: within the later half of the tail by this factor at least, unless they
    have come to rest."""
    nearer: _Share = 0.6
    """And its motion within the later half is at most this share of that within the tail. It is about 1 for motion that
    goes on as before, half for a straight drift."""
    spreading: Positive = 4.0
    """The mean squared displacement still spreads if it grows by this factor from lags about W/16 to lags about W/2. It
    grows eightfold in a random walk and stays level in motion within bounds."""
    settling: Positive = 1.05
    """An oscillation shrinks if its amplitude does by this factor over the tail and noise cannot explain it. (For it to
    grow takes `growth`: an orbit that is approached from within grows a little.)"""
    even: Positive = 1.4
    """The steps of an orbit have the same root mean square over the first whole periods of the tail as over the last,
    within this factor. Harmonics that recurrences alias to nearly the same turn make a rotation of any changing size; a
    sharp jump once a period may be seen as one step or as two."""
    visible: Positive = 7.0
    """An orbit, a slider or what diverges moves by at least this many times the rounding. Rounding makes small cycles
    and slow hops of its own, which no data tell from others."""

    def __post_init__(self) -> None:
        check_ranges(self, "The setting ")


@dataclass(frozen=True, kw_only=True)
class CosineSettings:
    """The paper's family of criteria: the cosine to the last state. Its algorithm is not public; these are its three
    published numbers, and what had to be chosen besides."""

    tau: Positive = 0.05
    """A state is at its last one if the cosine differs from 1 by at most this (arXiv 2604.11791)."""
    rho: Positive = 0.9
    """It is a fixed point if that holds for this share of the window (arXiv 2604.11791)."""
    window: Annotated[int, Range(8, 10**6)] = 128
    """At most this many last recurrences are looked at; the paper's horizon is 128. The second half of the trajectory,
    if that is shorter."""
    least_recurrences: Annotated[int, Range(8)] = 16
    """Fewer than this give no verdict."""
    peak: Positive = 0.5
    """One peak of the spectrum dominates if it holds at least this share of the power, its two neighbours included.
    Ours: the paper does not say."""
    monotone: Positive = 0.9
    """An approach is monotone if at least this share of the steps go towards the last state. Ours likewise."""

    def __post_init__(self) -> None:
        check_ranges(self, "The setting ")


Settings = DisplacementSettings | CosineSettings


def method_settings(method: str, changed: dict[str, Any] | None = None) -> Settings:
    """Settings of a method by its name, with some of them changed. Raises `ConfigError` for names that are none."""
    known: dict[str, type[DisplacementSettings] | type[CosineSettings]] = {
        "displacement": DisplacementSettings,
        "cosine": CosineSettings,
    }
    if method not in known:
        raise ConfigError(f"method is one of {', '.join(known)}; got {method!r}.")
    names = {field.name for field in dataclasses.fields(known[method])}
    for name in changed or {}:
        if name not in names:
            raise ConfigError(f"The method {method} has no setting {name!r}; it has {', '.join(sorted(names))}.")
    return known[method](**(changed or {}))


def parse_settings(method: str, texts: Sequence[str]) -> Settings:
    """Settings of a method with changes written as NAME=VALUE. Raises `ConfigError`."""
    changed: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            if not equals:
                raise ValueError
            changed[name.strip()] = int(value) if value.strip().isdigit() else float(value)
        except ValueError:
            raise ConfigError(f"A setting is written NAME=VALUE with a number, got {text!r}.") from None
    return method_settings(method, changed)
