"""Exit rules: stop a token at the first recurrence after which it has done enough, by what is known there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray
from numpy.typing import NDArray

from loopscope._util.wording import significant
from loopscope.errors import ConfigError
from loopscope.study import Study, StudyView, view_study

Signal = NDArray[np.floating]
Stops = NDArray[np.integer]
_THRESHOLDS = 81
"""Of each rule, spread so that the mean number of recurrences goes down by an 80th of what can be saved at a time:
finer than any difference that an answer makes something of."""
_HUGINN_STEP = 0.03
_HUGINN_DIVERGENCE = 5e-4
"""Where the published code of Huginn (arXiv 2502.05171) stops by itself when it is asked to generate adaptively."""


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
    """By the key of the rule: `step`, `kl`, `attention`, `gate`; those whose signal the study has."""
    usual: Mapping[str, float]
    """The threshold, one of the table's, that the model or its publishers use, or that the study was given."""


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
    """The threshold that the model or its publishers use, or that the study was given; marked in figures."""
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


def exit_tables(study: Study, thresholds: Mapping[str, Sequence[float]] | None = None) -> ExitTables | None:
    """What exit rules would have saved and cost, of the prompts that stayed finite.

    Each table has the dimensions `threshold` and `prompt`; `.mean("prompt").to_dataframe()` shows it. `thresholds`
    gives those of some rules, by key, such as `{"kl": [1e-3, 1e-2]}`; the others are spread evenly over what can be
    saved, with the usual one among them.

    None for a study in which no full run was read out after each recurrence (see the setting `exit_recurrences`).
    Raises `ConfigError` for an unknown rule, and `StudyError` for a study that lacks what every study has.
    """
    keys = [rule.key for rule in EXIT_RULES]
    for key in thresholds or ():
        if key not in keys:
            raise ConfigError(f"Unknown exit rule {key!r}; the rules are {', '.join(keys)}.")
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


def exit_table(
    signal: Signal, thresholds: Sequence[float], readouts: Readouts, *, at_least: bool = False
) -> xarray.Dataset:
    """`exit_costs` of a rule under each of some thresholds, with dimensions `threshold` and `prompt`."""
    return _stacked(thresholds, [_costs(stop_times(signal, each, at_least=at_least), readouts) for each in thresholds])


def exit_costs(stops: Stops, readouts: Readouts) -> xarray.Dataset:
    """What answering each token after `stops` recurrences, (prompt, token), takes and costs, with dimension `prompt`.

    Means over a prompt's tokens: `recurrences`; `loss`, nats; `loss_difference` to the full run; `changed`, the share
    of tokens whose most probable next token is not the full run's; `kl`, `KL(p_N || p)`, nats.
    """
    return xarray.Dataset({name: ("prompt", values) for name, values in _costs(stops, readouts).items()})


def constant_table(readouts: Readouts) -> xarray.Dataset:
    """`exit_costs` of the same number of recurrences for every token; the `threshold` is that number, from 1 to N."""
    counts = range(1, readouts.recurrences + 1)
    shape = readouts.top1.shape[1:]
    return _stacked(counts, [_costs(np.full(shape, count), readouts) for count in counts])


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
    fires = signal >= float(threshold) if at_least else signal <= float(threshold)
    fires[-1] = True
    return np.asarray(fires.argmax(axis=0) + 1, dtype=np.int64)


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


def _costs(stops: Stops, readouts: Readouts) -> dict[str, NDArray[np.float64]]:
    there = readouts.there
    place = np.where(there, stops - 1, 0)[None]
    loss, kl, top1 = (
        np.take_along_axis(values, place, axis=0)[0] for values in (readouts.loss, readouts.kl, readouts.top1)
    )
    followed = there & ~np.isnan(readouts.loss[-1])
    return {
        "recurrences": _mean(stops, there),
        "loss": _mean(loss, followed),
        "loss_difference": _mean(loss - readouts.loss[-1], followed),
        "changed": _mean(top1 != readouts.top1[-1], there),
        "kl": _mean(kl, there),
    }


def _stacked(thresholds: Sequence[float] | range, costs: Sequence[Mapping[str, NDArray[np.float64]]]) -> xarray.Dataset:
    return xarray.Dataset(
        {name: (("threshold", "prompt"), np.stack([each[name] for each in costs])) for name in costs[0]},
        coords={"threshold": np.asarray(thresholds)},
    )


def _mean(values: NDArray[np.generic], counted: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Over the tokens that count, of each prompt; NaN where none does."""
    total = np.where(counted, values, 0).sum(axis=-1, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return np.asarray(total / counted.sum(axis=-1))


def _readouts(prompts: xarray.Dataset) -> Readouts:
    """The readouts of a full run."""
    kl = prompts["token_kl_to_full"]
    loss, top1 = (
        prompts[name].sel(readout_recurrence=kl["exit_recurrence"].values).transpose(..., "prompt", "token").values
        for name in ("token_loss", "token_top1")
    )
    return Readouts(loss=loss, kl=kl.transpose(..., "prompt", "token").values, top1=top1)
