"""The page: answers first, then the figures, then where it all comes from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from loopscope._util.wording import significant
from loopscope.answers.answer import Answer
from loopscope.report.figures.convergence import convergence_section, norms_section
from loopscope.report.figures.eigenvalues import stability_section
from loopscope.report.figures.heads import heads_section
from loopscope.report.figures.maps import floorplan_section
from loopscope.report.figures.plot import Section
from loopscope.report.figures.readout import readout_section
from loopscope.report.figures.similarity import similarity_section
from loopscope.report.figures.stages import stages_section
from loopscope.report.figures.study_tokens import behaviour_section
from loopscope.report.figures.tokens import tokens_section
from loopscope.report.figures.trajectories import trajectories_section
from loopscope.report.page.facts import header_facts, provenance, thresholds
from loopscope.report.page.html import render_template
from loopscope.report.settings import ReportSettings
from loopscope.study import Study, StudyView, view_study

_DECISIVE: dict[str, tuple[str, Callable[[float], str]]] = {
    "drift_between_horizons": ("Drift from H to 2H", significant),
    "relative_step_at_second_horizon": ("Relative step at 2H", significant),
    "norm_growth_between_horizons": ("Norm at 2H over norm at H", "{:.3f}".format),
    "noise_floor": ("Noise floor", significant),
}
_MOST_LAYER_ROWS = 4
"""Of layers that each do something else; the figures show all of them."""


def render_page(study: Study, settings: ReportSettings, answers: Sequence[Answer]) -> str:
    """The whole report as HTML."""
    view = view_study(study)
    sections = _sections(view, settings)
    return render_template(
        "report.html",
        model=str(study.manifest["model"]["name"]),
        created=str(study.manifest.get("created", ""))[:16].replace("T", " "),  # to the minute
        version=str(study.manifest.get("versions", {}).get("loopscope", "")),
        facts=header_facts(view),
        answers=answers,
        highlights=_highlights(answers[0]),
        limits=_limits(answers),
        sections=sections,
        anchors=set().union(*(section.anchors for section in sections)) | {"limits"},
        thresholds=thresholds(settings.criterion),
        provenance=provenance(study.manifest),
    )


def _sections(view: StudyView, settings: ReportSettings) -> list[Section]:
    """In the order of the questions, without figures that have nothing to show. A feed-forward model has those that
    need no recurrence."""
    if view.looped:
        sections = [
            convergence_section(view, settings),
            behaviour_section(view, settings),
            stability_section(view, settings),
            similarity_section(view, settings),
            trajectories_section(view, settings),
            readout_section(view, settings),
            heads_section(view, settings),
            floorplan_section(view),
            stages_section(view, settings),
            tokens_section(view, settings),
            norms_section(view, settings),
        ]
    else:
        sections = [
            similarity_section(view, settings),
            heads_section(view, settings),
            floorplan_section(view),
            stages_section(view, settings),
        ]
    shown = [
        dataclasses.replace(section, figures=[figure for figure in section.figures if figure.has_data])
        for section in sections
    ]
    return [section for section in shown if section.figures]


def _limits(answers: Sequence[Answer]) -> list[str]:
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
