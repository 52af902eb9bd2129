"""Where a state of the clean run brings the answer back: visits by positions."""

from __future__ import annotations

import numpy as np

from loopscope._util.sites import stage_name, stage_starts
from loopscope._util.wording import plural, visible
from loopscope.answers.patching import Patching, part_name
from loopscope.report.figures.plot import Axis, HeatMap, Panel, Plot

_MOST_PANELS = 6
"""Parts that are drawn: of many heads, those that bring the most back."""
_MOST_NAMES = 24
"""Stages and recurrences that are named."""
_MOST_TOKENS = 6
"""Likewise, and their names are longer."""


def patching_plot(found: Patching) -> Plot:
    """A map each part: its visits in order, and the tokens or all of them at once."""
    recovery, data = found.mean_recovery, found.dataset
    labels = [str(label) for label in data["visit"].values]
    starts = stage_starts(labels)
    most = np.nanmax(np.where(np.isfinite(recovery), recovery, -np.inf), axis=(1, 2))
    drawn = sorted(np.argsort(-most, kind="stable")[:_MOST_PANELS].tolist())
    left_out = len(recovery) - len(drawn)
    pairs = data.sizes["pair"]
    names = _position_names(found)
    named = starts[:: -(-len(starts) // _MOST_NAMES)]
    y = Axis(title="visit", ticks={start: stage_name(labels[start]) for start in named})
    x = Axis(title="token, from the end", ticks=names)
    return Plot(
        name="patching",
        anchor="patching",
        question="Which states bring the answer back?",
        reading=(
            "The corrupted prompt's run with one state of the clean prompt's run in it: how much of the difference "
            f"between the two it brings back, mean over {plural(pairs, 'pair')}. 0: nothing; 1: the whole answer; "
            "below 0: it leads away from it. Rows are the visits of layers in the order of the run, from above; white "
            "lines separate stages and recurrences, which are named at their first layer. No colour: not patched, or "
            "not known." + (f" The {plural(left_out, 'part')} that bring least back are left out." if left_out else "")
        ),
        variables=("recovery",),
        panels=[
            Panel(
                x=x,
                y=y,
                title=part_name(str(data["part"].values[part])),
                marks=[
                    HeatMap(
                        z=recovery[part],
                        x=np.arange(recovery.shape[2]),
                        bar="recovery",
                        low=min(0.0, float(np.nanmin(recovery[drawn], initial=0.0))),
                        high=max(1.0, float(np.nanmax(recovery[drawn], initial=1.0))),
                        parted_y=[start - 0.5 for start in starts[1:]],
                        labels=[
                            [f"{label}, {_place(int(place))}" for place in data["position"].values] for label in labels
                        ],
                        tip="{label}: {z:.3f}",
                    )
                ],
                height=max(300, min(900, 110 + 12 * len(labels))),
            )
            for part in drawn
        ],
    )


def _place(position: int) -> str:
    return "all tokens" if position == 0 else f"token {position}"


def _position_names(found: Patching) -> dict[float | int, str]:
    """The tokens of the only pair, or numbers."""
    positions = [int(place) for place in found.dataset["position"].values]
    every = -(-len(positions) // _MOST_TOKENS)
    pairs = found.manifest["pairs"]
    tokens = pairs[0]["tokens"] if len(pairs) == 1 else None
    return {
        number: "all" if place == 0 else str(place) if tokens is None else f"{visible(str(tokens[place]), 8)} {place}"
        for number, place in enumerate(positions)
        if (len(positions) - 1 - number) % every == 0
    }
