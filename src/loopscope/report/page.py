"""The page: answers first, then the figures, then where it all comes from."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from loopscope.answers import Answer, Outcome, quick_answers
from loopscope.answers.wording import significant
from loopscope.report.convergence import convergence_section
from loopscope.report.facts import header_facts, provenance, thresholds
from loopscope.report.figure import Section
from loopscope.report.heads import heads_section
from loopscope.report.material import Material, gather_material
from loopscope.report.norms import norms_section
from loopscope.report.readout import readout_section
from loopscope.report.settings import ReportSettings
from loopscope.report.similarity import similarity_section
from loopscope.report.stages import stages_section
from loopscope.report.tokens import tokens_section
from loopscope.report.trajectories import trajectories_section
from loopscope.study import Study

__all__ = ["render_page"]

_PLOTLY_OPTIONS: dict[str, Any] = {
    "responsive": True,
    "displaylogo": False,
    "scrollZoom": False,
    # The share button would upload the data of a plot. Plotly names it after either action, by version.
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "modeBarButtonsToRemove": ["sendChartToCloud", "sendDataToCloud", "select2d", "lasso2d", "autoScale2d"],
}

_DECISIVE: dict[str, tuple[str, Callable[[float], str]]] = {
    "drift_between_horizons": ("Drift from H to 2H", significant),
    "relative_step_at_second_horizon": ("Relative step at 2H", significant),
    "norm_growth_between_horizons": ("Norm at 2H over norm at H", "{:.3f}".format),
    "rounding_floor": ("Rounding floor", significant),
}
_MOST_LAYER_ROWS = 4
"""Of layers that each do something else; the figures show all of them."""

_MARKS = {
    Outcome.YES: "✓",
    Outcome.NO: "✕",
    Outcome.PARTLY: "±",
    Outcome.CANNOT_TELL: "?",
    Outcome.NOT_APPLICABLE: "–",
}


def render_page(study: Study, settings: ReportSettings) -> str:
    """The whole report as HTML.

    Every text is escaped by the template. A content security policy lets the browser run the page's own two scripts
    alone, known by their hashes, and load nothing.
    """
    material = gather_material(study, settings)
    answers = quick_answers(study, settings.criterion)
    sections = _sections(material)
    plotly, draw = get_plotlyjs(), _static("draw.js")
    environment = Environment(
        loader=PackageLoader("loopscope.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["tied"] = _tied
    return environment.get_template("report.html").render(
        model=str(study.manifest["model"]["name"]),
        created=str(study.manifest.get("created", ""))[:16].replace("T", " "),  # to the minute
        version=str(study.manifest.get("versions", {}).get("loopscope", "")),
        facts=header_facts(study, material),
        answers=answers,
        highlights=_highlights(answers[0]),
        limits=_limits(answers),
        marks=_MARKS,
        sections=sections,
        anchors={figure.anchor for section in sections for figure in section.figures} | {"limits"},
        thresholds=thresholds(settings.criterion),
        provenance=provenance(study),
        style=Markup(_static("report.css")),
        plotly=Markup(plotly),
        draw=Markup(draw),
        options=Markup(json.dumps(_PLOTLY_OPTIONS)),
        script_hashes=[_hash(plotly), _hash(draw)],
    )


def _sections(material: Material) -> list[Section]:
    """In the order of the questions, without figures that have nothing to show. A feed-forward model has those that
    need no recurrence."""
    if material.view.looped:
        sections = [convergence_section(material), similarity_section(material)]
        if "trajectory" in material.view.dataset:
            sections.append(trajectories_section(material))
        sections += [
            readout_section(material),
            heads_section(material),
            stages_section(material),
            tokens_section(material),
            norms_section(material),
        ]
    else:
        sections = [similarity_section(material), heads_section(material), stages_section(material)]
    shown = [
        dataclasses.replace(section, figures=[figure for figure in section.figures if figure.has_data])
        for section in sections
    ]
    return [section for section in shown if section.figures]


def _limits(answers: list[Answer]) -> list[str]:
    return next(answer.limits for answer in answers if answer.key == "limits")


def _highlights(answer: Answer) -> list[tuple[str, str]]:
    """Of the main answer's evidence, what each layer does and the numbers that decided."""
    layers = [(name.capitalize(), str(value)) for name, value in answer.evidence.items() if name.startswith("layer")]
    decided = [
        (text, shown(float(answer.evidence[name])))
        for name, (text, shown) in _DECISIVE.items()
        if name in answer.evidence and math.isfinite(float(answer.evidence[name]))
    ]
    return layers[:_MOST_LAYER_ROWS] + decided


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
    return files("loopscope.report").joinpath("templates", name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
