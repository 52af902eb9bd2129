"""Figures: what each head looks at, and whether its attention settles."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from loopscope._util.sinks import SINK_THRESHOLD
from loopscope.answers.limits import short_prompts
from loopscope.report.figures._old import Figure, Material, base_figure, by_layer, lines_across
from loopscope.report.figures.curves import per_row, stable_share
from loopscope.report.figures.look import SEQUENTIAL, layer_colours, named_in_legend
from loopscope.report.figures.maps import head_maps
from loopscope.report.figures.plot import Drawn, Section
from loopscope.report.figures.similarity import visits_map
from loopscope.study import median_over_prompts

_ROW_PIXELS = 9
"""Of a head in the heat map, at least; fewer and rows cannot be told apart."""


def heads_section(material: Material) -> Section:
    """Change, stabilisation and sinks of the heads."""
    looped = material.view.looped
    changes = "attention_change" in material.shown and material.view.recurrences > 1
    maps = head_maps(material)
    # Tall figures beside each other, then the maps that a click into them shows, then the others.
    figures: list[Drawn] = [_changes(material)] if changes else []
    if "sink_score" in material.shown and not looped:
        figures.append(_sinks(material))
    if "attention_cycle_distance" in material.shown:
        figures.append(_cycle(material))
    figures += [maps] if maps is not None else []
    figures += [_stable(material)] if changes else []
    if "attention_distance_to_horizon" in material.shown:
        figures.append(_distance(material))
    lead = "Attention after the softmax, head by head; medians over prompts."
    if looped:
        lead += (
            " Change is the root mean square, over the rows of a map, of the Euclidean distance between a row and the "
            "same row one recurrence before; two rows with nothing in common are 1 to 1.4 apart."
        )
    if maps is None:
        lead += " The study holds no maps of single heads: its analysis was told to keep none, or none can be seen."
    return Section(
        anchor="heads",
        short="Heads",
        title="Do the heads stabilise?" if looped else "What do the heads look at?",
        lead=lead,
        figures=figures,
    )


def _click(material: Material) -> str:
    return " Click on a head to see its maps below." if "attention_map" in material.view.dataset else ""


def _changes(material: Material) -> Figure:
    change = median_over_prompts(per_row(material.shown, "attention_change"))
    counts = material.counts[material.counts > 1]
    heads = change.sizes["head"]
    values = change.isel(recurrence=counts - 1).transpose("layer", "head", "recurrence").values
    rows = values.reshape(-1, len(counts)).astype(np.float32)
    with np.errstate(divide="ignore"):  # a map that does not change at all has no logarithm, and no colour
        shown = np.where(rows > 0, np.log10(rows), np.nan)
    figure = base_figure("recurrence", "layer: one row per head", hovermode="closest")
    exponents = _decades(shown)
    figure.add_heatmap(
        z=shown,
        x=counts,
        colorscale=SEQUENTIAL,
        zmin=exponents[0] if exponents else None,
        zmax=exponents[-1] if exponents else None,
        customdata=np.array([[[layer, head]] * len(counts) for layer in range(len(values)) for head in range(heads)]),
        hovertemplate="layer %{customdata[0]}, head %{customdata[1]}, recurrence %{x}: 10^%{z:.2f}<extra></extra>",
        colorbar={
            "title": {"text": "change per row", "side": "right"},
            "thickness": 12,
            "outlinewidth": 0,
            "len": 0.9,
            "tickvals": exponents,
            "ticktext": [f"{10.0**exponent:g}" for exponent in exponents],
        },
    )
    between = [layer * heads - 0.5 for layer in range(1, len(values))]
    lines_across(figure, {"color": "white", "width": 1.5}, y=between)
    middles = [layer * heads + (heads - 1) / 2 for layer in range(len(values))]
    every = max(1, len(values) // 16)
    figure.update_yaxes(
        autorange="reversed",
        tickvals=middles[::every],
        ticktext=[str(layer) for layer in range(0, len(values), every)],
        ticks="",
        showgrid=False,
    )
    return Figure(
        anchor="head-change",
        title="Which heads keep changing?",
        caption=(
            "Dark to the right: the head's attention has settled. Bright stripes: heads that go on changing, however "
            f"often the block runs. White lines part the layers.{_click(material)}"
        ),
        plot=figure,
        picks="recurrent",
        height=max(340, min(900, 120 + _ROW_PIXELS * len(rows))),
    )


def _decades(logarithms: NDArray[np.floating]) -> list[int]:
    """Whole powers of ten around the values, at most nine of them."""
    finite = logarithms[np.isfinite(logarithms)]
    if not finite.size:
        return []
    low, high = int(np.floor(finite.min())), int(np.ceil(finite.max()))
    high = max(high, low + 1)
    return list(range(low, high + 1, max(1, -(-(high - low) // 8))))


def _stable(material: Material) -> Figure:
    """Share of heads that are stable after so many recurrences."""
    found = material.shown["head_stable_from"]
    counts = material.counts
    figure = base_figure("recurrences", "share of heads")
    layers = found.sizes["layer"]
    shares = stable_share(found, counts).astype(np.float32)
    for layer, (share, colour) in enumerate(zip(shares, layer_colours(layers), strict=True)):
        figure.add_scatter(
            x=counts,
            y=share,
            name=f"layer {layer}",
            mode="lines",
            line={"color": colour, "width": 2, "shape": "hv"},
            showlegend=named_in_legend(layer, layers),
            hovertemplate="%{y:.0%}",
        )
    figure.update_yaxes(range=[-0.02, 1.02], tickformat=".0%")
    return Figure(
        anchor="heads-stable",
        title="After how many recurrences are heads stable?",
        caption=(
            "Share of heads, over all prompts, whose change stays below the threshold of the analysis "
            "(--head-stable) from there on. The last recurrence measured cannot count: nothing after it was seen."
        ),
        plot=figure,
    )


def _distance(material: Material) -> Figure:
    by_head = per_row(material.shown, "attention_distance_to_horizon").mean("head")
    drawn = dataclasses.replace(material, finite=material.shown.assign(attention_away=by_head))
    return Figure(
        anchor="head-distance",
        title=f"How far is attention from that at recurrence {material.view.horizon}?",
        caption="Mean over heads of the distance per row to the same head's map at H, a line per layer.",
        plot=by_layer(drawn, "attention_away", "distance per row", ribbon=False),
    )


def _sinks(material: Material) -> Figure:
    sink = median_over_prompts(material.shown["sink_score"]).transpose("depth", "head").values.astype(np.float32)
    figure = base_figure("head", "layer", hovermode="closest")
    figure.add_heatmap(
        z=sink,
        zmin=0,
        zmax=1,
        colorscale=SEQUENTIAL,
        customdata=np.moveaxis(np.indices(sink.shape), 0, -1),
        colorbar={"title": {"text": "sink score", "side": "right"}, "thickness": 12, "outlinewidth": 0, "len": 0.9},
        hovertemplate="layer %{y}, head %{x}: %{z:.2f}<extra></extra>",
    )
    figure.update_xaxes(dtick=max(1, sink.shape[1] // 12))
    figure.update_yaxes(autorange="reversed", showgrid=False, dtick=max(1, sink.shape[0] // 12))
    return Figure(
        anchor="head-sinks",
        title="Which heads rest on the first token?",
        caption=" ".join(
            [
                "Share of a head's attention that the first token receives; a head has a sink from "
                f"{SINK_THRESHOLD:g} on.{_click(material)}",
                *short_prompts(material.view),
            ]
        ),
        plot=figure,
        picks="prelude",
        height=420,
    )


def _cycle(material: Material) -> Figure:
    labels = [str(label) for label in material.shown["visit"].values]
    figure = visits_map(material.shown["attention_cycle_distance"].values, labels, "distance per row", lowest=0.0)
    return Figure(
        anchor="attention-cycle",
        title="Does attention repeat from pass to pass?" if material.view.looped else "How alike are the layers?",
        caption=(
            "Distance between the attention maps of every two visits, head by head, then over all heads. Dark diagonal "
            "stripes: each layer attends as it did one pass before."
            if material.view.looped
            else "Distance between the attention maps of every two layers, over all heads."
        ),
        plot=figure,
        height=420,
    )
