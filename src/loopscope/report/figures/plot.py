"""A figure as the page holds it: what it asks, how to read it, and the plot."""

from __future__ import annotations

import base64
import html
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup

from loopscope._util.wording import visible


@runtime_checkable
class Drawn(Protocol):
    """What a section holds: plots, and what has a template of its own."""

    @property
    def anchor(self) -> str:
        """Unique on the page; answers link to it."""

    @property
    def has_data(self) -> bool:
        """Whether there is anything to draw."""

    @property
    def template(self) -> str:
        """Of `report/templates`; it is given this object as `figure`."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One plot of the report."""

    template: ClassVar[str] = "plot.html"

    anchor: str
    """Unique on the page; answers link to it."""
    title: str
    """What it asks or shows, in a sentence."""
    caption: str
    """How to read it."""
    plot: go.Figure
    height: int = 340
    """In CSS pixels."""
    picks: str = ""
    """The stage of whose heads a click picks one: the plot's custom data begin with layer and head."""

    @property
    def has_data(self) -> bool:
        """Whether there is a finite number to draw: a study whose prompts diverged has figures without any."""
        drawn = (trace.z if "z" in trace else trace.y for trace in self.plot.data)
        return any(bool(np.isfinite(np.asarray(values, dtype=np.float64)).any()) for values in drawn)

    @property
    def json(self) -> Markup:
        """The plot for a script element: no character in it can end the element, or start another."""
        return _script_text(str(self.plot.to_json()))


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
    figures: Sequence[Drawn] = ()


def script_json(value: Any) -> Markup:
    """A value as JSON for a script element, safe as the plots are."""
    return _script_text(json.dumps(value, allow_nan=False))


def packed(content: bytes) -> str:
    """Compressed (zlib), as base64: what `unpacked` in common.js takes apart."""
    return base64.b64encode(zlib.compress(content, 9)).decode()


def _script_text(text: str) -> Markup:
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def plot_text(text: str, longest: int = 40) -> str:
    """A text from outside (a token, a prompt, a name) for plotly, which reads a little HTML: escaped, white space
    made visible, cut to `longest` characters."""
    return html.escape(visible(text, longest), quote=False)
