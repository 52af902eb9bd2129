"""What a sweep over trained models says: designs ranked, with intervals over seeds, and advice that the seeds carry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from loopscope._util.statistics import cluster_interval
from loopscope._util.wording import plural, significant
from loopscope.answers.answer import Answer, Evidence, Outcome, Question
from loopscope.experiments.cells import spread
from loopscope.experiments.seeds import Interval, Told, fisher_p, interval
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
BIGRAM = "bigram table fitted to the test text"
_MOST_NAMES = 4
"""In a sentence."""
_BIGRAM = Question(key="bigram", text="Have these models learnt more than pairs of tokens?", figure="training-table")
_KEEPERS = Question(
    key="keepers", text="Which designs keep their loss beyond the trained depth?", figure="training-ranking"
)
_RECIPES = Question(key="recipes", text="Does a recipe settle at no cost?", figure="training-ranking")
_SETTLING = Question(key="settling", text="Do designs that settle keep their loss?", figure="training-table")
_DEPTH = Question(key="depth", text="Do more recurrences help?", figure="training-curves")


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
    excess: Interval
    """What the loss at the largest number is above that at the trained one and the 1 % of it, or 0.01 nats, that count
    as kept. The intervals of all looped designs hold together."""
    settled: tuple[float, float, float] | None
    """Share of the judged tokens that reach a fixed point or hover at the floor, with its 95 % interval, in which a
    seed's tokens are one cluster; None where none was judged."""
    radius: tuple[float, float] | None
    """Least and largest predicted rate over seeds, of the tokens whose fixed point is known."""
    repetition: float | None
    """Mean over measures and seeds of the share of variance that goes with the layer: 1 where every pass is alike."""

    @property
    def kept(self) -> int:
        """Seeds whose loss is kept."""
        return sum(excess(each) <= 0 for each in self.results)

    @property
    def kept_text(self) -> str:
        """What the seeds carry, and how many of them kept it."""
        said = {-1: "yes", 0: "undecided", 1: "no"}[self.excess.side]
        return f"{said}, {self.kept} of {len(self.results)}"


def excess(result: SweepResult) -> float:
    """Of the loss at the largest number of recurrences over the largest that counts as kept, nats."""
    return result.loss_beyond - result.loss_at_trained - max(KEPT * result.loss_at_trained, KEPT_NATS)


def summaries(results: Sequence[SweepResult]) -> list[DesignSummary]:
    """Designs by their mean loss at the trained number of recurrences, the best first; controls among them."""
    groups: dict[tuple[str, ControlName | None], list[SweepResult]] = {}
    for result in results:
        groups.setdefault((result.cell.design, result.cell.control), []).append(result)
    looped = max(1, sum(control is None and len(group) > 1 for (_, control), group in groups.items()))
    found = [_summary(name, control, group, looped) for (name, control), group in groups.items()]
    return sorted(found, key=lambda each: each.loss.mean)


def bigram_lines(results: Sequence[SweepResult]) -> dict[str, float]:
    """Losses of a bigram table fitted to the very test text, by what they are called: one for each vocabulary.

    A table fitted to other text has a larger one, so a model below the line has learnt more than pairs of tokens; one
    above it may have.
    """
    found = {each.cell.config.architecture.vocab_size: each.bigram_entropy for each in results}
    one = len(found) == 1
    return {BIGRAM if one else f"{BIGRAM}, vocabulary of {size}": value for size, value in sorted(found.items())}


def training_rows(found: Sequence[DesignSummary]) -> list[tuple[str, ...]]:
    """A row of a table a design, and one a bigram table, the lowest loss first; the columns are `TRAINING_COLUMNS`."""
    rows: list[tuple[float, tuple[str, ...]]] = [
        (
            each.loss.mean,
            (
                each.name,
                each.results[0].layout,
                f"{each.results[0].parameters:,}",
                str(each.loss),
                str(each.beyond) if each.control is None else "–",
                each.kept_text if each.control is None else "–",
                f"{100 * each.accuracy.mean:.1f} %",
                "–" if each.settled is None else "{:.0f} % ({:.0f} to {:.0f})".format(*(100 * x for x in each.settled)),
                "–" if each.radius is None else spread(each.radius, 2),
                "–" if each.repetition is None else f"{100 * each.repetition:.0f} %",
            ),
        )
        for each in found
    ]
    for name, value in bigram_lines([one for each in found for one in each.results]).items():
        rows.append((value, (name, "–", "–", f"{value:.3f}", *["–"] * 6)))
    return [row for _, row in sorted(rows, key=lambda each: each[0])]


