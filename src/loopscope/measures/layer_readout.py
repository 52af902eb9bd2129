"""Readout layer by layer: what norm and head, without the coda, would say of the state within a recurrence (the logit
lens of nostalgebraist, 2020)."""

from __future__ import annotations

from typing import ClassVar

import torch
import xarray as xr

from loopscope.measures.base import BatchInfo, Measure, Needs, Plan, Variable, variable
from loopscope.measures.memory import Memory, tile_entries
from loopscope.models.native.subject import NativeSubject
from loopscope.models.subject import SubjectInfo
from loopscope.models.visits import Visit

_DIMS = "layer prompt token"
_PIECE_ENTRIES = 2**18
"""Logits that are reduced together on a CPU, in float64."""


def layer_readout_at(trained: int | None, recurrences: int) -> int:
    """The recurrence whose layers are read out, counted from 1: the trained number, or the last one measured."""
    return min(trained or recurrences, recurrences)


class LayerReadout(Measure):
    """Reads out each recurrent layer but the last, whose state the coda reads (`Readout`), at one recurrence."""

    part = "readout"
    needs = Needs(loop=True)
    variables: ClassVar[dict[str, Variable]] = {
        "layer_top1": variable(
            _DIMS,
            "the most probable token id when final norm and head read the state after a layer, at the trained "
            "number of recurrences or the last measured one; -1 after the last layer, which the coda reads, and "
            "beyond the end",
            "token id",
        ),
        "layer_top1_probability": variable(_DIMS, "probability of layer_top1"),
        "layer_entropy": variable(_DIMS, "entropy of the prediction whose most probable token is layer_top1", "nats"),
    }

    @classmethod
    def absent(cls, info: SubjectInfo, plan: Plan) -> str | None:
        if info.recurrent < 2:
            return "the block has one layer, after which the coda reads the state"
        return None if info.state_can_be_set else "norm and head of a model that is watched from outside are not known"

    @classmethod
    def applies(cls, batch: BatchInfo) -> bool:
        return isinstance(batch.subject, NativeSubject)

    @classmethod
    def memory(cls, batch: BatchInfo) -> Memory:
        most = tile_entries(batch.mask.device, _PIECE_ENTRIES, 8)
        vocabulary = batch.info.vocab_size
        return Memory(visit=4 * 8 * max(vocabulary, min(most, batch.tokens * vocabulary)))

    def __init__(self, batch: BatchInfo) -> None:
        super().__init__(batch)
        assert isinstance(batch.subject, NativeSubject)
        self._model = batch.subject.model
        self._at = layer_readout_at(batch.info.trained_recurrences, batch.recurrences)
        shape = (batch.info.recurrent, batch.prompts, batch.tokens)
        self._top1 = torch.full(shape, -1, dtype=torch.int64, device=batch.mask.device)
        self._probability, self._entropy = batch.unknown(2, *shape)
        self._lengths = batch.counts.tolist()

    def visit(self, visit: Visit) -> None:
        if visit.stage != "recurrent" or visit.recurrence != self._at or visit.layer == self.batch.info.recurrent - 1:
            return
        size = max(1, tile_entries(self.batch.mask.device, _PIECE_ENTRIES, 8) // self.batch.info.vocab_size)
        for row, length in enumerate(self._lengths):
            for start in range(0, length, size):
                place = (slice(row, row + 1), slice(start, min(start + size, length)))
                scores = self._model.unembed(self._model.norm(visit.residual[place])).double().log_softmax(-1)
                best, top = scores.max(-1)
                self._top1[visit.layer][place] = top
                self._probability[visit.layer][place] = best.exp().to(self.batch.stored)
                entropy = torch.special.entr(scores.exp()).sum(-1)
                self._entropy[visit.layer][place] = entropy.to(self.batch.stored)

    def result(self) -> xr.Dataset:
        arrays = (self._top1, self._probability, self._entropy)
        return self.dataset(dict(zip(self.variables, arrays, strict=True)))
