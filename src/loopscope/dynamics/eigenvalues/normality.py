"""How far a token's recurrence is from normal: by how much a disturbance may grow before its eigenvalues rule, and what
becomes of rounding meanwhile.

The eigenvectors of a normal matrix are orthogonal, and then its eigenvalues say all: a disturbance shrinks in every
recurrence by the spectral radius at least. Of any other matrix they say what happens in the end (Trefethen and Embree,
Spectra and Pseudospectra, chapters 1 and 14). All of this is read off the space that Arnoldi's method has built, but
for a few products with the transpose.
"""

from __future__ import annotations

import torch
from jaxtyping import Complex128, Float64
from torch import Tensor

from loopscope.dynamics.eigenvalues.krylov import ExactProducts, Hessenberg, KrylovSpace, Products, TokenVectors

_MOST_DOUBLINGS = 60
"""2^60 recurrences: a radius of 1 - 1e-15 has come to rest by then."""
_GONE = 1e-8
"""Norm of a power of the matrix whose square is lost beside 1."""
_STEPS = 3
"""Of a transposed product and a product each, from a space of 24 dimensions. (See docs/stability.md.)"""
PerToken = Float64[Tensor, " token"]


def non_normality(
    coefficients: Hessenberg,
    values: Complex128[Tensor, "token pair"],
    singular: PerToken,
) -> dict[str, PerToken]:
    """What `J V_m = V_(m+1) H` says of J beside the Ritz values of H: the fields of `Stability` of these names, on the
    CPU, NaN where a state overflowed. `singular` is the largest singular value from below, or 0.

    Powers of the square part have the columns of powers of J as long as they have not reached the last one:
    `J^k v_c = V_m H^k e_c` for `c <= m - k`. So growth is that of disturbances that exist, and no artefact of the small
    matrix. The equation `P = H P H^T + 1` is solved by doubling (Smith 1968).
    """
    known = torch.isfinite(coefficients).all(-1).all(-1)
    coefficients = coefficients.where(known[:, None, None], 0.0)
    matrix, columns = coefficients[:, :-1], coefficients.shape[-1]
    # A space that is closed under J sees all powers of it.
    closed = coefficients[:, -1, -1] == 0
    size = matrix.square().sum((-2, -1))
    departure = torch.where(size > 0, 1 - values.abs().square().sum(-1) / size, 0.0).clamp(min=0.0).sqrt()
    krylov = _spectral_norm(coefficients)
    singular = torch.maximum(krylov, singular)
    stable = values.abs().amax(-1) < 1
    covariance = torch.eye(columns, dtype=torch.float64).expand_as(matrix)
    growth, power = singular, 1
    for _ in range(_MOST_DOUBLINGS):
        if 1 < power < columns:
            seen = closed[:, None] | (torch.arange(columns) < columns - power)
            growth = _larger(growth, matrix * seen[:, None, :])
        elif power >= columns:
            matrix = matrix.where(stable[:, None, None], 0.0)
        covariance = covariance + matrix @ covariance @ matrix.mT
        if bool((torch.linalg.matrix_norm(matrix) < _GONE).all()):
            break
        matrix, power = matrix @ matrix, 2 * power
    gain = (covariance.diagonal(dim1=-2, dim2=-1).sum(-1) / columns).sqrt().where(stable, torch.nan)
    found = {
        "singular_value": singular,
        "krylov_singular_value": krylov,
        "krylov_departure": departure,
        "noise_gain": gain,
        "transient_growth": growth,
    }
    return {name: each.where(known, torch.nan) for name, each in found.items()}


def largest_singular_value(products: Products, space: KrylovSpace) -> PerToken:
    """From below, by Golub and Kahan's bidiagonalisation (1965), which begins on the side of the images where the space
    is stretched most. 0 where there is no product with the transpose."""
    coefficients = space.coefficients
    if not isinstance(products, ExactProducts):
        return torch.zeros(len(coefficients), dtype=torch.float64)
    # Of a state that overflowed, nothing is finite.
    coefficients = coefficients.nan_to_num(0.0, 0.0, 0.0)
    _, vectors = torch.linalg.eigh(coefficients.mT @ coefficients)
    left, _ = _unit(((coefficients[:, :-1] @ vectors[:, :, -1:]).mT.to(space.basis) @ space.basis)[:, 0])
    right = torch.zeros_like(left)
    along = torch.zeros_like(left[:, 0])
    bidiagonal = torch.zeros(len(left), _STEPS + 1, _STEPS, dtype=torch.float64)
    for step in range(_STEPS):
        right, length = _unit(products.transposed(left) - along[:, None] * right)
        left, along = _unit(products(right) - length[:, None] * left)
        bidiagonal[:, step, step] = length.double().cpu()
        bidiagonal[:, step + 1, step] = along.double().cpu()
    return _spectral_norm(bidiagonal.nan_to_num(0.0, 0.0, 0.0))


def _unit(vectors: TokenVectors) -> tuple[TokenVectors, Tensor]:
    """The vectors with length one, zero where they have none, and their lengths."""
    length = torch.linalg.vector_norm(vectors, dim=-1)
    return torch.where(length[:, None] > 0, vectors / length[:, None], 0.0), length


def _spectral_norm(matrices: Float64[Tensor, "token rows columns"]) -> PerToken:
    """By the Gram matrix, which keeps all digits of the largest singular value and takes half the time."""
    largest: Tensor = torch.linalg.eigvalsh(matrices.mT @ matrices)[:, -1]
    return largest.clamp(min=0.0).sqrt()


def _larger(growth: PerToken, matrices: Float64[Tensor, "token rows columns"]) -> PerToken:
    """The larger of what is there and the spectral norms, which no token needs whose Frobenius norm is no larger."""
    larger = growth.clone()
    some = torch.linalg.matrix_norm(matrices) > growth
    larger[some] = torch.maximum(growth[some], _spectral_norm(matrices[some]))
    return larger