def control_results(results: Sequence[SweepResult], of: SweepResult, control: ControlName) -> SweepResult | None:
    """The feed-forward model that a looped one is held against, of the same seed; None where it was not trained.

    One model may be as deep as one design and as large as another.
    """
    wanted = control_config(of.cell.config, control)
    return next((each for each in results if each.cell.control is not None and each.cell.config == wanted), None)


def advice(results: Sequence[SweepResult]) -> list[Answer]:
    """For somebody who trains such models: what the seeds of this sweep carry, and where they do not tell."""
    found = summaries(results)
    looped = [each for each in found if each.control is None]
    asked: list[Callable[[], Answer | None]] = [
        lambda: _above_bigram(looped),
        lambda: _keepers(looped),
        lambda: _recipe(looped),
        lambda: _settling(looped),
        lambda: _depth_pays(looped),
        lambda: _against(looped, results, "equal-parameters", "the same layers, each run once"),
        lambda: _against(looped, results, "equal-depth", "as many layers as it applies"),
    ]
    answers = [each for ask in asked if looped and (each := ask()) is not None]
    # A reservation about all the others comes first; where there is none it is no news.
    return [*answers[1:], answers[0]] if answers and answers[0].outcome is Outcome.YES else answers


def _summary(name: str, control: ControlName | None, group: list[SweepResult], looped: int) -> DesignSummary:
    dynamics = [each.dynamics for each in group if each.dynamics is not None]
    radii = [each.radius for each in dynamics if each.radius is not None]
    settled = np.array([each.settled_tokens for each in dynamics])
    judged = np.array([each.judged_tokens for each in dynamics])
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
        excess=interval([excess(each) for each in group], looped),
        settled=(settled.sum() / judged.sum(), *cluster_interval(settled, judged)) if judged.sum() else None,
        radius=(min(radii), max(radii)) if radii else None,
        repetition=fmean(shares) if shares else None,
    )


def _above_bigram(looped: Sequence[DesignSummary]) -> Answer:
    told = Told.of({each.name: [one.loss_at_trained - one.bigram_entropy for one in each.results] for each in looped})
    below = told.on(-1)
    lines = " or ".join(f"{value:.3f}" for value in bigram_lines([r for each in looped for r in each.results]).values())
    sentence = (
        f"A {BIGRAM} itself has a loss of {lines} nats; one fitted to other text would have a higher one. "
        f"{_counted(told, 'Below it', 'Above it')}"
    )
    if not below:
        sentence += " The other answers are about models that may have learnt no more than pairs of tokens."
    return _BIGRAM.says(
        # Above the line of the very test text is no proof: a table of other text lies higher.
        _outcome(told) if below else Outcome.CANNOT_TELL,
        f"{len(below)} of {len(looped)} designs",
        sentence,
        {name: f"{each} nats from it" for name, each in told.intervals.items()},
    )


def _keepers(looped: Sequence[DesignSummary]) -> Answer:
    told = Told({each.name: each.excess for each in looped})
    lose = told.on(1)
    most = max(max(each.results[0].loss) / each.results[0].trained for each in looped)
    sentence = (
        f"A loss is kept if at {most:g} times the trained recurrences it is at most {100 * KEPT:g} %, or {KEPT_NATS:g} "
        f"nats, above that at the trained ones. {_counted(told, 'Kept', 'Lost')}"
    )
    if lose:
        worst = max((each for each in looped if each.name in lose), key=lambda each: each.excess.mean)
        sentence += f" {worst.name} goes from {worst.loss.mean:.3f} to {worst.beyond.mean:.3f} nats."
    return _KEEPERS.says(
        _outcome(told),
        f"{len(told.on(-1))} of {len(looped)}",
        sentence,
        {
            each.name: f"{each.loss.mean:.4f} to {each.beyond.mean:.4f} nats, kept in {each.kept} of "
            f"{len(each.results)}"
            for each in looped
        },
    )


