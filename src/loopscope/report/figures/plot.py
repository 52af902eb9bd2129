"""A figure as data: what it asks, how to read it, and what is on its panels.

`in_plotly` draws it for a page, `in_matplotlib` for a paper. Texts are plain: each of the two escapes what it would
read as markup.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from string import ascii_lowercase
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from loopscope.answers.comparison.result import Comparison
from loopscope.report.figures.look import Symbol, decade, decade_ticks, number
from loopscope.report.settings import ReportSettings
from loopscope.study import StudyView

Number = float | int
Values = Sequence[Number] | NDArray[Any]
Dash = Literal["solid", "dot", "dash", "dashdot", "longdash"]
Scale = Literal["auto", "linear", "log", "free"]

_LINEAR = 5.0
"""Values within this factor are compared by eye on a linear axis; beyond it the small ones lie on top of each other."""
_CLOSE = 4.0
"""Values within this factor get an axis that does not begin at 0: their differences are then the matter."""
_DIGITS = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%:()*+-;,=.?@^_`{|}~"


@dataclass(frozen=True, kw_only=True)
class Named:
    """What a mark is called, and what the page's tooltips say of its points."""

    name: str = ""
    """In the legend, and in tooltips after the legend's title where it is a number."""
    listed: bool = True
    """In the legend."""
    explained: bool = False
    """The reading says what it is, so that a legend without room may leave it out."""
    tip: str = ""
    """Of a point, such as `{label}: {y:.3f}`: `{label}`, `{x}`, `{y}`, `{z}`, and `{0}`, `{1}` of `data`, each with a
    number format; what it is called and its value unless given."""
    labels: Sequence[Any] = ()
    """Of each point, for `{label}`; of a map a list for each row."""
    data: Any = None
    """Further numbers of each point, in the last dimension."""


@dataclass(frozen=True, kw_only=True)
class Line(Named):
    """Values over x, with gaps where they are NaN."""

    x: Values
    y: Values
    z: Values | None = None
    """In space: the height over x and y."""
    colour: str
    dash: Dash = "solid"
    width: Number = 2
    """CSS pixels; on paper in proportion."""
    points: bool = False
    """A marker at each value."""
    steps: bool = False
    """Level until the next value."""


@dataclass(frozen=True, kw_only=True)
class Band(Named):
    """Grey between two edges."""

    x: Values
    low: Values
    high: Values


@dataclass(frozen=True, kw_only=True)
class Dots(Named):
    """Points, with whiskers where there are ends of them."""

    x: Values
    y: Values
    z: Values | None = None
    low: Values | None = None
    high: Values | None = None
    """Ends of whiskers up and down."""
    left: Values | None = None
    right: Values | None = None
    """Ends of whiskers to the sides."""
    colour: str
    symbol: Symbol = "circle"
    hollow: bool = False
    size: Number = 9
    """CSS pixels."""
    opacity: Number = 1.0


@dataclass(frozen=True, kw_only=True)
class Bars(Named):
    """A bar for each x."""

    x: Values
    y: Values
    width: Number = 0.8
    colour: str


@dataclass(frozen=True, kw_only=True)
class HeatMap(Named):
    """Colours of a matrix, whose rows lie at y = 0, 1, ... and whose columns at `x`."""

    z: NDArray[Any]
    x: Values
    bar: str
    """What the colours are; without it there is no bar."""
    low: Number | None = None
    high: Number | None = None
    """Of the colours; of the values unless given."""
    bar_ticks: Mapping[Number, str] = dataclasses.field(default_factory=dict)
    palette: Sequence[str] = ()
    """Of values that are places in it, rather than a range of colours."""
    texts: Sequence[Sequence[str]] = ()
    """Written into the cells."""
    pairs: Sequence[str] = ()
    """Names of rows and columns alike, of which a cell's label has two: a page of a thousand visits would else hold a
    million labels."""
    parted_x: Sequence[Number] = ()
    parted_y: Sequence[Number] = ()
    """Where white lines part columns and rows."""
    gaps: bool = False
    """White between all cells."""
    picks: str = ""
    """The stage of whose heads a click picks one: `data` begin with layer and head."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A line from edge to edge, at an x or at a y, which counts as a value of its axis."""

    x: Number | None = None
    y: Number | None = None
    name: str = ""
    dash: Dash = "dash"
    above: bool = False
    """Its name stands above the panel rather than in the legend."""


