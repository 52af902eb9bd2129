"""Figures: the way of single tokens, on their principal components."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d import axes3d
from numpy.typing import NDArray

from loopscope._util.wording import visible
from loopscope.report.figures.look import layer_colours, named_in_legend
from loopscope.report.paper.axes import name_panel, panels
from loopscope.report.paper.legends import add_legend
from loopscope.report.paper.style import Width, study_figure
from loopscope.report.paper.texts import text
from loopscope.study import Readings

_MOST_TOKENS = 3
"""Panels of one figure."""
_VIEW = {"elev": 24, "azim": -58}
"""Degrees: from where a trajectory in space is seen."""

_ZOOM = 0.88
"""Leaves room for the names of the axes, which matplotlib forgets when it lays out a panel in space."""


@study_figure
def trajectories(readings: Readings, width: Width = "auto") -> Figure:
    """The first two principal components of up to three tracked tokens' states, a line per recurrent layer."""
    tokens = tracked(readings, components=2)
    figure, drawn = panels(len(tokens), width, height=0.9)
    for axes, index in zip(drawn, tokens, strict=True):
        scores, share = _of(readings, index)
        for layer, colour in enumerate(layer_colours(len(scores))):
            x, y = scores[layer, :, 0], scores[layer, :, 1]
            label = str(layer) if named_in_legend(layer, len(scores)) else None
            axes.plot(x, y, color=colour, linewidth=0.8, marker=".", markersize=2, label=label)
            axes.plot(x[:1], y[:1], color=colour, marker="o", markersize=4, markerfacecolor="none")
            axes.plot(x[-1:], y[-1:], color=colour, marker="D", markersize=4)
        axes.grid(visible=True, axis="both")
        axes.set_xlabel(_axis(0, share))
        axes.set_ylabel(_axis(1, share))
        name_panel(axes, _where(readings, index, text))
    add_legend(figure, drawn, "layer")
    return figure


@study_figure
def trajectories_3d(readings: Readings, width: Width = "auto") -> Figure:
    """The first three principal components of up to three tracked tokens' states, a line per recurrent layer."""
    tokens = tracked(readings, components=3)
    figure, flat = panels(len(tokens), width, height=0.85)
    drawn: list[Axes] = []
    for axes, index in zip(flat, tokens, strict=True):
        # The panel gives way to one in space at the same place.
        spot, letter = axes.get_subplotspec(), axes.get_title(loc="left")
        axes.remove()
        space: Any = figure.add_subplot(spot, projection=axes3d.Axes3D.name)
        scores, share = _of(readings, index)
        for layer, colour in enumerate(layer_colours(len(scores))):
            label = str(layer) if named_in_legend(layer, len(scores)) else None
            way = scores[layer, :, :3].T
            space.plot(*way, color=colour, linewidth=0.8, label=label)
            space.plot(*way[:, :1], color=colour, marker="o", markersize=3, markerfacecolor="none", linestyle="none")
            space.plot(*way[:, -1:], color=colour, marker="D", markersize=3, linestyle="none")
        space.view_init(**_VIEW)
        space.set_box_aspect(None, zoom=_ZOOM)
        space.tick_params(pad=-4, labelsize=5)
        for axis, component in (("x", 0), ("y", 1), ("z", 2)):
            getattr(space, f"set_{axis}label")(_axis(component, share), labelpad=-9, fontsize=6)
            space.locator_params(axis, nbins=4)
        space.set_title(letter, loc="left", fontweight="bold")
        name_panel(space, _where(readings, index, text))
        drawn.append(space)
    add_legend(figure, drawn, "layer")
    return figure


def tracked(readings: Readings, components: int) -> list[int]:
    """Tracked tokens with so many components that are all finite, at most three of them."""
    scores = readings.view.dataset["trajectory"].transpose("tracked", "layer", "recurrence", "component").values
    if scores.shape[-1] < components:
        return []
    finite = np.isfinite(scores[..., :components]).all(axis=(1, 2, 3))
    return [int(index) for index in np.flatnonzero(finite)[:_MOST_TOKENS]]


def token_words(readings: Readings, components: int) -> str:
    """For a caption: which tokens are drawn, in full."""
    drawn = [_where(readings, index, visible) for index in tracked(readings, components)]
    if len(drawn) > 1:
        drawn = [f"({letter}) {words}" for letter, words in zip("abc", drawn, strict=False)]
    return f"Shown: {', '.join(drawn)}."


def _of(readings: Readings, index: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores (layer, recurrence, component) of a tracked token, and the components' shares of the variance."""
    data = readings.view.dataset.isel(tracked=index)
    scores = data["trajectory"].transpose("layer", "recurrence", "component").values.astype(np.float64)
    return scores, data["trajectory_variance"].values.astype(np.float64)


def _axis(component: int, share: Sequence[float] | NDArray[np.float64]) -> str:
    part = share[component]
    return f"PC {component + 1}" + (f" ({100 * part:.0f} %)" if np.isfinite(part) else "")


def _where(readings: Readings, index: int, shown: Callable[[str], str]) -> str:
    """Which token it is, in the prompt's own letters."""
    data = readings.view.dataset
    prompt, token = (int(data[name].values[index]) for name in ("tracked_prompt", "tracked_token"))
    string = str(readings.tokens[prompt]["token_strings"][token])
    return f"prompt {prompt}, token {token} “{shown(string.strip() or string)}”"
