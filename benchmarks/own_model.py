"""From a looped model of one's own, in 30 lines of torch, to a report on a text of one's own.

    python benchmarks/own_model.py [FOLDER]

The report lands in FOLDER (out/own-model unless given). The model is untrained: what is shown is the way.
"""

import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import loopscope


class Block(nn.Module):
    """Attention and an MLP, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        normed = self.norms[0](x)
        mixed: Tensor = self.attention(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        x = x + mixed
        written: Tensor = self.mlp(self.norms[1](x))
        return x + written


class Looped(nn.Module):
    """A prelude, a block of two layers that is run `loops` times with the prompt put in each time, and a coda."""

    def __init__(self, vocabulary: int = 256, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.prelude, self.coda = Block(width, heads), Block(width, heads)
        self.blocks = nn.ModuleList([Block(width, heads), Block(width, heads)])
        self.inject, self.norm = nn.Linear(2 * width, width), nn.LayerNorm(width)
        self.loops = 4

    def forward(self, ids: Tensor) -> Tensor:
        prompt = self.prelude(self.embed(ids))
        state = torch.zeros_like(prompt)
        for _ in range(self.loops):
            state = self.inject(torch.cat([state, prompt], dim=-1))
            for block in self.blocks:
                state = block(state)
        logits: Tensor = self.head(self.norm(self.coda(state)))
        return logits


def main(folder: Path) -> None:
    torch.manual_seed(0)
    text = "Ann has 3 apples and buys 4 more. How many has she?"
    study = loopscope.analyze(Looped(), [list(text.encode())], recurrences=16, horizon=32, out=folder)
    print(f"report  {loopscope.write_report(study, folder / 'report.html')}")
    print(f"{time.process_time():.1f} s of processor time, imports included")


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "out/own-model"))
