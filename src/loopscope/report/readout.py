"""Figures: what the initial state leaves behind, and what the model would say."""

from __future__ import annotations

import numpy as np

from loopscope.answers.statistics import mean
from loopscope.report.axes import mark_vertical
from loopscope.report.figure import Figure, Section
from loopscope.report.lines import by_layer
from loopscope.report.material import Material, median_over_prompts
from loopscope.report.style import CATEGORIES, base_figure

__all__ = ["readout_section"]


def readout_section(material: Material) -> Section:
    """Path independence and loss, as far as they were measured."""
    figures = []
    if "path_distance" in material.shown:
        figures.append(_path(material))
    if "loss" in material.shown and material.shown.sizes["readout_recurrence"] > 1:
        figures.append(_loss(material))
    return Section(
        anchor="readout",
        short="Start and loss",
        title="Does it forget its start, and what does it say?",
        lead="Both over the number of recurrences.",
        figures=figures,
    )


def _path(material: Material) -> Figure:
    return Figure(
        anchor="path-independence",
        title="Do two initial states end in the same place?",
        caption=(
            "Distance between two runs of the same prompt from different initial states, medians over prompts. "
            "Falling to the rounding floor: the model forgets where it started. A plateau: where it ends depends "
            "on it."
        ),
        plot=by_layer(material, "path_distance", "distance / mean norm", ribbon=False, floor=True),
    )


def _loss(material: Material) -> Figure:
    loss = material.shown["loss"].transpose("readout_recurrence", "prompt")
    counts = loss["readout_recurrence"].values
    means = [mean(row) for row in loss.values]
    low, high = (median_over_prompts(loss, level).values.astype(np.float32) for level in (0.05, 0.95))
    figure = base_figure("recurrences before the readout", "loss (nats a token)")
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
    figure.update_xaxes(type="log", tickvals=counts, ticktext=[str(count) for count in counts])
    trained = material.view.trained
    if trained is not None and counts[0] <= trained <= counts[-1]:
        mark_vertical(figure, trained, f"trained: {trained}", log=True)
    return Figure(
        anchor="loss",
        title="Does the loss improve with more recurrences?",
        caption=(
            "Mean next-token loss on the prompts' own tokens when the state is decoded after so many recurrences. "
            "The band holds 90 % of the prompts: it shows how much prompts differ, not how sure the mean is."
        ),
        plot=figure,
    )
