"""Where a model settles, asked three ways: has each layer a point of its own, after how many recurrences is the state
there, and is it there at the depth that the model was trained for?"""

from __future__ import annotations

import math

import numpy as np
import xarray
from numpy.typing import NDArray

from loopscope._util.statistics import Share, mean, median
from loopscope._util.wording import percent, plural, significant
from loopscope.answers.answer import Answer, Claim, Criterion, Evidence, Need, Outcome, Question, some_finite
from loopscope.answers.settling import Settling, common_settling, noise_floor, prompt_settling
from loopscope.study import StudyView, without_paths

POINTS = Question(key="points", text="Does each layer have a point of its own?", figure="layer-cosine")
ARRIVAL = Question(key="arrival", text="How many recurrences does it take to settle?", figure="distance")
TRAINED_DEPTH = Question(
    key="trained_depth",
    text="Has it settled at the depth it was trained for?",
    figure="step",
    needs=(
        Need(
            lambda view: view.trained is not None,
            "The model does not say how many recurrences it was trained with.",
            "not known",
        ),
        Need(
            lambda view: view.trained is None or view.trained <= view.recurrences,
            lambda view: f"It was trained with {view.trained} recurrences, but only {view.recurrences} were measured.",
        ),
        Need(
            lambda view: view.trained is None or view.trained < view.horizon,
            lambda view: (
                f"The horizon ({view.horizon}) is not beyond the {view.trained} recurrences of training, so there is "
                "no later state to compare with; set it higher."
            ),
            "horizon too early",
        ),
        some_finite("there is no state to follow"),
    ),
    drawn=lambda view: True,
)


def points_answer(view: StudyView, criterion: Criterion) -> Answer:
    """Judge by the least similar layer, of the prompts that settle: the smallest cosine of its state at the horizon
    with that of layer 0. A prompt of which only the direction settles has directions to compare."""
    if view.recurrent == 1:
        return POINTS.unanswered(
            "only one layer", "The recurrent block has a single layer, so there is only one point."
        )
    kinds = prompt_settling(view, criterion)
    has_points = np.array([kind.settles or kind is Settling.DIRECTION_ONLY for kind in kinds])
    undecided = sum(not kind.decided for kind in kinds)
    cosines = view.dataset["degeneracy"].values
    values = cosines[has_points]
    if not len(values):
        anywhere = median(cosines)
        there = f" At the horizon itself the least similar layer has cosine {anywhere:.3f} with layer 0 (median over "
        there = f"{there}prompts)." if math.isfinite(anywhere) else ""
        evidence: Evidence = {"smallest_cosine_to_layer_0": anywhere} if there else {}
        if undecided:
            open_ = (
                f"Cannot tell: no prompt is seen to settle, and {undecided} of {len(kinds)} "
                f"{'is' if undecided == 1 else 'are'} undecided."
            )
            return POINTS.says(Outcome.CANNOT_TELL, "not settled yet", open_ + there, evidence)
        none = "No prompt comes to rest in every layer, so there are no points to compare."
        return POINTS.says(Outcome.NOT_APPLICABLE, "no points", none + there, evidence)

    shared = shares_point(view.dataset, criterion)[has_points]
    judged = shared[np.isfinite(shared)]
    same = Share(int(judged.sum()), len(judged))
    needed = criterion.prompts_needed
    unrelated = median(_unrelated(view.dataset)[has_points])
    evidence = {
        "smallest_cosine_to_layer_0": median(values),
        "range_over_prompts": f"{values.min():.3f} to {values.max():.3f}",
        "the_same_between_unrelated_tokens": unrelated,
        "prompts_with_one_shared_point": str(same),
    }
    cosine = f"the least similar layer has cosine {median(values):.3g} with layer 0"
    limits = []
    if math.isfinite(unrelated):
        cosine += f", while unrelated tokens, half a prompt apart, have {unrelated:.3g}"
    else:
        limits.append("There are no unrelated tokens to compare the layers with; cosine 0 is assumed for them.")
    if not len(judged):
        outcome, verdict = Outcome.CANNOT_TELL, "cannot tell"
        sentence = (
            f"Cannot tell: unrelated tokens share one direction too. At the horizon {cosine} (medians over prompts)."
        )
    elif same.value >= needed:
        outcome, verdict = Outcome.NO, "all share the same one"
        sentence = (
            f"The same one: all layers end in one direction, in {same}. At the horizon {cosine} (medians over "
            "prompts). The block does not cycle through several points."
        )
    elif 1 - same.value >= needed:
        outcome, verdict = Outcome.YES, "one per layer"
        sentence = (
            f"One per layer, in {Share(same.total - same.count, same.total)}. At the horizon {cosine} (medians over "
            "prompts). The block runs through a cycle of points."
        )
    else:
        outcome, verdict = Outcome.PARTLY, "depends on the prompt"
        sentence = f"It depends on the prompt: all layers share one point in {same}; {cosine} (medians over prompts)."
    if len(values) < len(kinds):
        verdict += ", where it settles"
        sentence += f" Only these {len(values)} of {len(kinds)} prompts settle" + (
            f"; {undecided} {'is' if undecided == 1 else 'are'} undecided." if undecided else "."
        )
    directions = kinds.count(Settling.DIRECTION_ONLY)
    if directions:
        limits.append(
            f"Of {plural(directions, 'prompt')} only directions have settled; a cosine does not see that norms differ."
        )
    claims = [Claim.POINTS] if len(judged) and all(kind.settles for kind in kinds) else []
    return POINTS.says(outcome, verdict, sentence, evidence, limits, claims=claims)


