"""A `Plot` for the page: a plotly chart for each panel."""

from __future__ import annotations

import base64
import html
import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatchmethod
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from plotly.colors import sequential

from loopscope._util.wording import percent, significant
from loopscope.report.figures.look import AXIS, BAND, EMPHASIS, GRID, INK, MUTED, PAGE_FONT, PAPER, SEQUENTIAL
from loopscope.report.figures.plot import (
    Axis,
    Band,
    Bars,
    Dots,
    Frame,
    HeatMap,
    Line,
    Mark,
    Number,
    Panel,
    Plot,
    Rule,
    Shade,
    begins_at_zero,
    log_ticks,
    packed,
    script_text,
    upright,
)

_SMALL = {"size": 11, "color": MUTED}
_CLEAR = "rgba(0,0,0,0)"
_SYMBOLS = {"bar": "line-ew"}
"""Plotly's names of symbols, where they are others than ours."""
_BORDERS = {"solid": "solid", "dot": "dotted", "dash": "dashed", "dashdot": "dashed", "longdash": "dashed"}
"""Styles of lines, for the style of a page."""
_GLYPHS = {
    "circle": "●○", "square": "■□", "diamond": "◆◇", "triangle-right": "▶▷", "triangle-up": "▲△", "triangle-left": "◀◁",
    "pentagon": "⬟⬠", "x": "✕✕", "bar": "━━", "star": "★☆",
}  # fmt: skip
"""Of symbols, filled and hollow."""
_Y_CHARACTERS = 26
"""Of a name along a y axis, for each of its lines."""
_LONG = 4_000
"""Characters of a chart's data from which it is packed."""
_TINY = 1e-3
"""Where values below it occur, tooltips write all of them with an exponent: 7.3e-6 rather than 0.00000729."""
_FIELD = re.compile(r"\{(\w+)(:[^}]*)?\}")
_SEQUENTIAL: list[str] = getattr(sequential, SEQUENTIAL)
_PLACES = {"label": "text"}
_TYPED = ("i1", "i2", "i4", "u1", "u2", "u4", "f4", "f8")
"""Kinds and bytes of the arrays that plotly reads as base64."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A panel as the page holds it."""

    key: str
    """Unique on the page."""
    anchor: str
    heading: str
    about: str
    """What it shows, in a few words."""
    height: int
    least_width: int
    picks: str
    json: Markup
    """For a script element, packed if it is long; empty where a sentence says all."""
    said: str = ""
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Of the legend that the charts of a figure share."""

    name: str
    colour: str
    line: str = ""
    """Its style, where it stands for a line."""
    glyph: str = ""
    """Of points, bars and bands."""

    @property
    def trace(self) -> str:
        """What plotly calls that which has it."""
        return escaped(self.name)


def legend(plot: Plot, *, folded: bool = False) -> list[Entry]:
    """Every name once, numbers before words: of the panels that a page shows at once, or what those that are folded
    have besides."""
    shown = _named([panel for panel in plot.panels if not panel.folded] or plot.panels)
    every = _named(plot.panels)
    found = [every[name] for name in every if name not in shown] if folded else list(shown.values())
    return sorted(found, key=lambda entry: int(entry.name) if entry.name.isdigit() else math.inf)


def _named(panels: Sequence[Panel]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for mark in (mark for panel in panels for mark in panel.marks):
        if isinstance(mark, Rule) and mark.name and not mark.above:
            entries.setdefault(mark.name, Entry(name=mark.name, colour=MUTED, line=_BORDERS[mark.dash]))
        if not isinstance(mark, Line | Band | Dots | Bars) or not mark.name or not mark.listed:
            continue
        if isinstance(mark, Line):
            found = Entry(name=mark.name, colour=mark.colour, line=_BORDERS[mark.dash])
        elif isinstance(mark, Band):
            found = Entry(name=mark.name, colour=GRID, glyph="■")
        else:
            glyph = _GLYPHS[mark.symbol][mark.hollow] if isinstance(mark, Dots) else "■"
            found = Entry(name=mark.name, colour=mark.colour, glyph=glyph)
        entries.setdefault(mark.name, found)
    return entries


def charts(plot: Plot) -> list[Chart]:
    """Of the panels that have something to show; at least one of them is not folded."""
    some = any(panel.has_data and not panel.folded for panel in plot.panels)
    several = any(panel.folded for panel in plot.panels)
    return [
        Chart(
            key=panel.anchor or "-".join(filter(None, [plot.anchor, plot.letter(panel)])),
            anchor=panel.anchor,
            heading=_lettered(plot, panel, panel.title or (panel.y.title if several else "")),
            about=_lettered(plot, panel, panel.title or panel.y.title),
            folded=panel.folded and some,
            height=panel.height,
            least_width=panel.least_width,
            picks=next((mark.picks for mark in panel.marks if isinstance(mark, HeatMap)), ""),
            json=_content(plot, panel) if panel.one_value is None else Markup(),
            said=_one_value(plot, panel),
        )
        for panel in plot.panels
        if panel.has_data
    ]


def _lettered(plot: Plot, panel: Panel, words: str) -> str:
    letter = plot.letter(panel)
    return f"({letter}) {words}".rstrip() if letter else words


def _one_value(plot: Plot, panel: Panel) -> str:
    if (value := panel.one_value) is None:
        return ""
    text = percent(value) if panel.y.percent else significant(value, 3)
    return f"{_lettered(plot, panel, panel.title or panel.y.title)}: {text} throughout."


def _content(plot: Plot, panel: Panel) -> Markup:
    text = json.dumps(plain(draw(plot, panel)), separators=(",", ":"))
    return script_text(text) if len(text) < _LONG else Markup(packed(text.encode()))


def draw(plot: Plot, panel: Panel) -> dict[str, Any]:
    """One panel as data and layout for plotly: dictionaries, since plotly's own objects take most of a page's time."""
    drawing = _Drawing(plot, panel)
    return {"data": drawing.traces, "layout": drawing.layout}


class _Drawing:
    """One chart, mark by mark."""

    def __init__(self, plot: Plot, panel: Panel) -> None:
        self._plot, self._panel = plot, panel
        # Of curves over the same x, a tooltip names all values at that x.
        together = all(isinstance(mark, Line | Band | Rule | Shade) for mark in panel.marks) and not any(
            isinstance(mark, Line) and (mark.tip or len(mark.labels)) for mark in panel.marks
        )
        self.layout = _layout("x unified" if together else "closest")
        if together:
            self.layout["xaxis"]["unifiedhovertitle"] = {"text": f"{escaped(panel.x.title)} %{{x}}"}
        self.traces: list[dict[str, Any]] = []
        self._log_x = panel.x.scale == "log"
        values = plot.values(panel)
        self._tiny = bool((np.abs(values[values != 0]) < _TINY).any())
        self._shapes: list[dict[str, Any]] = []
        self._notes: list[dict[str, Any]] = []
        for mark in panel.marks:
            self._add(mark)
        self._finish_axes()
        self.layout |= {"shapes": self._shapes or None, "annotations": self._notes or None}

    @singledispatchmethod
    def _add(self, mark: Mark) -> None:
        raise TypeError(mark)

    @_add.register
    def _(self, mark: Line) -> None:
        mode = "lines+markers" if mark.points or np.size(mark.x) == 1 else "lines"
        shared: dict[str, Any] = {"x": _array(mark.x), "mode": mode, **self._named(mark, "{y:.3g}")}
        shared["line"] = {"color": mark.colour, "width": mark.width, "dash": mark.dash}
        shared["line"]["shape"] = "hv" if mark.steps else "linear"
        self._trace("scatter", y=self._drawable(mark.y), marker={"size": 6, "color": mark.colour}, **shared)

    @_add.register
    def _(self, mark: Band) -> None:
        x, low, high = np.asarray(mark.x), self._drawable(mark.low), self._drawable(mark.high)
        there = np.isfinite(low) & np.isfinite(high)
        if not there.any():
            return
        edge: dict[str, Any] = {"x": x[there], "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        self._trace("scatter", y=low[there], **edge)
        colour = f"rgba({', '.join(str(int(MUTED[at : at + 2], 16)) for at in (1, 3, 5))}, {BAND})"
        filled = {"fill": "tonexty", "fillcolor": colour}
        self._trace("scatter", y=high[there], name=escaped(mark.name), **filled, **edge)

    @_add.register
    def _(self, mark: Dots) -> None:
        symbol = _SYMBOLS.get(mark.symbol, mark.symbol) + ("-open" if mark.hollow or mark.symbol == "bar" else "")
        shared: dict[str, Any] = {"x": _array(mark.x), "mode": "markers", **self._named(mark, "{y:.3g}")}
        shared["marker"] = {
            "symbol": symbol, "size": mark.size, "color": mark.colour, "opacity": mark.opacity,
            "line": {"width": 2 if mark.hollow or mark.symbol == "bar" else 0, "color": mark.colour},
        }  # fmt: skip
        for which, middle, low, high in (("y", mark.y, mark.low, mark.high), ("x", mark.x, mark.left, mark.right)):
            if low is not None and high is not None:
                ends = {"array": _array(high) - _array(middle), "arrayminus": _array(middle) - _array(low)}
                shared[f"error_{which}"] = {"type": "data", "symmetric": False, "width": 3, "thickness": 1.2, **ends}
        self._trace("scatter", y=self._drawable(mark.y), **shared)

    @_add.register
    def _(self, mark: Bars) -> None:
        beside = sum(isinstance(each, Bars) for each in self._panel.marks)
        self._trace(
            "bar",
            x=_array(mark.x),
            y=_array(mark.y),
            width=mark.width / beside,
            marker={"color": mark.colour},
            textposition="none",  # the labels are those of tooltips
            **self._named(mark, "{y:.3g}"),
        )

    @_add.register
    def _(self, mark: HeatMap) -> None:
        named = self._named(mark, "{z:.3g}")
        if len(mark.texts) and "text" in named:  # a cell has one text, which is what is written into it
            named["customdata"] = named.pop("text")
            named["hovertemplate"] = named["hovertemplate"].replace("%{text}", "%{customdata}")
        shown = np.asarray(mark.z, dtype=np.float32)
        steps = [(place + end) / len(mark.palette) for place in range(len(mark.palette)) for end in (0, 1)]
        low, high = (-0.5, len(mark.palette) - 0.5) if mark.palette else (mark.low, mark.high)
        self._trace(
            "heatmap",
            z=shown,
            x=_array(mark.x),
            y=np.arange(len(shown)),
            zmin=low,
            zmax=high,
            colorscale=[[at, mark.palette[place // 2]] for place, at in enumerate(steps)]
            or [[place / (len(_SEQUENTIAL) - 1), colour] for place, colour in enumerate(_SEQUENTIAL)],
            showscale=bool(mark.bar),
            colorbar=_bar(mark, above=self._bar_above(mark)),
            xgap=2 if mark.gaps else 0,
            ygap=2 if mark.gaps else 0,
            **named,
        )
        if len(mark.pairs):
            self.traces[-1]["meta"] = _texts(mark.pairs)  # of which the page makes the texts
        if len(mark.texts):
            texts = [[escaped(words) for words in row] for row in mark.texts]
            self.traces[-1] |= {"text": texts, "texttemplate": "%{text}", "textfont": {"size": 11.5}}
        for which, places in (("x", mark.parted_x), ("y", mark.parted_y)):
            for place in places:
                self._across(which, place, {"color": PAPER, "width": 1.5})

    @_add.register
    def _(self, mark: Rule) -> None:
        line = {"color": MUTED, "width": 1.25 if mark.name else 0.75, "dash": mark.dash}
        if mark.x is not None:
            self._across("x", mark.x, line)
            if mark.above:
                self._note_above(math.log10(mark.x) if self._log_x else mark.x, mark.name)
                return
        if mark.y is not None:
            ends = self._panel.x.span or self._reach()
            tip = f"{escaped(mark.name)}: %{{y:.2g}}<extra></extra>"
            named = {"name": escaped(mark.name), "hovertemplate": tip}
            self._trace("scatter", x=list(ends), y=[mark.y] * 2, mode="lines", line=line, **named)

    @_add.register
    def _(self, mark: Shade) -> None:
        corners = {"x0": mark.start, "x1": mark.end, "y0": 0, "y1": 1, "yref": "y domain"}
        self._shapes.append(
            {"type": "rect", "fillcolor": GRID, "opacity": 0.45, "line": {"width": 0}, "layer": "below", **corners}
        )
        self._note_above((mark.start + mark.end) / 2, mark.name)

    @_add.register
    def _(self, mark: Frame) -> None:
        corners = {"x0": mark.x - 0.47, "x1": mark.x + 0.47, "y0": mark.y - 0.47, "y1": mark.y + 0.47}
        self._shapes.append({"type": "rect", "line": {"color": EMPHASIS, "width": 2.5}, **corners})

    def _trace(self, kind: str, **properties: Any) -> None:
        self.traces.append({"type": kind, **properties})

    def _bar_above(self, mark: Mark) -> bool:
        """Of a high map, as its middle may be out of sight; and of one that needs all the width for its texts."""
        return isinstance(mark, HeatMap) and bool(mark.bar) and (self._panel.height > 700 or len(mark.texts) > 0)

    def _named(self, mark: Any, value: str) -> dict[str, Any]:
        """Name, and what the tooltips say."""
        called = escaped(self._plot.called(mark))
        what = "{label}" if len(mark.labels) else "" if self.layout["hovermode"] == "x unified" else "{x}"
        if isinstance(mark, Line | Dots | Bars):
            value = value.replace(".3g", ".1%" if self._panel.y.percent else ".1e" if self._tiny else ".3g")
        plain = f"{', '.join(filter(None, [called, what]))}: {value}" if called or what else value
        named: dict[str, Any] = {
            "name": escaped(mark.name),
            "hovertemplate": _template(html.escape(mark.tip, quote=False) or plain) + "<extra></extra>",
        }
        if len(mark.labels):
            named["text"] = _texts(mark.labels)
        if mark.data is not None:
            named["customdata"] = mark.data
        return named

    def _drawable(self, values: Any) -> NDArray[np.float32]:
        """On a logarithmic axis, gaps instead of a fall to minus infinity."""
        shown = _array(values)
        with np.errstate(invalid="ignore"):
            return np.where(shown > 0, shown, np.float32("nan")) if self._plot.logarithmic(self._panel) else shown

    def _reach(self) -> tuple[Number, Number]:
        """Of what is drawn, along x."""
        found = [np.asarray(mark.x, dtype=np.float64) for mark in self._panel.marks if isinstance(mark, Line | Dots)]
        joined = np.concatenate(found or [np.zeros(1)])
        return float(np.nanmin(joined)), float(np.nanmax(joined))

    def _across(self, which: str, place: Number, line: Mapping[str, Any]) -> None:
        """A line from edge to edge; plotly's own `add_vline` looks through everything that the figure has."""
        other = "y" if which == "x" else "x"
        ends = {
            f"{which}0": place,
            f"{which}1": place,
            f"{other}0": 0,
            f"{other}1": 1,
            f"{other}ref": f"{other} domain",
        }
        self._shapes.append({"type": "line", "line": dict(line), **ends})

    def _note_above(self, place: Number, words: str) -> None:
        spot = {"x": place, "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False}
        self._notes.append({"text": escaped(words), "font": _SMALL, **spot})

    def _finish_axes(self) -> None:
        panel, x, y = self._panel, self.layout["xaxis"], self.layout["yaxis"]
        is_map = any(isinstance(mark, HeatMap) for mark in panel.marks)
        for which, axis, drawn in (("x", panel.x, x), ("y", panel.y, y)):
            update = _axis(axis, grid=which == "y" and not is_map)
            if which == "y":
                update["title"]["text"] = "<br>".join(map(escaped, textwrap.wrap(axis.title, _Y_CHARACTERS)))
            if which == "y" and not is_map:
                update |= self._values_axis(axis)
            drawn.update(update)
        if is_map and panel.y.span is None:
            y["autorange"] = "reversed"
        if any(map(self._bar_above, panel.marks)):
            # Plotly forgets the labels of a map when it makes room for such a bar, and would write across them.
            names = panel.x.ticks.values() if isinstance(panel.x.ticks, Mapping) else [""]
            x["title"]["standoff"] = 16 + 15 * max(name.count("\n") + 1 for name in names)
        if panel.equal:
            y["scaleanchor"] = "x"
            if is_map:
                x["constrain"] = y["constrain"] = "domain"
        if is_map and panel.y.ticks:
            y["ticks"] = ""
        if is_map and panel.x.ticks:
            x |= {"ticks": "", "tickangle": -90 if upright(panel) else None}

    def _values_axis(self, axis: Axis) -> dict[str, Any]:
        values = self._plot.values(self._panel)
        if self._plot.logarithmic(self._panel):
            positive = values[values > 0]
            if axis.span is None and not positive.size:
                return {"type": "log", "dtick": 1}
            margin = (positive.max() / positive.min()) ** 0.05 if axis.span is None else 1.0
            low, high = axis.span or (float(positive.min() / margin), float(positive.max() * margin))
            ticks = log_ticks(low, high)
            texts = {"tickvals": list(ticks), "ticktext": list(ticks.values())} if ticks else {}
            return {"type": "log", "range": [math.log10(low), math.log10(high)], **texts}
        return {"rangemode": "tozero"} if axis.span is None and begins_at_zero(axis, values) else {}


def _axis(axis: Axis, *, grid: bool) -> dict[str, Any]:
    """What both axes of a panel may ask for."""
    log = axis.scale == "log"
    update: dict[str, Any] = {"title": {"text": escaped(axis.title), "standoff": 8, "font": {"size": 13}}}
    update["showgrid"] = grid if axis.grid is None else axis.grid
    if log:
        update["type"] = "log"
    if axis.percent:
        update["tickformat"] = ".2~p" if axis.span is None else ".0%"
    if axis.span is not None:
        update["range"] = [math.log10(end) for end in axis.span] if log else list(axis.span)
    if isinstance(axis.ticks, Mapping) and axis.ticks:
        update |= {"tickvals": list(axis.ticks), "ticktext": [escaped(name) for name in axis.ticks.values()]}
    elif len(axis.ticks):
        update |= {"tickvals": list(axis.ticks), "ticktext": [f"{tick:g}" for tick in axis.ticks]}
    return update


def _bar(mark: HeatMap, *, above: bool) -> dict[str, Any]:
    """What the colours mean: beside or above a map."""
    ticks = {"tickvals": list(mark.bar_ticks), "ticktext": list(mark.bar_ticks.values())} if mark.bar_ticks else {}
    place = {"orientation": "h", "y": 1.0, "yref": "paper", "yanchor": "bottom", "xpad": 0} if above else {"len": 0.9}
    title = {"text": escaped(mark.bar), "side": "top" if above else "right", "font": {"size": 12}}
    return {"title": title, "thickness": 12, "outlinewidth": 0, **place, **ticks}


def _template(tip: str) -> str:
    """A tip as plotly writes it."""

    def field(found: re.Match[str]) -> str:
        name, form = found.group(1), found.group(2) or ""
        return f"%{{{f'customdata[{name}]' if name.isdigit() else _PLACES.get(name, name)}{form}}}"

    return _FIELD.sub(field, tip.replace("\n", "<br>"))


def _array(values: Any) -> NDArray[np.float32]:
    """Half the size of doubles, and still finer than a pixel."""
    return np.asarray(values, dtype=np.float32)


def plain(value: Any) -> Any:
    """For JSON: numbers of arrays as plotly's typed arrays, what is not finite elsewhere as null, without what is None
    in a dictionary."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items() if each is not None}
    if isinstance(value, np.ndarray):
        if value.dtype == np.int64 and value.size:  # the narrowest that holds them all
            value = value.astype(np.min_scalar_type(-1 - max(int(value.max()), -1 - int(value.min()))))
        if value.size and (kind := f"{value.dtype.kind}{value.dtype.itemsize}") in _TYPED:
            coded = base64.b64encode(value.tobytes()).decode()
            shape = {"shape": ", ".join(map(str, value.shape))} if value.ndim > 1 else {}
            return {"dtype": kind, "bdata": coded, **shape}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def escaped(words: str) -> str:
    """For plotly, which reads a little HTML, and templates."""
    return html.escape(words, quote=False).replace("\n", "<br>").replace("{", "&#123;")


def _texts(words: Any) -> Any:
    return escaped(words) if isinstance(words, str) else [_texts(each) for each in words]


def _layout(hovermode: str) -> dict[str, Any]:
    """What all charts share."""
    axis = {
        "gridcolor": GRID,
        "linecolor": AXIS,
        "zeroline": False,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": AXIS,
        "tickfont": {"size": 12},
        "automargin": True,
        "exponentformat": "power",
    }
    return {
        "font": {"family": PAGE_FONT, "size": 12.5, "color": INK},
        "paper_bgcolor": _CLEAR,
        "plot_bgcolor": _CLEAR,
        "margin": {"l": 8, "r": 12, "t": 18, "b": 8},
        "xaxis": dict(axis),
        "yaxis": dict(axis),
        "showlegend": False,
        "hovermode": hovermode,
        # Plotly would take the border's colour for the text, and transparent paper for black.
        "hoverlabel": {"bgcolor": PAPER, "bordercolor": AXIS, "font": {"family": PAGE_FONT, "size": 12, "color": INK}},
        "modebar": {"bgcolor": PAPER, "color": MUTED, "activecolor": INK},
    }
