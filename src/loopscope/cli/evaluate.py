"""The command that runs tasks. Heavy imports are inside, as in `commands`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tyro

from loopscope.models.inspection.facts import Dtype


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Run tasks of lm-evaluation-harness and show accuracy against the number of recurrences.

    Likelihoods of all numbers come from one pass. With --out, writes curve.json, a page (report.html), and the
    harness's own results (harness-N.json) and documents (samples-N.jsonl) of each number.
    """

    model: tyro.conf.Positional[str]
    """A shipped model such as demo:injected, a checkpoint folder, or a model of the Hugging Face hub such as
    organisation/model."""
    tasks: tuple[str, ...]
    """Names of tasks, apart or with commas between: arc_easy gsm8k. The harness's own need `pip install
    'loopscope[lm-eval]'`."""
    recurrences: tuple[int, ...] = ()
    """Numbers of recurrences; the trained one unless given."""
    include_path: Path | None = None
    """Folder with task files of your own. They may call Python."""
    limit: int | None = None
    """The most documents of a task, the first ones."""
    fewshot: int | None = None
    """Examples before each question, instead of the task's own number."""
    chat: bool = False
    """Make each request the user's turn of a chat, written by the model's chat template; of the harness's tasks."""
    seed: int = 0
    """Of random initial states."""
    revision: str | None = None
    """A branch, tag or commit of the model, if it is one on the hub."""
    dtype: Dtype = "float32"
    """Of weights and states."""
    device: str = "auto"
    """A torch device; auto takes a GPU where there is one."""
    out: Path | None = None
    """Folder for the results, which must hold no other evaluation."""
    json: bool = False
    """Print JSON, for programs."""

    def run(self) -> None:
        import dataclasses
        from json import dumps

        from loopscope._util.progress import ProgressBar
        from loopscope.cli.console import say, say_path, say_table
        from loopscope.errors import StorageError
        from loopscope.evaluation.evaluating import evaluate
        from loopscope.evaluation.result import CURVE
        from loopscope.report.page.write import write_evaluation

        with ProgressBar("loading") as progress, _starts_anew():
            found = evaluate(
                self.model,
                [name for given in self.tasks for name in given.split(",") if name],
                recurrences=self.recurrences or None,
                out=self.out,
                include_path=self.include_path,
                limit=self.limit,
                fewshot=self.fewshot,
                chat=self.chat,
                seed=self.seed,
                revision=self.revision,
                dtype=self.dtype,
                device=self.device,
                done=lambda count: progress.step("requests", count),
            )
        try:
            report = None if self.out is None else write_evaluation(found, self.out / "report.html")
        except StorageError:
            # Not "run the same command again", which the folder would refuse.
            raise StorageError(
                f"The curve is in {self.out}, and its page could not be written; `loopscope figures {self.out}` draws "
                "the curve, and a page needs another folder with room."
            ) from None
        if self.json:
            print(dumps(dataclasses.asdict(found)))
            return
        for table in found.tables():
            say_table(table)
        for sentence in found.sentences():
            say(sentence)
        if self.out is not None and report is not None:
            say_path("curve", self.out / CURVE)
            say_path("report", report)


@contextmanager
def _starts_anew() -> Iterator[None]:
    """Say of an interrupted evaluation that nothing of it is resumed."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("which of an evaluation is nothing: the same command starts anew") from None
