"""How the seven kinds of behaviour look, wherever they are drawn: a colour, a letter and a symbol each.

Colours are those of Okabe and Ito and a grey, so that readers with any common colour vision tell them apart; the letter
or the symbol is always beside the colour.
"""

from __future__ import annotations

from dataclasses import dataclass

from loopscope.verdicts import KINDS, Kind

__all__ = ["KIND_LOOKS", "KindLook", "kind_label", "looks_for_script"]


@dataclass(frozen=True, slots=True)
class KindLook:
    """Of one kind."""

    colour: str
    on_colour: str
    """Of a letter on that colour."""
    letter: str
    symbol: str
    """Plotly's name of a marker; its open form is `<symbol>-open`."""
    meaning: str
    """In a few words, for legends."""


KIND_LOOKS: dict[Kind, KindLook] = {
    Kind.FIXED_POINT: KindLook("#0072B2", "#FFFFFF", "F", "circle", "approaches one point, or rests there"),
    Kind.AT_FLOOR: KindLook("#56B4E9", "#1C1D21", "A", "square", "what is left of its motion looks like rounding"),
    Kind.ORBIT: KindLook("#D55E00", "#FFFFFF", "O", "diamond", "returns to the same states"),
    Kind.SLIDER: KindLook("#CC79A7", "#1C1D21", "S", "triangle-right", "moves on in one direction without a limit"),
    Kind.BOUNDED: KindLook("#E69F00", "#1C1D21", "B", "pentagon", "keeps moving within bounds, without a period"),
    Kind.DIVERGING: KindLook("#1C1D21", "#FFFFFF", "D", "triangle-up", "moves away faster and faster"),
    Kind.UNKNOWN: KindLook("#8A8F98", "#1C1D21", "?", "x", "the trajectory does not tell"),
}


def kind_label(kind: Kind) -> str:
    """As on an axis: `orbit (O)`."""
    return f"{kind} ({KIND_LOOKS[kind].letter})"


def looks_for_script() -> list[dict[str, str]]:
    """In the order of `KINDS`, for scripts of the page."""
    return [
        {
            "name": str(kind),
            "colour": KIND_LOOKS[kind].colour,
            "on": KIND_LOOKS[kind].on_colour,
            "letter": KIND_LOOKS[kind].letter,
            "meaning": KIND_LOOKS[kind].meaning,
        }
        for kind in KINDS
    ]
