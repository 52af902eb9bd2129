"""Settings of the two methods: every threshold with its reason. They are stored with the verdicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from loopscope._util.ranges import Positive, Range, check_ranges
from loopscope.errors import ConfigError

Method = Literal["displacement", "cosine"]
_Share = Annotated[float, Range(above=0, below=1)]

LONG_TAIL = 64
"""Recurrences of a tail: in fewer, a turn or a burst that is still to come cannot be seen."""
LOUD = 0.05
"""Share of the norm from which on noise is no rest that anybody means: small chaos would look the same."""


@dataclass(frozen=True, kw_only=True)
class DisplacementSettings:
    """How the shape of the motion within the tail decides a verdict."""

    window: Annotated[int, Range(16, 2**14)] = 256
    """The judged tail is the second half of the trajectory, or its last 24 recurrences if that is more, and at most
    this many. A longer tail shows slow motion better, at a cost that grows with its square."""
    least_recurrences: Annotated[int, Range(16)] = 16
    """Fewer recurrences than this give no verdict. In so many, a period of 4 shows three times."""
    rounding_factor: Positive = 4.0
    """Motion within this multiple of the dtype's own rounding is rest. A recurrence rounds more than once, and rounding
    is not random: states that should rest hop between neighbouring numbers, at most four roundings apart in the
    trajectories we made."""
    rest: Positive = 2.0
    """Motion within this multiple of the measured noise floor, the distance of a twin, is rest. The largest
    displacement is 1.0 to 1.4 times that distance at a fixed point, and at least five times in an unfinished approach
    (random models of five designs, float32)."""
    floor_factor: Positive = 30.0
    """Motion without a shape within this multiple of the rounding is noise that a model amplifies. Huginn-0125 in
    bfloat16 hovers at 6 to 12 times its rounding; a mode with eigenvalue 0.99 amplifies white noise sevenfold."""
    gain: Positive = 10_000.0
    """Rounding that a contraction amplifies makes motion of up to this multiple of the rounding."""
    new: Positive = 16.0
    """In such motion the innovation, what the last recurrence does not predict of the next, is at most this multiple of
    the rounding: a recurrence rounds more than once, but not a hundred times."""
    least_new: Positive = 0.8
    """And the innovation is at least this multiple: motion driven by rounding has at least one rounding per
    recurrence."""
    filling: Positive = 0.2
    """Noise moves in many directions at once. Without a measured noise floor, motion beyond `rounding_factor` counts as
    noise only if it takes at least this share of the directions that white noise would take in the same window
    (participation ratio of the principal components), or stays within two fifths of `floor_factor`."""
    significance: _Share = 1e-4
    """Motion has a shape if noise alone would fit one so well with at most this probability, after correction for the
    number of shapes tried. Of 10,000 tokens of noise, one is expected to look shaped by chance; its verdict then
    depends on the other thresholds."""
    margin: Positive = 3.0
    """A slider must be likelier than the best approach to a point by a factor of e to this power, 20; below, the
    trajectory cannot tell. Taking a fixed point for a slider would be the worse error."""
    unexplained: _Share = 0.05
    """A shape explains the motion if it leaves at most this share of the variance."""
    unexplained_noise: _Share = 0.25
    """The same for an approach that leaves no more than noise, however small the approach is."""
    unexplained_small: _Share = 0.12
    """The same for other motion, which noise alone may imitate."""
    unexplained_mode: _Share = 0.03
    """The same for an orbit or divergence whose innovation is no more than rounding makes, and for a slider in a window
    of 32 (in other windows in proportion): motion driven by noise loses its memory."""
    memory: Positive = 4.0
    """And what the shape of such motion leaves is at most this multiple of the innovation."""
    unexplained_structure: _Share = 0.002
    """The same where more is left than amplified rounding, which must then be motion of another shape: a second
    rotation of a tenth of the first one's size is seen."""
    least_periods: Annotated[float, Range(1, 3, why="since the shortest tail that is judged has 12 recurrences")] = 2.5
    """An orbit has to repeat this often within the tail. Two periods could be chance, and a slow turn through fewer is
    a path, not a cycle."""
    growth: Positive = 1.3
    """Steps that lengthen exponentially by this factor over the tail show an unstable point. Below it, an arc of a
    slider can lengthen as much."""
    norm_growth: Positive = 1.8
    """Steady motion in one direction is divergence rather than sliding if the norm grows by this factor over the tail.
    A norm in proportion to time doubles over the second half of any trajectory; a slider has this growth only if it has
    travelled more than three times its norm."""
    summable: Annotated[float, Range()] = -0.15
    """Steps that shrink like t^(q-1) add up to a limit if q < 0. Between this value and 0 the trajectory cannot tell q
    from 0, the logarithmic drift of a slider."""
    slowing: Positive = 1.1
    """Steps that follow (t + s)^-a have no limit if a is at most 1; up to this value allows for the error of the fit.
    Used where no approach fits exactly, since exponentials come close to a logarithm."""
    adds_up: Positive = 1.25
    """From this power on such steps add up to a limit. Between `slowing` and this it cannot be told."""
    one_way: Positive = 1.5
    """Least exponent of the mean squared displacement of such steps between lags W/4 and W/2."""
    ballistic: Positive = 1.7
    """The mean squared displacement of a not quite steady drift grows with at least this power of the lag. A steady
    drift has 2, a random walk 1."""
    unsteady: _Share = 0.08
    """And a straight line or an arc leaves at most this share of its variance."""
    steady: Positive = 1.3
    """Motion in many turns leaves a point if its steps lengthen steadily by this factor over the tail, eight standard
    errors from no change in both halves. If they shrink as steadily it approaches one from the factor `shrinking` on;
    between the two it may come down to an orbit."""
    shrinking: Positive = 2.5
    """Steps whose root mean square falls by this factor from the first third of the tail to the last are those of an
    approach, whatever its shape. Steps like 1/t, which have no limit, fall by 1.6 over the second half of a
    trajectory."""
    shrinking_late: Positive = 1.15
    """The steps of an approach keep shrinking, by at least this factor within the later half of the tail, unless they
    have come to rest."""
    nearer: _Share = 0.6
    """And the motion within the later half is at most this share of that within the whole tail. The share is about 1
    for motion that goes on unchanged, and a half for a straight drift."""
    spreading: Positive = 4.0
    """The motion still spreads if its mean squared displacement grows by this factor from lags about W/16 to lags about
    W/2. It grows eightfold in a random walk and stays level in motion within bounds."""
    settling: Positive = 1.05
    """An oscillation shrinks if its amplitude falls by this factor over the tail and noise cannot explain that. (It
    grows only by the factor `growth`, since an orbit approached from within grows a little.)"""
    even: Positive = 1.4
    """The steps of an orbit have the same root mean square over the first whole periods of the tail as over the last,
    within this factor. Harmonics that recurrences alias to nearly the same turn make a rotation whose size changes in
    any way; a sharp jump once per period may be seen as one step or as two."""
    visible: Positive = 7.0
    """Without a measured noise floor, an orbit, a slider or diverging motion moves by at least this many times the
    rounding, which makes small cycles and slow hops of its own that no data can tell from real ones. With one, it moves
    by at least `rest` times that."""

    def __post_init__(self) -> None:
        check_ranges(self, "The setting ")

    @property
    def may_be_new(self) -> float:
        """Roundings that may be new in a recurrence of several layers, which rounds more often than `new` allows for:
        of true fixed points of random models of four layers, up to 30."""
        return 4 * self.new


@dataclass(frozen=True, kw_only=True)
class CosineSettings:
    """The paper's family of criteria: the cosine to the last state. Its algorithm is not public; these are its three
    published numbers, and the choices that had to be added."""

    tau: Positive = 0.05
    """A state counts as equal to the last one if their cosine differs from 1 by at most this (arXiv 2604.11791)."""
    rho: Positive = 0.9
    """The token has a fixed point if that holds for this share of the window (arXiv 2604.11791)."""
    window: Annotated[int, Range(8, 10**6)] = 128
    """Judge at most this many last recurrences (the paper's horizon is 128), or the second half of the trajectory if
    that is shorter."""
    least_recurrences: Annotated[int, Range(8)] = 16
    """Fewer than this give no verdict."""
    peak: Positive = 0.5
    """One peak of the spectrum dominates if it holds at least this share of the power, including its two neighbours.
    Our choice: the paper does not say."""
    monotone: Positive = 0.9
    """An approach is monotone if at least this share of the steps go towards the last state. Our choice too."""

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
