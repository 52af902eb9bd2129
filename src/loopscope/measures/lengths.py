"""How long the dimensions of a measure's arrays are, and so what the arrays take in memory."""

from __future__ import annotations

import math

from loopscope.dynamics.trajectories.settings import DisplacementSettings
from loopscope.dynamics.trajectories.tail import tail_length
from loopscope.dynamics.verdicts import KINDS
from loopscope.measures.base import BatchInfo, Declared

_OTHER = {"quantile": 5, "site": 2, "horizon": 2, "plane": 2, "change": 4, "pair": 16, "kind": len(KINDS)}
"""Lengths that depend on nothing."""
_FEW = 6
"""Of a dimension that is not told here: settings of a method, components."""


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
