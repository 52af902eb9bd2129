"""One analysis, shard by shard, in a folder that can be resumed."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import xarray as xr

from loopscope._util.estimate import Phase
from loopscope._util.progress import ProgressBar, in_notebook
from loopscope._util.wording import plural
from loopscope.analysis.engine import make_engine
from loopscope.analysis.engine.cpus import cpu_count
from loopscope.analysis.engine.run import run_items
from loopscope.analysis.folder import StudyFolder, join, merge
from loopscope.analysis.manifest import coordinates, describe, manifest, predicted_tokens
from loopscope.analysis.memory import MemoryPlan, kept_bytes, most_prompts, peak_bytes, size_text
from loopscope.analysis.passes import measure_batch, steps_of
from loopscope.analysis.plan import choose
from loopscope.analysis.settings import AnalyzeSettings
from loopscope.errors import ConfigError, WorkerError, ran_out
from loopscope.measures.neurons import Neurons
from loopscope.measures.registry import absent_variables, why_absent
from loopscope.models.loading import load
from loopscope.models.native.subject import intervene
from loopscope.models.subject import Batch, Subject
from loopscope.prompts.prompt import TokenizedPrompt
from loopscope.prompts.tokenizer import tokenizer_record
from loopscope.study import Study

_VERDICT_SECONDS, _WRITING_SECONDS = 0.0015, 0.5
"""Of a token at one layer, with all that its verdict is tried against; and of a study of some prompts. What is expected
until the first ones took their time."""


@runtime_checkable
class Progress(Protocol):
    """Notified of how an analysis gets on."""

    def start(self, phases: Sequence[Phase]) -> None:
        """Of which phases it consists."""

    def step(self, phase: str, count: int = 1) -> None:
        """So many steps of a phase are over, which took the time since the last ones."""

    def first_batch(self, memory: int | None) -> None:
        """The first batch of this run is done; the most memory that was in use, in bytes, where it is known."""

    def note(self, message: str) -> None:
        """Something worth saying."""


class SilentProgress:
    """Says nothing."""

    def start(self, phases: Sequence[Phase]) -> None: ...

    def step(self, phase: str, count: int = 1) -> None: ...

    def first_batch(self, memory: int | None) -> None: ...

    def note(self, message: str) -> None: ...


@contextmanager
def shown(progress: Progress | bool | None) -> Iterator[Progress]:
    """What to notify: the object that was given, or a bar, which by itself is there in a terminal or a notebook."""
    if progress is not None and not isinstance(progress, bool):
        yield progress
    elif progress or (progress is None and (sys.stderr.isatty() or in_notebook())):
        with ProgressBar("loading") as bar:
            yield bar
    else:
        yield SilentProgress()


class Job:
    """A subject, prompts and settings, with what was chosen from them."""

    def __init__(
        self,
        subject: Subject,
        prompts: Sequence[TokenizedPrompt],
        settings: AnalyzeSettings,
        progress: Progress,
        source: str | Path | None = None,
        *,
        checked: bool = False,
    ) -> None:
        """`source` is what the subject was loaded from, so that workers can do so too; without it they are sent the
        model itself. `checked` says that there is memory for it.

        Raises `ConfigError` for what a model or its prompts do not have, and for what memory does not do for.
        """
        self.subject = subject
        self._source = source
        self.prompts = prompts
        self.settings = settings
        self.progress = progress
        lengths = [len(prompt.token_ids) for prompt in prompts]
        self.plan = choose(subject, lengths, settings, progress.note)
        self._memory = MemoryPlan(subject, self.plan, settings)
        if not checked:
            self._memory.check(lengths)
        most = most_prompts(subject, lengths) if settings.batch_size == "auto" else settings.batch_size
        self._at_once = self._memory.at_once(lengths, most)
        """Prompts that are run together; fewer than are saved together where memory is short."""
        size = self._at_once if settings.batch_size == "auto" else settings.batch_size
        # What numbers depend on, and a folder is resumed with.
        self.settings = dataclasses.replace(settings, batch_size=size)
        self._batches = [range(first, min(first + size, len(prompts))) for first in range(0, len(prompts), size)]
        if self._at_once < min(most, len(prompts)):
            progress.note(
                f"{plural(self._at_once, 'prompt')} at once: {min(most, len(prompts))} would take more than "
                f"{size_text(self._memory.room)} (--memory-limit)."
            )
        self._note_what_is_kept()
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
                found = Study.load(folder)  # before it is said to be there: some of it may be damaged or gone
                study.drop_shards()
                self.progress.note(f"{folder} already holds this study, finished; nothing to measure.")
                return found
            missing = [index for index in range(self.shards) if not study.has(index)]
            if len(missing) < self.shards:
                done = self.shards - len(missing)
                self.progress.note(f"Going on with {folder}: {done} of {self.shards} shards are done.")
            self.progress.start(self._phases(missing))
            self._run_all(missing, study.write)
            give_memory_back(self.subject.device)
            arrays = [study.read(index) for index in range(self.shards)]
            whole = self.assemble(arrays, started)
            give_memory_back(self.subject.device)
            finished = study.finish(whole)
            self.progress.step("writing")
            return finished

    def run_in_memory(self) -> Study:
        """All shards, with nothing written."""
        started = time.monotonic()
        found: dict[int, xr.Dataset] = {}
        self.progress.start(self._phases(range(self.shards)))
        self._run_all(range(self.shards), found.__setitem__)
        study = self.assemble([found.pop(index) for index in range(self.shards)], started)
        self.progress.step("writing")
        return study

    def _run_all(self, shards: Sequence[int], done: Callable[[int, xr.Dataset], None]) -> None:
        """Some shards, by the engine that the settings name; `done` receives each as it is finished."""
        settings = self.settings
        gpus = 1.0 if self.subject.device.type == "cuda" else 0.0
        engine = make_engine(settings.engine, settings.workers, settings.address, gpus)
        if engine is None:
            for shard in shards:
                if shard != shards[0]:
                    # Measures and their batch know each other, so that nothing of the last ones goes by itself.
                    give_memory_back(self.subject.device)
                done(shard, self.run(shard))
                if shard == shards[0]:
                    cuda = self.subject.device.type == "cuda"
                    memory = torch.cuda.max_memory_allocated(self.subject.device) if cuda else peak_bytes()
                    self.progress.first_batch(memory)
            return
        finished_before = False

        def finished(place: int, found: tuple[xr.Dataset, list[str]]) -> None:
            nonlocal finished_before
            arrays, notes = found
            for note in notes:
                self.progress.note(note)
            done(shards[place], arrays)
            for phase, steps in self._steps(shards[place]).items():
                self.progress.step(phase, steps)
            if not finished_before:
                self.progress.first_batch(None)  # which is the workers'
            finished_before = True

        work = _ShardWork(_Recipe(self.subject, self._source, self.settings.device_map), tuple(self.prompts), settings)
        run_items(work, shards, finished, engine, self.progress.note)

    def run(self, index: int) -> xr.Dataset:
        """Measure one shard: at once, or in as many parts as memory asks for.

        Raises `ConfigError` where memory does not do for a single prompt.
        """
        left, found = list(self._parts(index)), []
        steps = self._steps(index)

        def tick(phase: str, count: int) -> None:
            # No more than were announced, though what ran out of memory is done again.
            count = min(count, steps.get(phase, 0))
            if count:
                steps[phase] -= count
                self.progress.step(phase, count)

        while left:
            rows = left.pop(0)
            try:
                found.append(self._measure(rows, tick))
                continue
            except (MemoryError, RuntimeError) as error:
                if not ran_out(error):
                    raise
                said = str(error).strip().partition("\n")[0]
            # Here, where nothing holds any more what was made.
            give_memory_back(self.subject.device)
            if len(rows) == 1:
                longest = len(self.prompts[rows.start].token_ids)
                raise ConfigError(
                    f"Memory ran out on {self.subject.device} over prompt {rows.start} alone, of {longest:,} tokens "
                    f"({said}); leave parts out (--skip), or take shorter prompts (--truncate). What was finished is "
                    "kept."
                )
            self._at_once = len(rows) // 2
            left[:0] = [rows[: self._at_once], rows[self._at_once :]]
            self.progress.note(
                f"Memory ran out on {self.subject.device} over {len(rows)} prompts at once; they are done again in "
                "halves, and so are those to come."
            )
        for phase, count in steps.items():
            tick(phase, count)
        return found[0] if len(found) == 1 else xr.Dataset(join(found))

    def _measure(self, rows: range, tick: Callable[[str, int], None]) -> xr.Dataset:
        batch = self._batch(rows)
        return measure_batch(
            self.subject,
            batch,
            self.plan,
            lambda phase: tick(phase, batch.mask.numel()),
            keep=self._keeps(batch),
            first_prompt=rows.start,
        )

    def assemble(self, shards: list[xr.Dataset], started: float) -> Study:
        """All shards as one study, whose variables say what they are. The list is emptied."""
        variables = merge(shards)
        if why_absent(Neurons, self.subject.info, self.plan) is None:
            neurons = Neurons.of(self.subject, self.settings.neuron_limit, self.progress.note)
            variables |= {str(name): values for name, values in neurons.variables.items()}
        counts = np.array([len(prompt.token_ids) for prompt in self.prompts], dtype=np.int64)
        variables["token_count"] = xr.Variable("prompt", counts)
        dataset = xr.Dataset(variables)
        named = coordinates(dataset, self.subject.info, self.plan)
        if self.subject.tokenizer is not None:
            named |= predicted_tokens(dataset, self.subject.tokenizer)
        dataset = dataset.assign_coords(named)
        describe(dataset)
        left_out = absent_variables({str(name) for name in dataset.data_vars}, self.subject.info, self.plan)
        seconds = round(time.monotonic() - started, 1)
        whole = {**self._manifest(), "left_out": left_out, "status": "complete", "seconds": seconds}
        return Study(dataset, whole, self._tokens())

    @property
    def needed(self) -> int:
        """Bytes beside the model that the batches take, the largest of them."""
        return max(
            self._memory.needed(self._batch(rows)) for index in range(self.shards) for rows in self._parts(index)
        )

    def _parts(self, index: int) -> Iterator[range]:
        """Prompts of a shard that are run at once."""
        rows = self._batches[index]
        for first in range(0, len(rows), self._at_once):
            yield rows[first : first + self._at_once]

    def _phases(self, missing: Sequence[int]) -> list[Phase]:
        """What there is to do of all shards, of which some are missing."""
        steps = [self._steps(index) for index in range(self.shards)]
        found = []
        for name in dict.fromkeys(phase for each in steps for phase in each):
            whole, left = (sum(steps[index].get(name, 0) for index in some) for some in (range(self.shards), missing))
            seconds = _VERDICT_SECONDS * len(self.plan.judged_layers) if name == "verdicts" else None
            found.append(Phase(name, whole, whole - left, seconds))
        return [*found, Phase("writing", 1, seconds=_WRITING_SECONDS)]

    def _steps(self, index: int) -> dict[str, int]:
        """By phase: recurrences and what else takes about as long, once for every token of the padded batches."""
        steps: Counter[str] = Counter()
        for rows in self._parts(index):
            batch = self._batch(rows)
            for phase, count in steps_of(self.subject, batch, self.plan, keep=self._keeps(batch)).items():
                steps[phase] += count * batch.mask.numel()
        return dict(steps)

    def _keeps(self, batch: Batch) -> bool:
        return not self.subject.info.is_looped or self._memory.kept(batch) > 0

    def _note_what_is_kept(self) -> None:
        settings = self.settings
        if settings.horizon_method != "auto" or not self.subject.info.is_looped:
            return
        batches = [self._batch(rows) for index in range(self.shards) for rows in self._parts(index)]
        most = max(kept_bytes(self.subject, batch, self.plan) for batch in batches)
        budget = self._memory.budget
        if most > budget:
            self.progress.note(
                f"The states of a batch take up to {most / 2**20:,.0f} MiB, more than the {budget / 2**20:,.0f} that "
                "may be kept (--keep-limit): measured recurrences are run twice."
            )

    def _batch(self, rows: range) -> Batch:
        return Batch.of([self.prompts[prompt].token_ids for prompt in rows])

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

    def __call__(self, shard: int) -> tuple[xr.Dataset, list[str]]:
        """Its arrays, and what was worth saying."""
        if self._job is None:
            threads = self._settings.threads or max(1, cpu_count() // (self._settings.workers or cpu_count()))
            torch.set_num_threads(threads)
            # What it chose, the others have said.
            self._job = Job(self._subject.load(), self._prompts, self._settings, SilentProgress(), checked=True)
        self._job.progress = _Notes()
        return self._job.run(shard), self._job.progress.notes


class _Notes(SilentProgress):
    """Keeps what is worth saying."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


class _Recipe:
    """A subject on its way to a worker: what it is loaded from there, or the model itself."""

    def __init__(self, subject: Subject, source: str | Path | None, device_map: str | None) -> None:
        self._info = subject.info
        self._device_map = device_map
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
            device_map=self._device_map,
            prefix=info.prefix or "causal",
            ignore_config=info.ignored_config,
        )
        if subject.info.weights_sha256 != info.weights_sha256:
            raise WorkerError(
                f"{info.name} has other weights where a worker runs; give all machines the same checkpoint."
            )
        return intervene(subject, info.interventions)


def give_memory_back(device: torch.device) -> None:
    """Let torch and the C library return what the passes freed to the system, where it can be told to (glibc).

    Else the whole study, when it is put together, comes on top of memory that nobody uses any more.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
