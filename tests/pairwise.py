"""Few cases that between them hold every pair of choices."""

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["pairwise"]

_CANDIDATES = 40


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Cases such that any two values of any two factors meet in at least one of them.

    Greedy: each case starts from a pair that has not met yet, and is the best of some random completions. The same
    factors always give the same cases.
    """
    draw = random.Random(0)
    names = list(factors)

    def pairs(case: Mapping[str, int]) -> set[tuple[str, int, str, int]]:
        return {(a, case[a], b, case[b]) for a, b in itertools.combinations(names, 2)}

    open_pairs = [
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(factors[a])), range(len(factors[b])))
    ]
    cases = []
    while open_pairs:
        left = set(open_pairs)
        a, i, b, j = open_pairs[0]
        candidates = [
            {name: draw.randrange(len(factors[name])) for name in names} | {a: i, b: j} for _ in range(_CANDIDATES)
        ]
        best = max(candidates, key=lambda case: len(pairs(case) & left))
        met = pairs(best)
        open_pairs = [pair for pair in open_pairs if pair not in met]
        cases.append({name: factors[name][index] for name, index in best.items()})
    return cases
