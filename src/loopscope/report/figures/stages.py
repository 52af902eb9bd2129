"""Figures: the stages of inference, quantity by quantity, along the depth of one pass and through all of them."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from loopscope._util.sites import Site
from loopscope.answers.limits import short_prompts
from loopscope.answers.quantities import STAGE_QUANTITIES, StageQuantity
from loopscope.report.figures.curves import Material
from loopscope.report.figures.in_plotly import along_depth, along_one_pass, scale_y
from loopscope.report.figures.look import CATEGORIES, base_figure
from loopscope.report.figures.plot import Figure, Section
from loopscope.study import median_over_prompts, powers_of_two, sites_of

_MOST_VISITS = 96
"""In a line through every visit; beyond that a point is no longer seen."""


def stages_section(material: Material) -> Section:
    """What each visit does to attention and residual stream."""
    sites = sites_of(material.shown) if "depth" in material.shown.sizes else []
    figures = [
        figure
        for quantity in STAGE_QUANTITIES
        if quantity.variable in material.shown
        for figure in _figures(material, quantity, sites)
    ]
    if "prediction_neurons" in material.shown:
        figures.append(_neurons(material))
    lead = "Medians over prompts."
    if material.view.looped:
        lead += (
            " Left, along the depth of one pass, a line per recurrence, later ones lighter: where lines coincide, "
            "every pass repeats the same stages. Right, the same numbers through every visit in order."
        )
    return Section(
        anchor="stages", short="Stages", title="Do the stages of inference repeat?", lead=lead, figures=figures
    )


def _figures(material: Material, quantity: StageQuantity, sites: list[Site]) -> list[Figure]:
    values = median_over_prompts(quantity.of_prompt(material.shown)).values.astype(np.float32)
    shown = min(len(sites), _MOST_VISITS)
    looped = material.view.looped
    cut = f" The first {shown} of {len(sites)} visits." if shown < len(sites) else ""
    reading = quantity.reading
    if quantity.variable == "sink_score":
        reading = " ".join([reading, *short_prompts(material.view)])
    through = _scaled(along_depth(values[:shown], sites[:shown], quantity.y_title), quantity)
    whole = Figure(
        anchor=f"{quantity.anchor}-by-depth",
        title="Through every visit" if looped else quantity.title,
        caption=(f"Dotted lines part stages and recurrences.{cut}" if looped else reading),
        plot=through,
    )
    if not looped:
        return [whole]
    recurrences = [count - 1 for count in powers_of_two(material.view.recurrences)]
    return [
        Figure(
            anchor=f"{quantity.anchor}-by-recurrence",
            title=quantity.title,
            caption=reading,
            plot=_scaled(along_one_pass(material, values, sites, quantity.y_title, recurrences), quantity),
        ),
        whole,
    ]


def _scaled(figure: go.Figure, quantity: StageQuantity) -> go.Figure:
    if quantity.logarithmic:
        scale_y(figure)
    else:
        figure.update_yaxes(rangemode="tozero")
    return figure


def _neurons(material: Material) -> Figure:
    labels = [str(label) for label in material.shown["unique_layer"].values]
    figure = base_figure("layer", "share of neurons", hovermode="closest")
    for name, colour in (("prediction", CATEGORIES[0]), ("suppression", CATEGORIES[1])):
        figure.add_bar(
            x=labels,
            y=material.shown[f"{name}_neurons"].values.astype(np.float32),
            name=name,
            marker={"color": colour},
            hovertemplate=f"%{{x}}, {name}: %{{y:.2%}}<extra></extra>",
        )
    figure.update_xaxes(type="category", nticks=16)
    figure.update_yaxes(tickformat=".2~p", rangemode="tozero")
    return Figure(
        anchor="neurons",
        title="Which layers write tokens?",
        caption=(
            "Share of MLP neurons that raise (prediction) or lower (suppression) the logits of a few tokens far more "
            "than the rest: the cosines of output and unembedding have a kurtosis above 10. From the weights alone."
        ),
        plot=figure,
    )
