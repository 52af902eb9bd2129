"""Figures: does the state settle, how fast, and for the right reason?"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import xarray

from loopscope.report.figures.curves import Material
from loopscope.report.figures.in_plotly import by_layer, by_recurrence, mark_vertical, scale_y
from loopscope.report.figures.look import CATEGORIES, MUTED, base_figure
from loopscope.report.figures.plot import Figure, Section
from loopscope.study import median_over_prompts


def convergence_section(material: Material) -> Section:
    """Movement between the horizons, then distance, step, direction and norm over the recurrences."""
    horizon = material.view.horizon
    return Section(
        anchor="settling",
        short="Settling",
        title="Does it settle?",
        lead=f"Lines are medians over prompts of means over each prompt's tokens. H = {horizon} recurrences.",
        figures=[
            _between_horizons(material),
            _norm_growth(material),
            *_distance(material),
            *_step(material),
            _direction(material),
            _second_horizon(material),
        ],
    )


def _between_horizons(material: Material) -> Figure:
    first, second = material.view.horizon, 2 * material.view.horizon
    data = material.shown
    steps = data["horizon_relative_step"]
    kinds = [
        _Dots(f"moved from {first} to {second}", data["horizon_drift"], "diamond", CATEGORIES[3]),
        _Dots(f"step into {first}", steps.sel(horizon="first", drop=True), "circle-open", CATEGORIES[0]),
        _Dots(f"step into {second}", steps.sel(horizon="second", drop=True), "circle", CATEGORIES[0]),
        _Dots("rounding floor", data["noise_floor"], "line-ew-open", MUTED),
    ]
    tolerance = material.settings.criterion.drift_tolerance
    figure = base_figure("recurrent layer", "share of the state's norm", hovermode="closest")
    if np.isfinite(kinds[0].values).any():
        positive = [float(value) for kind in kinds for value in kind.values.values.flat if value > 0]
        bottom = min([tolerance, *positive]) / 10
        for place, kind in enumerate(kinds):
            kind.add_to(figure, 0.12 * (place - 1.5), bottom)
        figure.add_scatter(
            x=[-0.5, material.recurrent - 0.5],
            y=[tolerance, tolerance],
            name=f"tolerance ({tolerance:g})",
            mode="lines",
            line={"color": MUTED, "width": 1, "dash": "dash"},
            hoverinfo="skip",
        )
    scale_y(figure)
    figure.update_xaxes(
        tickvals=list(range(material.recurrent)) if material.recurrent <= 16 else None,
        range=[-0.5, material.recurrent - 0.5],
    )
    return Figure(
        anchor="horizon-drift",
        title=f"How far does the state still move between {first} and {second} recurrences?",
        caption=(
            "Everything below the dashed line: settled. Drift above it with steps that do not shrink: no fixed "
            "point. Medians over prompts; whiskers hold 90 % of the prompts. Exact zeros are drawn at the bottom."
        ),
        plot=figure,
    )


@dataclass(frozen=True)
class _Dots:
    """A dot for every layer."""

    name: str
    values: xarray.DataArray
    """Dimensions (layer, prompt)."""
    symbol: str
    colour: str

    def add_to(self, figure: go.Figure, shift: float, bottom: float) -> None:
        """Medians over prompts, with whiskers; what is below `bottom` is drawn there."""
        middle, low, high = (median_over_prompts(self.values, level).values for level in (0.5, 0.05, 0.95))
        if not np.isfinite(middle).any():
            return
        figure.add_scatter(
            x=np.arange(len(middle)) + shift,
            y=np.maximum(middle, bottom),
            error_y={"type": "data", "array": high - middle, "arrayminus": middle - low, "width": 3, "thickness": 1},
            customdata=middle,
            name=self.name,
            mode="markers",
            marker={"symbol": self.symbol, "size": 9, "color": self.colour, "line": {"width": 2, "color": self.colour}},
            hovertemplate=f"{self.name}: %{{customdata:.2g}}<extra></extra>",
        )


def _norm_growth(material: Material) -> Figure:
    return Figure(
        anchor="norm-growth",
        title="Does the norm keep growing?",
        caption=(
            "Mean token norm over its value after the first recurrence. A norm that grows without bound shrinks "
            "relative steps although the state does not settle."
        ),
        plot=by_layer(material, "norm_growth", "norm, relative to recurrence 1", ribbon=False),
    )


def _distance(material: Material) -> list[Figure]:
    horizon = material.view.horizon
    title = "distance / norm at H"
    over_time = by_layer(material, "relative_distance", title, floor=True)
    if material.view.recurrences >= horizon:
        mark_vertical(over_time, horizon, f"H: {horizon}")
    return [
        Figure(
            anchor="distance",
            title=f"How far is each layer from its state at recurrence {horizon}?",
            caption=(
                "On a logarithmic axis a straight fall is geometric convergence, and a plateau is where it ends. The "
                "distance is 0 at H by construction, so the end of the curve proves nothing alone. The band holds "
                "90 % of the tokens at the last layer."
            ),
            plot=over_time,
        ),
        Figure(
            anchor="distance-by-recurrence",
            title="The same distance along the depth of one pass",
            caption="One line per recurrence, later ones lighter. Flat lines: all layers approach together.",
            plot=by_recurrence(material, _all(material, "relative_distance"), title),
        ),
    ]


def _step(material: Material) -> list[Figure]:
    title = "step / norm of the state"
    over_time = by_layer(material, "relative_step", title, floor=True)
    return [
        Figure(
            anchor="step",
            title="How much does one more recurrence move each layer?",
            caption=(
                "Relative step from one recurrence to the next. Around the estimated rounding floor (dotted) what is "
                "left is rounding. Read it together with the growth of the norm."
            ),
            plot=over_time,
        ),
        Figure(
            anchor="step-by-recurrence",
            title="The same step along the depth of one pass",
            caption="One line per recurrence, later ones lighter; the first has no step.",
            plot=by_recurrence(material, _all(material, "relative_step"), title),
        ),
    ]


def _direction(material: Material) -> Figure:
    shown = material.shown.assign(
        turn=1 - material.shown["cosine_to_horizon"], turn_quantile=1 - material.shown["cosine_to_horizon_quantile"]
    )
    angled = dataclasses.replace(material, finite=shown)
    return Figure(
        anchor="cosine",
        title="Does the direction settle?",
        caption=(
            "1 − cosine between the state and its state at H; 0.005 is an angle of about 6 degrees. Direction "
            "alone: it does not see the norm. In float32 a line ends near 1e-7, where the cosine rounds to 1."
        ),
        plot=by_layer(angled, "turn", "1 − cosine to the state at H"),
    )


def _second_horizon(material: Material) -> Figure:
    second = 2 * material.view.horizon
    return Figure(
        anchor="second-horizon",
        title=f"Is the picture the same seen from recurrence {second}?",
        caption=(
            "Distance to the state at twice the horizon. Where it agrees with the distance to H, the horizon was "
            "far enough; a plateau here that is absent there is drift."
        ),
        plot=by_layer(material, "relative_distance_second_horizon", "distance / norm at 2H"),
    )


def _all(material: Material, name: str) -> xarray.DataArray:
    return median_over_prompts(material.shown[name]).transpose("layer", "recurrence")


def norms_section(material: Material) -> Section:
    """How large the residual stream is in the long run."""
    figure = Figure(
        anchor="norm-by-layer",
        title="By layer: over the recurrences",
        caption="A line per recurrent layer, over all recurrences measured.",
        plot=by_layer(material, "residual_norm", "token norm"),
    )
    return Section(
        anchor="norms",
        short="Norms",
        title="How does the residual stream's norm go on?",
        lead="Mean token norm of the residual stream, median over prompts.",
        figures=[figure],
    )
