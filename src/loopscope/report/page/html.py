"""From values to one HTML file that needs nothing else: template, style, scripts and their hashes."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from loopscope._util.table import Table
from loopscope._util.wording import significant
from loopscope.answers.answer import Answer, Outcome
from loopscope.report.figures.in_plotly import charts, legend
from loopscope.report.figures.plot import Plot, Section, packed

_PLOTLY_OPTIONS: dict[str, Any] = {
    "responsive": True,
    "displaylogo": False,
    "scrollZoom": False,
    # The share button would upload the data of a plot. Plotly names it after either action, by version.
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "modeBarButtonsToRemove": ["sendChartToCloud", "sendDataToCloud", "select2d", "lasso2d", "autoScale2d"],
}

_SCRIPTS = ("common.js", "page.js", "draw.js", "maps.js", "behaviour.js")
"""The first is for the others, each of which does nothing on a page that has none of its figures."""

_MARKS = {
    Outcome.YES: "✓",
    Outcome.NO: "✕",
    Outcome.PARTLY: "±",
    Outcome.NOT_YET: "…",
    Outcome.CANNOT_TELL: "?",
    Outcome.NOT_APPLICABLE: "–",
}


def render_template(
    name: str,
    *,
    answers: Sequence[Answer],
    sections: Sequence[Section],
    tables: Sequence[Table] = (),
    groups: Sequence[tuple[str, Sequence[Answer]]] | None = None,
    first: Plot | None = None,
    **values: Any,
) -> str:
    """A template of `report/templates`, rendered with `values` and all that every page has.

    The first of the `answers` stands above the others, with the figure `first` and the sentence `beside`; the others in
    their `groups`, or in one without a name. An answer is linked to the figure or the table that it names where that is
    in the `sections` or among the `tables`.

    Every text is escaped by the template. A content security policy lets the browser run the page's own scripts
    and plotly alone, known by their hashes, and load nothing.
    """
    scripts = [*map(_static, _SCRIPTS)]
    said_if_known = {"beside": "", "command": "", "created": "", "version": ""}
    template = _environment().get_template(name)
    return template.render(
        **said_if_known | values,
        answers=answers,
        sections=sections,
        tables=tables,
        anchors={"limits"}.union(*(section.anchors for section in sections), (table.anchor for table in tables)),
        groups=groups or [("", answers[1:])],
        first=first,
        marks=_MARKS,
        style=Markup(_static("report.css")),
        scripts=[Markup(script) for script in scripts],
        options=Markup(json.dumps(_PLOTLY_OPTIONS)),
        plotly=Markup(_plotly()),
        script_hashes=[_hash(script) for script in (*scripts, get_plotlyjs())],
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("loopscope.report.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"charts": charts, "legend": legend}
    environment.filters["number"] = _number
    environment.filters["tied"] = _tied
    return environment


@cache
def _plotly() -> str:
    """All of plotly as its Python package holds it, so that the two are of one version. Compressed it takes less than
    a page of a smaller bundle that is not, and nothing has to be kept in the repository."""
    return packed(get_plotlyjs().encode())


def _tied(text: str) -> str:
    """A percent sign stays on the line of its number."""
    return text.replace(" %", "\u00a0%")


def _number(value: float | str) -> str:
    """Evidence as text: whole numbers whole, others to three digits."""
    if isinstance(value, str):
        return value
    if math.isfinite(value) and value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    return significant(value, 3) if math.isfinite(value) else "not defined"


def _static(name: str) -> str:
    return files("loopscope.report.page").joinpath("templates", name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
