"""What an analysis costs over the bare forward passes that it needs, in time and in peak memory.

    python benchmarks/analysis.py            time and memory
    python benchmarks/analysis.py time       parts, over the bare forward passes that they need
    python benchmarks/analysis.py whole questions.jsonl    whole analyses of eight of these (GSM8K's, in README), over
                                                           a bare run to the second horizon
    python benchmarks/analysis.py memory

Times are ratios within one process best of several rounds, with the two sides taking turns.
That process keeps the memory it has once got: otherwise the C library gives tensors back to the system as soon as they
are freed, which costs the side that keeps no states hundreds of thousands of page faults and the other side none.
Memory is the peak resident size of a fresh process that analyses once, at R = 32 and at R = 256, and that gives large
tensors back as soon as they are freed: what the C library keeps of them varies by chance.
"""

from __future__ import annotations

import functools
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from typing import get_args

import numpy as np
import torch
from support.own_process import GIVE_MEMORY_BACK, KEEP_MEMORY, in_a_process

from loopscope import analyze, load
from loopscope.analysis.settings import AnalyzeSettings, HorizonMethod, Part, Preset
from loopscope.models.architecture import Architecture
from loopscope.models.native.subject import NativeSubject
from loopscope.models.native.transformer import LoopedTransformer
from loopscope.models.subject import Batch, Subject
from loopscope.prompts.load import load_prompts

ROUNDS, WHOLE_ROUNDS = 5, 2
WIDE = Architecture(
    vocab_size=1024,
    width=1024,
    heads=16,
    kv_heads=16,
    head_dim=64,
    mlp_width=2816,
    prelude=2,
    recurrent=4,
    coda=2,
    recurrences=8,
    injection="linear",
    state_init="normal",
)
METHODS: tuple[HorizonMethod, ...] = ("second-pass", "keep")
_EXPENSIVE: tuple[Part, ...] = ("behaviour", "stability", "maps", "neurons")
SECTIONS: dict[str, tuple[tuple[Part, ...], float]] = {
    "convergence": (("readout", "heads", "stages", *_EXPENSIVE), 1.3),
    "with heads and stages": (("readout", *_EXPENSIVE), 1.6),
    "with readouts and exit rules too": (_EXPENSIVE, 1.7),
}
"""What is left out of an analysis, and the ratio that it may cost. The readout's decoding is work of its own, a coda
and a head for each state that is read out."""


WHOLE: dict[str, tuple[float, float]] = {"demo:injected": (3.2, 2.7), "demo:uninjected": (3.5, 3.5), "wide": (3.0, 2.4)}
"""Models, and what a whole analysis of eight questions may cost over a run to the second horizon, with and without
eigenvalues. `wide` is a random model, (2, 4 ⊗ 8, 2) of width 1024, on two prompts of 128 tokens."""
PRESETS = ("standard", "standard without eigenvalues", "quick", "full", "standard, ended at rest")


def prompts(count: int) -> list[list[int]]:
    """As long as GSM8K questions are in the demo models' tokens."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 1024, size=length).tolist() for length in generator.integers(50, 150, size=count)]


def bare(model: Subject, batch: Batch, settings: AnalyzeSettings, keep: bool) -> None:
    """The forward passes of one batch and nothing else: to 2H, the twin's from H on, to R once more unless states are
    kept, and the other path.
    """
    again = [] if keep else [settings.recurrences]
    for length in (2 * settings.horizon, settings.horizon, settings.recurrences, *again):
        bare_run(model, batch, length)


def bare_run(model: Subject, batch: Batch, recurrences: int) -> None:
    run = model.start(batch, recurrences=recurrences)
    for _ in range(recurrences):
        run.advance()
    run.decode()


def whole_ratios(name: str, questions: str) -> list[float]:
    """Analyses by the `PRESETS`, over a bare run to the second horizon."""
    if name == "wide":
        model: Subject = NativeSubject(LoopedTransformer(WIDE).initialize(0).eval().requires_grad_(False))
        texts = np.random.default_rng(0).integers(0, WIDE.vocab_size, size=(2, 128)).tolist()
        recurrences, horizon = 16, 32
    else:
        model, recurrences, horizon = load(name, device="cpu"), 32, 64
        assert model.tokenizer is not None
        problems = load_prompts(prompts=questions, field="question", limit=8)
        texts = [model.tokenizer.encode(problem.text or "").ids for problem in problems]
    batch = Batch.of(texts)
    quick, standard, full = (
        AnalyzeSettings.preset(preset, recurrences=recurrences, horizon=horizon) for preset in get_args(Preset)
    )
    chosen = (standard, replace(standard, skip=("stability",)), quick, full, replace(standard, stop_at_rest=16))
    jobs: list[Callable[[], object]] = [
        lambda: bare_run(model, batch, 2 * horizon),
        *(functools.partial(analyze, model, texts, settings=settings) for settings in chosen),
    ]
    best = [float("inf")] * len(jobs)
    for _ in range(WHOLE_ROUNDS):
        for place, job in enumerate(jobs):
            start = time.process_time()
            job()
            best[place] = min(best[place], time.process_time() - start)
    return [each / best[0] for each in best[1:]]


def time_ratio(method: HorizonMethod, skip: tuple[Part, ...]) -> float:
    model, texts = load("demo:injected", device="cpu"), prompts(8)
    settings = AnalyzeSettings(recurrences=64, horizon=128, horizon_method=method, skip=skip)
    batch = Batch.of(texts)
    best = {"bare": float("inf"), "analysis": float("inf")}
    for _ in range(ROUNDS):
        for name in best:
            start = time.process_time()
            if name == "bare":
                bare(model, batch, settings, keep=method == "keep")
            else:
                analyze(model, texts, settings=settings)
            best[name] = min(best[name], time.process_time() - start)
    return best["analysis"] / best["bare"]


def analyse_once(recurrences: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        analyze("demo:injected", prompts(32), out=folder, device="cpu", recurrences=recurrences, horizon=128)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main(what: str, questions: str | None) -> None:
    if what in ("all", "time"):
        for section, (_, most) in SECTIONS.items():
            for method in METHODS:
                (ratio,) = in_a_process(__file__, "time-ratio", section, method, **KEEP_MEMORY)
                print(f"time: {section} / bare forward passes, {method}: {ratio:.2f} (at most {most})", flush=True)
    if questions is not None:
        for name, (most, without) in WHOLE.items():
            ratios = in_a_process(__file__, "whole-ratios", name, questions, **KEEP_MEMORY)
            for preset, ratio, bound in zip_longest(PRESETS, ratios, (most, without)):
                limit = "" if bound is None else f" (at most {bound})"
                print(f"{preset} / a run to 2H, {name}: {ratio:.2f}{limit}", flush=True)
    if what in ("all", "memory"):
        (small,), (large,) = (
            in_a_process(__file__, "analyse-once", count, **GIVE_MEMORY_BACK) for count in ("32", "256")
        )
        print(f"memory: peak {small:.0f} MiB at R = 32, {large:.0f} MiB at R = 256: {large / small:.3f} (at most 1.05)")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["analyse-once"]:
        analyse_once(int(sys.argv[2]))
    elif sys.argv[1:2] == ["time-ratio"]:
        print(time_ratio(METHODS[METHODS.index(sys.argv[3])], SECTIONS[sys.argv[2]][0]))
    elif sys.argv[1:2] == ["whole-ratios"]:
        print(*whole_ratios(sys.argv[2], sys.argv[3]))
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else "all", sys.argv[2] if len(sys.argv) > 2 else None)
