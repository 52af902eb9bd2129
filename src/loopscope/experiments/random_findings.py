"""Grids of random models and what their results say: the study at random initialisation of arXiv 2604.11791, Figure 6
(which norms and injections make fixed points), and where stability is lost as weights grow."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from loopscope._util.wording import listed
from loopscope.answers.answer import Answer, Outcome, Question
from loopscope.dynamics.verdicts import Kind
from loopscope.experiments.cells import Cell, CellOutcome, CellResult, by_design, spread
from loopscope.experiments.designs import INJECTIONS, NORMS, SCALES, InjectionName, NormName
from loopscope.experiments.seeds import Interval, Told

PAPER: dict[tuple[NormName, InjectionName], CellOutcome] = {
    ("pre", "linear"): CellOutcome.FIXED_POINT,
    ("residual", "linear"): CellOutcome.FIXED_POINT,
    ("ouro", "linear"): CellOutcome.NONE,
    ("pre", "none"): CellOutcome.DEGENERATE,
    ("residual", "none"): CellOutcome.NONE,
    ("ouro", "none"): CellOutcome.NONE,
}
"""The six outcomes of Figure 6."""
ARCHITECTURE_COLUMNS = ("design", "outcome (models)", "least cosine", "norm at 2H over H", "predicted rate")
"""Of `architecture_rows`."""
_NEEDED = 2 / 3
"""Share of a design's cells, over depths and seeds, that have to agree with the paper: most of three seeds."""
_CLOSE = 1.1
"""Two scales are the same within this factor: less than half of the step between neighbours of the default grid."""
_REPRODUCTION = Question(key="reproduction", text="Are the paper's outcomes reproduced?", figure="architectures-table")
_RATES = Question(key="rates", text="Do eigenvalues tell how fast a random model settles?")
_BOUNDARY = Question(
    key="boundary", text="Do eigenvalues say where stability is lost as weights grow?", figure="phase-map"
)


def architecture_grid(
    *,
    norms: Sequence[NormName] = NORMS,
    injections: Sequence[InjectionName] = INJECTIONS,
    depths: Sequence[int] = (4, 12, 16),
    seeds: int = 3,
    **options: Any,
) -> list[Cell]:
    """All combinations; `options` are further fields of `Cell`."""
    return [
        Cell(norm=norm, injection=injection, depth=depth, seed=seed, **options)
        for norm in norms
        for injection in injections
        for depth in depths
        for seed in range(seeds)
    ]


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """One of the paper's outcomes, and what the cells of that design show."""

    norm: NormName
    injection: InjectionName
    paper: CellOutcome
    found: dict[str, int]
    """Cells by their outcome."""
    reproduced: bool | None
    """None where most cells of this design are undecided, or none was run: those that are not yet there neither confirm
    nor refute."""

    @property
    def verdict(self) -> str:
        if self.reproduced is None:
            return "undecided" if self.found else "not run"
        return "reproduced" if self.reproduced else "NOT reproduced"

    @property
    def found_text(self) -> str:
        """`3 none, 1 fixed point`."""
        return ", ".join(f"{count} {outcome}" for outcome, count in self.found.items()) or "not run"


def reproduction(results: Sequence[CellResult]) -> list[Reproduction]:
    """Design by design of the paper, in its order."""
    rows = []
    for (norm, injection), paper in PAPER.items():
        cells = [each.outcome for each in results if (each.cell.norm, each.cell.injection) == (norm, injection)]
        outcomes = Counter(map(str, cells))
        decided = sum(outcome.decided for outcome in cells)
        rows.append(
            Reproduction(
                norm=norm,
                injection=injection,
                paper=paper,
                found=dict(outcomes.most_common()),
                reproduced=outcomes[str(paper)] >= _NEEDED * decided if decided and 2 * decided >= len(cells) else None,
            )
        )
    return rows


