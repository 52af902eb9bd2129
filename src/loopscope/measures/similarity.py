"""Cycle similarity: every pair of visits, by residual stream and by attention (arXiv 2604.11791, section 4.1)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from loopscope.measures.base import BatchInfo, Measure, Needs, Variable, variable
from loopscope.measures.functions import residual_norm
from loopscope.measures.memory import Memory, row_tiles
from loopscope.models.visits import AttentionView, Visit

_TILE_ENTRIES = 2**21
"""Probabilities, of all visits together, in a tile of rows on a CPU: 16 MiB in float64."""


class CycleSimilarity(Measure):
    """Keeps the states of prelude, the first few recurrences and coda, so memory grows with their number only."""

    part = "cycle-similarity"
    variables: ClassVar[dict[str, Variable]] = {
        "cycle_similarity": variable(
            "visit visit_other", "cosine of residual streams, mean over tokens and prompts", summed=True
        )
    }

    def __init__(self, batch: BatchInfo) -> None:
        super().__init__(batch)
        self.recurrences = min(batch.plan.cycle_recurrences, batch.recurrences)
        self._seen: list[tuple[Tensor, Tensor]] = []
        """States and their norms."""

    @classmethod
    def memory(cls, batch: BatchInfo) -> Memory:
        (states, wide), visits = batch.bytes, cycle_visits(batch)
        as_seen = (visits - batch.info.prelude - batch.info.coda) * states
        return Memory(kept=visits * states, as_seen=as_seen, result=visits * wide // batch.prompts)

    def visit(self, visit: Visit) -> None:
        if visit.stage == "recurrent" and visit.recurrence > self.recurrences:
            return
        self._seen.append((visit.residual, residual_norm(visit.residual)))

    def result(self) -> xr.Dataset:
        visits = len(self._seen)
        total, weight = torch.zeros(2, visits, visits, dtype=torch.float64, device=self.batch.mask.device)
        for prompt in range(self.batch.prompts):
            # Directions of one prompt in a row: their product is the sum over its tokens of the cosines.
            tokens = int(self.batch.counts[prompt])
            rows = self._seen[0][1].new_empty(visits, tokens, self.batch.info.width)
            for (states, norms), row in zip(self._seen, rows, strict=True):
                torch.div(states[prompt, :tokens], norms[prompt, :tokens, None], out=row)
            rows = rows.flatten(1)
            mean = (rows @ rows.T).double() / tokens
            finite = torch.isfinite(mean)
            total += torch.where(finite, mean.clamp(-1.0, 1.0), 0.0)
            weight += finite
        return self.dataset({"cycle_similarity": total, "cycle_similarity_weight": weight})


class AttentionCycle(Measure):
    """Frobenius distances between the attention of every pair of visits.

    `sqrt(sum over heads ||A_u - A_v||^2 / (H T))`: the root mean square, over heads and rows, of the distance between
    two rows. From one Gram matrix of all maps that is added up over tiles of rows, in float64, since a distance is the
    small difference of large squares. Keeps the queries and keys of the first few recurrences, or the maps where these
    are smaller.
    """

    part = "cycle-similarity"
    variables: ClassVar[dict[str, Variable]] = {
        "attention_cycle_distance": variable(
            "visit visit_other",
            "sqrt(sum over heads ||A_u - A_v||² / (heads T)) of the attention maps of two visits, mean over prompts",
            summed=True,
        )
    }
    needs = Needs(attention=True, also=("heads",))

    def __init__(self, batch: BatchInfo) -> None:
        super().__init__(batch)
        self.recurrences = min(batch.plan.cycle_recurrences, batch.recurrences)
        assert batch.info.heads is not None
        self._heads, self._tiles = batch.info.heads, _tiles(batch)
        self._seen: list[AttentionView | Tensor | None] = []
        """Of each visit what makes its tiles, or these in a row, (batch, entry)."""

    @classmethod
    def memory(cls, batch: BatchInfo) -> Memory:
        visits = cycle_visits(batch)
        entries = [batch.prompts * (batch.info.heads or 0) * (stop - start) * stop for start, stop in _tiles(batch)]
        maps = sum(entries) * max(4, batch.itemsize)
        # Tiles of all visits, side by side once more, and one in the making.
        return Memory(kept=visits * min(batch.attention_bytes, maps), result=17 * visits * max(entries))

    def visit(self, visit: Visit) -> None:
        if visit.stage == "recurrent" and visit.recurrence > self.recurrences:
            return
        view = visit.attention
        self._seen.append(None if view is None or view.heads != self._heads else self._smaller(view.without_values()))

    def _smaller(self, view: AttentionView) -> AttentionView | Tensor:
        """Its tiles, where they take less memory: of prompts shorter than some times the width of a head."""
        if self.batch.mask.numel() * self._heads * view.tokens * 2 >= view.nbytes:
            return view
        tiles = [view.tile(start, stop) for start, stop in self._tiles]
        # Some have every key in each tile.
        below_diagonal = all(tile.shape[-1] == stop for tile, (_, stop) in zip(tiles, self._tiles, strict=True))
        maps = torch.cat([tile.flatten(1) for tile in tiles], dim=1)
        return maps if below_diagonal and maps.nbytes < view.nbytes else view

    def result(self) -> xr.Dataset:
        distances = self._distances()
        finite = np.isfinite(distances)
        return self.dataset(
            {
                "attention_cycle_distance": np.where(finite, distances, 0.0).sum(0),
                "attention_cycle_distance_weight": finite.sum(0).astype(np.float64),
            }
        )

    def _distances(self) -> np.ndarray:
        """(prompt, visit, visit), NaN for visits whose attention cannot be seen."""
        places = [place for place, seen in enumerate(self._seen) if seen is not None]
        found = np.full((self.batch.prompts, len(self._seen), len(self._seen)), np.nan)
        visits = [seen for seen in self._seen if seen is not None]
        if not visits:
            return found
        shape = (self.batch.prompts, len(visits), len(visits))
        gram = torch.zeros(shape, dtype=torch.float64, device=self.batch.mask.device)
        first = 0
        for start, stop in self._tiles:
            last = first + self._heads * (stop - start) * stop
            tiles = [seen[:, first:last] if isinstance(seen, Tensor) else seen.tile(start, stop) for seen in visits]
            rows = torch.stack([tile.double().flatten(1) for tile in tiles], dim=1)
            gram += rows @ rows.mT
            first = last
        norms = gram.diagonal(dim1=-2, dim2=-1)
        squares = (norms[:, :, None] + norms[:, None] - 2 * gram).clamp(min=0)
        scale = self._heads * self.batch.counts.double()
        values = (squares / scale[:, None, None]).sqrt().cpu().numpy()
        found[np.ix_(range(self.batch.prompts), places, places)] = values
        return found


def _tiles(batch: BatchInfo) -> list[tuple[int, int]]:
    """(start, stop) of rows, so few that tiles of all visits are of moderate size."""
    row = cycle_visits(batch) * batch.mask.numel() * (batch.info.heads or 1)
    return row_tiles(batch.tokens, row, batch.mask.device, _TILE_ENTRIES, 8)


def cycle_visits(batch: BatchInfo) -> int:
    """Visits of prelude, the first few recurrences and coda: whose states, or queries and keys, are kept."""
    info, plan = batch.info, batch.plan
    return info.prelude + info.coda + info.recurrent * min(plan.cycle_recurrences, plan.recurrences)
