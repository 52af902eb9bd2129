"""What `HeadMeasures` adds up of the maps of several recurrences, by kernels of Triton's: no more than a block of a map
is ever there, in a GPU's registers.

Each program has a block of rows of one head and goes through the keys that these may see. Nobody else writes what it
writes, so that nothing depends on the order in which programs run. Importing this needs Triton.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from loopscope.models.visits import QueryKeyAttention

_BLOCK = 64
"""Rows, and keys, of a block."""
_AT_ONCE = 6
"""Maps that a program goes through, beside the one before them and that at the horizon."""
_BITS = 1.4426950408889634
"""In a nat: powers of 2 are what a GPU computes."""

_jit: Callable[[Callable[..., Any]], Any] = triton.jit


@dataclass(frozen=True, slots=True, eq=False)
class MapStatistics:
    """Of the maps of some recurrences, in float64; 0 in rows and columns of padding."""

    columns: Float[Tensor, "map batch head key"]
    """Sums of the columns."""
    entropy: Float[Tensor, "map batch head query"]
    """Of the rows, nats."""
    change: Float[Tensor, "map batch head query"]
    """Squared Euclidean distance of each row to that of the map before; NaN where there is none."""
    away: Float[Tensor, "map batch head query"]
    """The same to the map at the horizon."""


def map_statistics(
    views: Sequence[QueryKeyAttention], before: QueryKeyAttention | None, horizon: QueryKeyAttention | None
) -> MapStatistics:
    """Of the maps of consecutive recurrences of one layer, as that of the recurrence `before` them and that at the
    `horizon` say how they change. All of one shape, causal and with nothing added to the scores."""
    parts = [
        _of_some(views[first : first + _AT_ONCE], views[first - 1] if first else before, horizon)
        for first in range(0, len(views), _AT_ONCE)
    ]
    columns, entropy, change, away = (torch.cat(each) for each in zip(*parts, strict=True))
    if before is None:
        change[0] = torch.nan
    if horizon is None:
        away.fill_(torch.nan)
    return MapStatistics(columns, entropy, change, away)


def _of_some(
    views: Sequence[QueryKeyAttention], before: QueryKeyAttention | None, horizon: QueryKeyAttention | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    references = [view for view in (horizon, before) if view is not None]
    query, key = (
        torch.stack([getattr(view, name) for view in (*references, *views)]).contiguous() for name in ("query", "key")
    )
    maps, prompts, heads, tokens, width = query.shape
    mask, window, device = views[0].mask, views[0].window, query.device
    blocks = triton.cdiv(tokens, _BLOCK)
    normalizer = torch.empty(query.shape[:-1], dtype=torch.float32, device=device)
    rows = torch.empty(3, len(views), prompts, heads, tokens, dtype=torch.float32, device=device)
    # Blocks that see no key of a column leave it at 0.
    columns = torch.zeros(len(views), prompts, heads, blocks, tokens, dtype=torch.float32, device=device)
    shared = {
        "query": query,
        "key": key,
        "tokens_of": torch.ones(1, dtype=torch.int8, device=device) if mask is None else mask.to(torch.int8),
        "normalizer": normalizer,
        "scale": views[0].scale * _BITS,
        "prompts": prompts,
        "heads": heads,
        "key_heads": key.shape[2],
        "tokens": tokens,
        "width": width,
        "window": window or 0,
        "block": _BLOCK,
        "lanes": max(16, triton.next_power_of_2(width)),
        "padded": mask is not None,
        # Triton's interpreter, which runs on a CPU, has no product of bfloat16.
        "widened": not query.is_cuda,
        "num_warps": 8,
        "num_stages": 1,
    }
    with torch.cuda.device(device) if query.is_cuda else contextlib.nullcontext():
        _normalize[(blocks * prompts * heads, maps)](**shared)
        _reduce[(blocks * prompts * heads,)](
            **shared,
            columns=columns,
            rows_out=rows,
            references=len(references),
            maps=maps,
            compared=horizon is not None,
            most=triton.next_power_of_2(maps),
        )
    return columns.sum(-2, dtype=torch.float64), *rows.double()


@_jit
def _scores(
    query: tl.tensor,
    key: tl.tensor,
    tokens_of: tl.tensor,
    head: tl.tensor,
    rows: tl.tensor,
    keys: tl.tensor,
    scale: tl.tensor,
    heads: tl.tensor,
    key_heads: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    prompt: tl.tensor,
    window: tl.constexpr,
    lanes: tl.constexpr,
    padded: tl.constexpr,
    widened: tl.constexpr,
) -> Any:
    """Scores of a block in bits, and which of its entries count; `head` counts those of all maps and prompts."""
    lane = tl.arange(0, lanes)
    key_head = head // heads * key_heads + head % heads // (heads // key_heads)
    at_rows = query + head.to(tl.int64) * tokens * width + rows[:, None] * width + lane[None, :]
    at_keys = key + key_head.to(tl.int64) * tokens * width + keys[:, None] * width + lane[None, :]
    one = tl.load(at_rows, mask=(rows[:, None] < tokens) & (lane[None, :] < width), other=0.0)
    other = tl.load(at_keys, mask=(keys[:, None] < tokens) & (lane[None, :] < width), other=0.0)
    if widened:
        one, other = one.to(tl.float32), other.to(tl.float32)
    scores = tl.dot(one, tl.trans(other), input_precision="ieee") * scale
    counts = (keys[None, :] <= rows[:, None]) & (rows[:, None] < tokens)
    if window > 0:
        counts = counts & (keys[None, :] > rows[:, None] - window)
    if padded:
        are_rows = tl.load(tokens_of + prompt * tokens + rows, mask=rows < tokens, other=0) != 0
        are_keys = tl.load(tokens_of + prompt * tokens + keys, mask=keys < tokens, other=0) != 0
        counts = counts & are_rows[:, None] & are_keys[None, :]
    return scores, counts


@_jit
def _span(place: tl.tensor, tokens: tl.tensor, window: tl.constexpr, block: tl.constexpr) -> Any:
    """Where the blocks of keys begin and end that a block of rows may see."""
    begin = 0
    if window > 0:
        begin = tl.maximum(0, place * block - window + 1) // block * block
    return begin, tl.minimum((place + 1) * block, tokens)


@_jit
def _normalize(
    query: tl.tensor,
    key: tl.tensor,
    tokens_of: tl.tensor,
    normalizer: tl.tensor,
    scale: tl.tensor,
    prompts: tl.tensor,
    heads: tl.tensor,
    key_heads: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    window: tl.constexpr,
    block: tl.constexpr,
    lanes: tl.constexpr,
    padded: tl.constexpr,
    widened: tl.constexpr,
) -> None:
    """Of each row of each map, the logarithm in bits of the sum of the powers of its scores; 0 where nothing counts."""
    place, one = tl.program_id(0) // (prompts * heads), tl.program_id(0) % (prompts * heads)
    head = tl.program_id(1) * prompts * heads + one
    rows = place * block + tl.arange(0, block)
    largest = tl.full((block,), float("-inf"), tl.float32)
    total = tl.zeros((block,), tl.float32)
    begin, end = _span(place, tokens, window, block)
    for first in range(begin, end, block):
        keys = first + tl.arange(0, block)
        scores, counts = _scores(
            query,
            key,
            tokens_of,
            head,
            rows,
            keys,
            scale,
            heads,
            key_heads,
            tokens,
            width,
            one // heads,
            window,
            lanes,
            padded,
            widened,
        )
        scores = tl.where(counts, scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        # Where nothing has counted yet, from 0: minus infinity less itself is nothing.
        base = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp2(largest - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
        largest = now
    empty = largest == float("-inf")
    found = tl.where(empty, 0.0, largest + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(normalizer + head.to(tl.int64) * tokens + rows, found, mask=rows < tokens)


@_jit
def _reduce(
    query: tl.tensor,
    key: tl.tensor,
    tokens_of: tl.tensor,
    normalizer: tl.tensor,
    columns: tl.tensor,
    rows_out: tl.tensor,
    scale: tl.tensor,
    prompts: tl.tensor,
    heads: tl.tensor,
    key_heads: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    references: tl.tensor,
    maps: tl.tensor,
    window: tl.constexpr,
    block: tl.constexpr,
    lanes: tl.constexpr,
    most: tl.constexpr,
    padded: tl.constexpr,
    compared: tl.constexpr,
    widened: tl.constexpr,
) -> None:
    """Column sums by block of rows, (map, batch, head, block, key), and by row the entropy and both squared distances,
    (3, map, batch, head, query). Of all maps, the first `references` are only compared with; where `compared`, the very
    first is that at the horizon."""
    every = prompts * heads
    blocks = tl.num_programs(0) // every
    place, one = tl.program_id(0) // every, tl.program_id(0) % every
    rows = place * block + tl.arange(0, block)
    index = tl.arange(0, most)
    entropy = tl.zeros((most, block), tl.float32)
    change = tl.zeros((most, block), tl.float32)
    away = tl.zeros((most, block), tl.float32)
    begin, end = _span(place, tokens, window, block)
    for first in range(begin, end, block):
        keys = first + tl.arange(0, block)
        last = tl.zeros((block, block), tl.float32)
        fixed = tl.zeros((block, block), tl.float32)
        for each in range(0, maps):
            head = each * every + one
            scores, counts = _scores(
                query,
                key,
                tokens_of,
                head,
                rows,
                keys,
                scale,
                heads,
                key_heads,
                tokens,
                width,
                one // heads,
                window,
                lanes,
                padded,
                widened,
            )
            at_rows = normalizer + head.to(tl.int64) * tokens + rows
            bits = scores - tl.load(at_rows, mask=rows < tokens, other=0.0)[:, None]
            bits = tl.where(counts, bits, 0.0)
            shares = tl.where(counts, tl.exp2(bits), 0.0)
            here = index[:, None] == each
            entropy = tl.where(here, entropy - tl.sum(shares * bits, 1)[None, :], entropy)
            moved = shares - last
            change = tl.where(here, change + tl.sum(moved * moved, 1)[None, :], change)
            if compared:
                fixed = tl.where(each == 0, shares, fixed)
                moved = shares - fixed
                away = tl.where(here, away + tl.sum(moved * moved, 1)[None, :], away)
            if each >= references:
                at = ((each - references) * every + one).to(tl.int64) * blocks + place
                tl.store(columns + at * tokens + keys, tl.sum(shares, 0), mask=keys < tokens)
            last = shares
    kept = ((index >= references) & (index < maps))[:, None] & (rows < tokens)[None, :]
    at = rows_out + ((index - references)[:, None] * every + one).to(tl.int64) * tokens + rows[None, :]
    size = ((maps - references) * every).to(tl.int64) * tokens
    tl.store(at, entropy * 0.6931471805599453, mask=kept)
    tl.store(at + size, change, mask=kept)
    tl.store(at + 2 * size, away, mask=kept)
