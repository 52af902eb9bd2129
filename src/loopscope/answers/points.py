"""One point per layer, or the same one?"""

from __future__ import annotations

import numpy as np

from loopscope.answers.answer import Answer, Outcome
from loopscope.answers.criterion import Criterion
from loopscope.answers.fixed_point import common_settling
from loopscope.answers.settling import Settling
from loopscope.answers.statistics import Share, median
from loopscope.answers.view import StudyView

__all__ = ["points_answer"]


def points_answer(view: StudyView, criterion: Criterion) -> Answer:
    """Judge by the least similar layer: the smallest cosine of its state at the horizon with that of layer 0."""
    settled = common_settling(view, criterion)
    values = view.finite["degeneracy"].values
    values = values[np.isfinite(values)]
    same = Share(int((values > criterion.degenerate_cosine).sum()), len(values))
    needed = criterion.prompts_needed

    limits: list[str] = []
    evidence: dict[str, float | str] = {}
    if len(values):
        evidence = {
            "smallest_cosine_to_layer_0": median(values),
            "range_over_prompts": f"{values.min():.3f} to {values.max():.3f}",
            "prompts_with_one_shared_point": str(same),
        }
    cosine = f"the least similar layer has cosine {median(values):.3f} with layer 0"
    if view.layers == 1:
        outcome, verdict = Outcome.NOT_APPLICABLE, "only one layer"
        sentence = "The recurrent block has a single layer, so there is only one point."
    elif not len(values) or settled in (Settling.NO_FIXED_POINT, Settling.DIVERGED):
        outcome, verdict = Outcome.NOT_APPLICABLE, "no points"
        sentence = "Without a fixed point the layers have no points to compare."
        if len(values):
            sentence += f" At the horizon itself {cosine} (median over prompts)."
    elif settled is Settling.STILL_CONVERGING:
        outcome, verdict = Outcome.CANNOT_TELL, "not settled yet"
        sentence = (
            f"Cannot tell: the layers have not settled by the horizon. There {cosine} (median over prompts; all layers "
            f"within one direction in {same})."
        )
    elif same.value >= needed:
        outcome, verdict = Outcome.NO, "all share the same one"
        sentence = (
            f"The same one: all layers end at one direction, in {same}. At the horizon {cosine} (median over "
            "prompts), so the cycle through the block is no cycle."
        )
    elif 1 - same.value >= needed:
        outcome, verdict = Outcome.YES, "one per layer"
        sentence = (
            f"One per layer, in {Share(same.total - same.count, same.total)}. At the horizon {cosine} (median over "
            "prompts): the block runs through a cycle of points."
        )
    else:
        outcome, verdict = Outcome.PARTLY, "depends on the prompt"
        sentence = f"It depends on the prompt: all layers share one point in {same}; {cosine} (median over prompts)."
    if outcome is not Outcome.NOT_APPLICABLE and settled is Settling.DIRECTION_ONLY:
        limits.append("Only directions have settled; a cosine does not see that the norms differ.")
    return Answer(
        key="points",
        question="Does each layer have a point of its own?",
        outcome=outcome,
        verdict=verdict,
        sentence=sentence,
        evidence=evidence,
        figure="layer-cosine",
        limits=limits,
        criterion=criterion,
    )
