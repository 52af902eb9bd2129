"""Colours that report and paper figures share.

Categories use the palette of Okabe and Ito ("Color Universal Design", 2008), which readers with any common colour
vision tell apart; its yellow is left out, being too faint on white. Layers beyond those use the part of cividis (Nuñez,
Anderton and Renslow, PLOS ONE 13, 2018) that is seen as a line on white, and recurrences one blue from dark to light.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = [
    "BAND",
    "CATEGORIES",
    "GRID",
    "INK",
    "MUTED",
    "layer_colours",
    "named_in_legend",
    "ordered_colours",
]

CATEGORIES = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#1C1D21")
INK, MUTED, GRID = "#1C1D21", "#5B5F66", "#E6E8EB"
BAND = 0.16
"""Opacity of the grey (`MUTED`) of a band: lines and grid are still seen through it."""

_MOST_NAMES = 12
# From the dark end of cividis to where it is still seen as a line on white.
_LINES = ((0, 34, 78), (124, 123, 120), (217, 180, 48))
_BLUES = ((8, 48, 107), (55, 135, 192), (171, 207, 232))


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
    """So many colours evenly along straight lines between the stops, as #RRGGBB."""
    at = np.linspace(0, len(stops) - 1, count) if count > 1 else np.zeros(count)
    channels = [np.interp(at, range(len(stops)), [stop[channel] for stop in stops]).round() for channel in range(3)]
    return [f"#{int(red):02X}{int(green):02X}{int(blue):02X}" for red, green, blue in zip(*channels, strict=True)]
