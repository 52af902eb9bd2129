"""What the eigenvalues of a study's tokens predict, beside what their trajectories did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray
from numpy.typing import NDArray

from loopscope.dynamics.observed_rate import RateReason
from loopscope.dynamics.prediction import KNOWN_CODES, PREDICTED_KINDS, PredictedKind, spectral_radius
from loopscope.dynamics.verdicts import KINDS, Kind
from loopscope.errors import StudyError

_SETTLES = frozenset(kind for kind in KINDS if kind.settles)
_MOVES = frozenset(kind for kind in KINDS if kind.moves)
# Turns that grow end on a closed curve, or, where that is unstable too, on something wilder; they do not slide.
_TURNS = _MOVES - {Kind.SLIDER}
EXPECTED: dict[PredictedKind, frozenset[Kind]] = {
    PredictedKind.FIXED_POINT: _SETTLES,
    PredictedKind.DAMPED_ROTATION: _SETTLES,
    # An eigenvalue that cannot be told from 1 lets a state rest.
    PredictedKind.SLIDER: _SETTLES | {Kind.SLIDER},
    PredictedKind.ORBIT: _TURNS,
    PredictedKind.PERIOD_TWO: _TURNS,
    PredictedKind.UNSTABLE: _MOVES,
}
"""Verdicts that confirm a prediction. The other two predictions say nothing that could be wrong."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Tokens, by whether their verdict confirms their prediction."""

    agree: int
    disagree: int
    open: int
    """One of the two is that it is not known."""


@dataclass(frozen=True, slots=True, eq=False)
class RatePairs:
    """Predicted and observed rate of the tokens that have both.

    They settle by prediction, and their steps show a rate.
    """

    predicted: NDArray[np.float64]
    observed: NDArray[np.float64]
    uncertainty: NDArray[np.float64]
    """Of the observed rate."""
    prompt: NDArray[np.int64]
    token: NDArray[np.int64]

    @property
    def median_difference(self) -> float:
        """Median of `|predicted - observed|`; NaN without tokens."""
        return float(np.median(np.abs(self.predicted - self.observed))) if self.predicted.size else float("nan")

    @property
    def bias(self) -> float:
        """Median of `observed - predicted`; NaN without tokens."""
        return float(np.median(self.observed - self.predicted)) if self.predicted.size else float("nan")

    @property
    def correlation(self) -> float:
        """Pearson's; NaN where the rates do not differ."""
        if self.predicted.size < 2 or np.ptp(self.predicted) == 0 or np.ptp(self.observed) == 0:
            return float("nan")
        return float(np.corrcoef(self.predicted, self.observed)[0, 1])


def prediction_table(data: xarray.Dataset) -> NDArray[np.int64]:
    """Tokens by predicted kind and by verdict after the last recurrent layer, (place in `PREDICTED_KINDS`, place in
    `KINDS`); those that `near_the_circle` finds are predicted nothing. Raises `StudyError` for a study that lacks
    either."""
    unresolved = PREDICTED_KINDS.index(PredictedKind.UNRESOLVED)
    predicted = np.where(near_the_circle(data), unresolved, _of(data, "predicted_kind"))
    if "verdict" not in data:
        raise StudyError("The study has no verdicts to compare predictions with; analyze without --skip behaviour.")
    verdict = data["verdict"].isel(judged_layer=-1).transpose("prompt", "token").values
    there = (predicted >= 0) & (verdict >= 0)
    table = np.zeros((len(PREDICTED_KINDS), len(KINDS)), dtype=np.int64)
    np.add.at(table, (predicted[there], verdict[there]), 1)
    return table


def near_the_circle(data: xarray.Dataset) -> NDArray[np.bool_]:
    """Tokens whose eigenvalue turns near the unit circle and is not known to lie outside, (prompt, token): the point
    may as well attract. Raises `StudyError` for a study without predictions."""
    kind, rate, error = (_of(data, name) for name in ("predicted_kind", "predicted_rate", "predicted_rate_error"))
    turns = [PREDICTED_KINDS.index(each) for each in (PredictedKind.ORBIT, PredictedKind.PERIOD_TWO)]
    return np.asarray(np.isin(kind, turns) & (rate - error <= 1))


def agreement(table: NDArray[np.int64]) -> Agreement:
    """Of what `prediction_table` counts."""
    agree = sum(
        int(table[PREDICTED_KINDS.index(predicted), KINDS.index(verdict)])
        for predicted, verdicts in EXPECTED.items()
        for verdict in verdicts
    )
    predicts = [PREDICTED_KINDS.index(predicted) for predicted in EXPECTED]
    known = int(np.delete(table[predicts], KINDS.index(Kind.UNKNOWN), axis=1).sum())
    return Agreement(agree, known - agree, int(table.sum()) - known)


def rate_pairs(data: xarray.Dataset) -> RatePairs:
    """Raises `StudyError` for a study without predictions."""
    names = ("predicted_kind", "predicted_rate", "observed_rate", "observed_rate_uncertainty", "observed_rate_reason")
    kind, predicted, observed, uncertainty, reason = (_of(data, name) for name in names)
    settles = np.isin(kind, [code for code, each in enumerate(PREDICTED_KINDS) if each.settles])
    both = settles & (reason == list(RateReason).index(RateReason.FITTED)) & np.isfinite(predicted)
    prompt, token = np.nonzero(both)
    return RatePairs(predicted[both], observed[both], uncertainty[both], prompt, token)


def token_eigenvalues(data: xarray.Dataset) -> NDArray[np.complex128]:
    """Those that a study keeps, (prompt, token, pair). Raises `StudyError` for a study without."""
    real, imaginary = (_of(data, f"eigenvalue_{part}", "pair") for part in ("real", "imag"))
    return np.asarray(real + 1j * imaginary)


def untaken_tokens(data: xarray.Dataset) -> int:
    """How many tokens have a point whose eigenvalues were not to be taken (`--eigenvalue-every`)."""
    if "eigenvalue_products" not in data:
        return 0
    return int((data["point_step"].notnull() & data["eigenvalue_products"].isnull()).sum())


def token_drivers(data: xarray.Dataset) -> NDArray[np.int64]:
    """The token whose eigenvalue sets the rate of each, (prompt, token): the one of largest spectral radius among the
    token itself and those before it; -1 where no eigenvalue of a fixed point is known. Raises `StudyError` for a study
    without eigenvalues."""
    known = np.isin(_of(data, "predicted_kind"), KNOWN_CODES)
    radius = np.where(known, spectral_radius(token_eigenvalues(data)), np.nan)
    leads = known & (radius >= np.fmax.accumulate(radius, axis=1))
    source = np.maximum.accumulate(np.where(leads, np.arange(radius.shape[1]), -1), axis=1)
    return np.where(known, source, -1)


def _of(data: xarray.Dataset, name: str, *more: str) -> NDArray[Any]:
    if name not in data:
        raise StudyError(
            "The study has no eigenvalues: its model has no loop or is hooked, the part stability was skipped, or it "
            "was made by an older loopscope; run `loopscope analyze` into a new folder."
        )
    return np.asarray(data[name].transpose("prompt", "token", *more).values)
