"""Cycle similarity: cosines of the residual streams of every pair of visits (arXiv 2604.11791, section 4.1)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from loopscope.measures.base import Arrays, Frame, Measure, Named, masked_mean
from loopscope.measures.functions import residual_norm, widen
from loopscope.visits import Visit

__all__ = ["CycleSimilarity", "visit_labels"]


def visit_labels(prelude: int, recurrent: int, coda: int, recurrences: int) -> list[str]:
    """Labels of the visits, in order of realised depth: `prelude.0`, `recurrent.2@5`, `coda.1`."""
    return [
        *(f"prelude.{layer}" for layer in range(prelude)),
        *(f"recurrent.{layer}@{recurrence}" for recurrence in range(recurrences) for layer in range(recurrent)),
        *(f"coda.{layer}" for layer in range(coda)),
    ]


class CycleSimilarity(Measure):
    """Keeps the directions of prelude, the first few recurrences and coda, so memory grows with their number only."""

    def __init__(self, frame: Frame, recurrences: int) -> None:
        self.frame = frame
        self.recurrences = min(recurrences, frame.recurrences)
        self._directions: list[Tensor] = []
        self._norms: list[Tensor] = []

    def visit(self, visit: Visit) -> None:
        if visit.stage == "recurrent" and visit.recurrence >= self.recurrences:
            return
        norm = residual_norm(visit.residual)
        self._norms.append(masked_mean(norm, self.frame.mask))
        direction = widen(visit.residual) / norm.unsqueeze(-1)
        self._directions.append(torch.where(self.frame.mask.unsqueeze(-1), direction, 0.0))

    def finish(self) -> Arrays:
        visits = len(self._directions)
        total = torch.zeros(visits, visits, dtype=torch.float64)
        weight = torch.zeros(visits, visits, dtype=torch.float64)
        for prompt in range(self.frame.prompts):
            # Directions of one prompt in a row: their product is the sum over its tokens of the cosines.
            rows = torch.stack([direction[prompt].flatten() for direction in self._directions])
            mean = (rows @ rows.T).double().cpu() / float(self.frame.counts[prompt])
            finite = torch.isfinite(mean)
            total += torch.where(finite, mean.clamp(-1.0, 1.0), 0.0)
            weight += finite
        arrays = Arrays()
        arrays.summed["cycle_similarity"] = Named(("visit", "visit_other"), total.numpy())
        arrays.weight["cycle_similarity"] = weight.numpy()
        norms: np.ndarray = torch.stack(self._norms).double().cpu().numpy()
        arrays.per_prompt["visit_norm"] = Named(("visit", "prompt"), norms)
        return arrays
