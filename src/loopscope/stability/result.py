"""Eigenvalues of one recurrence for every token of some prompts, and how good they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from jaxtyping import Bool, Complex128, Float, Float64
from numpy import ndarray

from loopscope.spectra import Prediction, StabilityCriterion, predict, predicted_rate, spectral_radius
from loopscope.stability.approach import Derivative, Site
from loopscope.stability.settings import EigenvalueSettings

__all__ = ["Stability"]


@dataclass(frozen=True, eq=False)
class Stability:
    """What `leading_eigenvalues` returns. Arrays are NaN at padding, and where a state overflowed."""

    eigenvalues: Complex128[ndarray, "prompt token pair"]
    """Ritz values, as many as products were made, by decreasing modulus; of a pair, positive imaginary part first. The
    first are eigenvalues to within their errors, the last fill the inside of the spectrum."""
    residuals: Float64[ndarray, "prompt token pair"]
    """`|J x - lambda x|` for the Ritz vector x of length one."""
    errors: Float64[ndarray, "prompt token pair"]
    """Estimated distance to an eigenvalue: the residual and the error of products, times the eigenvalue's condition."""
    relative_step: Float64[ndarray, "prompt token"]
    """`|F(x) - x| / |x|` at the point x: 0 at a fixed point."""
    moved: Float64[ndarray, "prompt token"]
    """How far the point is from the state that the run came to, relative to that; 0 where nothing was searched."""
    searched: Bool[ndarray, " prompt"]
    """The point was found by a search, since the run's own state still moved."""
    mask: Bool[ndarray, "prompt token"]
    """True for tokens."""
    point: Float[ndarray, "prompt token width"]
    """x."""
    recurrences: int
    """How many were run before the point, or before the search for it."""
    site: Site
    derivative: Derivative
    """How products were made: by automatic differentiation, or, where a hooked model does not allow it, by differences.
    """
    dtype: str
    """Arithmetic of the derivative: float64 for a float64 model, else float32."""
    settings: EigenvalueSettings

    @property
    def products(self) -> int:
        """Products with the Jacobian that were made."""
        return int(self.eigenvalues.shape[-1])

    @property
    def radius(self) -> Float[ndarray, "prompt token"]:
        """Each token's own spectral radius."""
        return spectral_radius(self.eigenvalues)

    @property
    def predicted_rate(self) -> Float[ndarray, "prompt token"]:
        """The largest radius of a token and those before it."""
        return predicted_rate(self.eigenvalues)

    def predict(self, criterion: StabilityCriterion | None = None) -> Prediction:
        """Rate, kind and period of every token."""
        return predict(self.eigenvalues, self.errors, self.relative_step, criterion)

    @classmethod
    def joined(cls, parts: Sequence[Stability]) -> Stability:
        """Groups of prompts that were taken one after the other, with the same settings."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]

        def all_of(name: str) -> ndarray:
            return np.concatenate([cast(ndarray, getattr(part, name)) for part in parts])

        return cls(
            eigenvalues=all_of("eigenvalues"),
            residuals=all_of("residuals"),
            errors=all_of("errors"),
            relative_step=all_of("relative_step"),
            moved=all_of("moved"),
            searched=all_of("searched"),
            mask=all_of("mask"),
            point=all_of("point"),
            recurrences=first.recurrences,
            site=first.site,
            derivative="differences" if any(part.derivative == "differences" for part in parts) else "exact",
            dtype=first.dtype,
            settings=first.settings,
        )
