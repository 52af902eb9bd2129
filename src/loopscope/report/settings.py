"""What a report shows, as far as that is a choice."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from loopscope._util.ranges import Range, check_ranges
from loopscope.answers.answer import Criterion


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Choices of a report; the defaults suit a study of any size."""

    criterion: Criterion = field(default_factory=Criterion)
    """Thresholds of the quick answers."""
    prompts: tuple[Annotated[int, Range(0, why="since prompts count from 0")], ...] = ()
    """Prompts drawn token by token, counted from 0. Unless given: the most ordinary one, and the one farthest from
    its horizon state at the end."""
    most_tokens: Annotated[int, Range(2)] = 32
    """Of a longer prompt, the last that many tokens are drawn: more rows than fit on a screen cannot be compared by
    eye."""
    most_recurrences: Annotated[int, Range(2)] = 200
    """Curves over more recurrences are drawn from that many of them, denser at the start, to keep the file small."""

    def __post_init__(self) -> None:
        check_ranges(self, "The report setting ")
