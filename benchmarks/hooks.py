"""What hooks cost over the bare forward pass of the same model, in time and in memory.

    python benchmarks/hooks.py

Times are ratios within one process, best of several rounds, with the sides taking turns: the module's own forward
pass; a hooked run that nobody watches; and one watched by an observer that does nothing, which hands over every state
and every query and key. The process keeps the memory it has once got, since the C library treats that of the main
thread otherwise than that of the thread in which a hooked model runs.

Memory is the largest number of states that are alive at once during a run, by the number of recurrences.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import weakref
from collections.abc import Callable

import torch
from support.own_process import KEEP_MEMORY

from loopscope import Observer, Visit, hook, load
from loopscope.models.hooks.hooked import HookedSubject
from loopscope.models.native.subject import NativeSubject
from loopscope.models.native.transformer import LoopedTransformer
from loopscope.models.subject import Batch

ROUNDS = 9
RECURRENCES = 8


def small() -> LoopedTransformer:
    """The shipped model: the smallest layers, so the largest share of what is not arithmetic."""
    subject = load("demo:injected", device="cpu")
    assert isinstance(subject, NativeSubject)
    return subject.model


def wide() -> LoopedTransformer:
    """The same in the width of a small published model."""
    architecture = dataclasses.replace(
        small().architecture, width=768, heads=12, kv_heads=12, head_dim=64, mlp_width=2048
    )
    return LoopedTransformer(architecture).initialize(0).eval().requires_grad_(False)


def hooked(model: LoopedTransformer) -> HookedSubject:
    return hook(
        model,
        prelude="prelude",
        recurrent="recurrent",
        coda="coda",
        set_recurrences=lambda _, recurrences: {"recurrences": recurrences},
    )


def run(subject: HookedSubject, batch: Batch, recurrences: int, observers: list[Observer]) -> None:
    one = subject.start(batch, recurrences=recurrences, observers=observers)
    for _ in range(recurrences):
        one.advance(observers)
    one.decode(observers)
    one.close()


def time_ratios(model: LoopedTransformer, batch: Batch) -> tuple[float, float]:
    """Unwatched and watched, over bare."""
    subject = hooked(model)
    sides: dict[str, Callable[[], object]] = {
        "bare": lambda: subject.bare_logits(batch, recurrences=RECURRENCES),
        "unwatched": lambda: run(subject, batch, RECURRENCES, []),
        "watched": lambda: run(subject, batch, RECURRENCES, [Observer()]),
    }
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(ROUNDS):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            best[name] = min(best[name], time.perf_counter() - started)
    return best["unwatched"] / best["bare"], best["watched"] / best["bare"]


class _Alive(Observer):
    """Counts the states that were announced and still exist."""

    def __init__(self) -> None:
        self.largest = 0
        self._states: list[weakref.ref[torch.Tensor]] = []

    def visit(self, visit: Visit) -> None:
        self._states = [state for state in self._states if state() is not None]
        self._states.append(weakref.ref(visit.residual))
        self.largest = max(self.largest, len(self._states))


def states_alive(model: LoopedTransformer, batch: Batch, recurrences: int) -> int:
    observer = _Alive()
    run(hooked(model), batch, recurrences, [observer])
    return observer.largest


def main() -> None:
    torch.set_num_threads(1)
    tokens = torch.arange(2 * 64).reshape(2, 64) % 1000
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool))
    for name, make in (("demo:injected", small), ("width 768", wide)):
        unwatched, watched = time_ratios(make(), batch)
        print(f"{name}, R = {RECURRENCES}, 2 x 64 tokens: {unwatched:.2f} unwatched, {watched:.2f} watched, bare is 1")
    for recurrences in (4, 64):
        print(f"states alive at once, R = {recurrences}: {states_alive(small(), batch, recurrences)}")


if __name__ == "__main__":
    if not KEEP_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})  # read at the start
    main()
