"""What an answer is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from loopscope.answers.criterion import Criterion

__all__ = ["Answer", "Outcome"]


class Outcome(StrEnum):
    """Which way an answer goes, for readers who sort or colour answers; the verdict says it in words."""

    YES = "yes"
    NO = "no"
    PARTLY = "partly"
    CANNOT_TELL = "cannot tell"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question about a model, answered from the numbers of a study."""

    key: str
    """Stable name of the question, such as `fixed_point`."""
    question: str
    outcome: Outcome
    verdict: str
    """The answer in a word or a short phrase."""
    sentence: str
    """The answer in plain sentences, the first of which gives it."""
    evidence: dict[str, float | str] = field(default_factory=dict)
    """The numbers that the sentence rests on, by name. Shares and relative quantities are fractions, losses nats,
    angles degrees, and recurrences are counted from 1."""
    figure: str = ""
    """Anchor of the figure in the report that shows it."""
    limits: list[str] = field(default_factory=list)
    """What could make this answer wrong, a sentence each."""
    criterion: Criterion = field(default_factory=Criterion)
    """The thresholds used."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)
