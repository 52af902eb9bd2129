"""Figure: single prompts, token by token."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from loopscope.report.paper.axes import panels
from loopscope.report.paper.legends import add_colour_bar
from loopscope.report.paper.style import Width, study_figure
from loopscope.report.paper.texts import decade_ticks, text
from loopscope.study import Readings

_NAME = "token_relative_distance"
MOST_TOKENS = 40
"""Of a longer prompt the last so many are drawn: rows of a page that can still be read."""
_ROW = 0.11
"""Inches of a token."""


@study_figure
def tokens(readings: Readings, width: Width = "auto") -> Figure:
    """Distance of every token's state to its state at the horizon, of an ordinary prompt and of the one that is
    farthest out at the end: after the last recurrent layer, a row per token, one range of colours."""
    prompts = chosen_prompts(readings)
    data = readings.view.dataset[_NAME].sel(site="last_layer").transpose("prompt", "token", "recurrence").values
    shown, names = [], []
    for prompt in prompts:
        strings = [str(token) for token in readings.tokens[prompt]["token_strings"]]
        first = max(0, len(strings) - MOST_TOKENS)
        values = data[prompt, first : len(strings)].astype(np.float64)
        with np.errstate(divide="ignore"):  # a distance of exactly 0 has no logarithm, and no colour
            shown.append(np.where(values > 0, np.log10(values), np.nan))
        names.append([text(string, 12) for string in strings[first:]])
    finite = np.concatenate([values[np.isfinite(values)] for values in shown])
    low = float(np.floor(finite.min()))
    exponents = decade_ticks(low, max(low + 1, float(np.ceil(finite.max()))))
    figure, drawn = panels(len(prompts), width)
    figure.set_figheight(max(2.0, 0.7 + _ROW * max(len(values) for values in shown)))
    for axes, prompt, values, strings in zip(drawn, prompts, shown, names, strict=True):
        edges = (0.5, values.shape[1] + 0.5, len(values) - 0.5, -0.5)
        image = axes.imshow(values, extent=edges, aspect="auto", vmin=exponents[0], vmax=exponents[-1])
        axes.grid(visible=False)
        axes.set_yticks(range(len(values)), labels=strings, fontsize=5.5)
        axes.set_xlabel("recurrence")
        axes.set_title(f"prompt {prompt}")
    add_colour_bar(figure, image, drawn[-1], "distance / norm at H", exponents)
    return figure


def chosen_prompts(readings: Readings) -> list[int]:
    """The prompt in the middle by its distance to the state at 2H after the last recurrence, and the largest; none if
    all diverged."""
    finite = readings.view.finite
    end = finite["relative_distance_second_horizon"].isel(layer=-1, recurrence=-1)
    order = end["prompt"].values[np.argsort(end.values, kind="stable")]
    return list(dict.fromkeys(int(order[at]) for at in ((len(order) - 1) // 2, -1))) if order.size else []
