"""One analysis, shard by shard, in a folder that can be resumed."""

from __future__ import annotations

import ctypes
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import xarray as xr

from loopscope.analysis.engine import make_engine
from loopscope.analysis.engine.cpus import cpu_count
from loopscope.analysis.engine.run import run_items
from loopscope.analysis.folder import StudyFolder, merge
from loopscope.analysis.manifest import coordinates, describe, manifest
from loopscope.analysis.passes import measure_batch, steps_of
from loopscope.analysis.plan import choose, keep_budget, kept_bytes
from loopscope.analysis.settings import AnalyzeSettings
from loopscope.errors import WorkerError
from loopscope.measures.neurons import Neurons
from loopscope.measures.registry import absent_variables, why_absent
from loopscope.models.loading import load
from loopscope.models.native.subject import intervene
from loopscope.models.subject import Batch, Subject
from loopscope.prompts.prompt import TokenizedPrompt
from loopscope.prompts.tokenizer import tokenizer_record
from loopscope.study import Study


@runtime_checkable
class Progress(Protocol):
    """Notified of how an analysis gets on."""

    def start(self, steps: int, done: int) -> None:
        """How many steps there are in all, and how many were done by an earlier run of the same command."""

    def step(self) -> None:
        """One more step."""

    def note(self, message: str) -> None:
        """Something worth saying."""


class SilentProgress:
    """Says nothing."""

    def start(self, steps: int, done: int) -> None: ...

    def step(self) -> None: ...

    def note(self, message: str) -> None: ...


class Job:
    """A subject, prompts and settings, with what was chosen from them."""

    def __init__(
        self,
        subject: Subject,
        prompts: Sequence[TokenizedPrompt],
        settings: AnalyzeSettings,
        progress: Progress,
        source: str | Path | None = None,
    ) -> None:
        """`source` is what the subject was loaded from, so that workers can do so too; without it they are sent the
        model itself."""
        self.subject = subject
        self._source = source
        self.prompts = prompts
        self.settings = settings
        self.progress = progress
        self.plan = choose(subject, [len(prompt.token_ids) for prompt in prompts], settings, progress.note)
        size = settings.batch_size
        self._batches = [range(first, min(first + size, len(prompts))) for first in range(0, len(prompts), size)]
        self._budget = keep_budget(subject, settings)
        if settings.horizon_method == "auto" and subject.info.is_looped:
            most = max(self._kept_bytes(self._batch(index)) for index in range(self.shards))
            if most > self._budget:
                progress.note(
                    f"The states of a batch take up to {most / 2**20:,.0f} MiB, more than the "
                    f"{self._budget / 2**20:,.0f} that may be kept (--keep-limit): measured recurrences are run twice."
                )
        self._tokenizer = tokenizer_record(subject.tokenizer, prompts, chat=settings.chat)
        for note in self._tokenizer["notes"] if self._tokenizer else ():
            progress.note(note)
        self._created = datetime.now(UTC).isoformat(timespec="seconds")

    @property
    def shards(self) -> int:
        return len(self._batches)

    def run_in(self, folder: Path) -> Study:
        """In a folder, resuming what is there."""
        started = time.monotonic()
        with StudyFolder(folder, self._manifest(), self._tokens()) as study:
            if study.is_complete:
                self.progress.note(f"{folder} already holds this study, finished; nothing to do.")
                return Study.load(folder)
            missing = [index for index in range(self.shards) if not study.has(index)]
            if len(missing) < self.shards:
                done = self.shards - len(missing)
                self.progress.note(f"Going on with {folder}: {done} of {self.shards} shards are done.")
            steps = [self._steps(index) for index in range(self.shards)]
            self.progress.start(sum(steps), sum(steps) - sum(steps[index] for index in missing))
            self._run_all(missing, study.write)
            _give_memory_back()
            arrays = [study.read(index) for index in range(self.shards)]
            whole = self.assemble(arrays, started)
            _give_memory_back()
            return study.finish(whole)

    def run_in_memory(self) -> Study:
        """All shards, with nothing written."""
        started = time.monotonic()
        found: dict[int, xr.Dataset] = {}
        self.progress.start(sum(map(self._steps, range(self.shards))), 0)
        self._run_all(range(self.shards), found.__setitem__)
        return self.assemble([found[index] for index in range(self.shards)], started)

    def _run_all(self, shards: Sequence[int], done: Callable[[int, xr.Dataset], None]) -> None:
        """Some shards, by the engine that the settings name; `done` receives each as it is finished."""
        settings = self.settings
        gpus = 1.0 if self.subject.device.type == "cuda" else 0.0
        engine = make_engine(settings.engine, settings.workers, settings.address, gpus)
        if engine is None:
            for shard in shards:
                done(shard, self.run(shard))
            return

        def finished(place: int, arrays: xr.Dataset) -> None:
            done(shards[place], arrays)
            for _ in range(self._steps(shards[place])):
                self.progress.step()

        work = _ShardWork(_Recipe(self.subject, self._source), tuple(self.prompts), settings)
        run_items(work, shards, finished, engine, self.progress.note)

    def run(self, index: int) -> xr.Dataset:
        """Measure one shard."""
        batch = self._batch(index)
        return measure_batch(
            self.subject,
            batch,
            self.plan,
            self.progress.step,
            keep=self._keeps(batch),
            first_prompt=self._batches[index].start,
        )

    def assemble(self, shards: list[xr.Dataset], started: float) -> Study:
        """All shards as one study, whose variables say what they are."""
        dataset = merge(shards)
        if why_absent(Neurons, self.subject.info, self.plan) is None:
            dataset = dataset.merge(Neurons.of(self.subject, self.settings.neuron_limit, self.progress.note))
        counts = np.array([len(prompt.token_ids) for prompt in self.prompts], dtype=np.int64)
        dataset = dataset.assign(token_count=("prompt", counts))
        dataset = dataset.assign_coords(coordinates(dataset, self.subject.info, self.plan))
        describe(dataset)
        left_out = absent_variables({str(name) for name in dataset.data_vars}, self.subject.info, self.plan)
        seconds = round(time.monotonic() - started, 1)
        whole = {**self._manifest(), "left_out": left_out, "status": "complete", "seconds": seconds}
        return Study(dataset, whole, self._tokens())

    def _steps(self, index: int) -> int:
        """Recurrences that a shard runs."""
        batch = self._batch(index)
        return steps_of(self.subject, batch, self.plan, keep=self._keeps(batch))

    def _keeps(self, batch: Batch) -> bool:
        return self._kept_bytes(batch) <= self._budget

    def _kept_bytes(self, batch: Batch) -> int:
        attention = "heads" not in self.settings.skip
        return kept_bytes(self.subject, batch, self.plan.recurrences, attention=attention)

    def _batch(self, index: int) -> Batch:
        return Batch.of([self.prompts[prompt].token_ids for prompt in self._batches[index]])

    def _tokens(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(prompt) for prompt in self.prompts]

    def _manifest(self) -> dict[str, Any]:
        found = manifest(self.subject, self.prompts, self.settings, self.plan, self._tokenizer)
        return {"created": self._created, **found}


