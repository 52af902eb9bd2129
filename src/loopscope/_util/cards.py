"""How results show themselves in a notebook: cards of a few lines, with nothing of a page around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_FRAME = "border: 1px solid #8884; border-radius: 6px; padding: 0.6em 0.9em; margin: 0.3em 0; max-width: 52em"
_QUIET = "opacity: 0.7"


def card(title: str, verdict: str = "", sentence: str = "", rows: Mapping[str, object] | None = None) -> str:
    """HTML of one card. All of it is text, and shown as such."""
    cells = "".join(
        f'<tr><td style="text-align: left; {_QUIET}">{escape(str(name))}</td>'
        f'<td style="text-align: left">{escape(str(value))}</td></tr>'
        for name, value in (rows or {}).items()
    )
    parts = [
        f'<div style="{_QUIET}">{escape(title)}</div>',
        f'<div style="font-weight: 600">{escape(verdict)}</div>' if verdict else "",
        f"<div>{escape(sentence)}</div>" if sentence else "",
        f"<table>{cells}</table>" if cells else "",
    ]
    return f'<div style="{_FRAME}">{"".join(parts)}</div>'


def cards(title: str, inside: Sequence[str]) -> str:
    """Several cards under one line."""
    return f"<div><strong>{escape(title)}</strong>{''.join(inside)}</div>"
