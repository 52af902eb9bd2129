"""What a probe of the loop costs a training, as the share of 100 steps that one call of it takes, in processor time.

    python benchmarks/probe.py

The probe has as many tokens as a batch of the training. Steps and calls take turns, so that both see the same machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from loopscope.experiments.training.probe import LoopProbe
from loopscope.models.architecture import Architecture
from loopscope.models.native.transformer import LoopedTransformer

EVERY, ROUNDS = 100, 7
BATCH, TOKENS = 4, 128
SMALL = Architecture(
    vocab_size=1024,
    width=96,
    heads=6,
    kv_heads=6,
    head_dim=16,
    mlp_width=256,
    prelude=2,
    recurrent=4,
    coda=2,
    recurrences=8,
    injection="linear",
    state_init="normal",
    tied_embeddings=True,
)
"""That of `demo:injected`."""


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LoopedTransformer(SMALL).initialize(0)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, SMALL.vocab_size, (BATCH, TOKENS))
    probe = LoopProbe(model, ids)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()

    step()
    probe()
    pairs = [(seconds(probe), seconds(step)) for _ in range(ROUNDS)]
    share = statistics.median(call / one for call, one in pairs) / EVERY
    print(f"a call takes {share * EVERY:.2f} steps; every {EVERY} steps: {share:.2%} of the training")


if __name__ == "__main__":
    main()
