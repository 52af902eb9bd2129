"""Feed-forward models retrofitted with a loop (smcleish/Recurrent-*; McLeish et al., arXiv 2511.07384).

Their files carry Huginn's model_type, architecture name and many of its settings, which are left over and mislead: they
are told apart by their tensors, and rotate with `rope_theta`, not with `rope_base`. Layers are those of the model that
was retrofitted, Llama (also TinyLlama) or OLMo-2. No norm closes the loop.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from loopscope.architecture import Architecture
from loopscope.checkpoints.bookkeeping import RAVEN_BOOKKEEPING
from loopscope.checkpoints.family import Config, Family
from loopscope.checkpoints.parts import Part
from loopscope.checkpoints.raven import looks_like_raven, raven_fields, raven_parts
from loopscope.checkpoints.rope import read_rope

__all__ = ["RETROFIT_LLAMA", "RETROFIT_OLMO"]

_HARMLESS = RAVEN_BOOKKEEPING | {"rope_base", "block_size"}
"""Left over from Huginn."""

_LLAMA_NORMS = {"norm_1": "norm_1", "norm_3": "norm_2"}
_OLMO_NORMS = {"norm_2": "norm_1", "norm_4": "norm_2"}
_OLMO: dict[str, Any] = {"norm_placement": "branch-out", "qk_norm": "full"}


def _is_retrofit(names: Collection[str], *, olmo: bool) -> bool:
    huginn = any(name.endswith((".norm_3.weight", ".attn.qk_bias")) for name in names)
    with_query_norm = any(name.endswith(".attn.q_norm.weight") for name in names)
    return looks_like_raven(names) and not huginn and with_query_norm == olmo


def _architecture(config: Config, *, olmo: bool) -> Architecture:
    fields = raven_fields(config, "retrofitted OLMo-2" if olmo else "retrofitted Llama")
    for option in ("tie_embeddings", "tie_word_embeddings", "qk_bias"):
        fields.require(option, False)
    width, heads = fields.integer("n_embd"), fields.count("n_heads")
    init = fields.mapping("init_values")
    embedding_scale = init.number("embed_scale")
    max_positions = fields.count("max_position_embeddings")
    architecture = Architecture(
        vocab_size=fields.integer("padded_vocab_size"),
        width=width,
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", width // heads),
        mlp_width=fields.integer("intermediate_size"),
        prelude=fields.integer("n_layers_in_prelude"),
        recurrent=fields.integer("n_layers_in_recurrent_block"),
        coda=fields.integer("n_layers_in_coda"),
        recurrences=fields.integer("mean_recurrence"),
        injection="linear",
        norm_eps=fields.number("norm_eps"),
        embedding_scale=embedding_scale,
        state_init="normal",
        state_std=init.number("std") * embedding_scale,
        max_positions=max_positions,
        **(_OLMO if olmo else {}),
        **read_rope(fields, max_positions, default_base=None),  # Huginn's would be wrong
    )
    fields.close(_HARMLESS)
    return architecture


def _parts(architecture: Architecture, names: Collection[str], *, olmo: bool) -> dict[str, Part]:
    return raven_parts(architecture, _OLMO_NORMS if olmo else _LLAMA_NORMS)


RETROFIT_LLAMA, RETROFIT_OLMO = (
    Family(
        name=name,
        model_types=("huginn_raven",),
        recognises=partial(_is_retrofit, olmo=olmo),
        architecture=partial(_architecture, olmo=olmo),
        parts=partial(_parts, olmo=olmo),
    )
    for name, olmo in (("retrofit-llama", False), ("retrofit-olmo", True))
)
