"""What experiments over random models say, as answers."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from loopscope.answers import Answer, Outcome
from loopscope.findings.architectures import reproduction
from loopscope.findings.phase import boundaries
from loopscope.grids import CellResult

__all__ = ["architecture_answers", "phase_answers"]


def architecture_answers(results: Sequence[CellResult]) -> list[Answer]:
    """Were the paper's outcomes reproduced, and what makes a fixed point?"""
    rows = reproduction(results)
    run = [row for row in rows if row.reproduced is not None]
    yes = sum(row.reproduced is True for row in run)
    failed = [f"{row.norm} with injection {row.injection}" for row in run if not row.reproduced]
    outcome = Outcome.NOT_APPLICABLE if not run else Outcome.YES if yes == len(rows) else Outcome.PARTLY
    sentence = f"{yes} of the {len(rows)} outcomes of arXiv 2604.11791, Figure 6, were found again"
    sentence += f"; not those of {', '.join(failed)}." if failed else "."
    if len(run) < len(rows):
        sentence += f" {len(rows) - len(run)} of them were not run."
    found = [
        Answer(
            key="reproduction",
            question="Are the paper's outcomes reproduced?",
            outcome=outcome,
            verdict=f"{yes} of {len(rows)}",
            sentence=sentence,
            evidence={
                f"{row.norm}, {row.injection} (paper: {row.paper})": ", ".join(
                    f"{count} {name}" for name, count in row.found.items()
                )
                or "not run"
                for row in rows
            },
            figure="architectures-table",
        )
    ]
    gaps = [
        abs(each.radius_median - each.observed_rate)
        for each in results
        if each.outcome == "fixed point" and each.radius_median is not None and each.observed_rate is not None
    ]
    if gaps:
        found.append(
            Answer(
                key="rates",
                question="Do eigenvalues tell how fast a random model settles?",
                outcome=Outcome.YES if median(gaps) < 0.05 else Outcome.PARTLY,
                verdict=f"to within {median(gaps):.3f}",
                sentence=f"In {len(gaps)} models that settle and show a rate, the one predicted by eigenvalues and the "
                f"one observed differ by {median(gaps):.3f} (median), at most {max(gaps):.3f}.",
                evidence={"median difference": median(gaps), "largest difference": max(gaps)},
            )
        )
    return found


def phase_answers(results: Sequence[CellResult]) -> list[Answer]:
    """Do eigenvalues say where stability is lost as weights grow?"""
    found = boundaries(results)
    both = [each for each in found if each.predicted is not None and each.observed is not None]
    never = [f"{each.norm}, {each.injection}" for each in found if max(each.settles) < 0.5]
    if not both:
        sentence = "In no design were both the scale at which the predicted rate crosses 1 and the one at which tokens "
        sentence += "stop settling within the scales that were run."
        outcome, verdict = Outcome.CANNOT_TELL, "cannot tell"
    else:
        pairs = [
            f"{each.norm} with {each.injection} injection: {each.predicted:.3f}, and {each.observed:.3f}"
            for each in both
        ]
        ratios = [max(each.predicted / each.observed, each.observed / each.predicted) for each in both
                  if each.predicted and each.observed]  # fmt: skip
        close = max(ratios) < 1.1
        outcome, verdict = (Outcome.YES, "yes") if close else (Outcome.PARTLY, "roughly")
        sentence = (
            "Standard deviation of the weights at which the predicted rate crosses 1, and at which half of the tokens "
            f"stop settling: {'; '.join(pairs)}."
        )
    if never:
        sentence += f" At no scale do most tokens settle in: {'; '.join(never)}."
    return [
        Answer(
            key="boundary",
            question="Do eigenvalues say where stability is lost as weights grow?",
            outcome=outcome,
            verdict=verdict,
            sentence=sentence,
            evidence={
                f"{each.norm}, {each.injection} x {each.injection_scale:g}": f"predicted {_scale(each.predicted)}, "
                f"observed {_scale(each.observed)}"
                for each in found
            },
            figure="phase-map",
            limits=["A crossing is interpolated between two scales by their logarithm."],
        )
    ]


def _scale(value: float | None) -> str:
    return "not crossed" if value is None else f"{value:.3f}"
