"""The answers of a study in a terminal: a line each, sentences, or JSON."""

from __future__ import annotations

import json as json_lines
import math
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from loopscope._util.wording import percent, significant
from loopscope.answers.answer import Answer, Outcome
from loopscope.cli.console import say_answers, say_path

_STYLES = {Outcome.YES: "green", Outcome.NO: "red", Outcome.NOT_APPLICABLE: "dim"}
"""Of the others yellow."""

_LINES = {
    "fixed_point": ("Reaches a fixed point?", "drift_between_horizons", "moves {}"),
    "behaviour": ("What do its tokens do?", "tokens: orbit", "orbits {}"),
    "stability": ("Are its points stable?", "predicted_rate_median", "rate {}"),
    "points": ("A point for each layer?", "smallest_cosine_to_layer_0", "cosine {}"),
    "arrival": ("Recurrences to settle?", "recurrences_most", "at most {}"),
    "trained_depth": ("Settled when trained?", "relative_distance_at_trained", "{} away"),
    "initial_state": ("Forgets its start?", "path_distance_at_last", "{} apart"),
    "loss": ("Does the loss improve?", "loss_at_last_readout", "{} nats"),
    "final": ("When is its answer final?", "tokens_final_after_1", "{} after 1"),
    "criteria": ("Do two criteria agree?", "agree", "on {}"),
    "exit_rule": ("Would an exit rule save?", "best_recurrences", "{} on average"),
    "heads": ("Do its heads stabilise?", "share_of_heads_stable", "{} do"),
    "stages": ("Do its stages repeat?", "repetition of ", "explains {}"),
    "limits": ("What limits this?", "prompts", "prompts: {}"),
}
"""Of each answer its question in a few words, and the number of its evidence that says most, with how it is said."""
_SHARES = ("moves {}", "{} away", "{} apart", "{} after 1", "on {}", "{} do", "explains {}")
"""Of these numbers that are percentages."""
_COLUMN, _VERDICT = 27, 30
"""Characters of a question, and of a verdict that leaves room for its number."""


def say_study(
    answers: Sequence[Answer], folder: Path, report: Path | None, *, verbose: bool, json: bool, open: bool
) -> None:
    """The answers of a study, and where it lies; opens the report if that is asked for."""
    if json:
        entries = [_finite(answer.to_dict()) for answer in answers]
        where = {"study": str(folder), "report": None if report is None else str(report)}
        print(json_lines.dumps({**where, "answers": entries}, indent=2, ensure_ascii=False, allow_nan=False))
    elif verbose:
        say_answers(answers)
    else:
        console = Console(highlight=False)
        for answer in answers:
            question, key, words = _LINES[answer.key]
            style = _STYLES.get(answer.outcome, "yellow")
            number = "  " + _number(answer, key, words)
            if _COLUMN + max(_VERDICT, len(answer.verdict)) + len(number) > console.width:
                number = ""
            console.print(f"{question:{_COLUMN}}[{style}]{escape(f'{answer.verdict:{_VERDICT}}')}[/]{number}".rstrip())
    name, path = ("study", folder) if report is None else ("report", report)
    if not json:
        say_path(name, path)
    if open:
        webbrowser.open(path.resolve().as_uri())


def _number(answer: Answer, key: str, words: str) -> str:
    found = [
        value for name, value in answer.evidence.items() if name == key or (name.startswith(key) and key[-1] == " ")
    ]
    if not found:
        return ""
    value = min(found)  # of several quantities the least
    if isinstance(value, str):  # a count and its interval
        return words.format(value.partition(", ")[0])
    if words in _SHARES:
        return words.format(percent(value).replace("less than", "<"))
    return words.format(f"{value:,.0f}" if value.is_integer() else significant(value))


def _finite(value: Any) -> Any:
    """JSON has no infinity, and no number that is none."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
