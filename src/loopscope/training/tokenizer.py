"""A small byte-level BPE tokenizer, trained on the training text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from loopscope import prompts
from loopscope.errors import ConfigError, PromptError

__all__ = ["BEGIN", "END", "PAD", "load_tokenizer", "train_tokenizer"]

BEGIN = "<|begin|>"
END = "<|end|>"
PAD = "<|pad|>"


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
        tokenizer = prompts.read_tokenizer(path)
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
