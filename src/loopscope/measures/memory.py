"""What measures take in memory, beside the run that they watch: their arrays by what they declare, and what they say of
the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from loopscope.dynamics.trajectories.settings import DisplacementSettings
from loopscope.dynamics.trajectories.tail import tail_length
from loopscope.dynamics.verdicts import KINDS

if TYPE_CHECKING:
    from loopscope.measures.base import BatchInfo, Declared

_OTHER = {"quantile": 5, "site": 2, "horizon": 2, "plane": 2, "change": 4, "pair": 16, "kind": len(KINDS)}
"""Lengths that depend on nothing."""
_FEW = 6
"""Of a dimension that is not told here: settings of a method, components."""
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
    until_ended: int = 0
    """More until its run has ended."""
    visit: int = 0
    """More while a visit is reduced."""
    ended: int = 0
    """More when its run has ended, with what was kept until then."""
    result: int = 0
    """More while its arrays are made."""


def array_bytes(kind: type[Declared], batch: BatchInfo) -> int:
    """Of the arrays that a measure returns for a batch, by their declared dimensions."""
    lengths = _lengths(batch)
    item = 8 if batch.info.dtype == "float64" else 4
    return sum(
        math.prod(lengths.get(dim, _FEW) for dim in about.dims) * (1 if "query" in about.dims else item)
        for about in kind.variables.values()
    )


def _lengths(batch: BatchInfo) -> dict[str, int]:
    plan, info = batch.plan, batch.info
    tail = tail_length(2 * plan.horizon, DisplacementSettings().window)
    cycle = info.prelude + info.coda + info.recurrent * min(plan.cycle_recurrences, plan.recurrences)
    maps, mapped = plan.maps, 0
    if maps is not None:
        mapped = sum(batch.row(prompt) is not None for prompt in maps.prompts)
    side = 0 if maps is None else min(maps.tokens, batch.tokens)
    visits = 0 if maps is None else len(info.sites(maps.recurrences))
    layer, depth = info.recurrent, info.prelude + info.recurrent * plan.recurrences + info.coda
    return {
        **_OTHER,
        **{"prompt": batch.prompts, "token": batch.tokens, "head": info.heads or 0, "depth": depth},
        **{"layer": layer, "layer_other": layer, "recurrence": plan.recurrences, "long_recurrence": 2 * plan.horizon},
        **{"start": plan.other_starts + 1, "start_other": plan.other_starts + 1},
        **{"tail": tail, "lag": tail, "visit": cycle, "visit_other": cycle, "judged_layer": len(plan.judged_layers)},
        **{"readout_recurrence": len(plan.readout), "exit_recurrence": plan.exits, "tracked": len(plan.tracked)},
        **{"mapped": mapped, "map_visit": visits, "query": side, "key": side},
    }