def _recipe(looped: Sequence[DesignSummary]) -> Answer | None:
    """Whether a recipe settles at no cost, where there is a plain one that loses its loss."""
    plain = next((each for each in looped if each.name in ("plain", "base")), None)
    others = [each for each in looped if each is not plain]
    if plain is None or not others or plain.excess.side < 1:
        return None
    costs = {each.name: _paired(each, plain, lambda one, other: one / other - 1) for each in others}
    dearer = Told.of({name: [cost - KEPT for cost in each] for name, each in costs.items()})
    cheaper = Told.of(costs)
    keep = [each for each in others if each.excess.side == -1]
    good = [each for each in keep if each.name in dearer.on(-1)]
    lost = f"{plain.name} goes from {plain.loss.mean:.3f} to {plain.beyond.mean:.3f} nats ({dearer.seeds} per design)"
    evidence: Evidence = {
        name: f"{_percents(each)} of the loss, "
        + next(f"kept in {one.kept} of {len(one.results)}" for one in others if one.name == name)
        for name, each in cheaper.intervals.items()
    }
    if not good:
        open_ = [each.name for each in others if each.excess.side < 1 and each.name not in dearer.on(1)]
        return _RECIPES.says(
            Outcome.CANNOT_TELL if open_ else Outcome.NO,
            "undecided by the seeds" if open_ else "none of these",
            "No recipe is shown by its seeds to have a loss within 1 % of the plain one and to keep it, where "
            f"{lost}" + (f"; undecided: {_names(open_)}." if open_ else "."),
            evidence,
        )
    sentence = f"With a loss within 1 % of the plain one, or below it, that is kept, where {lost}: " + "; ".join(
        f"{each.name} ({_percents(cheaper.intervals[each.name])})" for each in good
    )
    if len(good) > 1:
        best, *rest = good
        ahead = Told.of({each.name: _paired(best, each, lambda one, other: one - other) for each in rest})
        first = len(ahead.on(-1)) == len(rest)
        sentence += f". The best is {best.name}" if first else ". The seeds do not decide which of them is best"
    return _RECIPES.says(Outcome.YES, f"yes, {_names([each.name for each in good])}", f"{sentence}.", evidence)


def _settling(looped: Sequence[DesignSummary]) -> Answer | None:
    """Do designs whose tokens settle keep their loss? A design counts once: its seeds are alike."""
    counts: dict[bool, list[int]] = {True: [0, 0], False: [0, 0]}
    left = 0
    for each in looped:
        settles = {
            2 * one.dynamics.settled_tokens > one.dynamics.judged_tokens
            for one in each.results
            if one.dynamics is not None and one.dynamics.judged_tokens
        }
        if len(settles) == 1 and each.excess.side:
            counts[settles.pop()][each.excess.side > 0] += 1
        else:
            left += 1
    (kept, lost), (others_kept, others_lost) = counts[True], counts[False]
    if not kept + lost or not others_kept + others_lost:
        return None
    p_value = fisher_p((kept, lost), (others_kept, others_lost))
    settled, others = f"{kept} of {kept + lost}", f"{others_kept} of {others_kept + others_lost}"
    more = kept * (others_kept + others_lost) > others_kept * (kept + lost)
    tells = p_value < 1 - 0.95
    return _SETTLING.says(
        Outcome.CANNOT_TELL if not tells else Outcome.NO if not more else Outcome.YES if not lost else Outcome.PARTLY,
        f"{settled}, against {others}",
        f"Designs in which most tokens reach a fixed point in every seed: {settled} keep their loss. Designs in which "
        f"they do so in no seed: {others} (Fisher's exact p = {significant(p_value)}"
        f"{'' if tells else ', too few designs to decide'}). {left} of {len(looped)} designs are left out because "
        "their seeds disagree or leave it open.",
        {"settled and kept": settled, "not settled and kept": others, "p": p_value},
    )


