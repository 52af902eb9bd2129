"""What the commands show in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import rich.table
from rich.console import Console
from rich.markup import escape

from loopscope._util.table import Table

if TYPE_CHECKING:
    from loopscope.answers.answer import Answer

FAMILIES = (
    *("loopscope", "huginn", "retrofit-llama", "retrofit-olmo", "ouro", "nanbeige", "parcae", "llama", "mistral"),
    *("olmo2", "qwen3"),
)
"""The names of the formats that are read, for which nobody should wait for torch."""
REPORT_SECONDS = 2.0
"""That a report of a study of some prompts may take, which nothing tells before it is drawn."""


def say(message: str) -> None:
    """One line on standard output, unwrapped, so that a path can be copied."""
    Console(soft_wrap=True, highlight=False).print(escape(message))


def say_path(name: str, path: Path) -> None:
    """Where something was written, in one line, so that it can be copied; a link in terminals that know links."""
    link = f"[link={escape(path.resolve().as_uri())}]{escape(str(path))}[/link]"
    Console(soft_wrap=True, highlight=False).print(f"{escape(name)}  {link}")


def say_answers(answers: Sequence[Answer]) -> None:
    """Each question with its answer in a sentence."""
    console = Console(highlight=False)
    for answer in answers:
        console.print(f"[bold]{escape(answer.question)}[/bold]  {escape(answer.verdict)}")
        console.print(f"  {escape(answer.sentence)}", style="dim")


def say_table(table: Table, *, total: bool = False) -> None:
    """Columns without lines; the last row is bold if it is the total of the others."""
    drawn = rich.table.Table(
        *map(escape, table.columns),
        box=None,
        pad_edge=False,
        title=escape(table.title) or None,
        title_justify="left",
    )
    for row in table.rows:
        drawn.add_row(*map(escape, row), style="bold" if total and row is table.rows[-1] else None)
    Console(highlight=False).print(drawn)


def own_names(paths: Sequence[Path]) -> list[str]:
    """Folders' own names where these differ, whole paths otherwise."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def say_models() -> None:
    """A table of the shipped models, and the formats that checkpoint folders may have."""
    from loopscope._util.reading import read_json
    from loopscope.models.checkpoints.find import demo_names, find_checkpoint

    rows = []
    for name in demo_names():
        results = read_json(find_checkpoint(name).folder / "results.json")
        losses = {int(count): loss for count, loss in results["test"]["loss"].items()}
        best = min(losses, key=lambda count: losses[count])
        after = f" after {best}" if len(losses) > 1 else ""
        loss, bigrams = f"{losses[best]:.3f}{after}", f"{results['test']['bigram_entropy']:.3f}"
        rows.append((name, results["layout"], f"{results['parameters']:,}", loss, bigrams))
    say_table(Table(columns=("model", "layout", "parameters", "test loss", "of bigrams"), rows=rows))
    Console(highlight=False).print(
        "\nLosses are nats a token, the least, after so many recurrences.\n"
        f"Checkpoints that are run natively: {', '.join(FAMILIES)}. Others: what transformers loads, through hooks."
    )
