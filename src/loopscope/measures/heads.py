"""Attention heads: what each one looks at in every visit, and how its map changes between recurrences.

No map is ever whole: rows are made in tiles from queries and keys, added up, and dropped; on a GPU, kernels of Triton's
do so without writing them down.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import ClassVar, TypeGuard

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from loopscope._util.shapes import TokenMask
from loopscope.measures.attention import concentration, entropy_of_rows, most_entropy, stable_from
from loopscope.measures.base import BatchInfo, Measure, Needs, Variable, depth_count, depth_of, variable
from loopscope.measures.functions import widen
from loopscope.measures.memory import Memory, row_tiles, tile_entries, waiting_bytes
from loopscope.models.visits import AttentionView, QueryKeyAttention, Visit

HEAD_NAMES = (
    "colsum_concentration",
    "sink_score",
    "strongest_sink",
    "strongest_sink_position",
    "mixing_score",
    "relative_mixing_score",
)
"""Per visit, head and prompt."""

CHANGE_NAMES = ("attention_change", "attention_distance_to_horizon", "attention_bound_ratio")
"""Per recurrent layer, recurrence, head and prompt."""

_VISIT, _CHANGE = "depth head prompt", "layer recurrence head prompt"
_NO_LOOP = "a feed-forward model has no recurrences"

_TILE_ENTRIES = 2**18
"""Probabilities in a tile on a CPU: 1 MiB in float32, so that the passes over it stay in its second cache. The fewer
rows, the less of a tile lies beyond the diagonal, too."""
_PENDING_BYTES = 2**25
"""Of queries and keys that wait on a CPU. Consecutive recurrences of a layer are done together, so that each map is
made once and not once more for the change to the next; how many wait depends on the shapes and never on R."""


def tiles(view: AttentionView, batch: int, device: torch.device) -> list[tuple[int, int]]:
    """(start, stop) of rows that together make a tile of moderate size."""
    return row_tiles(view.tokens, batch * view.heads * view.tokens, device, _TILE_ENTRIES)


def fuses(device: torch.device, dtype: str) -> bool:
    """Whether maps of a model in half precision are reduced by Triton's kernels there: on a GPU of Nvidia's that
    multiplies bfloat16, or in Triton's interpreter, where it is asked for (TRITON_INTERPRET=1).

    Not those of float32, which GPUs have no units to multiply: the kernels would need more registers than there are.
    """
    if dtype not in ("bfloat16", "float16"):
        return False
    if device.type == "cuda":
        able = torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        able = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return able and find_spec("triton") is not None


_Maps = tuple[Sequence[AttentionView], AttentionView | None, AttentionView | None]
"""Of consecutive recurrences of a layer, of the one before these, and of the horizon."""
_FusedMaps = tuple[Sequence[QueryKeyAttention], QueryKeyAttention | None, QueryKeyAttention | None]


def _can_be_fused(maps: _Maps) -> TypeGuard[_FusedMaps]:
    """Whether the kernels know these."""
    shapes = set()
    for view in (*maps[0], *maps[1:]):
        if isinstance(view, QueryKeyAttention) and view.causal and view.added is None:
            shapes.add((view.query.shape, view.key.shape, view.query.dtype, view.key.dtype, view.scale, view.window))
        elif view is not None:
            return False
    (query, key, dtype, key_dtype, _, _), *others = shapes
    fits = dtype == key_dtype and query[2] == key[2] and query[3] <= 128
    return not others and fits and dtype in (torch.bfloat16, torch.float16)


class HeadMeasures(Measure):
    """Sinks, concentration, mixing and change of every head, in one pass over tiles of rows.

    A head is stable once `||A[t] - A[t-1]|| / sqrt(T)`, the root mean square over rows of their change, stays at or
    below the plan's `head_stable`.
    """

    part = "heads"
    variables: ClassVar[dict[str, Variable]] = {
        "colsum_concentration": variable(_VISIT, "1 + (1/log T) sum_j c_j log c_j with c_j = (1/T) sum_i A_ij"),
        "sink_score": variable(_VISIT, "c_0, the share of all attention that the first token receives"),
        "strongest_sink": variable(_VISIT, "the largest c_j"),
        "strongest_sink_position": variable(_VISIT, "the j of the largest c_j", "token"),
        "mixing_score": variable(_VISIT, "mean row entropy", "nats"),
        "relative_mixing_score": variable(_VISIT, "mean over rows i > 0 of the row's entropy over log(i + 1)"),
        "attention_change": variable(
            _CHANGE, "Frobenius norm ||A[t] - A[t-1]||; nothing at recurrence 1", otherwise=_NO_LOOP
        ),
        "attention_distance_to_horizon": variable(_CHANGE, "||A[t] - A[H]||", otherwise=_NO_LOOP),
        "attention_bound_ratio": variable(
            _CHANGE,
            "attention_change over the most that the change of queries and keys allows (Prop. 4.2 of the paper, "
            "in its sharper form without weights); a value above 1 would be an error of the instrument",
            otherwise=_NO_LOOP,
        ),
        "head_stable_from": variable(
            "layer head prompt",
            "number of recurrences after which attention_change / sqrt(T) stays at or below the setting "
            "head_stable; NaN for a head that is not stable within the measured recurrences",
            "recurrences",
            otherwise=_NO_LOOP,
        ),
        "token_attention_change": variable(
            "recurrence prompt token",
            "Euclidean norm of the change of the token's row of the map from t - 1 to t, root mean square over "
            "all visible heads of the recurrent layers; nothing at recurrence 1; 0 for the first token, which "
            "attends only to itself",
            otherwise=_NO_LOOP,
        ),
    }
    needs = Needs(attention=True, horizon=True)

    def __init__(self, batch: BatchInfo) -> None:
        super().__init__(batch)
        info = batch.info
        assert info.heads is not None
        self._heads = heads = info.heads
        depths = depth_count(batch)
        self._stats = batch.unknown(len(HEAD_NAMES), depths, heads, batch.prompts)
        self._changes = batch.unknown(len(CHANGE_NAMES), info.recurrent, batch.recurrences, heads, batch.prompts)
        self._pending: list[list[tuple[int, AttentionView]]] = [[] for _ in range(info.recurrent)]
        self._before: list[AttentionView | None] = [None] * info.recurrent
        # Of each row, over the heads of the layers that can be seen: sum of squared changes, and how many there are.
        moved = (batch.recurrences, batch.prompts, batch.tokens)
        self._moved = torch.zeros(moved, dtype=torch.float64, device=batch.mask.device)
        self._moving = np.zeros(batch.recurrences)

    @classmethod
    def memory(cls, batch: BatchInfo) -> Memory:
        layers, views = batch.info.recurrent, batch.attention_bytes
        # What waits, at least one recurrence of each layer, and the one that it is compared with.
        most = waiting_bytes(batch.mask.device, _PENDING_BYTES)
        waiting = min(max(most, layers * views), layers * views * batch.recurrences)
        rows = batch.prompts * (batch.info.heads or 0) * batch.tokens
        columns = 8 * rows * (waiting // max(1, layers * views))
        tile = max(rows, min(tile_entries(batch.mask.device, _TILE_ENTRIES), rows * batch.tokens))
        # Of the kernels: queries and keys of a layer side by side, and sums over the columns of blocks of rows.
        fused = waiting // layers + 2 * views + rows * batch.tokens if fuses(batch.mask.device, batch.info.dtype) else 0
        return Memory(kept=waiting + layers * views, visit=columns + max(4 * 8 * tile, fused))

    def visit(self, visit: Visit) -> None:
        view = visit.attention
        if view is None or view.heads != self._heads:
            return
        if visit.stage != "recurrent":
            sums, _, _ = self._reduce([view], None, None)
            self._keep(depth_of(self.batch, visit.stage, visit.layer, 0), sums[0])
            return
        pending = self._pending[visit.layer]
        pending.append((visit.recurrence, view.without_values()))
        waiting = sum(waiting.nbytes for _, waiting in pending) * len(self._pending)
        if waiting >= waiting_bytes(self.batch.mask.device, _PENDING_BYTES):
            self._flush(visit.layer)

    def _flush(self, layer: int) -> None:
        """Do the recurrences of a layer that wait; the last of them stays, to be compared with the next."""
        pending = self._pending[layer]
        if not pending:
            return
        views = [view for _, view in pending]
        before = self._before[layer]
        sums, squares, moved = self._reduce(views, before, self._at_horizon(layer))
        distances = squares.sqrt()
        bounds = torch.stack(
            [
                change_bound(view, earlier, self.batch.mask)
                for view, earlier in zip(views, [before, *views[:-1]], strict=True)
            ]
        )
        values = torch.cat((distances, distances[:1] / bounds)).movedim(-1, -2)
        for index, (recurrence, _) in enumerate(pending):
            if before is not None or index > 0:
                self._moving[recurrence - 1] += self._heads
                self._moved[recurrence - 1] += moved[index]
            self._keep(depth_of(self.batch, "recurrent", layer, recurrence), sums[index])
            self._changes[:, layer, recurrence - 1] = values[:, index]
        self._before[layer] = views[-1]
        pending.clear()

    def _reduce(
        self, views: Sequence[AttentionView], before: AttentionView | None, horizon: AttentionView | None
    ) -> tuple[list[_Sums], Tensor, Tensor]:
        """Of consecutive recurrences of a layer: what is added up of each map; squared distances to the map before and
        to that at the horizon, (2, recurrence, batch, head), NaN where there is none; and the first of these by row,
        over all heads, (recurrence, batch, token)."""
        batch = self.batch
        sums = [_Sums(batch, view) for view in views]
        squares = torch.zeros(2, len(views), batch.prompts, self._heads, dtype=torch.float64, device=batch.mask.device)
        moved = torch.zeros(len(views), *batch.mask.shape, dtype=torch.float64, device=batch.mask.device)
        maps: _Maps = (views, before, horizon)
        if fuses(batch.mask.device, batch.info.dtype) and _can_be_fused(maps):
            from loopscope.measures.fused import map_statistics  # noqa: PLC0415 - needs Triton

            found = map_statistics(*maps)
            for each, columns, entropy in zip(sums, found.columns, found.entropy, strict=True):
                each.add_rows(columns, entropy, 0)
            return sums, torch.stack((found.change, found.away)).sum(-1), found.change.sum(2)
        for start, stop in tiles(views[0], batch.prompts, batch.mask.device):
            last = None if before is None else before.tile(start, stop)
            fixed = None if horizon is None else horizon.tile(start, stop)
            for index, view in enumerate(views):
                tile = view.tile(start, stop)
                sums[index].add(tile, start)
                for place, reference in enumerate((last, fixed)):
                    if reference is None:
                        squares[place, index] = torch.nan
                        continue
                    rows = _square_distances(tile, reference)
                    squares[place, index] += rows.sum(-1)
                    if place == 0:
                        moved[index, :, start:stop] = rows.sum(1)
                last = tile
        return sums, squares, moved

    def _at_horizon(self, layer: int) -> AttentionView | None:
        return None if self.batch.horizon is None else self.batch.horizon.attention(layer)

    def _keep(self, depth: int, sums: _Sums) -> None:
        self._stats[:, depth] = sums.finish()

    def result(self) -> xr.Dataset:
        for layer in range(len(self._pending)):
            self._flush(layer)
        found = dict(zip(HEAD_NAMES, self._stats, strict=True))
        if self._pending:
            found |= dict(zip(CHANGE_NAMES, self._changes, strict=True))
            by_row = self._changes[0] / self.batch.counts.double().sqrt()
            found["head_stable_from"] = stable_from(by_row.movedim(1, -1), self.batch.plan.head_stable)
            found["token_attention_change"] = self._token_change()
        return self.dataset(found)

    def _token_change(self) -> Tensor:
        """Root mean square change of a token's own rows, over all heads and layers that can be seen."""
        # 0 / 0 is NaN: nothing to compare with.
        moving = torch.from_numpy(self._moving).to(self._moved.device)
        change = (self._moved / moving[:, None, None]).sqrt()
        return change.masked_fill(~self.batch.mask, torch.nan).to(self.batch.stored)


