"""What measures take in memory, beside the run that they watch and the arrays that they return; and how much they do at
once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_GPU_TILE_BYTES, _GPU_TILE_SHARE = 2**29, 128
"""Of entries that a GPU reduces at once, a few copies of which are there: enough that its work outweighs the 5 µs that
each operation takes to start; and the share of its memory that they take at most."""
_GPU_WAITING_SHARE = 32
"""Of a GPU's memory, that what waits to be done together takes: 750 MiB of 24 GiB."""


def tile_entries(device: torch.device, in_cache: int, itemsize: int = 4) -> int:
    """Entries, of so many bytes, that are reduced at once: `in_cache` on a CPU, which its cache has room for, and on a
    GPU as many as keep it busy, 2^27 of four bytes unless it is small."""
    if device.type != "cuda":
        return in_cache
    return min(_GPU_TILE_BYTES, gpu_bytes(device) // _GPU_TILE_SHARE) // itemsize


def row_tiles(tokens: int, row: int, device: torch.device, in_cache: int, itemsize: int = 4) -> list[tuple[int, int]]:
    """(start, stop) of the rows of a map, of `row` entries each, that together make tiles of about `tile_entries`."""
    rows = max(1, tile_entries(device, in_cache, itemsize) // row)
    return [(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def waiting_bytes(device: torch.device, on_a_cpu: int) -> int:
    """That what is done together may take while it waits: `on_a_cpu`, or a share of a GPU's memory."""
    return gpu_bytes(device) // _GPU_WAITING_SHARE if device.type == "cuda" else on_a_cpu


def gpu_bytes(device: torch.device) -> int:
    """All the memory that a GPU has. What is done at once follows it, and not what is free: numbers must not depend on
    what else runs there."""
    return int(torch.cuda.get_device_properties(device).total_memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes that a measure takes of one batch, beside the arrays that it returns."""

    kept: int = 0
    """From when it sees the run until it is asked for its arrays."""
    as_seen: int = 0
    """Of that, states of measured recurrences themselves, which take no more where all of them are kept anyway."""
    until_ended: int = 0
    """More until its run has ended."""
    visit: int = 0
    """More while a visit is reduced."""
    ended: int = 0
    """More when its run has ended, with what was kept until then."""
    result: int = 0
    """More while its arrays are made."""
