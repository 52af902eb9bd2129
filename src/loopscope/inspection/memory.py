"""How much memory a run takes, from the model's sizes alone.

Weights, kept states and maps are exact: numbers times bytes. The forward pass is an estimate: the largest sum of
tensors that are alive at once, counted along one layer's code and in the head, where those of the layers count twice:
blocks of their size are not given back to the system at once when they are freed. `benchmarks/memory.py` compares it
with the peak of real processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from loopscope.architecture import Architecture
from loopscope.settings import Dtype, RunSize

__all__ = ["MemoryEstimate", "Sizes", "estimate_memory"]

_ITEMSIZE: dict[Dtype, int] = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}

_ALLOCATOR = 2
"""What a process holds for each byte of a layer's tensors that is alive. From `benchmarks/memory.py`, see there."""


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


def _numbers_alive(sizes: Sizes) -> int:
    """Per token, at the fullest moment: in attention, in the MLP, or in the head."""
    carried = sizes.width * (2 if sizes.recurrent else 1)  # the loop state as it came in, and the prelude's output
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
    in_layers = _ALLOCATOR * (carried + max(attention, mlp))
    in_head = _ALLOCATOR * (carried + 2 * sizes.width) + sizes.vocab_size
    return max(in_layers, in_head)
