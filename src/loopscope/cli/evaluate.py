"""The command that runs tasks. Heavy imports are inside, as in `commands`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from loopscope.cli.parsing import options
from loopscope.models.inspection.facts import Dtype


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Run loopscope's own tasks or those of lm-evaluation-harness, and show accuracy against recurrences.

    One pass gives the likelihoods for all numbers of recurrences. With --out, writes curve.json, a report (report.html)
    and, for the harness's tasks, its results (harness-N.json) and documents (samples-N.jsonl) for each number.
    """

    model: tyro.conf.Positional[str]
    """A shipped model such as demo:injected, a checkpoint folder, or a model of the Hugging Face hub such as
    organisation/model."""
    tasks: tuple[str, ...]
    """Names of tasks, separated by spaces or commas: permutations and addition are loopscope's own; the harness's, such
    as arc_easy and gsm8k, need `pip install 'loopscope[lm-eval]'`."""
    recurrences: tuple[int, ...] = ()
    """Numbers of recurrences; default: the trained one."""
    include_path: Path | None = None
    """Folder with task files of your own. They may call Python."""
    limit: int | None = None
    """Use at most that many documents of a task, the first ones."""
    fewshot: int | None = None
    """Examples before each question, instead of the task's own number."""
    chat: bool = False
    """Make each request of the harness's tasks the user's turn of a chat, written by the model's chat template."""
    seed: int = 0
    """Seed of random initial states."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hugging Face hub."""
    dtype: Dtype = "float32"
    """Dtype of weights and states."""
    device: str = "auto"
    """A torch device; auto takes a GPU if there is one."""
    out: Path | None = None
    """Folder for the results; it must hold no other evaluation."""
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

        with ProgressBar("loading") as progress:
            found = evaluate(
                self.model,
                [name for given in self.tasks for name in given.split(",") if name],
                recurrences=self.recurrences or None,
                **options(self, "model", "tasks", "recurrences", "json"),
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
