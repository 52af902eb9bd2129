"""What there is to know about a model before it is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loopscope.inspection.memory import MemoryEstimate

__all__ = ["Inspection", "ParameterCounts", "TokenizerFacts"]


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Numbers, each counted once where parts share them."""

    total: int
    embedding: int
    unembedding: int
    """0 where it is the embedding."""
    prelude: int
    recurrent: int
    """Of the unique layers, however often they run, with the injection."""
    coda: int

    @property
    def rest(self) -> int:
        """Final norm, gate and whatever belongs to no stage."""
        return self.total - self.embedding - self.unembedding - self.prelude - self.recurrent - self.coda


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """Of the tokenizer in the model's folder."""

    tokens: int
    before: tuple[str, ...]
    """Special tokens that it puts in front of a text; the first is the one at the beginning (BOS)."""
    after: tuple[str, ...]
    chat_template: bool
    notes: tuple[str, ...]
    """What its files leave in doubt."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect_model` returns. Everything is from config.json, the tensors' headers and the tokenizer's files."""

    name: str
    revision: str | None
    """Commit of the repository on the hub."""
    family: str
    runs: Literal["natively", "through hooks"]
    recognised_by: str
    layout: str
    """In the paper's notation, `(2, 4 ⊗ 8, 2)_I`."""
    prelude: int
    recurrent: int
    """Visits of one recurrence, k."""
    coda: int
    unique_layers: int
    """A layer that a recurrence visits more than once counts once."""
    trained_recurrences: int | None
    """None without a loop."""
    parameters: ParameterCounts
    stored: Mapping[str, int]
    """Bytes in each dtype that weights are stored in."""
    files: tuple[str, ...]
    width: int | None
    """None, here and below, for what the configuration of a model that is not native leaves open."""
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    mlp_width: int | None
    vocab_size: int | None
    max_positions: int | None
    settings: Mapping[str, str]
    """Norms, injection, rotation and the rest, each in words."""
    blind_spots: tuple[str, ...]
    """What loopscope cannot see in this model."""
    tokenizer: TokenizerFacts | None
    memory: MemoryEstimate | None

    @property
    def trained_depth(self) -> int:
        """Realised depth, p + k R + c visits, with the trained number of recurrences."""
        return self.depth(self.trained_recurrences or 0)

    def depth(self, recurrences: int) -> int:
        """Realised depth with so many recurrences."""
        return self.prelude + self.recurrent * recurrences + self.coda

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self) | {"trained_depth": self.trained_depth}