def _depth_pays(looped: Sequence[DesignSummary]) -> Answer | None:
    several = [each for each in looped if each.results[0].trained > 1]
    if not several:
        return None
    told = Told.of(
        {each.name: [(1 + KEPT) * one.loss_at_trained - one.loss[1] for one in each.results] for each in several}
    )
    gains = [fmean(one.loss[1] - one.loss_at_trained for one in each.results) for each in several]
    accuracy = [fmean(one.accuracy[one.trained] - one.accuracy[1] for one in each.results) for each in several]
    return _DEPTH.says(
        _outcome(told),
        f"in {len(told.on(-1))} of {len(several)} designs",
        "Is the loss after the trained number of recurrences more than 1 % below that after the first? "
        f"{_counted(told, 'Yes', 'No')} On average over designs it is {fmean(gains):.3f} nats and "
        f"{100 * fmean(accuracy):.1f} points of accuracy better.",
        {"mean gain, nats": fmean(gains), "mean gain, accuracy": fmean(accuracy)},
    )


def _against(
    looped: Sequence[DesignSummary], results: Sequence[SweepResult], control: ControlName, what: str
) -> Answer | None:
    """Design by design, and over all of them, where a control that several designs share counts once."""
    gaps: dict[str, list[float]] = {}
    of_seeds: dict[int, dict[str, list[float]]] = {}
    shares = []
    for each in looped:
        for one in each.results:
            if (other := control_results(results, one, control)) is not None:
                gap = one.loss_at_trained - other.loss_at_trained
                gaps.setdefault(each.name, []).append(gap)
                of_seeds.setdefault(one.cell.seed, {}).setdefault(other.cell.name, []).append(gap)
                shares.append(one.parameters / other.parameters)
    if not gaps:
        return None
    told = Told.of(gaps)
    overall = interval([fmean(fmean(each) for each in held.values()) for held in of_seeds.values()])
    controls = sum(len(held) for held in of_seeds.values())
    question = Question(
        key=f"against-{control}",
        text=f"Does the loop beat a feed-forward model with {what}?",
        figure="training-table",
    )
    return question.says(
        _outcome(told),
        f"{len(told.on(-1))} of {len(gaps)} designs",
        f"Against a feed-forward model with {what}, of the same seed (the looped one has {100 * fmean(shares):.0f} % "
        f"of its parameters on average). {_counted(told, 'Lower loss', 'Higher loss')} The mean difference is "
        f"{overall} nats over {plural(overall.count, 'seed')}, where "
        f"each of the {plural(controls, 'control')} counts once.",
        {name: f"{each} nats" for name, each in told.intervals.items()},
    )


def _paired(one: DesignSummary, other: DesignSummary, compare: Callable[[float, float], float]) -> list[float]:
    """Of the losses at the trained number of recurrences, seed by seed where both have it."""
    others = {each.cell.seed: each.loss_at_trained for each in other.results}
    return [compare(each.loss_at_trained, others[each.cell.seed]) for each in one.results if each.cell.seed in others]


def _outcome(told: Told) -> Outcome:
    """Yes or no where the seeds carry it of every design; designs of which they do not tell speak for neither side."""
    yes, no = len(told.on(-1)), len(told.on(1))
    if yes:
        return Outcome.YES if yes == len(told.intervals) else Outcome.PARTLY
    return Outcome.NO if no == len(told.intervals) else Outcome.CANNOT_TELL


def _counted(told: Told, below: str, above: str) -> str:
    """`Kept: 3 of 5 (a; b; c). Lost: 1 of 5 (d). Undecided by the seeds: 1 of 5 (e).`, and what that rests on."""
    count = len(told.intervals)
    sides = ((below, -1), (above, 1), ("Undecided by the seeds", 0))
    parts = [
        f"{what}: {len(told.on(side))} of {count} ({_names(told.on(side))})." for what, side in sides if told.on(side)
    ]
    return (
        f"{' '.join(parts)} ({told.seeds} per design; Student's intervals over seeds, "
        f"{f'95 % for all {count} together' if count > 1 else '95 %'}.)"
    )


def _percents(each: Interval) -> str:
    """Of a share: `-2.8 % (-4.1 to -1.5)`."""
    if each.count < 2:
        return f"{100 * each.mean:+.1f} % (one seed)"
    return f"{100 * each.mean:+.1f} % ({100 * each.low:+.1f} to {100 * each.high:+.1f})"


def _names(names: Sequence[str]) -> str:
    """The evidence has all of them."""
    more = [f"{len(names) - _MOST_NAMES} more"] if len(names) > _MOST_NAMES else []
    return "; ".join([*names[:_MOST_NAMES], *more])
