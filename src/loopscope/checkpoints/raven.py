"""The tensors of Huginn and of the models retrofitted into its shape, which share names and model_type.

The published keys stack q, k, v in one matrix, and gate and up in another.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from loopscope.architecture import Architecture
from loopscope.checkpoints.fields import Fields
from loopscope.checkpoints.parts import ParameterName, Part, parameter_shapes, parse_name

__all__ = ["RAVEN_HEAD", "looks_like_raven", "raven_fields", "raven_parts"]

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


def looks_like_raven(names: Collection[str]) -> bool:
    """Whether tensors have the names that Huginn and the retrofitted models share."""
    return any(name.startswith("transformer.core_block.") for name in names)


def raven_fields(config: Mapping[str, object], family: str) -> Fields:
    """The config's fields, after those that have one value in all published files were checked."""
    fields = Fields(config, family)
    for name, value in _FIXED.items():
        fields.require(name, value)
    return fields


def raven_parts(architecture: Architecture, norms: Mapping[str, str]) -> dict[str, Part]:
    """Where each parameter lies; `norms` maps our four norms of a layer to theirs."""
    shapes = parameter_shapes(architecture)
    return {name: _part(parse_name(name), shapes, architecture, {**_IN_LAYER, **norms}) for name in shapes}


def _part(
    name: ParameterName,
    shapes: Mapping[str, tuple[int, ...]],
    architecture: Architecture,
    in_layer: Mapping[str, str],
) -> Part:
    if not name.stage:
        return Part(f"{_OUTSIDE[name.module]}.{name.leaf}", shapes[f"{name.module}.{name.leaf}"])
    ours, theirs = f"{name.stage}.{name.layer}", f"transformer.{_STAGES[name.stage]}.{name.layer}"
    if name.leaf in ("query_bias", "key_bias"):
        both = (2, 1, architecture.heads, architecture.head_dim)
        row = ("query_bias", "key_bias").index(name.leaf)
        return Part(f"{theirs}.attn.qk_bias", both, row, row + 1)
    for stack, modules in _STACKED.items():
        if name.module in modules:
            rows = [shapes[f"{ours}.{module}.weight"][0] for module in modules]
            start = sum(rows[: modules.index(name.module)])
            whole = (sum(rows), architecture.width)
            return Part(f"{theirs}.{stack}.weight", whole, start, start + rows[modules.index(name.module)])
    return Part(f"{theirs}.{in_layer[name.module]}.{name.leaf}", shapes[f"{ours}.{name.module}.{name.leaf}"])
