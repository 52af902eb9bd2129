"""From text files to windows of tokens."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from loopscope._util.files import write_atomically
from loopscope._util.reading import parse_json, read_text, sha256_of
from loopscope.errors import ConfigError, PromptError
from loopscope.experiments.training.config import DataConfig, TrainConfig
from loopscope.prompts.tokenizer import ids_of, read_tokenizer

BEGIN = "<|begin|>"
END = "<|end|>"
PAD = "<|pad|>"
Tokens = NDArray[np.int64]
"""Token ids, one after the other or in windows."""
Scored = NDArray[np.bool_]
"""Which tokens count."""
_LARGEST = 2**32
"""Bytes of a text."""
# Separate streams of random numbers under one seed; the values only have to differ (see step.py).
_ORDER = 0


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer of at most `vocab_size` entries: three special tokens, 256 bytes, merges.

    Digits are never merged, so that a number is read digit by digit. Encoding puts `<|begin|>` in front. The same
    documents give the same tokenizer. Raises `ConfigError` if the bytes alone do not fit.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [BEGIN, END, PAD]
    if vocab_size < len(special) + len(alphabet):
        raise ConfigError(
            f"A byte-level tokenizer needs a vocab_size of at least {len(special) + len(alphabet)}, got {vocab_size}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return tokenizer


def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Read a `tokenizer.json` for a model of `vocab_size` entries.

    Raises `ConfigError` if it cannot be read, is larger than the model's vocabulary, or lacks `<|begin|>` or `<|end|>`.
    """
    try:
        tokenizer = read_tokenizer(path)
    except PromptError as error:
        raise ConfigError(f"data.tokenizer: {error}") from error
    if tokenizer.get_vocab_size() > vocab_size:
        raise ConfigError(
            f"The tokenizer {path} has {tokenizer.get_vocab_size()} entries, but architecture.vocab_size is "
            f"{vocab_size}; raise it to at least the tokenizer's size."
        )
    for token in (BEGIN, END):
        if tokenizer.token_to_id(token) is None:
            raise ConfigError(
                f"The tokenizer {path} has no {token} token, which frames documents in training; "
                "leave `data.tokenizer` out to have one trained."
            )
    return tokenizer


@dataclass(frozen=True)
class DataFiles:
    """The files of one run, as paths that can be opened."""

    train: Path
    test: Path
    tokenizer: Path | None = None

    @classmethod
    def of(cls, config: DataConfig, base: Path, *, train: Path | None = None, test: Path | None = None) -> DataFiles:
        """The files that a configuration in the folder `base` names, or the ones given instead."""
        return cls(
            train=base / config.train if train is None else train,
            test=base / config.test if test is None else test,
            tokenizer=None if config.tokenizer is None else base / config.tokenizer,
        )

    def hashes(self) -> dict[str, str | None]:
        """SHA-256 of each file: what a run depends on, wherever its text lies.

        Raises `ConfigError` naming a file that cannot be read.
        """
        return {
            "train": _sha256(self.train, "training text", "--train-data"),
            "test": _sha256(self.test, "test text", "--test-data"),
            "tokenizer": None if self.tokenizer is None else _sha256(self.tokenizer, "tokenizer", "data.tokenizer"),
        }


def _sha256(path: Path, what: str, option: str) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise ConfigError(
            f"The {what} {path} cannot be read ({error.strerror or error}); put the file there or name another with "
            f"{option}."
        ) from error


def read_documents(path: Path, template: str) -> list[str]:
    """Documents of a file, in its order: the filled template of each line of a `.jsonl` file, or the blocks between
    blank lines of any other text file.

    Raises `ConfigError` naming file and line for a line that is not a JSON object or lacks a field of the template, and
    for a template that cannot be used or a file without documents.
    """
    try:
        text = read_text(path, _LARGEST)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The text {path} cannot be read as UTF-8: {error}.") from error
    if path.suffix == ".jsonl":
        fields = _template_fields(template)
        # Not splitlines(): JSON strings may hold the other line separators that it knows.
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        documents = [template.format(**_record(line, fields, f"{path}, line {number},")) for number, line in lines]
    else:
        documents = [block.strip() for block in re.split(r"\n\s*\n", text)]
    documents = [document for document in documents if document]
    if not documents:
        raise ConfigError(f"The text {path} holds no documents; it must have at least one line of text.")
    return documents