def shares_point(data: xarray.Dataset, criterion: Criterion) -> NDArray[np.float64]:
    """Of each prompt: 1 if all layers share one point, 0 if not, NaN where tokens that have nothing to do with each
    other share one too, so that nothing can be told. Right angles stand in where there are no such tokens."""
    apart, unrelated = 1 - data["degeneracy"].values, 1 - np.nan_to_num(_unrelated(data))
    shared = (apart <= criterion.degenerate_share * unrelated).astype(np.float64)
    return np.where((unrelated > criterion.degenerate_share) & np.isfinite(apart), shared, np.nan)


def _unrelated(data: xarray.Dataset) -> NDArray[np.float64]:
    """The least cosine of layers at unrelated tokens; NaN where a prompt has one token, and in older studies."""
    if "unrelated_degeneracy" not in data:
        return np.full(data.sizes["prompt"], np.nan)
    return data["unrelated_degeneracy"].values.astype(np.float64)


def arrival_answer(view: StudyView, criterion: Criterion) -> Answer:
    """Count to the slowest layer, and take the median over the prompts that settle. Asked only where there is a point
    to arrive at."""
    settled = common_settling(view, criterion)
    if settled is None or not settled.settles:
        reasons: dict[Settling | None, str] = {
            Settling.NOT_YET: "It has not settled by the horizon, so there is no known point to arrive at.",
            Settling.CANNOT_TELL: "Whether it settles is not known, so there is no known point to arrive at.",
            Settling.DIRECTION_ONLY: "Only its direction settles: there is no point at a finite distance to arrive at.",
            None: "Too few prompts reach a fixed point for a common number.",
        }
        return ARRIVAL.unanswered(
            "no point to reach" if settled is None or settled.decided else "not by this horizon",
            reasons.get(settled, "It arrives at no fixed point."),
            figure=ARRIVAL.figure,
        )

    kinds = prompt_settling(view, criterion)
    data = without_paths(view.dataset).isel(prompt=np.flatnonzero([kind.settles for kind in kinds]))
    floor = median(noise_floor(data).max("layer").values)
    rounding = criterion.floor_factor * floor if np.isfinite(floor) else 0.0
    level = max(criterion.reached_level, rounding)
    by_layer = arrival(data["relative_distance"], level)
    slowest = by_layer.max(axis=0)
    reached = slowest[np.isfinite(slowest)]
    evidence: Evidence = {"level": level, "prompts_reached": f"{len(reached)} of {len(slowest)}"}
    limits: list[str] = []
    if rounding > criterion.reached_level:
        limits.append(
            f"Rounding in {view.dtype} forced the level up from {percent(criterion.reached_level)} to {percent(level)}."
        )
    if view.recurrences == view.horizon:
        limits.append("The last distance measured is 0 by construction: it is taken at the horizon itself.")

    within = f"within {percent(level)} of its state at the horizon, and stays there, in every layer"
    middle = _middle(slowest)
    if np.isfinite(middle):
        outcome, verdict = Outcome.YES, f"about {middle:.0f}"
        layers = [_middle(row) for row in by_layer]
        extent = (
            f"range {reached.min():.0f} to {reached.max():.0f}" if reached.min() < reached.max() else "the same for all"
        )
        sentence = f"After {plural(int(middle), 'recurrence')} the state is {within} (median over prompts; {extent})."
        if min(layers) < max(layers):
            sentence += f" By layer the medians run from {min(layers):.0f} to {max(layers):.0f}."
        evidence |= {
            "recurrences_median": middle,
            "recurrences_least": float(reached.min()),
            "recurrences_most": float(reached.max()),
            "medians_by_layer": ", ".join(f"{value:.0f}" for value in layers),
        }
        if len(reached) < len(slowest):
            limits.append(
                f"{plural(len(slowest) - len(reached), 'prompt')} did not arrive within the {view.recurrences} "
                "recurrences measured; the median counts them as later, the range leaves them out."
            )
    else:
        outcome, verdict = Outcome.CANNOT_TELL, f"more than {view.recurrences}"
        sentence = (
            f"More than the {view.recurrences} measured: by then only {len(reached)} of {len(slowest)} prompts are "
            f"{within}. Measure more recurrences to see it arrive."
        )
    return ARRIVAL.says(outcome, verdict, sentence, evidence, limits, claims=[Claim.ARRIVES])


