"""The tail of a trajectory, reduced to what a verdict needs: its Gram matrix, and what follows from that."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

COMPONENTS = 16
"""Principal components of the motion that shapes are fitted to: twice what a curve of four harmonics needs. What the
others hold counts as unexplained, but for cycles, which are fitted to the whole Gram matrix."""
_SMALLEST_TAIL = 24
"""Recurrences: half of a short trajectory would be too few to see a period in."""
_NOTHING = 1e-30
"""Of the largest norm in a tail: a median norm below this is that of states that are 0, by which no length is told."""
_BLOCK_ENTRIES = 2**18
"""Of states that are reduced at a time: 2 MiB in float64."""


@dataclass(frozen=True, slots=True, eq=False)
class Tails:
    """Tails of several tokens' trajectories; lengths are in units of each token's median norm within its tail, or of
    the largest one where half of the states are 0."""

    times: Float[Tensor, " time"]
    """Recurrences, counted from 1."""
    products: Float[Tensor, "token time time"]
    """Inner products of the differences to the last state: what is left of a motion that shrinks keeps its digits."""
    steps: Float[Tensor, "token step"]
    """Lengths of the single steps."""
    norms: Float[Tensor, "token time"]
    """Of the states."""
    norm_growth: Float[Tensor, " token"]
    """Norm of the last state over that of the state at half the time since the loop began."""
    width: int
    differences: Float[Tensor, "token time width"] | None = None
    """To the last state, where they have fewer numbers than their products."""

    @property
    def window(self) -> int:
        return len(self.times)

    @property
    def white_directions(self) -> float:
        """Directions that white noise would seem to take within so short a window."""
        return 1 / (1 / (self.window - 1) + 1 / self.width)

    def displacement(self, window: int | None = None) -> Float[Tensor, "token lag"]:
        """Mean squared displacement at lags 1, 2, ..., within the last `window` recurrences (all, unless given)."""
        first = 0 if window is None else self.window - window
        return mean_squared_displacement(self.products[:, first:, first:])

    def gram(self) -> Float[Tensor, "token time time"]:
        """Inner products of the states, their mean taken out."""
        rows = self.products.mean(-1, keepdim=True)
        return self.products - rows - rows.mT + rows.mean(-2, keepdim=True)

    def last(self, window: int, rows: Int[Tensor, " row"]) -> Tails:
        """The last `window` recurrences of some tokens, in units of their median norm there."""
        norms = self.norms[rows, -window:]
        scale = _scale(norms)
        whole = self.differences
        return Tails(
            times=self.times[-window:],
            products=self.products[rows, -window:, -window:] / scale[..., None].square(),
            steps=self.steps[rows, 1 - window :] / scale,
            norms=norms / scale,
            norm_growth=self.norm_growth[rows],
            width=self.width,
            differences=whole[rows, -window:] / scale[..., None] if whole is not None and self.width < window else None,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Components:
    """Principal components of some tokens' motion."""

    times: Float[Tensor, " time"]
    gram: Float[Tensor, "token time time"]
    energy: Float[Tensor, " token"]
    scores: Float[Tensor, "token time component"]
    """Of the leading components."""
    directions: Float[Tensor, " token"]
    """How many directions the motion takes: participation ratio of the components."""
    noise_directions: Float[Tensor, " token"]
    """How many the noise takes: the same of what the leading components leave, the window's own limit taken out."""
    rest_energy: Float[Tensor, " token"]
    """Sum of squares of the components beyond the leading ones."""
    rest_square: Float[Tensor, " token"]
    """Sum of their fourth powers."""

    @property
    def window(self) -> int:
        return len(self.times)

    def take(self, rows: Int[Tensor, " row"]) -> Components:
        """Of some tokens."""
        return replace(self, **{name: getattr(self, name)[rows] for name in _OF_TOKENS})


_OF_TOKENS = tuple(field.name for field in fields(Components) if field.name != "times")


def tail_length(recurrences: int, window: int, first_recurrence: int = 1) -> int:
    """Recurrences in the tail: the second half of the time since the loop began, at least 24 where that many are given,
    and at most `window`."""
    half = (first_recurrence - 1 + recurrences) // 2
    return min(window, recurrences, max(half, _SMALLEST_TAIL))