def architecture_answers(results: Sequence[CellResult]) -> list[Answer]:
    """Were the paper's outcomes reproduced, and what makes a fixed point?"""
    rows = reproduction(results)
    run = [row for row in rows if row.reproduced is not None]
    yes = sum(row.reproduced is True for row in run)
    failed = [f"{row.norm} with injection {row.injection}" for row in run if not row.reproduced]
    ends = sorted({2 * each.cell.recurrences for each in results})
    outcome = Outcome.NOT_APPLICABLE if not run else Outcome.YES if yes == len(rows) else Outcome.PARTLY
    sentence = (
        f"{yes} of the {len(rows)} outcomes of arXiv 2604.11791, Figure 6, were found again by recurrence "
        f"{listed(list(map(str, ends)))}"
    )
    sentence += f"; not those of {', '.join(failed)}." if failed else "."
    left = Counter(row.verdict for row in rows if row.reproduced is None)
    if left:
        sentence += f" Of the others {listed([f'{count} were {verdict}' for verdict, count in left.items()])}."
    found = [
        _REPRODUCTION.says(
            outcome,
            f"{yes} of {len(rows)} by recurrence {listed(list(map(str, ends)))}" if ends else f"{yes} of {len(rows)}",
            sentence,
            {f"{row.norm}, {row.injection} (paper: {row.paper})": row.found_text for row in rows},
        )
    ]
    gaps = [
        abs(each.radius_median - each.observed_rate)
        for each in results
        if each.outcome.settles and each.radius_median is not None and each.observed_rate is not None
    ]
    if gaps:
        found.append(
            _RATES.says(
                Outcome.YES if median(gaps) < 0.05 else Outcome.PARTLY,
                f"to within {median(gaps):.3f}",
                f"In {len(gaps)} models that settle and show a rate, the one predicted by eigenvalues and the "
                f"one observed differ by {median(gaps):.3f} (median), at most {max(gaps):.3f}.",
                {"median difference": median(gaps), "largest difference": max(gaps)},
            )
        )
    return found


def architecture_rows(results: Sequence[CellResult]) -> list[tuple[str, ...]]:
    """A row of a table a design, with ranges over seeds; the columns are `ARCHITECTURE_COLUMNS`."""
    rows: list[tuple[str, ...]] = []
    for (norm, injection, depth), group in by_design(results, lambda cell: (cell.norm, cell.injection, cell.depth)):
        outcomes = Counter(str(each.outcome) for each in group)
        rows.append(
            (
                f"{norm}, {injection}, {depth} layers",
                ", ".join(f"{outcome} ({count})" for outcome, count in outcomes.items()),
                spread([each.degeneracy for each in group]),
                spread([each.norm_growth for each in group], 2),
                spread([each.radius for each in group], 2),
            )
        )
    return rows


def phase_grid(
    *,
    norms: Sequence[NormName] = NORMS,
    injections: Sequence[InjectionName] = INJECTIONS,
    scales: Sequence[float] = SCALES,
    injection_scales: Sequence[float] = (1.0,),
    seeds: int = 2,
    **options: Any,
) -> list[Cell]:
    """All combinations, judged token by token; `options` are further fields of `Cell`."""
    fields = {"depth": 4, "judged": True} | options
    return [
        Cell(norm=norm, injection=injection, std=std, injection_scale=scale, seed=seed, **fields)
        for norm in norms
        for injection in injections
        for scale in (injection_scales if injection != "none" else (1.0,))
        for std in scales
        for seed in range(seeds)
    ]


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """Of one design, over the scale of its weights."""

    norm: NormName
    injection: InjectionName
    injection_scale: float
    scales: tuple[float, ...]
    radius: tuple[float | None, ...]
    """Largest predicted rate, median over seeds; None where no fixed point is known."""
    settles: tuple[float, ...]
    """Share of the tokens that reach a fixed point, or hover at the floor."""
    tends: tuple[Kind, ...]
    """The commonest verdict."""
    predicted: float | None
    """Scale at which the radius crosses 1, between two scales by its logarithm; None where it does not."""
    observed: float | None
    """Scale at which half of the tokens no longer settle, likewise."""


def boundaries(results: Sequence[CellResult]) -> list[Boundary]:
    """Design by design."""
    found = []
    for (norm, injection, scale), group in by_design(
        results, lambda cell: (cell.norm, cell.injection, cell.injection_scale)
    ):
        columns = sorted(by_design(group, lambda cell: cell.std), key=lambda column: float(column[0]))
        scales = tuple(float(std) for std, _ in columns)
        radius = tuple(_median([each.radius for each in cells]) for _, cells in columns)
        settles = tuple(
            sum(each.settled_tokens for each in cells) / max(1, sum(each.judged_tokens for each in cells))
            for _, cells in columns
        )
        found.append(
            Boundary(
                norm=norm,
                injection=injection,
                injection_scale=scale,
                scales=scales,
                radius=radius,
                settles=settles,
                tends=tuple(_commonest(cells) for _, cells in columns),
                predicted=_crossing(scales, [None if value is None else value - 1 for value in radius]),
                observed=_crossing(scales, [0.5 - share for share in settles]),
            )
        )
    return found


