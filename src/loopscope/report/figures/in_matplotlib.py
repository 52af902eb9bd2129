"""A `Plot` for a paper: a matplotlib figure, and files that are the same for the same study.

Matplotlib is used without pyplot, and its settings only within `paper_style`: nothing is left behind.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, singledispatchmethod
from typing import Any, Literal, get_args

import matplotlib.style
import numpy as np
from fontTools import subset
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ft2font import FT2Font, LoadFlags
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter
from mpl_toolkits.mplot3d import axes3d
from numpy.typing import NDArray

from loopscope._util.wording import visible
from loopscope.errors import ConfigError
from loopscope.report.figures.look import (
    BAND,
    EMPHASIS,
    GRID,
    INK,
    LABEL_SIZE,
    MUTED,
    PAPER,
    PAPER_FONT,
    PAPER_STYLE,
    SMALL_SIZE,
    number,
)
from loopscope.report.figures.plot import (
    Axis,
    Band,
    Bars,
    Dots,
    Frame,
    HeatMap,
    Line,
    Mark,
    Named,
    Panel,
    Plot,
    Rule,
    Shade,
    begins_at_zero,
    log_ticks,
    upright,
)

Format = Literal["pdf", "svg", "png"]
FORMATS: tuple[Format, ...] = get_args(Format)
Width = Literal["auto", "single", "double"] | float
"""Of a figure: one column, both, what its panels need, or inches."""

_INCHES = {"single": 3.25, "double": 6.75}
"""Column and text width of ICML's style, which the paper uses; those of other venues differ by a few per cent."""
_NARROWEST, _WIDEST = 1.5, 40.0
"""Inches: below, no axis has room for its numbers; above, no page."""
_PNG_DPI, _SCREEN_DPI = 300, 110
_MAP_DPI = 600
"""Of maps inside vector files, which are pixels there: the cells of hundreds of visits still come out even."""

_PANEL = 2.0
"""Inches: the width below which panels go under each other rather than beside."""
_SIDES = 0.7
"""Inches beside a title that its panel's y axis and letter take."""
_Y_CHARACTERS = 26
"""Of a name along the lowest y axis."""
_HEIGHT, _SQUARE, _LOWEST, _LEGEND = 0.72, 0.84, 1.8, 0.2
"""Of a panel, per inch of its width, and of one whose units are as long on both axes; of the lowest panel whose y axis
has room for its name, in inches; and of a row of the legend."""
_PAGE = 8.6
"""Inches: what a page of a paper has room for; of many rows of panels each becomes lower."""
_PIXELS = 150.0
"""CSS pixels of a panel on a page that are an inch on paper."""
_ORDINARY = 340
"""CSS pixels of an ordinary panel and its legend."""
_STEPS = [1, 2, 2.5, 5, 10]
"""Between ticks, times a power of ten."""
_MARGIN, _HANDLE = 0.15, 0.21
"""Inches around a legend, and those that the handle of a label and the spaces around it take."""
_HINTING = 1.03
"""Letters that are fitted to the pixels of a coarse image are up to so much wider than their outlines."""
_VIEW = {"elev": 24, "azim": -58}
"""Degrees: from where a panel in space is seen."""
_ZOOM = 0.88
"""Leaves room for the names of the axes, which matplotlib forgets when it lays out a panel in space."""
MARK = "mark"
"""The gid of lines that stand for no value."""
_DASHES = {"solid": "-", "dot": ":", "dash": (0, (4, 2)), "dashdot": "-.", "longdash": (0, (8, 3))}
_SYMBOLS = {
    "circle": "o", "square": "s", "diamond": "D", "triangle-right": ">", "triangle-up": "^", "triangle-left": "<",
    "pentagon": "p", "x": "x", "bar": "_", "star": "*",
}  # fmt: skip


@contextmanager
def paper_style() -> Iterator[None]:
    """Matplotlib's own defaults with our changes, whatever the user's settings are; these are back afterwards."""
    with matplotlib.style.context(["default", PAPER_STYLE]):
        yield


