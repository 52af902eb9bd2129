"""Thresholds of an exit rule, chosen on one half of a study's prompts and judged on the other, as a file."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopscope._util.files import write_over_own
from loopscope._util.reading import read_json
from loopscope._util.statistics import finite_or_none, mean, paired_difference
from loopscope._util.table import Table
from loopscope._util.wording import listed, percent, plural, significant
from loopscope.answers.answer import Criterion
from loopscope.answers.exit_rules import (
    Readouts,
    Stops,
    constant_at,
    constant_table,
    constant_within,
    costs_table,
    excess,
    exit_costs,
    quantities,
    readouts_of,
    spread_thresholds,
)
from loopscope.answers.exit_signals import EXIT_SIGNALS, Quantities, Signal
from loopscope.answers.stopping import Condition, StoppingRule, check_patience, first_of
from loopscope.errors import ConfigError, StudyError, last_resort
from loopscope.study import Study, StudyView, view_study

_KIND = "exit rule"
_COMBINATIONS = (81, 25, 9)
"""Thresholds that are tried of each condition, where one, two or three are to be chosen: some hundreds together."""
_MOST_RECURRENCES = 10**6
LEAST_PROMPTS = 4
"""Two to choose a rule and its threshold on and two to judge them on: fewer show no scatter."""


@dataclass(frozen=True, kw_only=True)
class CalibratedRule:
    """An exit rule with all its thresholds, and of what it was chosen."""

    rule: StoppingRule
    model: Mapping[str, Any]
    """`name`, `weights_sha256`, `revision`, `interventions`."""
    recurrences: int
    """The cap: those of a full run."""
    dtype: str
    prompts: Mapping[str, Any]
    """The domain: `source`, `count`, `sha256`, and how many prompts it was `chosen_on` and `judged_on`."""
    tolerance: Mapping[str, float]
    """What the thresholds had to keep on the prompts that they were chosen on: the most that the `loss` may rise, in
    nats a token, and the largest share of most probable next tokens that may be `changed`."""
    judged: Mapping[str, float]
    """On the other prompts, means over prompts with half widths of 95 % intervals: `recurrences`, `saved`,
    `loss_difference` to the full run, `changed`, `kl`, and `loss_over_constant`, `changed_over_constant`: what is lost
    beyond the same mean number of recurrences given to tokens that are drawn at random."""
    choosing: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """`recurrences`, `loss_difference` and `changed` on the prompts that it was chosen on, and `constant`: the least
    mean number for all tokens that keeps the same there."""

    def save(self, path: str | Path) -> CalibratedRule:
        """As JSON, whole or not at all. Raises `StorageError`, also where a file of another kind would be replaced."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        write_over_own(Path(path), text.encode(), begins=text.index(","))  # its first entry, the kind
        return self

    def to_dict(self) -> dict[str, Any]:
        plain = {name: value for name, value in dataclasses.asdict(self).items() if name != "rule"}
        for name in ("judged", "choosing"):
            plain[name] = {key: finite_or_none(value) for key, value in plain[name].items()}
        return {"kind": _KIND, "text": str(self.rule), "rule": dataclasses.asdict(self.rule), **plain}

    @classmethod
    @last_resort("reading an exit rule")
    def load(cls, path: str | Path) -> CalibratedRule:
        """Raises `ConfigError` for a file that holds none."""
        try:
            found = read_json(Path(path))
            if not isinstance(found, dict) or found.get("kind") != _KIND:
                raise ConfigError(
                    f"{path} holds no exit rule; `loopscope exits STUDY --rule ... --out FILE` writes one."
                )
            stored = found["rule"]
            conditions = tuple(
                Condition(str(each["signal"]), float(each["threshold"])) for each in stored["conditions"]
            )
            rule = StoppingRule(conditions, stored["joined"], stored["patience"], stored["least"])
            recurrences = found["recurrences"]
            if type(recurrences) is not int or not 1 <= recurrences <= _MOST_RECURRENCES:
                raise ConfigError(f"The exit rule {path} is of {recurrences!r} recurrences, which no full run has.")
            parts = {name: dict(found[name]) for name in ("model", "prompts", "tolerance", "judged", "choosing")}
            return cls(rule=rule, recurrences=recurrences, dtype=str(found["dtype"]), **parts)
        except OSError as error:
            raise ConfigError(f"The exit rule {path} cannot be read ({error.strerror or error}).") from None
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"The exit rule {path} is damaged ({error}); write it again with `loopscope exits`."
            ) from None

    def check_fits(self, model: Mapping[str, Any], recurrences: int | None) -> None:
        """Raises `ConfigError` for another model, revision, dtype or number of recurrences than it was chosen for."""
        if model["weights_sha256"] != self.model.get("weights_sha256"):
            own, other = (
                str(each.get("name")) + (f" (revision {each['revision']})" if each.get("revision") else "")
                for each in (self.model, model)
            )
            raise ConfigError(
                f"The exit rule was chosen for {own}, and {other} has other weights; choose one for it with `loopscope "
                "exits`."
            )
        if list(model["interventions"]) != (self.model.get("interventions") or []):
            raise ConfigError("The exit rule was chosen under other interventions; choose one under these.")
        if model["dtype"] != self.dtype:
            raise ConfigError(
                f"The exit rule was chosen in {self.dtype}, and the model runs in {model['dtype']}; load it in "
                f"{self.dtype}, or choose a rule in {model['dtype']}."
            )
        if recurrences not in (None, self.recurrences):
            raise ConfigError(
                f"The exit rule was chosen for full runs of {self.recurrences} recurrences, not {recurrences}; leave "
                "recurrences out, or choose a rule for that many."
            )


