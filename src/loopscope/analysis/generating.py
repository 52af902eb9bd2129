"""Generation: a text that a model writes, with exits that are really taken, and what they changed."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from loopscope._util.reading import is_there
from loopscope._util.wording import percent, plural, significant
from loopscope.analysis.answering import answers, passes_of
from loopscope.analysis.exits_at_work import RuleAtWork
from loopscope.analysis.greedy import Grown, Over, check_room, grow
from loopscope.answers.calibration import CalibratedRule
from loopscope.answers.stopping import StoppingRule
from loopscope.errors import ConfigError, PromptError, last_resort
from loopscope.models.checkpoints.free_memory import available_memory, size_text
from loopscope.models.interventions.kinds import Intervention
from loopscope.models.loading import subject_of
from loopscope.models.native.cached import CacheKind, cache_bytes
from loopscope.models.native.subject import NativeSubject
from loopscope.models.native.subject import intervene as intervened
from loopscope.models.subject import Subject, recurrences_of
from loopscope.prompts.load import PADDING, load_prompts, pad_prompts
from loopscope.prompts.prompt import Prompt, TokenizedPrompt
from loopscope.prompts.tokens import encode_prompts

Cache = Literal["per-recurrence", "last", "none"]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a model wrote behind a prompt, token by token, the likeliest each time."""

    model: str
    prompt: tuple[int, ...]
    """Token ids, as the model reads them."""
    tokens: tuple[int, ...]
    """Those that were generated."""
    text: str | None
    """Of these; None without a tokenizer."""
    ended: Literal["end of text", "as many as asked for"]
    recurrences: tuple[int, ...]
    """Of each generated token, how many the pass took that predicted it. The first comes from the prompt's pass, which
    is run in full."""
    full: int
    """Recurrences of a full run; 0 without a loop."""
    cache: Cache
    rule: str | None
    """Which tokens stop; None where all are run in full."""
    full_tokens: tuple[int, ...] | None
    """What a full run writes, without exits and with the keys and values of every recurrence; None where that was not
    run, since it is the same or was not asked for."""
    full_text: str | None

    @property
    def saved(self) -> float:
        """Share of the recurrences of a full run that the generated tokens did without; the prompt saves none."""
        return 1 - sum(self.recurrences) / (self.full * len(self.tokens)) if self.full else 0.0

    @property
    def first_difference(self) -> int | None:
        """Which generated token, from 1, is the first that is not the full run's; None where all are."""
        return self._differing[0] if self._differing else None

    @property
    def different(self) -> int:
        """At how many places the two texts have other tokens; what only one of them has differs."""
        return len(self._differing)

    @property
    def _differing(self) -> list[int]:
        if self.full_tokens is None:
            return []
        pairs = zip_longest(self.tokens, self.full_tokens)
        return [place for place, (own, other) in enumerate(pairs, 1) if own != other]

    def sentences(self) -> list[str]:
        """What exits saved and changed."""
        if self.rule is None and self.cache != "last":
            return []
        found = []
        if self.rule is not None:
            mean = sum(self.recurrences) / len(self.tokens)
            found.append(
                f"Its {plural(len(self.tokens), 'token')} took {significant(mean, 3)} of {self.full} recurrences on "
                f"average ({percent(self.saved)} saved), under {self.rule}."
                if self.saved > 0
                else f"The exit rule {self.rule} stopped none of its {plural(len(self.tokens), 'token')}."
            )
        if self.full_tokens is not None:
            found.append(
                "The text is the full run's."
                if self.first_difference is None
                else f"Its token {self.first_difference} is the first that is not the full run's, and {self.different} "
                f"of {max(len(self.tokens), len(self.full_tokens))} places differ."
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **dataclasses.asdict(self),
            "saved": self.saved,
            "first_difference": self.first_difference,
            "different": self.different if self.full_tokens is not None else None,
        }


