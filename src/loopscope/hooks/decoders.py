"""The layout of a decoder of the transformers package, found by its structure and not by its class's name."""

from __future__ import annotations

from typing import Any

from torch import nn

from loopscope.errors import ConfigError
from loopscope.hooks.layout import HookedLayer, Layout, find_layers, find_module

__all__ = ["find_layout"]


def find_layout(model: nn.Module) -> tuple[Layout, str | None]:
    """The layout, and the path of the attribute that holds the number of recurrences, None without a loop.

    Raises `ConfigError` for a model whose layers cannot be told.
    """
    config = model.config
    if hasattr(config, "H_cycles") and hasattr(config, "L_cycles"):
        return _two_stacks(model, config), "config.H_cycles"
    return Layout(prelude=_decoder_layers(model, config), recurrent=(), coda=()), None


def _two_stacks(model: nn.Module, config: Any) -> Layout:
    """HRM-Text. A recurrence is one high cycle: the L stack, L_cycles times, then the H stack.

    Two states go around, z_H and z_L. The loop state is z_H, which the head reads at the end.
    """
    base = _base(model)
    low, high = (
        find_layers(model, f"{base}{name}.layers", "the layout of a two-stack model")
        for name in ("L_module", "H_module")
    )
    end = find_module(model, f"{base}H_module", "the layout of a two-stack model")
    return Layout(prelude=(), recurrent=low * config.L_cycles + high, coda=(), loop_end=end)


def _base(model: nn.Module) -> str:
    """Path of the model under its head, with a dot, or nothing for a model without a head."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix and hasattr(model, prefix) else ""


def _decoder_layers(model: nn.Module, config: Any) -> tuple[HookedLayer, ...]:
    """The one list that has as many layers as the configuration says, all of one shape: modules with children."""
    count = config.get_text_config(decoder=True).num_hidden_layers
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and all(any(layer.children()) for layer in module)
    }
    # The experts of a mixture may be as many as the layers that hold them.
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists if other != path)]
    if len(outermost) != 1:
        found = f"lists {', '.join(outermost)}" if outermost else "no list"
        raise ConfigError(
            f"{type(model).__name__} has {found} of the {count} layers that its configuration names; say which layers "
            "to watch, as in loopscope.hook(model, prelude='model.layers')."
        )
    return find_layers(model, outermost[0], "prelude")
