"""What exit rules would have saved and cost."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from loopscope._util.wording import significant
from loopscope.answers.exit_rules import ExitTables, tables_of
from loopscope.answers.exit_signals import EXIT_SIGNALS, ExitSignal
from loopscope.report.figures.look import CATEGORIES, INK
from loopscope.report.figures.plot import Axis, Dots, FigureType, Line, Mark, Panel, Plot
from loopscope.report.settings import ReportSettings
from loopscope.study import StudyView

_POINTS_BETWEEN = 16
"""Of the line for the same number of recurrences, which bends between whole numbers where the axis is logarithmic."""


def _exit_rules(view: StudyView, settings: ReportSettings) -> Plot:
    """Three costs over the mean number of recurrences, means over prompts."""
    tables = tables_of(view, view.shown)
    assert tables is not None
    full = tables.recurrences
    # Where nearly all tokens run to the end, the mean falls to 0. A tenth of what one recurrence less costs is enough.
    least = float(tables.constant["kl"].sel(threshold=full - 1).mean()) / 10
    rules = {key: table.mean("prompt") for key, table in tables.rules.items()}
    tables = dataclasses.replace(tables, constant=tables.constant.mean("prompt"), rules=rules)
    costs = (
        ("changed", "", Axis(title="share of tokens", percent=True), "{y:.2%}", -np.inf),
        ("loss_difference", "exit-loss", Axis(title="loss difference (nats a token)"), "{y:.3g} nats", -np.inf),
        ("kl", "exit-kl", Axis(title="KL divergence (nats)", scale="auto"), "{y:.2g} nats", least),
    )
    return Plot(
        question="What does an exit rule change, and what does it cost?",
        reading=(
            f"Predictions at which a token stops beside those after a full run of {full} recurrences: (a) share of "
            "tokens whose most probable next token is another, (b) mean next-token loss less that after a full run, "
            "below 0: stopping early does better, (c) KL divergence from the full run's. A line is a rule under all "
            "its thresholds: strict at the right, loose at the left; dashed where it goes by predictions, for which "
            "the model is read out after every recurrence. A rule is worth something where it lies below the black "
            "line: the same number for all tokens, or, between whole numbers, one more for tokens drawn at "
            "random. Diamonds: the threshold that the model or its publishers use, or the setting for stable heads. "
            "Small differences are chance; the answer gives the interval for the rule that it names."
        ),
        panels=[
            Panel(
                x=Axis(title="mean recurrences a token", whole=True),
                y=axis,
                marks=_costs(tables, name, shown, least),
                anchor=anchor,
            )
            for name, anchor, axis, shown, least in costs
        ],
    )


def _costs(tables: ExitTables, name: str, shown: str, least: float) -> list[Mark]:
    """One cost of every rule and of the same number for all tokens, where it is above `least`."""
    constant = tables.constant[name].values
    counts = np.arange(1, tables.recurrences + 1)
    between = np.linspace(1, tables.recurrences, (tables.recurrences - 1) * _POINTS_BETWEEN + 1)
    line = np.interp(between, counts, constant)  # as `constant_at`, all at once
    tip = "{x:.3g} for all tokens: " + shown
    marks: list[Mark] = [
        Line(x=between, y=_above(line, least), name="the same number for all", colour=INK, tip=tip),
        Dots(x=counts, y=_above(constant, least), colour=INK, size=6, tip=tip),
    ]
    for decodes in (False, True):
        alike = [rule for rule in EXIT_SIGNALS if rule.decodes is decodes]
        for rule, colour in zip(alike, CATEGORIES[:-1], strict=True):  # the last one is that of the line for all
            if rule.key in tables.rules:
                marks += _rule(rule, tables, name, colour, shown, least)
    return marks


def _rule(rule: ExitSignal, tables: ExitTables, name: str, colour: str, shown: str, least: float) -> list[Mark]:
    table = tables.rules[rule.key]
    tip = f"{rule.name} {'≥' if rule.at_least else '≤'} {{label}}\n{{x:.2f}} recurrences: {shown}"
    digits = 5 if rule.at_least else 3
    marks: list[Mark] = [
        Line(
            x=table["recurrences"].values, y=_above(table[name].values, least), name=rule.name, colour=colour,
            dash="dash" if rule.decodes else "solid",
            labels=[significant(float(each), digits) for each in table["threshold"].values], tip=tip,
        )
    ]  # fmt: skip
    if rule.key in tables.usual:
        usual = table.sel(threshold=[tables.usual[rule.key]])
        marks.append(
            Dots(
                x=usual["recurrences"].values, y=_above(usual[name].values, least), colour=colour, symbol="diamond",
                size=10, labels=[f"{tables.usual[rule.key]:g}"], tip=tip,
            )
        )  # fmt: skip
    return marks


def _above(values: NDArray[np.floating], least: float) -> NDArray[np.floating]:
    """A gap where a value is not above the least that is drawn."""
    return np.where(values > least, values, np.nan)


def _no_choice(view: StudyView) -> str | None:
    return None if view.recurrences > 1 else "one recurrence was measured, so there is nothing to save"


EXIT_RULES_FIGURE = FigureType(
    "exit-rules", _exit_rules, ("token_kl_to_full",), anchor="exit-changed", folded=True, unless=_no_choice
)