class _Sums:
    """What is added up over the tiles of one visit."""

    def __init__(self, batch: BatchInfo, view: AttentionView) -> None:
        self._counts = batch.counts
        shape = (batch.prompts, view.heads)
        device = batch.mask.device
        self._columns = torch.zeros(*shape, view.tokens, dtype=torch.float64, device=device)
        self._entropy = torch.zeros(shape, dtype=torch.float64, device=device)
        self._relative = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, tile: Tensor, start: int) -> None:
        self.add_rows(tile.sum(-2), entropy_of_rows(tile), start)

    def add_rows(self, columns: Tensor, entropy: Tensor, start: int) -> None:
        """Sums over the columns of some rows, and the entropies of these, the first of which is `start`."""
        self._columns[..., : columns.shape[-1]] += columns
        self._entropy += entropy.sum(-1)
        most = most_entropy(start + entropy.shape[-1], entropy)[start:]
        # The first row has one key to look at, and no entropy to be relative to.
        share = (entropy / most)[..., 1:] if start == 0 else entropy / most
        self._relative += share.sum(-1)

    def finish(self) -> Tensor:
        """(name, head, prompt), in the order of `HEAD_NAMES`."""
        counts = self._counts[:, None].double()
        scores = self._columns / counts[..., None]
        strongest, position = scores.max(-1)
        values = (
            concentration(scores, self._counts[:, None]),
            scores[..., 0],
            strongest,
            position.double(),
            self._entropy / counts,
            self._relative / (counts - 1),
        )
        return torch.stack([value.T for value in values])