@contextmanager
def _glyphs_alone() -> Iterator[None]:
    """Embed fonts without the tables for laying out words.

    By then words have been laid out, and no reader of a PDF uses those tables; cutting them down takes a fifth of a
    figure's time. Matplotlib has no setting for it.
    """
    usual = subset.Options._drop_tables_default
    subset.Options._drop_tables_default = [*usual, "GDEF", "GPOS", "GSUB"]
    try:
        yield
    finally:
        subset.Options._drop_tables_default = usual


def draw(plot: Plot, width: Width = "auto") -> Figure:
    """All panels, lettered if there are several, with one legend."""
    with paper_style():
        figure, drawn = _panels(plot, width)
        for axes, panel in zip(drawn, plot.panels, strict=True):
            _Drawing(plot, panel, axes, figure).finish()
        _name_x_once(drawn)
        explained = [
            _words(mark.name)
            for panel in plot.panels
            for mark in panel.marks
            if isinstance(mark, Named) and mark.explained
        ]
        _add_legend(figure, drawn, plot.legend or None, explained)
        return figure


def file_of(figure: Figure, format: Format) -> bytes:
    """The figure as the content of a file, the same bytes for the same figure: without date, with fonts embedded.

    Raises `ConfigError` for an unknown format.
    """
    # What would else say when the file was made.
    undated: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}
    if format not in undated:
        raise ConfigError(f"The format of a figure must be one of {', '.join(FORMATS)}, got {format!r}.")
    content = io.BytesIO()
    with paper_style(), _glyphs_alone():
        dpi = _PNG_DPI if format == "png" else _MAP_DPI
        figure.savefig(content, format=format, dpi=dpi, metadata=undated[format])
    return content.getvalue()


def inches(width: Width, panels: int) -> float:
    """Of a figure with that many panels: one column for one panel, both for more, unless told otherwise.

    Raises `ConfigError` for a width that no figure can have.
    """
    if isinstance(width, str):
        if width not in ("auto", *_INCHES):
            raise ConfigError(f"The width of a figure must be auto, single, double or inches, got {width!r}.")
        return _INCHES[width] if width in _INCHES else _INCHES["single" if panels == 1 else "double"]
    if not _NARROWEST <= width <= _WIDEST:
        raise ConfigError(f"The width of a figure must be {_NARROWEST:g} to {_WIDEST:g} inches, got {width:g}.")
    return float(width)


class _Figure(Figure):
    """Matplotlib draws what it saves twice, the first time for the layout's sake; here it is only laid out then."""

    def draw(self, renderer: Any) -> None:
        engine = self.get_layout_engine()
        if isinstance(engine, ConstrainedLayoutEngine) and self.canvas.is_saving():
            engine.execute(self)
        else:
            super().draw(renderer)

    def _repr_png_(self) -> bytes:
        """What a notebook shows, with pyplot or without."""
        content = io.BytesIO()
        with paper_style():
            self.savefig(content, format="png", dpi=_SCREEN_DPI)
        return content.getvalue()


def _panels(plot: Plot, width: Width) -> tuple[Figure, list[Any]]:
    """A figure with a place for each panel, as many beside each other as its width has room for."""
    count = len(plot.panels)
    total = inches(width, count)
    beside = max(1, min(count, int(total / _PANEL)))
    # Two go under each other where there is no room beside, unless that would be more than a page.
    if plot.columns and (plot.columns != 2 or total >= 2 * _PANEL or count * _LOWEST > _PAGE):
        beside = min(plot.columns, count)
    elif plot.columns:
        beside = 1
    elif count > beside:
        beside = math.ceil(count / math.ceil(count / beside))  # rows of equal length, as far as may be
    rows = math.ceil(count / beside)
    square = any(panel.equal or panel.z is not None for panel in plot.panels)
    maps = [mark.z for panel in plot.panels if panel.equal for mark in panel.marks if isinstance(mark, HeatMap)]
    tall = max((len(values) / values.shape[1] for values in maps), default=1.0)
    each = max(_LOWEST, (_SQUARE * tall if square else _HEIGHT) * total / beside)
    highest = max(panel.height for panel in plot.panels)
    if not square and highest > _ORDINARY:
        each = max(each, highest / _PIXELS)
    figure = _Figure(figsize=(total, min(rows * each, _PAGE) + _LEGEND), layout="constrained")
    if count == 1 and plot.panels[0].equal and any(isinstance(mark, HeatMap) for mark in plot.panels[0].marks):
        figure.set_layout_engine("compressed")
    found: list[Axes] = []
    for index, panel in enumerate(plot.panels):
        shared = found[0] if plot.same_y and found else None
        space = {} if panel.z is None else {"projection": axes3d.Axes3D.name}
        axes = figure.add_subplot(rows, beside, index + 1, sharey=shared, **space)
        if count > 1:
            axes.set_title(plot.letter(panel), loc="left", fontweight="bold")
        if panel.title:
            named_above = any(isinstance(mark, Rule) and mark.above for mark in panel.marks)
            pad = 6 + (SMALL_SIZE + 3 if named_above else 0)
            axes.set_title(_on_two_lines(_words(panel.title), total / beside - _SIDES), pad=pad)
        found.append(axes)
    return figure, found


