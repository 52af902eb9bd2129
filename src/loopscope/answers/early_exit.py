"""Would an exit rule have saved recurrences?"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import xarray

from loopscope._util.statistics import PairedDifference, mean, paired_difference
from loopscope._util.wording import percent, plural, significant
from loopscope.answers.answer import Answer, Criterion, Evidence, Outcome, Question, some_finite
from loopscope.answers.calibration import LEAST_PROMPTS
from loopscope.answers.exit_rules import ExitTables, constant_at, constant_within, excess, tables_of
from loopscope.answers.exit_signals import EXIT_SIGNALS, SIGNALS, ExitSignal
from loopscope.study import StudyView

EXIT_RULE = Question(
    key="exit_rule",
    text="Would an exit rule have saved recurrences?",
    figure="exit-changed",
    needs=(some_finite("there is no answer to stop at"),),
)
_LIMITS = (
    "Exit rules are judged by the states of a full run: a token that stops does not change what the others read, as it "
    "would if the loop stopped computing it.",
)
_DECODES = (
    "A rule that compares predictions reads the model out after every recurrence; that work is not counted against "
    "what it saves."
)


@dataclass(frozen=True)
class _Point:
    """A rule under one threshold."""

    rule: ExitSignal
    threshold: float
    costs: xarray.Dataset
    """By prompt."""

    def mean(self, name: str) -> float:
        return mean(self.costs[name].values)

    @property
    def recurrences(self) -> float:
        return self.mean("recurrences")

    @property
    def loss(self) -> PairedDifference:
        """To the full run, positive where stopping costs."""
        difference = self.costs["loss_difference"].values
        return paired_difference(difference, np.zeros_like(difference))

    def evidence(self, prefix: str, full: int) -> Evidence:
        return {
            f"{prefix}_rule": self.rule.name,
            f"{prefix}_threshold": self.threshold,
            f"{prefix}_recurrences": self.recurrences,
            f"{prefix}_saved": 1 - self.recurrences / full,
            f"{prefix}_tokens_changed": self.mean("changed"),
            f"{prefix}_loss_difference": self.loss.mean,
            f"{prefix}_loss_half_width": self.loss.half_width,
            f"{prefix}_kl_to_full": self.mean("kl"),
        }


def exit_rule_answer(view: StudyView, criterion: Criterion) -> Answer:
    """The rule that takes fewest recurrences within tolerance of a full run, against the same number for all tokens.

    Rule, threshold and the fixed number are chosen on every other prompt, the first of them included, and judged on the
    rest.
    """
    prompts, full = (view.finite.sizes.get(name, 0) for name in ("prompt", "exit_recurrence"))
    if not full or "token_kl_to_full" not in view.finite:
        return EXIT_RULE.unanswered("not measured", "The model was not read out after each recurrence of a full run.")
    if full == 1:
        return EXIT_RULE.unanswered("nothing to save", "A full run is one recurrence.")
    if prompts < LEAST_PROMPTS:
        return EXIT_RULE.unanswered(
            "not judged",
            f"An exit rule is chosen on one half of the prompts and judged on the other: that takes {LEAST_PROMPTS} "
            f"prompts, and there {'is' if prompts == 1 else 'are'} {prompts}.",
            outcome=Outcome.CANNOT_TELL,
            figure=EXIT_RULE.figure,
        )
    tables = tables_of(view, view.finite)
    assert tables is not None
    choosing, judging = (_some(tables, slice(first, None, 2)) for first in (0, 1))
    chosen, cheapest = _best(choosing, criterion)
    best = None
    if chosen is not None:
        costs = judging.rules[chosen.rule.key].sel(threshold=chosen.threshold)
        best = dataclasses.replace(chosen, costs=costs)
    constant = constant_within(choosing.constant, criterion)
    evidence: Evidence = {
        "full_run": float(full),
        "constant_recurrences": constant,
        "prompts_chosen_on": float(choosing.constant.sizes["prompt"]),
        "prompts_judged_on": float(judging.constant.sizes["prompt"]),
    }
    evidence |= {f"{key}_recurrences": point.recurrences for key, point in cheapest.items()}
    if best is not None:
        evidence |= best.evidence("best", full)
        evidence["best_saved_of_measured"] = 1 - best.recurrences / view.recurrences
        evidence |= _over_constant(best, judging)
    outcome, verdict, sentence = _verdict(best, constant, full, criterion)
    if best is not None:
        sentence += (
            f" Rule and threshold were chosen on {plural(choosing.constant.sizes['prompt'], 'prompt')}, and what they "
            f"take and cost is that of the other {judging.constant.sizes['prompt']}."
        )
    gate = _own_gate(tables)
    if gate is not None:
        evidence |= gate.evidence("own_gate", full)
        sentence += _gate_sentence(gate, full)
    decodes = best is not None and best.rule.decodes
    return EXIT_RULE.says(outcome, verdict, sentence, evidence, (*_LIMITS, _DECODES) if decodes else _LIMITS)


def _some(tables: ExitTables, prompts: slice) -> ExitTables:
    """The same thresholds on some of the prompts."""
    rules = {key: table.isel(prompt=prompts) for key, table in tables.rules.items()}
    return dataclasses.replace(tables, constant=tables.constant.isel(prompt=prompts), rules=rules)


def _verdict(best: _Point | None, constant: float, full: int, criterion: Criterion) -> tuple[Outcome, str, str]:
    """Outcome, verdict and sentence for the best rule, of which a fixed number within tolerance is the rival."""
    enough = 1 - criterion.saving_needed
    if best is None or best.recurrences > enough * full:
        fewest = full if best is None else best.recurrences
        kept = f"{percent(criterion.tokens_needed)} of the most probable next tokens kept"
        sentence = (
            f"No: with {kept} and the loss at most {criterion.loss_tolerance:g} nats higher, no rule takes fewer than "
            f"{significant(fewest, 3)} of the {full} recurrences of a full run on average."
        )
        return Outcome.NO, "hardly any", sentence
    saved, fixed = percent(1 - best.recurrences / full), significant(constant, 2)
    takes = f"the best rule takes {significant(best.recurrences, 2)} of the {full} recurrences of a full run on average"
    rule = f"It stops a token once {best.rule.condition(best.threshold)}. Then {_costs(best)}"
    if not bool((excess(best.costs, criterion) <= 0).all()):
        sentence = (
            f"Not safely: {takes}, chosen so that it stays within what is tolerated, but on the prompts that it was "
            f"not chosen on it goes beyond. {rule}"
        )
        return Outcome.PARTLY, f"{saved}, but beyond what is tolerated", sentence
    if best.recurrences > enough * constant:
        sentence = f"No more than a fixed number: {takes}, and {fixed} for every token would do as well. {rule}"
        return Outcome.PARTLY, "no more than a fixed number", sentence
    sentence = f"Yes, {saved}: {takes}, and a fixed number would have to be {fixed} to do as well. {rule}"
    return Outcome.YES, f"yes, {saved}", sentence


def _best(tables: ExitTables, criterion: Criterion) -> tuple[_Point | None, dict[str, _Point]]:
    """The rule with the fewest recurrences within tolerance, and that threshold of every rule which has one."""
    cheapest: dict[str, _Point] = {}
    for rule in EXIT_SIGNALS:
        if rule.key not in tables.rules:
            continue
        table = tables.rules[rule.key]
        within = (excess(table, criterion) <= 0).all("cost")
        if within.any():
            threshold = float(table["recurrences"].mean("prompt").where(within).idxmin("threshold"))
            cheapest[rule.key] = _Point(rule, threshold, table.sel(threshold=threshold))
    best = min(cheapest.values(), key=lambda point: point.recurrences, default=None)
    return best, cheapest


def _over_constant(point: _Point, tables: ExitTables) -> Evidence:
    """What the rule costs beyond the same number of recurrences for all tokens, prompt by prompt."""
    other = constant_at(tables.constant, point.recurrences)
    loss = paired_difference(point.costs["loss"].values, other["loss"].values)
    changed = paired_difference(point.costs["changed"].values, other["changed"].values)
    return {
        "best_loss_over_constant": loss.mean,
        "best_loss_over_constant_half_width": loss.half_width,
        "best_tokens_changed_over_constant": changed.mean,
        "best_tokens_changed_over_constant_half_width": changed.half_width,
    }


def _costs(point: _Point) -> str:
    """What changes, in a sentence."""
    loss, half = point.loss.mean, point.loss.half_width
    found = f"{percent(point.mean('changed'))} of the most probable next tokens are others"
    if not np.isfinite(loss):
        return f"{found}."
    interval = f" (95 % interval {loss - half:.2g} to {loss + half:.2g})" if np.isfinite(half) else ""
    return f"{found}, and the loss changes by {loss:+.2g} nats{interval}."


def _own_gate(tables: ExitTables) -> _Point | None:
    if "gate" not in tables.rules or "gate" not in tables.usual:
        return None
    threshold = tables.usual["gate"]
    return _Point(SIGNALS["gate"], threshold, tables.rules["gate"].sel(threshold=threshold))


def _gate_sentence(gate: _Point, full: int) -> str:
    own = f" The model's own gate, at its threshold of {gate.threshold:g},"
    if gate.recurrences == full:
        return f"{own} stops no token before."
    return f"{own} takes {significant(gate.recurrences, 2)} of {full}; then {_costs(gate)}"
