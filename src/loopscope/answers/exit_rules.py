"""Exit rules: stop a token at the first recurrence after which it has done enough, by what is known there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import xarray
from numpy.typing import NDArray

from loopscope.answers.answer import Criterion
from loopscope.answers.exit_signals import EXIT_SIGNALS, SIGNALS, Quantities, Signal
from loopscope.answers.stopping import first_of
from loopscope.errors import ConfigError
from loopscope.study import Study, StudyView, view_study

Stops = NDArray[np.integer]
Costs = Mapping[str, NDArray[np.float64]]
"""By name, (..., prompt)."""
_THRESHOLDS = 81
"""Of each rule, spread so that the mean number of recurrences goes down by an 80th of what can be saved at a time:
finer than any difference that an answer makes something of."""
_ENTRIES = 2**18
"""Tokens times thresholds whose costs are taken at once: 2 MiB each."""


@dataclass(frozen=True, kw_only=True)
class Readouts:
    """What the model would answer after each recurrence, (recurrence, prompt, token)."""

    loss: NDArray[np.floating]
    """Of the token that follows, nats; NaN where none does."""
    kl: NDArray[np.floating]
    """`KL(p_N || p_t)`: how far the prediction is from that of the full run, nats."""
    top1: NDArray[np.integer]
    """The most probable token id; below 0 beyond the prompt's end."""

    @property
    def there(self) -> NDArray[np.bool_]:
        """The tokens, (prompt, token); the rest is padding."""
        return np.asarray(self.top1[-1] >= 0)

    @property
    def recurrences(self) -> int:
        """N, of a full run."""
        return len(self.top1)


@dataclass(frozen=True, kw_only=True)
class ExitTables:
    """What each rule takes and costs under each threshold, prompt by prompt (see `exit_costs` for the variables)."""

    recurrences: int
    """N, of a full run, with whose answers others are compared."""
    constant: xarray.Dataset
    """The same number of recurrences for every token, from 1 to N, along `threshold`."""
    rules: Mapping[str, xarray.Dataset]
    """By the key of the signal (`EXIT_SIGNALS`); those that the study has."""
    usual: Mapping[str, float]
    """The threshold, one of the table's, that the model or its publishers use, or that the study was given."""


def exit_tables(study: Study, thresholds: Mapping[str, Sequence[float]] | None = None) -> ExitTables | None:
    """What exit rules would have saved and cost, of the prompts that stayed finite.

    Each table has the dimensions `threshold` and `prompt`; `.mean("prompt").to_dataframe()` shows it. `thresholds`
    gives those of some rules, by key, such as `{"kl": [1e-3, 1e-2]}`; the others are spread evenly over what can be
    saved, with the usual one among them.

    None for a study in which no full run was read out after each recurrence (see the setting `exit_recurrences`).
    Raises `ConfigError` for an unknown rule, and `StudyError` for a study that lacks what every study has.
    """
    for key in thresholds or ():
        if key not in SIGNALS:
            raise ConfigError(f"Unknown exit rule {key!r}; the rules are {', '.join(SIGNALS)}.")
    view = view_study(study)
    return tables_of(view, view.finite, thresholds or {})


def tables_of(
    view: StudyView, prompts: xarray.Dataset, thresholds: Mapping[str, Sequence[float]] | None = None
) -> ExitTables | None:
    """The same, of some of a study's prompts."""
    if "token_kl_to_full" not in prompts or not prompts.sizes["prompt"]:
        return None
    readouts, known = readouts_of(prompts), quantities(prompts)
    rules, usual = {}, {}
    for rule in EXIT_SIGNALS:
        if not set(rule.variables) <= set(known):
            continue
        signal = rule.of(known)
        given = (thresholds or {}).get(rule.key)
        if given is None:
            given = list(spread_thresholds(signal, readouts.there, _THRESHOLDS, at_least=rule.at_least))
            own = rule.usual(view)
            if own is not None and np.isfinite(own):
                usual[rule.key] = own
                given.append(own)
        asked = sorted({float(each) for each in given})
        if asked:
            rules[rule.key] = exit_table(signal, asked, readouts, at_least=rule.at_least)
    return ExitTables(recurrences=readouts.recurrences, constant=constant_table(readouts), rules=rules, usual=usual)


def exit_table(
    signal: Signal, thresholds: Sequence[float], readouts: Readouts, *, at_least: bool = False
) -> xarray.Dataset:
    """`exit_costs` of a rule under each of some thresholds, with dimensions `threshold` and `prompt`."""
    return costs_table(thresholds, (stop_times(signal, each, at_least=at_least) for each in thresholds), readouts)


