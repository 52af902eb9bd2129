"""What the measures of attention heads and of stages cost, in time and in peak memory.

    python benchmarks/heads_and_stages.py            ratios of time, then memory
    python benchmarks/heads_and_stages.py time
    python benchmarks/heads_and_stages.py memory

Two models: `demo:injected` on eight prompts as long as GSM8K questions, and a random one of width 1024 with 16 heads on
one prompt of 512 tokens. Two ratios for each, best of several rounds in one process, with the sides taking turns:

- an analysis of convergence, heads and stages over all forward passes that it needs, to 2H and to R once more;
- the measured pass alone, watched by the measures of heads and stages, over the same pass watched by nobody.

The second is the sharper question: the passes to the horizon, which only the first counts, are hardly watched.

Memory is the peak resident size (VmHWM) of a fresh process that analyses one prompt of the wide model, and that gives
large tensors back to the system as soon as they are freed. Else the C library keeps some of them, by chance up to a
hundred MiB, which says nothing about what an analysis needs.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from support.own_process import GIVE_MEMORY_BACK, KEEP_MEMORY, in_a_process, memory

from loopscope import analyze, load
from loopscope.analysis.plan import choose
from loopscope.analysis.settings import AnalyzeSettings, Part
from loopscope.measures.base import BatchInfo, Measure
from loopscope.measures.heads import HeadMeasures
from loopscope.measures.horizon import Horizons
from loopscope.measures.similarity import AttentionCycle
from loopscope.measures.stages import StageMeasures
from loopscope.models.architecture import Architecture
from loopscope.models.native.subject import NativeSubject
from loopscope.models.native.transformer import LoopedTransformer
from loopscope.models.subject import Batch, Subject
from loopscope.models.visits import Observer

ROUNDS = 5
MOST = 1.6
"""What an analysis may cost over its bare forward passes."""
NOT_ASKED: tuple[Part, ...] = ("path-independence", "trajectories", "readout", "noise-floor")
"""Parts that are neither heads nor stages and do work of their own."""

WIDE = Architecture(
    vocab_size=1024,
    width=1024,
    heads=16,
    kv_heads=16,
    head_dim=64,
    mlp_width=2816,
    prelude=1,
    recurrent=2,
    coda=1,
    recurrences=8,
    injection="linear",
    state_init="normal",
)


@dataclass(frozen=True)
class Case:
    """A model, the lengths of its prompts, and how far they are run."""

    load: Callable[[], Subject]
    lengths: tuple[int, ...]
    recurrences: int
    horizon: int

    def prompts(self) -> list[list[int]]:
        generator = np.random.default_rng(0)
        return [generator.integers(0, WIDE.vocab_size, size=length).tolist() for length in self.lengths]


def wide() -> Subject:
    return NativeSubject(LoopedTransformer(WIDE).initialize(0).eval().requires_grad_(False), name="wide")


CASES = {
    "demo:injected": Case(
        functools.partial(load, "demo:injected", device="cpu"),
        tuple(np.random.default_rng(0).integers(50, 150, size=8).tolist()),
        recurrences=64,
        horizon=128,
    ),
    "width 1024": Case(wide, (512,), recurrences=8, horizon=16),
}


def forward(model: Subject, batch: Batch, recurrences: int, observers: list[Observer]) -> None:
    run = model.start(batch, recurrences=recurrences, observers=observers)
    for _ in range(recurrences):
        run.advance(observers)
    run.decode(observers)


def time_ratios(case: Case) -> tuple[float, float]:
    """Of the whole analysis, and of the measured pass alone."""
    model, prompts, recurrences = case.load(), case.prompts(), case.recurrences
    batch = Batch.of(prompts)
    settings = AnalyzeSettings(
        recurrences=recurrences, horizon=case.horizon, horizon_method="second-pass", skip=NOT_ASKED
    )
    lengths = batch.counts.tolist()
    info = BatchInfo.of(model, batch, choose(model, lengths, settings, print))
    to_horizon = BatchInfo.of(model, batch, choose(model, lengths, replace(settings, horizon=recurrences), print))
    info.horizon = horizon = Horizons(to_horizon)
    forward(model, batch, recurrences, [horizon])

    def watched() -> None:
        measures: list[Measure] = [HeadMeasures(info), AttentionCycle(info), StageMeasures(info)]
        forward(model, batch, recurrences, [*measures])
        for measure in measures:
            measure.result()

    def to_the_horizon_and_again() -> None:
        forward(model, batch, 2 * case.horizon, [])
        forward(model, batch, recurrences, [])

    sides: dict[str, Callable[[], object]] = {
        "analysis": lambda: analyze(model, prompts, settings=settings),
        "its passes": to_the_horizon_and_again,
        "watched": watched,
        "bare": lambda: forward(model, batch, recurrences, []),
    }
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(ROUNDS):
        for name, side in sides.items():
            started = time.process_time()
            side()
            best[name] = min(best[name], time.process_time() - started)
    return best["analysis"] / best["its passes"], best["watched"] / best["bare"]


def analyse_once(tokens: int, recurrences: int) -> float:
    """Peak memory of this process, in MiB."""
    prompt = np.random.default_rng(0).integers(0, WIDE.vocab_size, size=tokens).tolist()
    with tempfile.TemporaryDirectory() as folder:
        analyze(wide(), [prompt], out=folder, recurrences=recurrences, horizon=8, skip=NOT_ASKED)
    return memory("VmHWM")


def peak(tokens: int, recurrences: int) -> float:
    return in_a_process(__file__, "analyse-once", str(tokens), str(recurrences), **GIVE_MEMORY_BACK)[0]


def main(what: str) -> None:
    if what in ("all", "time"):
        for name in CASES:
            whole, alone = in_a_process(__file__, "time-ratios", name, **KEEP_MEMORY)
            print(f"time, {name}: analysis / its bare passes {whole:.2f} (at most {MOST})", flush=True)
            print(f"time, {name}: measured pass / bare pass {alone:.2f}", flush=True)
    if what in ("all", "memory"):
        small, large = peak(128, 32), peak(128, 256)
        print(f"memory, T = 128: peak {small:.0f} MiB at R = 32, {large:.0f} MiB at R = 256: {large / small:.3f}")
        lengths = (256, 512, 1024, 2048)
        peaks = [peak(tokens, 8) for tokens in lengths]
        slope, start = np.polyfit(lengths, peaks, 1)
        off = np.abs(np.polyval([slope, start], lengths) - peaks).max()
        shown = ", ".join(f"{size:.0f} MiB at T = {tokens}" for tokens, size in zip(lengths, peaks, strict=True))
        print(f"memory, R = 8: peak {shown}: {start:.0f} MiB + {slope * 1024:.0f} KiB a token, within {off:.0f} MiB")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["analyse-once"]:
        print(analyse_once(int(sys.argv[2]), int(sys.argv[3])))
    elif sys.argv[1:2] == ["time-ratios"]:
        print(*time_ratios(CASES[sys.argv[2]]))
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else "all")
