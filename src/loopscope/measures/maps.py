"""Attention maps of single prompts, for the eye: of a few recurrences, and of a prompt's first tokens."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import xarray as xr
from torch import Tensor

from loopscope._util.map_codes import HIGHEST, UNKNOWN
from loopscope._util.sites import Site
from loopscope.measures.base import BatchInfo, Measure, Needs, Plan, Variable, variable
from loopscope.measures.heads import tiles
from loopscope.measures.readout import readout_grid
from loopscope.models.subject import SubjectInfo
from loopscope.models.visits import AttentionView, Visit

_FIRST = 4
"""That many recurrences from the start are kept one by one: where heads settle, most of it happens there."""


def map_recurrences(trained: int, recurrences: int) -> tuple[int, ...]:
    """The first four, powers of two, the trained number and the last: about log2(R) + 3 of R."""
    return tuple(sorted({*readout_grid(trained, recurrences), *range(1, min(_FIRST, recurrences) + 1)}))


def map_sites(info: SubjectInfo, recurrences: tuple[int, ...]) -> list[Site]:
    """Every visit whose maps are kept, in order of realised depth."""
    return info.sites(recurrences)


def map_tokens(most: int, maps: int, limit: int) -> int:
    """Tokens of which maps can be kept: `most`, or as many as `limit` bytes have room for; 0 if none."""
    return min(most, math.isqrt(limit // maps))


def encode_maps(probabilities: Tensor) -> Tensor:
    """Probabilities as `round(254 sqrt(p))`, of any shape; NaN as 255 (`loopscope.map_codes`)."""
    steps = (HIGHEST * probabilities.sqrt()).round().clamp(max=HIGHEST)
    return torch.where(steps.isnan(), UNKNOWN, steps).to(torch.uint8)


class AttentionMaps(Measure):
    """Keeps the maps of the chosen prompts, visits and tokens, a byte an entry (`loopscope.map_codes`).

    Rows are made prompt by prompt in tiles. Under a causal mask those of the first tokens are complete; other attention
    may reach beyond the tokens that are kept, and the rows then add up to less than 1.
    """

    part = "maps"
    variables: ClassVar[dict[str, Variable]] = {
        "attention_map": variable(
            "mapped map_visit head query key",
            "one byte per entry, round(254 sqrt(A_ij)); 255 where there is nothing; see Attention maps",
            "code",
        )
    }
    needs = Needs(attention=True)

    def __init__(self, batch: BatchInfo) -> None:
        super().__init__(batch)
        choice = batch.plan.maps
        assert choice is not None
        assert batch.info.heads is not None
        self._heads = batch.info.heads
        sites = map_sites(batch.info, choice.recurrences)
        self._places = {site: place for place, site in enumerate(sites)}
        self._rows = _mapped(batch)
        self._counts = [min(int(batch.counts[row]), choice.tokens) for row in self._rows]
        side = max(self._counts)
        shape = (len(self._rows), len(sites), self._heads, side, side)
        self._codes = torch.full(shape, UNKNOWN, dtype=torch.uint8, device=batch.mask.device)

    @classmethod
    def absent(cls, info: SubjectInfo, plan: Plan) -> str | None:
        return None if plan.maps is not None else "no maps were kept (--map-prompts, --map-limit)"

    @classmethod
    def applies(cls, batch: BatchInfo) -> bool:
        return bool(_mapped(batch))

    def visit(self, visit: Visit) -> None:
        place = self._places.get(visit.site)
        view = visit.attention
        if place is None or view is None or view.heads != self._heads:
            return
        for index, (row, count) in enumerate(zip(self._rows, self._counts, strict=True)):
            self._keep(view.prompt(row), self._codes[index, place, :, :count, :count])

    def _keep(self, view: AttentionView, codes: Tensor) -> None:
        """Rows and columns of the first tokens, into `codes` (head, query, key)."""
        count = codes.shape[-1]
        for start, stop in tiles(view, 1, self.batch.mask.device):
            if start >= count:
                return
            tile = view.rows(start, min(stop, count))[0, :, :, :count]
            codes[:, start:stop] = encode_maps(tile)

    def result(self) -> xr.Dataset:
        return self.dataset({"attention_map": self._codes})


def _mapped(batch: BatchInfo) -> list[int]:
    """Rows of the batch whose maps are kept."""
    prompts = () if batch.plan.maps is None else batch.plan.maps.prompts
    return [row for row in map(batch.row, prompts) if row is not None]
