"""Figures: what the model would say after each number of recurrences, and where its exit gate stops."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from loopscope._util.statistics import mean, quantile
from loopscope.report.figures.curves import final_shares
from loopscope.report.figures.look import BAND, CATEGORIES, MUTED
from loopscope.report.paper.axes import choose_scale, count_recurrences, drawable, finish_scale, mark_trained, panels
from loopscope.report.paper.curves import BAND_LEVELS
from loopscope.report.paper.legends import add_legend
from loopscope.report.paper.style import Width, study_figure
from loopscope.study import Readings, median_over_prompts


@study_figure
def loss(readings: Readings, width: Width = "auto") -> Figure:
    """Mean next-token loss on the prompts' own tokens, decoded after so many recurrences: mean over prompts."""
    values = readings.variable("loss").transpose("readout_recurrence", "prompt")
    counts = values["readout_recurrence"].values
    figure, (axes,) = panels(1, width)
    if values.sizes["prompt"] > 1:
        low, high = (median_over_prompts(values, level).values for level in BAND_LEVELS)
        axes.fill_between(counts, low, high, color=MUTED, alpha=BAND, linewidth=0, label="90 % of prompts")
    means = np.array([mean(row) for row in values.values])
    axes.plot(counts, means, color=CATEGORIES[0], marker="o", label="mean over prompts")
    axes.set_ylabel("loss (nats a token)")
    _over_readouts(axes, readings)
    add_legend(figure, [axes])
    return figure


@study_figure
def prediction(readings: Readings, width: Width = "auto") -> Figure:
    """Share of tokens whose most probable next token is that of the last readout already, and how far the whole
    prediction is from that one (KL divergence)."""
    agrees, final = final_shares(readings.variable("token_top1"))
    counts = readings.variable("readout_recurrence").values
    divergence = readings.variable("token_kl_to_last").transpose("readout_recurrence", "prompt", "token").values
    rows = divergence[:-1].reshape(len(counts) - 1, -1).astype(np.float64)
    figure, (shares, distances) = panels(2, width)
    shares.plot(counts, 100 * agrees, color=CATEGORIES[5], marker="o", label="same top token as at the last readout")
    shares.plot(counts, 100 * final, color=CATEGORIES[0], marker="o", label="and it stays")
    shares.set_ylim(-3, 103)
    shares.set_ylabel("share of tokens (%)")
    _over_readouts(shares, readings)
    means, high = (np.array([of(row) for row in rows]) for of in (mean, lambda row: quantile(row, BAND_LEVELS[1])))
    choose_scale(distances, means)
    distances.plot(counts[:-1], drawable(distances, means), color=CATEGORIES[2], marker="o", label="mean over tokens")
    distances.plot(
        counts[:-1], drawable(distances, high), color=CATEGORIES[2], linestyle=":", label="95 % of tokens are below"
    )
    distances.set_ylabel("KL divergence from the last (nats)")
    finish_scale(distances)
    _over_readouts(distances, readings)
    add_legend(figure, [shares, distances])
    return figure


@study_figure
def exit_gate(readings: Readings, width: Width = "auto") -> Figure:
    """Probability, by the model's own gate, to stop after each recurrence: mean over tokens and prompts."""
    share = readings.variable("exit_probability").transpose("recurrence", "prompt").values
    counts = np.arange(1, len(share) + 1)
    figure, (axes,) = panels(1, width)
    axes.bar(counts, np.array([mean(row) for row in share]), color=CATEGORIES[0])
    axes.set_ylabel("probability to stop")
    count_recurrences(axes, len(counts))
    axes.set_xlim(0.4, len(counts) + 0.6)
    return figure


def _over_readouts(axes: Axes, readings: Readings) -> None:
    """A logarithmic x axis with the numbers of recurrences at which the model was read out."""
    counts = readings.variable("readout_recurrence").values
    axes.set_xscale("log")
    axes.set_xlim(counts[0] / 1.1, counts[-1] * 1.1)
    axes.set_xticks(counts, labels=[str(count) for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("recurrences before the readout")
    trained = readings.view.trained
    if trained is not None and counts[0] <= trained <= counts[-1]:
        mark_trained(axes, readings)
