"""Figures: single prompts, token by token."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loopscope.errors import ConfigError
from loopscope.report.figures._old import Figure, Material, base_figure, plot_text
from loopscope.report.figures.look import SEQUENTIAL
from loopscope.report.figures.plot import Section

_COLUMNS = 64
_NAME = "token_relative_distance"


def tokens_section(material: Material) -> Section:
    """Heat maps of the prompts asked for, or of an ordinary and the slowest one.

    Raises `ConfigError` for a prompt that the study does not have.
    """
    asked = material.settings.prompts
    missing = [prompt for prompt in asked if prompt >= material.view.prompts]
    if missing:
        raise ConfigError(
            f"Prompt {missing[0]} cannot be drawn: the study has prompts 0 to {material.view.prompts - 1}."
        )
    chosen = dict.fromkeys(asked, "") or _ordinary_and_slowest(material)
    # One range of colours, so that the prompts can be compared.
    distances = material.view.dataset[_NAME].sel(site="last_layer").isel(prompt=list(chosen)).values
    colours = _range(_powers(distances))
    return Section(
        anchor="tokens",
        short="Tokens",
        title="Token by token",
        lead="State after the last recurrent layer: distance to its state at the horizon, for every token.",
        figures=[_heat_map(material, prompt, why, colours) for prompt, why in chosen.items()],
    )


def _ordinary_and_slowest(material: Material) -> dict[int, str]:
    """Prompts by their mean relative distance at the end: the middle one and the largest; none if all diverged."""
    end = material.view.finite["relative_distance_second_horizon"].isel(layer=-1, recurrence=-1)
    order = end["prompt"].values[np.argsort(end.values, kind="stable")]
    if not order.size:
        return {}
    ordinary, slowest = int(order[(len(order) - 1) // 2]), int(order[-1])
    return {ordinary: "an ordinary prompt"} | ({slowest: "the prompt farthest out"} if slowest != ordinary else {})


def _heat_map(material: Material, prompt: int, why: str, colours: tuple[float, float]) -> Figure:
    entry = material.tokens[prompt]
    strings = [str(token) for token in entry["token_strings"]]
    first = max(0, len(strings) - material.settings.most_tokens)
    columns = _columns(material.view.recurrences)
    values = material.view.dataset[_NAME].sel(site="last_layer").isel(prompt=prompt)
    shown = values.transpose("token", "recurrence").values[first : len(strings), columns - 1]
    rows = len(shown)
    powers = _powers(shown)
    low, high = colours

    figure = base_figure("recurrences", "", hovermode="closest")
    places = np.arange(len(columns))
    names = [plot_text(token, 18) for token in strings[first:]]
    figure.add_heatmap(
        z=powers,
        x=places,
        y=np.arange(rows),
        customdata=np.stack(np.broadcast_arrays(shown.astype(np.float32), columns[None].astype(np.float32)), axis=-1),
        text=[[name] * len(columns) for name in names],
        colorscale=SEQUENTIAL,
        zmin=low,
        zmax=high,
        colorbar={
            "title": {"text": "distance / norm", "side": "top", "font": {"size": 12}},
            "orientation": "h",
            "y": 1.0,
            "yref": "paper",
            "yanchor": "bottom",
            "xpad": 0,
            "tickvals": list(range(int(low), int(high) + 1)),
            "ticktext": [f"10<sup>{power}</sup>" for power in range(int(low), int(high) + 1)],
            "thickness": 12,
            "outlinewidth": 0,
        },
        hovertemplate="%{text}<br>recurrence %{customdata[1]:.0f}: %{customdata[0]:.2g}<extra></extra>",
    )
    ticks = places[:: max(1, len(columns) // 7)]
    figure.update_xaxes(tickvals=ticks, ticktext=[str(columns[place]) for place in ticks], tickangle=0)
    figure.update_yaxes(
        tickvals=np.arange(rows), ticktext=names, autorange="reversed", showgrid=False, ticks="", tickfont={"size": 11}
    )
    cut = f" Only the last {rows} of its {len(strings)} tokens are drawn." if first else ""
    return Figure(
        anchor=f"tokens-{prompt}",
        title=f"Which tokens settle late? Prompt {prompt}" + (f", {why}" if why else ""),
        caption=(
            f"Dark: close to the state at recurrence {material.view.horizon}. Rows that stay bright are tokens "
            f"that keep moving; a token sees only those above it.{cut}"
        ),
        plot=figure,
        height=17 * rows + 160,
    )


def _columns(recurrences: int) -> NDArray[np.int64]:
    """Recurrences to draw, counted from 1: at most `_COLUMNS`, denser at the start."""
    if recurrences <= _COLUMNS:
        return np.arange(1, recurrences + 1)
    return np.unique(np.geomspace(1, recurrences, _COLUMNS).round().astype(np.int64))


def _powers(distances: NDArray[np.floating]) -> NDArray[np.float32]:
    """Logarithms to base 10; a distance of exactly 0 has none."""
    return np.log10(np.where(distances > 0, distances, np.nan)).astype(np.float32)


def _range(powers: NDArray[np.float32]) -> tuple[float, float]:
    """Whole powers of ten around what is drawn."""
    finite = powers[np.isfinite(powers)]
    if not finite.size:
        return -1.0, 0.0
    low, high = float(np.floor(finite.min())), float(np.ceil(finite.max()))
    return (low, high) if high > low else (low - 1, high)
