"""A table of texts as the page holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under named columns; the first cell of a row names it."""

    anchor: str
    """Unique on the page; answers link to it."""
    title: str
    lead: str = ""
    """How to read it."""
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
