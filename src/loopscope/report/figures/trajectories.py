"""Figures: the way of single tokens, on their principal components."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loopscope.report.figures._old import Figure, Material, base_figure, plot_text
from loopscope.report.figures.look import GRID, INK, MUTED, layer_colours, named_in_legend
from loopscope.report.figures.plot import Section

_MOST_TOKENS = 3
"""Each token takes a 3-D scene, and browsers limit how many of those a page may hold."""


def trajectories_section(material: Material) -> Section:
    """A flat and a spatial view of each tracked token; tokens of prompts that diverged are left out."""
    figures: list[Figure] = []
    number = 0
    data = material.view.dataset
    for index in range(data.sizes["tracked"]):
        scores = data["trajectory"].isel(tracked=index).transpose("layer", "recurrence", "component").values
        if not np.isfinite(scores[..., :2]).all() or scores.shape[-1] < 2:
            continue
        share = data["trajectory_variance"].isel(tracked=index).values
        prompt, token = (int(data[name].values[index]) for name in ("tracked_prompt", "tracked_token"))
        strings = material.tokens[prompt]["token_strings"]
        where = f"token {token} (“{_shown(strings[token])}”) of prompt {prompt}"
        drawn = scores[:, material.counts - 1]
        figures.append(_flat(material, drawn, share, where, number))
        if scores.shape[-1] > 2 and np.isfinite(scores[..., 2]).all():
            figures.append(_spatial(material, drawn, share, where, number))
        number += 1
        if number == _MOST_TOKENS:
            break
    return Section(
        anchor="trajectories",
        short="Trajectories",
        title="Where does a token go?",
        lead="Principal components of one token's states over all recurrent layers and recurrences. "
        "One colour per layer; a circle marks the first recurrence, a diamond the last.",
        figures=figures,
    )


def _flat(
    material: Material, scores: NDArray[np.floating], share: NDArray[np.floating], where: str, number: int
) -> Figure:
    figure = base_figure(_axis(0, share), _axis(1, share), hovermode="closest")
    for layer, colour in enumerate(layer_colours(material.recurrent)):
        x, y = scores[layer, :, 0].astype(np.float32), scores[layer, :, 1].astype(np.float32)
        figure.add_scatter(
            x=x,
            y=y,
            customdata=material.counts,
            name=f"layer {layer}",
            legendgroup=str(layer),
            showlegend=named_in_legend(layer, material.recurrent),
            mode="lines+markers",
            line={"color": colour, "width": 1.5},
            marker={"size": 4, "color": colour},
            hovertemplate=f"layer {layer}, recurrence %{{customdata}}<extra></extra>",
        )
        figure.add_scatter(
            x=x[[0, -1]],
            y=y[[0, -1]],
            legendgroup=str(layer),
            showlegend=False,
            mode="markers",
            marker={
                "size": [10, 11],
                "symbol": ["circle-open", "diamond"],
                "color": colour,
                "line": {"width": 2, "color": colour},
            },
            hoverinfo="skip",
        )
    figure.update_xaxes(showgrid=True)
    return Figure(
        anchor=f"trajectory-2d-{number}",
        title=f"In two dimensions: {where}",
        caption=(
            "A spiral or a straight run into the diamond is convergence; a ring that stays open is an orbit; a "
            "run that goes on is drift."
        ),
        plot=figure,
        height=440,
    )


def _spatial(
    material: Material, scores: NDArray[np.floating], share: NDArray[np.floating], where: str, number: int
) -> Figure:
    figure = base_figure("", "", hovermode="closest")
    for layer, colour in enumerate(layer_colours(material.recurrent)):
        x, y, z = scores[layer, :, :3].astype(np.float32).T
        figure.add_scatter3d(
            x=x,
            y=y,
            z=z,
            customdata=material.counts,
            name=f"layer {layer}",
            legendgroup=str(layer),
            showlegend=named_in_legend(layer, material.recurrent),
            mode="lines",
            line={"color": colour, "width": 4},
            hovertemplate=f"layer {layer}, recurrence %{{customdata}}<extra></extra>",
        )
        figure.add_scatter3d(
            x=x[[0, -1]],
            y=y[[0, -1]],
            z=z[[0, -1]],
            legendgroup=str(layer),
            showlegend=False,
            mode="markers",
            marker={"size": [5, 8], "symbol": ["circle", "diamond"], "color": colour},
            hoverinfo="skip",
        )
    axes = {
        f"{name}axis": {
            "title": {"text": _axis(component, share, short=True), "font": {"size": 11}},
            "gridcolor": GRID,
            "backgroundcolor": "rgba(0,0,0,0)",
            "color": INK,
            "zerolinecolor": GRID,
            "tickfont": {"size": 10, "color": MUTED},
            "nticks": 5,
        }
        for component, name in enumerate("xyz")
    }
    figure.update_layout(
        scene={**axes, "aspectmode": "cube", "camera": {"eye": {"x": 1.6, "y": 1.6, "z": 1.0}}},
        margin={"l": 0, "r": 0, "t": 0, "b": 0},
        legend={"y": 0.0},
    )
    return Figure(
        anchor=f"trajectory-3d-{number}",
        title=f"In three dimensions: {where}",
        caption="Drag to turn it. A ball marks the first recurrence, a diamond the last; each axis has its own scale.",
        plot=figure,
        height=440,
    )


def _axis(component: int, share: NDArray[np.floating], *, short: bool = False) -> str:
    part = share[component]
    variance = f"{100 * part:.0f} %" + ("" if short else " of variance") if np.isfinite(part) else "share unknown"
    return f"PC {component + 1} ({variance})"


def _shown(token: str) -> str:
    return plot_text(token.strip() or token, 20)
