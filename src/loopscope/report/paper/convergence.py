"""Figures: does the state settle, how fast, and for the right reason?"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loopscope.answers.answer import Criterion
from loopscope.report.figures.look import CATEGORIES, MUTED
from loopscope.report.paper.axes import choose_scale, drawable, finish_scale, name_x_once, name_y, panels
from loopscope.report.paper.curves import BAND_LEVELS, Curve, attention_curve, state_curve
from loopscope.report.paper.layouts import EXPLAINED, Layout, draw_curve, legend_title, passes
from loopscope.report.paper.legends import add_legend
from loopscope.report.paper.style import Width, study_figure
from loopscope.study import Readings, median_over_prompts

_FAR = 100.0
"""A floor that lies farther below the curves than this factor is left out: it would flatten them."""


@study_figure
def step(readings: Readings, layout: Layout = "by layer", width: Width = "auto") -> Figure:
    """How far one more recurrence moves each layer: the norm of the difference, and the same over the state's norm."""
    curves = [
        state_curve(readings, "successive_difference", "step"),
        state_curve(readings, "relative_step", "step / norm of the state"),
    ]
    return _laid_out(readings, curves, layout, width, floor_at=1)


@study_figure
def distance(readings: Readings, layout: Layout = "by layer", width: Width = "auto") -> Figure:
    """How far each layer is from its approximate fixed point, the state at the horizon H: the norm of the difference,
    the same over the norm there, and the latter for the state at 2H."""
    curves = [
        state_curve(readings, "distance_to_horizon", "distance to state at H"),
        state_curve(readings, "relative_distance", "distance / norm at H"),
        state_curve(readings, "relative_distance_second_horizon", "distance / norm at 2H"),
    ]
    return _laid_out(readings, curves, layout, width, floor_at=1)


@study_figure
def direction(readings: Readings, layout: Layout = "by layer", width: Width = "auto") -> Figure:
    """The same without the norm: 1 - cosine to the state one recurrence before, and to that at the horizon."""
    curves = [
        state_curve(readings, "cosine_to_previous", "1 − cosine to state before", one_minus=True),
        state_curve(readings, "cosine_to_horizon", "1 − cosine to state at H", one_minus=True),
    ]
    return _laid_out(readings, curves, layout, width)


@study_figure
def attention(readings: Readings, layout: Layout = "by layer", width: Width = "auto") -> Figure:
    """How far a layer's attention maps are from those one recurrence before, and from those at the horizon."""
    curves = [
        attention_curve(readings, "attention_change", "distance per row to map before"),
        attention_curve(readings, "attention_distance_to_horizon", "distance per row to map at H"),
    ]
    return _laid_out(readings, curves, layout, width)


@study_figure
def norm(readings: Readings, layout: Layout = "by layer", width: Width = "auto") -> Figure:
    """Mean token norm of the residual stream, and the same over its value after the first recurrence."""
    curves = [
        state_curve(readings, "residual_norm", "token norm"),
        state_curve(readings, "norm_growth", "norm / norm after recurrence 1"),
    ]
    return _laid_out(readings, curves, layout, width)


@study_figure
def path_independence(readings: Readings, layout: Layout = "by layer", width: Width = "auto") -> Figure:
    """How far two runs of the same prompt from different initial states are apart, with and without their norm."""
    curves = [
        state_curve(readings, "path_distance", "distance / mean norm"),
        state_curve(readings, "path_cosine", "1 − cosine of the two runs", one_minus=True),
    ]
    return _laid_out(readings, curves, layout, width, floor_at=0)


@study_figure
def horizons(readings: Readings, width: Width = "auto") -> Figure:
    """Per layer, as shares of the state's norm: how far it moves from H to 2H, and the steps into both, beside the
    rounding floor and the tolerance of the quick answers; medians over prompts with whiskers that hold 90 % of them."""
    first, second = readings.view.horizon, 2 * readings.view.horizon
    steps = readings.variable("horizon_relative_step")
    kinds = [
        (f"moved from {first} to {second}", readings.variable("horizon_drift"), "D", CATEGORIES[3]),
        (f"step into {first}", steps.sel(horizon="first", drop=True), "o", CATEGORIES[5]),
        (f"step into {second}", steps.sel(horizon="second", drop=True), "s", CATEGORIES[0]),
        ("rounding floor", readings.variable("noise_floor"), "_", MUTED),
    ]
    figure, (axes,) = panels(1, width)
    low, middle, high = (
        np.stack([median_over_prompts(values, level).values for _, values, _, _ in kinds]).astype(np.float64)
        for level in (BAND_LEVELS[0], 0.5, BAND_LEVELS[1])
    )
    tolerance = Criterion().drift_tolerance
    choose_scale(axes, np.append(middle, tolerance))
    layers = np.arange(readings.recurrent)
    for place, (name, _, marker, colour) in enumerate(kinds):
        shown = drawable(axes, middle[place])
        if not np.isfinite(shown).any():
            continue
        whiskers = np.nan_to_num(np.stack([shown - np.maximum(low[place], 0), high[place] - shown]))
        # On a logarithmic axis a whisker down to 0 has no end.
        whiskers[0] = np.minimum(whiskers[0], np.nan_to_num(0.999 * shown))
        axes.errorbar(
            layers + 0.14 * (place - 1.5),
            shown,
            yerr=np.maximum(whiskers, 0),
            linestyle="none",
            marker=marker,
            markersize=4,
            color=colour,
            elinewidth=0.7,
            label=name,
        )
    axes.axhline(tolerance, color=MUTED, linewidth=0.7, linestyle=(0, (4, 2)), label=f"tolerance ({tolerance:g})")
    axes.set_xlabel("recurrent layer")
    axes.set_ylabel("share of the state's norm")
    axes.set_xticks(layers[:: max(1, -(-len(layers) // 12))])
    finish_scale(axes)
    add_legend(figure, [axes])
    return figure


def _laid_out(
    readings: Readings, curves: list[Curve], layout: Layout, width: Width, *, floor_at: int | None = None
) -> Figure:
    """A panel per curve; `floor_at` is the one that gets the rounding floor."""
    figure, drawn = panels(len(curves), width)
    for index, (axes, curve) in enumerate(zip(drawn, curves, strict=True)):
        draw_curve(axes, readings, curve, layout, passes(curve.recurrences))
        if index == floor_at:
            _add_floor(axes, readings)
        name_y(axes, curve.title)
        finish_scale(axes)
    name_x_once(drawn)
    add_legend(figure, drawn, legend_title(layout), explained=EXPLAINED)
    return figure


def _add_floor(axes: Axes, readings: Readings) -> None:
    """A dotted line at the estimated rounding floor, median over layers and prompts, where it is near the curves."""
    floor = readings.variable("noise_floor").values
    floor = floor[np.isfinite(floor) & (floor > 0)]
    values = np.concatenate([np.empty(0), *(np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.lines)])
    values = values[values > 0]
    if floor.size and values.size and (level := float(np.median(floor))) >= values.min() / _FAR:
        axes.axhline(level, color=MUTED, linewidth=0.8, linestyle=":", label="rounding floor")
