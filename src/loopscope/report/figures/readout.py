"""Figures: what the initial state leaves behind, and what the model would say."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from loopscope._util.statistics import mean, quantile
from loopscope.report.figures._old import Figure, Material, base_figure, mark_vertical, scale_y
from loopscope.report.figures.convergence import CONVERGENCE
from loopscope.report.figures.curves import final_shares
from loopscope.report.figures.exit_rules import exit_rule_figures
from loopscope.report.figures.look import CATEGORIES
from loopscope.report.figures.plot import Drawn, Section, on_page
from loopscope.study import median_over_prompts, positive, powers_of_two

_MOST_TICKS = 12
"""Numbers of recurrences that an axis names one by one; of more, the powers of two."""


def readout_section(material: Material) -> Section:
    """Path independence, loss and what the model would say, as far as they were measured."""
    figures: list[Drawn] = []
    if "path_distance" in material.shown:
        figures += on_page(
            [each for each in CONVERGENCE if each.anchor == "path-independence"], material.view, material.settings
        )
    if "loss" in material.shown and material.shown.sizes["readout_recurrence"] > 1:
        figures.append(_loss(material))
    if "token_top1" in material.shown and material.shown.sizes["readout_recurrence"] > 1:
        figures += [_final(material), _divergence(material)]
    if "exit_probability" in material.shown:
        figures.append(_exits(material))
    figures += exit_rule_figures(material)
    return Section(
        anchor="readout",
        short="Start and loss",
        title="Does it forget its start, and what does it say?",
        lead="Both over the number of recurrences.",
        figures=figures,
    )


def _loss(material: Material) -> Figure:
    loss = material.shown["loss"].transpose("readout_recurrence", "prompt")
    counts = loss["readout_recurrence"].values
    means = [mean(row) for row in loss.values]
    low, high = (median_over_prompts(loss, level).values.astype(np.float32) for level in (0.05, 0.95))
    figure = _over_readouts(material, "loss (nats a token)")
    shared = {"x": counts, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    if loss.sizes["prompt"] > 1:
        figure.add_scatter(y=low, showlegend=False, **shared)
        figure.add_scatter(y=high, fill="tonexty", fillcolor="rgba(91,95,102,0.16)", name="90 % of prompts", **shared)
    figure.add_scatter(
        x=counts,
        y=np.array(means, dtype=np.float32),
        name="mean over prompts",
        mode="lines+markers",
        line={"color": CATEGORIES[0], "width": 2},
        marker={"size": 7},
        hovertemplate="%{y:.3f} nats",
    )
    return Figure(
        anchor="loss",
        title="Does the loss improve with more recurrences?",
        caption=(
            "Mean next-token loss on the prompts' own tokens when the state is decoded after so many recurrences. "
            "The band holds 90 % of the prompts: it shows how much prompts differ, not how sure the mean is."
        ),
        plot=figure,
    )


def _final(material: Material) -> Figure:
    counts = material.shown["readout_recurrence"].values
    agrees, final = final_shares(material.shown["token_top1"])
    figure = _over_readouts(material, "share of tokens")
    for name, values, colour in (
        ("the same as at the last readout", agrees, CATEGORIES[5]),
        ("and stays so", final, CATEGORIES[0]),
    ):
        figure.add_scatter(
            x=counts,
            y=values.astype(np.float32),
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 2},
            marker={"size": 7},
            hovertemplate="%{y:.1%}",
        )
    figure.update_yaxes(range=[-0.02, 1.02], tickformat=".0%")
    return Figure(
        anchor="final-token",
        title="From when on does the most probable next token stay?",
        caption="Share of all tokens whose top prediction is the last readout's, and of those that keep it from there.",
        plot=figure,
    )


def _divergence(material: Material) -> Figure:
    divergence = material.shown["token_kl_to_last"].isel(readout_recurrence=slice(0, -1))
    rows = divergence.transpose("readout_recurrence", "prompt", "token").values.reshape(divergence.shape[0], -1)
    counts = divergence["readout_recurrence"].values
    figure = _over_readouts(material, "KL divergence (nats)")
    for name, values, dash in (
        ("mean over tokens", [mean(row) for row in rows], "solid"),
        ("95 % of tokens are below", [quantile(row, 0.95) for row in rows], "dot"),
    ):
        figure.add_scatter(
            x=counts,
            y=positive(np.array(values)),
            name=name,
            mode="lines+markers",
            line={"color": CATEGORIES[0], "width": 2, "dash": dash},
            marker={"size": 6},
            hovertemplate="%{y:.3g} nats",
        )
    scale_y(figure)
    return Figure(
        anchor="readout-divergence",
        title="How far is the prediction from the last one?",
        caption="KL divergence of the prediction after so many recurrences from that after the last, token by token.",
        plot=figure,
    )


def _exits(material: Material) -> Figure:
    share = material.shown["exit_probability"].transpose("recurrence", "prompt").values
    last = material.view.recurrences
    figure = base_figure("recurrences", "probability to stop")
    figure.add_bar(
        x=np.arange(1, last + 1),
        y=np.array([mean(row) for row in share], dtype=np.float32),
        marker={"color": CATEGORIES[0]},
        hovertemplate="%{y:.3f}",
        name="mean over tokens and prompts",
    )
    return Figure(
        anchor="exit-gate",
        title="Where does the exit gate stop?",
        caption=f"Probability by the model's own gate; recurrence {last}, the last measured, takes all that is left.",
        plot=figure,
    )


def _over_readouts(material: Material, y_title: str) -> go.Figure:
    """An empty figure over the numbers of recurrences at which the model was read out."""
    counts = material.shown["readout_recurrence"].values
    figure = base_figure("recurrences before the readout", y_title)
    ticks = counts if len(counts) <= _MOST_TICKS else powers_of_two(int(counts[-1]))
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[str(count) for count in ticks])
    trained = material.view.trained
    if trained is not None and counts[0] <= trained <= counts[-1]:
        mark_vertical(figure, trained, f"trained: {trained}", log=True)
    return figure