class _ShardWork:
    """What a worker does with the number of a shard. The model is loaded with the first one."""

    def __init__(self, subject: _Recipe, prompts: Sequence[TokenizedPrompt], settings: AnalyzeSettings) -> None:
        self._subject, self._prompts, self._settings = subject, prompts, settings
        self._job: Job | None = None

    def __call__(self, shard: int) -> xr.Dataset:
        if self._job is None:
            threads = self._settings.threads or max(1, cpu_count() // (self._settings.workers or cpu_count()))
            torch.set_num_threads(threads)
            self._job = Job(self._subject.load(), self._prompts, self._settings, SilentProgress())
        return self._job.run(shard)


class _Recipe:
    """A subject on its way to a worker: what it is loaded from there, or the model itself."""

    def __init__(self, subject: Subject, source: str | Path | None) -> None:
        self._info = subject.info
        self._subject = subject if source is None else None
        # A worker may stand in another folder.
        self._source = str(Path(source).resolve() if source and Path(source).exists() else source)

    def load(self) -> Subject:
        """In the worker. Raises `WorkerError` for a checkpoint that is another one there."""
        info = self._info
        if self._subject is not None:
            return self._subject
        subject: Subject = load(
            self._source,
            revision=info.revision,
            dtype=info.dtype,
            device=info.device.partition(":")[0],
            prefix=info.prefix or "causal",
        )
        if subject.info.weights_sha256 != info.weights_sha256:
            raise WorkerError(
                f"{info.name} has other weights where a worker runs; give all machines the same checkpoint."
            )
        return intervene(subject, info.interventions)


def _give_memory_back() -> None:
    """Let the C library return what the passes freed to the system, where it can be told to (glibc).

    Else the whole study, when it is put together, comes on top of memory that nobody uses any more.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
