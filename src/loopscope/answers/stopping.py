"""Stopping tokens early: from what is known after each recurrence, and what the model would answer there, to a table.

Arrays are (recurrence, prompt, token). Index t is after t + 1 recurrences, and the last index, N - 1, is a full run.
What is measured is the answer that each token would have given from the states of a full run: a token that stops does
not change what the others read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray
from numpy.typing import NDArray

__all__ = ["Readouts", "constant_at", "constant_table", "exit_costs", "exit_table", "spread_thresholds", "stop_times"]

Signal = NDArray[np.floating]
Stops = NDArray[np.integer]


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
    """At most so many thresholds whose mean recurrences are spread evenly between the fewest and the most there are.

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


def exit_costs(stops: Stops, readouts: Readouts) -> xarray.Dataset:
    """What answering each token after `stops` recurrences, (prompt, token), takes and costs, with dimension `prompt`.

    Means over a prompt's tokens: `recurrences`; `loss`, nats; `loss_difference` to the full run; `changed`, the share
    of tokens whose most probable next token is not the full run's; `kl`, `KL(p_N || p)`, nats.
    """
    return xarray.Dataset({name: ("prompt", values) for name, values in _costs(stops, readouts).items()})


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


def exit_table(
    signal: Signal, thresholds: Sequence[float], readouts: Readouts, *, at_least: bool = False
) -> xarray.Dataset:
    """`exit_costs` of a rule under each of some thresholds, with dimensions `threshold` and `prompt`."""
    return _stacked(thresholds, [_costs(stop_times(signal, each, at_least=at_least), readouts) for each in thresholds])


def constant_table(readouts: Readouts) -> xarray.Dataset:
    """`exit_costs` of the same number of recurrences for every token; the `threshold` is that number, from 1 to N."""
    counts = range(1, readouts.recurrences + 1)
    shape = readouts.top1.shape[1:]
    return _stacked(counts, [_costs(np.full(shape, count), readouts) for count in counts])


def constant_at(constant: xarray.Dataset, recurrences: float) -> xarray.Dataset:
    """What a rule without a signal costs that takes so many recurrences on average, with dimension `prompt`.

    It draws at random which tokens get the whole number below and which the one above, so that its expected costs lie
    on the straight line between theirs.
    """
    below = int(np.clip(np.floor(recurrences), 1, constant.sizes["threshold"]))
    above = min(below + 1, constant.sizes["threshold"])
    share = recurrences - below
    return (1 - share) * constant.sel(threshold=below, drop=True) + share * constant.sel(threshold=above, drop=True)


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
