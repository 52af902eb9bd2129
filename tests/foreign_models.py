"""Looped models that no family knows, in the styles in which people write them."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, VOCAB = 12, 3, 20


class Block(nn.Module):
    """Pre-norm attention and MLP. `eager` computes the softmax itself; `in_place` adds to the residual stream in
    place.
    """

    def __init__(self, *, eager: bool = False, causal: bool = True, in_place: bool = False) -> None:
        super().__init__()
        self.eager, self.causal, self.in_place = eager, causal, in_place
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, allowed: Tensor | None = None) -> Tensor:
        branch = self.dropout(self.attend(self.norm(x), allowed))
        if self.in_place:
            x += branch
            x += self.mlp(x)
            return x
        x = x + branch
        added: Tensor = x + self.mlp(x)
        return added

    def attend(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        if not self.eager:
            mixed = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=allowed, is_causal=self.causal and allowed is None
            )
        else:
            scores = query @ key.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5
            if allowed is not None:
                scores = scores.masked_fill(~allowed, float("-inf"))
            elif self.causal:
                tokens = x.shape[1]
                future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
                scores = scores.masked_fill(future, float("-inf"))
            mixed = functional.softmax(scores, dim=-1) @ value
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return out


class ForeignLoop(nn.Module):
    """Two layers, then two of which `loops` passes are made with the first two's output added each time, then one."""

    def __init__(self, *, seed: int = 0, random_state: bool = False, **options: Any) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(VOCAB, WIDTH)
            self.enter = nn.ModuleList([Block(**options) for _ in range(2)])
            self.cycle = nn.ModuleList([Block(**options) for _ in range(2)])
            self.leave = Block(**options)
            self.norm = nn.LayerNorm(WIDTH)
            self.head = nn.Linear(WIDTH, VOCAB)
        self.settings = {"kind": "foreign"}
        self.loops = 3
        self.random_state = random_state

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        allowed = None
        if attention_mask is not None:
            count = tokens.shape[1]
            causal = torch.ones(count, count, dtype=torch.bool).tril()
            allowed = (causal & attention_mask[:, None, :].bool())[:, None]
        x = self.embedding(tokens)
        for block in self.enter:
            x = block(x, allowed)
        state = torch.randn_like(x) if self.random_state else x
        for _ in range(self.loops):
            state = state + x
            for block in self.cycle:
                state = block(state, allowed)
        return {"logits": self.head(self.norm(self.leave(state, allowed)))}


PATHS: dict[str, Any] = {"prelude": "enter", "recurrent": "cycle", "coda": "leave", "set_recurrences": "loops"}
"""How a `ForeignLoop` is hooked."""


def assert_untouched(model: nn.Module) -> None:
    """No hook is left on the model, and no thread that runs it."""
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not [thread for thread in threading.enumerate() if "hooked" in thread.name]
