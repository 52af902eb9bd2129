"""The progress bar of commands and of training."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """A bar that counts steps of one kind, on standard error unless another console is given. A context manager."""

    def __init__(self, unit: str, console: Console | None = None, *, transient: bool = True) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
            transient=transient,
        )
        self._task = self._progress.add_task(unit, total=None, visible=False, figures="")

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, steps: int, done: int) -> None:
        self._progress.update(self._task, total=steps, completed=done, visible=True)

    def step(self, figures: str = "") -> None:
        """One step more, and what it gave, behind the count."""
        self._progress.update(self._task, advance=1, figures=figures)

    def advance(self, steps: int) -> None:
        """Several steps at once; without a `start`, only their number is shown."""
        self._progress.update(self._task, advance=steps, visible=True)

    def note(self, message: str) -> None:
        """A line above the bar."""
        self._progress.console.print(escape(message), soft_wrap=True, highlight=False)