def _template_fields(template: str) -> list[str]:
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ConfigError(f"The template {template!r} cannot be read: {error}.") from error
    names = [name for _, name, _, _ in parts if name is not None]
    # A width would make what it likes of a text.
    if not names or not all(name.isidentifier() for name in names) or any(spec for _, _, spec, _ in parts):
        raise ConfigError(f"The template {template!r} must name fields of the text, like '{{question}}'.")
    return names


def _record(line: str, fields: list[str], where: str) -> dict[str, str | int | float]:
    """The wanted fields of one JSON line."""
    try:
        record: Any = parse_json(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}.") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{where} holds a JSON {type(record).__name__}, but every line must be an object.")
    for name in fields:
        if name not in record:
            raise ConfigError(f"{where} has no field {name!r}, which the template names; it has {', '.join(record)}.")
        if not isinstance(record[name], str | int | float):
            raise ConfigError(f"{where} has {record[name]!r} in the field {name!r}, but text or a number is needed.")
    return {name: record[name] for name in fields}


@dataclass(frozen=True)
class Corpus:
    """Tokenized documents, each framed as `<|begin|> ... <|end|>`, one behind the other."""

    tokens: Tokens
    """(N,) all documents in the order of their file."""
    starts: Tokens
    """(documents + 1,) where each document starts, and N."""

    @classmethod
    def encode(cls, documents: list[str], tokenizer: Tokenizer) -> Corpus:
        begin, end = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)
        framed = [[begin, *ids, end] for ids in ids_of(documents, tokenizer)]
        starts = np.cumsum([0, *(len(ids) for ids in framed)], dtype=np.int64)
        return cls(tokens=np.concatenate([np.asarray(ids, dtype=np.int64) for ids in framed]), starts=starts)

    def windows_per_epoch(self, context: int) -> int:
        """Windows of `context` inputs with their next tokens. The last, incomplete one is left out."""
        return (len(self.tokens) - 1) // context

    def epoch(self, seed: int, epoch: int) -> Tokens:
        """(N,) the tokens with the documents in the order of one epoch, a function of the two numbers."""
        order = np.random.default_rng([seed, _ORDER, epoch]).permutation(len(self.starts) - 1)
        return np.concatenate([self.tokens[self.starts[i] : self.starts[i + 1]] for i in order])


class BatchStream:
    """Training batches by step: step s holds windows s * batch_size and on, counted through all epochs."""

    def __init__(self, corpus: Corpus, *, context: int, batch_size: int, seed: int) -> None:
        """Raises `ConfigError` if the text is shorter than one window."""
        self._corpus = corpus
        self._context = context
        self._batch_size = batch_size
        self._seed = seed
        self._per_epoch = corpus.windows_per_epoch(context)
        self._epoch = -1
        self._windows: Tokens = np.empty((0, context + 1), dtype=np.int64)
        if self._per_epoch == 0:
            raise ConfigError(
                f"The training text has {len(corpus.tokens)} tokens, fewer than one window of {context + 1}; "
                "give more text or a smaller context."
            )

    def batch(self, step: int) -> Tokens:
        """(batch_size, context + 1) windows of one step, counted from 0.

        Neighbouring windows share one token, so that every token is predicted once an epoch.
        """
        first = step * self._batch_size
        return np.stack([self._window(index) for index in range(first, first + self._batch_size)])

    def _window(self, index: int) -> Tokens:
        epoch, position = divmod(index, self._per_epoch)
        if epoch != self._epoch:
            self._windows = windows(self._corpus.epoch(self._seed, epoch), self._context)
            self._epoch = epoch
        return np.asarray(self._windows[position])


