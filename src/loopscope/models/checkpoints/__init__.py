"""Checkpoints: a folder with config.json and safetensors in, a model out; no code from the folder is ever run.

The names are imported when they are first used: what looks for files alone need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loopscope.models.checkpoints.config_reader import ConfigReader
    from loopscope.models.checkpoints.families import FAMILIES
    from loopscope.models.checkpoints.family import Family, TensorSlice

_HOMES = {"FAMILIES": "families", "ConfigReader": "config_reader", "Family": "family", "TensorSlice": "family"}

__all__ = ["FAMILIES", "ConfigReader", "Family", "TensorSlice"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
