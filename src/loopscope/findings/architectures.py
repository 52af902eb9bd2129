"""The study at random initialisation of arXiv 2604.11791, Figure 6: which norms and injections make fixed points."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loopscope.grids import Cell, CellResult, InjectionName, NormName, Outcome

__all__ = ["PAPER", "Reproduction", "architecture_grid", "reproduction"]

PAPER: dict[tuple[NormName, InjectionName], Outcome] = {
    ("pre", "linear"): Outcome.FIXED_POINT,
    ("residual", "linear"): Outcome.FIXED_POINT,
    ("ouro", "linear"): Outcome.NONE,
    ("pre", "none"): Outcome.DEGENERATE,
    ("residual", "none"): Outcome.NONE,
    ("ouro", "none"): Outcome.NONE,
}
"""The six outcomes of Figure 6."""

_NEEDED = 2 / 3
"""Share of a design's cells, over depths and seeds, that have to agree with the paper: most of three seeds."""


def architecture_grid(
    *,
    norms: Sequence[NormName] = ("pre", "residual", "ouro", "olmo2"),
    injections: Sequence[InjectionName] = ("none", "linear", "add"),
    depths: Sequence[int] = (4, 12, 16),
    seeds: int = 3,
    **options: Any,
) -> list[Cell]:
    """All combinations; `options` are further fields of `Cell`."""
    return [
        Cell(norm=norm, injection=injection, depth=depth, seed=seed, **options)
        for norm in norms
        for injection in injections
        for depth in depths
        for seed in range(seeds)
    ]


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """One of the paper's outcomes, and what the cells of that design show."""

    norm: NormName
    injection: InjectionName
    paper: Outcome
    found: dict[str, int]
    """Cells by their outcome."""
    reproduced: bool | None
    """None where no cell has this design."""


def reproduction(results: Sequence[CellResult]) -> list[Reproduction]:
    """Design by design of the paper, in its order."""
    rows = []
    for (norm, injection), paper in PAPER.items():
        outcomes = Counter(
            str(result.outcome) for result in results if (result.cell.norm, result.cell.injection) == (norm, injection)
        )
        total = sum(outcomes.values())
        rows.append(
            Reproduction(
                norm=norm,
                injection=injection,
                paper=paper,
                found=dict(outcomes.most_common()),
                reproduced=outcomes[str(paper)] >= _NEEDED * total if total else None,
            )
        )
    return rows
