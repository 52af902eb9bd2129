"""Run the commands that README.md and docs/ show, so that the documentation cannot promise what does not work.

    python tools/run_doc_commands.py [DOCUMENT ...]

Fenced blocks marked `console` (commands after `$ `, output between them), `bash` (commands alone) and `python` (a
script each) are run from top to bottom, README first, all in one scratch folder: a command may use what its document
wrote before, and an analysis that another document has made under the same name is resumed, which is finished at once
if it is the same and an error if it is not. The folder looks like a checkout, and nothing is beside it: links stand for
the project's files, and outputs land in the scratch folder. Output is not compared; a command must exit with 0. A
block right after `<!-- not run: the reason -->` is left out. Of a notebook all cells together are one script.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

from run_notebook import code_cells
from warm_python import WarmPython

__all__ = ["Block", "default_documents", "find_blocks", "make_scratch", "run_block"]

CHECKOUT = Path(__file__).resolve().parent.parent
TIMEOUT = 240.0
"""Seconds for one block; documentation that takes longer is not tried by anybody."""

END_OF_PYTHON = "END-OF-PYTHON"

NOT_RUN = re.compile(r"^<!--\s*not run:\s*(?P<reason>.+?)\s*-->\s*$", re.DOTALL)


class DocumentError(Exception):
    """A document has a block that cannot be understood."""


@dataclass(frozen=True)
class Block:
    """One fenced block of commands."""

    document: Path
    line: int
    """Of the opening fence, from 1."""
    script: str
    """The commands, for bash."""
    not_run: str | None
    """The document's reason for leaving the block out."""

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"


def default_documents(checkout: Path = CHECKOUT) -> list[Path]:
    """README.md, and the pages and notebooks below docs/."""
    below = [*sorted(checkout.glob("docs/**/*.md")), *sorted(checkout.glob("docs/**/*.ipynb"))]
    return [path for path in (checkout / "README.md", *below) if path.is_file()]


def find_blocks(document: Path) -> list[Block]:
    """The document's blocks of commands, in order; DocumentError names a block without a command."""
    if document.suffix == ".ipynb":
        script = "\n".join("".join(cell["source"]) for cell in code_cells(document))
        return [Block(document, 1, _python(script + "\n"), None)]
    blocks = []
    reason: str | None = None
    for token in MarkdownIt("commonmark").parse(document.read_text(encoding="utf-8")):
        if token.type == "html_block":
            match = NOT_RUN.match(token.content)
            reason = match["reason"] if match else None
            continue
        if token.type == "fence" and token.map is not None:
            line = token.map[0] + 1
            language = token.info.strip()
            if language == "console":
                blocks.append(Block(document, line, _commands(token.content, f"{document}:{line}"), reason))
            elif language == "bash":
                blocks.append(Block(document, line, token.content, reason))
            elif language == "python":
                blocks.append(Block(document, line, _python(token.content), reason))
        reason = None
    return blocks


def _python(script: str) -> str:
    return f"python - <<'{END_OF_PYTHON}'\n{script}{END_OF_PYTHON}\n"


def _commands(session: str, place: str) -> str:
    """The commands of a console session: lines after `$ `, with the lines that a backslash continues them on."""
    commands: list[str] = []
    continued = False
    for line in session.splitlines():
        if continued:
            commands.append(line)
        elif line.startswith("$ "):
            commands.append(line.removeprefix("$ "))
        else:
            continue
        continued = line.endswith("\\")
    if not commands:
        raise DocumentError(f"{place}: a console block shows no command; put `$ ` before it, or mark the block `text`.")
    return "\n".join(commands) + "\n"


def make_scratch(folder: Path, checkout: Path = CHECKOUT) -> Path:
    """Make `folder/checkout`, where commands run, and return it."""
    scratch = folder / "checkout"
    scratch.mkdir(parents=True)
    for entry in checkout.iterdir():
        # Not linked: hidden files, and the folders that commands and builds write to.
        if not entry.name.startswith(".") and entry.name not in {"build", "dist", "out"}:
            (scratch / entry.name).symlink_to(entry)
    return scratch


def run_block(block: Block, scratch: Path, warm: WarmPython) -> subprocess.CompletedProcess[str]:
    """Run a block in `scratch`; what it printed, its own trace of commands included, is in `stdout`."""
    return warm.run(block.script, scratch, TIMEOUT)


def main(arguments: list[str]) -> int:
    """Run the given documents, or all; the exit status says whether a command failed."""
    failures = 0
    with tempfile.TemporaryDirectory(prefix="loopscope-docs-") as folder, closing(WarmPython(Path(folder))) as warm:
        scratch = make_scratch(Path(folder))
        for document in [Path(name) for name in arguments] or default_documents():
            for block in find_blocks(document):
                if block.not_run is not None:
                    print(f"{block}: not run: {block.not_run}")
                else:
                    result = run_block(block, scratch, warm)
                    print(f"{block}: exit status {result.returncode}\n{result.stdout}", flush=True)
                    failures += result.returncode != 0
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
