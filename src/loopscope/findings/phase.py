"""Where a design stops converging as its weights grow, and where its eigenvalues say that it should."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from loopscope.grids import Cell, CellResult, InjectionName, NormName, by_design

__all__ = ["SCALES", "Boundary", "boundaries", "phase_grid"]

SCALES = (0.01, 0.02, 0.03, 0.045, 0.0625, 0.09)
"""Standard deviations of the weights: the usual 0.02, 1/16 as of PyTorch's linear layers of width 256, and around."""


def phase_grid(
    *,
    norms: Sequence[NormName] = ("pre", "residual", "ouro", "olmo2"),
    injections: Sequence[InjectionName] = ("none", "linear", "add"),
    scales: Sequence[float] = SCALES,
    injection_scales: Sequence[float] = (1.0,),
    seeds: int = 2,
    **options: Any,
) -> list[Cell]:
    """All combinations, judged token by token; `options` are further fields of `Cell`."""
    fields = {"depth": 4, "judged": True} | options
    return [
        Cell(norm=norm, injection=injection, std=std, injection_scale=scale, seed=seed, **fields)
        for norm in norms
        for injection in injections
        for scale in (injection_scales if injection != "none" else (1.0,))
        for std in scales
        for seed in range(seeds)
    ]


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """Of one design, over the scale of its weights."""

    norm: NormName
    injection: InjectionName
    injection_scale: float
    scales: tuple[float, ...]
    radius: tuple[float | None, ...]
    """Largest predicted rate, median over seeds; None where no fixed point is known."""
    settles: tuple[float, ...]
    """Share of the tokens that reach a fixed point, or hover at the floor."""
    tends: tuple[str, ...]
    """The commonest verdict."""
    predicted: float | None
    """Scale at which the radius crosses 1, between two scales by its logarithm; None where it does not."""
    observed: float | None
    """Scale at which half of the tokens no longer settle, likewise."""


def boundaries(results: Sequence[CellResult]) -> list[Boundary]:
    """Design by design."""
    found = []
    for (norm, injection, scale), group in by_design(
        results, lambda cell: (cell.norm, cell.injection, cell.injection_scale)
    ):
        columns = sorted(by_design(group, lambda cell: cell.std), key=lambda column: float(column[0]))
        scales = tuple(float(std) for std, _ in columns)
        radius = tuple(_median([each.radius for each in cells]) for _, cells in columns)
        settles = tuple(_settled(cells) for _, cells in columns)
        found.append(
            Boundary(
                norm=norm,
                injection=injection,
                injection_scale=scale,
                scales=scales,
                radius=radius,
                settles=settles,
                tends=tuple(_commonest(cells) for _, cells in columns),
                predicted=_crossing(scales, [None if value is None else value - 1 for value in radius]),
                observed=_crossing(scales, [0.5 - share for share in settles]),
            )
        )
    return found


def _crossing(scales: Sequence[float], values: Sequence[float | None]) -> float | None:
    """The first scale at which the values go from below 0 to above, linear in the logarithm of the scale."""
    known = [(math.log(scale), value) for scale, value in zip(scales, values, strict=True) if value is not None]
    for (left, before), (right, after) in itertools.pairwise(known):
        if before < 0 <= after:
            return math.exp(left + (right - left) * before / (before - after))
    return None


def _settled(cells: Sequence[CellResult]) -> float:
    total = sum(sum(cell.verdicts.values()) for cell in cells)
    settled = sum(cell.verdicts.get("fixed point", 0) + cell.verdicts.get("at floor", 0) for cell in cells)
    return settled / total if total else 0.0


def _commonest(cells: Sequence[CellResult]) -> str:
    counts: dict[str, int] = {}
    for cell in cells:
        for kind, count in cell.verdicts.items():
            counts[kind] = counts.get(kind, 0) + count
    return max(counts, key=lambda kind: counts[kind]) if counts else "unknown"


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
