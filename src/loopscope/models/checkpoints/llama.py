"""The families with Llama's names, Llama, Mistral, OLMo-2, Qwen3 and Ouro: what they share, and what each one adds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
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


LLAMA_LAYERS = partial(
    looks_llama_like,
    has=("input_layernorm", "post_attention_layernorm"),
    lacks=("self_attn.q_norm", "input_layernorm_2", "post_feedforward_layernorm"),
)
"""Two norms before the branches and no other, by the tensors' names; Mistral's are the same."""


def _family(
    name: str,
    called: str,
    recognises: Callable[[Collection[str]], bool],
    *,
    loops: bool = False,
    settings: Mapping[str, Any] | None = None,
    read: Callable[[ConfigReader, int], Mapping[str, Any]] = lambda fields, layers: {},
    norms: Mapping[str, str] = LLAMA_NORMS,
    harmless: Collection[str] = IGNORED_FIELDS,
    **defaults: int,
) -> Family:
    """One of these families, all of whose layers loop, or none: its own `settings` of the `Architecture`, those that
    it `read`s from the config and its number of layers, and the `defaults` of `read_llama_like`."""

    def architecture(config: Config) -> Architecture:
        fields = ConfigReader(config, called)
        layers = fields.layers("num_hidden_layers")
        prelude, recurrent = (0, layers) if loops else (layers, 0)
        own = {**(settings or {}), **read(fields, layers), **read_llama_like(fields, **defaults)}
        found = Architecture(prelude=prelude, recurrent=recurrent, coda=0, **own)
        fields.close(harmless)
        return found

    parts = partial(llama_like_parts, norms=norms)
    return Family(
        name=name,
        model_types=(name,),
        recognises=recognises,
        architecture=architecture,
        parts=parts,
        tied_head=LLAMA_HEAD,
    )


LLAMA = _family("llama", "Llama", LLAMA_LAYERS)
MISTRAL = _family(
    "mistral",
    "Mistral",
    LLAMA_LAYERS,
    read=lambda fields, layers: {"sliding_window": fields.optional_integer("sliding_window", 4096)},
    kv_heads=8,
    max_positions=4096 * 32,
)

_OLMO_NORMS = {"norm_2": "post_attention_layernorm", "norm_4": "post_feedforward_layernorm"}
OLMO2 = _family(
    "olmo2",
    "OLMo-2",
    partial(looks_llama_like, has=("self_attn.q_norm", *_OLMO_NORMS.values()), lacks=("input_layernorm",)),
    settings={"norm_placement": "branch-out", "qk_norm": "full"},
    norms=_OLMO_NORMS,
)
QWEN3 = _family(
    "qwen3",
    "Qwen3",
    partial(
        looks_llama_like,
        has=("self_attn.q_norm", "input_layernorm"),
        lacks=("input_layernorm_2", "post_feedforward_layernorm"),
    ),
    settings={"qk_norm": "head"},
    read=read_windows,
    kv_heads=32,
    head_dim=128,
    max_positions=32768,
)

_OURO_NORMS = {
    "norm_1": "input_layernorm",
    "norm_2": "input_layernorm_2",
    "norm_3": "post_attention_layernorm",
    "norm_4": "post_attention_layernorm_2",
}
OURO = _family(
    "ouro",
    "Ouro",
    partial(looks_llama_like, has=_OURO_NORMS.values()),
    loops=True,
    settings={"norm_placement": "branch-in-out", "loop_norm": "recurrence", "exit_gate": True},
    read=lambda fields, layers: {
        "recurrences": fields.integer("total_ut_steps", 4),
        "exit_threshold": fields.number("early_exit_threshold", 1.0),
        **read_windows(fields, layers),
    },
    norms=_OURO_NORMS,
    # Sizes for computing in pieces, which the published code does not use, and how training by RLTT saves memory.
    harmless=IGNORED_FIELDS | {"chunk_size", "rltt_logprob_chunk_size", "rltt_loop_level_checkpointing"},
    kv_heads=32,
    max_positions=32768,
)
"""Ouro (ByteDance/Ouro-*; Zhu et al., arXiv 2510.25741): all layers loop, from the embeddings, without injection. The
final norm closes each recurrence, so every recurrence can be read by the head; a gate says where to stop."""
