"""Loading a checkpoint, strictly: every tensor is known, has its shape, and is finite, or is named in an error."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loopscope.architecture import Architecture
from loopscope.checkpoints.family import FAMILIES, Family
from loopscope.checkpoints.parts import Part
from loopscope.checkpoints.store import TensorStore, read_json
from loopscope.errors import CheckpointError, ConfigError, NonFiniteError
from loopscope.model import LoopedTransformer

__all__ = ["Checkpoint", "load_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model and where it came from."""

    model: LoopedTransformer
    family: str
    folder: Path
    tokenizer: Path | None
    """tokenizer.json, where there is one."""
    weights_sha256: str
    config: Mapping[str, Any]


def load_checkpoint(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Checkpoint:
    """Build the native model and fill it, one tensor at a time.

    Raises `CheckpointError` for a family that is not known, or a tensor that is missing, unknown or of the wrong
    shape or kind of number, and `NonFiniteError` for a weight that is NaN or infinite in `dtype`.
    """
    config = read_json(folder / "config.json")
    store = TensorStore(folder)
    family = _recognise(config, store.names, folder)
    architecture = _architecture(family, config, folder)
    parts = family.parts(architecture)
    _check_names(family, architecture, parts, store)
    model = _fill(architecture, parts, store, dtype, device)
    tokenizer = folder / "tokenizer.json"
    return Checkpoint(
        model=model.eval().requires_grad_(False),
        family=family.name,
        folder=folder,
        tokenizer=tokenizer if tokenizer.is_file() else None,
        weights_sha256=store.sha256(),
        config=config,
    )


def _architecture(family: Family, config: Mapping[str, Any], folder: Path) -> Architecture:
    try:
        return family.architecture(config)
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None


def _recognise(config: Mapping[str, Any], names: Collection[str], folder: Path) -> Family:
    for family in FAMILIES:
        if family.recognises(config, names):
            return family
    raise CheckpointError(
        f"{folder} is of no known family, by its model_type {config.get('model_type')!r} and the names of its "
        f"tensors; known families are {', '.join(family.name for family in FAMILIES)}."
    )


def _check_names(family: Family, architecture: Architecture, parts: Mapping[str, Part], store: TensorStore) -> None:
    wanted = {part.name for part in parts.values()}
    present = set(store.names)
    missing = sorted(wanted - present)
    if missing:
        raise CheckpointError(
            f"{store.folder} lacks {_count(missing, 'tensor')} that a {family.name} model of layout "
            f"{architecture.layout} has, "
            f"first {missing[0]!r}."
        )
    unknown = sorted(
        name for name in present - wanted if name not in family.copies and not family.unused.fullmatch(name)
    )
    if unknown:
        raise CheckpointError(
            f"{store.folder} holds {_count(unknown, 'tensor')} that a {family.name} model of layout "
            f"{architecture.layout} does "
            f"not have, first {unknown[0]!r} (in {store.file_of(unknown[0])}); it is another model than its "
            f"config says."
        )
    for copy, original in family.copies.items():
        if copy in present and not torch.equal(_whole(store, copy), _whole(store, original)):
            raise CheckpointError(f"{copy!r} differs from {original!r}, but config.json says that they are tied.")


def _count(names: list[str], noun: str) -> str:
    return f"1 {noun}" if len(names) == 1 else f"{len(names)} {noun}s"


def _whole(store: TensorStore, name: str) -> Tensor:
    return store.rows(name, 0, store.shape(name)[0])


def _fill(
    architecture: Architecture,
    parts: Mapping[str, Part],
    store: TensorStore,
    dtype: torch.dtype,
    device: torch.device | str,
) -> LoopedTransformer:
    with torch.device("meta"):
        model = LoopedTransformer(architecture)
    for name, parameter in list(model.named_parameters()):
        part = parts[name]
        if store.shape(part.name) != part.shape:
            raise CheckpointError(
                f"{part.name!r} in {store.file_of(part.name)} has shape {store.shape(part.name)}; "
                f"config.json asks for {part.shape}."
            )
        stored = store.rows(part.name, *part.rows)
        if not stored.is_floating_point():
            raise CheckpointError(
                f"{part.name!r} in {store.file_of(part.name)} is stored as {stored.dtype}; weights are read as "
                "floating-point numbers only: give the checkpoint as it was before it was quantised."
            )
        # A copy: a parameter that is still the mapped file would die with it.
        values = stored.reshape(parameter.shape).to(device, dtype, copy=True)
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(
                f"The weight {part.name!r} in {store.folder / store.file_of(part.name)} holds NaN or "
                f"infinity in {dtype}; the "
                "checkpoint is damaged, or needs a wider dtype."
            )
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))
    return model
