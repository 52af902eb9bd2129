"""The text of a run, ready for training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from loopscope._files import write_atomically
from loopscope.errors import ConfigError
from loopscope.training.config import TrainConfig
from loopscope.training.data import BatchStream, Corpus, DataFiles, Tokens, read_documents, windows
from loopscope.training.tokenizer import load_tokenizer, train_tokenizer

__all__ = ["Texts", "load_texts"]


@dataclass(frozen=True)
class Texts:
    """Tokenizer, training batches and test windows of one run."""

    tokenizer: Tokenizer
    batches: BatchStream
    training_tokens: int
    """Tokens in an epoch."""
    test: Tokens
    """(n, context + 1) windows of the test text, in the order of its file."""


def load_texts(config: TrainConfig, data: DataFiles, tokenizer_path: Path) -> Texts:
    """Read, tokenize and cut the text of a run.

    The tokenizer is the one at `tokenizer_path` if the run has one already; otherwise it is read or trained as the
    configuration says, and kept there. Raises `ConfigError` for unusable text and tokenizers.
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
    return Texts(tokenizer, batches, len(corpus.tokens), test)


def _tokenizer(config: TrainConfig, data: DataFiles, path: Path, documents: list[str]) -> Tokenizer:
    size = config.architecture.vocab_size
    if path.exists():
        return load_tokenizer(path, size)
    tokenizer = train_tokenizer(documents, size) if data.tokenizer is None else load_tokenizer(data.tokenizer, size)
    write_atomically(path, tokenizer.to_str(pretty=True).encode())
    return tokenizer
