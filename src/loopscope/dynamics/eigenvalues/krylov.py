"""Leading eigenvalues of many matrices at once, from products with them: how products with a derivative are made, and
Arnoldi's method, batched over tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Complex128, Float, Float64
from torch import Tensor
from torch.nn import functional

TokenVectors = Float[Tensor, "token width"]
OwnMap = Callable[[TokenVectors], TokenVectors]
"""States of some tokens to their states one recurrence later, each by its own alone, as far as derivatives go."""
Hessenberg = Float64[Tensor, "token rows columns"]
"""Coefficients of `J V_m = V_(m+1) H`, with m columns and m + 1 rows."""
Basis = Float[Tensor, "token column width"]
"""Orthonormal vectors of a Krylov space."""
_ROUNDINGS = 20.0
"""Of which the error of a product is made up: in four layers, products in float32 and float64 differ by 1 to 12.
"""
_AGREE = 1e-2
_STEPS = (1.0, 1 / 16, 1 / 16)
WIDER = 64.0
"""A product and a difference quotient differ by less than this share of it: curvature and rounding leave 1e-3, and a
part of the map that is left out far more than that. Steps of the tries, as shares of the usual one: the smaller ones
stay off kinks. The last number is a step in float64 above what a part of the map in float32, as norms often are,
rounds."""
_INVARIANT = 100.0
"""A product of which less than this many roundings of its size is new adds nothing to the space."""


@runtime_checkable
class Products(Protocol):
    """The derivative of an `OwnMap` at a point."""

    point: TokenVectors
    image: TokenVectors
    """The map's value there."""
    accuracy: float
    """Relative error of a product."""

    def __call__(self, vectors: TokenVectors) -> TokenVectors:
        """`J_i v_i` for every token i."""


class ExactProducts:
    """By automatic differentiation (see `transposed_products`)."""

    def __init__(self, own: OwnMap, point: TokenVectors) -> None:
        with torch.enable_grad():
            self.point = point.detach().clone().requires_grad_()
            self._image = own(self.point)
            self.image = self._image.detach()
            self.accuracy = _ROUNDINGS * torch.finfo(point.dtype).eps
            self._recorded = transposed_products(self._image, self.point) if self._image.requires_grad else None

    def __call__(self, vectors: TokenVectors) -> TokenVectors:
        # A map that does not look at the state, as with its input frozen, has no gradient at all.
        if self._recorded is None or not self._recorded[0].requires_grad:
            return torch.zeros_like(vectors)
        pulled, cotangent = self._recorded
        (product,) = torch.autograd.grad((pulled * vectors).sum(), cotangent, retain_graph=True, materialize_grads=True)
        return product.detach()

    def transposed(self, vectors: TokenVectors) -> TokenVectors:
        """`J_i^T u_i` for every token i."""
        if self._recorded is None:
            return torch.zeros_like(vectors)
        (product,) = torch.autograd.grad((self._image * vectors).sum(), self.point, retain_graph=True)
        return product


class DifferenceProducts:
    """By central differences, `(F(x + h v) - F(x - h v)) / 2 h`, for maps that cannot be differentiated twice.

    With `h |v| = eps^(1/3) |x|`, where rounding and curvature weigh about the same, a product is good to about
    eps^(2/3): 4e-11 in float64, 2e-5 in float32.
    """

    def __init__(self, own: OwnMap, point: TokenVectors, *, step: float = 1.0) -> None:
        """`step` is a factor on h: with a smaller one curvature weighs less, and rounding more."""
        self._own = own
        self.point = point.detach()
        self.image = self._value(self.point)
        eps = torch.finfo(point.dtype).eps
        self.accuracy = _ROUNDINGS * eps ** (2 / 3) / step
        self._size = step * eps ** (1 / 3) * torch.linalg.vector_norm(self.point, dim=-1)

    def __call__(self, vectors: TokenVectors) -> TokenVectors:
        length = torch.linalg.vector_norm(vectors, dim=-1)
        # The step is relative to the point, whatever the length of the vector, which rounding would else drown.
        step = torch.where(length > 0, self._size / length, 0.0)[:, None]
        ahead, behind = (self._value(self.point + sign * step * vectors) for sign in (1, -1))
        return torch.where(step > 0, (ahead - behind) / (2 * step), 0.0)

    def _value(self, point: TokenVectors) -> TokenVectors:
        with torch.no_grad():
            return self._own(point)


