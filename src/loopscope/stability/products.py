"""Products with the Jacobian of a map that takes each token's state by itself, without forming it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["DifferenceProducts", "ExactProducts", "OwnMap", "Products", "TokenVectors", "transposed_products"]

TokenVectors = Float[Tensor, "token width"]

OwnMap = Callable[[TokenVectors], TokenVectors]
"""States of some tokens to their states one recurrence later, each by its own alone, as far as derivatives go."""


_ROUNDINGS = 20.0
"""Of which the error of a product is made up: in four layers, products in float32 and float64 differ by 1 to 12.
"""


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


def transposed_products(image: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """`J^T u` for a u of zeros, and that u, where J is the derivative of `image` by `point`.

    `J v` is the gradient of the first by the second along v, the transpose of `u -> J^T u`, which is linear in u: the
    backward pass is recorded once, with all that the map computed on its way, and differentiated backwards for each
    product. That takes the place of a forward-mode product, whose value it is, and costs about a fourth of
    `torch.func.jvp`, which computes the map anew each time.
    """
    cotangent = torch.zeros_like(image, requires_grad=True)
    (pulled,) = torch.autograd.grad(image, point, cotangent, create_graph=True, materialize_grads=True)
    return pulled, cotangent


class ExactProducts:
    """By automatic differentiation (see `transposed_products`)."""

    def __init__(self, own: OwnMap, point: TokenVectors) -> None:
        with torch.enable_grad():
            self.point = point.detach().clone().requires_grad_()
            image = own(self.point)
            self.image = image.detach()
            self.accuracy = _ROUNDINGS * torch.finfo(point.dtype).eps
            self._recorded = transposed_products(image, self.point) if image.requires_grad else None

    def __call__(self, vectors: TokenVectors) -> TokenVectors:
        # A map that does not look at the state, as with its input frozen, has no gradient at all.
        if self._recorded is None or not self._recorded[0].requires_grad:
            return torch.zeros_like(vectors)
        pulled, cotangent = self._recorded
        (product,) = torch.autograd.grad(pulled, cotangent, vectors, retain_graph=True, materialize_grads=True)
        return product.detach()


class DifferenceProducts:
    """By central differences, `(F(x + h v) - F(x - h v)) / 2 h`, for maps that cannot be differentiated twice.

    With `h |v| = eps^(1/3) |x|`, where rounding and curvature weigh about the same, a product is good to about
    eps^(2/3): 4e-11 in float64, 2e-5 in float32.
    """

    def __init__(self, own: OwnMap, point: TokenVectors) -> None:
        self._own = own
        self.point = point.detach()
        self.image = self._value(self.point)
        eps = torch.finfo(point.dtype).eps
        self.accuracy = _ROUNDINGS * eps ** (2 / 3)
        self._size = eps ** (1 / 3) * torch.linalg.vector_norm(self.point, dim=-1)

    def __call__(self, vectors: TokenVectors) -> TokenVectors:
        length = torch.linalg.vector_norm(vectors, dim=-1)
        step = torch.where(length > 0, self._size / length, 0.0)[:, None]
        ahead, behind = (self._value(self.point + sign * step * vectors) for sign in (1, -1))
        return torch.where(step > 0, (ahead - behind) / (2 * step), 0.0)

    def _value(self, point: TokenVectors) -> TokenVectors:
        with torch.no_grad():
            return self._own(point)
