"""Loading a checkpoint, strictly: every tensor is known, has its shape, and is finite, or is named in an error.

Weights go from the file to their place in blocks of rows, so that beside the model there is never more than a few
blocks in memory, whatever the dtypes and the size of the largest tensor. A model that cannot fit is refused before.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from loopscope._util.sites import STAGES
from loopscope.errors import CheckpointError, NonFiniteError
from loopscope.models.checkpoints.family import Family, TensorSlice
from loopscope.models.checkpoints.free_memory import check_memory
from loopscope.models.checkpoints.layout import CheckpointLayout, find_layout
from loopscope.models.checkpoints.placement import DISK, DeviceMap, Placement, place_layers
from loopscope.models.checkpoints.store import TensorHeader, TensorStore, read_json
from loopscope.models.native.layer import Layer
from loopscope.models.native.transformer import LoopedTransformer

_BLOCK = 8 * 2**20
"""Bytes that are read at a time: little beside a model, and enough that opening the file again costs nothing."""


class _Brought(Mapping[str, Tensor]):
    """Weights that are read, or copied to a device, whenever they are asked for."""

    def __init__(self, bring: Mapping[str, Callable[[], Tensor]]) -> None:
        self._bring = bring

    def __getitem__(self, name: str) -> Tensor:
        return self._bring[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._bring)

    def __len__(self) -> int:
        return len(self._bring)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model and what it is."""

    model: LoopedTransformer
    family: str
    weights_sha256: str
    placement: Placement | None = None
    """Where its layers lie, if that was asked for."""


def load_checkpoint(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    families: Sequence[Family] = (),
    ignore_config: Sequence[str] = (),
    device_map: DeviceMap | None = None,
) -> Checkpoint:
    """Build the native model and fill it, block by block. `ignore_config` is explained at `find_layout`, and
    `device_map` at `loopscope.load`; layers that it leaves on disk are read once, to be checked.

    While it runs, the process holds the weights in `dtype` and some tens of megabytes more. Raises `CheckpointError`
    for a family that is not known, a setting that is not implemented, a tensor that is missing, unknown or of the wrong
    shape or kind of number, or too little memory, all of them before a weight is read; and `NonFiniteError` for a
    weight that is NaN or infinite in `dtype`.
    """
    store = TensorStore(folder)
    layout = find_layout(read_json(folder / "config.json"), store.headers, str(folder), families, ignore_config)
    home, placement = torch.device(device), None
    if device_map is not None:
        placement = place_layers(layout.architecture, dtype, home, device_map)
    else:
        otherwise = "--device-map auto spreads layers over devices and the disk"
        check_memory(layout.architecture.parameters, dtype, home, otherwise)
    for copy, original in layout.copies.items():
        _check_copy(copy, original, store)
    model = _fill(layout, store, dtype, home, placement)
    return Checkpoint(model.eval().requires_grad_(False), layout.family, store.sha256(), placement)


def _fill(
    layout: CheckpointLayout,
    store: TensorStore,
    dtype: torch.dtype,
    home: torch.device,
    placement: Placement | None,
) -> LoopedTransformer:
    with torch.device("meta"):
        model = LoopedTransformer(layout.architecture)
    brought: dict[str, dict[str, Callable[[], Tensor]]] = defaultdict(dict)
    for name, parameter in list(model.named_parameters()):
        stage, _, rest = name.partition(".")
        layer = f"{stage}.{rest.partition('.')[0]}" if stage in STAGES else ""
        read = partial(_values, layout.parts[name], store, parameter.shape, dtype)
        if placement is None or not layer or not placement.is_brought(layer):
            values = read(home if placement is None or not layer else placement.runs_on(layer))
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))
            continue
        if placement.layers[layer] == DISK:
            read(home)  # so that what is damaged is refused here
            brought[layer][name.removeprefix(f"{layer}.")] = partial(read, home)
        else:
            brought[layer][name.removeprefix(f"{layer}.")] = partial(read(torch.device("cpu")).to, home)
    for layer, weights in brought.items():
        module = model.get_submodule(layer)
        assert isinstance(module, Layer)
        module.brought_from, module.device = _Brought(weights), home
    return model


def _values(
    part: TensorSlice, store: TensorStore, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Tensor:
    values = torch.empty(shape, dtype=dtype, device=device)
    start, stop = part.rows
    header = store.headers[part.name]
    flat = values.view(stop - start, -1)  # a bias of heads and their entries lies in one row of the file
    for first, last in _blocks(header, start, stop):
        block = flat[first - start : last - start]
        block.copy_(store.rows(part.name, first, last).reshape(block.shape))
        low, high = torch.aminmax(block)  # NaN where there is one, and no temporary tensor
        if not math.isfinite(low) or not math.isfinite(high):
            raise NonFiniteError(
                f"The weight {part.name!r} in {store.folder / header.file} holds NaN or infinity in {values.dtype}; "
                "the checkpoint is damaged, or needs a wider dtype."
            )
    return values


def _check_copy(copy: str, original: str, store: TensorStore) -> None:
    header = max(store.headers[copy], store.headers[original], key=lambda header: header.nbytes)
    for first, last in _blocks(header, 0, header.shape[0]):
        if not torch.equal(store.rows(copy, first, last), store.rows(original, first, last)):
            raise CheckpointError(f"{copy!r} differs from {original!r}, but config.json says that they are tied.")


def _blocks(header: TensorHeader, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Ranges that make up the rows `start:stop`, each of at most `_BLOCK` bytes, or one row."""
    rows = max(1, _BLOCK * header.shape[0] // header.nbytes)
    for first in range(start, stop, rows):
        yield first, min(first + rows, stop)
