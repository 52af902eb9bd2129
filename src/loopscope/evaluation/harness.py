"""A subject as a model of lm-evaluation-harness. Needs the extra `lm-eval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import nn

from loopscope.analysis.greedy import generate_greedily
from loopscope.errors import ConfigError
from loopscope.evaluation.likelihood import Likelihood, Request, likelihoods, numbers_of
from loopscope.models.loading import as_subject
from loopscope.models.subject import Subject
from loopscope.prompts.tokenizer import TextTokenizer

_LONGEST = 2048
"""Tokens of a request to a model without a largest number of positions; the harness's own models have it too."""
_GENERATED = 256
"""Tokens of a generated text where the task names no number; likewise."""


class _Answers:
    """What was asked of one subject, by all numbers of recurrences at once, so that the next number finds it there."""

    def __init__(self, subject: Subject, numbers: tuple[int, ...], seed: int, done: Callable[[int], None]) -> None:
        self.subject, self.numbers, self._seed, self._done = subject, numbers, seed, done
        self._likelihoods: dict[Request, dict[int, Likelihood]] = {}
        self._texts: dict[tuple[tuple[int, ...], str], dict[int, str]] = {}

    def likelihoods(self, requests: Sequence[Request], number: int) -> list[Likelihood]:
        new = [request for request in dict.fromkeys(requests) if request not in self._likelihoods]
        found = likelihoods(self.subject, new, self.numbers, seed=self._seed, done=self._done)
        for place, request in enumerate(new):
            self._likelihoods[request] = {each: found[each][place] for each in self.numbers}
        return [self._likelihoods[request][number] for request in requests]

    def steps(self) -> dict[int, list[float]]:
        return {number: [found[number].step for found in self._likelihoods.values()] for number in self.numbers}

    def texts(
        self, prompts: Sequence[tuple[int, ...]], number: int, most: int, until: Sequence[str], lm: LoopedLM
    ) -> list[str]:
        """Of prompts that are generated from alike."""
        alike = repr((most, sorted(until)))
        new = [prompt for prompt in dict.fromkeys(prompts) if (prompt, alike) not in self._texts]

        def is_over(ids: list[int]) -> bool:
            written = lm.tok_decode(ids)
            return ids[-1] == lm.eot_token_id or any(stop and stop in written for stop in until)

        found = generate_greedily(self.subject, new, self.numbers, most=most, is_over=is_over, seed=self._seed)
        for place, prompt in enumerate(new):
            self._texts[prompt, alike] = {
                each: postprocess_generated_text(lm.tok_decode(found[each][place]), list(until), None)
                for each in self.numbers
            }
        self._done(len(new))
        return [self._texts[prompt, alike][number] for prompt in prompts]


