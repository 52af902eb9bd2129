"""Figures: what exit rules would have saved and cost."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray
from numpy.typing import ArrayLike, NDArray

from loopscope._util.wording import significant
from loopscope.answers.exit_rules import EXIT_RULES, ExitTables, StoppingRule, tables_of
from loopscope.report.figures._old import Figure, Material, base_figure, scale_y
from loopscope.report.figures.look import CATEGORIES, INK

_POINTS_BETWEEN = 16
"""Of the line for the same number of recurrences, which bends between whole numbers where the axis is logarithmic."""


def exit_rule_figures(material: Material) -> list[Figure]:
    """Three costs over the mean number of recurrences; none where no full run was read out."""
    tables = tables_of(material.view, material.shown)
    if tables is None or tables.recurrences == 1:
        return []
    full = tables.recurrences
    changed = _costs(tables, "changed", "share of tokens", "{y:.2%}")
    changed.update_yaxes(rangemode="tozero", tickformat=".0%")
    loss = _costs(tables, "loss_difference", "loss difference (nats a token)", "{y:.3g} nats")
    # Where nearly all tokens run to the end, the mean falls to 0. A tenth of what one recurrence less costs is enough.
    least = float(tables.constant["kl"].sel(threshold=full - 1).mean()) / 10
    divergence = _costs(tables, "kl", "KL divergence (nats)", "{y:.2g} nats", least)
    scale_y(divergence)
    return [
        Figure(
            anchor="exit-changed",
            title="How many answers does an exit rule change?",
            caption=(
                f"Share of tokens whose most probable next token is not that after a full run of {full} recurrences. A "
                "line is a rule under all its thresholds: strict at the right, loose at the left. A rule is worth "
                "something where it lies below the black line: the same number for all tokens, or, between whole "
                "numbers, one more for tokens drawn at random. Diamonds: the threshold that the model or its "
                "publishers use, or the setting for stable heads."
            ),
            plot=changed,
        ),
        Figure(
            anchor="exit-loss",
            title="What does an exit rule cost in loss?",
            caption=(
                f"Mean next-token loss less that after a full run of {full}. Below 0: stopping early does better. "
                "Small differences are chance; the answer gives the interval for the rule that it names."
            ),
            plot=loss,
        ),
        Figure(
            anchor="exit-kl",
            title="How far are the stopped predictions from those of a full run?",
            caption=f"KL divergence of the prediction at which a token stops from that after {full} recurrences.",
            plot=divergence,
        ),
    ]


def _costs(tables: ExitTables, name: str, y_title: str, shown: str, least: float = -np.inf) -> go.Figure:
    """One cost of every rule and of the same number for all tokens, means over prompts, where it is above `least`."""
    figure = base_figure("mean recurrences a token", y_title, hovermode="closest")
    constant = tables.constant.mean("prompt")
    counts = np.arange(1, tables.recurrences + 1)
    between = np.linspace(1, tables.recurrences, (tables.recurrences - 1) * _POINTS_BETWEEN + 1)
    shared = {"legendgroup": "constant", "name": "the same number for all", "line": {"color": INK, "width": 2}}
    line = np.interp(between, counts, constant[name].values)  # as `constant_at`, all at once
    figure.add_scatter(x=between, y=_above(line, least), mode="lines", hoverinfo="skip", **shared)
    figure.add_scatter(
        x=counts,
        y=_above(constant[name].values, least),
        mode="markers",
        marker={"size": 6, "color": INK},
        showlegend=False,
        hovertemplate="%{x} for all tokens: %" + shown + "<extra></extra>",
        **shared,
    )
    rules = [rule for rule in EXIT_RULES if rule.key in tables.rules]
    for rule, colour in zip(rules, CATEGORIES, strict=False):
        _add_rule(figure, rule, tables, name, colour, shown, least)
    return figure


def _add_rule(
    figure: go.Figure, rule: StoppingRule, tables: ExitTables, name: str, colour: str, shown: str, least: float
) -> None:
    table = tables.rules[rule.key].mean("prompt")
    sign = "≥" if rule.at_least else "≤"
    hover = f"{rule.name} {sign} %{{text}}<br>%{{x:.2f}} recurrences: %{shown}<extra></extra>"
    digits = 5 if rule.at_least else 3
    figure.add_scatter(
        x=_spread(table),
        y=_above(table[name].values, least),
        text=[significant(float(each), digits) for each in table["threshold"].values],
        name=rule.name,
        mode="lines",
        line={"color": colour, "width": 2},
        hovertemplate=hover,
    )
    if rule.key in tables.usual:
        usual = table.sel(threshold=[tables.usual[rule.key]])
        figure.add_scatter(
            x=_spread(usual),
            y=_above(usual[name].values, least),
            text=[f"{tables.usual[rule.key]:g}"],
            mode="markers",
            marker={"symbol": "diamond", "size": 10, "color": colour, "line": {"color": "white", "width": 1}},
            showlegend=False,
            hovertemplate=hover,
        )


def _above(values: ArrayLike, least: float) -> NDArray[np.float32]:
    """A gap where a value is not above the least that is drawn."""
    found = np.asarray(values, dtype=np.float32)
    return np.where(found > least, found, np.float32(np.nan))


def _spread(table: xarray.Dataset) -> NDArray[np.float32]:
    return table["recurrences"].values.astype(np.float32)
