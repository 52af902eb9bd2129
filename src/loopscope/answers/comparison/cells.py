"""What one study says to each of the questions that studies are put side by side by."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from loopscope._util.statistics import paired_difference
from loopscope._util.wording import percent, significant
from loopscope.answers.answer import Answer, Evidence, Outcome
from loopscope.answers.quick import quick_answers
from loopscope.study import Study, StudyView, view_study

_LOSS_AT = (1, 4, 8)
"""Numbers of recurrences after which losses are put side by side, beside the last."""


@dataclass(frozen=True, kw_only=True)
class ComparedAnswer:
    """What one study says to one question."""

    key: str
    question: str
    outcome: Outcome
    verdict: str
    number: str = ""
    """The number behind it with its interval, in words."""
    value: float = math.nan
    """The number alone, by which studies are sorted; NaN where there is none."""

    @property
    def text(self) -> str:
        return f"{self.verdict}: {self.number}" if self.number and self.verdict else self.verdict or self.number

    @property
    def has_value(self) -> bool:
        return math.isfinite(self.value)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self) | {"value": self.value if math.isfinite(self.value) else None}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> ComparedAnswer:
        """Of what `to_dict` gave. Raises `ValueError`, `TypeError` or `KeyError` for anything else."""
        value = entry["value"]
        return cls(**{**entry, "outcome": Outcome(entry["outcome"]), "value": math.nan if value is None else value})


@dataclass(frozen=True)
class _Row:
    key: str
    question: str
    value: str = ""
    """Name of the evidence that is the value."""
    number: Callable[[Evidence], str] = lambda evidence: ""


def _settled(evidence: Evidence) -> str:
    return f"{percent(float(evidence['share_of_tokens_settled']))} of tokens settled; verdict of {evidence['prompts']}"


def _range(evidence: Evidence) -> str:
    low, middle, high = (evidence[f"recurrences_{name}"] for name in ("least", "median", "most"))
    return f"{middle:g} recurrences ({low:g} to {high:g} over prompts)"


def _rate(evidence: Evidence) -> str:
    predicted, observed = evidence["predicted_rate_median"], evidence.get("observed_rate_median", math.nan)
    said = f"rate per recurrence: predicted {significant(float(predicted), 3)}"
    if not math.isfinite(float(observed)):
        return said
    error = significant(float(evidence["uncertainty_of_observed_rate_median"]))
    return f"{said}, observed {significant(float(observed), 3)} ± {error}"


_ROWS = (
    _Row("fixed_point", "Does it settle?", "share_of_tokens_settled", _settled),
    _Row("behaviour", "What do the tokens do in the long run?"),
    _Row(
        "points",
        "One point per layer?",
        "smallest_cosine_to_layer_0",
        lambda evidence: f"least cosine {significant(float(evidence['smallest_cosine_to_layer_0']))}",
    ),
    _Row("arrival", "How many recurrences to settle?", "recurrences_median", _range),
    _Row("stability", "How fast, and is its point stable?", "predicted_rate_median", _rate),
    _Row(
        "initial_state",
        "Does it forget its start?",
        "path_distance_at_last",
        lambda evidence: f"distance {significant(float(evidence['path_distance_at_last']))} at the end",
    ),
    _Row("loss", "Do recurrences improve the loss?"),
    _Row(
        "heads",
        "Are the heads stable?",
        "share_of_heads_stable",
        lambda evidence: f"{percent(float(evidence['share_of_heads_stable']))} of heads",
    ),
    _Row("stages", "Do the stages repeat in every pass?"),
    _Row(
        "exit_rule",
        "Would an exit rule save recurrences?",
        "best_saved",
        lambda evidence: f"{percent(float(evidence['best_saved']))} by {evidence['best_rule']}",
    ),
)


def cells_of(study: Study) -> list[ComparedAnswer]:
    """What a study says to each question, and its losses. Questions that it declines are there, with the reason in a
    word."""
    answers = {answer.key: answer for answer in quick_answers(study)}
    cells = [_cell(row, answers[row.key]) for row in _ROWS if row.key in answers and row.key != "loss"]
    return sorted([*cells, *_losses(view_study(study))], key=lambda cell: place_of(cell.key))


def _cell(row: _Row, answer: Answer) -> ComparedAnswer:
    evidence = answer.evidence
    known = bool(evidence) and (not row.value or row.value in evidence)
    try:
        number = row.number(evidence) if known else ""
    except KeyError:
        number = ""  # an answer that was declined half way gives the numbers that it has
    value = evidence.get(row.value, math.nan) if row.value else math.nan
    return ComparedAnswer(
        key=row.key,
        question=row.question,
        outcome=answer.outcome,
        verdict=answer.verdict,
        number=number,
        value=float(value) if not isinstance(value, str) else math.nan,
    )


def _losses(view: StudyView) -> list[ComparedAnswer]:
    """After each of a few numbers of recurrences, in nats a token: the mean over prompts, Student's t."""
    if "loss" not in view.finite or not view.finite.sizes["prompt"]:
        return []
    loss = view.finite["loss"].transpose("readout_recurrence", "prompt")
    at = [int(count) for count in loss["readout_recurrence"].values]
    rows = dict(zip(at, loss.values, strict=True))
    last = at[-1]
    asked = {f"loss_{count}": (f"Loss after {count}", count) for count in _LOSS_AT if count in rows and view.looped}
    asked["loss_last"] = ("Loss after the last" if view.looped else "Loss", last)
    cells = []
    for key, (question, count) in asked.items():
        found = paired_difference(rows[count].astype(np.float64), np.zeros(len(rows[count])))
        middle, half = found.mean, found.half_width
        interval = f" ± {half:.3f}" if math.isfinite(half) else ""
        after = f" (R = {last})" if key == "loss_last" and view.looped else ""
        number = f"{middle:.3f}{interval} nats{after}" if math.isfinite(middle) else "–"
        outcome = Outcome.NOT_APPLICABLE
        cells.append(
            ComparedAnswer(key=key, question=question, outcome=outcome, verdict="", number=number, value=middle)
        )
    return cells


def place_of(key: str) -> int:
    """Where a question stands among the others."""
    return next(place for place, row in enumerate(_ROWS) if key == row.key or key.startswith(f"{row.key}_"))
