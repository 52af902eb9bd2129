"""Ouro (ByteDance/Ouro-*; Zhu et al., arXiv 2510.25741): all layers loop, from the embeddings, without injection.

The final norm closes each recurrence, so every recurrence can be read by the head; a gate says where to stop.
"""

from __future__ import annotations

from collections.abc import Collection

from loopscope.models.architecture import Architecture
from loopscope.models.checkpoints.config_reader import IGNORED_FIELDS, ConfigReader
from loopscope.models.checkpoints.family import Config, Family, TensorSlice
from loopscope.models.checkpoints.llama import LLAMA_HEAD, llama_like_parts, looks_llama_like, read_llama_like
from loopscope.models.checkpoints.positions import read_windows

_NORMS = {
    "norm_1": "input_layernorm",
    "norm_2": "input_layernorm_2",
    "norm_3": "post_attention_layernorm",
    "norm_4": "post_attention_layernorm_2",
}
_HARMLESS = IGNORED_FIELDS | {"chunk_size", "rltt_logprob_chunk_size", "rltt_loop_level_checkpointing"}
"""Sizes for computing in pieces, which the published code does not use, and how training by RLTT saves memory."""


def _recognises(names: Collection[str]) -> bool:
    return looks_llama_like(names, has=_NORMS.values())


def _architecture(config: Config) -> Architecture:
    fields = ConfigReader(config, "Ouro")
    layers = fields.layers("num_hidden_layers")
    architecture = Architecture(
        prelude=0,
        recurrent=layers,
        coda=0,
        recurrences=fields.integer("total_ut_steps", 4),
        norm_placement="branch-in-out",
        loop_norm="recurrence",
        exit_gate=True,
        exit_threshold=fields.number("early_exit_threshold", 1.0),
        **read_windows(fields, layers),
        **read_llama_like(fields, kv_heads=32, max_positions=32768),
    )
    fields.close(_HARMLESS)
    return architecture


def _parts(architecture: Architecture, names: Collection[str]) -> dict[str, TensorSlice]:
    return llama_like_parts(architecture, names, _NORMS)


OURO = Family(
    name="ouro",
    model_types=("ouro",),
    recognises=_recognises,
    architecture=_architecture,
    parts=_parts,
    tied_head=LLAMA_HEAD,
)
