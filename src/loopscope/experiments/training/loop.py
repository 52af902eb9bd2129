"""The training loop: steps, log, checkpoints, evaluations."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from loopscope._util.estimate import Phase
from loopscope._util.files import clear_leftovers
from loopscope._util.progress import ProgressBar
from loopscope._util.ranges import Range
from loopscope._util.signals import STOPPING
from loopscope.errors import ConfigError, last_resort
from loopscope.experiments.training.config import TrainConfig
from loopscope.experiments.training.cost import check_cost
from loopscope.experiments.training.data import DataFiles, load_texts
from loopscope.experiments.training.evaluate import Score, bigram_entropy, scores_by_recurrences, unigram_entropy
from loopscope.experiments.training.run_folder import RunFolder, TrainingProgress, load_state, save_state
from loopscope.experiments.training.step import StepReport, build_optimizer, take_step
from loopscope.models.checkpoints.native import save_checkpoint
from loopscope.models.native.transformer import LoopedTransformer
from loopscope.models.subject import find_device


class StopRequest:
    """The signal by which somebody asked the run to stop; None unless somebody did."""

    def __init__(self) -> None:
        self.signal: int | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C (or SIGTERM, or SIGHUP) into a request; a second one interrupts at once, as usual.

    Only the main thread of a program may handle signals; elsewhere the request is never made.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal = number
        restore()

    for number in before:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        restore()


@dataclass(frozen=True)
class TrainResult:
    """Where a run stands when `train` returns."""

    folder: Path
    step: int
    """Finished steps."""
    results: Mapping[str, Any] | None
    """What results.json holds; None if the run was stopped before its end."""
    stopped_by: int | None = None
    """The signal that it was then stopped by."""

    @property
    def finished(self) -> bool:
        """False after Ctrl-C; the same call resumes it."""
        return self.results is not None


@last_resort("training a model")
def train(
    config: TrainConfig,
    out: Path,
    data: DataFiles,
    *,
    threads: int | None = None,
    device: str = "cpu",
    console: Console | None = None,
) -> TrainResult:
    """Train a model into the folder `out`, or resume the run that is there.

    A run that was interrupted at any moment, killed included, and started again ends with the same weights, bit for
    bit, as one that was not, on the same machine with the same number of threads.

    **Arguments**

    - `data`: the files of the text, `DataFiles.of(config.data, folder_of_the_configuration)`.
    - `threads`: of torch; its own choice unless given.
    - `device`: as torch names it, or `auto` for a GPU where there is one.
    - `console`: where the progress bar goes; standard error unless given.

    Raises `ConfigError` for unusable text or tokenizer, a device that is not there, and a folder that holds another
    run; `FolderBusyError` if another process trains there; `NonFiniteError` when the loss stops being a number;
    `StorageError` if a file cannot be written; `CheckpointError` if the state to resume from is damaged.
    """
    console = console or Console(stderr=True)
    place = find_device(device)
    folder = RunFolder(out)
    with folder.held(), _threads(threads):
        folder.claim(config.to_dict(), data.hashes())
        clear_leftovers(out)
        results = folder.read_results()
        if results is not None:
            console.print(f"The training run in {out} is already finished.", highlight=False, markup=False)
            return TrainResult(out, config.steps, results)
        return _Run(config, folder, data, place).advance(console)


class _Run:
    """A run with its model and text in memory."""

    def __init__(self, config: TrainConfig, folder: RunFolder, data: DataFiles, device: torch.device) -> None:
        check_cost([config], device)
        self.config = config
        self.folder = folder
        self.texts = load_texts(config, data, folder.tokenizer)
        self.model = (
            LoopedTransformer(config.architecture)
            .initialize(config.seed, config.init_std, config.init_branch_gain)
            .to(device)
        )
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.progress = TrainingProgress()
        if folder.state.exists():
            self.progress = load_state(folder.state, self.model, self.optimizer)

    def advance(self, console: Console) -> TrainResult:
        """Do the steps that are left, then evaluate."""
        config = self.config
        self._open_log()
        with stop_on_signals() as stop, ProgressBar("training", console, transient=False) as bar:
            bar.start([Phase("training", config.steps, self.progress.step)])
            for step in range(self.progress.step, config.steps):
                report = self._step(step)
                figures = f"loss {report.loss:.3f}  {self.progress.tokens_per_second:,.0f} tokens/s"
                bar.step("training", figures=figures)
                if stop.signal is not None:
                    self._save()
                    bar.note(f"Stopped after step {step + 1} of {config.steps}; the same command resumes it.")
                    return TrainResult(self.folder.path, step + 1, None, stop.signal)
        results = self._finish()
        return TrainResult(self.folder.path, config.steps, results)

    def _step(self, step: int) -> StepReport:
        config, started = self.config, time.monotonic()
        batch = self.texts.batches.batch(step)
        counted = None if config.data.answer_after is None else self.texts.scored(batch)
        report = take_step(self.model, self.optimizer, batch, config, step, counted)
        self.progress = self.progress.after_step(
            tokens=config.batch_size * config.context, seconds=time.monotonic() - started
        )
        done, last = step + 1, step + 1 == config.steps
        if done % config.log_every == 0 or last:
            self.folder.append({"kind": "step", **asdict(self.progress), **asdict(report)})
        if done % config.evaluation.every == 0 and not last:
            scores = self._scores(config.evaluation.sequences)
            self.folder.append({"kind": "evaluation", "step": done, **_by_number(scores)})
        # The log comes first: a line ahead of the checkpoint is dropped on resuming, one behind it would be lost.
        if done % config.checkpoint_every == 0 or last:
            self._save()
        return report

    def _scores(self, sequences: int | None) -> dict[int, Score]:
        """On the first `sequences` windows of the test text, by number of recurrences."""
        test = self.texts.test[:sequences]
        return scores_by_recurrences(
            self.model,
            test,
            self.config.evaluation.recurrences,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            counted=self.texts.scored(test),
        )

    def _finish(self) -> dict[str, Any]:
        """Evaluate on all the test text that the configuration asks for, beside the entropies of the same tokens."""
        sequences = self.config.evaluation.final_sequences
        test = self.texts.test[:sequences]
        counted = self.texts.scored(test)
        evaluation = {
            "tokens": int(counted.sum()),
            **_by_number(self._scores(sequences)),
            "unigram_entropy": unigram_entropy(test, counted),
            "bigram_entropy": bigram_entropy(test, counted),
        }
        results = {
            "layout": self.config.architecture.layout,
            "parameters": self._parameters,
            "training": asdict(self.progress),
            "epochs": self.progress.tokens / self.texts.training_tokens,
            "test": evaluation,
        }
        self.folder.append({"kind": "evaluation", "step": self.config.steps, **evaluation})
        self.folder.write_results(results)
        return results

    @property
    def _parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def _save(self) -> None:
        """The model first and the state last: whatever happens in between, the state that counts is whole."""
        about = {"trained": asdict(self.progress), "of_steps": self.config.steps, "seed": self.config.seed}
        save_checkpoint(self.folder.path, self.model, self.texts.tokenizer.to_str(pretty=True), about)
        save_state(self.folder.state, self.model, self.optimizer, self.progress)

    def _open_log(self) -> None:
        self.folder.rewind_log(self.progress.step)
        self.folder.append(
            {
                "kind": "resume" if self.progress.step else "start",
                "step": self.progress.step,
                "config": self.config.to_dict(),
                "parameters": self._parameters,
                "training_tokens": self.texts.training_tokens,
                "threads": torch.get_num_threads(),
                "device": str(self.model.device),
                "versions": {name: version(name) for name in ("torch", "tokenizers", "numpy")},
            }
        )


def _by_number(scores: dict[int, Score]) -> dict[str, dict[str, float]]:
    return {
        "loss": {str(number): score.loss for number, score in scores.items()},
        "accuracy": {str(number): score.accuracy for number, score in scores.items()},
    }


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Run torch on that many threads, and give it back its own number afterwards."""
    broken = None if number is None else Range(1, 1024).broken_by(number)
    if broken:
        raise ConfigError(f"threads must {broken}, got {number}.")
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
