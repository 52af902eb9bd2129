"""The text of a run, ready for training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from loopscope._files import write_atomically
from loopscope.errors import ConfigError
from loopscope.training.config import TrainConfig
from loopscope.training.data import (
    BatchStream,
    Corpus,
    DataFiles,
    Scored,
    Tokens,
    read_documents,
    scored,
    windows,
)
from loopscope.training.tokenizer import END, load_tokenizer, train_tokenizer

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
    ids = tokenizer.encode(text, add_special_tokens=False).ids
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
