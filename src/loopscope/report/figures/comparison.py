"""Studies beside each other: curves on relative depth, likeness by recurrence, drift."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from loopscope._util.wording import visible
from loopscope.answers.comparison.result import Comparison
from loopscope.answers.comparison.side_by_side import side_by_side, training_steps
from loopscope.answers.quantities import STAGE_QUANTITIES, StageQuantity
from loopscope.report.figures.curves import count_axis, passes
from loopscope.report.figures.look import CATEGORIES, INK, MUTED, layer_colours, ordered_colours
from loopscope.report.figures.plot import (
    Axis,
    Band,
    FigureType,
    Line,
    Mark,
    Panel,
    Plot,
    Rule,
    Section,
    Shade,
    on_page,
)
from loopscope.report.settings import ReportSettings
from loopscope.study import powers_of_two

_MOST_COLUMNS = 3
"""Looped studies beside each other on a page of a paper."""
_PASSES = (
    "One line per recurrence, later ones lighter, between prelude and coda (shaded), which run once. Dashed: the "
    "reference (if looped, at the recurrence it is judged at). The first layer lies at 0 %, the last at 100 %."
)
_TIP = "{label}, {x:.0f} %: {y:.3g}"
_DRIFTS = {
    "drift": ("drift", Axis(title="RMS difference / RMS", scale="auto")),
    "own_similarity": ("own", Axis(title="correlation with own pass")),
}
"""Anchor and y axis, by variable."""


def looped(comparison: Comparison) -> list[str]:
    """The labels of the looped studies."""
    return [label for label in comparison.labels if comparison.studies[label]["recurrences"]]


def _compared(comparison: Comparison) -> list[str]:
    """Of those, the ones that are compared with the reference."""
    return [label for label in looped(comparison) if label != comparison.reference]


def _shared(comparison: Comparison) -> list[StageQuantity]:
    """The stage measures that at least one study has."""
    missing = [set(study["missing"]) for study in comparison.studies.values()]
    return [quantity for quantity in STAGE_QUANTITIES if not all(quantity.name in names for names in missing)]


# ---- checkpoints of one run ----


def _over_training(comparison: Comparison, settings: ReportSettings) -> Plot:
    """A panel for each question that has a number in several studies, against the training step."""
    side, steps = side_by_side(comparison), np.array(training_steps(comparison))
    order = steps.argsort()
    panels = []
    for place, (question, cells) in enumerate(side.rows.values()):
        values = np.array([math.nan if cell is None else cell.value for cell in cells])
        if np.isfinite(values).sum() > 1:
            labels = ["" if cell is None else cell.text for cell in cells]
            line = Line(
                x=steps[order], y=values[order], colour=CATEGORIES[0], points=True, tip="step {x}: {label}",
                labels=[labels[each] for each in order],
            )  # fmt: skip
            x, y = Axis(title="training step"), Axis(title=_UNITS.get(list(side.rows)[place], "nats a token"))
            panels.append(Panel(title=question, x=x, y=y, marks=[line]))
    return Plot(
        question="How do the answers change over training?",
        reading="The number behind each answer, one point per checkpoint.",
        panels=panels,
    )


def _no_run(comparison: Comparison) -> str | None:
    return None if training_steps(comparison) else "the studies are not checkpoints of one run, named after their steps"


_UNITS = {
    "fixed_point": "share of tokens settled",
    "points": "least cosine",
    "arrival": "recurrences",
    "stability": "rate per recurrence",
    "initial_state": "relative distance",
    "heads": "share of heads",
    "exit_rule": "share of recurrences",
}
"""Of the numbers, by question."""

# ---- curves on relative depth ----


def _curves(comparison: Comparison, settings: ReportSettings) -> Plot:
    """A panel per stage measure: one pass of every study, of a looped one at the recurrence it is judged at."""
    quantities = _shared(comparison)
    colours = layer_colours(max(1, len(comparison.labels) - 1))
    panels = []
    for quantity in quantities:
        others = iter(colours)
        marks: list[Mark] = [
            _reference_line(comparison, quantity, explained=False)
            if label == comparison.reference
            else _line(comparison, label, quantity, _home(comparison, label), _named(label), next(others))
            for label in comparison.labels
            if _has(comparison, label, [quantity.name]) or label == comparison.reference
        ]
        panels.append(_panel(quantity, marks, anchor=f"curves-{quantity.anchor}"))
    return Plot(
        question="How do the studies differ along one pass, measure by measure?",
        reading="Stage measures along one pass of each study, on relative depth: the first layer at 0 %, the last at "
        "100 %. A looped study is shown with prelude, the block at the recurrence it is judged at, and coda. "
        f"{_readings(quantities)}",
        panels=panels,
    )


def _stages(names: Sequence[str], beyond: bool, comparison: Comparison, settings: ReportSettings) -> Plot:
    """These stage measures, or all, of each looped study: every pass, up to the recurrence that the study is judged at
    or, `beyond`, to the last one; a row per measure where there are several studies."""
    quantities = [quantity for quantity in _shared(comparison) if not names or quantity.name in names]
    labels = [label for label in looped(comparison) if not names or _has(comparison, label, names)]
    lines = {
        label: powers_of_two(study["recurrences"]) if beyond else passes(study["judged_at"])
        for label in labels
        for study in (comparison.studies[label],)
    }
    several = len(labels) > 1
    return Plot(
        question="Does each pass go through the stages of the reference?",
        reading=f"{_readings(quantities, several=several)} {_PASSES}",
        panels=[
            _passes_panel(
                comparison, label, quantity, lines, title=_named(label) if names or (several and row == 0) else ""
            )
            for row, quantity in enumerate(quantities)
            for label in labels
        ],
        legend="recurrence",
        columns=len(labels) if several and not names else 0,
        same_y=bool(names),
    )


def _passes_of(comparison: Comparison, label: str) -> Plot:
    """For a page: all stage measures of a looped study, every pass."""
    index, quantities = comparison.labels.index(label), _shared(comparison)
    lines = {label: powers_of_two(comparison.studies[label]["recurrences"])}
    return Plot(
        question="Are its passes alike, and do they resemble the reference?",
        reading=f"{_readings(quantities)} {_PASSES}",
        panels=[
            _passes_panel(comparison, label, quantity, lines, anchor=f"passes-{index}-{quantity.anchor}")
            for quantity in quantities
        ],
        legend="recurrence",
        anchor=f"all-passes-{index}",
    )


def _passes_panel(
    comparison: Comparison,
    label: str,
    quantity: StageQuantity,
    lines: Mapping[str, Sequence[int]],
    *,
    title: str = "",
    anchor: str = "",
) -> Panel:
    layout = comparison.studies[label]["layout"]
    step = 100 / max(1, sum(layout.values()) - 1)
    # Half way to the block's first and last layer.
    start, end = (layout["prelude"] - 0.5) * step, (layout["prelude"] + layout["recurrent"] - 0.5) * step
    marks: list[Mark] = []
    if layout["prelude"]:
        marks.append(Shade(start=0.0, end=start, name="prelude"))
    if layout["coda"]:
        marks.append(Shade(start=end, end=100.0, name="coda"))
    # One colour for a recurrence in all panels, since they share a legend.
    every = sorted(set().union(*lines.values()))
    for count, colour in zip(every, ordered_colours(len(every)), strict=True):
        if count in lines[label]:
            marks.append(_line(comparison, label, quantity, count, str(count), colour))
    if label != comparison.reference:
        marks.append(_reference_line(comparison, quantity, explained=True))
    return _panel(quantity, marks, title=title, anchor=anchor)


def _panel(quantity: StageQuantity, marks: Sequence[Mark], *, title: str = "", anchor: str = "") -> Panel:
    return Panel(
        x=Axis(title="relative depth (%)", span=(-2.0, 102.0)),
        y=Axis(title=quantity.y_title, scale="auto" if quantity.logarithmic else "linear"),
        marks=marks,
        title=title,
        anchor=anchor,
    )


def _line(comparison: Comparison, label: str, quantity: StageQuantity, recurrence: int, name: str, colour: str) -> Line:
    depth, values = comparison.curve(label, quantity.name, recurrence)
    called = f"recurrence {name}" if name.isdigit() else name
    return Line(x=depth, y=values, name=name, colour=colour, points=True, labels=[called] * len(depth), tip=_TIP)


def _reference_line(comparison: Comparison, quantity: StageQuantity, *, explained: bool) -> Line:
    label = comparison.reference
    depth, values = comparison.curve(label, quantity.name, _home(comparison, label))
    return Line(
        x=depth, y=values, name=f"{_named(label)} (reference)", colour=INK, dash="dash", points=True,
        explained=explained, labels=["reference"] * len(depth), tip=_TIP,
    )  # fmt: skip


def _readings(quantities: Sequence[StageQuantity], *, several: bool = False) -> str:
    """What the measures are; by the letters of their panels, unless each has several."""
    lettered = len(quantities) > 1 and not several
    return " ".join(
        (f"({'abcdefgh'[place]}) " if lettered else "") + f"{quantity.name.capitalize()}: {quantity.reading}"
        for place, quantity in enumerate(quantities)
    )


def _home(comparison: Comparison, label: str) -> int:
    """The recurrence that a study is judged at, from 1; a feed-forward model has one pass."""
    return comparison.studies[label]["judged_at"] or 1


def _named(label: str) -> str:
    return visible(label, 44)


# ---- likeness and drift ----


def _likeness(comparison: Comparison, settings: ReportSettings) -> Plot:
    """A panel per looped study and span: correlation of each pass with the reference, mean over the measures, beside
    the null that comes closest and the reversed curve."""
    panels = []
    for label in _compared(comparison):
        study = comparison.studies[label]
        for span in ("block", "pass"):
            if span == "block" and not study["layout"]["prelude"] + study["layout"]["coda"]:
                continue
            data = comparison.dataset.sel(study=label, span=span).isel(recurrence=slice(study["recurrences"]))
            counts, null = np.arange(1, study["recurrences"] + 1), data["overall_null_quantile"].values
            panels.append(
                Panel(
                    x=count_axis(study["recurrences"]),
                    y=Axis(title="correlation with reference", span=(-1.05, 1.05)),
                    marks=[
                        Band(x=counts, low=null[0], high=null[-1], name="90 % of the closest null"),
                        Line(
                            x=counts, y=data["overall_reversed_similarity"].values, name="reversed", colour=MUTED,
                            dash="dot",
                        ),
                        Line(
                            x=counts, y=data["overall_similarity"].values, name="correlation", colour=CATEGORIES[0],
                        ),
                        *_trained_mark(study),
                    ],
                    title=f"{span}: {_named(label)}",
                    anchor=f"likeness-{comparison.labels.index(label)}-{span}",
                )
            )  # fmt: skip
    return Plot(
        question="How similar is each pass to the reference?",
        reading="Pearson correlation of each pass with the reference, mean over the stage measures that can be judged; "
        "block: the recurrent block alone on 0 to 100 %, pass: prelude, block and coda. Grey: the middle 90 % of "
        "curves with shuffled layers, random phases or bent depth, whichever come closest. Dotted: the reversed "
        "curve.",
        panels=panels,
    )


def _drift(comparison: Comparison, settings: ReportSettings) -> Plot:
    """Two panels per looped study: how far each pass through the block is, in level and in the order of its layers,
    from the pass at the recurrence that the study is judged at; a line per measure."""
    panels = []
    for index, label in enumerate(looped(comparison)):
        study = comparison.studies[label]
        if study["recurrences"] < 2:
            continue
        for variable, (anchor, axis) in _DRIFTS.items():
            data = comparison.dataset[variable].sel(study=label).isel(recurrence=slice(study["recurrences"]))
            rows = data.transpose("measure", "recurrence").values
            counts = np.arange(1, study["recurrences"] + 1)
            panels.append(
                Panel(
                    x=count_axis(study["recurrences"]),
                    y=axis,
                    marks=[
                        *(
                            Line(x=counts, y=row, name=quantity.name, colour=colour)
                            for row, quantity, colour in zip(rows, STAGE_QUANTITIES, CATEGORIES, strict=False)
                            if np.isfinite(row).any()
                        ),
                        *_trained_mark(study),
                    ],
                    title=f"{_named(label)}, against recurrence {study['judged_at']}",
                    anchor=f"{anchor}-{index}",
                )
            )
    return Plot(
        question="How much does each pass differ from the one that is judged?",
        reading="Each pass through the block against the study's own pass at the recurrence it is judged at; two "
        "panels per study: root mean square difference over the root mean square of that pass, and Pearson "
        "correlation. One line per stage measure; it ends where all layers share one value.",
        panels=panels,
        columns=2,
    )


def _trained_mark(study: Mapping[str, Any]) -> list[Mark]:
    trained = study["trained_recurrences"]
    if trained is None or trained > study["recurrences"]:
        return []
    return [Rule(x=float(trained), name=f"trained: {trained}", above=True)]


# ---- which there are ----


def _no_looped(comparison: Comparison) -> str | None:
    return None if looped(comparison) else "none of the studies is of a looped model"


def _too_many(comparison: Comparison) -> str | None:
    count = len(looped(comparison))
    if count > _MOST_COLUMNS:
        return f"{count} looped studies do not fit beside each other on a page; compare at most {_MOST_COLUMNS}"
    return _no_looped(comparison)


def _has(comparison: Comparison, label: str, names: Sequence[str]) -> bool:
    return not set(names) & set(comparison.studies[label]["missing"])


def _lacks(measure: str, comparison: Comparison) -> str | None:
    having = [label for label in looped(comparison) if _has(comparison, label, [measure])]
    return _no_looped(comparison) or (None if having else f"no looped study has {measure}")


def _lacks_beyond(measure: str, comparison: Comparison) -> str | None:
    studies = [comparison.studies[label] for label in looped(comparison)]
    longer = any(study["recurrences"] > study["judged_at"] for study in studies)
    return _lacks(measure, comparison) or (
        None if longer else "no study has recurrences beyond the one that it is judged at"
    )


def _nothing_compared(comparison: Comparison) -> str | None:
    return None if _compared(comparison) else "no looped study is compared with another one"


def _single_passes(comparison: Comparison) -> str | None:
    counts = [comparison.studies[label]["recurrences"] for label in looped(comparison)]
    return None if any(count > 1 for count in counts) else "no study has two recurrences"


def _stages_type(
    name: str, measures: Sequence[str], paper: tuple[int, ...], *, beyond: bool = False
) -> FigureType[Comparison]:
    lacks = _lacks_beyond if beyond else _lacks
    return FigureType(
        name,
        partial(_stages, measures, beyond),
        _CURVES,
        for_paper=True,
        unless=partial(lacks, measures[0]) if measures else _too_many,
        paper=paper,
    )


_CURVES = ("curve", "depth_percent")
COMPARED: tuple[FigureType[Comparison], ...] = (
    FigureType("over-training", _over_training, (), unless=_no_run),
    FigureType("compared-curves", _curves, _CURVES, anchor="all-curves"),
    _stages_type("compared-concentration", ["attention concentration"], (8, 10)),
    _stages_type("compared-concentration-beyond", ["attention concentration"], (12,), beyond=True),
    _stages_type("compared-magnitude", ["residual magnitude"], (9,)),
    _stages_type("compared-stages", [], (*range(35, 47), *range(54, 63))),
    FigureType(
        "compared-likeness",
        _likeness,
        ("overall_similarity", "overall_reversed_similarity", "overall_null_quantile"),
        anchor="all-likeness",
        unless=_nothing_compared,
    ),
    FigureType("compared-drift", _drift, ("drift", "own_similarity"), anchor="all-drift", unless=_single_passes),
)


def comparison_sections(comparison: Comparison, settings: ReportSettings) -> list[Section]:
    """In the order of the questions, without figures that have nothing to show."""
    plots = {plot.name: plot for plot in on_page(COMPARED, comparison, settings)}
    training, curves, likeness, drift = (
        [plots[name]] if name in plots else []
        for name in ("over-training", "compared-curves", "compared-likeness", "compared-drift")
    )
    sections = [
        Section(
            anchor="training",
            short="Training",
            title="How do the answers change over training?",
            lead="The numbers of the table, by the step of the checkpoint.",
            figures=training,
        ),
        Section(
            anchor="curves",
            short="Curves",
            title="How does a pass compare with the reference?",
            lead="Medians over prompts.",
            figures=curves,
        ),
        *(
            Section(
                anchor=f"passes-{comparison.labels.index(label)}",
                short=f"Passes of {label}",
                title=f"{label}, pass by pass",
                lead="Measure by measure; medians over prompts.",
                figures=[_passes_of(comparison, label)],
            )
            for label in looped(comparison)
            if any(_has(comparison, label, [quantity.name]) for quantity in _shared(comparison))
        ),
        Section(
            anchor="likeness",
            short="Similarity",
            title="Is every pass equally similar to the reference?",
            lead="Correlation with the reference, mean over the measures that can be judged, by recurrence.",
            figures=likeness,
        ),
        Section(
            anchor="drift",
            short="Drift",
            title="Do the stages persist beyond the trained recurrences?",
            lead="Each pass is compared with the study's own pass at the recurrence it is judged at.",
            figures=drift,
        ),
    ]
    return [section for section in sections if section.figures]
