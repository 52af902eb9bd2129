"""Loading a checkpoint, strictly: every tensor is known, has its shape, and is finite, or is named in an error.

Weights go from the file to their place in blocks of rows, so that beside the model there is never more than a few
blocks in memory, whatever the dtypes and the size of the largest tensor. A model that cannot fit is refused before.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from loopscope.errors import CheckpointError, NonFiniteError
from loopscope.models.checkpoints.family import Family, TensorSlice
from loopscope.models.checkpoints.layout import CheckpointLayout, find_layout
from loopscope.models.checkpoints.store import TensorHeader, TensorStore, read_json
from loopscope.models.native.transformer import LoopedTransformer

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")

_BLOCK = 8 * 2**20
"""Bytes that are read at a time: little beside a model, and enough that opening the file again costs nothing."""


def available_memory(device: torch.device) -> int:
    """Bytes that can be had on a device: the free ones of a GPU, or those that the machine, and the control groups that
    containers and job schedulers put this process in, leave to it.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return min([int(psutil.virtual_memory().available), *_left_by_groups(), *_left_by_limit()])


def _left_by_limit() -> Iterator[int]:
    """Of the address space that `ulimit -v` allows."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield max(0, limit - psutil.Process().memory_info().vms)


def check_memory(parameters: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise `CheckpointError` where that many weights alone need more than there is."""
    available = available_memory(device)
    needed = parameters * dtype.itemsize
    if needed <= available:
        return
    narrower = ""
    if dtype.itemsize > torch.bfloat16.itemsize:
        narrower = f"--dtype bfloat16 needs {_size(parameters * torch.bfloat16.itemsize)}, or "
    raise CheckpointError(
        f"The weights need {_size(needed)} in {str(dtype).removeprefix('torch.')}, and {_size(available)} of memory "
        f"are available on {device}; {narrower}take a machine with more."
    )


def _left_by_groups() -> Iterator[int]:
    """What each control group (version 2) that this process is in leaves; nothing where there is none or no limit.

    Cached files count as used, but are given back when memory is needed.
    """
    try:
        own = next(line[3:] for line in _OWN_GROUP.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return
    group = _GROUPS / own.lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(_GROUPS):
            return
        try:
            limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no limit, which is spelled max, or the topmost group, which has no files
            continue
        yield max(0, limit - used + int(statistics["active_file"]) + int(statistics["inactive_file"]))


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


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
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    families: Sequence[Family] = (),
    ignore_config: Sequence[str] = (),
) -> Checkpoint:
    """Build the native model and fill it, block by block. `ignore_config` is explained at `find_layout`.

    While it runs, the process holds the weights in `dtype` and some tens of megabytes more. Raises `CheckpointError`
    for a family that is not known, a setting that is not implemented, a tensor that is missing, unknown or of the wrong
    shape or kind of number, or too little memory, all of them before a weight is read; and `NonFiniteError` for a
    weight that is NaN or infinite in `dtype`.
    """
    store = TensorStore(folder)
    layout = find_layout(read_json(folder / "config.json"), store.headers, str(folder), families, ignore_config)
    check_memory(layout.architecture.parameters, dtype, torch.device(device))
    for copy, original in layout.copies.items():
        _check_copy(copy, original, store)
    model = _fill(layout, store, dtype, device)
    tokenizer = folder / "tokenizer.json"
    return Checkpoint(
        model=model.eval().requires_grad_(False),
        family=layout.family,
        folder=folder,
        tokenizer=tokenizer if tokenizer.is_file() else None,
        weights_sha256=store.sha256(),
        config=layout.config,
    )


def _fill(
    layout: CheckpointLayout, store: TensorStore, dtype: torch.dtype, device: torch.device | str
) -> LoopedTransformer:
    with torch.device("meta"):
        model = LoopedTransformer(layout.architecture)
    for name, parameter in list(model.named_parameters()):
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
        _read(layout.parts[name], store, values)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))
    return model


def _read(part: TensorSlice, store: TensorStore, values: Tensor) -> None:
    """Fill `values` with a part of a stored tensor."""
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
