"""Local stability: leading eigenvalues of one recurrence for every token, and what they predict.

`leading_eigenvalues` computes them for a model and prompts. The rest are functions of arrays: what a token's state
will do (`predict`), what damping would change (`damped`, `damping_needed`), and what a trajectory really did
(`observed_rate`).
"""

from loopscope.spectra import (
    Kind,
    ObservedRates,
    Prediction,
    RateReason,
    RateSettings,
    StabilityCriterion,
    best_damping,
    damped,
    damping_needed,
    observed_rate,
    period,
    predict,
    predicted_rate,
    spectral_radius,
    stability_margin,
    undamped,
)
from loopscope.stability.approach import Heading
from loopscope.stability.eigenvalues import eigenvalues_near, leading_eigenvalues
from loopscope.stability.hooked import approach_hooked
from loopscope.stability.native import NativeApproach, approach_native
from loopscope.stability.result import Stability
from loopscope.stability.settings import EigenvalueSettings

__all__ = [
    "EigenvalueSettings",
    "Heading",
    "Kind",
    "NativeApproach",
    "ObservedRates",
    "Prediction",
    "RateReason",
    "RateSettings",
    "Stability",
    "StabilityCriterion",
    "approach_hooked",
    "approach_native",
    "best_damping",
    "damped",
    "damping_needed",
    "eigenvalues_near",
    "leading_eigenvalues",
    "observed_rate",
    "period",
    "predict",
    "predicted_rate",
    "spectral_radius",
    "stability_margin",
    "undamped",
]
