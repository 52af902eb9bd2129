"""The types of figure that put studies side by side."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from matplotlib.figure import Figure

from loopscope.answers.comparison.result import Comparison
from loopscope.report.paper.compared import (
    MOST_COLUMNS,
    compared,
    compared_curves,
    compared_drift,
    compared_likeness,
    compared_measure,
    compared_stages,
    looped,
)
from loopscope.report.paper.kinds import FigureType
from loopscope.report.paper.style import Width

_CURVES = ("curve", "depth_percent")
_PASSES = (
    "A line per recurrence between prelude and coda (shaded), which run once; later ones lighter. Dashed: the "
    "reference, of a looped one at the recurrence it is judged at. The first layer lies at 0 %, the last at 100 %."
)


def _no_looped(comparison: Comparison) -> str | None:
    return None if looped(comparison) else "none of the studies is of a looped model"


def _too_many(comparison: Comparison) -> str | None:
    count = len(looped(comparison))
    if count > MOST_COLUMNS:
        return f"{count} looped studies do not fit beside each other on a page; compare at most {MOST_COLUMNS}"
    return _no_looped(comparison)


def _lacks(measure: str, comparison: Comparison) -> str | None:
    having = [label for label in looped(comparison) if measure not in comparison.studies[label]["missing"]]
    return _no_looped(comparison) or (None if having else f"no looped study has {measure}")


def _lacks_beyond(measure: str, comparison: Comparison) -> str | None:
    if reason := _lacks(measure, comparison):
        return reason
    longer = [
        label
        for label in looped(comparison)
        if comparison.studies[label]["recurrences"] > comparison.studies[label]["judged_at"]
    ]
    return None if longer else "no study has recurrences beyond the one that it is judged at"


def _nothing_compared(comparison: Comparison) -> str | None:
    return None if compared(comparison) else "no looped study is compared with another one"


def _single_passes(comparison: Comparison) -> str | None:
    counts = [comparison.studies[label]["recurrences"] for label in looped(comparison)]
    return None if any(count > 1 for count in counts) else "no study has two recurrences"


def _type(
    name: str,
    draw: Callable[[Comparison, Width], Figure],
    words: str,
    variables: tuple[str, ...],
    absent: Callable[[Comparison], str | None],
    paper: tuple[int, ...] = (),
) -> FigureType[Comparison]:
    return FigureType(name=name, draw=draw, words=lambda _: words, variables=variables, absent=absent, paper=paper)


def _measure(measure: str, comparison: Comparison, width: Width) -> Figure:
    return compared_measure(comparison, measure, width)


def _measure_beyond(measure: str, comparison: Comparison, width: Width) -> Figure:
    return compared_measure(comparison, measure, width, beyond=True)


COMPARISON_FIGURES: tuple[FigureType[Comparison], ...] = (
    _type(
        "compared-curves",
        compared_curves,
        "Stage measures along one pass of each study, on relative depth: the first layer at 0 %, the last at 100 %; "
        "of a looped study prelude, the block at the recurrence it is judged at, and coda.",
        _CURVES,
        lambda comparison: None,
    ),
    _type(
        "compared-concentration",
        partial(_measure, "attention concentration"),
        f"ColSum concentration of each looped study, mean over heads. {_PASSES}",
        _CURVES,
        partial(_lacks, "attention concentration"),
        (8, 10),
    ),
    _type(
        "compared-concentration-beyond",
        partial(_measure_beyond, "attention concentration"),
        f"ColSum concentration of each looped study up to the last recurrence measured, mean over heads. {_PASSES}",
        _CURVES,
        partial(_lacks_beyond, "attention concentration"),
        (12,),
    ),
    _type(
        "compared-magnitude",
        partial(_measure, "residual magnitude"),
        f"Mean token norm of the residual stream of each looped study. {_PASSES}",
        _CURVES,
        partial(_lacks, "residual magnitude"),
        (9,),
    ),
    _type(
        "compared-stages",
        compared_stages,
        f"Stage measures of each looped study. {_PASSES}",
        _CURVES,
        _too_many,
        (*range(35, 47), *range(54, 63)),
    ),
    _type(
        "compared-likeness",
        compared_likeness,
        "Pearson correlation of each pass with the reference, mean over the stage measures that can be judged; "
        "block: the recurrent block alone on 0 to 100 %, pass: prelude, block and coda. Grey: the middle 90 % of "
        "shuffled orders of the layers. Dotted: the curve back to front.",
        ("overall_similarity", "overall_reversed_similarity", "overall_null_quantile"),
        _nothing_compared,
    ),
    _type(
        "compared-drift",
        compared_drift,
        "Each pass through the block against the study's own pass at the recurrence it is judged at; two panels a "
        "study: root mean square difference over the root mean square of that pass, and Pearson correlation. Where "
        "all layers share one value there is no correlation. A line per stage measure.",
        ("drift", "own_similarity"),
        _single_passes,
    ),
)
