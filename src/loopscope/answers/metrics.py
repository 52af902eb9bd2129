"""What a study says as a flat dictionary of numbers, for those who follow many runs."""

from __future__ import annotations

import math

from loopscope.answers.quick import quick_answers
from loopscope.answers.rates import study_rates
from loopscope.study import Study


def study_metrics(study: Study) -> dict[str, float]:
    """The numbers that the answers rest on, as `QUESTION/NAME`, and the share of the decided tokens that are of each
    kind, as `tokens/KIND`. What is not finite, or was not measured, is absent."""
    found = {
        f"{answer.key}/{name}": value for answer in quick_answers(study) for name, value in answer.evidence.items()
    }
    if "verdict" in study.dataset:
        found |= {f"tokens/{each.kind}": each.share for each in study_rates(study).tokens if each.decided}
    return {
        name.replace(" ", "_"): float(value)
        for name, value in found.items()
        if not isinstance(value, str) and math.isfinite(value)
    }
