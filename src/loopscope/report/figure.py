"""A figure as the page holds it: what it asks, how to read it, and the plot."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup

from loopscope.drawing import visible

__all__ = ["Figure", "Section", "plot_text"]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One plot of the report."""

    anchor: str
    """Unique on the page; answers link to it."""
    title: str
    """What it asks or shows, in a sentence."""
    caption: str
    """How to read it."""
    plot: go.Figure
    height: int = 340
    """In CSS pixels."""

    @property
    def has_data(self) -> bool:
        """Whether there is a finite number to draw: a study whose prompts diverged has figures without any."""
        drawn = (trace.z if "z" in trace else trace.y for trace in self.plot.data)
        return any(bool(np.isfinite(np.asarray(values, dtype=np.float64)).any()) for values in drawn)

    @property
    def json(self) -> Markup:
        """The plot for a script element: no character in it can end the element, or start another."""
        text = str(self.plot.to_json())
        return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


@dataclass(frozen=True, kw_only=True)
class Section:
    """Figures that answer one question together."""

    anchor: str
    short: str
    """Its name in the table of contents."""
    title: str
    lead: str
    columns: Literal[2, 3] = 2
    """Figures beside each other, where the window is wide enough."""
    figures: list[Figure] = field(default_factory=list)


def plot_text(text: str, longest: int = 40) -> str:
    """A text from outside (a token, a prompt, a name) for plotly, which reads a little HTML: escaped, white space
    made visible, cut to `longest` characters."""
    return html.escape(visible(text, longest), quote=False)
