"""The order in which a forward pass calls its layers, and the loop that shows in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

_SHOWN, _LENGTH = 40, 300
"""Calls of an order that a message names, and characters that they take."""


@dataclass(frozen=True, slots=True)
class Repeats:
    """`order[:start]`, then `order[start : start + length]`, `times` times, then the rest."""

    start: int
    length: int
    times: int

    @property
    def stop(self) -> int:
        return self.start + self.length * self.times


def find_repeats(order: Sequence[int]) -> Repeats | None:
    """The stretch of calls that repeats a block of them and covers the most; of two that cover as many, the one with
    the shorter block. None where no block comes twice in a row.
    """
    best: Repeats | None = None
    for length in range(1, len(order) // 2 + 1):
        run = 0
        # `run` calls up to here are the same as those a block earlier; the last place closes the last run.
        for place in range(length, len(order) + 1):
            if place < len(order) and order[place] == order[place - length]:
                run += 1
                continue
            times = run // length + 1
            covered = times * length
            if times > 1 and (best is None or covered > best.length * best.times):
                best = Repeats(place - run - length, length, times)
            run = 0
    return best


def is_one_loop(order: Sequence[int], found: Repeats) -> bool:
    """Nothing outside the stretch is called twice, or is called within it too: the order is p + k x R + c."""
    outside = [*order[: found.start], *order[found.stop :]]
    block = order[found.start : found.start + found.length]
    return len(set(outside)) == len(outside) and not set(outside) & set(block)


def order_in_words(names: Sequence[str]) -> str:
    """`model.layers 0 1 2 1 2 3`: names after their common path, cut where there are many."""
    paths = {name.rpartition(".")[0] for name in names}
    shared = paths.pop() if len(paths) == 1 else ""
    shown = [name.rpartition(".")[2] if shared else name for name in names[:_SHOWN]]
    lengths = accumulate(len(name) + 1 for name in shown)
    shown = [name for name, length in zip(shown, lengths, strict=True) if length <= _LENGTH]
    more = [f"... ({len(names)} calls)"] if len(names) > len(shown) else []
    return " ".join([*([shared] if shared else []), *shown, *more])
