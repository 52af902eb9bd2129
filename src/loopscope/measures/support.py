"""The support of attention: which keys a row looks at, and whether they stay the same from recurrence to recurrence.

The criterion is that of "Attention Routing Stabilizes Early" (arXiv 2609.27373): the sixteen strongest keys of a row,
and a Jaccard similarity of at least 0.9 over three transitions. Maps may go on changing while their supports do not.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import xarray as xr
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from loopscope.measures.base import BatchInfo, Measure, Needs, Plan, Variable, on_arrays, variable
from loopscope.measures.functions import widen
from loopscope.measures.memory import Memory
from loopscope.models.subject import SubjectInfo
from loopscope.models.visits import AttentionView, QueryKeyAttention, Visit

STRONGEST = 16
MASS = 0.95
STABLE, TRANSITIONS = 0.9, 3
"""As the paper has them."""

_LAYER = "layer recurrence head prompt"
_NAMES = ("support_strongest", "support_mass")


def strongest(rows: Float[Tensor, "*shape key"]) -> Int64[Tensor, "*shape strongest"]:
    """The keys with the sixteen largest probabilities, or all where there are fewer."""
    return rows.topk(min(STRONGEST, rows.shape[-1]), dim=-1).indices


def same_keys(one: Int64[Tensor, "*shape strongest"], other: Int64[Tensor, "*shape strongest"]) -> Tensor:
    """Jaccard similarity of two sets of as many keys, (*shape,): those in both over those in either."""
    both = (one[..., :, None] == other[..., None, :]).any(-1).sum(-1).double()
    return both / (2 * one.shape[-1] - both)


@on_arrays
def mass_support(rows: Float[Tensor, "*shape key"]) -> Bool[Tensor, "*shape key"]:
    """The fewest keys that together have at least 95 % of each row's probability, the strongest first."""
    ordered, keys = rows.double().sort(dim=-1, descending=True, stable=True)
    taken = ordered.cumsum(-1) - ordered < MASS
    return torch.zeros_like(taken).scatter(-1, keys, taken)


@on_arrays
def jaccard(one: Bool[Tensor, "*shape key"], other: Bool[Tensor, "*shape key"]) -> Float[Tensor, "*shape"]:
    """Those in both over those in either; 1 of two empty sets."""
    both, either = (one & other).sum(-1).double(), (one | other).sum(-1).double()
    return torch.where(either > 0, both / either, 1.0)


@on_arrays
def support_stable_from(similarity: Float[Tensor, "*shape recurrence"]) -> Float[Tensor, "*shape"]:
    """The first recurrence from which the similarity to the next is at least 0.9 three times in a row; NaN where there
    is none. `similarity[..., t]` is that of recurrences t and t + 1, with nothing (NaN) at t = 0."""
    alike = similarity[..., 1:] >= STABLE
    if alike.shape[-1] < TRANSITIONS:
        return torch.full(similarity.shape[:-1], torch.nan, dtype=similarity.dtype, device=similarity.device)
    runs = alike.unfold(-1, TRANSITIONS, 1).all(-1)
    return torch.where(runs.any(-1), 1 + runs.int().argmax(-1).to(similarity.dtype), torch.nan)


