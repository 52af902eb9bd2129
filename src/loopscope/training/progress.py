"""What a user sees while a run goes on."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["TrainingBar"]


class TrainingBar:
    """A progress bar over steps with loss and speed. A context manager."""

    def __init__(self, console: Console, *, steps: int, done: int) -> None:
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("training", total=steps, completed=done, figures="")

    def __enter__(self) -> TrainingBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, *, step: int, loss: float, tokens_per_second: float) -> None:
        """Show `step` finished steps."""
        self._progress.update(self._task, completed=step, figures=f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s")

    def say(self, sentence: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(sentence, highlight=False, markup=False)
