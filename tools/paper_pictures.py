"""Draw the pictures of docs/figures.md: one of each type that the paper has, small, of the shipped models.

    python tools/paper_pictures.py QUESTIONS.jsonl STUDIES [PICTURES]

QUESTIONS.jsonl is GSM8K's test set. STUDIES is a folder for the studies that docs/figures.md names; those that are
there are not made again. PICTURES is docs/images/figures unless given.
"""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

from loopscope import Study, compare
from loopscope._util.files import write_atomically
from loopscope.report.figures.in_matplotlib import paper_style
from loopscope.report.figures.write import Source, draw_figure

DPI = 100
"""Enough to be read on a page; a paper takes the PDF."""
MEASURED = ("--recurrences", "32", "--horizon", "64", "--cycle-recurrences", "32", "--limit", "4")
STUDIES: dict[str, tuple[str, ...]] = {
    "injected": ("analyze", "demo:injected", *MEASURED),
    "uninjected": ("analyze", "demo:uninjected", *MEASURED),
    "feedforward": ("analyze", "demo:feedforward", "--limit", "4"),
    "turning": (
        *("analyze", "demo:injected", "--recurrences", "128", "--horizon", "128", "--limit", "2"),
        *("--intervene", "attention:recurrent.*=4"),
    ),
    "random": (
        *("experiment", "architectures", "--norm", "pre", "residual", "ouro", "--injection", "none", "linear"),
        *("--depth", "4", "12", "16"),
    ),
}  # fmt: skip
FIGURES: dict[str, tuple[str, ...]] = {
    "injected": (
        *("cycle-attention", "step-by-layer", "distance-by-layer", "trajectories", "trajectories-3d"),
        *("concentration-by-depth", "concentration-by-recurrence", "magnitude-by-depth", "concentration-by-depth-long"),
        *("cycle-residual", "cycle-residual-long", "cycle-attention-long", "direction-by-layer", "attention-by-layer"),
        *("stages-by-depth", "stages-by-recurrence", "stages-by-layer", "attention-maps"),
    ),
    "uninjected": ("concentration-beyond", "stages-beyond"),
    "feedforward": ("neurons",),
    "turning": ("verdict-cosine", "verdict-co-occurrence", "verdict-extremes-by-layer", "verdict-layers"),
    "random": ("architectures-12-layers", "architectures-4-layers", "architectures-16-layers"),
}  # fmt: skip
COMPARED = ("compared-stages",)


def make(name: str, arguments: tuple[str, ...], questions: Path, folder: Path) -> None:
    """One study; a command that was interrupted goes on."""
    given = ("--prompts", str(questions), "--field", "question", "--no-report") if arguments[0] == "analyze" else ()
    command = [sys.executable, "-m", "loopscope", *arguments, *given, "--out", str(folder / name)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def draw(source: Source, name: str, pictures: Path) -> None:
    content = io.BytesIO()
    with paper_style():
        draw_figure(source, name).savefig(content, format="png", dpi=DPI)
    write_atomically(pictures / f"{name}.png", content.getvalue())


def main(questions: Path, folder: Path, pictures: Path) -> None:
    for name, arguments in STUDIES.items():
        make(name, arguments, questions, folder)
        for figure in FIGURES[name]:
            draw(folder / name, figure, pictures)
    studies = [Study.load(folder / name) for name in ("injected", "uninjected", "feedforward")]
    for figure in COMPARED:
        draw(compare(studies), figure, pictures)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        raise SystemExit(__doc__)
    given = [Path(each) for each in sys.argv[1:]]
    main(given[0], given[1], given[2] if len(given) == 3 else Path(__file__).parent.parent / "docs/images/figures")
