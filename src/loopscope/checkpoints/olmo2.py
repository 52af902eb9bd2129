"""OLMo-2 (allenai/OLMo-2-*; arXiv 2501.00656): norms on the branches' outputs, and on queries and keys over all
heads together.
"""

from __future__ import annotations

from collections.abc import Collection

from loopscope.architecture import Architecture
from loopscope.checkpoints.bookkeeping import BOOKKEEPING
from loopscope.checkpoints.family import Config, Family
from loopscope.checkpoints.fields import Fields
from loopscope.checkpoints.llama_like import LLAMA_HEAD, llama_like_parts, looks_llama_like, read_llama_like
from loopscope.checkpoints.parts import Part

__all__ = ["OLMO2"]

_NORMS = {"norm_2": "post_attention_layernorm", "norm_4": "post_feedforward_layernorm"}


def _recognises(names: Collection[str]) -> bool:
    return looks_llama_like(names, has=("self_attn.q_norm", *_NORMS.values()), lacks=("input_layernorm",))


def _architecture(config: Config) -> Architecture:
    fields = Fields(config, "OLMo-2")
    architecture = Architecture(
        prelude=fields.integer("num_hidden_layers"),
        recurrent=0,
        coda=0,
        norm_placement="branch-out",
        qk_norm="full",
        **read_llama_like(fields),
    )
    fields.close(BOOKKEEPING)
    return architecture


def _parts(architecture: Architecture, names: Collection[str]) -> dict[str, Part]:
    return llama_like_parts(architecture, names, _NORMS)


OLMO2 = Family(
    name="olmo2",
    model_types=("olmo2",),
    recognises=_recognises,
    architecture=_architecture,
    parts=_parts,
    tied_head=LLAMA_HEAD,
)
