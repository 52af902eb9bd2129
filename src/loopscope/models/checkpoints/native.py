"""loopscope's own format: config.json with the architecture, model.safetensors with our parameter names,
tokenizer.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from loopscope._util.files import write_atomically
from loopscope.errors import CheckpointError
from loopscope.models.architecture import Architecture
from loopscope.models.checkpoints.family import Config, Family, TensorSlice, parameter_shapes
from loopscope.models.native.transformer import LoopedTransformer

_VERSION = 1


def _architecture(config: Config) -> Architecture:
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


NATIVE = Family(
    name="loopscope",
    model_types=("loopscope",),
    recognises={"embedding.weight", "norm.weight"}.issubset,
    architecture=_architecture,
    parts=lambda architecture, names: {
        name: TensorSlice(name, shape) for name, shape in parameter_shapes(architecture).items()
    },
    unused=re.compile(r"(?!)"),
)


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
