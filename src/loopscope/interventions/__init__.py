"""Interventions: what a run changes in a model's computation, as data without torch. `loopscope.model` applies them."""

from loopscope.interventions.fitting import check_fits, check_recurrences, check_tokens
from loopscope.interventions.kinds import (
    Damp,
    FreezeInjection,
    Intervention,
    Recurrences,
    ReplaceToken,
    ScaleBranch,
    StartFrom,
    StartScaled,
    StartSeed,
)
from loopscope.interventions.parsing import parse_intervention, parse_interventions

__all__ = [
    "Damp",
    "FreezeInjection",
    "Intervention",
    "Recurrences",
    "ReplaceToken",
    "ScaleBranch",
    "StartFrom",
    "StartScaled",
    "StartSeed",
    "check_fits",
    "check_recurrences",
    "check_tokens",
    "parse_intervention",
    "parse_interventions",
]
