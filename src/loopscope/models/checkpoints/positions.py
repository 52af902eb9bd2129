"""Rotary settings and sliding windows of published configs, in the old spelling and in that of transformers since 5.

Old: `rope_theta` beside `rope_scaling`, which is null or an object with `type` or `rope_type`. New: `rope_parameters`,
an object with `rope_type`, `rope_theta` and what belongs to the type.
"""

from __future__ import annotations

import math
from typing import Any

from loopscope.errors import CheckpointError, UnknownSettingError
from loopscope.models.architecture import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from loopscope.models.checkpoints.config_reader import ConfigReader

_DEFAULT_BASE = 10000.0
_SCALINGS = "default, linear, llama3, yarn and dynamic"

_LAYER_KINDS = ("full_attention", "sliding_attention")


def read_rope(fields: ConfigReader, max_positions: int, default_base: float | None = _DEFAULT_BASE) -> dict[str, Any]:
    """`rope_base` and `rope_scaling` of the `Architecture`.

    `default_base` is what a family takes where the config gives none; None where it has to be given. `max_positions`
    stands in for an original context that is not given. A dynamic scaling changes nothing within
    `max_positions`, and longer prompts are refused, so it is read as none.
    """
    fields.require("partial_rotary_factor", 1.0)
    places = [name for name in ("rope_scaling", "rope_parameters") if fields.has(name)]
    if len(places) == 2 and fields.config["rope_scaling"] != fields.config["rope_parameters"]:
        raise CheckpointError("config.json has both rope_scaling and rope_parameters, and they differ; keep one.")
    if not places:
        return {"rope_base": fields.number("rope_theta", default_base), "rope_scaling": None}
    for place in places:
        rope = fields.mapping(place)
    rope.require("partial_rotary_factor", 1.0)
    scaling = _scaling(_kind(rope), rope, max_positions)
    settings = {"rope_base": _base(fields, rope, default_base), "rope_scaling": scaling}
    rope.close({"finetuned"})
    return settings


def _base(fields: ConfigReader, rope: ConfigReader, default: float | None) -> float:
    outer, inner = fields.optional_number("rope_theta"), rope.optional_number("rope_theta")
    if outer is not None and inner is not None and outer != inner:
        raise CheckpointError(
            f"config.json has rope_theta = {outer} and {rope.prefix}rope_theta = {inner}; keep one of them."
        )
    given = inner if outer is None else outer
    if given is None:
        return fields.number("rope_theta") if default is None else default
    return given


def _kind(rope: ConfigReader) -> str:
    kinds = {rope.text(name) for name in ("rope_type", "type") if rope.has(name)} or {"default"}
    if len(kinds) > 1:
        raise CheckpointError(f"config.json: {rope.prefix}rope_type and {rope.prefix}type differ; keep one of them.")
    return kinds.pop()


def _scaling(kind: str, rope: ConfigReader, max_positions: int) -> RopeScaling | None:
    match kind:
        case "default":
            return None
        case "dynamic":
            rope.number("factor")
            return None
        case "linear":
            return LinearScaling(factor=rope.number("factor"))
        case "llama3":
            return Llama3Scaling(
                factor=rope.number("factor"),
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_max_positions=rope.count("original_max_position_embeddings", max_positions),
            )
        case "yarn":
            return _yarn(rope, max_positions)
    raise UnknownSettingError(
        f"config.json: {rope.prefix}rope_type is {kind!r}; of the rotary scalings, loopscope implements {_SCALINGS}."
    )


def _yarn(rope: ConfigReader, max_positions: int) -> YarnScaling:
    original = rope.count("original_max_position_embeddings", max_positions)
    factor = rope.number("factor")
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        attention_factor=_attention_factor(rope, factor),
        beta_fast=rope.optional_number("beta_fast") or 32.0,
        beta_slow=rope.optional_number("beta_slow") or 1.0,
        truncate=rope.boolean("truncate", True),
    )


def _attention_factor(rope: ConfigReader, factor: float) -> float:
    """`0.1 ln(factor) + 1` (YaRN, section 3.4) unless given, or as a quotient of two such with weights (DeepSeek)."""
    given = rope.optional_number("attention_factor")
    weight, weight_all = rope.optional_number("mscale"), rope.optional_number("mscale_all_dim")
    if given is not None:
        return given

    def gain(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1

    return gain(weight) / gain(weight_all) if weight and weight_all else gain(1.0)


def read_windows(fields: ConfigReader, layers: int) -> dict[str, Any]:
    """`sliding_window` and `full_attention_layers` of the `Architecture`.

    Without `layer_types`, layers from number `max_window_layers` on have the window. Defaults are those of the
    published configuration classes.
    """
    window = fields.optional_integer("sliding_window", 4096)
    first = fields.integer("max_window_layers", 28)
    if not fields.boolean("use_sliding_window", False):
        window = None
    kinds = [_LAYER_KINDS[window is not None and layer >= first] for layer in range(layers)]
    if fields.has("layer_types"):
        kinds = _layer_types(fields, layers)
    if "sliding_attention" in kinds and window is None:
        raise CheckpointError(
            "config.json: layer_types names sliding_attention, but sliding_window is null or use_sliding_window is not "
            "true; say one or the other."
        )
    full = tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention")
    if len(full) == layers:
        return {}
    return {"sliding_window": window, "full_attention_layers": full}


def _layer_types(fields: ConfigReader, layers: int) -> list[str]:
    kinds = fields.texts("layer_types")
    if len(kinds) != layers:
        raise CheckpointError(f"config.json: layer_types has {len(kinds)} entries for {layers} layers.")
    for kind in kinds:
        if kind not in _LAYER_KINDS:
            raise UnknownSettingError(
                f"config.json: layer_types names {kind!r}; loopscope implements {' and '.join(_LAYER_KINDS)} only."
            )
    return kinds
