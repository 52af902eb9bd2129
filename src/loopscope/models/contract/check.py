"""The contract of a subject: all promises, and the function that checks them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from loopscope.errors import ConfigError
from loopscope.models.contract import announcements, runs
from loopscope.models.contract.bench import (
    Bench,
    RawLogits,
    default_others,
    default_prompts,
    fingerprint,
    main_recurrences,
)
from loopscope.models.contract.results import CheckFailed, CheckResult, CheckSkipped, ContractReport, Tolerances
from loopscope.models.hooks.hooked import HookedSubject
from loopscope.models.loading import as_subject
from loopscope.models.subject import Subject


@dataclass(frozen=True, slots=True)
class _Check:
    name: str
    promise: str
    look: Callable[[Bench], str]
    """Returns what was compared; raises `CheckFailed` or `CheckSkipped`."""


_CHECKS = (
    _Check("visits", "p + k R + c visits are announced in order", announcements.visits_are_in_order),
    _Check("facts", "`info` says what the runs show", announcements.facts_are_true),
    _Check("finite", "numbers are finite and record no gradients", announcements.numbers_are_finite),
    _Check("kept", "an announced state is never overwritten", announcements.states_stay),
    _Check("attention", "attention rows are probabilities", announcements.attention_is_a_distribution),
    _Check("logits", "the logits are those of the raw model", runs.logits_are_raw),
    _Check("recurrences", "another number of recurrences is honoured", runs.other_recurrences_are_honoured),
    _Check("padding", "a padded batch equals its prompts one by one", runs.padding_is_not_seen),
    _Check("repeatability", "the same seed gives the same run", runs.runs_repeat),
    _Check("seed", "another seed gives another random state", runs.seed_decides),
    _Check("initial state", "a given initial state is honoured", runs.initial_state_is_honoured),
    _Check("observers", "watching a run changes nothing", runs.observing_changes_nothing),
    _Check(
        "decoding", "logits on the way, or of a given state, leave the run as it was", runs.decoding_disturbs_nothing
    ),
    _Check("rounding", "the rounding error is given and changes nothing", runs.rounding_error_is_given),
    _Check("turns", "two runs can be advanced in turn", runs.runs_take_turns),
    _Check("abandoned", "a run closed on the way leaves nothing behind", runs.abandoned_runs_leave_nothing),
)
_UNTOUCHED = ("untouched", "weights, flags and hooks are as before")


def check_subject(
    subject: Subject | nn.Module,
    prompts: Sequence[Sequence[int]] | None = None,
    *,
    raw_logits: RawLogits | None = None,
    recurrences: int | None = None,
    other_recurrences: Sequence[int] | None = None,
    seed: int = 0,
    causal: bool | None = None,
    same_loop: bool | None = None,
    tolerances: Tolerances | None = None,
    raise_on_failure: bool = True,
) -> ContractReport:
    """Run a subject about thirty times on a few short prompts and check every promise that loopscope relies on.

    **Arguments**

    - `prompts`: lists of token ids, of different lengths; four random ones of up to 7 tokens unless given.
    - `raw_logits`: the model's own forward pass (see `RawLogits`). Unless given, that of the bare module inside a model
      that loopscope loaded or hooked; for any other subject the comparison is skipped.
    - `recurrences`: of the main run; the trained number unless given.
    - `other_recurrences`: must be honoured too; 1, and one more than `recurrences`, unless given. Of a hooked model
      that fails with one more, one less.
    - `causal`: no token attends to a later one. Unless given, what was measured of a hooked model, and True of others.
    - `same_loop`: the first recurrences of a long run are those of a short one; False for a loop that knows how often
      it will run. Unless given, likewise.
    - `tolerances`: where two computations may differ, and how much.
    - `raise_on_failure`: raise `ContractError` that lists all broken promises, each with layer, recurrence, got and
      expected; else they are in the report.

    Raises `ConfigError` for arguments that do not fit the subject.
    """
    subject = as_subject(subject)
    info = subject.info
    count = main_recurrences(info, recurrences)
    hooked = subject if isinstance(subject, HookedSubject) else None
    others = default_others(subject, count, seed) if other_recurrences is None else tuple(other_recurrences)
    if causal is None:
        causal = hooked is None or hooked.padding(count or None).causal
    if same_loop is None:
        same_loop = hooked is None or not hooked.facts.foresees
    given = default_prompts(info) if prompts is None else [list(prompt) for prompt in prompts]
    if not given or not all(given):
        raise ConfigError("prompts holds an empty prompt or none at all; every prompt needs a token.")
    bench = Bench(
        subject=subject,
        prompts=given,
        recurrences=count,
        other_recurrences=tuple(other for other in others if other != count),
        seed=seed,
        raw_logits=raw_logits,
        causal=causal,
        same_loop=same_loop,
        tolerances=tolerances or Tolerances(),
    )
    before = None if bench.module is None else fingerprint(bench.module)
    results = [_result(check, bench) for check in _CHECKS]
    results.append(_result(_Check(*_UNTOUCHED, lambda bench: _is_untouched(bench, before)), bench))
    report = ContractReport(info.name, tuple(results))
    if raise_on_failure:
        report.raise_for_failures()
    return report


def _result(check: _Check, bench: Bench) -> CheckResult:
    try:
        return CheckResult(check.name, check.promise, "passed", check.look(bench))
    except CheckFailed as failure:
        return CheckResult(check.name, check.promise, "failed", str(failure))
    except CheckSkipped as skip:
        return CheckResult(check.name, check.promise, "skipped", str(skip))
    except Exception as error:  # whatever a subject raises, the other promises are still worth checking
        reason = (str(error).splitlines() or ["without a message"])[0]
        return CheckResult(check.name, check.promise, "failed", f"raised {type(error).__name__}: {reason}", error)


def _is_untouched(bench: Bench, before: dict[str, object] | None) -> str:
    if before is None or bench.module is None:
        raise CheckSkipped("the subject has no torch module named `model` to look at")
    after = fingerprint(bench.module)
    changed = [name for name in before if after.get(name) != before[name]] + [
        name for name in after if name not in before
    ]
    if changed:
        more = f" (and {len(changed) - 1} others)" if len(changed) > 1 else ""
        name = changed[0]
        raise CheckFailed(f"{name} changed{more}: got {after.get(name)}, expected {before.get(name)}")
    return f"{len(before)} weights, flags and hooks"
