"""Readout: what the model would say after each number of recurrences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from loopscope.measures.base import Arrays, Frame, Named
from loopscope.measures.functions import widen
from loopscope.subject import Batch, Run

__all__ = ["Readout", "next_token_loss", "readout_grid"]


def readout_grid(trained: int, recurrences: int) -> tuple[int, ...]:
    """Powers of two up to the measured number, that number itself, and the trained one."""
    powers = [2**exponent for exponent in range(recurrences.bit_length()) if 2**exponent <= recurrences]
    return tuple(sorted({*powers, recurrences, *((trained,) if trained <= recurrences else ())}))


def next_token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy of each prompt's own next tokens, nats, (batch,); NaN for a prompt of one token."""
    targets = batch.input_ids[:, 1:]
    loss = functional.cross_entropy(widen(logits[:, :-1]).transpose(1, 2), targets, reduction="none")
    counted = batch.mask[:, 1:]
    return torch.where(counted, loss, 0.0).sum(-1) / counted.sum(-1)


class Readout:
    """Decodes a run's state at chosen numbers of recurrences. A feed-forward model has one, numbered 1."""

    def __init__(self, frame: Frame, batch: Batch, grid: Sequence[int]) -> None:
        self.grid = tuple(grid)
        self._batch = batch.to(frame.mask.device)
        self._losses = np.full((len(self.grid), frame.prompts), np.nan)

    def after(self, recurrences: int, run: Run) -> None:
        """To be called when so many recurrences are done."""
        if recurrences in self.grid:
            loss = next_token_loss(run.decode(), self._batch)
            self._losses[self.grid.index(recurrences)] = loss.double().cpu().numpy()

    def finish(self) -> Arrays:
        return Arrays({"loss": Named(("readout_recurrence", "prompt"), self._losses)})
