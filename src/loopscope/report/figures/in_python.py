"""Figures of a study in a notebook: `study.plot.<name>()`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from loopscope.errors import StudyError
from loopscope.report.figures.in_plotly import draw, escaped, plain
from loopscope.report.figures.plot import FigureType, Plot
from loopscope.report.figures.write import STUDY_FIGURES, draw_figure
from loopscope.report.settings import ReportSettings
from loopscope.study import Study, StudyView, view_study

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_COLUMNS = 2
_BETWEEN = 90
"""CSS pixels between two panels, for the upper one's x axis and the lower one's title."""


class StudyPlots:
    """The figures of one study as methods: `study.plot.loss()` is interactive, `study.plot.loss(matplotlib=True)` one
    for a paper. A figure is called as its file (`distance-by-layer`) or as its place in the report (`distance`), with
    underscores; `dir(study.plot)` lists those that can be drawn."""

    def __init__(self, study: Study) -> None:
        self._study, self._view = study, view_study(study)

    def __dir__(self) -> list[str]:
        return sorted(name for name, each in _FIGURES.items() if each.absent(self._view) is None)

    def __repr__(self) -> str:
        return f"<Figures of {self._study!r}: {', '.join(dir(self))}>"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in _FIGURES:
            close = difflib.get_close_matches(name, _FIGURES, n=1)
            raise AttributeError(
                f"There is no figure {name!r}; " + (f"did you mean {close[0]}?" if close else "see dir(study.plot).")
            )
        return partial(self._draw, _FIGURES[name])

    def _draw(
        self, figure: FigureType[StudyView], *, matplotlib: bool = False, settings: ReportSettings | None = None
    ) -> Any:
        """Raises `StudyError` where it cannot be drawn."""
        if matplotlib:
            return draw_figure(self._study, figure.name, settings=settings)
        if reason := figure.absent(self._view):
            raise StudyError(f"The figure {figure.name} cannot be drawn: {reason}.")
        return interactive(figure.draw(self._view, settings or ReportSettings()))


_FIGURES: dict[str, FigureType[StudyView]] = {
    name.replace("-", "_"): each for each in STUDY_FIGURES for name in (each.anchor, each.name) if name
}


def interactive(plot: Plot) -> Figure:
    """All panels of a figure as one of plotly's, with the question as its title.

    A legend entry switches the lines of one name in all panels. Imports plotly's objects, which takes half a second.
    """
    from plotly.graph_objects import Figure  # noqa: PLC0415 - see above

    panels = [panel for panel in plot.panels if panel.has_data]
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns) if panels else 0
    heights = [max(panel.height for panel in panels[row * columns : (row + 1) * columns]) for row in range(rows)]
    whole = sum(heights) + _BETWEEN * (rows - 1)
    layout: dict[str, Any] = {"shapes": [], "annotations": []}
    traces: list[dict[str, Any]] = []
    named: set[str] = set()
    for place, panel in enumerate(panels):
        row, column = divmod(place, columns)
        number = "" if place == 0 else str(place + 1)
        top = 1 - (sum(heights[:row]) + _BETWEEN * row) / whole
        across = _span(column, columns), (top - heights[row] / whole, top)
        found = draw(plot, panel)
        for trace in found["data"]:
            name = trace.get("name", "")
            shown = bool(name) and trace["type"] != "heatmap" and name not in named
            named.add(name)
            trace |= {"xaxis": f"x{number}", "yaxis": f"y{number}", "legendgroup": name, "showlegend": shown}
            if labels := trace.get("meta"):  # which a page puts together itself
                trace["text"] = [[f"{one}<br>{other}" for other in labels] for one in labels]
            if "colorbar" in trace:
                trace["colorbar"] |= {"x": across[0][1], "xanchor": "left", "y": sum(across[1]) / 2, "yref": "paper"}
                trace["colorbar"] |= {"len": (across[1][1] - across[1][0]), "orientation": "v", "yanchor": "middle"}
            traces.append(trace)
        own = found["layout"]
        for axis, other, domain in (("x", "y", across[0]), ("y", "x", across[1])):
            layout[f"{axis}axis{number}"] = own.pop(f"{axis}axis") | {"domain": domain, "anchor": f"{other}{number}"}
        for kind in ("shapes", "annotations"):
            layout[kind] += [_moved(each, number, across) for each in own.pop(kind) or ()]
        if title := " ".join(filter(None, [plot.letter(panel) and f"({plot.letter(panel)})", panel.title])):
            layout["annotations"].append(_title(title, across))
        layout = own | layout
    layout |= {
        "title": {"text": escaped(plot.question), "x": 0, "xref": "paper", "yref": "container", "y": 0.99},
        "height": whole + 130,
        "margin": {"l": 60, "r": 30, "t": 80, "b": 50},
        "showlegend": len(named - {""}) > 1,
        "legend": {"title": {"text": escaped(plot.legend)}, "tracegroupgap": 0},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
    }
    return Figure(plain({"data": traces, "layout": layout}))


_Place = tuple[tuple[float, float], tuple[float, float]]
"""From where to where a panel reaches, across and up, as shares of the figure."""


def _span(column: int, columns: int) -> tuple[float, float]:
    """With room for the next panel's y axis and for a colour bar."""
    return column / columns + (0.04 if column else 0), (column + 1) / columns - (0.09 if columns > 1 else 0)


def _moved(each: dict[str, Any], number: str, place: _Place) -> dict[str, Any]:
    """A shape or note on the axes of another panel than the first."""
    moved = dict(each)
    for axis, (low, high) in zip("xy", place, strict=True):
        reference = moved.get(f"{axis}ref", axis)
        if reference == "paper":
            moved[axis] = low + (high - low) * moved[axis]
        else:
            moved[f"{axis}ref"] = reference.replace(axis, f"{axis}{number}", 1)
    return moved


def _title(words: str, place: _Place) -> dict[str, Any]:
    spot: dict[str, Any] = {"x": place[0][0], "y": place[1][1], "xref": "paper", "yref": "paper", "xanchor": "left"}
    return spot | {"yanchor": "bottom", "text": f"<b>{escaped(words)}</b>", "showarrow": False, "yshift": 18}
