"""What one cache of keys and values for all recurrences would cost: how far each recurrence's are from the horizon's,
and how different what a head mixes would be with those of the horizon instead.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
import xarray as xr
from torch import Tensor

from loopscope._util.shapes import Rows, Values
from loopscope.measures.base import BatchInfo, Measure, Needs, Plan, Variable, variable
from loopscope.measures.functions import widen
from loopscope.measures.memory import Memory
from loopscope.models.subject import SubjectInfo
from loopscope.models.visits import QueryKeyAttention, Visit

_HEAD = "layer recurrence head prompt"


class SharedCache(Measure):
    """Per query head, whose keys and values others may share.

    Generation with a cache keeps keys and values of the tokens before, one set per recurrence, or one for all of them:
    that of the last recurrence, for which the horizon's stands here. A token's own key and value are always those of
    its recurrence.
    """

    part = "support"
    variables: ClassVar[dict[str, Variable]] = {
        "cache_key_distance": variable(
            _HEAD, "||k[t] - k[H]|| / ||k[H]|| of the keys as a head reads them, mean over tokens"
        ),
        "cache_value_distance": variable(_HEAD, "cache_key_distance for the values"),
        "cache_output_change": variable(
            _HEAD,
            "change of a head's output at t if all earlier tokens had the horizon's keys and values, as with "
            "one shared cache, over the norm of the output, mean over sampled rows",
        ),
    }
    needs = Needs(loop=True, attention=True, horizon=True, also=("heads",))
    otherwise = "keys and values cannot be seen"

    def __init__(self, batch: BatchInfo) -> None:
        super().__init__(batch)
        assert batch.info.heads is not None
        every = batch.plan.support_every
        self._rows = range(every, batch.tokens, every)
        self._there = torch.arange(batch.tokens, device=batch.mask.device)[every::every] < batch.counts[:, None]
        self._found = batch.unknown(3, batch.info.recurrent, batch.recurrences, batch.info.heads, batch.prompts)

    @classmethod
    def absent(cls, info: SubjectInfo, plan: Plan) -> str | None:
        return None if plan.support_every else "it was not asked for (--support-every)"

    @classmethod
    def memory(cls, batch: BatchInfo) -> Memory:
        sizes = batch.sizes
        values = batch.mask.numel() * sizes.key_width
        row = batch.prompts * (batch.info.heads or 0) * batch.tokens
        # The horizon's values; in the making keys and values in float32 or wider, and a row at a time.
        return Memory(kept=batch.info.recurrent * values * batch.itemsize, visit=8 * (6 * values + 4 * row))

    def visit(self, visit: Visit) -> None:
        view, horizon = visit.attention, self.batch.horizon
        if visit.stage != "recurrent" or horizon is None or not isinstance(view, QueryKeyAttention):
            return
        end = horizon.attention(visit.layer)
        if not isinstance(end, QueryKeyAttention) or view.value is None or end.value is None:
            return
        if not view.heads == end.heads == self._found.shape[3]:
            return
        found = self._found[:, visit.layer, visit.recurrence - 1]
        mask = self.batch.mask[:, None]
        for place, (now, then) in enumerate(((view.key, end.key), (view.value, end.value))):
            away = torch.where(mask, _relative(widen(now), widen(then)), 0.0).sum(-1) / mask.sum(-1)
            found[place] = away.repeat_interleave(view.heads // now.shape[1], dim=1).T
        if self._rows:
            found[2] = self._change(view, view.value, end, end.value)

    def _change(self, view: QueryKeyAttention, value: Values, end: QueryKeyAttention, last: Values) -> Tensor:
        """(head, prompt); NaN of a prompt without a sampled row."""
        shared = dataclasses.replace(view, key=end.key.clone())
        values, lasts = widen(value), widen(last)
        changes = []
        for row in self._rows:
            one = slice(row, row + 1)
            shared.key[:, :, one] = view.key[:, :, one]
            own = _mixed(view.tile(row, row + 1), values)
            weights = shared.tile(row, row + 1)
            other = _mixed(weights, lasts) + weights[..., one] * _spread(values[:, :, one] - lasts[:, :, one], view)
            shared.key[:, :, one] = end.key[:, :, one]
            changes.append(_relative(other, own)[..., 0])
        change = torch.stack(changes, dim=-1)
        there = self._there[:, None]
        mean = torch.where(there, change, 0.0).sum(-1) / there.sum(-1)
        return mean.T.to(self.batch.stored)

    def result(self) -> xr.Dataset:
        return self.dataset(dict(zip(self.variables, self._found, strict=True)))


def _relative(one: Tensor, other: Tensor) -> Tensor:
    """||one - other|| / ||other|| along the last dimension."""
    norm = torch.linalg.vector_norm
    away: Tensor = norm(one - other, dim=-1) / norm(other, dim=-1)
    return away


def _mixed(weights: Rows, values: Tensor) -> Tensor:
    """(batch, head, row, head_dim), of values of (batch, kv_head, token, head_dim)."""
    keys = weights.shape[-1]
    grouped = weights.unflatten(1, (values.shape[1], -1)).to(values.dtype)
    mixed: Tensor = grouped @ values[:, :, None, :keys]
    return mixed.flatten(1, 2)


def _spread(values: Tensor, view: QueryKeyAttention) -> Tensor:
    """Of each query head, what its kv head has."""
    return values.repeat_interleave(view.heads // values.shape[1], dim=1)
