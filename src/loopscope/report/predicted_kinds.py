"""How the kinds that eigenvalues predict look: those of what tokens do, where one stands for the other."""

from __future__ import annotations

from loopscope.report.kinds import KIND_LOOKS
from loopscope.spectra import Kind as Predicted
from loopscope.verdicts import Kind

__all__ = ["PREDICTED_LOOKS"]

PREDICTED_LOOKS: dict[Predicted, tuple[str, str]] = {
    Predicted.FIXED_POINT: (KIND_LOOKS[Kind.FIXED_POINT].colour, "circle"),
    Predicted.DAMPED_ROTATION: (KIND_LOOKS[Kind.AT_FLOOR].colour, "circle"),
    Predicted.SLIDER: (KIND_LOOKS[Kind.SLIDER].colour, "triangle-right"),
    Predicted.ORBIT: (KIND_LOOKS[Kind.ORBIT].colour, "diamond"),
    Predicted.PERIOD_TWO: (KIND_LOOKS[Kind.BOUNDED].colour, "diamond"),
    Predicted.UNSTABLE: (KIND_LOOKS[Kind.DIVERGING].colour, "triangle-up"),
    Predicted.FAR: (KIND_LOOKS[Kind.UNKNOWN].colour, "x-thin-open"),
    Predicted.UNRESOLVED: (KIND_LOOKS[Kind.UNKNOWN].colour, "x"),
}
"""Colour, and plotly's name of a marker."""
