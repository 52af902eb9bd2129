"""Huginn (tomg-group-umd/huginn-0125; Geiping et al., arXiv 2502.05171).

The published keys stack q, k, v in one matrix, and gate and up in another. Two norms more than usual sit on the
residual stream, queries and keys get a bias before the rotation, and `ln_f` closes the loop as well as the model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from loopscope.architecture import Architecture
from loopscope.checkpoints.fields import Fields
from loopscope.checkpoints.parts import Part
from loopscope.errors import CheckpointError

__all__ = ["COPIES", "UNUSED", "architecture", "parts", "recognises"]

UNUSED = re.compile(r"(transformer\.)?freqs_cis")
"""The rotation table, a buffer that some files hold; ours is computed."""

COPIES = {"lm_head.weight": "transformer.wte.weight"}

_FIXED = {
    "injection_type": "linear",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "block_class_name": "SandwichBlock",
    "state_init": "like-init",
    "bias": False,
    "tie_embeddings": True,
    "test_time_noise": 0,
}
"""Settings with one value in all published files; another value would be another model."""


def recognises(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """By its keys: the retrofitted Llama and OLMo models carry the same model_type and lack the third norm."""
    return config.get("model_type") == "huginn_raven" and any(name.endswith(".norm_3.weight") for name in names)


def architecture(config: Mapping[str, Any]) -> Architecture:
    fields = Fields(config, "Huginn")
    for name, value in _FIXED.items():
        fields.require(name, value)
    width = fields.integer("n_embd")
    heads = fields.integer("n_heads")
    if heads < 1:
        raise CheckpointError(f"config.json: n_heads must be at least 1, got {heads}.")
    fields.require("num_key_value_heads", heads)
    init = fields.mapping("init_values")
    embedding_scale = init.number("embed_scale")
    return Architecture(
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
        max_positions=fields.integer("block_size"),
    )


def parts(architecture: Architecture) -> dict[str, Part]:
    width = architecture.width
    found = {
        "embedding.weight": Part("transformer.wte.weight", (architecture.vocab_size, width)),
        "injection.weight": Part("transformer.adapter.weight", (width, 2 * width)),
        "norm.weight": Part("transformer.ln_f.weight", (width,)),
    }
    stages = (
        ("prelude", "prelude", architecture.prelude),
        ("recurrent", "core_block", architecture.recurrent),
        ("coda", "coda", architecture.coda),
    )
    for ours, theirs, layers in stages:
        for layer in range(layers):
            for name, part in _layer(f"transformer.{theirs}.{layer}", architecture).items():
                found[f"{ours}.{layer}.{name}"] = part
    return found


def _layer(prefix: str, architecture: Architecture) -> dict[str, Part]:
    width, hidden = architecture.width, architecture.mlp_width
    inner = architecture.heads * architecture.head_dim
    stacked = (3 * inner, width)
    gate_up = (2 * hidden, width)
    layer = {
        "attention.query.weight": Part(f"{prefix}.attn.Wqkv.weight", stacked, 0, inner),
        "attention.key.weight": Part(f"{prefix}.attn.Wqkv.weight", stacked, inner, 2 * inner),
        "attention.value.weight": Part(f"{prefix}.attn.Wqkv.weight", stacked, 2 * inner, 3 * inner),
        "attention.output.weight": Part(f"{prefix}.attn.proj.weight", (width, inner)),
        "mlp.gate.weight": Part(f"{prefix}.mlp.fc.weight", gate_up, 0, hidden),
        "mlp.up.weight": Part(f"{prefix}.mlp.fc.weight", gate_up, hidden, 2 * hidden),
        "mlp.down.weight": Part(f"{prefix}.mlp.proj.weight", (width, hidden)),
    }
    for number in (1, 2, 3, 4):
        layer[f"norm_{number}.weight"] = Part(f"{prefix}.norm_{number}.weight", (width,))
    if architecture.qk_bias:
        bias = (2, 1, architecture.heads, architecture.head_dim)
        layer["attention.query_bias"] = Part(f"{prefix}.attn.qk_bias", bias, 0, 1)
        layer["attention.key_bias"] = Part(f"{prefix}.attn.qk_bias", bias, 1, 2)
    return layer
