"""What a sweep over trained models says: designs ranked, with intervals over seeds, and advice with its evidence."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import special

from loopscope.answers.answer import Answer, Evidence, Outcome, Question
from loopscope.experiments.cells import spread
from loopscope.experiments.sweep import control_config
from loopscope.experiments.sweep_cells import ControlName, SweepResult

KEPT = 0.01
"""A loss is as good as another if it is at most this much larger, as a share."""
KEPT_NATS = 0.01
"""A loss is kept if it is as good, or at most this many nats larger: a share of a loss near 0 is below what matters."""
TRAINING_COLUMNS = (
    "design",
    "layout",
    "parameters",
    "loss",
    "loss beyond",
    "kept",
    "accuracy",
    "settled",
    "rate",
    "stages repeat",
)
"""Of `training_rows`."""
_LEVEL = 0.95
_MOST_NAMES = 4
"""In a sentence."""
_KEEPERS = Question(
    key="keepers", text="Which designs keep their loss beyond the trained depth?", figure="training-ranking"
)
_RECIPES = Question(key="recipes", text="Does a recipe settle at no cost?", figure="training-ranking")
_SETTLING = Question(key="settling", text="Do models that settle keep their loss?", figure="training-table")
_DEPTH = Question(key="depth", text="Do recurrences pay?", figure="training-curves")


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The mean over seeds, with Student's 95 % interval of it; with one seed the interval is unknown (infinite)."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        if self.count < 2:
            return f"{self.mean:.3f} (one seed)"
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True, kw_only=True)
class DesignSummary:
    """One design over its seeds."""

    name: str
    control: ControlName | None
    results: tuple[SweepResult, ...]
    loss: Interval
    """At the trained number of recurrences, nats."""
    beyond: Interval
    """At the largest number."""
    accuracy: Interval
    kept: int
    """Seeds whose loss at the largest number is at most 1 %, or 0.01 nats, above that at the trained one."""
    settled: float | None
    """Share of the judged tokens that reach a fixed point or hover at the floor; None where none was judged."""
    radius: tuple[float, float] | None
    """Least and largest predicted rate over seeds, of the tokens whose fixed point is known."""
    outcomes: dict[str, int]
    repetition: float | None
    """Mean over measures and seeds of the share of variance that goes with the layer: 1 where every pass is alike."""


def interval(values: Sequence[float]) -> Interval:
    """The mean of some values with Student's interval."""
    mean, count = fmean(values), len(values)
    if count < 2:
        return Interval(mean=mean, low=-math.inf, high=math.inf, count=count)
    half = float(special.stdtrit(count - 1, 0.5 + _LEVEL / 2)) * stdev(values) / math.sqrt(count)
    return Interval(mean=mean, low=mean - half, high=mean + half, count=count)


def summaries(results: Sequence[SweepResult]) -> list[DesignSummary]:
    """Designs by their mean loss at the trained number of recurrences, the best first; controls among them."""
    groups: dict[tuple[str, ControlName | None], list[SweepResult]] = {}
    for result in results:
        groups.setdefault((result.cell.design, result.cell.control), []).append(result)
    found = [_summary(name, control, group) for (name, control), group in groups.items()]
    return sorted(found, key=lambda each: each.loss.mean)


def training_rows(found: Sequence[DesignSummary]) -> list[tuple[str, ...]]:
    """A row of a table a design; the columns are `TRAINING_COLUMNS`."""
    return [
        (
            each.name,
            each.results[0].layout,
            f"{each.results[0].parameters:,}",
            str(each.loss),
            str(each.beyond) if each.control is None else "–",
            f"{each.kept} of {len(each.results)}" if each.control is None else "–",
            f"{100 * each.accuracy.mean:.1f} %",
            "–" if each.settled is None else f"{100 * each.settled:.0f} %",
            "–" if each.radius is None else spread(each.radius, 2),
            "–" if each.repetition is None else f"{100 * each.repetition:.0f} %",
        )
        for each in found
    ]


def control_results(results: Sequence[SweepResult], of: SweepResult, control: ControlName) -> SweepResult | None:
    """The feed-forward model that a looped one is held against, of the same seed; None where it was not trained.

    One model may be as deep as one design and as large as another.
    """
    wanted = control_config(of.cell.config, control)
    return next((each for each in results if each.cell.control is not None and each.cell.config == wanted), None)