def disagreement(products: Products, own: OwnMap, step: float = 1.0) -> float:
    """The largest share by which a product of a token differs from the difference quotient of its map, beyond that
    quotient's rounding; infinite where it is above 1 % of some token.

    What automatic differentiation gives is the derivative only if the map lets it see all that it does: a part that
    runs without gradients, is detached or scaled on the way back, or is one opaque call in the backward pass, is left
    out without an error. Quotients in turn are noise where the map rounds more coarsely than its dtype, which shows
    between two `step`s. Where the map has a kink or a jump nearby, a quotient is off and the product is not, so a
    token that differs is tried again, along other vectors and with other steps.
    """
    noise = torch.Generator().manual_seed(0)
    found = torch.full(products.point.shape[:1], torch.inf, dtype=products.point.dtype, device=products.point.device)
    for share in (*_STEPS, WIDER) if products.point.dtype == torch.float64 else _STEPS:
        vectors = torch.randn(products.point.shape, generator=noise, dtype=torch.float64).to(products.point)
        vectors = functional.normalize(vectors, dim=-1)
        quotients = DifferenceProducts(own, products.point, step=step * share)
        product, quotient = products(vectors), quotients(vectors)
        apart, size, point, image = (
            torch.linalg.vector_norm(each, dim=-1)
            for each in (product - quotient, quotient, products.point, quotients.image)
        )
        # A state that overflowed has no derivative to be confirmed.
        is_rounding = (apart <= quotients.accuracy * image / point) | ~apart.isfinite()
        found = torch.minimum(found, torch.where(is_rounding, 0.0, apart / size))
        if bool((found <= _AGREE).all()):
            return float(found.max())
    return torch.inf