@dataclass(frozen=True, kw_only=True)
class _Halves:
    """What a study knows of the tokens of its prompts."""

    known: Quantities
    readouts: Readouts

    @classmethod
    def of(cls, view: StudyView) -> _Halves:
        if not view.looped:
            raise StudyError(
                "An exit rule ends a loop early, and the study's model is feed-forward; analyse a looped one."
            )
        prompts = view.finite
        if "token_kl_to_full" not in prompts:
            raise StudyError(
                "The study's model was not read out after each recurrence of a full run, so that no exit rule can be "
                "chosen; analyse it with --exit-recurrences."
            )
        count = prompts.sizes["prompt"]
        if count < LEAST_PROMPTS:
            raise StudyError(
                "An exit rule is chosen on one half of the prompts and judged on the other, which takes "
                f"{LEAST_PROMPTS} prompts, and {plural(count, 'prompt')} stayed finite."
            )
        return cls(known=quantities(prompts), readouts=readouts_of(prompts))

    def half(self, first: int) -> _Halves:
        """Every other prompt."""
        some = slice(first, None, 2)
        return _Halves(
            known={name: values[:, some] for name, values in self.known.items()},
            readouts=Readouts(**{name: getattr(self.readouts, name)[:, some] for name in ("loss", "kl", "top1")}),
        )


