"""Does the state settle, how fast, and for the right reason?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import xarray

from loopscope.report.figures.curves import (
    BAND_LEVELS,
    Curve,
    Layout,
    attention_curve,
    floor_words,
    laid_out,
    line_words,
    one_recurrence,
    passes,
    state_curve,
)
from loopscope.report.figures.look import CATEGORIES, MUTED, Symbol
from loopscope.report.figures.plot import (
    Axis,
    Dots,
    FigureType,
    Mark,
    Panel,
    Plot,
    Rule,
    Section,
    never,
    on_page,
)
from loopscope.report.settings import ReportSettings
from loopscope.study import StudyView, median_over_prompts

PER_ROW = "Frobenius distances are divided by the square root of the number of tokens."
_LAYOUTS: tuple[Layout, ...] = ("by layer", "by recurrence", "by depth")
_MOST_NAMES = 12
"""Layers that are named on an axis."""


@dataclass(frozen=True, kw_only=True)
class _Quantity:
    """What one panel shows of every layer and recurrence."""

    variable: str
    title: str
    """Of the y axis."""
    anchor: str = ""
    """Of its panel by layer."""
    floor: bool = False
    horizon: bool = False
    """Whether it is 0 at the horizon, which is marked."""
    attention: bool = False
    folded: bool = False
    """Whether a page shows its panel when it is asked for."""

    def curve(self, view: StudyView) -> Curve:
        if self.attention:
            return attention_curve(view, self.variable)
        return state_curve(view, self.variable)


def _drawn(
    quantities: tuple[_Quantity, ...],
    question: Callable[[StudyView], str] | str,
    reading: str,
    layout: Layout,
    view: StudyView,
    settings: ReportSettings,
) -> Plot:
    curves = [quantity.curve(view) for quantity in quantities]
    recurrences = passes(view.recurrences)
    floors = [floor_words(view, curve) for quantity, curve in zip(quantities, curves, strict=True) if quantity.floor]
    marked = [Rule(x=view.horizon, name=f"H: {view.horizon}", above=True)] if view.recurrences >= view.horizon else []
    means = "each prompt's heads" if any(quantity.attention for quantity in quantities) else "each prompt's tokens"
    asked = question if isinstance(question, str) else question(view)
    return Plot(
        question=asked if layout == "by layer" else f"{asked.rstrip('?')} ({layout})?",
        reading=reading,
        lines=[
            f"Medians over prompts of means over {means}.",
            *line_words(view, layout, curves[0], recurrences),
            *dict.fromkeys(filter(None, floors)),
        ],
        panels=[
            laid_out(
                view, settings, curve, layout, quantity.title, recurrences, floor=quantity.floor,
                anchor=quantity.anchor if layout == "by layer" else "",
                more=marked if quantity.horizon and layout == "by layer" else (), folded=quantity.folded,
            )
            for quantity, curve in zip(quantities, curves, strict=True)
        ],
        legend="recurrence" if layout == "by recurrence" else "layer",
    )  # fmt: skip


def _types(
    name: str,
    question: Callable[[StudyView], str] | str,
    reading: str,
    *quantities: _Quantity,
    anchors: tuple[str, str] = ("", ""),
    paper: tuple[int, ...] = (),
    layouts: tuple[Layout, ...] = _LAYOUTS,
    settles: bool = True,
    folded: bool = False,
) -> list[FigureType[StudyView]]:
    """A type per layout; `anchors` are those by layer and by recurrence, and what `settles` needs more
    than one recurrence. The paper has these by layer, and a page shows the others when they are asked for, or all
    that are `folded`."""
    return [
        FigureType(
            f"{name}-{layout.replace(' ', '-')}",
            partial(_drawn, quantities, question, reading, layout),
            tuple(quantity.variable for quantity in quantities),
            anchor=anchor,
            for_paper=not anchor,
            paper=paper if layout == "by layer" else (),
            unless=one_recurrence if settles else never,
            folded=folded or layout != "by layer",
        )
        for layout, anchor in zip(layouts, (*anchors, ""), strict=False)
    ]


def _horizons(view: StudyView, settings: ReportSettings) -> Plot:
    first, second = view.horizon, view.second_horizon
    steps = view.variable("horizon_relative_step")
    tolerance = settings.criterion.drift_tolerance
    kinds: list[tuple[str, xarray.DataArray, Symbol, bool, str]] = [
        (f"moved from {first} to {second}", view.variable("horizon_drift"), "diamond", False, CATEGORIES[3]),
        (f"step into {first}", steps.sel(horizon="first", drop=True), "circle", True, CATEGORIES[5]),
        (f"step into {second}", steps.sel(horizon="second", drop=True), "square", False, CATEGORIES[0]),
        ("noise floor", view.variable("noise_floor"), "bar", False, MUTED),
    ]
    marks: list[Mark] = []
    layers = np.arange(view.recurrent)
    for place, (name, values, symbol, hollow, colour) in enumerate(kinds):
        low, middle, high = (
            median_over_prompts(values, level).values.astype(np.float64)
            for level in (BAND_LEVELS[0], 0.5, BAND_LEVELS[1])
        )
        if np.isfinite(middle).any():
            marks.append(
                Dots(
                    x=layers + 0.14 * (place - 1.5), y=middle, low=low, high=high, name=name, symbol=symbol,
                    hollow=hollow, colour=colour, labels=[f"layer {layer}" for layer in layers], tip="",
                )
            )  # fmt: skip
    return Plot(
        question=f"How far does the state still move between {first} and {second} recurrences?",
        reading=(
            "Per recurrent layer, as shares of the state's norm: how far the state moves from H to 2H, the steps into "
            "both, the estimated noise floor, and the tolerance of the quick answers (dashed). A layer with everything "
            "below the tolerance has settled; one with more drift, and steps that do not shrink, has no fixed point. "
            "Medians over prompts; whiskers hold 90 % of the prompts. A logarithmic axis cannot show exact zeros."
        ),
        panels=[
            Panel(
                x=Axis(
                    title="recurrent layer",
                    span=(-0.5, view.recurrent - 0.5),
                    ticks=[float(layer) for layer in layers[:: max(1, -(-len(layers) // _MOST_NAMES))]],
                ),
                y=Axis(title="share of the state's norm", scale="auto"),
                marks=[*marks, Rule(y=tolerance, name=f"tolerance ({tolerance:g})")],
            )
        ],
    )


CONVERGENCE: tuple[FigureType[StudyView], ...] = (
    *_types(
        "step",
        "How much does one more recurrence move each layer?",
        "How far one more recurrence moves each layer: (a) Euclidean norm of the difference of successive residual "
        "streams, (b) divided by the norm of the state: read it together with the growth of the norm.",
        _Quantity(variable="successive_difference", title="step", folded=True),
        _Quantity(variable="relative_step", title="step / norm of the state", floor=True),
        anchors=("step", "step-by-recurrence"),
        paper=(3,),
    ),
    *_types(
        "distance",
        lambda view: f"How far is each layer from its state at recurrence {view.horizon}?",
        "Distance of each layer's residual stream to its state at the horizon H, which stands in for the fixed point: "
        "(a) Euclidean norm of the difference, (b) divided by the norm at H, (c) the same for the state at 2H. On a "
        "logarithmic axis a straight fall is geometric convergence; it ends in a plateau. At H the distance in (a) and "
        "(b) is 0 by construction, so the end of these curves alone proves nothing; a plateau in (c) "
        "that is absent in (b) is drift.",
        _Quantity(variable="distance_to_horizon", title="distance to state at H", horizon=True, folded=True),
        _Quantity(variable="relative_distance", title="distance / norm at H", floor=True, horizon=True),
        _Quantity(
            variable="relative_distance_second_horizon", title="distance / norm at 2H", anchor="second-horizon",
            folded=True,
        ),
        anchors=("distance", "distance-by-recurrence"),
        paper=(4,),
    ),
    *_types(
        "direction",
        "Does the direction settle?",
        "Direction of each layer's residual stream: 1 − cosine (a) to the state one recurrence before, (b) to the "
        "state at the horizon H; 0.005 is an angle of about 6 degrees. The norm plays no part. On a "
        "logarithmic axis exact zeros are gaps.",
        _Quantity(variable="cosine_distance_to_previous", title="1 − cosine to state before"),
        _Quantity(variable="cosine_distance_to_horizon", title="1 − cosine to state at H"),
        anchors=("cosine", ""),
        paper=(22, 24),
        folded=True,
    ),
    *_types(
        "attention",
        "Does the attention of each layer settle?",
        "Attention maps of each layer: distance (a) to the map one recurrence before, (b) to the map at the horizon H. "
        f"{PER_ROW}",
        _Quantity(variable="attention_change", title="distance per row to map before", attention=True),
        _Quantity(
            variable="attention_distance_to_horizon", title="distance per row to map at H", attention=True,
            anchor="head-distance",
        ),
        anchors=("attention-by-layer", ""),
        paper=(23, 25),
        folded=True,
    ),
    *_types(
        "norm",
        "Does the norm of the residual stream keep growing?",
        "(a) Mean token norm of the residual stream, (b) divided by its value after the first recurrence. A "
        "growing norm makes relative steps shrink although the state does not settle.",
        _Quantity(variable="residual_norm", title="token norm"),
        _Quantity(variable="norm_growth", title="norm / norm after recurrence 1", anchor="norm-growth"),
        anchors=("norm-by-layer", ""),
        layouts=("by layer",),
        settles=False,
        folded=True,
    ),
    *_types(
        "path-independence",
        "Do two initial states end in the same place?",
        "Two runs of the same prompts from different initial states: (a) distance of their states, divided by the mean "
        "norm, (b) 1 − cosine. If it falls to the noise floor, the model forgets where it started; if it stays above, "
        "the end depends on the start.",
        _Quantity(variable="path_distance", title="distance / mean norm", floor=True),
        _Quantity(variable="path_cosine_distance", title="1 − cosine of the two runs", folded=True),
        anchors=("path-independence", ""),
        layouts=("by layer",),
        settles=False,
    ),
    FigureType("horizons", _horizons, ("horizon_drift", "horizon_relative_step"), anchor="horizon-drift"),
)  # fmt: skip
_SETTLING = ("distance", "step", "horizons", "path-independence", "direction", "norm")


def convergence_section(view: StudyView, settings: ReportSettings) -> Section:
    """Distance and step, movement between the horizons and between two runs, then direction and norm."""
    types = {each.name: each for each in CONVERGENCE}
    names = [name for start in _SETTLING for name in types if name.startswith(start)]
    figures = on_page([types[name] for name in names], view, settings)
    lines: Sequence[str] = next((each.lines for each in figures if isinstance(each, Plot) and each.lines), ())
    return Section(
        anchor="settling",
        short="Settling",
        title="Does it settle?",
        lead=" ".join([f"H = {view.horizon} recurrences.", *lines]),
        figures=figures,
    )


def first_figure(view: StudyView, settings: ReportSettings) -> Plot | None:
    """Of the first answer: how far each layer is from its state at the horizon, over the recurrences."""
    kind = next(each for each in CONVERGENCE if each.name == "distance-by-layer")
    if not view.looped or kind.absent(view) is not None:
        return None
    plot = kind.draw(view, settings)
    panel = dataclasses.replace(plot.panels[1], height=250, anchor="first-distance")
    return dataclasses.replace(plot, panels=[panel], anchor="first") if panel.has_data else None
