"""The tensors of Huginn and of the models retrofitted into its shape, which share names and model_type.

The published keys stack q, k, v in one matrix, and gate and up in another.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from loopscope.models.architecture import Architecture
from loopscope.models.checkpoints.config_reader import RAVEN_IGNORED_FIELDS, ConfigReader
from loopscope.models.checkpoints.family import Config, Family, ParameterName, TensorSlice, parameter_shapes, parse_name
from loopscope.models.checkpoints.positions import read_rope

RAVEN_HEAD = "lm_head.weight"

_FIXED = {
    "injection_type": "linear",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "block_class_name": "SandwichBlock",
    "state_init": "like-init",
    "bias": False,
    "test_time_noise": 0,
    "is_causal": True,
}
"""Settings with one value in all published files; another value would be another model."""

_OUTSIDE = {
    "embedding": "transformer.wte",
    "injection": "transformer.adapter",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
_STAGES = {"prelude": "prelude", "recurrent": "core_block", "coda": "coda"}
_IN_LAYER = {
    "attention.query_norm": "attn.q_norm",
    "attention.key_norm": "attn.k_norm",
    "attention.output": "attn.proj",
    "mlp.down": "mlp.proj",
}
_STACKED = {
    "attn.Wqkv": ("attention.query", "attention.key", "attention.value"),
    "mlp.fc": ("mlp.gate", "mlp.up"),
}

_HARMLESS = RAVEN_IGNORED_FIELDS | {"rope_base", "block_size"}
"""Left over from Huginn."""

_LLAMA_NORMS = {"norm_1": "norm_1", "norm_3": "norm_2"}
_OLMO_NORMS = {"norm_2": "norm_1", "norm_4": "norm_2"}
_OLMO: dict[str, Any] = {"norm_placement": "branch-out", "qk_norm": "full"}


def looks_like_raven(names: Collection[str]) -> bool:
    """Whether tensors have the names that Huginn and the retrofitted models share."""
    return any(name.startswith("transformer.core_block.") for name in names)


def raven_fields(config: Mapping[str, object], family: str) -> ConfigReader:
    """The config's fields, after those that have one value in all published files were checked."""
    fields = ConfigReader(config, family)
    for name, value in _FIXED.items():
        fields.require(name, value)
    return fields


def _read_raven(fields: ConfigReader) -> dict[str, Any]:
    """The settings of the `Architecture` that Huginn and the retrofitted models share."""
    width, heads = fields.integer("n_embd"), fields.count("n_heads")
    init = fields.mapping("init_values")
    embedding_scale = init.number("embed_scale")
    return {
        "vocab_size": fields.integer("padded_vocab_size"),
        "width": width,
        "heads": heads,
        "kv_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": fields.integer("head_dim", width // heads),
        "mlp_width": fields.integer("intermediate_size"),
        "prelude": fields.integer("n_layers_in_prelude"),
        "recurrent": fields.integer("n_layers_in_recurrent_block"),
        "coda": fields.integer("n_layers_in_coda"),
        "recurrences": fields.integer("mean_recurrence"),
        "injection": "linear",
        "norm_eps": fields.number("norm_eps"),
        "embedding_scale": embedding_scale,
        "state_init": "normal",
        "state_std": init.number("std") * embedding_scale,
    }


def raven_parts(architecture: Architecture, names: Collection[str], norms: Mapping[str, str]) -> dict[str, TensorSlice]:
    """Where each parameter lies; `norms` maps our four norms of a layer to theirs."""
    shapes = parameter_shapes(architecture)
    return {name: _part(parse_name(name), shapes, architecture, {**_IN_LAYER, **norms}) for name in shapes}


def _part(
    name: ParameterName,
    shapes: Mapping[str, tuple[int, ...]],
    architecture: Architecture,
    in_layer: Mapping[str, str],
) -> TensorSlice:
    if not name.stage:
        return TensorSlice(f"{_OUTSIDE[name.module]}.{name.leaf}", shapes[f"{name.module}.{name.leaf}"])
    ours, theirs = f"{name.stage}.{name.layer}", f"transformer.{_STAGES[name.stage]}.{name.layer}"
    if name.leaf in ("query_bias", "key_bias"):
        both = (2, 1, architecture.heads, architecture.head_dim)
        row = ("query_bias", "key_bias").index(name.leaf)
        return TensorSlice(f"{theirs}.attn.qk_bias", both, row, row + 1)
    for stack, modules in _STACKED.items():
        if name.module in modules:
            rows = [shapes[f"{ours}.{module}.weight"][0] for module in modules]
            start = sum(rows[: modules.index(name.module)])
            whole = (sum(rows), architecture.width)
            return TensorSlice(f"{theirs}.{stack}.weight", whole, start, start + rows[modules.index(name.module)])
    return TensorSlice(f"{theirs}.{in_layer[name.module]}.{name.leaf}", shapes[f"{ours}.{name.module}.{name.leaf}"])


def _is_huginn(names: Collection[str]) -> bool:
    """By its norms: the retrofitted models carry the same model_type and lack the third."""
    return looks_like_raven(names) and any(name.endswith(".norm_3.weight") for name in names)


def _huginn_architecture(config: Config) -> Architecture:
    fields = raven_fields(config, "Huginn")
    fields.require("num_key_value_heads", fields.count("n_heads"))
    for tied in ("tie_embeddings", "tie_word_embeddings"):
        fields.require(tied, True)
    architecture = Architecture(
        **_read_raven(fields),
        norm_placement="residual",
        loop_norm="loop",
        qk_bias=fields.boolean("qk_bias"),
        rotary="adjacent",
        rope_base=fields.number("rope_base"),
        tied_embeddings=True,
        max_positions=fields.count("block_size"),
    )
    fields.close(RAVEN_IGNORED_FIELDS)
    return architecture


HUGINN = Family(
    name="huginn",
    model_types=("huginn_raven",),
    recognises=_is_huginn,
    architecture=_huginn_architecture,
    parts=partial(raven_parts, norms={f"norm_{number}": f"norm_{number}" for number in (1, 2, 3, 4)}),
    tied_head=RAVEN_HEAD,
)


def _is_retrofit(names: Collection[str], *, olmo: bool) -> bool:
    huginn = any(name.endswith((".norm_3.weight", ".attn.qk_bias")) for name in names)
    with_query_norm = any(name.endswith(".attn.q_norm.weight") for name in names)
    return looks_like_raven(names) and not huginn and with_query_norm == olmo


def _retrofit_architecture(config: Config, *, olmo: bool) -> Architecture:
    fields = raven_fields(config, "retrofitted OLMo-2" if olmo else "retrofitted Llama")
    for option in ("tie_embeddings", "tie_word_embeddings", "qk_bias"):
        fields.require(option, False)
    fields.require("initial_state_mode", "random")  # of the embedding, or without the adapter, it is another model
    max_positions = fields.count("max_position_embeddings")
    architecture = Architecture(
        **_read_raven(fields),
        max_positions=max_positions,
        **(_OLMO if olmo else {}),
        **read_rope(fields, max_positions, default_base=None),  # Huginn's would be wrong
    )
    fields.close(_HARMLESS)
    return architecture


RETROFIT_LLAMA, RETROFIT_OLMO = (
    Family(
        name=name,
        model_types=("huginn_raven",),
        recognises=partial(_is_retrofit, olmo=olmo),
        architecture=partial(_retrofit_architecture, olmo=olmo),
        parts=partial(raven_parts, norms=_OLMO_NORMS if olmo else _LLAMA_NORMS),
    )
    for name, olmo in (("retrofit-llama", False), ("retrofit-olmo", True))
)
