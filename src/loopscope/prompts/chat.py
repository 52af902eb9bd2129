"""Chat templates: the text that a prompt becomes when it is a user's turn.

A template is a Jinja program from a model's folder. It runs in Jinja's sandbox within a process of its own, sees
nothing but the messages and the names of special tokens, and has the few extensions and functions that published
templates rely on (those that transformers documents under "Chat templates").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from loopscope.errors import PromptError
from loopscope.prompts.sandbox import RefusedError, sandbox

_MARK = "\ue000prompt\ue000"
"""Stands in for the prompt to find where a template puts it; of characters that no text has a use for."""


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A whole chat as text; the prompt itself is `text[start:end]`."""

    text: str
    start: int
    end: int


class ChatTemplate:
    """A model's chat template.

    `variables` are the names that it may use besides the messages: `bos_token` and so on. It is compiled when it is
    first used, so that a broken one harms nobody who has no use for it.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self.source = source
        self._variables = dict(variables)

    @property
    def uses_date(self) -> bool:
        """Whether the template may write the current date, so that the same prompt differs from day to day."""
        return "strftime_now" in self.source

    def render(self, prompt: str, system: str | None = None, *, now: datetime | None = None) -> RenderedChat:
        """The chat of an optional system turn and the user's turn, up to where the assistant would begin.

        `now` is the date that the template may write; the current one unless given.

        Raises `PromptError` with the template's own message where it refuses the chat, and where the system prompt is
        left out or the place of the prompt cannot be told.
        """
        now = now or datetime.now().astimezone()
        text, marked = self._render(prompt, system, now), self._render(_MARK, system, now)
        if system is not None and system.strip() not in marked:
            raise PromptError(
                "The model's chat template leaves the system prompt out; leave --system-prompt out, or put its text "
                "into the prompts."
            )
        before, *after = marked.split(_MARK)
        own = prompt.strip()  # templates may take the blanks around it away
        if len(after) == 1 and text.startswith(before) and text[len(before) :].endswith(after[0]):
            chat = RenderedChat(text, len(before), len(text) - len(after[0]))
            if text[chat.start : chat.end].strip() == own:
                return chat
        # The template looks at the prompt before it decides what to write around it.
        if after and text.count(own) == 1:
            start = text.index(own)
            return RenderedChat(text, start, start + len(own))
        raise PromptError(
            "The model's chat template leaves the prompt out, changes it or writes it more than once, so that its "
            "place cannot be told; leave --chat out."
        )

    def write(self, turns: Sequence[Mapping[str, str]], *, now: datetime) -> str:
        """A chat of several turns, up to where the assistant would begin, or go on with a last turn of its own.

        Raises `PromptError` as `render` does, and where what the assistant has begun cannot be found in the chat.
        """
        text = self._written([dict(turn) for turn in turns], now, "the chat", "leave --chat out")
        begun = turns[-1]["content"].strip() if turns[-1]["role"] == "assistant" else ""
        if begun not in text:
            raise PromptError(
                "The model's chat template changes what the assistant has begun to say, so that it cannot go on with "
                "it; leave --chat out."
            )
        return text[: text.rindex(begun) + len(begun)] if begun else text

    def _render(self, prompt: str, system: str | None, now: datetime) -> str:
        turns = [] if system is None else [{"role": "system", "content": system}]
        turns.append({"role": "user", "content": prompt})
        role = "the system prompt and the prompt" if system is not None else "the prompt"
        instead = "leave --system-prompt or --chat out" if system is not None else "leave --chat out"
        return self._written(turns, now, role, instead)

    def _written(self, turns: list[dict[str, str]], now: datetime, what: str, instead: str) -> str:
        date = now if now.tzinfo is not None else now.astimezone()
        offset = date.utcoffset() or timedelta()
        when = (date.replace(tzinfo=None).isoformat(), offset.total_seconds(), date.tzname() or "")
        content = {"source": self.source, "variables": self._variables}
        try:
            text: str = sandbox().call("render", content, turns=turns, now=when)
            return text
        except RefusedError as error:
            raise PromptError(f"The model's chat template refuses {what} ({error}); {instead}.") from error
