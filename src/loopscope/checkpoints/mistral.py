"""Mistral (mistralai/Mistral-7B-*; Jiang et al., arXiv 2310.06825): Llama with a sliding window in every layer.

Later releases have no window (`sliding_window` null); one that is left out is 4096 tokens.
"""

from __future__ import annotations

from loopscope.architecture import Architecture
from loopscope.checkpoints.bookkeeping import BOOKKEEPING
from loopscope.checkpoints.family import Config, Family
from loopscope.checkpoints.fields import Fields
from loopscope.checkpoints.llama import has_llama_layers
from loopscope.checkpoints.llama_like import LLAMA_HEAD, llama_like_parts, read_llama_like

__all__ = ["MISTRAL"]


def _architecture(config: Config) -> Architecture:
    fields = Fields(config, "Mistral")
    architecture = Architecture(
        prelude=fields.integer("num_hidden_layers"),
        recurrent=0,
        coda=0,
        sliding_window=fields.optional_integer("sliding_window", 4096),
        **read_llama_like(fields, kv_heads=8, max_positions=4096 * 32),
    )
    fields.close(BOOKKEEPING)
    return architecture


MISTRAL = Family(
    name="mistral",
    model_types=("mistral",),
    recognises=has_llama_layers,
    architecture=_architecture,
    parts=llama_like_parts,
    tied_head=LLAMA_HEAD,
)
