"""The families with Llama's names, Llama, Mistral, OLMo-2 and Qwen3: what they share, and what each one adds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from loopscope.errors import UnknownSettingError
from loopscope.models.architecture import Activation, Architecture
from loopscope.models.checkpoints.config_reader import IGNORED_FIELDS, ConfigReader
from loopscope.models.checkpoints.family import Config, Family, ParameterName, TensorSlice, parameter_shapes, parse_name
from loopscope.models.checkpoints.positions import read_rope, read_windows

LLAMA_HEAD = "lm_head.weight"

LLAMA_NORMS = {"norm_1": "input_layernorm", "norm_3": "post_attention_layernorm"}
"""Norms before each branch."""

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "relu": "relu",
}
_OUTSIDE = {"embedding": "embed_tokens", "norm": "norm", "exit_gate": "early_exit_gate"}
_IN_LAYER = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}

_NORMS = {"norm_2": "post_attention_layernorm", "norm_4": "post_feedforward_layernorm"}


def read_llama_like(
    fields: ConfigReader, *, kv_heads: int | None = None, head_dim: int | None = None, max_positions: int = 2048
) -> dict[str, Any]:
    """The settings of the `Architecture` that every family with Llama's names has, but for its layers.

    `kv_heads`, `head_dim` and `max_positions` are what the family's configuration class takes where the config leaves
    the field out; None is as many key-value heads as query heads, and a head of width / heads. Raises
    `CheckpointError` for a setting that is not implemented.
    """
    for name, value in (("attention_bias", False), ("mlp_bias", False), ("is_causal", True)):
        fields.require(name, value)
    width, heads = fields.integer("hidden_size"), fields.count("num_attention_heads")
    activation = fields.text("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise UnknownSettingError(
            f"config.json has hidden_act = {activation!r}; of the activations, loopscope implements "
            f"{', '.join(_ACTIVATIONS)}."
        )
    positions = fields.count("max_position_embeddings", max_positions)
    return {
        "vocab_size": fields.integer("vocab_size"),
        "width": width,
        "heads": heads,
        "kv_heads": _or(fields.optional_integer("num_key_value_heads", kv_heads), heads),
        "head_dim": _or(fields.optional_integer("head_dim", head_dim), width // heads),
        "mlp_width": fields.integer("intermediate_size"),
        "activation": _ACTIVATIONS[activation],
        "norm_eps": fields.number("rms_norm_eps"),
        "tied_embeddings": fields.boolean("tie_word_embeddings", False),
        "max_positions": positions,
        **read_rope(fields, positions),
    }


def looks_llama_like(names: Collection[str], *, has: Collection[str] = (), lacks: Collection[str] = ()) -> bool:
    """Whether tensors have Llama's names, and layers with and without the given modules."""
    prefix = f"{_root(names)}layers.0."
    modules = {name.removeprefix(prefix).rpartition(".")[0] for name in names if name.startswith(prefix)}
    return "self_attn.q_proj" in modules and modules >= set(has) and modules.isdisjoint(lacks)


def llama_like_parts(
    architecture: Architecture, names: Collection[str], norms: Mapping[str, str] = LLAMA_NORMS
) -> dict[str, TensorSlice]:
    """Where each parameter lies; `norms` maps our four norms of a layer to theirs.

    All layers are of one stage. Published files have the `model.` before the names of everything but the head, or,
    where there is no head since it is tied, may lack it.
    """
    root = _root(names)
    in_layer = {**_IN_LAYER, **norms}
    shapes = parameter_shapes(architecture)
    return {name: TensorSlice(_theirs(parse_name(name), root, in_layer), shape) for name, shape in shapes.items()}


def _theirs(name: ParameterName, root: str, in_layer: Mapping[str, str]) -> str:
    if name.stage:
        return f"{root}layers.{name.layer}.{in_layer[name.module]}.{name.leaf}"
    return LLAMA_HEAD if name.module == "head" else f"{root}{_OUTSIDE[name.module]}.{name.leaf}"


def _root(names: Collection[str]) -> str:
    return "" if "embed_tokens.weight" in names else "model."


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def has_llama_layers(names: Collection[str]) -> bool:
    """Two norms before the branches and no other, by the tensors' names; Mistral's are the same."""
    return looks_llama_like(
        names,
        has=("input_layernorm", "post_attention_layernorm"),
        lacks=("self_attn.q_norm", "input_layernorm_2", "post_feedforward_layernorm"),
    )


def _llama_architecture(config: Config) -> Architecture:
    fields = ConfigReader(config, "Llama")
    architecture = Architecture(
        prelude=fields.layers("num_hidden_layers"), recurrent=0, coda=0, **read_llama_like(fields)
    )
    fields.close(IGNORED_FIELDS)
    return architecture


LLAMA = Family(
    name="llama",
    model_types=("llama",),
    recognises=has_llama_layers,
    architecture=_llama_architecture,
    parts=llama_like_parts,
    tied_head=LLAMA_HEAD,
)


def _mistral_architecture(config: Config) -> Architecture:
    fields = ConfigReader(config, "Mistral")
    architecture = Architecture(
        prelude=fields.layers("num_hidden_layers"),
        recurrent=0,
        coda=0,
        sliding_window=fields.optional_integer("sliding_window", 4096),
        **read_llama_like(fields, kv_heads=8, max_positions=4096 * 32),
    )
    fields.close(IGNORED_FIELDS)
    return architecture


MISTRAL = Family(
    name="mistral",
    model_types=("mistral",),
    recognises=has_llama_layers,
    architecture=_mistral_architecture,
    parts=llama_like_parts,
    tied_head=LLAMA_HEAD,
)


def _olmo2_recognises(names: Collection[str]) -> bool:
    return looks_llama_like(names, has=("self_attn.q_norm", *_NORMS.values()), lacks=("input_layernorm",))


def _olmo2_architecture(config: Config) -> Architecture:
    fields = ConfigReader(config, "OLMo-2")
    architecture = Architecture(
        prelude=fields.layers("num_hidden_layers"),
        recurrent=0,
        coda=0,
        norm_placement="branch-out",
        qk_norm="full",
        **read_llama_like(fields),
    )
    fields.close(IGNORED_FIELDS)
    return architecture


def _parts(architecture: Architecture, names: Collection[str]) -> dict[str, TensorSlice]:
    return llama_like_parts(architecture, names, _NORMS)


OLMO2 = Family(
    name="olmo2",
    model_types=("olmo2",),
    recognises=_olmo2_recognises,
    architecture=_olmo2_architecture,
    parts=_parts,
    tied_head=LLAMA_HEAD,
)


def _qwen3_recognises(names: Collection[str]) -> bool:
    return looks_llama_like(
        names, has=("self_attn.q_norm", "input_layernorm"), lacks=("input_layernorm_2", "post_feedforward_layernorm")
    )


def _qwen3_architecture(config: Config) -> Architecture:
    fields = ConfigReader(config, "Qwen3")
    layers = fields.layers("num_hidden_layers")
    architecture = Architecture(
        prelude=layers,
        recurrent=0,
        coda=0,
        qk_norm="head",
        **read_windows(fields, layers),
        **read_llama_like(fields, kv_heads=32, head_dim=128, max_positions=32768),
    )
    fields.close(IGNORED_FIELDS)
    return architecture


QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    recognises=_qwen3_recognises,
    architecture=_qwen3_architecture,
    parts=llama_like_parts,
    tied_head=LLAMA_HEAD,
)
