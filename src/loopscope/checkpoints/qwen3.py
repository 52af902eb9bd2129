"""Qwen3, dense (Qwen/Qwen3-*; Yang et al., arXiv 2505.09388): Llama with norms on each head's queries and keys."""

from __future__ import annotations

from collections.abc import Collection

from loopscope.architecture import Architecture
from loopscope.checkpoints.bookkeeping import BOOKKEEPING
from loopscope.checkpoints.family import Config, Family
from loopscope.checkpoints.fields import Fields
from loopscope.checkpoints.llama_like import LLAMA_HEAD, llama_like_parts, looks_llama_like, read_llama_like
from loopscope.checkpoints.windows import read_windows

__all__ = ["QWEN3"]


def _recognises(names: Collection[str]) -> bool:
    return looks_llama_like(
        names, has=("self_attn.q_norm", "input_layernorm"), lacks=("input_layernorm_2", "post_feedforward_layernorm")
    )


def _architecture(config: Config) -> Architecture:
    fields = Fields(config, "Qwen3")
    layers = fields.integer("num_hidden_layers")
    architecture = Architecture(
        prelude=layers,
        recurrent=0,
        coda=0,
        qk_norm="head",
        **read_windows(fields, layers),
        **read_llama_like(fields, kv_heads=32, head_dim=128, max_positions=32768),
    )
    fields.close(BOOKKEEPING)
    return architecture


QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    recognises=_recognises,
    architecture=_architecture,
    parts=llama_like_parts,
    tied_head=LLAMA_HEAD,
)
