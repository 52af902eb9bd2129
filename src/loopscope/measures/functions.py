"""Measures as pure functions on states: the last dimension is the width, the others are whatever the caller has.

Half-precision inputs are widened to float32 first. Formulas: method, section 2, after arXiv 2604.11791, section 4.1 and
appendix D.2.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Vectors = Float[Tensor, "*shape width"]
Values = Float[Tensor, "*shape"]
TokenValues = Float[Tensor, "*shape token"]
Quantiles = Float[Tensor, "level *shape"]
LayerVectors = Float[Tensor, "layer *shape width"]
LayerPairs = Float[Tensor, "layer layer *shape"]


def widen(states: Tensor) -> Tensor:
    """float32, or float64 where the states are."""
    return states if states.dtype in (torch.float32, torch.float64) else states.float()


def residual_norm(states: Vectors) -> Values:
    """Euclidean norm over the width."""
    norm: Tensor = torch.linalg.vector_norm(widen(states), dim=-1)
    return norm


def distance(states: Vectors, reference: Vectors) -> Values:
    """`||x - y||`. The difference is formed before it is squared: `|x|^2 + |y|^2 - 2 x.y` would cancel to nothing
    near a fixed point."""
    away: Tensor = torch.linalg.vector_norm(widen(states) - widen(reference), dim=-1)
    return away


def relative_distance(states: Vectors, reference: Vectors) -> Values:
    """`||x - y|| / ||y||`."""
    return distance(states, reference) / residual_norm(reference)


def cosine(states: Vectors, reference: Vectors) -> Values:
    """Cosine of the angle between two states, in [-1, 1]; 1 for all angles below the root of the rounding error, which
    `cosine_distance` tells apart."""
    product: Tensor = torch.linalg.vecdot(widen(states), widen(reference))
    return (product / (residual_norm(states) * residual_norm(reference))).clamp(-1.0, 1.0)


def cosine_distance(states: Vectors, reference: Vectors) -> Values:
    """`1 - cos`, half the squared distance of the two unit vectors, in float64 and [0, 2]."""
    states, reference = states.double(), reference.double()
    return distances(states, residual_norm(states), reference, residual_norm(reference))[1]


def distances(states: Vectors, norm: Values, reference: Vectors, reference_norm: Values) -> tuple[Values, Values]:
    """`||x - y||` and `1 - cos` of x and y with their norms, of which `states` and `norm` are in float64.

    With `d = x - y` and `a = ||x|| - ||y|| = (2 d.x - ||d||^2) / (||x|| + ||y||)`, which is right to rounding of d,
    `1 - cos = (||d||^2 - a^2) / (2 ||x|| ||y||)`. Its relative error is 1e-16 times the square of `||d||` over the part
    of d across x: small unless nearly all of the movement is along the state.
    """
    difference = states - reference
    away: Tensor = torch.linalg.vector_norm(difference, dim=-1)
    square = away.square()
    longer = (2 * torch.linalg.vecdot(difference, states) - square) / (norm + reference_norm)
    return away, ((square - longer.square()) / (2 * norm * reference_norm)).clamp(0.0, 2.0)


def acceleration(states: Vectors, before: Vectors, earlier: Vectors) -> Values:
    """`||(x - y) - (y - z)|| / ||x||` of three states in a row, x the last: how much a step differs from the one before
    it, in float64."""
    states, before = states.double(), before.double()
    return residual_norm((states - before) - (before - earlier.double())) / residual_norm(states)


def layer_cosine(states: LayerVectors) -> LayerPairs:
    """Cosines between the states of every pair of layers."""
    unit = widen(states) / residual_norm(states).unsqueeze(-1)
    return torch.einsum("i...d,j...d->ij...", unit, unit).clamp(-1.0, 1.0)


def degeneracy(states: LayerVectors) -> Values:
    """`min over i > 0 of cos(X*[0], X*[i])` for the layers' states at the horizon.

    Near 1, all layers share one point and the cycle is no cycle; NaN where there is one layer only.
    """
    if states.shape[0] == 1:
        return torch.full(states.shape[1:-1], torch.nan, dtype=widen(states).dtype, device=states.device)
    return cosine(states[1:], states[0].expand_as(states[1:])).amin(0)


def unrelated_degeneracy(
    states: Float[Tensor, "layer batch token width"], counts: Tensor
) -> Float[Tensor, "batch token"]:
    """The same between layer 0 at a token and the other layers at the token half a prompt away: what states that have
    nothing to do with each other show in this model. `counts` are the prompts' tokens; NaN for a prompt of one."""
    if states.shape[0] == 1:
        return degeneracy(states)
    place = torch.arange(states.shape[2], device=states.device)
    other = (place + counts[:, None] // 2) % counts[:, None]
    away = states[1:].gather(2, other[None, :, :, None].expand_as(states[1:]))
    found = cosine(away, states[0].expand_as(away)).amin(0)
    return found.masked_fill(counts[:, None] == 1, torch.nan)


def quantiles(values: TokenValues, counts: Tensor, levels: Float[Tensor, " level"]) -> Quantiles:
    """Quantiles over the first `counts` entries of the last dimension, interpolated linearly (numpy's default).

    `counts` broadcasts against the leading dimensions. NaN where an entry that counts is not finite.
    """
    counts = counts.expand(values.shape[:-1])
    counted = torch.arange(values.shape[-1], device=values.device) < counts.unsqueeze(-1)
    ordered = values.masked_fill(~counted, torch.inf).sort(dim=-1).values
    place = (counts - 1).unsqueeze(-1) * levels
    low = place.long()
    below = ordered.gather(-1, low)
    above = ordered.gather(-1, torch.minimum(low + 1, (counts - 1).unsqueeze(-1)))
    found = (below + (above - below) * (place - low)).movedim(-1, 0)
    finite = (torch.isfinite(values) | ~counted).all(-1)
    return found.masked_fill(~finite, torch.nan)


def squared_singular_values(states: Float[Tensor, "*shape token width"]) -> Float[Tensor, "*shape value"]:
    """Of (token, width) matrices, in float64, as eigenvalues of the smaller Gram matrix: a zero for each row of zeros,
    at least 0, and all NaN for a matrix with an entry that is not finite.
    """
    wide = states.double()
    tokens, width = wide.shape[-2:]
    gram = wide @ wide.mT if tokens <= width else wide.mT @ wide
    # A matrix with an entry that is not finite has such a square on the diagonal too.
    finite = torch.isfinite(gram.diagonal(dim1=-2, dim2=-1).sum(-1))[..., None]
    # One matrix that is not finite would fail the whole batch.
    squares = torch.linalg.eigvalsh(torch.where(finite[..., None], gram, 0.0)).clamp(min=0)
    return torch.where(finite, squares, torch.nan)
