"""Interventions: what a run changes in a model's computation, as data without torch."""

from loopscope.models.interventions.kinds import (
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
from loopscope.models.interventions.parsing import parse_intervention, parse_interventions

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
    "parse_intervention",
    "parse_interventions",
]
