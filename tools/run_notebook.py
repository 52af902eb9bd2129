"""Run the cells of a notebook in one process, without Jupyter, and keep what they show in it.

    python tools/run_notebook.py docs/tour.ipynb

Kept are what is printed and, of a cell's last expression, the PNG that its `_repr_png_` gives, or its `repr`. Outputs
that commands write land in a scratch folder. The documentation's check runs the same cells (`run_doc_commands.py`).
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def code_cells(path: Path) -> list[dict[str, Any]]:
    """Of a notebook, in order; each has a list of lines, `source`."""
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def run_notebook(path: Path) -> None:
    """Run it, and write it again with its outputs."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    with tempfile.TemporaryDirectory(prefix="loopscope-notebook-") as folder, contextlib.chdir(folder):
        for number, cell in enumerate((each for each in notebook["cells"] if each["cell_type"] == "code"), 1):
            cell |= {"execution_count": number, "outputs": _outputs("".join(cell["source"]), names, number)}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _outputs(source: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    body = ast.parse(source).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        # The project's own notebook, as Jupyter would run it.
        exec(compile(ast.Module(body, []), "cell", "exec"), names)  # noqa: S102
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)  # noqa: S307
    found: list[dict[str, Any]] = []
    if text := printed.getvalue():
        found.append({"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)})
    if value is not None:
        data: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
        if hasattr(value, "_repr_png_"):
            data["image/png"] = base64.b64encode(value._repr_png_()).decode() + "\n"
        result = {"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"}
        found.append(result)
    return found


if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", "80")
    for name in sys.argv[1:]:
        run_notebook(Path(name).resolve())
