"""Cycle similarity: every pair of visits, by residual stream and by attention (arXiv 2604.11791, section 4.1)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from loopscope.measures.base import BatchInfo, Measure, Needs, Variable, variable
from loopscope.measures.functions import residual_norm, widen
from loopscope.measures.memory import Memory, tile_entries
from loopscope.models.visits import AttentionView, Visit

_TILE_ENTRIES = 2**21
"""Probabilities, of all visits together, in a tile of rows on a CPU: 16 MiB in float64."""


class CycleSimilarity(Measure):
    """Keeps the directions of prelude, the first few recurrences and coda, so memory grows with their number only."""

    part = "cycle-similarity"
    variables: ClassVar[dict[str, Variable]] = {
        "cycle_similarity": variable(
            "visit visit_other", "cosine of residual streams, mean over tokens and prompts", summed=True
        )
    }

    def __init__(self, batch: BatchInfo) -> None:
        super().__init__(batch)
        self.recurrences = min(batch.plan.cycle_recurrences, batch.recurrences)
        self._directions: list[Tensor] = []

    @classmethod
    def memory(cls, batch: BatchInfo) -> Memory:
        kept = cycle_visits(batch) * batch.bytes[1]
        return Memory(kept=kept, result=kept // batch.prompts)

    def visit(self, visit: Visit) -> None:
        if visit.stage == "recurrent" and visit.recurrence > self.recurrences:
            return
        norm = residual_norm(visit.residual)
        direction = widen(visit.residual) / norm.unsqueeze(-1)
        self._directions.append(torch.where(self.batch.mask.unsqueeze(-1), direction, 0.0))

    def result(self) -> xr.Dataset:
        visits = len(self._directions)
        total, weight = torch.zeros(2, visits, visits, dtype=torch.float64, device=self.batch.mask.device)
        for prompt in range(self.batch.prompts):
            # Directions of one prompt in a row: their product is the sum over its tokens of the cosines.
            rows = torch.stack([direction[prompt].flatten() for direction in self._directions])
            mean = (rows @ rows.T).double() / self.batch.counts[prompt]
            finite = torch.isfinite(mean)
            total += torch.where(finite, mean.clamp(-1.0, 1.0), 0.0)
            weight += finite
        return self.dataset({"cycle_similarity": total, "cycle_similarity_weight": weight})


class AttentionCycle(Measure):
    """Frobenius distances between the attention of every pair of visits.

    `sqrt(sum over heads ||A_u - A_v||^2 / (H T))`: the root mean square, over heads and rows, of the distance between
    two rows. From one Gram matrix of all maps that is added up over tiles of rows, in float64, since a distance is the
    small difference of large squares. Keeps the queries and keys of the first few recurrences.
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
        self._heads = batch.info.heads
        self._views: list[AttentionView | None] = []

    @classmethod
    def memory(cls, batch: BatchInfo) -> Memory:
        visits = cycle_visits(batch)
        row = visits * batch.prompts * (batch.info.heads or 0) * batch.tokens
        # Tiles of all visits, side by side once more, and one in the making.
        tiles = 17 * max(row, min(tile_entries(batch.mask.device, _TILE_ENTRIES, 8), row * batch.tokens))
        return Memory(kept=visits * batch.attention_bytes, result=tiles)

    def visit(self, visit: Visit) -> None:
        if visit.stage == "recurrent" and visit.recurrence > self.recurrences:
            return
        view = visit.attention
        self._views.append(None if view is None or view.heads != self._heads else view.without_values())

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
        seen = [index for index, view in enumerate(self._views) if view is not None]
        views = [view for view in self._views if view is not None]
        prompts, tokens = self.batch.prompts, self.batch.tokens
        found = np.full((prompts, len(self._views), len(self._views)), np.nan)
        if not views:
            return found
        device = self.batch.mask.device
        gram = torch.zeros(prompts, len(views), len(views), dtype=torch.float64, device=device)
        step = max(1, tile_entries(device, _TILE_ENTRIES, 8) // (len(views) * prompts * self._heads * tokens))
        for start in range(0, tokens, step):
            tiles = [view.tile(start, min(start + step, tokens)).double().flatten(1) for view in views]
            rows = torch.stack(tiles, dim=1)
            gram += rows @ rows.mT
        norms = gram.diagonal(dim1=-2, dim2=-1)
        squares = (norms[:, :, None] + norms[:, None] - 2 * gram).clamp(min=0)
        scale = self._heads * self.batch.counts.double()
        values = (squares / scale[:, None, None]).sqrt().cpu().numpy()
        found[np.ix_(range(prompts), seen, seen)] = values
        return found


def cycle_visits(batch: BatchInfo) -> int:
    """Visits of prelude, the first few recurrences and coda: whose states, or queries and keys, are kept."""
    info, plan = batch.info, batch.plan
    return info.prelude + info.coda + info.recurrent * min(plan.cycle_recurrences, plan.recurrences)