@last_resort("generating")
def generate(
    model: str | Path | nn.Module | Subject,
    prompt: str | Sequence[int],
    *,
    recurrences: int | None = None,
    exit: str | Path | StoppingRule | CalibratedRule | None = None,
    max_new_tokens: int = 64,
    cache: Cache | None = None,
    compare: bool = True,
    seed: int = 0,
    system_prompt: str | Path | None = None,
    chat: bool = False,
    intervene: str | Sequence[str | Intervention] = (),
) -> Generation:
    """Let a model go on with a prompt, greedily, one token after the other; exits are really taken.

    **Arguments**

    - `model`: as for `loopscope.capture`.
    - `prompt`: a text, or token ids.
    - `recurrences`: of a full run; the trained number unless given, or that of a rule from a file.
    - `exit`: a rule such as `step <= 0.03 & top1 >= 2` (docs/exits.md), a file that `loopscope exits` wrote, or what
      `loopscope.calibrate_exit` found. A token goes around no more once its rule fires; the prompt is run in full. The
      rule takes the place of a gate that the model has.
    - `cache`: what is kept of the tokens before. `per-recurrence`: keys and values after every recurrence, which is
      exact; recurrences that a token never did are its last one's to others (Huginn's convention). `last`: those of the
      last recurrence alone (Ouro's shared cache), which is another computation. `none`: every token is a pass over the
      whole text, as for a model that is only watched. `per-recurrence` unless given, of those that loopscope computes.
    - `compare`: with exits or a shared cache, also write the full run's text, to compare.
    - `seed`: of a random initial state, which is drawn on behind the prompt.
    - `system_prompt`, `chat`: as in `loopscope.analyze`.

    Raises `ConfigError` for a rule or a cache that the model cannot have, a rule that can never fire or is another
    model's, and more tokens than there are positions or memory for; `PromptError` for a prompt that cannot be read.
    """
    subject = intervened(subject_of(model), intervene)
    info = subject.info
    native = isinstance(subject, NativeSubject)
    cache = cache or ("per-recurrence" if native else "none")
    if cache not in get_args(Cache):
        raise ConfigError(f"cache must be one of {', '.join(get_args(Cache))}, got {cache!r}.")
    if not native and cache != "none":
        raise ConfigError(
            f"{info.name} computes by itself and is only watched, so that no keys and values of it can be kept; leave "
            "cache out."
        )
    rule = _rule(exit, subject, recurrences)
    if rule is not None and cache == "none":
        reason = "cache is none" if native else "it computes by itself and is only watched"
        raise ConfigError(f"No token of {info.name} can stop early, since {reason}; leave exit out.")
    if isinstance(rule, CalibratedRule):
        recurrences, rule = rule.recurrences, rule.rule
    count = recurrences_of(info, recurrences)
    if rule is not None and not count:
        raise ConfigError(f"{info.name} has no recurrent layers, so that there is nothing to stop; leave exit out.")
    ids = _encoded(prompt, subject, system_prompt, chat)
    check_room(info, len(ids), max_new_tokens)
    is_over = _end_of_text(subject)
    full: Grown | None = None
    if cache == "none" or not isinstance(subject, NativeSubject):
        own = _rerun(subject, ids, count, max_new_tokens, is_over, seed)
    else:
        exits = None if rule is None else RuleAtWork(rule, info, count)
        compared = compare and (rule is not None or cache == "last")
        kind: CacheKind = "per-recurrence" if compared else cache
        _check_memory(subject, kind, count, len(ids) + max_new_tokens)
        grown = partial(
            grow, subject, [ids], recurrences=count, most=max_new_tokens, is_over=is_over, seed=seed,
            own_gate=rule is None,
        )  # fmt: skip
        own = grown(kind=cache, exits=exits)[0]
        full = grown()[0] if compared else None
    tokenizer = subject.tokenizer
    texts = [
        None if tokenizer is None or each is None else tokenizer.decode(each.tokens, skip_special_tokens=True)
        for each in (own, full)
    ]
    return Generation(
        model=info.name,
        prompt=ids,
        tokens=tuple(own.tokens),
        text=texts[0],
        ended="end of text" if is_over(own.tokens) else "as many as asked for",
        recurrences=tuple(own.recurrences),
        full=count,
        cache=cache,
        rule=None if rule is None else str(rule),
        full_tokens=None if full is None else tuple(full.tokens),
        full_text=texts[1],
    )


def _rule(
    given: str | Path | StoppingRule | CalibratedRule | None, subject: Subject, recurrences: int | None
) -> StoppingRule | CalibratedRule | None:
    """Of a text the rule, or the file that it names."""
    if isinstance(given, Path) or (
        isinstance(given, str) and given.strip() and (given.endswith(".json") or is_there(Path(given)))
    ):
        given = CalibratedRule.load(given)
    if isinstance(given, CalibratedRule):
        given.check_fits(subject.info.to_dict(), recurrences)
        return given
    if not isinstance(given, str | StoppingRule | None):
        raise ConfigError(f"An exit rule is a text, a file or what calibrate_exit found, got {given!r}.")
    return StoppingRule.parse(given) if isinstance(given, str) else given


