"""What an evaluation found: accuracy against the number of recurrences, beside how the state settles."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loopscope._util.config_json import build, read_object
from loopscope._util.files import write_atomically
from loopscope._util.ranges import Count, check_ranges
from loopscope._util.statistics import finite_or_none, paired_difference
from loopscope._util.table import Table
from loopscope.errors import ConfigError

CURVE = "curve.json"


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A task after one number of recurrences."""

    recurrences: Count
    value: float | None
    """None where it is not finite."""
    stderr: float | None
    """Standard error of the value, documents being drawn at random; None where there is none. 0 where all documents
    score alike, which is no certainty."""
    change: float | None
    """Mean over documents of what they score more than at `reference` recurrences; None where documents have no scores
    of their own, and of the reference itself."""
    change_half_width: float | None
    """Half of the 95 % interval of the change, Student's t over documents: of no use where `unlike` is small."""
    unlike: int | None
    """Documents that score differently than at the reference; None as for the change."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class TaskCurve:
    """One metric of one task by number of recurrences."""

    task: str
    metric: str
    part: str
    """Which documents, such as `4 swaps`; empty for all of them."""
    documents: int
    reference: int
    """What changes are from: the trained number of recurrences where it was asked for, else the largest asked one."""
    points: tuple[CurvePoint, ...]


@dataclass(frozen=True, kw_only=True)
class StepPoint:
    """How long the last step was, relative to the state, where continuations of requests are predicted: quartiles over
    requests of the mean over positions."""

    recurrences: Count
    requests: int
    lower: float
    median: float
    upper: float

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Of one model on some tasks."""

    model: str
    weights_sha256: str
    dtype: str
    trained_recurrences: int | None
    recurrences: tuple[Count, ...]
    seed: int
    """Of random initial states."""
    limit: int | None
    """The most documents of a task; None for all of them."""
    curves: tuple[TaskCurve, ...]
    steps: tuple[StepPoint, ...]
    """Over the requests of all tasks together, of likelihoods alone; empty where no step could be seen."""
    chat: bool = False
    """Whether requests were made chats by the model's template."""

    def __post_init__(self) -> None:
        check_ranges(self)
        for curve in self.curves:
            numbers = tuple(point.recurrences for point in curve.points)
            if not numbers or numbers != self.recurrences or curve.reference not in numbers:
                raise ConfigError(
                    f"An evaluation after {self.recurrences} recurrences has a curve of {curve.task} after {numbers}, "
                    f"with changes from {curve.reference}; it was not written by loopscope, or changed since."
                )

    def save(self, folder: Path) -> Path:
        """Write `curve.json`. Raises `StorageError`."""
        path = folder / CURVE
        write_atomically(path, (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode())
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Evaluation:
        """Raises `ConfigError` for a folder without a sound `curve.json`."""
        return build(cls, read_object(Path(folder) / CURVE, "evaluation"), "the evaluation")

    def tables(self) -> list[Table]:
        """For the terminal: a table for each curve, with the steps in the last column where there are any; then one for
        the parts of each task."""
        whole = [curve for curve in self.curves if not curve.part]
        tables = [self._table(curve) for curve in whole]
        for curve in whole:
            parts = [
                each for each in self.curves if each.part and (each.task, each.metric) == (curve.task, curve.metric)
            ]
            if parts:
                tables.append(self._table_of_parts(curve, parts))
        return tables

    def _table_of_parts(self, curve: TaskCurve, parts: Sequence[TaskCurve]) -> Table:
        rows = [
            (self._number(point.recurrences), *(_shown(part.points[place].value) for part in parts))
            for place, point in enumerate(curve.points)
        ]
        columns = ["recurrences", *(f"{part.part} ({part.documents:,})" for part in parts)]
        return Table(title=f"{curve.task}, {curve.metric} by difficulty (documents)", columns=columns, rows=rows)

    def _number(self, recurrences: int) -> str:
        return f"{recurrences}{' (trained)' if recurrences == self.trained_recurrences else ''}"

    def sentences(self) -> list[str]:
        """Of each curve, whether the smallest and the largest number differ from the reference, beside the steps."""
        return [sentence for curve in self.curves if not curve.part for sentence in self.said_of(curve)]

    def said_of(self, curve: TaskCurve) -> list[str]:
        """One of its curves."""
        return [
            self._sentence(curve, point)
            for point in (curve.points[0], curve.points[-1])
            if point.change is not None and point.change_half_width is not None
        ]

    def _sentence(self, curve: TaskCurve, point: CurvePoint) -> str:
        assert point.change is not None  # of those that have one
        assert point.change_half_width is not None
        steps = {each.recurrences: each.median for each in self.steps}
        here, there = steps.get(point.recurrences), steps.get(curve.reference)
        beside = ""
        if here is not None and there is not None:
            beside = (
                f" The median last step is {here:.2g} of the state there, and {there:.2g} after {curve.reference}"
                f"{'' if len({each.task for each in self.curves}) == 1 else ', over all tasks'}."
            )
        versus = f"{curve.task}: after {point.recurrences} instead of {curve.reference} recurrences"
        if not point.unlike:
            return f"{versus} no document scores differently in {curve.metric}.{beside}"
        differs = abs(point.change) > point.change_half_width
        how = ("higher" if point.change > 0 else "lower") if differs else "not measurably different"
        return (
            f"{versus} {curve.metric} is {how} ({point.change:+.3f} ± {point.change_half_width:.3f}, 95 % over "
            f"documents; {point.unlike:,} of {curve.documents:,} score differently).{beside}"
        )

    def _table(self, curve: TaskCurve) -> Table:
        steps = {point.recurrences: f"{point.median:.2g}" for point in self.steps}
        columns = ["recurrences", curve.metric, "standard error", f"change from {curve.reference} (95 %)"]
        rows = []
        for point in curve.points:
            error = "all alike" if point.stderr == 0 else "-" if point.stderr is None else f"{point.stderr:.3f}"
            change = "-" if point.change is None else f"{point.change:+.3f} ± {point.change_half_width:.3f}"
            if point.unlike == 0:
                change = "none"  # an interval of documents that all agree would have no width
            row = [self._number(point.recurrences), _shown(point.value), error, change]
            rows.append((*row, steps.get(point.recurrences, "-")) if steps else tuple(row))
        title = f"{curve.task}, {curve.documents:,} documents"
        return Table(title=title, columns=(*columns, *(["relative step"] if steps else [])), rows=rows)


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def task_curve(
    task: str,
    metric: str,
    scores: Mapping[int, Sequence[float]],
    *,
    trained: int | None,
    part: str = "",
    values: Mapping[int, tuple[float, float | None]] | None = None,
) -> TaskCurve:
    """From the score of each document by number of recurrences, in one order of documents.

    `values` are the metric and its standard error where they are not mean and standard error of these scores; scores
    may then be empty.
    """
    numbers = sorted(values or scores)
    reference = trained if trained in numbers else numbers[-1]
    assert reference is not None  # there is at least one number
    points = []
    for number in numbers:
        own, other = np.array(scores.get(number, ())), np.array(scores.get(reference, ()))
        difference = paired_difference(own, other) if number != reference and own.size == other.size > 1 else None
        error = float(own.std(ddof=1) / np.sqrt(own.size)) if own.size > 1 else None
        value, stderr = values[number] if values is not None else (float(own.mean()), error)
        stderr = None if stderr is None else finite_or_none(stderr)
        points.append(
            CurvePoint(
                recurrences=number,
                value=finite_or_none(value),
                stderr=stderr,
                change=None if difference is None else finite_or_none(difference.mean),
                change_half_width=None if difference is None else finite_or_none(difference.half_width),
                unlike=None if difference is None else int((own != other).sum()),
            )
        )
    documents = len(scores.get(reference, ()))
    return TaskCurve(
        task=task, metric=metric, part=part, documents=documents, reference=reference, points=tuple(points)
    )


def step_points(steps: Mapping[int, Sequence[float]]) -> tuple[StepPoint, ...]:
    """From the steps of requests by number of recurrences; numbers without a finite one are left out."""
    finite = {number: np.array(own)[np.isfinite(np.array(own))] for number, own in sorted(steps.items())}
    return tuple(
        StepPoint(
            recurrences=number,
            requests=own.size,
            lower=float(np.quantile(own, 0.25)),
            median=float(np.median(own)),
            upper=float(np.quantile(own, 0.75)),
        )
        for number, own in finite.items()
        if own.size
    )