@last_resort("choosing an exit rule")
def calibrate_exit(
    study: Study | str | Path,
    rule: str | StoppingRule,
    *,
    loss: float | None = None,
    changed: float | None = None,
    patience: int = 1,
    least: int = 1,
) -> CalibratedRule:
    """The thresholds of a rule that save most on every other prompt, the first included, judged on the rest.

    **Arguments**

    - `rule`: such as `step & top1 >= 2`: conditions on signals (docs/exits.md), all (`&`) or any (`|`) of them. A
      threshold that is named stays; up to three are chosen.
    - `loss`: the most that the mean loss of the next tokens may rise, in nats a token, beyond the full run's; 0.01
      unless given.
    - `changed`: the largest share of most probable next tokens that may be others; 0.05 unless given.
    - `patience`, `least`: recurrences in a row at which the conditions hold, and the first at which a token may stop.

    Raises `ConfigError` for a rule that cannot be read or that stops nothing within what may be lost, and `StudyError`
    for a study that lacks what the rule goes by.
    """
    study = study if isinstance(study, Study) else Study.load(study)
    if isinstance(rule, str):
        rule = StoppingRule.parse(rule, patience=patience, least=least)
    elif not isinstance(rule, StoppingRule):
        raise ConfigError(f"A rule is a text or a StoppingRule, got {rule!r}.")
    criterion = tolerated(loss, changed)
    view = view_study(study)
    halves = _Halves.of(view)
    missing = [each for signal in rule.signals for each in signal.variables if each not in halves.known]
    if missing:
        raise StudyError(f"The study lacks {listed(list(dict.fromkeys(missing)))}, which the exit rule {rule} goes by.")
    rule.check_reachable(halves.readouts.recurrences)
    found = _chosen(view, halves, rule, criterion)
    if found is None:
        raise ConfigError(
            f"The exit rule {rule} never fires before the last recurrence with a loss at most "
            f"{criterion.loss_tolerance:g} nats higher and {percent(1 - criterion.tokens_needed)} of the next tokens "
            "changed; allow more (loss, changed), or take another rule."
        )
    return found


def rules_of_one_signal(
    study: Study, *, loss: float | None = None, changed: float | None = None, patience: int = 1, least: int = 1
) -> dict[str, CalibratedRule | None]:
    """Of each signal that the study has, the rule of it alone; None of one that saves nothing within what may be lost.

    Raises as `calibrate_exit` does.
    """
    view = view_study(study)
    halves, criterion = _Halves.of(view), tolerated(loss, changed)
    check_patience(patience, least, halves.readouts.recurrences)
    return {
        signal.key: _chosen(
            view, halves, StoppingRule((Condition(signal.key, None),), patience=patience, least=least), criterion
        )
        for signal in EXIT_SIGNALS
        if set(signal.variables) <= set(halves.known)
    }


def tolerated(loss: float | None, changed: float | None) -> Criterion:
    """What may be lost, the criterion's own unless given. Raises `ConfigError`."""
    usual = Criterion()
    return Criterion(
        loss_tolerance=usual.loss_tolerance if loss is None else loss,
        tokens_needed=usual.tokens_needed if changed is None else 1 - changed,
    )


def _chosen(view: StudyView, halves: _Halves, rule: StoppingRule, criterion: Criterion) -> CalibratedRule | None:
    choosing, judging = halves.half(0), halves.half(1)
    best = _cheapest(choosing, rule, criterion)
    if best is None:
        return None
    full = choosing.readouts.recurrences
    costs = exit_costs(best.stop_times(judging.known), judging.readouts)
    own = exit_costs(best.stop_times(choosing.known), choosing.readouts)
    recurrences = mean(costs["recurrences"])
    other = constant_at(constant_table(judging.readouts), recurrences)
    judged = {"recurrences": recurrences, "saved": 1 - recurrences / full, "kl": mean(costs["kl"])}
    for name, rival in (("loss_difference", None), ("changed", None), ("loss", other), ("changed", other)):
        values = costs[name]
        found = paired_difference(values, np.zeros_like(values) if rival is None else rival[name].values)
        key = name if rival is None else f"{name}_over_constant"
        judged |= {key: found.mean, f"{key}_half_width": found.half_width}
    manifest = view.study.manifest
    model, prompts = manifest["model"], manifest.get("prompts", {})
    return CalibratedRule(
        rule=best,
        model={
            **{name: model.get(name) for name in ("name", "weights_sha256", "revision")},
            "interventions": list(model.get("interventions") or ()),
        },
        recurrences=full,
        dtype=str(model.get("dtype")),
        prompts={
            **{name: prompts.get(name) for name in ("source", "count", "sha256")},
            "chosen_on": choosing.readouts.top1.shape[1],
            "judged_on": judging.readouts.top1.shape[1],
        },
        tolerance={"loss": criterion.loss_tolerance, "changed": round(1 - criterion.tokens_needed, 15)},
        judged=judged,
        choosing={
            **{name: mean(own[name]) for name in ("recurrences", "loss_difference", "changed")},
            "constant": constant_within(constant_table(choosing.readouts), criterion),
        },
    )