@dataclass(frozen=True, kw_only=True)
class Shade:
    """A stage: grey from one x to another."""

    start: Number
    end: Number
    name: str


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Around a cell of a map, by the place of its column and of its row."""

    x: Number
    y: Number


Mark = Line | Band | Dots | Bars | HeatMap | Rule | Shade | Frame


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What is on an axis, and how its values are spaced."""

    title: str
    scale: Scale = "free"
    """`auto`: logarithmic for values that span more than a factor of 5, else linear; a linear axis begins at 0 unless
    all values lie within a factor of 2. `free` is linear and begins anywhere."""
    percent: bool = False
    """Shares of 1, named in percent."""
    span: tuple[Number, Number] | None = None
    """From its left or lower end to the other; the larger number may come first."""
    ticks: Mapping[Number, str] | Sequence[Number] = ()
    """Where only some values are named."""
    whole: bool = False
    """Of whole numbers, between which there are no ticks."""
    grid: bool | None = None
    """Whether it has lines; those of y do unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes, or three of a panel in space."""

    x: Axis
    y: Axis
    z: Axis | None = None
    marks: Sequence[Mark]
    title: str = ""
    anchor: str = ""
    """Of this panel on the page, where something links to it."""
    height: int = 260
    """CSS pixels on the page; on paper, what is above that of an ordinary panel makes it higher in proportion."""
    least_width: int = 0
    """CSS pixels that its texts take on the page, which scrolls where the window is narrower."""
    equal: bool = False
    """Whether one unit, or one cell, is as long on both axes."""
    folded: bool = False
    """Whether a page shows it when it is asked for: another panel shows nearly the same."""

    @property
    def has_data(self) -> bool:
        """Whether there is a finite number to draw."""
        return any(
            bool(np.isfinite(np.asarray(mark.z if isinstance(mark, HeatMap) else mark.y, dtype=np.float64)).any())
            for mark in self.marks
            if isinstance(mark, Line | Dots | Bars | HeatMap)
        )

    @property
    def one_value(self) -> float | None:
        """That of all its lines and bands, where they have but one."""
        if any(isinstance(mark, Dots | Bars | HeatMap) for mark in self.marks):
            return None
        curves = [mark.y for mark in self.marks if isinstance(mark, Line)]
        edges = [edge for mark in self.marks if isinstance(mark, Band) for edge in (mark.low, mark.high)]
        joined = np.concatenate([np.empty(0), *(np.asarray(each, dtype=np.float64) for each in (*curves, *edges))])
        values = np.unique(joined[np.isfinite(joined)])
        return float(values[0]) if len(values) == 1 else None


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure of a page and of a paper. What its type says of it (name, anchor and so on) is filled in by the type."""

    template: ClassVar[str] = "plot.html"

    question: str
    """What it asks or shows, in a sentence."""
    reading: str
    """How to read it: sentences that are true of the study from which it was drawn."""
    lines: Sequence[str] = ()
    """Sentences on its lines, bands and marks, which several figures may share: a page says them once a section."""
    panels: Sequence[Panel]
    legend: str = ""
    """Title of the legend, where its entries are numbers."""
    columns: int = 0
    """Panels beside each other on paper; as many as there is room for unless given."""
    same_y: bool = False
    """Whether all panels have the same y axis."""
    name: str = ""
    """Of its files."""
    anchor: str = ""
    """On a page, to which answers link; without one it is drawn for papers alone."""
    variables: tuple[str, ...] = ()
    """From which it is drawn."""
    paper: tuple[int, ...] = ()
    """Figures of arXiv 2604.11791 that show the same, by what its running text says of them."""
    folded: bool = False
    """Whether a page shows it when it is asked for."""

    @property
    def has_data(self) -> bool:
        return any(panel.has_data for panel in self.panels)

    def letter(self, panel: Panel) -> str:
        """Of one among several panels, by which the reading calls it; of more than there are letters none has one."""
        place = next(place for place, each in enumerate(self.panels) if each is panel)
        return ascii_lowercase[place] if 1 < len(self.panels) <= len(ascii_lowercase) else ""

    def called(self, mark: Named) -> str:
        """What a tooltip calls a line: `layer 3`, where the legend has a title and the number."""
        return f"{self.legend} {mark.name}" if self.legend and mark.name.isdigit() else mark.name

    def logarithmic(self, panel: Panel) -> bool:
        """Whether the y axis of a panel is logarithmic."""
        return is_logarithmic(panel.y, self.values(panel, decisive=True))

    def values(self, panel: Panel, *, decisive: bool = False) -> NDArray[np.float64]:
        """The finite y values on a panel, or on all of them where they share the axis; those that decide about its
        scale are without bands and whiskers."""
        marks = [mark for each in (self.panels if self.same_y else [panel]) for mark in each.marks]
        found: list[Any] = [np.empty(0)]
        for mark in marks:
            if isinstance(mark, Line | Dots | Bars):
                found.append(mark.y)
            if isinstance(mark, Rule) and mark.y is not None:
                found.append([mark.y])
            if isinstance(mark, Band | Dots) and not decisive:
                found += [edge for edge in (mark.low, mark.high) if edge is not None]
        joined: NDArray[np.float64] = np.concatenate([np.asarray(each, dtype=np.float64).ravel() for each in found])
        return joined[np.isfinite(joined)]


def is_logarithmic(axis: Axis, values: NDArray[np.float64]) -> bool:
    """Whether values are drawn on a logarithm."""
    positive = values[values > 0]
    if axis.scale == "auto":
        return bool(positive.size) and float(positive.max() / positive.min()) > _LINEAR
    return axis.scale == "log"


def begins_at_zero(axis: Axis, values: NDArray[np.float64]) -> bool:
    """Of a linear axis."""
    if axis.scale == "free" or not values.size:
        return False
    return bool(0 <= values.min() < values.max() / _CLOSE) or not values.any()


def upright(panel: Panel) -> bool:
    """Whether the names of a map's columns have room only along them."""
    ticks = panel.x.ticks
    return panel.equal and isinstance(ticks, Mapping) and len(ticks) > 6 and max(map(len, ticks.values())) > 3


