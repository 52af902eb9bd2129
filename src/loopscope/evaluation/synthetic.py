"""Tasks whose answers take several steps, one after the other: made by a rule, so that there is as much text as asked.

A document is a question, `>`, and its answer. All documents of a task have the same number of characters, so that
windows of training text begin where documents do. What is in the test text is not in the training text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from loopscope._util.files import write_atomically

ANSWER_AFTER = ">"
_DRAWN = 60_000
"""Documents, of which those that were drawn twice are left out."""
_TEST = 512
_ITEMS, _SWAPS = "abcde", 8
_COLUMNS = 5


class Document(NamedTuple):
    """One question with its answer."""

    question: str
    answer: str
    difficulty: int
    """A number that the task names."""

    @property
    def text(self) -> str:
        return f"{self.question}{ANSWER_AFTER}{self.answer}"


@dataclass(frozen=True)
class SyntheticTask:
    """A task as a function from random numbers to documents."""

    name: str
    level: str
    """What a difficulty is called, with its number in braces."""
    draw: Callable[[np.random.Generator, int], list[Document]]

    def split(self) -> tuple[list[Document], list[Document]]:
        """Documents for training and for the test, always the same."""
        generator = np.random.default_rng(0)
        documents = list(dict.fromkeys(self.draw(generator, _DRAWN)))
        order = generator.permutation(len(documents))
        shuffled = [documents[place] for place in order]
        return shuffled[_TEST:], shuffled[:_TEST]

    def write(self, folder: Path) -> None:
        """Write `train.txt` and `test.txt` for `loopscope train`. Raises `StorageError`."""
        for name, documents in zip(("train.txt", "test.txt"), self.split(), strict=True):
            write_atomically(folder / name, ("\n\n".join(each.text for each in documents) + "\n").encode())


def _permutations(generator: np.random.Generator, count: int) -> list[Document]:
    """`02103040>bacde`: what becomes of `abcde` when neighbours are swapped, one swap after the other.

    `k` swaps the items at places k and k + 1, `0` swaps none. How many there are is drawn evenly, then where they are.
    """
    swapping = generator.integers(1, _SWAPS + 1, count)
    swaps = generator.integers(1, len(_ITEMS), (count, _SWAPS))
    place = generator.random((count, _SWAPS)).argsort(axis=1).argsort(axis=1)
    swaps[place >= swapping[:, None]] = 0
    documents = []
    for row, number in zip(swaps, swapping, strict=True):
        items = list(_ITEMS)
        for swap in row[row > 0]:
            items[swap - 1], items[swap] = items[swap], items[swap - 1]
        documents.append(Document("".join(map(str, row)), "".join(items), int(number)))
    return documents


def _addition(generator: np.random.Generator, count: int) -> list[Document]:
    """`5412755230>038239` asks for 35715 + 2524: pairs of digits from the ones on, then the sum from its first digit
    on, so that no digit of the sum that stands before another tells a carry.

    A run of columns that sum to 9, through which a carry would go, is drawn in length and place.
    """
    first, second = generator.integers(0, 10, (2, count, _COLUMNS))
    lengths = generator.integers(0, _COLUMNS, count)
    starts = generator.integers(0, _COLUMNS - lengths)
    column = np.arange(_COLUMNS)
    nines = (column > starts[:, None]) & (column <= (starts + lengths)[:, None])
    second = np.where(nines, 9 - first, second)
    weights = 10**column
    documents = []
    for one, other, total in zip(first, second, first @ weights + second @ weights, strict=True):
        pairs = "".join(f"{a}{b}" for a, b in zip(one, other, strict=True))
        documents.append(Document(pairs, f"{total:0{_COLUMNS + 1}d}", carried(one + other)))
    return documents


def carried(sums: np.ndarray) -> int:
    """The most columns through which one carry goes on, from what each column sums to without any: 0 where every carry
    ends in the next column."""
    longest, run, carry = 0, 0, False
    for column in sums:
        run = run + 1 if carry and column == 9 else 0
        carry = bool(column >= 10 or (carry and column == 9))
        longest = max(longest, run)
    return longest


SYNTHETIC = {
    task.name: task
    for task in (
        SyntheticTask("permutations", "{} swaps", _permutations),
        SyntheticTask("addition", "carry through {}", _addition),
    )
}