def _square_distances(tile: Tensor, reference: Tensor) -> Tensor:
    """Squared Euclidean distances of the rows of two tiles, (batch, head, row)."""
    away: Tensor = torch.linalg.vector_norm(tile - reference, dim=-1)
    return away.double().square()


def change_bound(view: AttentionView, before: AttentionView | None, mask: TokenMask) -> Tensor:
    """The most by which maps can differ, given the queries and keys that make them, per head, (batch, head).

    `(scale / 2) (||Q - Q'|| ||K|| + ||Q'|| ||K - K'||)`, Frobenius norms over a prompt's tokens, as a row's softmax
    changes by at most half of what its scores do. It is the step before the weights come in of Proposition 4.2 of the
    paper, whose `(1/2) (2 b kappa / sqrt(d)) ||X - X'||` follows with `||Q|| <= ||W_Q|| b` and the like. Being sharper,
    it needs no weights, and holds with norms, biases and rotations of queries and keys. NaN where those are not known.
    """
    if not (isinstance(view, QueryKeyAttention) and isinstance(before, QueryKeyAttention)):
        return torch.full((mask.shape[0], view.heads), torch.nan, dtype=torch.float64, device=mask.device)
    groups = view.heads // view.key.shape[1]

    def norm(states: Tensor) -> Tensor:
        by_token = torch.where(mask[:, None], torch.linalg.vector_norm(widen(states), dim=-1), 0.0)
        size: Tensor = torch.linalg.vector_norm(by_token, dim=-1, dtype=torch.float64)
        return size if size.shape[1] == view.heads else size.repeat_interleave(groups, dim=1)

    moved = norm(view.query - before.query) * norm(view.key) + norm(before.query) * norm(view.key - before.key)
    return moved * abs(view.scale) / 2
