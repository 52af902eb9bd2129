"""Texts from outside (a token, a prompt, a name) as they are put on figures."""

from __future__ import annotations

__all__ = ["visible"]


def visible(text: str, longest: int = 40) -> str:
    """White space made visible, other characters without a shape as dots, cut to `longest` characters.

    Nothing is escaped: what shows it must not read markup in it.
    """
    shown = "".join(
        {"\n": "⏎", "\t": "⇥", "\r": "␍"}.get(char, char if char.isprintable() or char == " " else "·") for char in text
    )
    if not shown.strip():
        shown = shown.replace(" ", "␣")
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"
