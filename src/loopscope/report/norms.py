"""Figures: the token norm over the recurrences."""

from __future__ import annotations

from loopscope.report.figure import Figure, Section
from loopscope.report.lines import by_layer
from loopscope.report.material import Material

__all__ = ["norms_section"]


def norms_section(material: Material) -> Section:
    """How large the residual stream is in the long run."""
    figure = Figure(
        anchor="norm-by-layer",
        title="By layer: over the recurrences",
        caption="A line per recurrent layer, over all recurrences measured.",
        plot=by_layer(material, "residual_norm", "token norm"),
    )
    return Section(
        anchor="norms",
        short="Norms",
        title="How does the residual stream's norm go on?",
        lead="Mean token norm of the residual stream, median over prompts.",
        figures=[figure],
    )