def arrival(relative_distance: xarray.DataArray, level: float) -> NDArray[np.float64]:
    """Recurrences, counted from 1, after which the distance is within `level` and stays there to the end of what was
    measured. Shape (layer, prompt); infinite where that does not happen.
    """
    within = relative_distance.transpose("recurrence", "layer", "prompt").values <= level
    stays = np.logical_and.accumulate(within[::-1], axis=0)[::-1]
    return np.where(stays[-1], stays.argmax(axis=0) + 1.0, np.inf)


def trained_depth_answer(view: StudyView, criterion: Criterion) -> Answer:
    """Compare the trained number of recurrences with the last one measured (medians over prompts, layer that is
    farthest)."""
    trained = view.trained
    assert trained is not None  # which the question needs

    step = _median_by_recurrence(view, "relative_step")
    distance = _median_by_recurrence(view, "relative_distance")
    there, last = trained - 1, view.recurrences - 1
    evidence: Evidence = {
        "trained_recurrences": float(trained),
        "relative_distance_at_trained": distance[there],
        "relative_step_at_trained": step[there],
        "relative_distance_at_last": distance[last],
        "relative_step_at_last": step[last],
    }
    far = distance[there] > criterion.reached_level
    # The first recurrence has no step (NaN compares as False); its distance alone decides.
    moving = step[there] > criterion.drift_tolerance
    state = (
        f"After the {plural(trained, 'recurrence')} of training it is {percent(distance[there])} away from its "
        f"state at recurrence {view.horizon}"
    )
    if math.isfinite(step[there]):
        state += f", and the last of them moved it by {percent(step[there])}"
    later = (
        f"; after {view.recurrences} it is {percent(distance[last])} away" if there < last < view.horizon - 1 else ""
    )
    outcome, verdict, answer = _settled_there(far or moving, common_settling(view, criterion))
    sentence = f"{answer} {state}{later}." + _loss_sentence(view, trained, evidence)
    limits = []
    if view.recurrences == trained:
        limits.append("Beyond the trained depth only the horizons were measured.")
    claims = [Claim.SETTLED_AT_DEPTH] if outcome is Outcome.YES else []
    return TRAINED_DEPTH.says(outcome, verdict, sentence, evidence, limits, claims=claims)


def _settled_there(moves: bool, settled: Settling | None) -> tuple[Outcome, str, str]:
    """Outcome, verdict and first words: a state that moves by little has not settled where it never does."""
    if moves:
        return Outcome.NO, "no, still moving", "No, it is still moving."
    if settled is None:
        return Outcome.PARTLY, "where it settles at all", "Where it settles at all, which depends on the prompt."
    if settled.settles:
        return Outcome.YES, "yes", "Yes."
    if settled.decided:
        return Outcome.NO, "no, it moves on", "No: it moves little there, but it does not settle at all."
    return Outcome.CANNOT_TELL, "cannot tell", "Cannot tell: it moves little there, but may go on moving."


def _median_by_recurrence(view: StudyView, name: str) -> list[float]:
    """Of the layer with the largest value, median over the finite prompts."""
    values = view.finite[name].max("layer").transpose("recurrence", "prompt").values
    return [median(row) for row in values]


def _loss_sentence(view: StudyView, trained: int, evidence: Evidence) -> str:
    """What the loss does beyond the trained depth, if it was read out at both ends."""
    if "loss" not in view.finite:
        return ""
    loss = view.finite["loss"]
    readouts = [int(value) for value in loss["readout_recurrence"].values]
    if trained not in readouts or readouts[-1] <= trained:
        return ""
    means = [mean(loss.sel(readout_recurrence=at).values) for at in (trained, readouts[-1])]
    if not all(math.isfinite(each) for each in means):
        return ""
    evidence |= {"loss_at_trained": means[0], "loss_at_last": means[1]}
    return f" The loss is {significant(means[0], 3)} nats there and {significant(means[1], 3)} after {readouts[-1]}."


def _middle(counts: NDArray[np.float64]) -> float:
    """Median that is itself one of the counts, so that prompts which never arrive (infinite) need no averaging."""
    return float(np.quantile(counts, 0.5, method="inverted_cdf"))