class LoopedLM(TemplateLM):
    """A subject, or a model in memory, run for one number of recurrences, for `lm_eval.simple_evaluate(model=...)`.

    `several` makes one for each of some numbers; what one is asked is found for all of them from the same pass. Texts
    are read as the harness's own model of transformers reads them: what is too long loses its beginning, and what has
    no context begins with the tokenizer's begin (else its end). Generation is greedy; a task that samples is refused.
    """

    def __init__(
        self,
        model: Subject | nn.Module,
        recurrences: int | None = None,
        *,
        seed: int = 0,
        answers: _Answers | None = None,
    ) -> None:
        """`seed` is that of random initial states. Raises `ConfigError` for a model without a tokenizer, and for a
        number of recurrences that it cannot have."""
        super().__init__()
        if answers is None:
            subject = as_subject(model)
            numbers = numbers_of(subject.info, None if recurrences is None else [recurrences])
            answers = _Answers(subject, numbers, seed, lambda count: None)
        self._answers = answers
        self.recurrences = answers.numbers[0] if recurrences is None else recurrences
        tokenizer = answers.subject.tokenizer
        if tokenizer is None:
            raise ConfigError(
                f"{answers.subject.info.name} has no tokenizer, and tasks are texts; loopscope.hook takes a tokenizer."
            )
        self._tokenizer: TextTokenizer = tokenizer
        self._now = datetime.now().astimezone()

    @classmethod
    def several(
        cls,
        model: Subject | nn.Module,
        recurrences: Sequence[int] | None,
        *,
        seed: int = 0,
        done: Callable[[int], None] = lambda count: None,
    ) -> dict[int, LoopedLM]:
        """By number of recurrences, which share their passes. `done` is told how many requests were answered, once for
        all numbers."""
        subject = as_subject(model)
        answers = _Answers(subject, numbers_of(subject.info, recurrences), seed, done)
        return {number: cls(subject, number, seed=seed, answers=answers) for number in answers.numbers}

    def steps(self) -> dict[int, list[float]]:
        """Of each request that was scored, by all numbers of recurrences: the relative length of the last step."""
        return self._answers.steps()

    @property
    def eot_token_id(self) -> int | None:
        return None if self._tokenizer.end is None else self._tokenizer.end.id

    @property
    def prefix_token_id(self) -> int:
        first = self._tokenizer.bos or self._tokenizer.end
        if first is None:
            raise ConfigError("The model's tokenizer has no token to begin or end a text with, which this task needs.")
        return first.id

    @property
    def max_length(self) -> int:
        return self._answers.subject.info.max_positions or _LONGEST

    @property
    def tokenizer_name(self) -> str:
        return self._answers.subject.info.name

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What the harness writes into its results."""
        template = self._tokenizer.chat_template if chat_template else None
        return "" if template is None else template.source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Of the model; a last turn of the assistant's is gone on with."""
        template = self._tokenizer.chat_template
        if template is None:
            raise ConfigError(f"{self.tokenizer_name} has no chat template, so that no request can be made a chat.")
        return template.write(chat_history, now=self._now)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """A text that spells its begin out gets no second one. What the tokenizer puts behind a text is left out: the
        text goes on."""
        before = [] if add_special_tokens is False else [token.id for token in self._tokenizer.before]
        ids = self._tokenizer.encode(string, add_special_tokens=False).ids
        spelled = add_special_tokens is None and self._tokenizer.bos and string.startswith(self._tokenizer.bos.text)
        return ids if spelled else [*before, *ids]

    def tok_decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        found = self._answers.likelihoods([self._fitting(*request[1:]) for request in requests], self.recurrences)
        return [(each.logprob, each.greedy) for each in found]

    def _fitting(self, context: Sequence[int], continuation: Sequence[int]) -> Request:
        if not continuation:
            raise ConfigError("A continuation has no tokens of its own, so that there is nothing to score.")
        if len(continuation) > self.max_length:
            raise ConfigError(
                f"A continuation has {len(continuation)} tokens, and {self.tokenizer_name} has room for "
                f"{self.max_length}."
            )
        whole = [*context, *continuation][-(self.max_length + 1) :]
        return tuple(whole[: -len(continuation)]), tuple(continuation)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        flat = [(None, context, continuation) for each in windows for context, continuation in each]
        scores = iter(self._loglikelihood_tokens(flat))
        return [sum(next(scores)[0] for _ in each) for each in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        found: list[str] = [""] * len(requests)
        alike: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for place, request in enumerate(requests):
            given = normalize_gen_kwargs(request.args[1], _GENERATED)
            if given.get("do_sample"):
                raise ConfigError("This task asks for sampled texts (do_sample), and LoopedLM generates greedily only.")
            most = int(given["max_gen_toks"])
            if most >= self.max_length:
                raise ConfigError(
                    f"This task asks for {most} generated tokens, and {self.tokenizer_name} has room for "
                    f"{self.max_length} with the prompt; ask for fewer (max_gen_toks)."
                )
            end = [] if self._tokenizer.end is None else [self._tokenizer.end.text]
            alike.setdefault((most, tuple(dict.fromkeys([*given["until"], *end]))), []).append(place)
        for (most, until), places in alike.items():
            prompts = [tuple(self.tok_encode(requests[place].args[0])[-(self.max_length - most) :]) for place in places]
            texts = self._answers.texts(prompts, self.recurrences, most, until, self)
            for place, text in zip(places, texts, strict=True):
                found[place] = text
        return found