def log_ticks(low: float, high: float) -> dict[float, str]:
    """From `low` to `high`: within a decade 1, 2, 3, 4, 5 and 7, within two 1, 2 and 5, beyond that powers of ten."""
    if high / low > 100:
        return {10.0**power: decade(power) for power in decade_ticks(math.log10(low), math.log10(high))}
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if high / low > 10 else (1, 2, 3, 4, 5, 7)
    ticks = [digit * 10.0**power for power in powers for digit in digits]
    return {tick: number(tick) for tick in ticks if low <= tick <= high}


@runtime_checkable
class Drawn(Protocol):
    """What a section of a page holds: plots, and what has a template of its own."""

    @property
    def anchor(self) -> str:
        """Unique on the page; answers link to it."""

    @property
    def has_data(self) -> bool:
        """Whether there is anything to draw."""

    @property
    def template(self) -> str:
        """Of `report/page/templates`; it is given this object as `figure`."""

    @property
    def folded(self) -> bool:
        """Whether it is shown when it is asked for."""


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """What a page says where a figure would show one value."""

    template: ClassVar[str] = "sentence.html"
    folded: ClassVar[bool] = False
    has_data: ClassVar[bool] = True

    name: str
    anchor: str
    """Those of the figure."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """Figures that answer one question together."""

    anchor: str
    short: str
    """Its name in the table of contents."""
    title: str
    lead: str
    columns: Literal[2, 3] = 2
    """Figures beside each other, where the window is wide enough."""
    figures: Sequence[Drawn] = ()

    @property
    def anchors(self) -> set[str]:
        """Its own, and those of its figures and of their panels."""
        panels = [panel for figure in self.figures if isinstance(figure, Plot) for panel in figure.panels]
        return {
            self.anchor,
            *(figure.anchor for figure in self.figures),
            *filter(None, (panel.anchor for panel in panels)),
        }


S = TypeVar("S", StudyView, Comparison)
"""What a figure is drawn from."""


def never(_: Any) -> str | None:
    """No other reason than missing variables."""
    return None


@dataclass(frozen=True)
class FigureType(Generic[S]):
    """A type of figure: what it needs, and how it is drawn."""

    name: str
    """Of its files."""
    of: Callable[[S, ReportSettings], Plot]
    variables: tuple[str, ...]
    """Of the study or the comparison, from which it is drawn."""
    _: KW_ONLY
    anchor: str = ""
    """On a page; its name unless given."""
    for_paper: bool = False
    """Whether it is drawn for papers alone."""
    one_is_enough: bool = False
    """Whether it is drawn where the study has but one of the variables."""
    loops: bool = True
    """Whether it is about recurrences, which a feed-forward model does not have."""
    unless: Callable[[S], str | None] = never
    """Another reason for which it cannot be drawn."""
    said: Callable[[S], str | None] = never
    """Of a figure that would show one value, the sentence that a page has instead."""
    folded: bool = False
    """Whether a page shows it when it is asked for: it says in more detail what others say."""
    paper: tuple[int, ...] = ()
    """Figures of arXiv 2604.11791 that show the same, by what its running text says of them."""

    def draw(self, source: S, settings: ReportSettings) -> Plot:
        """Raises `StudyError` for a study without what it is drawn from."""
        found = self.of(source, settings)
        return dataclasses.replace(
            found,
            name=self.name,
            anchor="" if self.for_paper else self.anchor or self.name,
            variables=self.variables,
            paper=self.paper,
            folded=self.folded or found.folded,
        )

    def absent(self, source: S) -> str | None:
        """Why it cannot be drawn; None if it can."""
        if isinstance(source, StudyView):
            if self.loops and not source.looped:
                return "a feed-forward model has no recurrences"
            reasons = [source.why_absent(variable) for variable in self.variables]
            lacking = [reason for reason in reasons if reason]
            if lacking and (len(lacking) == len(reasons) or not self.one_is_enough):
                return lacking[0]
        return self.unless(source)


def on_page(types: Sequence[FigureType[S]], source: S, settings: ReportSettings) -> list[Plot | Sentence]:
    """Those for a page that can be drawn and have something to show."""
    found: list[Plot | Sentence] = []
    for each in types:
        if each.for_paper or each.absent(source) is not None:
            continue
        said, anchor = each.said(source), each.anchor or each.name
        shown = each.draw(source, settings) if said is None else Sentence(name=each.name, anchor=anchor, text=said)
        found += [shown] if shown.has_data else []
    return found


def script_json(value: Any) -> Markup:
    """A value as JSON for a script element, safe as the plots are."""
    return script_text(json.dumps(value, allow_nan=False))


def script_text(text: str) -> Markup:
    """JSON for a script element: no character in it can end the element, or start another."""
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def packed(content: bytes) -> str:
    """Compressed (zlib), as base85, which is 6 % shorter than base64: what `unpacked` in common.js takes apart. The
    digits are those of Python's `b85encode`, which is slow, but for the three that mean something in HTML."""
    found = zlib.compress(content)
    missing = -len(found) % 4
    words = np.frombuffer(found + bytes(missing), dtype=">u4").astype(np.uint32)
    digits = words[:, None] // 85 ** np.arange(4, -1, -1, dtype=np.uint32) % 85
    text: str = np.frombuffer(_DIGITS, dtype="S1")[digits].tobytes().decode()
    return text[: len(text) - missing]
