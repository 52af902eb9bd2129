"""What the commands show in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from loopscope.answers.answer import Answer


def say(message: str) -> None:
    """One line on standard output, unwrapped, so that a path can be copied."""
    Console(soft_wrap=True, highlight=False).print(escape(message))


def say_answers(answers: Sequence[Answer]) -> None:
    """Each question with its answer in a sentence."""
    console = Console(highlight=False)
    for answer in answers:
        console.print(f"[bold]{escape(answer.question)}[/bold]  {escape(answer.verdict)}")
        console.print(f"  {escape(answer.sentence)}", style="dim")


def say_models() -> None:
    """A table of the shipped models, and the formats that checkpoint folders may have."""
    # With torch, which no other output waits for.
    from loopscope.models.checkpoints.families import FAMILIES
    from loopscope.models.checkpoints.find import demo_names, find_checkpoint
    from loopscope.models.checkpoints.store import read_json

    table = Table("model", "layout", "parameters", "test loss", "bigram entropy", box=None, pad_edge=False)
    for name in demo_names():
        results = read_json(find_checkpoint(name).folder / "results.json")
        losses = {int(count): loss for count, loss in results["test"]["loss"].items()}
        best = min(losses, key=lambda count: losses[count])
        table.add_row(
            name,
            escape(results["layout"]),
            f"{results['parameters']:,}",
            f"{losses[best]:.3f} nats a token after {best} recurrence{'s' if best > 1 else ''}",
            f"{results['test']['bigram_entropy']:.3f}",
        )
    console = Console(highlight=False)
    console.print(table)
    families = ", ".join(family.name for family in FAMILIES)
    console.print(f"\nCheckpoints that are run natively: {families}. Others: what transformers loads, through hooks.")


class RichProgress:
    """A progress bar on standard error, counting steps of one kind. A context manager."""

    def __init__(self, unit: str) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task(unit, total=None, visible=False)

    def __enter__(self) -> RichProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def start(self, steps: int, done: int) -> None:
        self._progress.update(self._task, total=steps, completed=done, visible=True)

    def step(self) -> None:
        self._progress.advance(self._task)

    def advance(self, steps: int) -> None:
        """Several steps at once; without a `start`, only their number is shown."""
        self._progress.update(self._task, advance=steps, visible=True)

    def note(self, message: str) -> None:
        self._progress.console.print(escape(message), soft_wrap=True, highlight=False)
