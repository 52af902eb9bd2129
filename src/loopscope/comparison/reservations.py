"""What limits the answers of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loopscope.answers import Answer, Outcome
from loopscope.answers.wording import listed, plural
from loopscope.comparison.result import Comparison

__all__ = ["limits_answer"]


def limits_answer(comparison: Comparison) -> Answer:
    """Limits of this comparison first, then those of the method."""
    found = [
        "The null shuffles layers, which makes rougher curves than models have: two that merely rise with depth are "
        "called alike, and so are 16 % of pairs of independent random walks over 8 layers. It says that the order of "
        "the layers matters, not that the models compute the same.",
        f"Each p stands for one comparison; of many, {100 * comparison.settings.alpha:g} in 100 fall below "
        f"{comparison.settings.alpha:g} by chance. The mean over measures is one comparison for all of them.",
        "Correlation is blind to level and scale; the level difference beside it is not.",
    ]
    own = [sentence for label in comparison.labels for sentence in _of_study(comparison, label)]
    return Answer(
        key="limits",
        question="What limits these answers?",
        outcome=Outcome.NOT_APPLICABLE,
        verdict=plural(len(own), "reservation") if own else "those of the method",
        sentence=" ".join(own) or "Nothing that these studies themselves show.",
        figure="limits",
        limits=[*own, *found],
    )


def _of_study(comparison: Comparison, label: str) -> list[str]:
    study = comparison.studies[label]
    reference = comparison.studies[comparison.reference]
    found = []
    if label != comparison.reference and not study["same_prompts_as_reference"]:
        if not study["same_model_as_reference"]:
            found.append(
                f"{label} and {comparison.reference} read different prompts: their differences mix model and text."
            )
        tokens = [_tokens_a_prompt(entry) for entry in (study, reference)]
        if tokens[0] and tokens[1] and not 2 / 3 < tokens[0] / tokens[1] < 3 / 2:
            found.append(
                f"The prompts of {label} have {tokens[0]:.0f} tokens on average, those of {comparison.reference} "
                f"{tokens[1]:.0f}; the levels of attention concentration and sink rate depend on length."
            )
    if study["dtype"] != reference["dtype"]:
        found.append(f"{label} ran in {study['dtype']}, {comparison.reference} in {reference['dtype']}.")
    if study["missing"]:
        found.append(f"{label} has no {listed(study['missing'])}.")
    if study["diverged_prompts"]:
        found.append(f"{plural(study['diverged_prompts'], 'prompt')} of {label} diverged and are left out.")
    if study["recurrences"] and study["trained_recurrences"] is None:
        found.append(f"{label} does not say what it was trained for, so its last measured recurrence is judged.")
    return found


def _tokens_a_prompt(study: Mapping[str, Any]) -> float:
    prompts = study["prompts"]
    return prompts["tokens"] / prompts["count"] if prompts["tokens"] and prompts["count"] else 0.0
