"""Where single tokens go, on the principal components of their states."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from loopscope._util.wording import visible
from loopscope.report.figures.curves import drawn_recurrences
from loopscope.report.figures.look import AXIS, layer_colours, named_in_legend
from loopscope.report.figures.plot import Axis, Dots, FigureType, Line, Mark, Panel, Plot, Section, on_page
from loopscope.report.settings import ReportSettings
from loopscope.study import StudyView

_MOST_TOKENS = 3
"""Beside each other."""


def _tracked(view: StudyView, components: int) -> list[int]:
    """The first tracked tokens with that many components that are all finite."""
    scores = view.dataset["trajectory"].transpose("tracked", "layer", "recurrence", "component").values
    if scores.shape[-1] < components:
        return []
    finite = np.isfinite(scores[..., :components]).all(axis=(1, 2, 3))
    return [int(index) for index in np.flatnonzero(finite)[:_MOST_TOKENS]]


def _none_finite(components: int, view: StudyView) -> str | None:
    return None if _tracked(view, components) else f"no tracked token has {components} finite components"


def _trajectories(components: int, view: StudyView, settings: ReportSettings) -> Plot:
    counts = drawn_recurrences(view.recurrences, settings)
    panels = []
    for number, index in enumerate(_tracked(view, components)):
        data = view.dataset.isel(tracked=index)
        prompt, token = int(data["tracked_prompt"]), int(data["tracked_token"])
        string = view.strings(prompt)[token]
        scores = data["trajectory"].transpose("layer", "recurrence", "component").values.astype(np.float64)
        axes = [
            Axis(title=f"PC {place + 1}" + (f" ({100 * share:.0f} %)" if np.isfinite(share) else ""), grid=True)
            for place, share in enumerate(data["trajectory_variance"].values[:components])
        ]
        panels.append(
            Panel(
                x=axes[0],
                y=axes[1],
                z=axes[2] if components == 3 else None,
                marks=_paths(scores[:, counts - 1, :components], counts),
                title=f"Prompt {prompt}, token {token} “{visible(string.strip() or string, 20)}”",
                anchor=f"trajectory-{components}d-{number}",
                height=350 if components == 2 else 370,
            )
        )
    return Plot(
        question="Where does a token go?" if components == 2 else "Where does a token go, in three dimensions?",
        reading=f"First {'two' if components == 2 else 'three'} principal components of the residual streams of single "
        "tokens, over all recurrent layers and recurrences, with their shares of the variance. Grey: the path through "
        "the layers, pass after pass. A coloured line joins the states of one layer, from the first recurrence "
        "(circle) to the last (diamond). "
        + (
            "A spiral or a straight run into the diamond is convergence; a line that stays a ring is an orbit, and one "
            "that goes on is drift. A grey loop that repeats itself is the cycle of the layers' points."
            if components == 2
            else "Each axis has a scale of its own."
        ),
        panels=panels,
        legend="layer",
    )


def _paths(scores: NDArray[np.float64], counts: NDArray[np.int64]) -> list[Mark]:
    """The way through the layers, then a line a layer, with marks where it begins and ends; `scores` are (layer,
    recurrence, component)."""
    space = scores.shape[-1] == 3
    marks: list[Mark] = [_cycle(scores, counts)] if len(scores) > 1 else []
    for layer, (path, colour) in enumerate(zip(scores, layer_colours(len(scores)), strict=True)):
        shown = {name: path[:, place] for place, name in enumerate("xyz"[: path.shape[-1]])}
        tip, labels = f"layer {layer}, recurrence {{label}}", [str(count) for count in counts]
        marks.append(
            Line(
                **shown, name=str(layer), colour=colour, width=1.5, points=not space, labels=labels, tip=tip,
                listed=named_in_legend(layer, len(scores)),
            )
        )  # fmt: skip
        for end, hollow in ((slice(0, 1), True), (slice(-1, None), False)):
            marks.append(
                Dots(
                    **{name: values[end] for name, values in shown.items()}, colour=colour, hollow=hollow,
                    symbol="circle" if hollow else "diamond", size=5 if space else 10, labels=labels[end], tip=tip,
                )
            )  # fmt: skip
    return marks


def _cycle(scores: NDArray[np.float64], counts: NDArray[np.int64]) -> Line:
    """All visits in order, each pass up to where the next begins, with a gap where recurrences are left out."""
    layers, recurrences, components = scores.shape
    path = np.full((recurrences, layers + 1, components), np.nan)
    path[:, :layers] = scores.transpose(1, 0, 2)
    follows = np.flatnonzero(np.diff(counts) == 1)
    path[follows, layers] = path[follows + 1, 0]
    places = [(layer, count) for count in counts for layer in [*range(layers), 0]]
    labels = [f"layer {layer}, recurrence {count}" for layer, count in places]
    for at in follows:  # where a pass meets the next one
        labels[(at + 1) * (layers + 1) - 1] = labels[(at + 1) * (layers + 1)]
    shown = dict(zip("xyz", path.reshape(-1, components)[:-1].T, strict=False))
    return Line(**shown, colour=AXIS, width=1, labels=labels[:-1], tip="{label}")


TRAJECTORIES = tuple(
    FigureType(
        name,
        partial(_trajectories, components),
        ("trajectory",),
        anchor="trajectories-2d" if components == 2 else "",
        for_paper=components == 3,  # the third component says nothing more to a reader
        unless=partial(_none_finite, components),
        paper=(5, 26, 27, 28),
    )
    for name, components in (("trajectories", 2), ("trajectories-3d", 3))
)


def trajectories_section(view: StudyView, settings: ReportSettings) -> Section:
    """Tracked tokens; those of prompts that diverged are left out."""
    return Section(
        anchor="trajectories",
        short="Trajectories",
        title="Where does a token go?",
        lead="The states of single tokens, in the plane of their largest variance.",
        figures=on_page(TRAJECTORIES, view, settings),
    )
