"""What eigenvalues are computed with, stored with what they are."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from loopscope.errors import ConfigError

__all__ = ["EigenvalueSettings"]


@dataclass(frozen=True, kw_only=True)
class EigenvalueSettings:
    """How the point is reached and how the eigenvalues there are found.

    Raises `ConfigError` for a value outside its range.
    """

    recurrences: int = 128
    """Recurrences before the point: the horizon, whose state stands in for the fixed point."""
    products: int = 40
    """Products of the Jacobian with one vector a token; all tokens of a batch share each. At most the width, with
    which every eigenvalue is exact. 40 find a leading eigenvalue that stands 5 % above the others to 1e-4 in nearly all
    tokens of random models of width 128, and 60 in all."""
    seed: int = 0
    """Of the initial state, and of the random part of the first vectors."""
    random_share: float = 0.03
    """Size of the random part beside the last step, which the recurrences have turned towards the leading
    eigenvectors. With little of it they are found soonest; with none, those that the step lacks never are."""
    settled: float = 1e-4
    """If a token's relative step at the point is larger, a fixed point is searched from there. An eigenvalue changes by
    about as much as the state, so a smaller step changes no rate in its third decimal."""
    search: int = 200
    """Recurrences that the search may evaluate; 0 takes the point as it is. Where small random models have a fixed
    point that repels, half of them need up to 40, and one in ten more than 130."""
    basis_bytes: int = 2**30
    """Prompts are taken in groups whose basis vectors fill at most so much memory; one prompt at the least."""

    def rows_at_once(self, tokens: int, width: int) -> int:
        """Prompts of so many tokens in one group."""
        bytes_of_one = min(self.products, width) * tokens * width * 8
        return max(1, self.basis_bytes // bytes_of_one)

    def __post_init__(self) -> None:
        for name, least in (("recurrences", 1), ("products", 1), ("seed", 0), ("search", 0), ("basis_bytes", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{field.name} must be a positive finite number, got {value}.")
