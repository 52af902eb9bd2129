"""How the prompt enters a recurrence, where that takes more than a matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["BoundedInjection"]


class BoundedInjection(nn.Module):
    """`sigmoid(a) * s + W e` of `[s ; e]`, (..., 2 width) to (..., width).

    Every factor on the state lies between 0 and 1. So with layers whose branches read normed states, each of which adds
    at most some C, the norm of the state stays below (|W e| + C) / (1 - max sigmoid(a)). That bounds the state; it does
    not make the whole recurrence a contraction, which its eigenvalues decide.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.decay = nn.Parameter(torch.zeros(width))
        self.weight = nn.Parameter(torch.zeros(width, width))

    def forward(self, both: Tensor) -> Tensor:
        state, encoded = both.split(self.width, dim=-1)
        mixed: Tensor = torch.sigmoid(self.decay) * state + functional.linear(encoded, self.weight)
        return mixed
