"""Tokens coloured by what they tend to; the one that is picked is drawn beside them by `templates/behaviour.js`.

Serves a study's prompts and the trajectories of other tools alike. The tokens of each group stand in the page once,
compressed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from loopscope._util.wording import p_value_text, significant, visible
from loopscope.dynamics.verdicts import KINDS, Kind
from loopscope.report.figures.look import looks_for_script
from loopscope.report.figures.plot import packed, script_json

FACTS = {
    "level": "still moves by",
    "floor": "noise floor",
    "period": "period (recurrences)",
    "amplitude": "amplitude",
    "speed": "speed per recurrence",
    "rate": "rate per recurrence",
    "p_value": "p-value of its shape",
}
"""Numbers of a verdict that a reader is shown, and what they are called."""

_STEPS = 128
"""Of a longer way, the last that many recurrences are drawn: an orbit of any period that can be told is closed by then,
and the page stays light."""
_FINEST = 2_000
"""A way is stored in whole steps of its greatest reach over this number, and a displacement as 1,000 times its natural
logarithm: finer than a pixel."""


def walked(path: NDArray[np.floating]) -> NDArray[np.floating]:
    """Of a path through the tail, (time, 2), what the run came to before it ended, if all was at rest earlier."""
    return np.asarray(path[np.isfinite(path).all(axis=-1)])


@dataclass(frozen=True, kw_only=True)
class PanelToken:
    """One token, or one trajectory of a file."""

    label: str
    kind: Kind | None
    """None for a token that was not judged."""
    line: str
    """What decided, in a sentence."""
    facts: Sequence[tuple[str, str]] = ()
    path: NDArray[np.floating] | None = None
    """(time, 2), relative to the norm; None where it was not kept."""
    curve: NDArray[np.floating] | None = None
    """Root mean square displacement at lags 1, 2, ..., relative to the norm."""
    floor: float = math.nan
    eigenvalues: NDArray[np.complexfloating] | None = None
    """Of one recurrence; None where none were taken."""


@dataclass(frozen=True, kw_only=True)
class PanelGroup:
    """The tokens of one prompt, or of one file."""

    name: str
    tokens: Sequence[PanelToken]
    first: int = 0
    """Number of the first one."""
    start: int = 0
    """Place among `tokens` of the one that is shown first."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class TokenPanel:
    """A figure with a template of its own."""

    template: ClassVar[str] = "token_panel.html"
    folded: ClassVar[bool] = False
    anchor: ClassVar[str] = "behaviour-tokens"

    title: str
    caption: str
    choose: str
    """What a group is: `Prompt`, `File`."""
    groups: list[str]
    looks: list[dict[str, str]]
    """Colours and letters of the kinds that occur."""
    data: Markup
    """JSON for behaviour.js."""
    eigenvalues: bool
    """Some token has them, so that there is a plot of them."""

    @property
    def has_data(self) -> bool:
        return bool(self.groups)


def token_panel(groups: Sequence[PanelGroup], *, title: str, caption: str, choose: str) -> TokenPanel:
    """What the page needs of some groups of tokens."""
    there = {token.kind for group in groups for token in group.tokens}
    looks = looks_for_script()
    return TokenPanel(
        title=title,
        caption=caption,
        choose=choose,
        groups=[group.name for group in groups],
        looks=[look for kind, look in zip(KINDS, looks, strict=True) if kind in there],
        eigenvalues=any(token.eigenvalues is not None for group in groups for token in group.tokens),
        data=script_json({"looks": looks, "finest": _FINEST, "groups": [_group(group) for group in groups]}),
    )


def facts_of(numbers: dict[str, float]) -> list[tuple[str, str]]:
    """(name, text) of those of a verdict's numbers that it has; lengths are shares of the state's norm."""
    return [
        (text, p_value_text(numbers[name]) if name == "p_value" else significant(float(numbers[name])))
        for name, text in FACTS.items()
        if name in numbers and math.isfinite(numbers[name])
    ]


def _group(group: PanelGroup) -> dict[str, Any]:
    return {
        "first": group.first,
        "start": group.start,
        "note": group.note,
        "tokens": packed(json.dumps([_token(token) for token in group.tokens], allow_nan=False).encode()),
    }


def _token(token: PanelToken) -> dict[str, Any]:
    path, reach = (None, 0.0) if token.path is None else _path(token.path[-_STEPS:])
    curve = None if token.curve is None else _curve(token.curve)
    return {
        "label": visible(token.label, 24),
        "kind": -1 if token.kind is None else KINDS.index(token.kind),
        "line": token.line,
        "facts": [list(fact) for fact in token.facts],
        "path": path,
        "reach": reach,
        "curve": curve,
        "eigenvalues": None if token.eigenvalues is None else _eigenvalues(token.eigenvalues),
        "floor": token.floor if math.isfinite(token.floor) and token.floor > 0 else None,
    }


def _path(path: NDArray[np.floating]) -> tuple[list[list[int]] | None, float]:
    """Whole steps of (reach / `_FINEST`), as x and y, and the reach."""
    if not path.size or not np.isfinite(path).all():
        return None, 0.0
    reach = float(np.abs(path).max())
    steps = np.rint(path / (reach or 1.0) * _FINEST).astype(int)
    return [steps[:, 0].tolist(), steps[:, 1].tolist()], reach


def _curve(curve: NDArray[np.floating]) -> list[int | None] | None:
    """1,000 natural logarithms; None where nothing moves, which has no place on a logarithmic axis."""
    found = [round(1000 * math.log(value)) if math.isfinite(value) and value > 0 else None for value in curve.tolist()]
    return found if any(value is not None for value in found) else None


def _eigenvalues(eigenvalues: NDArray[np.complexfloating]) -> list[list[float]] | None:
    """Real and imaginary parts to a ten-thousandth, the larger moduli first; None where none is known."""
    known = eigenvalues[np.isfinite(eigenvalues)]
    return [np.round(part, 4).tolist() for part in (known.real, known.imag)] if known.size else None