def phase_answers(results: Sequence[CellResult]) -> list[Answer]:
    """Do eigenvalues say where stability is lost as weights grow? Seed by seed, with an interval over seeds."""
    found = boundaries(results)
    ratios = _boundary_ratios(results)
    never = [_design(each) for each in found if max(each.settles) < 0.5]
    if not ratios:
        sentence = "In no model were both the scale at which the predicted rate crosses 1 and the one at which tokens "
        sentence += "stop settling within the scales that were run."
        outcome, verdict = Outcome.CANNOT_TELL, "cannot tell"
    else:
        pairs = [
            f"{_design(each)}: {_scale(each.predicted)}, and {_scale(each.observed)} (in a model the first is "
            f"{ratios[_design(each)]} times the second{_over(ratios[_design(each)])})"
            for each in found
            if _design(each) in ratios
        ]
        within = [each.low > 1 / _CLOSE and each.high < _CLOSE for each in ratios.values()]
        apart = [each.low > _CLOSE or each.high < 1 / _CLOSE for each in ratios.values()]
        if all(within):
            outcome, verdict = Outcome.YES, "yes"
        elif any(apart):
            outcome, verdict = Outcome.PARTLY, "roughly" if any(within) else "no"
        else:
            outcome, verdict = Outcome.CANNOT_TELL, "undecided by the seeds"
        sentence = (
            "Standard deviation of the weights at which the predicted rate crosses 1, and at which half of the tokens "
            f"stop settling: {'; '.join(pairs)}."
        )
    if never:
        sentence += f" At no scale do most tokens settle in: {'; '.join(never)}."
    return [
        _BOUNDARY.says(
            outcome,
            verdict,
            sentence,
            {
                f"{each.norm}, {each.injection} x {each.injection_scale:g}": f"predicted {_scale(each.predicted)}, "
                f"observed {_scale(each.observed)}"
                for each in found
            },
            ["A crossing is interpolated between two scales by their logarithm."],
        )
    ]


def _boundary_ratios(results: Sequence[CellResult]) -> dict[str, Interval]:
    """Predicted over observed scale by design, with the interval of its mean logarithm over the seeds that have both;
    all intervals hold together."""
    logarithms: dict[str, list[float]] = {}
    for _, group in by_design(results, lambda cell: cell.seed):
        for each in boundaries(group):
            if each.predicted and each.observed:
                logarithms.setdefault(_design(each), []).append(math.log(each.predicted / each.observed))
    return {
        name: Interval(
            mean=math.exp(one.mean),
            low=math.exp(one.low),
            high=math.exp(one.high),
            values=tuple(map(math.exp, one.values)),
        )
        for name, one in Told.of(logarithms).intervals.items()
    }


def _design(boundary: Boundary) -> str:
    scale = f" x {boundary.injection_scale:g}" if boundary.injection_scale != 1 else ""
    return f"{boundary.norm} with {boundary.injection} injection{scale}"


def _over(found: Interval) -> str:
    return f" over {found.count} seeds" if found.count > 1 else ""


def phase_rows(
    found: Sequence[Boundary], name: Callable[[Kind], str] = str
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The columns of a table, one a scale, and a row a design; `name` says how a kind is called."""
    rows = [
        (
            f"{each.norm}, {each.injection}" + (f" x {each.injection_scale:g}" if each.injection_scale != 1 else ""),
            *(
                name(tends) + ("" if radius is None else f" {radius:.2f}")
                for tends, radius in zip(each.tends, each.radius, strict=True)
            ),
            "–" if each.predicted is None else f"{each.predicted:.3f}",
            "–" if each.observed is None else f"{each.observed:.3f}",
        )
        for each in found
    ]
    return ("design", *(f"{scale:g}" for scale in found[0].scales), "predicted", "observed"), rows


def _crossing(scales: Sequence[float], values: Sequence[float | None]) -> float | None:
    """The first scale at which the values go from below 0 to above, linear in the logarithm of the scale."""
    known = [(math.log(scale), value) for scale, value in zip(scales, values, strict=True) if value is not None]
    for (left, before), (right, after) in itertools.pairwise(known):
        if before < 0 <= after:
            return math.exp(left + (right - left) * before / (before - after))
    return None


def _commonest(cells: Sequence[CellResult]) -> Kind:
    counts = Counter[str]()
    for cell in cells:
        counts.update(cell.verdicts)
    return Kind(max(counts, key=lambda kind: counts[kind])) if counts else Kind.UNKNOWN


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _scale(value: float | None) -> str:
    return "not crossed" if value is None else f"{value:.3f}"
