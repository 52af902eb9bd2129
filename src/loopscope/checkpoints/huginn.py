"""Huginn (tomg-group-umd/huginn-0125; Geiping et al., arXiv 2502.05171).

Two norms more than usual sit on the residual stream, queries and keys get a bias before the rotation, and `ln_f` closes
the loop as well as the model.
"""

from __future__ import annotations

from collections.abc import Collection

from loopscope.architecture import Architecture
from loopscope.checkpoints.bookkeeping import RAVEN_BOOKKEEPING
from loopscope.checkpoints.family import Config, Family
from loopscope.checkpoints.parts import Part
from loopscope.checkpoints.raven import RAVEN_HEAD, looks_like_raven, raven_fields, raven_parts

__all__ = ["HUGINN"]

_NORMS = {f"norm_{number}": f"norm_{number}" for number in (1, 2, 3, 4)}


def _recognises(names: Collection[str]) -> bool:
    """By its norms: the retrofitted models carry the same model_type and lack the third."""
    return looks_like_raven(names) and any(name.endswith(".norm_3.weight") for name in names)


def _architecture(config: Config) -> Architecture:
    fields = raven_fields(config, "Huginn")
    width, heads = fields.integer("n_embd"), fields.count("n_heads")
    fields.require("num_key_value_heads", heads)
    for tied in ("tie_embeddings", "tie_word_embeddings"):
        fields.require(tied, True)
    init = fields.mapping("init_values")
    embedding_scale = init.number("embed_scale")
    architecture = Architecture(
        vocab_size=fields.integer("padded_vocab_size"),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=fields.integer("head_dim", width // heads),
        mlp_width=fields.integer("intermediate_size"),
        prelude=fields.integer("n_layers_in_prelude"),
        recurrent=fields.integer("n_layers_in_recurrent_block"),
        coda=fields.integer("n_layers_in_coda"),
        recurrences=fields.integer("mean_recurrence"),
        injection="linear",
        norm_placement="residual",
        loop_norm="loop",
        norm_eps=fields.number("norm_eps"),
        qk_bias=fields.boolean("qk_bias"),
        rotary="adjacent",
        rope_base=fields.number("rope_base"),
        tied_embeddings=True,
        embedding_scale=embedding_scale,
        state_init="normal",
        state_std=init.number("std") * embedding_scale,
        max_positions=fields.count("block_size"),
    )
    fields.close(RAVEN_BOOKKEEPING)
    return architecture


def _parts(architecture: Architecture, names: Collection[str]) -> dict[str, Part]:
    return raven_parts(architecture, _NORMS)


HUGINN = Family(
    name="huginn",
    model_types=("huginn_raven",),
    recognises=_recognises,
    architecture=_architecture,
    parts=_parts,
    tied_head=RAVEN_HEAD,
)