class _Drawing:
    """One panel, mark by mark."""

    def __init__(self, plot: Plot, panel: Panel, axes: Any, figure: Figure) -> None:
        self._plot, self._panel, self._axes, self._figure = plot, panel, axes, figure
        self._log = plot.logarithmic(panel)
        if self._log:
            axes.set_yscale("log")
        if panel.x.scale == "log":
            axes.set_xscale("log")
        self._bars = [mark for mark in panel.marks if isinstance(mark, Bars)]
        for mark in panel.marks:
            self._add(mark)

    @singledispatchmethod
    def _add(self, mark: Mark) -> None:
        raise TypeError(mark)

    @_add.register
    def _(self, mark: Line) -> None:
        style: dict[str, Any] = {
            "color": mark.colour, "linestyle": _DASHES[mark.dash], "linewidth": 0.55 * mark.width,
            "marker": "o" if mark.points or np.size(mark.x) == 1 else None, "label": _label(mark),
        }  # fmt: skip
        if mark.z is not None:
            self._axes.plot(np.asarray(mark.x), np.asarray(mark.y), np.asarray(mark.z), **style)
            return
        kind = "steps-post" if mark.steps else "default"
        self._axes.plot(np.asarray(mark.x), self._drawable(mark.y), drawstyle=kind, **style)

    @_add.register
    def _(self, mark: Band) -> None:
        low, high = self._drawable(mark.low), self._drawable(mark.high)
        if (np.isfinite(low) & np.isfinite(high)).any():
            self._axes.fill_between(
                np.asarray(mark.x), low, high, color=MUTED, alpha=BAND, linewidth=0, label=_label(mark), zorder=1
            )

    @_add.register
    def _(self, mark: Dots) -> None:
        style: dict[str, Any] = {
            "linestyle": "none", "marker": _SYMBOLS[mark.symbol], "markersize": 0.45 * mark.size, "color": mark.colour,
            "markerfacecolor": PAPER if mark.hollow else mark.colour, "alpha": mark.opacity, "label": _label(mark),
        }  # fmt: skip
        if mark.z is not None:
            self._axes.plot(np.asarray(mark.x), np.asarray(mark.y), np.asarray(mark.z), **style)
            return
        x, y = np.asarray(mark.x, dtype=np.float64), self._drawable(mark.y)
        if not np.isfinite(y).any() and mark.low is not None:
            return
        up = _whiskers(y, mark.low, mark.high, log=self._log)
        aside = _whiskers(x, mark.left, mark.right, log=self._panel.x.scale == "log")
        self._axes.errorbar(x, y, yerr=up, xerr=aside, elinewidth=0.7, **style)

    @_add.register
    def _(self, mark: Bars) -> None:
        # Beside each other, as on a page.
        width = mark.width / len(self._bars)
        place = next(place for place, each in enumerate(self._bars) if each is mark)
        at = np.asarray(mark.x, dtype=np.float64) + width * (place - (len(self._bars) - 1) / 2)
        self._axes.bar(at, np.nan_to_num(mark.y), width=width, color=mark.colour, label=_label(mark))

    @_add.register
    def _(self, mark: HeatMap) -> None:
        x, shown = np.asarray(mark.x, dtype=np.float64), np.asarray(mark.z, dtype=np.float64)
        step = (x[-1] - x[0]) / max(1, len(x) - 1) or 1.0
        edges = (x[0] - step / 2, x[-1] + step / 2, len(shown) - 0.5, -0.5)
        colours: dict[str, Any] = {"vmin": mark.low, "vmax": mark.high}
        if mark.palette:
            limits = np.arange(len(mark.palette) + 1) - 0.5
            colours = {"cmap": ListedColormap(list(mark.palette)), "norm": BoundaryNorm(limits, len(mark.palette))}
        aspect = "equal" if self._panel.equal else "auto"
        image = self._axes.imshow(shown, extent=edges, aspect=aspect, **colours)
        self._axes.grid(visible=False)
        thin = min(0.8, 10 / max(1, len(mark.parted_x), len(mark.parted_y)))
        columns, rows = list(mark.parted_x), list(mark.parted_y)
        if mark.gaps:
            columns, rows = [*columns, *(x[:-1] + step / 2)], [*rows, *(np.arange(len(shown) - 1) + 0.5)]
        for place in columns:
            self._axes.axvline(place, color=PAPER, linewidth=thin)
        for place in rows:
            self._axes.axhline(place, color=PAPER, linewidth=thin)
        for row, texts in enumerate(mark.texts):
            for column, words in enumerate(texts):
                if words:
                    red, green, blue, _ = image.cmap(image.norm(shown[row, column]))
                    colour = PAPER if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else INK
                    self._axes.text(x[column], row, _words(words), ha="center", va="center", color=colour, fontsize=6)
        if mark.bar and not self._explained_later(mark):
            _add_colour_bar(self._figure, image, self._axes, mark)

    @_add.register
    def _(self, mark: Rule) -> None:
        style: dict[str, Any] = {"color": MUTED, "linestyle": _DASHES[mark.dash], "gid": MARK}
        style["linewidth"] = 0.7 if mark.name else 0.4
        label = None if mark.above or not mark.name else _words(mark.name)
        if mark.x is None:
            self._axes.axhline(mark.y, label=label, **style)
            return
        self._axes.axvline(mark.x, label=label, **style)
        if mark.above:
            ends = self._panel.x.span or self._axes.get_xlim()
            left = mark.x < (math.sqrt(ends[0] * ends[1]) if self._panel.x.scale == "log" else sum(ends) / 2)
            self._axes.annotate(
                _words(mark.name), (mark.x, 1), xycoords=("data", "axes fraction"), xytext=(2 if left else -2, 2),
                textcoords="offset points", ha="left" if left else "right", va="bottom", fontsize=SMALL_SIZE,
                color=MUTED,
            )  # fmt: skip

    @_add.register
    def _(self, mark: Shade) -> None:
        self._axes.axvspan(mark.start, mark.end, color=GRID, linewidth=0, alpha=0.6, zorder=0)

    @_add.register
    def _(self, mark: Frame) -> None:
        corner = (mark.x - 0.47, mark.y - 0.47)
        self._axes.add_patch(Rectangle(corner, 0.94, 0.94, fill=False, edgecolor=EMPHASIS, linewidth=1.2))

    def _explained_later(self, mark: HeatMap) -> bool:
        """Whether the bar of a later panel says what the colours of this map are."""
        place = next(place for place, panel in enumerate(self._plot.panels) if panel is self._panel)
        later = [each for panel in self._plot.panels[place + 1 :] for each in panel.marks if isinstance(each, HeatMap)]
        return any((each.bar, each.low, each.high) == (mark.bar, mark.low, mark.high) for each in later) and (
            mark.low is not None
        )

    def _drawable(self, values: Any) -> NDArray[np.float64]:
        """Gaps for what has no place on the y axis: what is not finite, and on a logarithmic one what is not
        positive."""
        shown = np.asarray(values, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            return np.where(np.isfinite(shown) & (shown > 0 if self._log else True), shown, np.nan)

    def finish(self) -> None:
        """Names, limits and ticks, after all is drawn."""
        axes, panel = self._axes, self._panel
        if panel.z is not None:
            self._finish_space(panel.z)
            return
        is_map = any(isinstance(mark, HeatMap) for mark in panel.marks)
        axes.set_xlabel(_words(panel.x.title))
        title = _words(panel.y.title)
        axes.set_ylabel(title if is_map else "\n".join(textwrap.wrap(title, _Y_CHARACTERS)))
        if not is_map:
            self._finish_values(panel.y)
            axes.grid(visible=panel.y.grid is not False, axis="y")
            axes.grid(visible=bool(panel.x.grid), axis="x")
            if panel.equal:
                axes.set_aspect("equal", adjustable="datalim")
        elif axes.name != "3d" and panel.x.ticks:
            axes.tick_params(length=0)
            axes.tick_params(axis="x", rotation=90 if upright(panel) else 0)
        _finish_axis(axes, "x", panel.x)
        _finish_axis(axes, "y", panel.y)

    def _finish_values(self, axis: Axis) -> None:
        """Of the y axis, for the values of all panels where they share it."""
        axes, values = self._axes, self._plot.values(self._panel)
        if axis.ticks or (axis.span is not None and not self._log):
            return
        if not self._log:
            if begins_at_zero(axis, values) or self._bars:
                axes.set_ylim(bottom=0, top=1.05 * values.max() if values.any() else 1)
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
            return
        positive = values[values > 0]
        if axis.span is None and not positive.size:
            return
        margin = (positive.max() / positive.min()) ** 0.05 if axis.span is None else 1.0
        low, high = axis.span or (float(positive.min() / margin), float(positive.max() * margin))
        ticks = log_ticks(low, high)
        axes.set_ylim(low, high)
        axes.set_yticks(list(ticks), labels=list(ticks.values()))
        axes.yaxis.set_minor_locator(NullLocator())

    def _finish_space(self, z: Axis) -> None:
        axes = self._axes
        axes.view_init(**_VIEW)
        axes.set_box_aspect(None, zoom=_ZOOM)
        axes.tick_params(pad=-4, labelsize=5)
        for which, axis in zip("xyz", (self._panel.x, self._panel.y, z), strict=True):
            getattr(axes, f"set_{which}label")(_words(axis.title), labelpad=-9, fontsize=6)
            axes.locator_params(which, nbins=4)


def _finish_axis(axes: Axes, which: Literal["x", "y"], axis: Axis) -> None:
    """What both axes of a panel may ask for."""
    drawn = axes.xaxis if which == "x" else axes.yaxis
    if axis.span is not None:
        (axes.set_xlim if which == "x" else axes.set_ylim)(*axis.span)
    if axis.percent:
        drawn.set_major_formatter(PercentFormatter(1.0))
    if len(axis.ticks):
        names = axis.ticks.values() if isinstance(axis.ticks, Mapping) else [f"{tick:g}" for tick in axis.ticks]
        drawn.set_ticks(list(axis.ticks), labels=[_words(name, 18) for name in names])
        if axis.scale == "log":
            drawn.set_minor_locator(NullLocator())
    elif which == "x" and axis.scale != "log" and axis.whole:
        drawn.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))


