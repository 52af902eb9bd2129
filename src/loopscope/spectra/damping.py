"""What damping the loop, `s <- (1 - eta) s + eta F(s)`, does to eigenvalues.

An eigenvector of the Jacobian J of F is one of `(1 - eta) I + eta J` too, so eigenvalues move and nothing else does.
Krylov spaces are the same as well: Arnoldi's method on the damped map would find the moved Ritz values of F, with eta
times their residuals. And whatever the eta, the largest modulus is reached at a corner of the eigenvalues' convex hull,
and corners are what Krylov spaces find first. So one set of eigenvalues answers for every eta.

In all functions the last dimension is that of a token's eigenvalues, and NaN among them is left out.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Inexact
from numpy import ndarray

from loopscope.errors import ConfigError

__all__ = ["best_damping", "damped", "damping_needed", "spectral_radius", "undamped"]

Eigenvalues = Inexact[ndarray, "*shape pair"]
Values = Float[ndarray, "*shape"]

_SECTIONS = 60
"""Of the interval that holds the best eta, by the golden ratio each: to 3e-13, which moves no radius."""


def damped(eigenvalues: Eigenvalues, eta: float) -> Eigenvalues:
    """`1 - eta + eta lambda`: the eigenvalues of the damped loop."""
    _check_eta(eta)
    moved: np.ndarray = 1 - eta + eta * eigenvalues
    return moved


def undamped(eigenvalues: Eigenvalues, eta: float) -> Eigenvalues:
    """The inverse of `damped`: what the eigenvalues of a damped loop were without the damping."""
    _check_eta(eta)
    moved: np.ndarray = 1 - (1 - eigenvalues) / eta
    return moved


def spectral_radius(eigenvalues: Eigenvalues) -> Values:
    """The largest modulus; NaN where there is no eigenvalue."""
    moduli = np.where(np.isnan(eigenvalues), -np.inf, np.abs(eigenvalues)).max(-1)
    return np.where(moduli < 0, np.nan, moduli)


def damping_needed(eigenvalues: Eigenvalues, radius: float = 1.0) -> Values:
    """The largest eta in (0, 1] with `|1 - eta + eta lambda| <= radius` for all eigenvalues; NaN where none is.

    With `mu = 1 - lambda` the condition is `eta^2 |mu|^2 - 2 eta Re mu + 1 - radius^2 <= 0`: eta lies between

        (Re mu -+ sqrt((Re mu)^2 - |mu|^2 (1 - radius^2))) / |mu|^2.

    The intervals of all eigenvalues are intersected with (0, 1]. For a radius up to 1 there is none if an eigenvalue
    has a real part of 1 or more: damping moves it along a line through 1, which leads into the circle on the other side
    only. With radius 1 the upper end is `2 Re mu / |mu|^2`, and the damped loop is on the brink of stability; a smaller
    radius asks for a rate. Flatten tokens into the last dimension for one eta that does for all of them.
    """
    if not 0 < radius <= 1:
        raise ConfigError(f"radius must be above 0 and at most 1, got {radius}.")
    mu = 1 - eigenvalues
    missing = np.isnan(mu)
    square = np.abs(mu) ** 2
    under = mu.real**2 - square * (1 - radius**2)
    stays = square == 0  # an eigenvalue of 1 stays where it is
    safe = np.where(stays | missing, 1.0, square)
    root = np.sqrt(np.clip(under, 0, None))
    low = np.where(stays, 0.0, (mu.real - root) / safe)
    high = np.where(stays, 1.0, (mu.real + root) / safe)
    possible = np.where(stays, radius == 1, (under >= 0) & (mu.real > 0)) | missing
    largest = np.minimum(np.where(missing, np.inf, high).min(-1), 1.0)
    least = np.where(missing, -np.inf, low).max(-1)
    exists = possible.all(-1) & ~missing.all(-1) & (least <= largest)
    return np.where(exists, largest, np.nan)


def best_damping(eigenvalues: Eigenvalues) -> tuple[Values, Values]:
    """The eta in (0, 1] that makes the damped loop's spectral radius smallest, and that radius; NaN without
    eigenvalues.

    `|1 - eta + eta lambda|` is convex in eta, and so is the largest of several, which the golden section minimises. An
    eta near 0 with a radius of 1 means that no damping makes the loop stable.
    """
    shape, flat = eigenvalues.shape[:-1], eigenvalues.reshape(-1, eigenvalues.shape[-1])
    low, high = np.zeros(len(flat)), np.ones(len(flat))
    share = (np.sqrt(5) - 1) / 2
    for _ in range(_SECTIONS):
        left, right = high - share * (high - low), low + share * (high - low)
        rises = _radius(flat, left) < _radius(flat, right)
        low, high = np.where(rises, low, left), np.where(rises, right, high)
    # The section comes close to an end of the interval and never reaches it.
    whole = _radius(flat, np.ones(len(flat))) <= _radius(flat, (low + high) / 2)
    eta = np.where(whole, 1.0, (low + high) / 2)
    known = ~np.isnan(flat).all(-1)
    best, radius = (np.where(known, each, np.nan).reshape(shape) for each in (eta, _radius(flat, eta)))
    return best, radius


def _radius(eigenvalues: ndarray, eta: ndarray) -> ndarray:
    """Of the damped loop, with an eta for each token."""
    moved: ndarray = 1 - eta[:, None] * (1 - eigenvalues)
    largest: ndarray = np.where(np.isnan(moved), -np.inf, np.abs(moved)).max(-1)
    return largest


def _check_eta(eta: float) -> None:
    if not 0 < eta <= 1:
        raise ConfigError(f"eta must be above 0 and at most 1, got {eta}.")
