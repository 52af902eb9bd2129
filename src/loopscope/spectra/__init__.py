"""What eigenvalues of a recurrence say, and what a trajectory's steps say, as functions of arrays.

No torch is needed here, so that answers and reports can use them. Where eigenvalues come from is `loopscope.stability`,
which has these names too.
"""

from loopscope.spectra.damping import best_damping, damped, damping_needed, spectral_radius, undamped
from loopscope.spectra.prediction import (
    PREDICTED_KINDS,
    Kind,
    Prediction,
    StabilityCriterion,
    period,
    predict,
    predicted_rate,
    stability_margin,
)
from loopscope.spectra.rates import ObservedRates, RateReason, RateSettings, observed_rate

__all__ = [
    "PREDICTED_KINDS",
    "Kind",
    "ObservedRates",
    "Prediction",
    "RateReason",
    "RateSettings",
    "StabilityCriterion",
    "best_damping",
    "damped",
    "damping_needed",
    "observed_rate",
    "period",
    "predict",
    "predicted_rate",
    "spectral_radius",
    "stability_margin",
    "undamped",
]
