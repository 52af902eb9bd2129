"""Attention among tokens that stand side by side without padding, and with derivatives by each token's own state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from loopscope._util.shapes import Keys, Queries
from loopscope.models.native.attention import mix_values

Places = Bool[Tensor, "prompt place"]
"""Some of the places of a padded batch; attention sees what stands there side by side, as one row of tokens."""


@dataclass(frozen=True)
class Others:
    """Keys and values of all tokens of a prompt, of whose states some vary."""

    key: Keys
    value: Keys
    allowed: Bool[Tensor, "*batch query key"]
    places: Int64[Tensor, " query"]
    """Of the queries among the keys."""


def mix_with_others_frozen(
    query: Queries, key: Keys, value: Keys, allowed: Tensor | None, others: Others | None = None
) -> Queries:
    """softmax(q k^T / sqrt(d)) v, with derivatives by each token's own state alone.

    Keys and values are cut off from their gradients, and a token's own are put back on the diagonal of the map:
    `scores = q k' + diag(q . (k - k'))`, `output = A v' + diag(A) (v - v')`, where the primes have no gradient. The
    differences are zero, so the value is that of ordinary attention. In a causal model no token before i depends on
    the state of i, and none after it is seen, so that a layer's derivative becomes the diagonal block of its Jacobian,
    and products of layers the diagonal blocks of products.

    Unless `others` says what the queries look at, it is each other.
    """
    tokens = query.shape[2]
    if others is None:
        if allowed is None:
            allowed = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
        others = Others(key.detach(), value.detach(), allowed, torch.arange(tokens, device=query.device))
    groups = query.shape[1] // key.shape[1]
    query = query * query.shape[-1] ** -0.5
    moved_key, moved_value = (
        (each - still.detach()[:, :, others.places]).repeat_interleave(groups, dim=1)
        for each, still in ((key, others.key), (value, others.value))
    )
    still_key, still_value = (each.repeat_interleave(groups, dim=1) for each in (others.key, others.value))
    own = others.places[:, None].expand(*query.shape[:3], 1)
    scores = (query @ still_key.mT).scatter_add(-1, own, (query * moved_key).sum(-1, keepdim=True))
    maps = scores.masked_fill(~others.allowed, float("-inf")).softmax(-1)
    mixed: Tensor = maps @ still_value + maps.gather(-1, own) * moved_value
    return mixed


class AmongAll:
    """Attention among all tokens of some prompts, (1, head, token, head_dim); no work is done for padding."""

    def __init__(self, mask: Places) -> None:
        self._places = [row.nonzero()[:, 0] for row in mask]
        self._counts = [len(places) for places in self._places]

    def __call__(self, query: Queries, key: Keys, value: Keys, allowed: Tensor | None) -> Queries:
        mixed = [
            mix_values(
                each_query,
                each_key,
                each_value,
                self._seen(row, allowed, query.device) if allowed is not None else None,
            )
            for row, (each_query, each_key, each_value) in enumerate(
                zip(*(each.split(self._counts, dim=2) for each in (query, key, value)), strict=True)
            )
            if self._counts[row]
        ]
        return torch.cat(mixed, dim=2)

    def others(self, key: Keys, value: Keys, allowed: Tensor | None, tokens: Places) -> list[Others | None]:
        """What those tokens see in each prompt; None for a prompt that has none of them."""
        found: list[Others | None] = []
        splits = zip(*(each.detach().split(self._counts, dim=2) for each in (key, value)), strict=True)
        for row, (each_key, each_value) in enumerate(splits):
            among = tokens[row, self._places[row]].nonzero()[:, 0].to(key.device)
            seen = self._seen(row, allowed, key.device)[:, :, among]
            # No token sees beyond the last of them.
            end = int(among[-1]) + 1 if len(among) else 0
            found.append(Others(each_key[:, :, :end], each_value[:, :, :end], seen[..., :end], among) if end else None)
        return found

    def _seen(self, row: int, allowed: Tensor | None, device: torch.device) -> Bool[Tensor, "1 1 query key"]:
        places = self._places[row].to(device)
        seen: Tensor = (
            places[:, None] >= places if allowed is None else allowed[row % len(allowed), 0, places][:, places]
        )
        return seen[None, None]


class AfterOthers:
    """Attention of some tokens, one after the other, to those before them in their prompt as they were when they were
    last among these."""

    def __init__(self, mask: Places) -> None:
        self._places = [row.nonzero()[:, 0] for row in mask]
        self._layers: list[dict[int, Tensor]] = []
        """Keys and values, (2, 1, head, token, head_dim), of each prompt that was begun."""
        self.turn = 0
        """The layer that comes next, to be set back after the last one."""

    def begin(self, tokens: Places) -> None:
        """These are the tokens from now on."""
        self._spans: dict[int, slice] = {}
        for row in tokens.any(-1).nonzero()[:, 0].tolist():
            among = tokens[row, self._places[row]].nonzero()[:, 0]
            self._spans[row] = slice(int(among[0]), int(among[-1]) + 1)

    def __call__(self, query: Queries, key: Keys, value: Keys, allowed: Tensor | None) -> Queries:
        if self.turn == len(self._layers):
            self._layers.append({})
        layer, self.turn = self._layers[self.turn], self.turn + 1
        counts, mixed = [span.stop - span.start for span in self._spans.values()], []
        for (row, span), parts in zip(
            self._spans.items(),
            zip(*(each.split(counts, dim=2) for each in (query, key, value)), strict=True),
            strict=True,
        ):
            places = self._places[row].to(key.device)
            if row not in layer:
                layer[row] = key.new_zeros(2, *key.shape[:2], len(places), key.shape[-1])
            for known, now in zip(layer[row], parts[1:], strict=True):
                known[:, :, span] = now
            seen_key, seen_value = (known[:, :, : span.stop] for known in layer[row])
            at, before = places[span], places[: span.stop]
            seen = at[:, None] >= before if allowed is None else allowed[row % len(allowed), 0, at][:, before]
            mixed.append(mix_values(parts[0], seen_key, seen_value, seen[None, None]))
        return torch.cat(mixed, dim=2)


class OthersSeen:
    """Runs beside `AmongAll` once and keeps what every layer's tokens see."""

    def __init__(self, mask: Places, tokens: Places) -> None:
        self._plain, self._tokens = AmongAll(mask), tokens
        self.layers: list[list[Others | None]] = []

    def __call__(self, query: Queries, key: Keys, value: Keys, allowed: Tensor | None) -> Queries:
        self.layers.append(self._plain.others(key, value, allowed, self._tokens))
        return self._plain(query, key, value, allowed)


class OthersFrozen:
    """Attention of some tokens to states that stand still but for each one's own, layer after layer."""

    def __init__(self, layers: list[list[Others | None]], tokens: Places) -> None:
        self._layers, self._counts = layers, tokens.sum(-1).tolist()
        self._turn: Iterator[list[Others | None]] = iter(())

    def __call__(self, query: Queries, key: Keys, value: Keys, allowed: Tensor | None) -> Queries:
        turn = next(self._turn, None)
        if turn is None:  # the first layer again
            self._turn = iter(self._layers)
            turn = next(self._turn)
        parts = zip(*(each.split(self._counts, dim=2) for each in (query, key, value)), turn, strict=True)
        mixed = [mix_with_others_frozen(q, k, v, None, others) for q, k, v, others in parts if others is not None]
        return torch.cat(mixed, dim=2)
