"""What a report shows, as far as that is a choice."""

from __future__ import annotations

from dataclasses import dataclass, field

from loopscope.answers.answer import Criterion
from loopscope.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Choices of a report; the defaults suit a study of any size."""

    criterion: Criterion = field(default_factory=Criterion)
    """Thresholds of the quick answers."""
    prompts: tuple[int, ...] = ()
    """Prompts drawn token by token, counted from 0. Unless given: the most ordinary one, and the one farthest from
    its horizon state at the end."""
    most_tokens: int = 60
    """Of a longer prompt, the last so many tokens are drawn: more rows than fit on a screen cannot be compared by
    eye."""
    most_recurrences: int = 200
    """Curves over more recurrences are drawn from so many of them, denser at the start, to keep the file small."""

    def __post_init__(self) -> None:
        if any(prompt < 0 for prompt in self.prompts):
            raise ConfigError(f"Prompts of a report are counted from 0, got {min(self.prompts)}.")
        for name in ("most_tokens", "most_recurrences"):
            if getattr(self, name) < 2:
                raise ConfigError(f"The report setting {name} must be at least 2, got {getattr(self, name)}.")
