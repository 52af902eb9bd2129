"""What there is to know about a model before it is loaded, and what memory a run of it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from loopscope._util.ranges import Count, Range, check_ranges
from loopscope.errors import ConfigError
from loopscope.models.architecture import Architecture

Dtype = Literal["float32", "float64", "bfloat16", "float16"]
DtypeName = Literal["float32", "float64", "bfloat16", "float16", "bf16", "fp16"]
"""With the names that others use for them."""

_ITEMSIZE: dict[str, int] = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}

_MOST_TOKENS = 10**7
_ALLOCATOR = 2
"""What a process holds for each byte of a layer's tensors that is alive. From `benchmarks/memory.py`, see there."""


_SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "fp64": "float64"}


def dtype_name(given: object) -> str:
    """The name of a dtype, from a name or from torch's or numpy's object; another name is returned as it is."""
    name = getattr(given, "__name__", str(given)).removeprefix("torch.")
    return _SHORT.get(name, name)


@dataclass(frozen=True, kw_only=True)
class RunSize:
    """How large a run is, for an estimate of its memory."""

    tokens: Count = 512
    """Tokens of the longest prompt in a batch."""
    batch_size: Count = 8
    """Prompts to run together."""
    recurrences: Count = 64
    """How often the recurrent block runs."""
    horizon: Annotated[int, Range(2, why="so that there is a step into it")] = 128
    """Horizon of an analysis, which runs twice as many recurrences."""
    dtype: DtypeName = "float32"
    """Dtype that the model runs in."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        check_ranges(self, "--")
        if self.tokens * self.batch_size > _MOST_TOKENS:
            raise ConfigError(
                f"--tokens times --batch-size must be at most {_MOST_TOKENS:,}, got {self.tokens * self.batch_size:,}."
            )


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The widths that a layer's tensors have, and how many layers there are."""

    width: int
    query_width: int
    key_width: int
    mlp_width: int
    mlp_matrices: int
    """3 where the MLP is gated, else 2."""
    heads: int
    vocab_size: int
    parameters: int
    prelude: int
    recurrent: int
    coda: int
    injects: bool
    """What enters the first recurrent layer is not the loop state itself."""
    carries_raw_output: bool
    """The loop state is the last recurrent layer's output, so that it need not be kept beside it."""

    @property
    def layer_parameters(self) -> int:
        """Of one layer, its norms left aside."""
        attention = 2 * self.width * (self.query_width + self.key_width)
        return attention + self.mlp_matrices * self.width * self.mlp_width

    @classmethod
    def of(cls, architecture: Architecture) -> Sizes:
        return cls(
            width=architecture.width,
            query_width=architecture.heads * architecture.head_dim,
            key_width=architecture.kv_heads * architecture.head_dim,
            mlp_width=architecture.mlp_width,
            mlp_matrices=3 if architecture.mlp == "gated" else 2,
            heads=architecture.heads,
            vocab_size=architecture.vocab_size,
            parameters=architecture.parameters,
            prelude=architecture.prelude,
            recurrent=architecture.recurrent,
            coda=architecture.coda,
            injects=architecture.injection != "none",
            carries_raw_output=architecture.loop_norm != "recurrence" and architecture.eta == 1.0,
        )


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes."""

    run: RunSize
    weights: int
    activations: int
    """Peak of one forward pass beyond the weights, with nothing kept."""
    kept_states: int
    """Every residual state of one run, as `capture` keeps them; `analyze` keeps none of them by default."""
    attention_map: int
    """The map of one visit, which is computed in float32, or in float64 where that is the model's dtype."""


def estimate_memory(sizes: Sizes, run: RunSize) -> MemoryEstimate:
    """Memory of a run of this size."""
    item = _ITEMSIZE[run.dtype]
    tokens = run.tokens * run.batch_size
    visits = sizes.prelude + sizes.recurrent * run.recurrences + sizes.coda
    recurrences = run.recurrences if sizes.recurrent else 0
    others = recurrences * (sizes.injects + (not sizes.carries_raw_output))
    return MemoryEstimate(
        run=run,
        weights=sizes.parameters * item,
        activations=tokens * item * _numbers_alive(sizes),
        kept_states=tokens * sizes.width * item * (visits + others),
        attention_map=sizes.heads * run.batch_size * run.tokens**2 * max(item, 4),
    )


def numbers_in_a_layer(sizes: Sizes) -> int:
    """Per token, at the fullest moment: in attention or in the MLP."""
    attention = (
        2 * sizes.width  # the layer's input, normed
        + 2 * sizes.key_width
        + 3 * sizes.query_width  # queries, what attention gives, and that with its heads side by side
    )
    mlp = (
        3 * sizes.width  # the layer's input, the state after attention, and that normed
        + sizes.query_width  # queries and keys are there for observers
        + sizes.key_width
        + sizes.mlp_matrices * sizes.mlp_width
    )
    return _ALLOCATOR * (_carried(sizes) + max(attention, mlp))


def _carried(sizes: Sizes) -> int:
    """The loop state as it came in, and the prelude's output."""
    return sizes.width * (2 if sizes.recurrent else 1)


def _numbers_alive(sizes: Sizes) -> int:
    """Per token, at the fullest moment: in a layer, or in the head."""
    in_head = _ALLOCATOR * (_carried(sizes) + 2 * sizes.width) + sizes.vocab_size
    return max(numbers_in_a_layer(sizes), in_head)


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
    unobservable: tuple[str, ...]
    """What loopscope cannot see in this model."""
    tokenizer: TokenizerFacts | None
    memory: MemoryEstimate | None
    architecture: Architecture | None = None
    """Of a model that is run natively."""
    placement: str | None = None
    """Where its layers would go, with the memory that is free here; None unless that was asked for."""

    @property
    def trained_depth(self) -> int:
        """Realised depth, p + k R + c visits, with the trained number of recurrences."""
        return self.depth(self.trained_recurrences or 0)

    def depth(self, recurrences: int) -> int:
        """Realised depth with that many recurrences."""
        return self.prelude + self.recurrent * recurrences + self.coda

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        found = dataclasses.asdict(dataclasses.replace(self, architecture=None)) | {"trained_depth": self.trained_depth}
        del found["architecture"]
        return found
