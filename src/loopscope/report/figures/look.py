"""Colours, fonts, and how numbers are written on axes. Maps use cividis (Nuñez, Anderton and Renslow, PLOS ONE 13,
2018)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from loopscope.dynamics.prediction import PredictedKind as Predicted
from loopscope.dynamics.verdicts import KINDS, Kind

Symbol = Literal[
    "circle", "square", "diamond", "triangle-right", "triangle-up", "triangle-left", "pentagon", "x", "bar", "star"
]
CATEGORIES = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#1C1D21")
INK, MUTED, GRID, AXIS, PAPER = "#1C1D21", "#5B5F66", "#E6E8EB", "#B9BDC4", "#FFFFFF"
EMPHASIS = CATEGORIES[3]
"""Of what is framed, or stands out among the others."""
BAND = 0.16
"""Opacity of the grey (`MUTED`) of a band: lines and grid are still seen through it."""

_MOST_NAMES = 12
# From the dark end of cividis to where it is still seen as a line on white.
_LINES = ((0, 34, 78), (124, 123, 120), (217, 180, 48))
_BLUES = ((8, 48, 107), (55, 135, 192), (171, 207, 232))

SEQUENTIAL = "Cividis"

PAGE_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'


def layer_colours(count: int) -> list[str]:
    """One colour a layer: categories as long as they last, then an ordered scale."""
    return list(CATEGORIES[:count]) if count <= len(CATEGORIES) else _sampled(_LINES, count)


def named_in_legend(layer: int, layers: int) -> bool:
    """In a legend of many layers only the first, the middle and the last are named."""
    return layers <= _MOST_NAMES or layer in (0, layers // 2, layers - 1)


def ordered_colours(count: int) -> list[str]:
    """Dark to light: later is lighter."""
    return _sampled(_BLUES, count)


def _sampled(stops: Sequence[tuple[int, int, int]], count: int) -> list[str]:
    """That many colours evenly along straight lines between the stops, as #RRGGBB."""
    at = np.linspace(0, len(stops) - 1, count) if count > 1 else np.zeros(count)
    channels = [np.interp(at, range(len(stops)), [stop[channel] for stop in stops]).round() for channel in range(3)]
    return [f"#{int(red):02X}{int(green):02X}{int(blue):02X}" for red, green, blue in zip(*channels, strict=True)]


@dataclass(frozen=True, slots=True)
class KindLook:
    """Of one kind."""

    colour: str
    on_colour: str
    """Of a letter on that colour."""
    letter: str
    symbol: Symbol
    meaning: str
    """In a few words, for legends."""


KIND_LOOKS: dict[Kind, KindLook] = {
    Kind.FIXED_POINT: KindLook("#0072B2", "#FFFFFF", "F", "circle", "approaches one point, or rests there"),
    Kind.AT_FLOOR: KindLook("#56B4E9", "#1C1D21", "A", "square", "what is left of its motion looks like rounding"),
    Kind.ORBIT: KindLook("#D55E00", "#FFFFFF", "O", "diamond", "returns to the same states"),
    Kind.SLIDER: KindLook("#CC79A7", "#1C1D21", "S", "triangle-right", "moves on in one direction without a limit"),
    Kind.BOUNDED: KindLook("#E69F00", "#1C1D21", "B", "pentagon", "keeps moving within bounds, without a period"),
    Kind.DIVERGING: KindLook("#1C1D21", "#FFFFFF", "D", "triangle-up", "moves away faster and faster"),
    Kind.UNKNOWN: KindLook("#8A8F98", "#1C1D21", "?", "x", "the trajectory does not decide"),
}


def kind_label(kind: Kind) -> str:
    """As on an axis: `orbit (O)`."""
    return f"{kind} ({KIND_LOOKS[kind].letter})"


