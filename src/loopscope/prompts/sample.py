"""Which of the prompts are used."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from loopscope.errors import PromptError

__all__ = ["draw"]

T = TypeVar("T")


def draw(items: Sequence[T], *, limit: int | None, seed: int | None) -> list[T]:
    """Choose `limit` of the items and keep their order; all of them where there are fewer, or without a limit.

    Without a seed they are the first ones. With one, item i (from 0) has the rank SHA-256(f"{seed}:{i}") and those with
    the smallest ranks are chosen. A rank depends on nothing else, so the subset is the same on every machine and in
    every Python version, and for one seed a smaller subset is part of every larger one.

    Raises `PromptError` for a limit below 1, and for a seed without a limit.
    """
    if limit is None:
        if seed is not None:
            raise PromptError(
                f"--sample-seed {seed} draws a subset, but nothing says how large; add --limit N or leave it out."
            )
        return list(items)
    if limit < 1:
        raise PromptError(f"--limit must be at least 1, got {limit}; leave it out to use every prompt.")
    if seed is None:
        return list(items[:limit])
    by_rank = sorted(range(len(items)), key=lambda index: hashlib.sha256(f"{seed}:{index}".encode()).digest())
    return [items[index] for index in sorted(by_rank[:limit])]
