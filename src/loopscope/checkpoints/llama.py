"""Llama (meta-llama/Llama-*; Touvron et al., arXiv 2302.13971), and the many models that are trained in its shape."""

from __future__ import annotations

from collections.abc import Collection

from loopscope.architecture import Architecture
from loopscope.checkpoints.bookkeeping import BOOKKEEPING
from loopscope.checkpoints.family import Config, Family
from loopscope.checkpoints.fields import Fields
from loopscope.checkpoints.llama_like import LLAMA_HEAD, llama_like_parts, looks_llama_like, read_llama_like

__all__ = ["LLAMA", "has_llama_layers"]


def has_llama_layers(names: Collection[str]) -> bool:
    """Two norms before the branches and no other, by the tensors' names; Mistral's are the same."""
    return looks_llama_like(
        names,
        has=("input_layernorm", "post_attention_layernorm"),
        lacks=("self_attn.q_norm", "input_layernorm_2", "post_feedforward_layernorm"),
    )


def _architecture(config: Config) -> Architecture:
    fields = Fields(config, "Llama")
    architecture = Architecture(
        prelude=fields.integer("num_hidden_layers"), recurrent=0, coda=0, **read_llama_like(fields)
    )
    fields.close(BOOKKEEPING)
    return architecture


LLAMA = Family(
    name="llama",
    model_types=("llama",),
    recognises=has_llama_layers,
    architecture=_architecture,
    parts=llama_like_parts,
    tied_head=LLAMA_HEAD,
)
