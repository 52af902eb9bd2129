"""What a probe of the loop costs a training, as the share of 100 steps that one call of it takes, in processor time.

    python benchmarks/probe.py

The probe has as many tokens as a batch of the training. Steps and calls take turns, so that both see the same machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

import loopscope
from loopscope.experiments.training.config import TrainConfig
from loopscope.experiments.training.probe import LoopProbe
from loopscope.models.native.transformer import LoopedTransformer

EVERY, ROUNDS = 100, 7
BATCH, TOKENS = 4, 128
CONFIG = Path(loopscope.__file__).parent / "demo" / "configs" / "injected.json"


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    architecture = TrainConfig.load(CONFIG).architecture
    model = LoopedTransformer(architecture).initialize(0)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, architecture.vocab_size, (BATCH, TOKENS))
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