def advice(results: Sequence[SweepResult]) -> list[Answer]:
    """For somebody who trains such models: what the numbers of this sweep support, and no more."""
    found = summaries(results)
    looped = [each for each in found if each.control is None]
    asked: list[Callable[[], Answer | None]] = [
        lambda: _keepers(looped),
        lambda: _recipe(looped),
        lambda: _verdicts_and_losses(results),
        lambda: _depth_pays(results),
        lambda: _against(results, "equal-parameters", "its layers, run once each"),
        lambda: _against(results, "equal-depth", "as many layers as it applies"),
    ]
    return [each for ask in asked if (each := ask()) is not None]


def _summary(name: str, control: ControlName | None, group: list[SweepResult]) -> DesignSummary:
    dynamics = [each.dynamics for each in group if each.dynamics is not None]
    radii = [each.radius for each in dynamics if each.radius is not None]
    judged = sum(each.judged_tokens for each in dynamics)
    shares = [
        share
        for each in group
        if each.stages is not None
        for share in each.stages.repetition.values()
        if share is not None
    ]
    return DesignSummary(
        name=name,
        control=control,
        results=tuple(group),
        loss=interval([each.loss_at_trained for each in group]),
        beyond=interval([each.loss_beyond for each in group]),
        accuracy=interval([each.accuracy[each.trained] for each in group]),
        kept=sum(_keeps(each) for each in group),
        settled=sum(each.settled_tokens for each in dynamics) / judged if judged else None,
        radius=(min(radii), max(radii)) if radii else None,
        outcomes=dict(Counter(str(each.outcome) for each in dynamics).most_common()),
        repetition=fmean(shares) if shares else None,
    )


def _keeps(result: SweepResult) -> bool:
    return result.loss_beyond - result.loss_at_trained <= max(KEPT * result.loss_at_trained, KEPT_NATS)


def _keepers(looped: Sequence[DesignSummary]) -> Answer | None:
    if not looped:
        return None
    keep = [each.name for each in looped if each.kept == len(each.results)]
    lose = [each for each in looped if each.kept == 0]
    most = max(max(each.results[0].loss) / each.results[0].trained for each in looped)
    sentence = (
        f"{len(keep)} of {len(looped)} designs keep their loss at {most:g} times the trained recurrences in every seed "
        f"(at most {100 * KEPT:g} %, or {KEPT_NATS:g} nats, more): {_listed(keep) or 'none'}."
    )
    if lose:
        worst = max(lose, key=lambda each: each.beyond.mean - each.loss.mean)
        sentence += (
            f" {len(lose)} lose it in every seed ({_listed([each.name for each in lose])}), most of all {worst.name}: "
            f"from {worst.loss.mean:.3f} to {worst.beyond.mean:.3f} nats."
        )
    return _KEEPERS.says(
        Outcome.PARTLY if keep and lose else Outcome.YES if keep else Outcome.NO,
        f"{len(keep)} of {len(looped)}",
        sentence,
        {
            each.name: f"{each.loss.mean:.4f} to {each.beyond.mean:.4f} nats, kept in {each.kept} of "
            f"{len(each.results)}"
            for each in looped
        },
    )


def _recipe(looped: Sequence[DesignSummary]) -> Answer | None:
    """Whether a recipe settles at no cost, where there is a plain one that does not keep its loss."""
    plain = next((each for each in looped if each.name in ("plain", "base")), None)
    if plain is None or len(looped) < 2 or plain.kept == len(plain.results):
        return None
    good = [
        each
        for each in looped
        if each is not plain and each.kept == len(each.results) and each.loss.mean <= (1 + KEPT) * plain.loss.mean
    ]
    lost = f"{plain.name} goes from {plain.loss.mean:.3f} to {plain.beyond.mean:.3f} nats"
    costs: Evidence = {
        each.name: f"{100 * (each.loss.mean / plain.loss.mean - 1):+.1f} % of the loss, kept in {each.kept} of "
        f"{len(each.results)}"
        for each in looped
        if each is not plain
    }
    if not good:
        none = f"No recipe is within 1 % of the plain loss and keeps it in every seed, where {lost}."
        return _RECIPES.says(Outcome.NO, "none of these", none, costs)
    best = min(good, key=lambda each: each.loss.mean)
    return _RECIPES.says(
        Outcome.YES,
        f"yes, {best.name}",
        f"Within 1 % of the plain loss, or below it, and kept in every seed, where {lost}: "
        f"{_listed([each.name for each in good])}. The best is {best.name}, {best.loss.mean:.3f} to "
        f"{best.beyond.mean:.3f} nats.",
        costs,
    )


