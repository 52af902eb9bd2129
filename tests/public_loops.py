"""Loops as people publish them, each from scratch: what sets them apart is how they call their layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, VOCAB = 16, 2, 12


class Attention(nn.Module):
    """`length` makes it one of boards: a table of positions for exactly so many tokens."""

    def __init__(self, *, causal: bool = False, length: int | None = None) -> None:
        super().__init__()
        self.causal, self.qkv, self.out = causal, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.angles = None if length is None else torch.arange(length)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if self.angles is not None:
            query, key = self.turn(query), self.turn(key)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return out

    def turn(self, x: Tensor) -> Tensor:
        assert self.angles is not None
        first, second = x.chunk(2, -1)
        cos, sin = self.angles.cos(), self.angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


class Block(nn.Module):
    """Post-norm, without weights in the norms."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(**options), mlp()

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = functional.rms_norm(hidden_states + self.attention(hidden_states), (WIDTH,))
        return functional.rms_norm(x + self.mlp(x), (WIDTH,))


class Reasoning(nn.Module):
    """Layers after an input is added."""

    def __init__(self, layers: int, length: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(length=length) for _ in range(layers)])

    def forward(self, hidden_states: Tensor, input_injection: Tensor) -> Tensor:
        hidden_states = hidden_states + input_injection
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