def transposed_products(image: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """`J^T u` for a u of zeros, and that u, where J is the derivative of `image` by `point`.

    `J v` is the gradient of the first by the second along v, the transpose of `u -> J^T u`, which is linear in u: the
    backward pass is recorded once, with all that the map computed on its way, and differentiated backwards for each
    product. That takes the place of a forward-mode product, whose value it is, and costs about a fourth of
    `torch.func.jvp`, which computes the map anew each time.
    """
    cotangent = torch.zeros_like(image, requires_grad=True)
    # The gradient of a weighted sum is that along the weights. Given as weights they would have torch import its
    # symbolic shapes, which takes as long as many products.
    (pulled,) = torch.autograd.grad((image * cotangent).sum(), point, create_graph=True, materialize_grads=True)
    return pulled, cotangent


@dataclass(frozen=True)
class RitzValues:
    """Eigenvalues of J restricted to a Krylov space, the largest modulus first, and how good they are."""

    values: Complex128[Tensor, "token pair"]
    residuals: Float64[Tensor, "token pair"]
    """`|J x - theta x|` for the Ritz vector x of length one. Zero to rounding for an eigenvalue of J."""
    errors: Float64[Tensor, "token pair"]
    """Estimated distance of the Ritz value from an eigenvalue: residual, and what products are off by, times the
    condition of the eigenvalue in the space. To first order it bounds the distance; infinite where eigenvectors
    coincide and the residual is not zero."""

    def known(self, tolerance: float) -> Bool[Tensor, " token"]:
        """Whether the leading eigenvalue's error is at most that share of it. Where a state overflowed there is none to
        wait for."""
        return ~(self.errors[:, 0] > tolerance * self.values[:, 0].abs())


class KrylovSpace:
    """What Arnoldi's method has found of every token so far (Saad, Numerical Methods for Large Eigenvalue Problems,
    section 6.2): coefficients, and the first m vectors, orthogonalised by classical Gram-Schmidt, twice, which keeps
    them orthogonal to rounding (Giraud et al. 2005).

    Memory: `most` times (token, width).
    """

    def __init__(self, start: TokenVectors, spare: TokenVectors, most: int) -> None:
        """Needs `most <= width`.

        - `start`: first vectors, not zero. Their space holds their powers `J^k start`.
        - `spare`: vectors in general position; shifted around, they give directions to continue with where the space is
          closed under J before its dimension is reached. The subdiagonal entry is zero there, and all Ritz values hold.
        - `most`: the largest dimension.
        """
        tokens, width = start.shape
        self.columns = 0
        self._spare = spare
        self._basis = start.new_empty(tokens, most, width)
        self._basis[:, 0] = start / torch.linalg.vector_norm(start, dim=-1, keepdim=True)
        # A few numbers a token, on the CPU in float64: eigenvalues are taken there, and would lose digits in float32.
        self._coefficients = torch.zeros(tokens, most + 1, most, dtype=torch.float64)
        self._largest = torch.zeros(tokens, dtype=start.dtype, device=start.device)

    @property
    def coefficients(self) -> Hessenberg:
        return self._coefficients[:, : self.columns + 1, : self.columns]

    @property
    def basis(self) -> Basis:
        return self._basis[:, : self.columns]

    def of(self, some: Bool[Tensor, " token"]) -> KrylovSpace:
        """Of those tokens alone."""
        space, there = copy.copy(self), some.to(self._basis.device)
        space._spare, space._basis, space._largest = (each[there] for each in (self._spare, self._basis, self._largest))
        space._coefficients = self._coefficients[some]
        return space

    def grow(self, product: Callable[[TokenVectors], TokenVectors], columns: int) -> None:
        """To that many dimensions, by `J_i v_i` of every token."""
        basis = self._basis
        roundoff = _INVARIANT * torch.finfo(basis.dtype).eps
        for column in range(self.columns, columns):
            image = product(basis[:, column])
            # Rounding is relative to the map, not to this image, which may be small: so what is new is held against the
            # largest image so far.
            self._largest = torch.maximum(self._largest, torch.linalg.vector_norm(image, dim=-1))
            rest, along = _orthogonal(basis[:, : column + 1], image)
            length = torch.linalg.vector_norm(rest, dim=-1)
            closed = length <= roundoff * self._largest
            self._coefficients[:, : column + 1, column] = along.double().cpu()
            self._coefficients[:, column + 1, column] = length.masked_fill(closed, 0.0).double().cpu()
            if column + 1 < basis.shape[1]:
                if bool(closed.any()):
                    # What is left is rounding, and so is its direction. Rolled, one spare vector a token is another one
                    # each time.
                    other, _ = _orthogonal(basis[:, : column + 1], self._spare.roll(column, dims=-1))
                    rest = torch.where(closed[:, None], other, rest)
                    length = torch.linalg.vector_norm(rest, dim=-1)
                basis[:, column + 1] = rest / length[:, None]
        self.columns = columns


def ritz_values(coefficients: Hessenberg, accuracy: float = 0.0) -> RitzValues:
    """Eigenvalues of the square part, with residual `h_(m+1,m) |y_m|` for the eigenvector y of length one.

    `accuracy` is the relative error of the products. NaN where a coefficient is not finite.
    """
    # The eigenvalues of all tokens are taken in one call, which refuses them all for one NaN.
    known = torch.isfinite(coefficients).all(-1).all(-1)[:, None]
    coefficients = coefficients.where(known[..., None], 0.0)
    values, vectors = torch.linalg.eig(coefficients[:, :-1])
    residuals = coefficients[:, -1, -1, None] * vectors[:, -1].abs()
    # Rows of the inverse are the left eigenvectors that make a product of one with the right ones. Where eigenvectors
    # coincide there is no inverse, which `inv` would end everything for.
    left, _ = torch.linalg.inv_ex(vectors)
    conditions = torch.linalg.vector_norm(left, dim=-1).nan_to_num(nan=torch.inf, posinf=torch.inf)
    # 0 times infinity: in a space that is closed, an eigenvalue is exact however ill-conditioned it is.
    unseen = torch.where(residuals > 0, residuals * conditions, 0.0)
    # A double eigenvalue, whose condition says nothing, moves by the square root of what moves the matrix.
    size = torch.linalg.vector_norm(coefficients, dim=1).amax(-1, keepdim=True)
    errors = unseen + size * (accuracy * conditions).clamp(max=accuracy**0.5)
    order = values.abs().argsort(dim=-1, descending=True, stable=True)
    values, residuals, errors = (
        each.gather(-1, order).masked_fill(~known, torch.nan) for each in (values, residuals, errors)
    )
    return RitzValues(values, residuals, errors)


def _orthogonal(basis: Basis, vectors: TokenVectors) -> tuple[TokenVectors, Float[Tensor, "token column"]]:
    """What of the vectors is orthogonal to the basis, and their coefficients in it."""
    along = torch.zeros(basis.shape[:2], dtype=vectors.dtype, device=vectors.device)
    # Once is not enough where most of a vector lies in the basis: what is left then has the rounding of what was taken.
    for _ in range(2):
        again = basis @ vectors[..., None]
        vectors = vectors - (again.mT @ basis)[:, 0]
        along = along + again[..., 0]
    return vectors, along