def _whiskers(middle: NDArray[np.float64], low: Any, high: Any, *, log: bool) -> NDArray[np.float64] | None:
    """Lengths down and up; on a logarithmic axis a whisker down to 0 has no end."""
    if low is None or high is None:
        return None
    lengths = np.nan_to_num(np.stack([middle - np.asarray(low), np.asarray(high) - middle]))
    if log:
        lengths[0] = np.minimum(lengths[0], np.nan_to_num(0.999 * middle))
    return np.asarray(np.maximum(lengths, 0))


def _name_x_once(drawn: Sequence[Axes]) -> None:
    """Where all panels have the same x axis, only the lowest of each column names it."""
    if len({axes.get_xlabel() for axes in drawn}) > 1:
        return
    spots = [axes.get_subplotspec() for axes in drawn]
    places = [(spot.rowspan.start, spot.colspan.start) for spot in spots if spot is not None]
    for axes, (row, column) in zip(drawn, places, strict=True):
        if (row + 1, column) in places:
            axes.set_xlabel("")


def _add_legend(figure: Figure, drawn: Sequence[Axes], title: str | None, explained: Sequence[str]) -> None:
    """One legend below all panels: every label once, numbers before words, row by row. The title is its first entry.

    Where one row does not hold all, the labels that the reading has explained as well are left out.
    """
    entries: dict[str, Artist] = {}
    for axes in drawn:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if not entries:
        return
    labels = sorted(entries, key=lambda label: int(label) if label.isdigit() else math.inf)
    if title and labels[0].isdigit():
        labels, entries = [title, *labels], {title: Line2D([], [], linestyle="none"), **entries}
    width = figure.get_figwidth() - _MARGIN
    shown = {label: _fitted(label, width - _HANDLE, SMALL_SIZE) for label in labels}
    for label in explained:
        if label in labels and _legend_columns([shown[kept] for kept in labels], width) < len(labels):
            labels.remove(label)
    columns = _legend_columns([shown[label] for label in labels], width)
    # Matplotlib fills column by column.
    order = [labels[index] for column in range(columns) for index in range(column, len(labels), columns)]
    handles = [entries[label] for label in order]
    figure.legend(handles, [shown[label] for label in order], loc="outside lower center", ncols=columns)


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """The most columns whose widest entries fit beside each other."""
    sizes = [_HANDLE + _text_inches(label, SMALL_SIZE) for label in labels]
    for columns in range(len(labels), 1, -1):
        if sum(max(sizes[column::columns]) for column in range(columns)) <= width:
            return columns
    return 1


