"""loopscope's own format: config.json with the architecture, model.safetensors with our parameter names,
tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from loopscope._files import write_atomically
from loopscope.architecture import Architecture
from loopscope.checkpoints.parts import Part
from loopscope.errors import CheckpointError
from loopscope.model import LoopedTransformer

__all__ = ["architecture", "parts", "recognises", "save_checkpoint"]

_VERSION = 1


def recognises(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return config.get("model_type") == "loopscope"


def architecture(config: Mapping[str, Any]) -> Architecture:
    version = config.get("format_version")
    if version != _VERSION:
        raise CheckpointError(
            f"config.json has format_version {version!r}; this loopscope reads version {_VERSION}: update "
            f"one of the two."
        )
    fields = config.get("architecture")
    if not isinstance(fields, Mapping):
        raise CheckpointError("config.json has no object named 'architecture'.")
    return Architecture.from_dict(fields)


def parts(architecture: Architecture) -> dict[str, Part]:
    with torch.device("meta"):
        model = LoopedTransformer(architecture)
    return {name: Part(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()}


def save_checkpoint(
    folder: Path,
    model: LoopedTransformer,
    tokenizer_json: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint, each file whole or not at all.

    `about` is free JSON, kept under that name in config.json: how the model was made, what it reached.
    Raises `StorageError` when the folder cannot be written.
    """
    config = {
        "model_type": "loopscope",
        "format_version": _VERSION,
        "architecture": model.architecture.to_dict(),
        "about": dict(about or {}),
    }
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}
    write_atomically(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))
    if tokenizer_json is not None:
        write_atomically(folder / "tokenizer.json", tokenizer_json.encode())
    write_atomically(folder / "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