class Boards(nn.Module):
    """What the two models of boards share: a carry of two states, a puzzle's tokens before the fields, and a dictionary
    as input. Only the last cycle has gradients."""

    def __init__(self, *, fields: int, puzzle_tokens: int, h_cycles: int, l_cycles: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            seq_len=fields, puzzle_emb_len=puzzle_tokens, H_cycles=h_cycles, L_cycles=l_cycles, halt_max_steps=16
        )
        self.embed_tokens, self.puzzle_emb = nn.Embedding(VOCAB, WIDTH), nn.Embedding(5, puzzle_tokens * WIDTH)
        self.lm_head, self.q_head = nn.Linear(WIDTH, VOCAB, bias=False), nn.Linear(WIDTH, 2)
        self.H_init, self.L_init = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def initial_carry(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        shape = (len(batch["inputs"]), self.config.puzzle_emb_len + self.config.seq_len, WIDTH)
        return self.H_init.expand(shape), self.L_init.expand(shape)

    def forward(
        self, carry: tuple[Tensor, Tensor], batch: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        puzzle = self.puzzle_emb(batch["puzzle_identifiers"]).unflatten(-1, (-1, WIDTH))
        embedded = torch.cat((puzzle, self.embed_tokens(batch["inputs"])), 1) * WIDTH**0.5
        with torch.no_grad():
            for _ in range(self.config.H_cycles - 1):
                carry = self.cycle(*carry, embedded)
        high, low = self.cycle(*carry, embedded)
        logits = self.lm_head(high)[:, self.config.puzzle_emb_len :]
        halt = self.q_head(high[:, 0])
        return (high.detach(), low.detach()), {"logits": logits, "q_halt_logits": halt[..., 0]}

    def cycle(self, high: Tensor, low: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class TinyRecursive(Boards):
    """One network for both states."""

    def __init__(self, fields: int = 9, puzzle_tokens: int = 2) -> None:
        super().__init__(fields=fields, puzzle_tokens=puzzle_tokens, h_cycles=3, l_cycles=2)
        self.L_level = Reasoning(2, fields + puzzle_tokens)

    def cycle(self, high: Tensor, low: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(self.config.L_cycles):
            low = self.L_level(low, high + embedded)
        return self.L_level(high, low), low


class Hierarchical(Boards):
    """A network for each state."""

    def __init__(self, fields: int = 9, puzzle_tokens: int = 1) -> None:
        super().__init__(fields=fields, puzzle_tokens=puzzle_tokens, h_cycles=2, l_cycles=3)
        self.H_level, self.L_level = (Reasoning(2, fields + puzzle_tokens) for _ in range(2))

    def cycle(self, high: Tensor, low: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(self.config.L_cycles):
            low = self.L_level(low, high + embedded)
        return self.H_level(high, low), low


class Universal(nn.Module):
    """One layer again and again, each time with signals of position and time added."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.num_layers, self.layer = layers, Block(causal=True)
        self.embedding, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.position_signal, self.timing_signal = torch.randn(1, 64, WIDTH), torch.randn(1, layers, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.embedding(inputs)
        for step in range(self.num_layers):
            x = x + self.position_signal[:, : x.shape[1]] + self.timing_signal[:, step]
            x = self.layer(x)
        logits: Tensor = self.head(x)
        return logits


class Residual(nn.Module):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return x + residual


class Decoder(nn.Module):
    """Triples of norm, branch and the module that adds it, so that no module stands for a layer."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        branches = [branch for _ in range(depth) for branch in (Attention(causal=True), mlp())]
        self.layers = nn.ModuleList([nn.ModuleList([nn.LayerNorm(WIDTH), each, Residual()]) for each in branches])

    def forward(self, x: Tensor) -> Tensor:
        for triple in self.layers:
            norm, branch, residual = triple.children()
            x = residual(branch(norm(x)), x)
        return x


class Wrapped(nn.Module):
    """Such a decoder, looped."""

    def __init__(self) -> None:
        super().__init__()
        self.loops, self.token_emb, self.to_logits = 3, nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.attn_layers, self.norm = Decoder(2), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None, return_embeddings: bool = False) -> Tensor:
        x = embedded = self.token_emb(x)
        for _ in range(self.loops):
            x = self.attn_layers(x + embedded)
        x = self.norm(x)
        return x if return_embeddings else self.to_logits(x)


class Recursion(nn.Module):
    """A shared block for the tokens that the step's router chooses; the others keep their states."""

    def __init__(self, steps: int, share: float) -> None:
        super().__init__()
        self.share, self.block = share, Block(causal=True)
        self.routers = nn.ModuleList([nn.Linear(WIDTH, 1) for _ in range(steps)])

    def forward(self, x: Tensor, step: int) -> Tensor:
        weights = self.routers[step](x).sigmoid()
        count = max(1, int(self.share**step * x.shape[1]))
        chosen = weights[..., 0].topk(count, -1).indices.sort(-1).values[..., None].expand(-1, -1, WIDTH)
        selected = x.gather(1, chosen)
        changed = selected + weights.gather(1, chosen[..., :1]) * self.block(selected)
        return x.scatter(1, chosen, changed)


class MixtureOfRecursions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_recursion = 3
        self.embed, self.first, self.last = nn.Embedding(VOCAB, WIDTH), Block(causal=True), Block(causal=True)
        self.recursion, self.lm_head = Recursion(3, 0.7), nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Any:
        x = self.first(self.embed(input_ids))
        for step in range(self.num_recursion):
            x = self.recursion(x, step)
        return SimpleNamespace(logits=self.lm_head(self.last(x)))


class InContext(nn.Module):
    """Regression in context: points and their values take turns, and the loop adds its input at each step."""

    def __init__(self, dims: int = 3) -> None:
        super().__init__()
        self.n_dims, self.read_in, self.read_out = dims, nn.Linear(dims, WIDTH), nn.Linear(WIDTH, 1)
        self.backbone = nn.ModuleList([Block(causal=True) for _ in range(2)])

    def forward(self, xs: Tensor, ys: Tensor, n_loops: int = 5) -> Tensor:
        values = functional.pad(ys[..., None], (0, self.n_dims - 1))
        embeds = self.read_in(torch.stack((xs, values), 2).flatten(1, 2))
        output = torch.zeros_like(embeds)
        for _ in range(n_loops):
            output = output + embeds
            for layer in self.backbone:
                output = layer(output)
        predicted: Tensor = self.read_out(output)
        return predicted
