"""The largest difference between two sets of named tensors, and where it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loopscope.testing.results import CheckFailed

__all__ = ["Difference", "Place", "require_close"]

Place = tuple[int, int]
"""(prompt, token), both from 0."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Between two tensors of one label, at the entry where they differ most."""

    label: str
    size: float
    """|got - expected| over the largest magnitude in the token's expected vector."""
    description: str

    def __str__(self) -> str:
        return f"{self.label} {self.description}"


def require_close(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor], places: Sequence[Place], limit: float, what: str
) -> str:
    """What was compared and how well it agrees; raises `CheckFailed` with the first and the largest difference.

    The tensors of a label have one row a real token, in the order of `places`.
    """
    missing = [label for label in expected if label not in got]
    if missing:
        raise CheckFailed(f"{what}: got no {missing[0]}, expected it and {len(expected) - 1} other tensors")
    differences = [_difference(label, got[label], expected[label], places) for label in expected]
    beyond = [difference for difference in differences if not difference.size <= limit]
    largest = max(differences, key=lambda difference: difference.size)
    if beyond:
        more = f"; largest at {largest}" if largest is not beyond[0] else ""
        raise CheckFailed(f"{what} at {beyond[0]}, allowed {limit:.2g}{more}; {len(beyond)} of {len(expected)} differ")
    if largest.size == 0:
        return f"{len(expected)} tensors equal bit for bit"
    return (
        f"{len(expected)} tensors, largest relative difference {largest.size:.2g} (of {limit:.2g}) at {largest.label}"
    )


def _difference(label: str, got: Tensor, expected: Tensor, places: Sequence[Place]) -> Difference:
    if got.shape != expected.shape:
        return Difference(label, math.inf, f"(got shape {tuple(got.shape)}, expected {tuple(expected.shape)})")
    got, expected = (tensor.double().reshape(len(tensor), -1) for tensor in (got, expected.to(got.device)))
    # NaN in both is the same result, which another check judges.
    same = (got == expected) | (got.isnan() & expected.isnan())
    scale = expected.nan_to_num().abs().amax(-1, keepdim=True)
    sizes = (got - expected).abs() / torch.where(scale == 0, 1.0, scale)
    sizes = torch.where(same, 0.0, sizes.nan_to_num(nan=math.inf, posinf=math.inf))
    row, entry = divmod(int(sizes.argmax()), sizes.shape[1])
    prompt, token = places[row] if row < len(places) else (-1, -1)  # states of another shape than the tokens have
    return Difference(
        label,
        float(sizes[row, entry]),
        f"(prompt {prompt}, token {token}: got {float(got[row, entry]):.6g}, expected "
        f"{float(expected[row, entry]):.6g}, relative difference {float(sizes[row, entry]):.2g})",
    )