def _cheapest(half: _Halves, rule: StoppingRule, criterion: Criterion) -> StoppingRule | None:
    """With the thresholds that take fewest recurrences within tolerance; None where none take fewer than all."""
    signals: list[Signal] = [signal.of(half.known) for signal in rule.signals]
    open_ = [place for place, each in enumerate(rule.conditions) if each.threshold is None]
    if len(open_) > len(_COMBINATIONS):
        raise ConfigError(f"At most {len(_COMBINATIONS)} thresholds are chosen at once; name those of some conditions.")
    tried = [
        _thresholds(rule.conditions[place], signals[place], half.readouts, _COMBINATIONS[len(open_) - 1])
        for place in open_
    ]
    reached: dict[tuple[int, float], NDArray[np.bool_]] = {}

    def stops(closed: StoppingRule) -> Stops:
        held: NDArray[np.bool_] | None = None
        for place, each in enumerate(closed.conditions):
            key = place, float(each.threshold or 0.0)
            if key not in reached:
                reached[key] = each.about.reaches(signals[place], key[1])
            now = reached[key]
            held = now if held is None else held & now if rule.joined == "all" else held | now
        assert held is not None
        return first_of(closed.patient(held))

    candidates = [rule.with_thresholds(thresholds) for thresholds in itertools.product(*tried)]
    if not candidates:
        return None
    table = costs_table(range(len(candidates)), map(stops, candidates), half.readouts)
    recurrences = table["recurrences"].mean("prompt").values
    within = (excess(table, criterion) <= 0).all("cost").values
    best = int(np.where(within, recurrences, math.inf).argmin())
    return candidates[best] if within[best] and recurrences[best] < half.readouts.recurrences else None


def _thresholds(condition: Condition, signal: Signal, readouts: Readouts, count: int) -> list[float]:
    """As they are shown, with four digits: who types what was shown has the rule that was judged."""
    spread = spread_thresholds(signal, readouts.there, count, at_least=condition.about.at_least)
    return sorted({float(f"{each:.4g}") for each in spread})


def rule_sentence(found: CalibratedRule) -> str:
    """What a rule takes and costs on the prompts that it was not chosen on."""
    judged = found.judged
    loss, half = judged["loss_difference"], judged["loss_difference_half_width"]
    over, over_half = judged["loss_over_constant"], judged["loss_over_constant_half_width"]
    sentence = (
        f"{found.rule}: {significant(judged['recurrences'], 3)} of {found.recurrences} recurrences on average on "
        f"{plural(int(found.prompts['judged_on']), 'prompt')} that it was not chosen on; "
        f"{percent(judged['changed'])} of the most probable next tokens are others"
    )
    if not math.isfinite(loss):
        return f"{sentence}."
    return (
        f"{sentence}, and the loss changes by {loss:+.2g} nats a token (95 % interval {loss - half:.2g} to "
        f"{loss + half:.2g}): {over:+.2g} ({over - over_half:.2g} to {over + over_half:.2g}) beside the same mean "
        "number of recurrences for tokens drawn at random."
    )


def rule_table(rules: Mapping[str, CalibratedRule | None]) -> Table:
    """A row for each rule of one signal, on the prompts that its threshold was not chosen on."""
    rows = []
    for key, found in rules.items():
        if found is None:
            rows.append([key, "saves nothing within what may be lost", "", "", "", ""])
            continue
        judged = found.judged
        losses = [
            f"{judged[name]:+.2g} ± {judged[f'{name}_half_width']:.2g}" if math.isfinite(judged[name]) else ""
            for name in ("loss_difference", "loss_over_constant")
        ]
        mean, saved = significant(judged["recurrences"], 3), percent(judged["saved"])
        rows.append([str(found.rule), mean, saved, percent(judged["changed"]), *losses])
    columns = ("rule", "mean", "saved", "changed", "loss (nats)", "beside a fixed number")
    return Table(columns=columns, rows=rows)
