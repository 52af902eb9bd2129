"""Texts of the automaton task (see `loopscope.sweeps.AutomatonTask`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loopscope._files import write_atomically
from loopscope.sweeps import AutomatonTask

__all__ = ["automaton_documents", "automaton_row", "write_automaton"]

_HELD_OUT = 8
"""One row in so many is kept for the test text."""

Rows = NDArray[np.int64]
"""(row, cell), bits."""


def automaton_row(rows: Rows, steps: int) -> Rows:
    """The rows after so many steps of rule 60: each cell becomes `cell xor left neighbour`."""
    for _ in range(steps):
        rows = rows ^ np.concatenate([np.zeros_like(rows[:, :1]), rows[:, :-1]], axis=1)
    return rows


def automaton_documents(task: AutomatonTask) -> tuple[list[str], list[str]]:
    """Documents for training and for the test, a function of the task alone."""
    generator = np.random.default_rng(task.seed)
    # Whether a row is kept for the test is a function of the row: a random sum over its bits, modulo.
    key = generator.integers(1, 2**31, task.cells)
    train, test = _draw(generator, task, key, held_out=False), _draw(generator, task, key, held_out=True)
    return train, test


def write_automaton(task: AutomatonTask, folder: Path) -> None:
    """Write `train.txt` and `test.txt`, each whole or not at all; those that are there stay. Raises `StorageError`."""
    paths = [folder / "train.txt", folder / "test.txt"]
    if all(path.is_file() for path in paths):
        return
    for path, documents in zip(paths, automaton_documents(task), strict=True):
        write_atomically(path, ("\n\n".join(documents) + "\n").encode())


def _draw(generator: np.random.Generator, task: AutomatonTask, key: Rows, *, held_out: bool) -> list[str]:
    wanted = task.test_documents if held_out else task.documents
    found: list[str] = []
    while len(found) < wanted:
        rows = generator.integers(0, 2, (4 * _HELD_OUT * wanted if held_out else 2 * wanted, task.cells))
        rows = rows[((rows @ key) % 2**31 % _HELD_OUT == 0) == held_out][: wanted - len(found)]
        steps = generator.integers(1, task.steps + 1, len(rows))
        after = np.stack([automaton_row(rows, number) for number in range(task.steps + 1)])[steps, np.arange(len(rows))]
        found += [
            f"{number}{''.join(map(str, row))}>{''.join(map(str, answer))}"
            for number, row, answer in zip(steps, rows, after, strict=True)
        ]
    return found
