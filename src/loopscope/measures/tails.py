"""What is kept of the states whose limits are judged: a linear image of few dimensions, in little memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.measures.functions import residual_norm, widen
from loopscope.models.visits import Observer, Visit

Span = tuple[int, int]
"""Of recurrences: how many are done before the first of them, and with the last."""

DIMENSIONS = 32
"""Of the image. Shapes are fitted to 16 principal components."""


class Tails(Observer):
    """Keeps the raw outputs of some recurrent layers in some spans of recurrences, as `DIMENSIONS` numbers each.

    A random orthonormal projection, the same for all states of one width, is linear: what rests, repeats, drifts or
    shrinks at some rate does the same in the image. The length of a single direction comes out with a relative standard
    deviation of 1/sqrt(2 DIMENSIONS) (Johnson and Lindenstrauss 1984), 0.125; lengths are therefore scaled by one
    factor a token, so that the root mean square of its steps is the true one.

    Steps are projected rather than states, since the rounding of a projected state would be as large as the motion of
    one that rests; the rounding of a projected step is 1e-7 of that step.
    """

    def __init__(self, mask: Tensor, width: int, layers: Sequence[int], spans: Sequence[Span]) -> None:
        # Places rather than a mask, whose number of places is known only when a device has counted them.
        self._places = mask.flatten().nonzero()[:, 0]
        self._spans = tuple(dict.fromkeys(spans))
        self._image = None if width <= DIMENSIONS else _projection(width).to(mask.device)
        self._kept = {(layer, span): _Kept(span[1] - span[0] - 1) for layer in layers for span in self._spans}

    def visit(self, visit: Visit) -> None:
        if visit.stage != "recurrent":
            return
        spans = [
            span for span in self._spans if span[0] < visit.recurrence <= span[1] and (visit.layer, span) in self._kept
        ]
        if not spans:
            return
        # Once for all spans, which remember it until the next.
        state = widen(visit.residual.flatten(0, 1).index_select(0, self._places))
        for span in spans:
            self._kept[visit.layer, span].add(state, self._image, last=visit.recurrence == span[1])

    def trajectories(
        self, layer: int, span: Span, tokens: slice | Tensor = slice(None)
    ) -> Float[Tensor, "token recurrence dimension"]:
        """Of some of the tokens of all prompts in order, in float64 on the CPU."""
        return self._kept[layer, span].trajectories(tokens)

    def drop(self, layer: int, *, but: Span | None = None) -> None:
        """Of what was judged."""
        for span in self._spans:
            if span != but:
                self._kept.pop((layer, span), None)


@dataclass(slots=True, eq=False)
class _Kept:
    """One layer within one span, by token and recurrence."""

    most: int
    """Steps that the span has."""
    count: int = 0
    previous: Tensor | None = None
    first: Tensor | None = None
    """The image of the first state, as long as the state."""
    steps: Tensor | None = None
    """(step, token, dimension), in one piece, which goes back to the system when it is dropped."""
    lengths: Tensor | None = None
    """Of the steps of the states themselves, (step, token)."""

    def add(self, state: Float[Tensor, "token width"], image: Tensor | None, *, last: bool) -> None:
        if self.first is None:
            double = state.double()
            first = double if image is None else double @ image.double()
            length = torch.linalg.vector_norm(first, dim=-1).clamp_min(1e-300)
            self.first = first * (residual_norm(double) / length)[:, None]
            self.steps = state.new_empty(self.most, *first.shape)
            self.lengths = state.new_empty(self.most, len(first))
        else:
            assert self.previous is not None  # spans have no gaps
            assert self.steps is not None
            assert self.lengths is not None
            step = state - self.previous
            torch.linalg.vector_norm(step, dim=-1, out=self.lengths[self.count])
            self.steps[self.count] = step if image is None else step @ image.to(step.dtype)
            self.count += 1
        self.previous = None if last else state

    def trajectories(self, tokens: slice | Tensor) -> Tensor:
        assert self.first is not None  # a span begins where it is kept
        assert self.steps is not None
        assert self.lengths is not None
        steps = self.steps[: self.count, tokens].double().movedim(0, 1).contiguous()
        true = self.lengths[: self.count, tokens].double().square().sum(0)
        seen = steps.square().sum((1, 2))
        factor: Tensor = torch.where(seen > 0, true / seen, 1.0).sqrt()
        way = (steps * factor[:, None, None]).cumsum(1)
        first = self.first[tokens][:, None]
        return torch.cat((first, first + way), dim=1).cpu()


@lru_cache(maxsize=4)
def _projection(width: int) -> Float[Tensor, "width dimension"]:
    """Scaled so that it keeps lengths on average."""
    generator = torch.Generator().manual_seed(width)
    normal = torch.randn(width, DIMENSIONS, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(normal)[0]
    return basis * math.sqrt(width / DIMENSIONS)
