"""Write the table of variables in docs/study.md from what the measures declare.

    python tools/document_variables.py

A test holds the document against the declarations.
"""

from __future__ import annotations

import re
from pathlib import Path

from loopscope.measures.registry import declared_variables

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "study.md"
_MARKS = "<!-- Made by tools/document_variables.py from the declarations of the measures. -->", "<!-- End of it. -->"


def variables_table() -> str:
    """A row for each variable that a study may hold."""
    rows = ["| variable | dimensions | unit | meaning |", "|---|---|---|---|"]
    for name, about in declared_variables().items():
        meaning = re.sub(r"([|*<])", r"\\\1", about.meaning)
        rows.append(f"| `{name}` | {', '.join(about.dims)} | {about.units} | {meaning} |")
    return "\n".join(rows)


def documented(text: str) -> str:
    """The document with the table as it should be."""
    begin, end = _MARKS
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{variables_table()}\n\n{end}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(documented(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
