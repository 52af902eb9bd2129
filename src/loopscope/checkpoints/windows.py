"""Sliding windows in the manner of Qwen: in some layers, chosen by a list or by their number."""

from __future__ import annotations

from typing import Any

from loopscope.checkpoints.fields import Fields
from loopscope.errors import CheckpointError

__all__ = ["read_windows"]

_KINDS = ("full_attention", "sliding_attention")


def read_windows(fields: Fields, layers: int) -> dict[str, Any]:
    """`sliding_window` and `full_attention_layers` of the `Architecture`.

    Without `layer_types`, layers from number `max_window_layers` on have the window. Defaults are those of the
    published configuration classes.
    """
    window = fields.optional_integer("sliding_window", 4096)
    first = fields.integer("max_window_layers", 28)
    if not fields.boolean("use_sliding_window", False):
        window = None
    kinds = [_KINDS[window is not None and layer >= first] for layer in range(layers)]
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


def _layer_types(fields: Fields, layers: int) -> list[str]:
    kinds = fields.texts("layer_types")
    if len(kinds) != layers:
        raise CheckpointError(f"config.json: layer_types has {len(kinds)} entries for {layers} layers.")
    for kind in kinds:
        if kind not in _KINDS:
            raise CheckpointError(
                f"config.json: layer_types names {kind!r}; loopscope implements {' and '.join(_KINDS)} only."
            )
    return kinds