def take_tails(states: Float[Tensor, "token recurrence width"], window: int, first_recurrence: int = 1) -> Tails:
    """Reduce the last `window` recurrences of finite trajectories, in float64.

    `first_recurrence` is the number of recurrences after which the first state given stands, from 1: drifts that slow
    down are told by the time since the loop began.
    """
    recurrences, width = states.shape[1:]
    start = first_recurrence + recurrences - window
    times = torch.arange(start, start + window, dtype=torch.float64)
    # In blocks that stay in a processor's cache: the states are by far the largest of what is looked at.
    block = max(1, _BLOCK_ENTRIES // (recurrences * width))
    parts = [_reduced(some, window, first_recurrence) for some in states.split(block)]
    products, steps, norms, norm_growth, *differences = (torch.cat(part) for part in zip(*parts, strict=True))
    return Tails(times, products, steps, norms, norm_growth, width, *differences)


def _reduced(states: Tensor, window: int, first_recurrence: int) -> tuple[Tensor, ...]:
    """Products, steps, norms and norm growth of some tokens, and the differences if they are few."""
    recurrences = states.shape[1]
    # Neither squares of tiny numbers nor those of huge ones are numbers.
    largest = states.abs().amax((1, 2)).double().clamp_min(1e-300)[:, None, None]
    tail = states[:, -window:].double() / largest
    norms = torch.linalg.vector_norm(tail, dim=-1)
    before = first_recurrence - 1
    half = states[:, max(0, (before + recurrences) // 2 - before)].double() / largest[:, 0]
    norm_growth = norms[:, -1] / torch.linalg.vector_norm(half, dim=-1).clamp_min(1e-300)
    scale = _scale(norms)
    # Differences before squares: the motion may be a millionth of the norm.
    moved = (tail - tail[:, -1:]) / scale[..., None]
    steps = torch.linalg.vector_norm(moved[:, 1:] - moved[:, :-1], dim=-1)
    few = (moved,) if moved.shape[-1] < window else ()
    return moved @ moved.mT, steps, norms / scale, norm_growth, *few


def _scale(norms: Float[Tensor, "token time"]) -> Float[Tensor, "token 1"]:
    median, largest = norms.median(-1, keepdim=True).values, norms.amax(-1, keepdim=True)
    return torch.where(median > _NOTHING * largest, median, largest).clamp_min(1e-300)


def decompose(tails: Tails) -> Components:
    """Principal components of each token's motion."""
    gram, kept = tails.gram(), min(COMPONENTS, tails.window)
    if tails.differences is None:
        values, vectors = torch.linalg.eigh(gram)
        values = values.clamp_min(0.0)
        scores = vectors[..., -kept:] * values[..., -kept:].sqrt()[:, None]
    else:
        # The same from the smaller matrix: the other components of so narrow a state are 0.
        centred = tails.differences - tails.differences.mean(1, keepdim=True)
        values, vectors = torch.linalg.eigh(centred.mT @ centred)
        lacking = tails.window - tails.width
        values = torch.nn.functional.pad(values.clamp_min(0.0), (lacking, 0))
        scores = torch.nn.functional.pad(centred @ vectors, (lacking, 0))[..., -kept:]
    rest = values[..., :-kept]
    return Components(
        times=tails.times,
        gram=gram,
        energy=values.sum(-1),
        scores=scores,
        directions=_participation(values),
        noise_directions=_noise_directions(rest, values, tails.width),
        rest_energy=rest.sum(-1),
        rest_square=rest.square().sum(-1),
    )


def tail_paths(
    states: Float[Tensor, "token recurrence width"], first_recurrence: int = 1, window: int = 256
) -> Float[Tensor, "token time 2"]:
    """The way through the tail in the plane of each token's own two leading principal components, relative to the norm.

    For drawings: signs are such that the way starts to the right and above.
    """
    length = tail_length(states.shape[1], window, first_recurrence)
    tails = take_tails(states, length, first_recurrence)
    scores = decompose(tails).scores[..., -2:].flip(-1)
    return scores * torch.where(scores[:, :1] < 0, -1.0, 1.0)


def longest_lag(window: int) -> int:
    """Of displacements within a tail."""
    return max(1, 3 * window // 4)


def mean_squared_displacement(gram: Float[Tensor, "token time time"]) -> Float[Tensor, "token lag"]:
    """`M(lag) = mean over t of ||x[t + lag] - x[t]||^2`, for lags from 1 to three quarters of the window.

    From the Gram matrix; beyond, the mean would be over a few pairs only.
    """
    window = gram.shape[-1]
    lags = longest_lag(window)
    squares = gram.diagonal(dim1=-2, dim2=-1)
    # In place: this is the largest array that judging makes.
    distances = squares[:, :, None] + squares[:, None, :]
    distances.sub_(gram, alpha=2).clamp_(min=0.0).triu_()
    # Column l of these rows, each of which begins one place later, is the diagonal at lag l. What runs over the edge of
    # the array is below the diagonal of the next row: 0.
    diagonals = distances.as_strided((len(gram), window - 1, lags), (window**2, window + 1, 1), 1)
    return diagonals.sum(1) / torch.arange(window - 1, window - 1 - lags, -1)


def _participation(values: Tensor) -> Tensor:
    return values.sum(-1).square() / values.square().sum(-1).clamp_min(1e-300)


def _noise_directions(rest: Tensor, values: Tensor, width: int) -> Tensor:
    """White noise in D directions, seen n times, has a participation ratio of 1 / (1/D + 1/n)."""
    if rest.shape[-1] < 3:
        return torch.ones(rest.shape[0], dtype=rest.dtype)
    # Where the leading components are all that there are, noise is taken to be in as few directions as the motion: in
    # more, it would imitate fewer shapes.
    beyond, seen = rest.sum(-1) > 0, torch.full_like(rest[:, 0], rest.shape[-1])
    apparent = torch.where(beyond, _participation(rest), _participation(values))
    seen = torch.where(beyond, seen, values.shape[-1] - 1)
    apparent = torch.minimum(apparent.clamp_min(1.0), 0.999 * seen)
    return (1 / (1 / apparent - 1 / seen)).clamp(1.0, width)