def windows(tokens: Tokens, context: int) -> Tokens:
    """(n, context + 1) windows at every `context`-th token; a last, incomplete one is left out."""
    if len(tokens) <= context:
        return np.empty((0, context + 1), dtype=tokens.dtype)
    return np.lib.stride_tricks.sliding_window_view(tokens, context + 1)[::context]


def scored(tokens: Tokens, answer_after: int | None, end: int) -> Scored:
    """Which tokens of each window, (n, T), belong to an answer: behind the token `answer_after` and before the next end
    of a document. All of them where no such token is given."""
    if answer_after is None:
        return np.ones(tokens.shape, dtype=np.bool_)
    places = np.arange(tokens.shape[-1])
    opened, closed = (
        np.maximum.accumulate(np.where(tokens == token, places, -1), axis=-1) for token in (answer_after, end)
    )
    return np.asarray((opened > closed) & (opened < places))


@dataclass(frozen=True)
class Texts:
    """Tokenizer, training batches and test windows of one run."""

    tokenizer: Tokenizer
    batches: BatchStream
    training_tokens: int
    """Tokens in an epoch."""
    test: Tokens
    """(n, context + 1) windows of the test text, in the order of its file."""
    answer_after: int | None = None
    """The token behind which answers stand, where only those count."""

    def scored(self, windows: Tokens) -> Scored:
        """(n, context): which of the predicted tokens of some windows count."""
        end = self.tokenizer.token_to_id(END)
        assert end is not None  # which `load_tokenizer` sees to
        return scored(windows, self.answer_after, end)[:, 1:]


def load_texts(config: TrainConfig, data: DataFiles, tokenizer_path: Path) -> Texts:
    """Read, tokenize and cut the text of a run.

    The tokenizer is the one at `tokenizer_path` if the run has one already; otherwise it is read or trained as the
    configuration says, and kept there. Raises `ConfigError` for unusable text and tokenizers, `PromptError` for a
    tokenizer that takes too much to read the text.
    """
    documents = read_documents(data.train, config.data.template)
    tokenizer = _tokenizer(config, data, tokenizer_path, documents)
    corpus = Corpus.encode(documents, tokenizer)
    batches = BatchStream(corpus, context=config.context, batch_size=config.batch_size, seed=config.seed)
    held_out = Corpus.encode(read_documents(data.test, config.data.template), tokenizer)
    test = windows(held_out.tokens, config.context)
    if len(test) == 0:
        raise ConfigError(
            f"The test text has {len(held_out.tokens)} tokens, fewer than one window of {config.context + 1}; "
            "give more text or a smaller context."
        )
    texts = Texts(tokenizer, batches, len(corpus.tokens), test, _answer_token(config, tokenizer))
    if not texts.scored(test).any():
        raise ConfigError(
            f"No window of the test text holds the token {config.data.answer_after!r} with an answer behind it; name "
            "another as data.answer_after, or choose a larger context."
        )
    return texts


def _answer_token(config: TrainConfig, tokenizer: Tokenizer) -> int | None:
    text = config.data.answer_after
    if text is None:
        return None
    (ids,) = ids_of([text], tokenizer)
    if len(ids) != 1:
        raise ConfigError(
            f"data.answer_after must be one token, but {text!r} is {len(ids)} of them here; name one that is."
        )
    return int(ids[0])


def _tokenizer(config: TrainConfig, data: DataFiles, path: Path, documents: list[str]) -> Tokenizer:
    size = config.architecture.vocab_size
    if path.exists():
        return load_tokenizer(path, size)
    tokenizer = train_tokenizer(documents, size) if data.tokenizer is None else load_tokenizer(data.tokenizer, size)
    write_atomically(path, tokenizer.to_str(pretty=True).encode())
    return tokenizer
