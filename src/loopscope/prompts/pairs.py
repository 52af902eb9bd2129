"""Pairs of prompts of which states of one are put into the run of the other: read from a file, and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopscope.errors import PromptError
from loopscope.prompts.sources import Record, read_json_lines
from loopscope.prompts.tokenizer import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class PromptPair:
    """Two prompts of as many tokens, position by position alike but where they are meant to differ."""

    id: str
    clean: tuple[int, ...]
    """Token ids; special tokens included, where the prompt was text."""
    corrupted: tuple[int, ...]
    answer: int
    """The token that follows the clean prompt."""
    wrong: int | None
    """The token that follows the corrupted one, if the difference of the two logits is to be measured."""
    tokens: tuple[str, ...]
    """The clean prompt's, as readable pieces."""
    differ: tuple[int, ...]
    """Positions, from 0, where the two have different tokens."""


def read_pairs(
    given: str | Path | Sequence[Mapping[str, Any]], tokenizer: TextTokenizer | None, vocab_size: int
) -> list[PromptPair]:
    """Pairs from a JSONL file, or from mappings with the same fields: `clean`, `corrupted`, `answer` and, of all pairs
    or of none, `wrong`. Prompts are texts or lists of token ids, answers texts of one token or token ids.

    Raises `PromptError` for what is none of that, for prompts of different numbers of tokens, whose positions do not
    match, for prompts that are the same, and for an answer of several tokens.
    """
    if isinstance(given, str | Path):
        records = read_json_lines(Path(given).expanduser())
        place = str(given)
    else:
        records = [Record(f"pair-{number}", f"Pair {number}", fields) for number, fields in enumerate(given, 1)]
        place = "The list"
    if not records:
        raise PromptError(f"{place} holds no pairs; give clean, corrupted and answer of at least one.")
    pairs = [_pair(record, tokenizer, vocab_size) for record in records]
    with_wrong = [record for record, pair in zip(records, pairs, strict=True) if pair.wrong is not None]
    if 0 < len(with_wrong) < len(pairs):
        has, lacks = with_wrong[0], next(record for record in records if record not in with_wrong)
        raise PromptError(
            f"{has.where} has a wrong answer and {lacks.where} has none, so that their numbers could not be put "
            "together; give one to every pair or to none."
        )
    return pairs


def _pair(record: Record, tokenizer: TextTokenizer | None, vocab_size: int) -> PromptPair:
    clean, corrupted = (_prompt(record, name, tokenizer, vocab_size) for name in ("clean", "corrupted"))
    if len(clean) != len(corrupted):
        raise PromptError(
            f"{record.where}: the clean prompt has {len(clean)} tokens and the corrupted one {len(corrupted)}, so that "
            f"their positions do not match; reword one of them. Their last tokens are "
            f"{_named(clean[-4:], tokenizer)} and {_named(corrupted[-4:], tokenizer)}."
        )
    differ = tuple(place for place, (one, other) in enumerate(zip(clean, corrupted, strict=True)) if one != other)
    if not differ:
        raise PromptError(f"{record.where}: the two prompts are the same tokens, so that there is nothing to patch.")
    answer = _answer(record, "answer", tokenizer, vocab_size)
    wrong = _answer(record, "wrong", tokenizer, vocab_size) if record.fields.get("wrong") is not None else None
    if answer == wrong:
        raise PromptError(f"{record.where}: the answer and the wrong answer are the same token; give two.")
    tokens = tuple(str(token) if tokenizer is None else tokenizer.name(token) for token in clean)
    return PromptPair(
        id=record.id, clean=clean, corrupted=corrupted, answer=answer, wrong=wrong, tokens=tokens, differ=differ
    )


def _prompt(record: Record, field: str, tokenizer: TextTokenizer | None, vocab_size: int) -> tuple[int, ...]:
    ids = _ids(record, field, tokenizer, vocab_size, special=True)
    if not ids:
        raise PromptError(f"{record.where}, field {field!r}, is empty; a prompt needs at least one token.")
    return ids


def _answer(record: Record, field: str, tokenizer: TextTokenizer | None, vocab_size: int) -> int:
    value = record.fields.get(field)
    if type(value) is int:
        record = Record(record.id, record.where, {**record.fields, field: [value]})
    ids = _ids(record, field, tokenizer, vocab_size, special=False)
    if len(ids) != 1:
        pieces = f" ({_named(ids, tokenizer)})" if ids else ""
        raise PromptError(
            f"{record.where}: the {'answer' if field == 'answer' else 'wrong answer'} {value!r} is {len(ids)} "
            f"tokens{pieces}, and one is read off; give a text of one token, with the space before it if there is one, "
            "or a token id."
        )
    return ids[0]


def _ids(
    record: Record, field: str, tokenizer: TextTokenizer | None, vocab_size: int, *, special: bool
) -> tuple[int, ...]:
    if field not in record.fields:
        raise PromptError(
            f"{record.where} has no field {field!r}; a pair has clean, corrupted, answer and perhaps wrong."
        )
    value = record.fields[field]
    if isinstance(value, str):
        if tokenizer is None:
            raise PromptError(f"{record.where}: the model has no tokenizer, so that {field!r} must be token ids.")
        return tuple(tokenizer.encode(value, add_special_tokens=special).ids)
    if not isinstance(value, list | tuple) or not all(type(token) is int for token in value):
        raise PromptError(f"{record.where}, field {field!r}, must be text or token ids, got {value!r:.60}.")
    if not all(0 <= token < vocab_size for token in value):
        raise PromptError(f"{record.where}, field {field!r}: token ids must lie between 0 and {vocab_size - 1}.")
    return tuple(value)


def _named(ids: Sequence[int], tokenizer: TextTokenizer | None) -> str:
    return ", ".join(str(token) if tokenizer is None else repr(tokenizer.name(token)) for token in ids)