def _add_colour_bar(figure: Figure, image: AxesImage, beside: Axes, mark: HeatMap) -> None:
    """A named colour bar, as high as the map."""
    bar = figure.colorbar(image, cax=beside.inset_axes((1.03, 0, 0.04, 1)))
    bar.set_label(_words(mark.bar))
    bar.outline.set_visible(False)
    if mark.bar_ticks:
        bar.set_ticks(list(mark.bar_ticks), labels=list(mark.bar_ticks.values()))


def _label(mark: Any) -> str | None:
    return _words(mark.name) if mark.listed and mark.name else None


def _words(outside: str, longest: int = 60) -> str:
    """A text for a figure: white space made visible, cut, and what the font has no shape for as ▯."""
    known = _characters()
    lines = [visible(line, longest) if line.strip() else line for line in outside.split("\n")]
    return "\n".join("".join(char if ord(char) in known else "▯" for char in line) for line in lines)


def _on_two_lines(words: str, width: float) -> str:
    """Words on as many lines of a width in inches as they need, two at most, of which the last is cut."""
    parts = words.split()
    fitting = (
        count for count in range(len(parts), 1, -1) if _text_inches(" ".join(parts[:count]), LABEL_SIZE) <= width
    )
    count = next(fitting, 1)
    lines = (" ".join(parts[:count]), " ".join(parts[count:]))
    return "\n".join(_fitted(line, width) for line in lines if line)


def _fitted(words: str, width: float, size: float = LABEL_SIZE) -> str:
    """Words cut to a width in inches."""
    if _text_inches(words, size) <= width:
        return words
    while words and _text_inches(words + "…", size) > width:
        words = words[:-1]
    return words.rstrip() + "…"


def _text_inches(words: str, size: float) -> float:
    """The width of words, in inches; a little more, since pixels round letters up."""
    font = _font()
    font.set_size(size, 72)
    font.set_text(words, 0.0, flags=LoadFlags.NO_HINTING)
    return float(_HINTING * font.get_width_height()[0] / 64 / 72)


def _font() -> FT2Font:
    return get_font(findfont(PAPER_FONT))


@lru_cache(maxsize=1)
def _characters() -> frozenset[int]:
    return frozenset(_font().get_charmap())
