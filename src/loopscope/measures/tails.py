"""What is kept of the states whose limits are judged: a linear image of few dimensions, in little memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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

_CODES = {torch.float32: torch.int16, torch.float64: torch.int32}
"""What the numbers of a step are kept as, half as long."""


class KeptTails(Observer):
    """Keeps the raw outputs of some recurrent layers in some spans of recurrences, as `DIMENSIONS` numbers each.

    A random orthonormal projection, the same for all states of one width, is linear: what rests, repeats, drifts or
    shrinks at some rate does the same in the image. The length of a single direction comes out with a relative standard
    deviation of 1/sqrt(2 DIMENSIONS) (Johnson and Lindenstrauss 1984), 0.125; lengths are therefore scaled by one
    factor a token, so that the root mean square of its steps is the true one.

    Steps are projected rather than states, since the rounding of a projected state would be as large as the motion of
    one that rests. A step is kept as integers of 16 bits in units of its largest number, of a model in float64 as 32.
    What that rounds away is added to the next step, so that it does not add up: every state of a trajectory is right to
    2^-16 (2^-32) of the largest number in the step into it, and to the rounding of the steps before.
    """

    def __init__(self, mask: Tensor, width: int, layers: Sequence[int], spans: Sequence[Span]) -> None:
        # Places rather than a mask, whose number of places is known only when a device has counted them.
        self._places = mask.flatten().nonzero()[:, 0]
        self._image = None if width <= DIMENSIONS else _projection(width).to(mask.device)
        self._kept: dict[tuple[int, Span], _Kept] = {}
        for layer in layers:
            # A span within another is a part of what is kept for that one.
            whole = [_Kept(span) for span in apart(spans)]
            for span in spans:
                self._kept[layer, span] = next(kept for kept in whole if _within(span, kept.span))

    def visit(self, visit: Visit) -> None:
        if visit.stage != "recurrent":
            return
        before = visit.recurrence - 1
        there = [(span, kept) for (layer, span), kept in self._kept.items() if layer == visit.layer]
        there = [(span, kept) for span, kept in there if span[0] <= before < span[1]]
        if not there:
            return
        # Once for all spans, which remember it until the next.
        state = widen(visit.residual.flatten(0, 1).index_select(0, self._places))
        begins = any(span[0] == before for span, _ in there)
        for kept in dict.fromkeys(kept for _, kept in there):
            kept.add(state, self._image, visit.recurrence, begins=begins)

    def trajectories(
        self, layer: int, span: Span, tokens: slice | Tensor = slice(None)
    ) -> Float[Tensor, "token recurrence dimension"]:
        """Of some of the tokens of all prompts in order, in float64 on the CPU."""
        return self._kept[layer, span].trajectories(span, tokens)

    def cut(self, span: Span, shorter: Span) -> None:
        """Of a span whose end did not come, what did."""
        for layer, which in list(self._kept):
            if which == span:
                self._kept[layer, shorter] = self._kept[layer, span]

    def drop(self, layer: int) -> None:
        """What was judged."""
        for place in [place for place in self._kept if place[0] == layer]:
            del self._kept[place]


def bytes_of_step(width: int, itemsize: int) -> int:
    """Of one token that is kept of a model whose numbers take so many bytes."""
    wide = max(4, itemsize)
    return min(DIMENSIONS, width) * wide // 2 + 2 * wide


def apart(spans: Iterable[Span]) -> list[Span]:
    """Those that lie within no other."""
    found: list[Span] = []
    for span in sorted(spans, key=_length, reverse=True):
        if not any(_within(span, other) for other in found):
            found.append(span)
    return found


def _within(span: Span, other: Span) -> bool:
    return other[0] <= span[0] and span[1] <= other[1]


def _length(span: Span) -> int:
    return span[1] - span[0]


class _Kept:
    """One layer within one span, by token and recurrence."""

    def __init__(self, span: Span) -> None:
        self.span = span
        self.previous: Tensor | None = None
        self.first: dict[int, Tensor] = {}
        """By recurrences done before, the image of the first state of each span, as long as the state."""
        self.steps: Tensor | None = None
        """(step, token, dimension), in one piece, which goes back to the system when it is dropped."""
        self.units: Tensor | None = None
        """What one is worth in each step, (step, token)."""
        self.lengths: Tensor | None = None
        """Of the steps of the states themselves, (step, token)."""
        self.left: Tensor | None = None
        """What is not in the steps so far."""

    def add(self, state: Float[Tensor, "token width"], image: Tensor | None, recurrence: int, *, begins: bool) -> None:
        if begins:
            double = state.double()
            first = double if image is None else double @ image.double()
            length = torch.linalg.vector_norm(first, dim=-1).clamp_min(1e-300)
            self.first[recurrence - 1] = first * (residual_norm(double) / length)[:, None]
        if self.steps is None or self.lengths is None:
            dimension = state.shape[-1] if image is None else image.shape[-1]
            shape = (_length(self.span) - 1, len(state))
            self.steps = state.new_empty(*shape, dimension, dtype=_CODES[state.dtype])
            self.units, self.lengths = state.new_empty(2, *shape)
            self.left = state.new_zeros(len(state), dimension)
        else:
            assert self.previous is not None  # spans have no gaps
            step, place = state - self.previous, recurrence - self.span[0] - 2
            torch.linalg.vector_norm(step, dim=-1, out=self.lengths[place])
            self._write(place, step if image is None else step @ image.to(step.dtype))
        self.previous = None if recurrence == self.span[1] else state

    def _write(self, place: int, step: Float[Tensor, "token dimension"]) -> None:
        assert self.steps is not None
        assert self.units is not None
        assert self.lengths is not None
        assert self.left is not None
        asked, most = self.left.add_(step), torch.iinfo(self.steps.dtype).max
        largest = asked.abs().amax(-1)  # ten times as fast as torch's norm of that kind
        # So that its inverse is a number. NaN stays NaN, which the trajectory then has, whatever its codes are.
        unit = torch.div(largest.clamp_min_(2 * most * torch.finfo(asked.dtype).tiny), most, out=self.units[place])
        # Who rests must not be moved by what is left.
        scale = torch.where(self.lengths[place] == 0, 0.0, unit.reciprocal())
        codes = (asked * scale[:, None]).round_()
        self.steps[place] = codes
        asked.addcmul_(codes, unit[:, None], value=-1)

    def trajectories(self, span: Span, tokens: slice | Tensor) -> Tensor:
        assert self.steps is not None  # a span begins where it is kept
        assert self.units is not None
        assert self.lengths is not None
        there = slice(span[0] - self.span[0], span[1] - self.span[0] - 1)
        codes, units = (each[there][:, tokens].movedim(0, 1) for each in (self.steps, self.units))
        first = self.first[span[0]][tokens]
        found = first.new_empty(len(first), codes.shape[1] + 1, first.shape[-1])
        found[:, 0], way = 0.0, found[:, 1:]
        way.copy_(codes).mul_(units[..., None])
        true = self.lengths[there][:, tokens].double().square().sum(0)
        seen = torch.linalg.vector_norm(way, dim=(1, 2)).square()
        factor: Tensor = torch.where(seen > 0, true / seen, 1.0).sqrt()
        way.mul_(factor[:, None, None]).cumsum_(1)
        return found.add_(first[:, None]).cpu()


@lru_cache(maxsize=4)
def _projection(width: int) -> Float[Tensor, "width dimension"]:
    """Scaled so that it keeps lengths on average."""
    generator = torch.Generator().manual_seed(width)
    normal = torch.randn(width, DIMENSIONS, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(normal)[0]
    return basis * math.sqrt(width / DIMENSIONS)