def _encoded(
    prompt: str | Sequence[int], subject: Subject, system_prompt: str | Path | None, chat: bool
) -> tuple[int, ...]:
    """As the model reads it, without what a tokenizer puts behind a text: that goes on."""
    if isinstance(prompt, str):
        loaded = load_prompts(text=(prompt,), system_prompt=None if system_prompt is None else Path(system_prompt))
        loaded = pad_prompts(loaded, subject.tokenizer) if str(system_prompt) == PADDING else loaded
    else:
        # Of numpy, torch and Python alike; the bytes of a text are no token ids.
        ids = tuple(prompt) if hasattr(prompt, "__iter__") and not isinstance(prompt, bytes) else ()
        if not ids or not all(hasattr(each, "__index__") and not isinstance(each, bool) for each in ids):
            raise PromptError("The prompt must be a text, or token ids, one at least.")
        ids = tuple(operator.index(each) for each in ids)
        if system_prompt is not None:
            raise PromptError("system_prompt means nothing for a prompt of token ids; begin them with its own.")
        loaded = [Prompt("prompt", token_ids=ids)]
    (found,) = encode_prompts(
        loaded,
        subject.tokenizer,
        vocab_size=subject.info.vocab_size,
        max_positions=subject.info.max_positions,
        truncate=None,
        chat=chat,
    )
    return without_end(found, chat).token_ids


def without_end(prompt: TokenizedPrompt, chat: bool) -> TokenizedPrompt:
    """A prompt that a text goes on behind: without the special tokens that the tokenizer puts there. What a chat
    template writes there is where the answer begins."""
    kept = len(prompt.token_ids) - (0 if chat else prompt.suffix_tokens)
    return dataclasses.replace(
        prompt,
        token_ids=prompt.token_ids[:kept],
        token_strings=prompt.token_strings[:kept],
        suffix_tokens=prompt.suffix_tokens if chat else 0,
    )


_TOGETHER = 8
"""Prompts that are gone on with together: always as many, so that the same analysis writes the same texts again."""


def continued(
    subject: Subject, prompts: Sequence[TokenizedPrompt], most: int, *, chat: bool, seed: int
) -> list[TokenizedPrompt]:
    """The prompts with what a model writes behind them, greedily after its trained number of recurrences, up to the end
    of a text. Raises `ConfigError` where there is no room or the number is not known, and as `grow`."""
    info, tokenizer = subject.info, subject.tokenizer
    if info.is_looped and info.trained_recurrences is None:
        raise ConfigError(f"How many recurrences {info.name} was trained with is not known, so that it cannot write.")
    begun = [without_end(prompt, chat) for prompt in prompts]
    check_room(info, max(len(prompt.token_ids) for prompt in begun), most)
    is_over, count = _end_of_text(subject), recurrences_of(info, None)
    found = []
    for first in range(0, len(begun), _TOGETHER):
        some = begun[first : first + _TOGETHER]
        ids = [prompt.token_ids for prompt in some]
        if isinstance(subject, NativeSubject):
            # Every text has as many places as the longest.
            _check_memory(subject, "per-recurrence", count, len(ids) * (max(map(len, ids)) + most))
            grown = grow(subject, ids, recurrences=count, most=most, is_over=is_over, seed=seed)
        else:
            grown = [_rerun(subject, each, count, most, is_over, seed) for each in ids]
        for prompt, text in zip(some, grown, strict=True):
            names = [str(token) if tokenizer is None else tokenizer.name(token) for token in text.tokens]
            found.append(
                dataclasses.replace(
                    prompt,
                    token_ids=(*prompt.token_ids, *text.tokens),
                    token_strings=(*prompt.token_strings, *names),
                    generated_tokens=len(text.tokens),
                )
            )
    return found


def _end_of_text(subject: Subject) -> Over:
    """A text is over with the tokenizer's end of a text, where it has one."""
    end = None if subject.tokenizer is None else subject.tokenizer.end
    return lambda tokens: end is not None and tokens[-1] == end.id


def _rerun(subject: Subject, prompt: Sequence[int], count: int, most: int, is_over: Over, seed: int) -> Grown:
    """Every token by a pass over the whole text."""
    grown = Grown()
    while len(grown.tokens) < most and not (grown.tokens and is_over(grown.tokens)):
        text = [*prompt, *grown.tokens]
        for some in passes_of(subject, [max(count, 1)]):
            for _, logits, _ in answers(subject, [text], some, seed, begun=len(prompt)):
                grown.tokens.append(int(logits[0, -1].argmax()))
        grown.recurrences.append(count)
    return grown


def _check_memory(subject: NativeSubject, kind: CacheKind, count: int, tokens: int) -> None:
    needed = cache_bytes(subject.model.architecture, kind, count, tokens, subject.model.dtype.itemsize)
    free = available_memory(subject.device)
    if needed > free:
        raise ConfigError(
            f"Keys and values of {tokens} tokens after {count} recurrences take {size_text(needed)}, and "
            f"{size_text(free)} are free; ask for fewer tokens."
        )
