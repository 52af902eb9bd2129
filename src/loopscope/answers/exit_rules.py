"""Exit rules: stop a token at the first recurrence after which it has done enough, by what is known there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray

from loopscope.answers.stopping import Readouts, constant_table, exit_table, spread_thresholds
from loopscope.answers.view import StudyView, view_study
from loopscope.answers.wording import significant
from loopscope.errors import ConfigError
from loopscope.study import Study

__all__ = ["EXIT_RULES", "ExitTables", "StoppingRule", "exit_tables", "tables_of"]

_THRESHOLDS = 81
"""Of each rule, spread so that the mean number of recurrences goes down by an 80th of what can be saved at a time:
finer than any difference that an answer makes something of."""
_HUGINN_STEP = 0.03
_HUGINN_DIVERGENCE = 5e-4
"""Where the published code of Huginn (arXiv 2502.05171) stops by itself when it is asked to generate adaptively."""


@dataclass(frozen=True)
class StoppingRule:
    """One rule: a signal of every token after every recurrence, and on which side of a threshold it stops."""

    key: str
    name: str
    """In a sentence and a legend."""
    variable: str
    """Of the study, which holds the signal."""
    signal: Callable[[xarray.Dataset], xarray.DataArray]
    """Dimensions (recurrence, prompt, token), at least as many recurrences as a full run has."""
    usual: Callable[[StudyView], float | None]
    """The threshold that the model or its publishers use, or that the study was told; marked in figures."""
    condition: Callable[[float], str]
    """When a token stops, in words."""
    at_least: bool = False
    """It stops where the signal reaches the threshold, rather than where it falls to it."""
    decodes: bool = False
    """To know its signal, the model has to be read out after every recurrence."""


def _attention_change(data: xarray.Dataset) -> xarray.DataArray:
    change = data["token_attention_change"]
    # The first token has only itself to look at: its map never changes, which says nothing about the token.
    return change.where(np.arange(change.sizes["token"]) > 0)


EXIT_RULES = (
    StoppingRule(
        key="step",
        name="small step",
        variable="token_relative_step",
        signal=lambda data: data["token_relative_step"].sel(site="loop_state"),
        usual=lambda view: _HUGINN_STEP,
        condition=lambda threshold: f"its loop state moves by at most {significant(100 * threshold, 3)} % of its norm",
    ),
    StoppingRule(
        key="kl",
        name="small KL divergence",
        variable="token_kl_to_previous",
        signal=lambda data: data["token_kl_to_previous"],
        usual=lambda view: _HUGINN_DIVERGENCE,
        condition=lambda threshold: (
            f"the prediction before is at most {significant(threshold, 3)} nats from its own (KL divergence)"
        ),
        decodes=True,
    ),
    StoppingRule(
        key="attention",
        name="attention stable",
        variable="token_attention_change",
        signal=_attention_change,
        usual=lambda view: view.head_stable,
        condition=lambda threshold: (
            f"its rows of the attention maps change by at most {significant(threshold, 3)} (root mean square over "
            "heads and layers)"
        ),
    ),
    StoppingRule(
        key="gate",
        name="exit gate",
        variable="token_exit_cumulated",
        signal=lambda data: data["token_exit_cumulated"],
        usual=lambda view: view.exit_threshold,
        condition=lambda threshold: f"the exit gate's probability to have stopped reaches {threshold:.4g}",
        at_least=True,
    ),
)


@dataclass(frozen=True, kw_only=True)
class ExitTables:
    """What each rule takes and costs under each threshold, prompt by prompt (see `exit_costs` for the variables)."""

    recurrences: int
    """N, of a full run, with whose answers others are compared."""
    constant: xarray.Dataset
    """The same number of recurrences for every token, from 1 to N, along `threshold`."""
    rules: Mapping[str, xarray.Dataset]
    """By the key of the rule: `step`, `kl`, `attention`, `gate`; those whose signal the study has."""
    usual: Mapping[str, float]
    """The threshold, one of the table's, that the model or its publishers use, or that the study was told."""


def exit_tables(study: Study, thresholds: Mapping[str, Sequence[float]] | None = None) -> ExitTables | None:
    """What exit rules would have saved and cost, of the prompts that stayed finite.

    Each table has the dimensions `threshold` and `prompt`; `.mean("prompt").to_dataframe()` shows it. `thresholds`
    gives those of some rules, by key, such as `{"kl": [1e-3, 1e-2]}`; the others are spread evenly over what can be
    saved, with the usual one among them.

    None for a study in which no full run was read out after each recurrence (see the setting `exit_recurrences`).
    Raises `ConfigError` for a rule that there is not, and `StudyError` for a study that lacks what every study has.
    """
    keys = [rule.key for rule in EXIT_RULES]
    for key in thresholds or ():
        if key not in keys:
            raise ConfigError(f"There is no exit rule {key!r}; the rules are {', '.join(keys)}.")
    view = view_study(study)
    return tables_of(view, view.finite, thresholds or {})


def tables_of(
    view: StudyView, prompts: xarray.Dataset, thresholds: Mapping[str, Sequence[float]] | None = None
) -> ExitTables | None:
    """The same, of some of a study's prompts."""
    if "token_kl_to_full" not in prompts or not prompts.sizes["prompt"]:
        return None
    readouts = _readouts(prompts)
    rules, usual = {}, {}
    for rule in EXIT_RULES:
        if rule.variable not in prompts:
            continue
        signal = rule.signal(prompts).transpose(..., "prompt", "token").values[: readouts.recurrences]
        given = (thresholds or {}).get(rule.key)
        if given is None:
            given = list(spread_thresholds(signal, readouts.there, _THRESHOLDS, at_least=rule.at_least))
            own = rule.usual(view)
            if own is not None and np.isfinite(own):
                usual[rule.key] = own
                given.append(own)
        asked = sorted({float(each) for each in given})
        rules[rule.key] = exit_table(signal, asked, readouts, at_least=rule.at_least)
    return ExitTables(recurrences=readouts.recurrences, constant=constant_table(readouts), rules=rules, usual=usual)


def _readouts(prompts: xarray.Dataset) -> Readouts:
    """The readouts of a full run."""
    kl = prompts["token_kl_to_full"]
    loss, top1 = (
        prompts[name].sel(readout_recurrence=kl["exit_recurrence"].values).transpose(..., "prompt", "token").values
        for name in ("token_loss", "token_top1")
    )
    return Readouts(loss=loss, kl=kl.transpose(..., "prompt", "token").values, top1=top1)
