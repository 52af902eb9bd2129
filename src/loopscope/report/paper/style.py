"""The look of a paper: sizes, fonts, and files that are the same for the same study.

Matplotlib is used without pyplot, and its settings only within `paper_style`: nothing is left behind.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, Literal, ParamSpec, get_args

import matplotlib.style
from matplotlib.figure import Figure

from loopscope.errors import ConfigError
from loopscope.report.figures.look import GRID, INK, MUTED
from loopscope.report.paper.texts import FONT, LABEL_SIZE, SMALL_SIZE
from loopscope.study import Readings, Study, read_study

Format = Literal["pdf", "svg", "png"]
FORMATS: tuple[Format, ...] = get_args(Format)
Width = Literal["auto", "single", "double"] | float
"""Of a figure: one column, both, what its panels need, or inches."""

_P = ParamSpec("_P")

_INCHES = {"single": 3.25, "double": 6.75}
"""Column and text width of ICML's style, which the paper uses; those of other venues differ by a few per cent."""
_NARROWEST, _WIDEST = 1.5, 40.0
"""Inches: below, no axis has room for its numbers; above, no page."""
_PNG_DPI = 300
_MAP_DPI = 600
"""Of maps inside vector files, which are pixels there: the cells of hundreds of visits still come out even."""

_STYLE: dict[str, Any] = {
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
    "font.family": FONT,
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


@contextmanager
def paper_style() -> Iterator[None]:
    """Matplotlib's own defaults with the changes above, whatever the user's settings are; these are back afterwards."""
    with matplotlib.style.context(["default", _STYLE]):
        yield


def study_figure(
    draw: Callable[Concatenate[Readings, _P], Figure],
) -> Callable[Concatenate[Study | Readings, _P], Figure]:
    """Makes a function that draws readings one that takes a study as well, and draws in the style of a paper."""

    @functools.wraps(draw)
    def drawn(study: Study | Readings, /, *args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with paper_style():
            return draw(study if isinstance(study, Readings) else read_study(study), *args, **kwargs)

    return drawn


def inches(width: Width, panels: int) -> float:
    """Of a figure with so many panels: one column for one panel, both for more, unless told otherwise.

    Raises `ConfigError` for a width that no figure can have.
    """
    if isinstance(width, str):
        if width not in ("auto", *_INCHES):
            raise ConfigError(f"The width of a figure must be auto, single, double or inches, got {width!r}.")
        return _INCHES[width] if width in _INCHES else _INCHES["single" if panels == 1 else "double"]
    if not _NARROWEST <= width <= _WIDEST:
        raise ConfigError(f"The width of a figure must be {_NARROWEST:g} to {_WIDEST:g} inches, got {width:g}.")
    return float(width)


def file_of(figure: Figure, format: Format) -> bytes:
    """The figure as the content of a file, the same bytes for the same figure: without date, with fonts embedded.

    Raises `ConfigError` for an unknown format.
    """
    # What would else say when the file was made.
    undated: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}
    if format not in undated:
        raise ConfigError(f"The format of a figure must be one of {', '.join(FORMATS)}, got {format!r}.")
    content = io.BytesIO()
    with paper_style():
        dpi = _PNG_DPI if format == "png" else _MAP_DPI
        figure.savefig(content, format=format, dpi=dpi, metadata=undated[format])
    return content.getvalue()
