"""Texts and numbers in figures: without markup, in the letters of the one font, and no longer than there is room."""

from __future__ import annotations

import math
from functools import lru_cache

from matplotlib.font_manager import findfont, get_font
from matplotlib.ft2font import FT2Font, LoadFlags

from loopscope._util.wording import visible

FONT = "DejaVu Sans"
"""Comes with matplotlib, so it is the same on every machine."""
LABEL_SIZE, SMALL_SIZE = 7.5, 6.5
"""Points: of titles and names of axes, and of ticks and legends."""

_HINTING = 1.03
"""Letters that are fitted to the pixels of a coarse image are up to so much wider than their outlines."""
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def text(outside: str, longest: int = 60) -> str:
    """A text from outside for a figure: white space made visible, cut, and what the font has no shape for as ▯."""
    known = _characters()
    return "".join(char if ord(char) in known else "▯" for char in visible(outside, longest))


def fitted(words: str, inches: float, size: float = LABEL_SIZE) -> str:
    """Words of our own or from `text`, cut to a width."""
    if text_inches(words, size) <= inches:
        return words
    while words and text_inches(words + "…", size) > inches:
        words = words[:-1]
    return words.rstrip() + "…"


def text_inches(words: str, size: float) -> float:
    """The width of words, in inches; a little more, since pixels round letters up."""
    font = _font()
    font.set_size(size, 72)
    font.set_text(words, 0.0, flags=LoadFlags.NO_HINTING)
    return float(_HINTING * font.get_width_height()[0] / 64 / 72)


def _font() -> FT2Font:
    return get_font(findfont(FONT))


@lru_cache(maxsize=1)
def _characters() -> frozenset[int]:
    return frozenset(_font().get_charmap())


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
    """Whole exponents from `low` to `high`, evenly, at most so many."""
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    step = max(1, math.ceil((last - first) / max(1, most - 1)))
    return list(range(first, last + 1, step))