class AttentionSupport(Measure):
    """On every n-th row from the seventeenth on: a row with at most sixteen keys has the same strongest ones always.

    The rows are those of a prompt's own tokens, whatever else is in its batch.
    """

    part = "support"
    variables: ClassVar[dict[str, Variable]] = {
        "support_strongest": variable(
            _LAYER, "Jaccard similarity of a row's 16 strongest keys at t - 1 and t, mean over sampled rows"
        ),
        "support_strongest_to_horizon": variable(_LAYER, "support_strongest between t and the horizon"),
        "support_mass": variable(
            _LAYER,
            "Jaccard similarity of the smallest sets of keys with 95 % of a row's attention at t - 1 and t, "
            "mean over sampled rows",
        ),
        "support_mass_to_horizon": variable(_LAYER, "support_mass between t and the horizon"),
        "support_stable_from": variable(
            "layer head prompt",
            "first recurrence from which support_strongest is at least 0.9 over three transitions (arXiv "
            "2609.27373); NaN if it never is within the measured recurrences",
            "recurrence",
        ),
        "key_cosine": variable(
            "layer recurrence prompt",
            "cosine of a token's keys at t - 1 and t, as attention reads them, mean over tokens and heads",
        ),
        "key_cosine_to_horizon": variable(
            "layer recurrence prompt",
            "key_cosine between t and the horizon, whose keys one cache for all recurrences would keep",
        ),
    }
    needs = Needs(loop=True, attention=True, horizon=True, also=("heads",))
    otherwise = "queries and keys cannot be seen"

    def __init__(self, batch: BatchInfo) -> None:
        super().__init__(batch)
        info = batch.info
        assert info.heads is not None
        self._rows = range(STRONGEST, batch.tokens, batch.plan.support_every)
        self._heads = info.heads
        shape = (info.recurrent, batch.recurrences)
        self._found = batch.unknown(2, 2, *shape, info.heads, batch.prompts)
        self._keys = batch.unknown(2, *shape, batch.prompts)
        self._before: list[tuple[AttentionView, tuple[Tensor, Tensor]] | None] = [None] * info.recurrent
        self._last: list[tuple[AttentionView, tuple[Tensor, Tensor]] | None] = [None] * info.recurrent
        # Rows of padding are no rows.
        last = max(batch.tokens, STRONGEST)
        places = torch.arange(STRONGEST, last, batch.plan.support_every, device=batch.mask.device)
        self._there = places < batch.counts[:, None]

    @classmethod
    def absent(cls, info: SubjectInfo, plan: Plan) -> str | None:
        return None if plan.support_every else "it was not asked for (--support-every)"

    @classmethod
    def memory(cls, batch: BatchInfo) -> Memory:
        rows = len(range(STRONGEST, batch.tokens, batch.plan.support_every))
        row = batch.prompts * (batch.info.heads or 0) * rows
        sets = row * (batch.tokens + 8 * STRONGEST)
        layers = batch.info.recurrent
        # Of the recurrence before and of the horizon; in the making, probabilities, their order and sums of them.
        return Memory(kept=layers * (2 * sets + batch.attention_bytes), visit=sets + 40 * row * batch.tokens)

    def visit(self, visit: Visit) -> None:
        view, layer = visit.attention, visit.layer
        if visit.stage != "recurrent" or view is None or view.heads != self._heads:
            return
        now = view.without_values(), self._supports(view)
        if self._last[layer] is None and self.batch.horizon is not None:
            end = self.batch.horizon.attention(layer)
            self._last[layer] = None if end is None else (end, self._supports(end))
        for place, other in enumerate((self._before[layer], self._last[layer])):
            if other is None:
                continue
            if self._rows:
                alike = same_keys(now[1][0], other[1][0]), jaccard(now[1][1], other[1][1])
                for name, values in enumerate(alike):
                    self._found[place, name, layer, visit.recurrence - 1] = self._mean(values)
            self._keys[place, layer, visit.recurrence - 1] = key_cosine(view, other[0], self.batch.mask)
        self._before[layer] = now

    def _supports(self, view: AttentionView) -> tuple[Tensor, Tensor]:
        """Of the sampled rows, (batch, head, row, key or one of the strongest)."""
        if not self._rows:
            nothing = torch.zeros(0, device=self.batch.mask.device)
            return nothing, nothing
        tiles = [
            functional.pad(tile := view.tile(row, row + 1), (0, view.tokens - tile.shape[-1])) for row in self._rows
        ]
        rows = torch.cat(tiles, dim=2)
        return strongest(rows), mass_support(rows)

    def _mean(self, values: Tensor) -> Tensor:
        """Over the rows that a prompt has, (head, prompt); NaN of one that has none."""
        there = self._there[:, None]
        mean = torch.where(there, values, 0.0).sum(-1) / there.sum(-1)
        return mean.T.to(self.batch.stored)

    def result(self) -> xr.Dataset:
        arrays: dict[str, Tensor] = {}
        for place, ending in enumerate(("", "_to_horizon")):
            for name, values in zip(_NAMES, self._found[place], strict=True):
                arrays[name + ending] = values
            arrays["key_cosine" + ending] = self._keys[place]
        arrays["support_stable_from"] = support_stable_from(arrays["support_strongest"].movedim(1, -1))
        return self.dataset({name: arrays[name] for name in self.variables})


def key_cosine(one: AttentionView, other: AttentionView, mask: Bool[Tensor, "batch token"]) -> Float[Tensor, " batch"]:
    """Mean over tokens and heads of the cosine of keys; NaN where they cannot be seen."""
    if not (isinstance(one, QueryKeyAttention) and isinstance(other, QueryKeyAttention)):
        return torch.full(mask.shape[:1], torch.nan, device=mask.device)
    cosine = functional.cosine_similarity(widen(one.key), widen(other.key), dim=-1).mean(1)
    mean: Tensor = torch.where(mask, cosine, 0.0).sum(-1) / mask.sum(-1)
    return mean
