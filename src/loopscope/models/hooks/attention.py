"""Seeing attention from outside: the calls that compute it, as they pass by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from loopscope._util.shapes import TokenMask
from loopscope.models.visits import AttentionView, MapAttention, QueryKeyAttention

_WATCHED = frozenset(
    {
        functional.scaled_dot_product_attention,
        functional.multi_head_attention_forward,
        functional.softmax,
        torch.softmax,
        Tensor.softmax,
    }
)


class AttentionWatch(TorchFunctionMode):
    """In force while a layer runs: keeps what its attention was computed from.

    `scaled_dot_product_attention` and `nn.MultiheadAttention` are told by name; a softmax over (batch, head, query,
    key) with as many queries and keys as there are tokens is one's own attention. What a compiled kernel does inside is
    not seen.
    """

    def __init__(
        self,
        batch: int,
        tokens: int,
        mask: TokenMask | None,
        *,
        copies: bool = False,
        home: torch.device | None = None,
        shown: int | None = None,
    ) -> None:
        """`copies` for a model that overwrites what its attention was computed from, such as a buffer of keys; `home`
        is where what is kept of layers on several devices goes. `shown` is which of several computations of one layer
        is collected."""
        super().__init__()
        self._shape = (batch, tokens)
        self._mask = mask
        self._copies = copies
        self._home = home
        self._shown = shown
        self._calls: list[AttentionView | None] = []
        self._sinks: list[Tensor | None] = []
        self._masks: tuple[Tensor, int, Tensor] | None = None

    def collect(self) -> tuple[AttentionView | None, Tensor | None, int]:
        """The attention of the layer that ran, None unless exactly one call was understood, or one of several is to be
        shown; what went to a column beside the tokens, (batch, head, query), likewise; and how many calls."""
        calls, self._calls = self._calls, []
        sinks, self._sinks = self._sinks, []
        shown = 0 if len(calls) == 1 else self._shown
        return (
            (calls[shown] if shown is not None and -len(calls) <= shown < len(calls) else None),
            (sinks[0] if len(calls) == len(sinks) == 1 else None),
            len(calls),
        )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # Every operation of the layer comes by, so the others must be let through at once.
        if func in _WATCHED:
            self._record(func, result, args, kwargs)
        return result

    def _record(self, func: Callable[..., Any], result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if func is functional.scaled_dot_product_attention:
            self._calls.append(self._scaled_dot_product(*args, **kwargs))
        elif func is functional.multi_head_attention_forward:
            self._calls.append(self._multi_head(func, args, kwargs))
        elif (beside := self._columns_beside(result, *args[1:2], **kwargs)) == 0:
            self._calls.append(MapAttention(self._kept(result), self._mask))
        elif beside == 1:
            self._calls.append(None)
            sink = _sink(result.detach())
            self._sinks.append(None if sink is None else sink.to(self._home))

    def _multi_head(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AttentionView | None:
        """`nn.MultiheadAttention` computes in here, out of sight, but hands out the maps when it is asked to."""
        _, maps = func(*args, **(kwargs | {"need_weights": True, "average_attn_weights": False}))
        return MapAttention(maps.detach().to(self._home), self._mask) if self._columns_beside(maps, -1) == 0 else None

    def _columns_beside(self, result: Tensor, dim: int | None = None, **others: Any) -> int | None:
        """How many columns more than tokens there are in a softmax over (batch, head, query, key); None for another."""
        batch, tokens = self._shape
        over_keys = result.ndim == 4 and dim in (-1, 3)
        return result.shape[3] - tokens if over_keys and result.shape[::2] == (batch, tokens) else None

    def _scaled_dot_product(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> AttentionView | None:
        """None for a call that is not of (batch, head, token, head_dim), or looks at other keys than the tokens."""
        if query.ndim != 4 or key.ndim != 4:
            return None
        batch, tokens = self._shape
        if tokens == 1 and key.shape[2] == 1 and query.shape[2] > 1:
            # One token: query heads that share a key head may stand in the place of queries.
            query = query.flatten(1, 2).unsqueeze(2)
            attn_mask = None
        if query.shape[0] != batch or query.shape[2] != tokens or key.shape[2] != tokens:
            return None
        return QueryKeyAttention(
            self._kept(query),
            self._kept(key),
            query.shape[-1] ** -0.5 if scale is None else scale,
            self._mask,
            causal=is_causal,
            added=None if attn_mask is None else self._added(attn_mask),
            value=self._kept(value) if value.ndim == 4 and value.shape[:3] == key.shape[:3] else None,
        )

    def _kept(self, tensor: Tensor) -> Tensor:
        kept = tensor.detach().to(self._home)
        return kept.clone() if self._copies and kept.device == tensor.device else kept

    def _added(self, mask: Tensor) -> Tensor:
        """A mask as what is added to the scores. The layers of a model share it, so the last one made is kept."""
        if mask.dtype != torch.bool:
            return self._kept(mask)[(None,) * (4 - mask.ndim)]
        # Torch counts the changes of a tensor, but not of one that was made in inference mode.
        version = -1 if mask.is_inference() else mask._version
        if self._masks is None or self._masks[0] is not mask or self._masks[1] != version or version < 0:
            added = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf")).to(self._home)
            self._masks = (mask, version, added[(None,) * (4 - mask.ndim)])
        return self._masks[2]


def _sink(maps: Tensor) -> Tensor | None:
    """The column that is no token of causal maps with one more, (batch, head, query); None where it cannot be told.

    The first token looks at itself and at that column: where it stands at the end, the first row has nothing in
    between, and where it stands in front, nothing behind the second.
    """
    first = maps[:, :, 0]
    if first.shape[-1] < 3:
        return None
    at_end, in_front = bool((first[..., 1:-1] == 0).all()), bool((first[..., 2:] == 0).all())
    if at_end == in_front:
        return None
    return maps[..., -1 if at_end else 0].clone()