def looks_for_script() -> list[dict[str, str]]:
    """In the order of `KINDS`, for scripts of the page."""
    return [
        {
            "name": str(kind),
            "colour": KIND_LOOKS[kind].colour,
            "on": KIND_LOOKS[kind].on_colour,
            "letter": KIND_LOOKS[kind].letter,
            "meaning": KIND_LOOKS[kind].meaning,
        }
        for kind in KINDS
    ]


PREDICTED_LOOKS: dict[Predicted, tuple[str, Symbol]] = {
    Predicted.FIXED_POINT: (KIND_LOOKS[Kind.FIXED_POINT].colour, "circle"),
    Predicted.DAMPED_ROTATION: (KIND_LOOKS[Kind.AT_FLOOR].colour, "circle"),
    Predicted.SLIDER: (KIND_LOOKS[Kind.SLIDER].colour, "triangle-right"),
    Predicted.ORBIT: (KIND_LOOKS[Kind.ORBIT].colour, "diamond"),
    Predicted.PERIOD_TWO: (KIND_LOOKS[Kind.BOUNDED].colour, "diamond"),
    Predicted.UNSTABLE: (KIND_LOOKS[Kind.DIVERGING].colour, "triangle-up"),
    Predicted.FAR: (KIND_LOOKS[Kind.UNKNOWN].colour, "bar"),
    Predicted.UNRESOLVED: (KIND_LOOKS[Kind.UNKNOWN].colour, "x"),
}
"""Colour and symbol."""

PAPER_FONT = "DejaVu Sans"
"""Comes with matplotlib, so it is the same on every machine."""
LABEL_SIZE, SMALL_SIZE = 7.5, 6.5
"""Points, on paper: of titles and names of axes, and of ticks and legends."""

PAPER_STYLE: dict[str, Any] = {
    # Tokens, prompts and names stand in figures as they are: a $ in them is no formula.
    "text.parse_math": False,
    "text.usetex": False,
    "axes.formatter.use_mathtext": False,
    # Whole fonts' outlines rather than Type 3 programs, which many venues refuse.
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "path",
    # Instead of random names of elements.
    "svg.hashsalt": "loopscope",
    "font.family": PAPER_FONT,
    "font.size": LABEL_SIZE,
    "axes.titlesize": LABEL_SIZE,
    "axes.labelsize": LABEL_SIZE,
    "xtick.labelsize": SMALL_SIZE,
    "ytick.labelsize": SMALL_SIZE,
    "legend.fontsize": SMALL_SIZE,
    "legend.title_fontsize": SMALL_SIZE,
    "legend.frameon": False,
    "legend.handlelength": 1.1,
    "legend.columnspacing": 0.7,
    "legend.handletextpad": 0.4,
    "legend.borderaxespad": 0.2,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 2.5,
    "image.interpolation": "nearest",
    "image.cmap": "cividis",
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
}
"""What a paper's figures change in matplotlib's settings."""

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float) -> str:
    """A number of a tick, without markup: 0.02, 350, 2·10⁻⁷."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}".replace("-", "−")
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    return f"{value / 10.0**exponent:.3g}·{decade(exponent)}".replace("-", "−")


def decade(exponent: int) -> str:
    """A power of ten, without markup: 10⁻³."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def decade_ticks(low: float, high: float, most: int = 6) -> list[int]:
    """Whole exponents from `low` to `high`, evenly, at most that many."""
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    step = max(1, math.ceil((last - first) / max(1, most - 1)))
    return list(range(first, last + 1, step))


def logarithms(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """To base 10; NaN, which has no colour, where a value is exactly 0."""
    with np.errstate(divide="ignore"):
        return np.where(values > 0, np.log10(values), np.nan)


def decades(logarithms: NDArray[np.float64]) -> tuple[float, float]:
    """Whole powers of ten around the values, one apart at least."""
    finite = logarithms[np.isfinite(logarithms)]
    low, high = (float(np.floor(finite.min())), float(np.ceil(finite.max()))) if finite.size else (-1.0, 0.0)
    return low, max(high, low + 1)