def costs_table(thresholds: Sequence[float] | range, stops: Iterable[Stops], readouts: Readouts) -> xarray.Dataset:
    """`exit_costs` under each threshold, given when each stops the tokens."""
    at_once = max(1, _ENTRIES // max(1, readouts.there.size))
    left = iter(stops)
    pieces = iter(lambda: list(islice(left, at_once)), [])
    costs = [exit_costs(np.stack(piece), readouts) for piece in pieces]
    return xarray.Dataset(
        {name: (("threshold", "prompt"), np.concatenate([each[name] for each in costs])) for name in costs[0]},
        coords={"threshold": np.asarray(thresholds)},
    )


def exit_costs(stops: Stops, readouts: Readouts) -> Costs:
    """What answering each token after `stops` recurrences, (..., prompt, token), takes and costs, prompt by prompt.

    Means over a prompt's tokens: `recurrences`; `loss`, nats; `loss_difference` to the full run; `changed`, the share
    of tokens whose most probable next token is not the full run's; `kl`, `KL(p_N || p)`, nats.
    """
    there = readouts.there
    place = np.where(there, stops - 1, 0)
    flat = place.reshape(-1, *there.shape)
    loss, kl, top1 = (
        np.take_along_axis(values, flat, axis=0).reshape(place.shape)
        for values in (readouts.loss, readouts.kl, readouts.top1)
    )
    followed = there & ~np.isnan(readouts.loss[-1])
    return {
        "recurrences": _mean(stops, there),
        "loss": _mean(loss, followed),
        "loss_difference": _mean(loss - readouts.loss[-1], followed),
        "changed": _mean(top1 != readouts.top1[-1], there),
        "kl": _mean(kl, there),
    }


def constant_table(readouts: Readouts) -> xarray.Dataset:
    """`exit_costs` of the same number of recurrences for every token; the `threshold` is that number, from 1 to N."""
    counts = range(1, readouts.recurrences + 1)
    shape = readouts.top1.shape[1:]
    return costs_table(counts, (np.full(shape, count) for count in counts), readouts)


def constant_at(constant: xarray.Dataset, recurrences: float) -> xarray.Dataset:
    """What a rule without a signal costs that takes that many recurrences on average, with dimension `prompt`.

    It draws at random which tokens get the whole number below and which the one above, so that its expected costs lie
    on the straight line between theirs.
    """
    below = int(np.clip(np.floor(recurrences), 1, constant.sizes["threshold"]))
    above = min(below + 1, constant.sizes["threshold"])
    share = recurrences - below
    return (1 - share) * constant.sel(threshold=below, drop=True) + share * constant.sel(threshold=above, drop=True)


def stop_times(signal: Signal, threshold: float, *, at_least: bool = False) -> NDArray[np.int64]:
    """Recurrences that each token takes, (prompt, token): the first after which its signal is at most the threshold,
    or at least that; all N where there is none. NaN stops nothing.
    """
    return first_of(signal >= float(threshold) if at_least else signal <= float(threshold))


def spread_thresholds(
    signal: Signal, there: NDArray[np.bool_], count: int, *, at_least: bool = False
) -> NDArray[np.float64]:
    """At most that many thresholds whose mean recurrences are spread evenly between the fewest and the most there are.

    `there`, (prompt, token), are the tokens that count. A token goes on after t recurrences where the smallest signal
    so far is above the threshold. So the mean number of recurrences is 1 plus the sum, over t < N, of the shares of
    tokens whose smallest signal is; and thresholds at even quantiles of those smallest signals, all t together, spread
    it evenly.
    """
    order = -1.0 if at_least else 1.0
    # fmin: where nothing is known of a recurrence, what was known before it stands.
    smallest = np.fmin.accumulate(order * signal[:-1].astype(np.float64), axis=0)[:, there].ravel()
    smallest[np.isnan(smallest)] = np.inf
    if not smallest.size:
        return np.empty(0)
    found = np.quantile(smallest, np.linspace(0, 1, count), method="inverted_cdf")
    return np.unique(order * found[np.isfinite(found)])


def excess(table: xarray.Dataset, criterion: Criterion) -> xarray.DataArray:
    """By how much the share of changed tokens and the loss are beyond what is tolerated, (cost, threshold). A loss that
    no prompt has is beyond nothing."""
    means = table.mean("prompt")
    changed = means["changed"] - (1 - criterion.tokens_needed)
    loss = means["loss_difference"].fillna(0.0) - criterion.loss_tolerance
    return xarray.concat([changed, loss], "cost")


def constant_within(constant: xarray.Dataset, criterion: Criterion) -> float:
    """The smallest number of recurrences for all tokens within tolerance. Between whole numbers it is a mean, of tokens
    drawn at random that get the one below or the one above."""
    beyond = excess(constant, criterion).transpose("threshold", "cost").values
    enough = int((beyond <= 0).all(axis=1).argmax())
    if enough == 0:
        return 1.0
    # Where each cost, on the line between the two, comes down to what is tolerated.
    pairs = zip(beyond[enough - 1], beyond[enough], strict=True)
    return enough + float(max(before / (before - after) for before, after in pairs if before > 0))


def _mean(values: NDArray[np.generic], counted: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Over the tokens that count, of each prompt; NaN where none does."""
    total = np.where(counted, values, 0).sum(axis=-1, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return np.asarray(total / counted.sum(axis=-1))


def quantities(prompts: xarray.Dataset) -> Quantities:
    """What signals follow from, of the recurrences of a full run, (recurrence, prompt, token); those that are there."""
    counts = prompts["exit_recurrence"].values
    found = {}
    for name in dict.fromkeys(name for signal in EXIT_SIGNALS for name in signal.variables):
        if name not in prompts:
            continue
        values = prompts[name]
        if "site" in values.dims:
            values = values.sel(site="loop_state")
        if "readout_recurrence" in values.dims:
            values = values.sel(readout_recurrence=counts)
        found[name] = values.transpose(..., "prompt", "token").values[: len(counts)]
    if "token_attention_change" in found:
        # The first token has only itself to look at: its map never changes, which says nothing about the token.
        change = found["token_attention_change"]
        found["token_attention_change"] = np.where(np.arange(change.shape[-1]) > 0, change, np.nan)
    return found


def readouts_of(prompts: xarray.Dataset) -> Readouts:
    """The readouts of a full run."""
    kl = prompts["token_kl_to_full"]
    loss, top1 = (
        prompts[name].sel(readout_recurrence=kl["exit_recurrence"].values).transpose(..., "prompt", "token").values
        for name in ("token_loss", "token_top1")
    )
    return Readouts(loss=loss, kl=kl.transpose(..., "prompt", "token").values, top1=top1)
