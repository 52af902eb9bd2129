"""What memory there is for a model."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from loopscope.errors import CheckpointError

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")


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


def check_memory(parameters: int, dtype: torch.dtype, device: torch.device, otherwise: str = "") -> None:
    """Raise `CheckpointError` where that many weights alone need more than there is; `otherwise` is what may help."""
    available = available_memory(device)
    needed = parameters * dtype.itemsize
    if needed <= available:
        return
    options = [otherwise] if otherwise else []
    if dtype.itemsize > torch.bfloat16.itemsize:
        options.insert(0, f"--dtype bfloat16 needs {size_text(parameters * torch.bfloat16.itemsize)}")
    raise CheckpointError(
        f"The weights need {size_text(needed)} in {str(dtype).removeprefix('torch.')}, and {size_text(available)} of "
        f"memory are available on {device}; {', '.join([*options, 'or ' if options else ''])}take a machine with more."
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


def size_text(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
