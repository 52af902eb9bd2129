"""A table of texts, which the page and the terminal draw each in its way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under named columns; the first cell of a row names it."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    lead: str = ""
    """How to read it."""
    anchor: str = ""
    """Unique on a page, whose answers link to it."""
