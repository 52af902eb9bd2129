"""The page: answers first, then the figures, then where it all comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from loopscope.answers.answer import Answer
from loopscope.answers.stability import leading_token
from loopscope.report.figures.convergence import convergence_section, first_figure
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
from loopscope.report.page.facts import command_of, header_facts, provenance, thresholds
from loopscope.report.page.html import render_template
from loopscope.report.settings import ReportSettings
from loopscope.study import Study, StudyView, view_study

_GROUPS = {
    "Does it settle?": ("behaviour", "arrival", "trained_depth", "criteria"),
    "Why?": ("stability", "points", "initial_state"),
    "What does it say?": ("loss", "final", "exit_rule"),
    "Layers and heads": ("heads", "stages", "limits"),
}


def render_page(study: Study, settings: ReportSettings, answers: Sequence[Answer]) -> str:
    """The whole report as HTML."""
    view = view_study(study)
    changed = f", with {', '.join(view.interventions)}" if view.interventions else ""
    groups = [(name, [each for each in answers[1:] if each.key in keys]) for name, keys in _GROUPS.items()]
    return render_template(
        "report.html",
        model=f"{study.manifest['model']['name']}{changed}",
        created=str(study.manifest.get("created", ""))[:16].replace("T", " "),  # to the minute
        version=str(study.manifest.get("versions", {}).get("loopscope", "")),
        facts=header_facts(view),
        answers=answers,
        groups=[(name, group) for name, group in groups if group] if view.looped else None,
        first=first_figure(view, settings),
        beside=leading_token(view),
        limits=next(answer.limits for answer in answers if answer.key == "limits"),
        sections=_sections(view, settings),
        thresholds=thresholds(settings.criterion),
        command=command_of(study),
        provenance=provenance(study.manifest),
    )


def _sections(view: StudyView, settings: ReportSettings) -> list[Section]:
    """In the order of the questions, without figures that have nothing to show. A feed-forward model has those that
    need no recurrence."""
    if view.looped:
        sections = [
            convergence_section(view, settings),
            behaviour_section(view, settings),
            tokens_section(view, settings),
            stability_section(view, settings),
            similarity_section(view, settings),
            trajectories_section(view, settings),
            readout_section(view, settings),
            heads_section(view, settings),
            floorplan_section(view),
            stages_section(view, settings),
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
