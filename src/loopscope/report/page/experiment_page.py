"""The page of experiments: answers, tables, small multiples, phase diagram, ranking."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

from loopscope._util.table import Table
from loopscope._util.wording import plural
from loopscope.answers.answer import Answer
from loopscope.experiments.cells import CellResult
from loopscope.experiments.load import Experiment
from loopscope.experiments.random_findings import (
    ARCHITECTURE_COLUMNS,
    architecture_answers,
    architecture_rows,
    boundaries,
    phase_answers,
    phase_rows,
)
from loopscope.experiments.sweep_findings import TRAINING_COLUMNS, DesignSummary, advice, summaries, training_rows
from loopscope.report.figures.experiments import experiment_sections
from loopscope.report.figures.plot import Drawn, Plot, Section
from loopscope.report.page.html import render_template


@dataclass
class _Part:
    """What one experiment puts on the page; anchors get a suffix where a kind occurs twice."""

    answers: list[Answer]
    tables: list[Table]
    sections: list[Section]
    facts: tuple[str, str]
    settings: list[tuple[str, str]]


def render_experiments(experiments: Sequence[Experiment]) -> str:
    """The whole page as HTML."""
    seen: dict[str, int] = {}
    parts = []
    for each in experiments:
        seen[each.kind] = seen.get(each.kind, 0) + 1
        suffix = "" if seen[each.kind] == 1 else f"-{seen[each.kind]}"
        several = sum(other.kind == each.kind for other in experiments) > 1
        parts.append(_part(each, suffix, f" ({each.folder.name})" if several else ""))
    return render_template(
        "experiment.html",
        heading="Which designs settle?",
        facts=[part.facts for part in parts],
        answers=[answer for part in parts for answer in part.answers],
        groups=[
            (part.facts[0].capitalize(), part.answers[1 if part is parts[0] else 0 :])
            for part in parts
            if len(parts) > 1
        ],
        limits=_limits(experiments),
        tables=[table for part in parts for table in part.tables],
        sections=[section for part in parts for section in part.sections],
        thresholds=[],
        provenance=[(each.folder.name, part.settings) for each, part in zip(experiments, parts, strict=True)],
        version=version("loopscope"),
    )


def _part(experiment: Experiment, suffix: str, which: str) -> _Part:
    part = _trained(experiment, which) if experiment.kind == "training" else _random(experiment)
    return _Part(
        answers=[
            dataclasses.replace(
                answer,
                key=answer.key + suffix,
                question=answer.question + which,
                figure=answer.figure and answer.figure + suffix,
            )
            for answer in part.answers
        ],
        tables=[
            dataclasses.replace(table, anchor=table.anchor + suffix, title=table.title + which) for table in part.tables
        ],
        sections=[
            dataclasses.replace(
                section,
                anchor=section.anchor + suffix,
                short=section.short + which,
                title=section.title + which,
                figures=[_suffixed(figure, suffix) for figure in section.figures],
            )
            for section in part.sections
        ],
        facts=part.facts,
        settings=part.settings,
    )


def _suffixed(figure: Drawn, suffix: str) -> Plot:
    assert isinstance(figure, Plot)
    panels = [dataclasses.replace(panel, anchor=panel.anchor and panel.anchor + suffix) for panel in figure.panels]
    return dataclasses.replace(figure, anchor=figure.anchor + suffix, panels=panels)


def _random(experiment: Experiment) -> _Part:
    cells = experiment.cells
    first = cells[0].cell
    settings = [
        ("cells", f"{len(cells)}"),
        ("width", f"{first.width}"),
        ("tokens in a prompt", f"{first.tokens}"),
        ("recurrences", f"{2 * first.recurrences}, judged at {first.recurrences} and at the end"),
        ("hours of one worker", f"{sum(each.seconds for each in cells) / 3600:.2f}"),
    ]
    in_grid = experiment.kind == "architectures"
    return _Part(
        answers=architecture_answers(cells) if in_grid else phase_answers(cells),
        tables=[_architecture_table(cells) if in_grid else _phase_table(cells)],
        sections=experiment_sections(experiment),
        facts=("architectures" if in_grid else "phase diagram", _unfinished(f"{len(cells)} random models", experiment)),
        settings=settings,
    )


def _trained(experiment: Experiment, which: str) -> _Part:
    results = experiment.trained
    found = summaries(results)
    looped = sum(each.cell.control is None for each in results)
    first = results[0].cell
    return _Part(
        answers=advice(results),
        tables=[_training_table(found)],
        sections=experiment_sections(experiment),
        facts=(
            f"training{which}",
            _unfinished(f"{looped} looped models and {len(results) - looped} feed-forward controls", experiment),
        ),
        settings=[
            ("task", json.dumps(dataclasses.asdict(first.task))),
            ("text, SHA-256", first.text_sha256 or "made by the task"),
            ("optimizer steps", f"{first.config.steps}"),
            ("windows in a step", f"{first.config.batch_size} of {first.config.context} tokens"),
            ("analysed", f"{first.study.prompts} documents of the test text, {2 * first.study.horizon} recurrences"),
            ("hours of one worker", f"{sum(each.seconds for each in results) / 3600:.2f}"),
        ],
    )


def _unfinished(text: str, experiment: Experiment) -> str:
    return text if experiment.finished else f"{text}; the experiment is not finished"


def _architecture_table(cells: Sequence[CellResult]) -> Table:
    return Table(
        anchor="architectures-table",
        title="Random initialisation, design by design",
        lead="Ranges are over seeds. Cosine: the least one between the states of two layers. Rate: the largest that "
        "eigenvalues predict, where the fixed point is known.",
        columns=ARCHITECTURE_COLUMNS,
        rows=architecture_rows(cells),
    )


def _phase_table(cells: Sequence[CellResult]) -> Table:
    columns, rows = phase_rows(boundaries(cells))
    return Table(
        anchor="phase-table",
        title="What the tokens do, by the scale of the weights",
        lead="What most tokens do in the long run, and the largest predicted rate; then the scale at which that "
        "rate crosses 1, and the one at which half of the tokens no longer settle.",
        columns=columns,
        rows=rows,
    )


def _training_table(found: Sequence[DesignSummary]) -> Table:
    return Table(
        anchor="training-table",
        title="Trained models, the lowest loss first",
        lead="Losses in nats: mean over seeds and Student's 95 % interval of it (of two seeds both values), at the "
        "trained number of recurrences and at the largest one. Kept: the second is at most 1 %, or 0.01 nats, above "
        "the first; by the seeds' intervals, which for all looped designs hold together with 95 %, and in how many "
        "seeds. The bigram table is fitted to the test text itself: one of other text has a larger loss. Settled: "
        "judged tokens that reach a fixed point or hover at the floor, with the interval over seeds. Rate: the largest "
        "predicted, over seeds. Stages repeat: share of the stage measures' variance that goes with the layer, "
        "whatever the recurrence.",
        columns=TRAINING_COLUMNS,
        rows=training_rows(found),
    )


def _limits(experiments: Sequence[Experiment]) -> list[str]:
    limits = []
    if any(each.kind != "training" for each in experiments):
        limits.append("Random models say what a design starts from, not what training makes of it.")
    trained = [each for each in experiments if each.kind == "training"]
    if trained:
        seeds = min(len(each.results) for one in trained for each in summaries(one.trained))
        limits.append(
            "The trained models are small and trained for minutes: orders of designs may change with size, data and "
            "length of training."
        )
        limits.append(
            f"No design has fewer than {plural(seeds, 'seed')}. Intervals are Student's over seeds, each counted "
            "once: they say what other seeds of these models would give on this test text, not what another text would."
        )
    if not all(each.finished for each in experiments):
        limits.append("An experiment is not finished: designs whose cells are missing are left out.")
    return limits
