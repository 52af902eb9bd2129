"""Attention heads: what each one looks at in every visit, and how its map changes between recurrences.

No map is ever whole: rows are made in tiles from queries and keys, added up, and dropped.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from loopscope._util.shapes import TokenMask
from loopscope.measures.attention import concentration, entropy_of_rows, most_entropy, stable_from
from loopscope.measures.base import Arrays, Frame, Measure, Named, depth_count, depth_of
from loopscope.measures.functions import widen
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

_TILE_ENTRIES = 2**18
"""Probabilities in a tile: 1 MiB in float32, so that the passes over it stay in a processor's second cache. The fewer
rows, the less of a tile lies beyond the diagonal, too."""
_PENDING_BYTES = 2**25
"""Of queries and keys that wait. Consecutive recurrences of a layer are done together, so that each map is made once
and not once more for the change to the next; how many wait depends on the shapes and never on R."""


def tiles(view: AttentionView, batch: int) -> list[tuple[int, int]]:
    """(start, stop) of rows that together make a tile of moderate size."""
    rows = max(1, _TILE_ENTRIES // (batch * view.heads * view.tokens))
    return [(start, min(start + rows, view.tokens)) for start in range(0, view.tokens, rows)]


class HeadMeasures(Measure):
    """Sinks, concentration, mixing and change of every head, in one pass over tiles of rows.

    `horizon` gives the attention at the horizon of a recurrent layer, or None where it cannot be seen. A head is stable
    once `||A[t] - A[t-1]|| / sqrt(T)`, the root mean square over rows of their change, stays at or below `stable`.
    """

    def __init__(self, frame: Frame, heads: int, horizon: Callable[[int], AttentionView | None], stable: float) -> None:
        self.frame = frame
        self._stable = stable
        self._horizon = horizon
        self._heads = heads
        info = frame.info
        depths = depth_count(frame)
        self._stats = np.full((len(HEAD_NAMES), depths, heads, frame.prompts), np.nan, dtype=np.float32)
        changes = (len(CHANGE_NAMES), info.recurrent, frame.recurrences, heads, frame.prompts)
        self._changes = np.full(changes, np.nan, dtype=np.float32)
        self._pending: list[list[tuple[int, AttentionView]]] = [[] for _ in range(info.recurrent)]
        self._before: list[AttentionView | None] = [None] * info.recurrent
        # Of each row, over the heads of the layers that can be seen: sum of squared changes, and how many there are.
        moved = (frame.recurrences, frame.prompts, frame.tokens)
        self._moved = torch.zeros(moved, dtype=torch.float64, device=frame.mask.device)
        self._moving = np.zeros(frame.recurrences)

    def visit(self, visit: Visit) -> None:
        view = visit.attention
        if view is None or view.heads != self._heads:
            return
        if visit.stage != "recurrent":
            sums = _Sums(self.frame, view)
            for start, stop in tiles(view, self.frame.prompts):
                sums.add(view.tile(start, stop), start)
            self._keep(depth_of(self.frame, visit.stage, visit.layer, 0), sums)
            return
        pending = self._pending[visit.layer]
        pending.append((visit.recurrence, view))
        if sum(waiting.nbytes for _, waiting in pending) * len(self._pending) >= _PENDING_BYTES:
            self._flush(visit.layer)

    def _flush(self, layer: int) -> None:
        """Do the recurrences of a layer that wait; the last of them stays, to be compared with the next."""
        pending = self._pending[layer]
        if not pending:
            return
        views = [view for _, view in pending]
        before, horizon = self._before[layer], self._horizon(layer)
        sums = [_Sums(self.frame, view) for view in views]
        places = (2, len(views), self.frame.prompts, self._heads)
        squares = torch.zeros(places, dtype=torch.float64, device=self.frame.mask.device)
        for start, stop in tiles(views[0], self.frame.prompts):
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
                        self._moved[pending[index][0], :, start:stop] += rows.sum(1)
                last = tile
        distances = squares.sqrt()
        bounds = torch.stack(
            [
                change_bound(view, earlier, self.frame.mask)
                for view, earlier in zip(views, [before, *views[:-1]], strict=True)
            ]
        )
        values = torch.cat((distances, distances[:1] / bounds)).movedim(-1, -2).cpu().numpy()
        for index, (recurrence, _) in enumerate(pending):
            self._moving[recurrence] += 0 if before is None and index == 0 else self._heads
            self._keep(depth_of(self.frame, "recurrent", layer, recurrence), sums[index])
            self._changes[:, layer, recurrence] = values[:, index]
        self._before[layer] = views[-1]
        pending.clear()

    def _keep(self, depth: int, sums: _Sums) -> None:
        self._stats[:, depth] = sums.finish().float().cpu().numpy()

    def finish(self) -> Arrays:
        for layer in range(len(self._pending)):
            self._flush(layer)
        arrays = Arrays()
        for index, name in enumerate(HEAD_NAMES):
            arrays.per_prompt[name] = Named(("depth", "head", "prompt"), self._stats[index])
        for index, name in enumerate(CHANGE_NAMES if self._pending else ()):
            arrays.per_prompt[name] = Named(("layer", "recurrence", "head", "prompt"), self._changes[index])
        if self._pending:
            by_row = self._changes[0] / np.sqrt(self.frame.counts.cpu().numpy())
            found = stable_from(np.moveaxis(by_row, 1, -1), self._stable)
            arrays.per_prompt["head_stable_from"] = Named(("layer", "head", "prompt"), found)
            arrays.per_prompt["token_attention_change"] = self._token_change()
        return arrays

    def _token_change(self) -> Named:
        """Root mean square change of a token's own rows, over all heads and layers that can be seen."""
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: nothing to compare with
            change = np.sqrt(self._moved.cpu().numpy() / self._moving[:, None, None])
        change[:, ~self.frame.mask.cpu().numpy()] = np.nan
        return Named(("recurrence", "prompt", "token"), change.astype(np.float32))


class _Sums:
    """What is added up over the tiles of one visit."""

    def __init__(self, frame: Frame, view: AttentionView) -> None:
        self._counts = frame.counts
        shape = (frame.prompts, view.heads)
        device = frame.mask.device
        self._columns = torch.zeros(*shape, view.tokens, dtype=torch.float64, device=device)
        self._entropy = torch.zeros(shape, dtype=torch.float64, device=device)
        self._relative = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, tile: Tensor, start: int) -> None:
        self._columns[..., : tile.shape[-1]] += tile.sum(-2)
        entropy = entropy_of_rows(tile)
        self._entropy += entropy.sum(-1)
        most = most_entropy(start + tile.shape[-2], entropy)[start:]
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