def _verdicts_and_losses(results: Sequence[SweepResult]) -> Answer | None:
    """Do models whose tokens settle keep their loss?"""
    counts: dict[bool, list[bool]] = {True: [], False: []}
    for each in results:
        if each.dynamics is not None and each.dynamics.judged_tokens:
            most_settle = 2 * each.dynamics.settled_tokens > each.dynamics.judged_tokens
            counts[most_settle].append(_keeps(each))
    if not counts[True] or not counts[False]:
        return None
    yes, no = counts[True], counts[False]
    if sum(yes) * len(no) <= sum(no) * len(yes):
        outcome = Outcome.NO
    else:
        outcome = Outcome.YES if 2 * sum(yes) > len(yes) else Outcome.PARTLY
    settled, others = f"{sum(yes)} of {len(yes)}", f"{sum(no)} of {len(no)}"
    return _SETTLING.says(
        outcome,
        f"{settled}, against {others}",
        f"Where most tokens reach a fixed point, {settled} models keep their loss; where they do not, {others} do.",
        {"settled and kept": settled, "not settled and kept": others},
    )


def _depth_pays(results: Sequence[SweepResult]) -> Answer | None:
    looped = [each for each in results if each.cell.control is None and each.trained > 1]
    if not looped:
        return None
    gains = [each.loss[1] - each.loss_at_trained for each in looped]
    accuracy = [each.accuracy[each.trained] - each.accuracy[1] for each in looped]
    better = sum(gain > KEPT * each.loss_at_trained for gain, each in zip(gains, looped, strict=True))
    return _DEPTH.says(
        Outcome.YES if 2 * better > len(looped) else Outcome.NO,
        f"in {better} of {len(looped)} models",
        f"In {better} of {len(looped)} models the trained number of recurrences does better than the first, "
        f"by {fmean(gains):.3f} nats and {100 * fmean(accuracy):.1f} points of accuracy on average.",
        {"mean gain, nats": fmean(gains), "mean gain, accuracy": fmean(accuracy)},
    )


def _against(results: Sequence[SweepResult], control: ControlName, what: str) -> Answer | None:
    pairs = [
        (each, other)
        for each in results
        if each.cell.control is None and (other := control_results(results, each, control)) is not None
    ]
    if not pairs:
        return None
    gaps = [one.loss_at_trained - other.loss_at_trained for one, other in pairs]
    better = sum(gap < 0 for gap in gaps)
    share = fmean(one.parameters / other.parameters for one, other in pairs)
    middle = sorted(gaps)[len(gaps) // 2]
    question = Question(
        key=f"against-{control}",
        text=f"Does the loop beat a feed-forward model of {what}?",
        figure="training-table",
    )
    return question.says(
        Outcome.YES if 2 * better > len(pairs) else Outcome.NO,
        f"in {better} of {len(pairs)} pairs",
        f"Against a feed-forward model of {what} (the looped one has {100 * share:.0f} % of its parameters on "
        f"average), the looped one has the lower loss in {better} of {len(pairs)} pairs of one seed; the middle "
        f"difference is {middle:+.3f} nats.",
        {
            f"{one.cell.design}, seed {one.cell.seed}": f"{gap:+.4f} nats"
            for (one, _), gap in zip(pairs, gaps, strict=True)
        },
    )


def _listed(names: Sequence[str]) -> str:
    """The evidence has all of them."""
    more = [f"{len(names) - _MOST_NAMES} more"] if len(names) > _MOST_NAMES else []
    return "; ".join([*names[:_MOST_NAMES], *more])
