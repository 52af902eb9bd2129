"""Eigenvalues of one recurrence for every token of some prompts, and how good they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from jaxtyping import Bool, Complex128, Float, Float64
from numpy import ndarray

from loopscope._util.ranges import Count, Positive, Range, check_ranges
from loopscope.dynamics.eigenvalues.recurrence import Derivative, StateSite
from loopscope.dynamics.prediction import Prediction, StabilityCriterion, predict, spectral_radius


@dataclass(frozen=True, kw_only=True)
class EigenvalueSettings:
    """How the point is reached and how the eigenvalues there are found.

    Raises `ConfigError` for a value outside its range.
    """

    recurrences: Count = 128
    """Recurrences before the point: the horizon, whose state stands in for the fixed point."""
    products: Count = 40
    """Products of the Jacobian with one vector a token, at most. At most the width, with which every eigenvalue is
    exact. 40 find a leading eigenvalue that stands 5 % above the others to 1e-4 in nearly all tokens of random models
    of width 128, and 60 in all."""
    least: Count = 24
    """Products that every token gets, where there are so many. With 16, one leading eigenvalue in eight of
    `demo:uninjected` is another one than the largest, since a nearby one is found first; with 24 none."""
    tolerance: Annotated[float, Range(0)] = 1e-3
    """A token gets no more products once the estimated error of its leading eigenvalue is at most this share of it; 0
    makes all products."""
    far: Annotated[float, Range(0)] = 0.02
    """A token gets no more than the least products where a recurrence moves it, or a token before it, by more than this
    share of its norm: there is no fixed point, and `StabilityCriterion.largest_step` lets nothing be predicted."""
    every: Annotated[int, Range(0)] = 1
    """Eigenvalues are taken of every n-th token of a prompt, counted from its last; with 0 of the last alone."""
    seed: Annotated[int, Range(0)] = 0
    """Of the initial state, and of the random part of the first vectors."""
    random_share: Positive = 0.03
    """Size of the random part beside the last step, which the recurrences have turned towards the leading
    eigenvectors. With little of it they are found soonest; with none, those that the step lacks never are."""
    settled: Positive = 1e-4
    """If a token's relative step at the point is larger, a fixed point is searched from there. An eigenvalue changes by
    about as much as the state, so a smaller step changes no rate in its third decimal."""
    search: Annotated[int, Range(0)] = 200
    """Recurrences of a whole prompt to which the evaluations of its tokens may add up in the search; 0 takes the point
    as it is."""
    block_bytes: Annotated[int, Range(1)] = 2**30
    """Tokens of a native model are taken in blocks whose basis vectors, and what is recorded for their derivative, take
    about so much memory at most; one token at the least."""

    def at_once(self, bytes_of_one: int) -> int:
        """Tokens of a block, at most."""
        return max(1, self.block_bytes // bytes_of_one)

    def blocks(self, tokens: int, bytes_of_one: int) -> int:
        """How many of about one size so many tokens make."""
        return -(-tokens // self.at_once(bytes_of_one))

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, eq=False)
class Stability:
    """What `leading_eigenvalues` returns. Arrays are NaN at padding, where a state overflowed, and, but for
    `relative_step` and `moved`, at tokens that were not to be taken."""

    eigenvalues: Complex128[ndarray, "prompt token pair"]
    """Ritz values, as many as products were made and NaN behind them, by decreasing modulus; of a pair, positive
    imaginary part first. The first are eigenvalues to within their errors, the last fill the inside of the spectrum."""
    residuals: Float64[ndarray, "prompt token pair"]
    """`|J x - lambda x|` for the Ritz vector x of length one."""
    errors: Float64[ndarray, "prompt token pair"]
    """Estimated distance to an eigenvalue: the residual and the error of products, times the eigenvalue's condition."""
    products_made: Float64[ndarray, "prompt token"]
    """Products with the Jacobian from which they were found: fewer than allowed where the leading one was known."""
    singular_value: Float64[ndarray, "prompt token"]
    """Largest singular value of the token's own block, from below: what one recurrence may enlarge a disturbance by. By
    differences, `krylov_singular_value`."""
    krylov_singular_value: Float64[ndarray, "prompt token"]
    """That of the block on the Krylov space, the largest factor by which one recurrence stretches a vector of it."""
    krylov_departure: Float64[ndarray, "prompt token"]
    """Henrici's number of the Krylov space, `sqrt(1 - sum |lambda|^2 / |H|^2)` in the Frobenius norm: 0 of a normal
    matrix, 1 of a nilpotent one. That of the block with as many products as the width; with fewer mostly smaller, and
    not 0 of each normal block, since part of a normal matrix need not be normal."""
    noise_gain: Float64[ndarray, "prompt token"]
    """Root mean square of the motion about the point that independent noise in every dimension keeps up, over that of
    the noise: `sqrt(tr P / m)`, `P = H P H^T + 1`, in the Krylov space of m dimensions. At least 1; NaN where the
    radius is 1 or more, since nothing comes to rest there."""
    transient_growth: Float64[ndarray, "prompt token"]
    """Largest factor by which a disturbance has grown after 1, 2, 4, ... recurrences, fewer than products were made:
    of all for 1, of those in the Krylov space for more, and so from below."""
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
    site: StateSite
    derivative: Derivative
    """How products were made: by automatic differentiation, or, where a hooked model does not allow it, by differences.
    """
    dtype: str
    """Arithmetic of the derivative: float64 for a float64 model, else float32."""
    settings: EigenvalueSettings

    @property
    def products(self) -> int:
        """Products with the Jacobian that a token may have."""
        return int(self.eigenvalues.shape[-1])

    @property
    def radius(self) -> Float[ndarray, "prompt token"]:
        """Each token's own spectral radius."""
        return spectral_radius(self.eigenvalues)

    @property
    def predicted_rate(self) -> Float[ndarray, "prompt token"]:
        """The largest radius of a token and those before it; NaN where one of these was not taken."""
        return self.predict().rate

    def predict(self, criterion: StabilityCriterion | None = None) -> Prediction:
        """Rate, kind and period of every token."""
        return predict(self.eigenvalues, self.errors, self.relative_step, criterion)
