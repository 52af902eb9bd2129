"""The main job: a looped language model and prompts in, a study of its dynamics out."""

from __future__ import annotations

import ctypes
import dataclasses
import platform
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import xarray as xr
from torch import nn

from loopscope.behaviour import (
    COSINE_GRID,
    DISPLACEMENT_GRID,
    KINDS,
    CosineSettings,
    DisplacementSettings,
)
from loopscope.errors import ConfigError, PromptError
from loopscope.hooks import HookedSubject
from loopscope.interventions import check_recurrences, check_tokens, parse_interventions
from loopscope.loading import as_subject, load
from loopscope.measures import (
    CHANGES,
    LEVELS,
    Arrays,
    MapChoice,
    Named,
    can_be_judged,
    choose_maps,
    depth_sites,
    map_sites,
    neuron_operations,
    neurons,
    readout_grid,
    visit_labels,
)
from loopscope.passes import Plan, kept_bytes, measure_batch, recurrences_run
from loopscope.prompts import (
    PADDING,
    Prompt,
    TokenizedPrompt,
    cut_text,
    draw,
    encode_prompts,
    load_prompts,
    pad_prompts,
    padding_record,
    prompts_digest,
    tokenizer_record,
)
from loopscope.settings import AnalyzeSettings
from loopscope.shards import StudyFolder, merge
from loopscope.study import Study
from loopscope.subject import Batch, NativeSubject, Subject, SubjectInfo, intervene
from loopscope.visits import visit_label

__all__ = ["Progress", "SilentProgress", "analyze"]

_SOURCE = ("prompts", "field", "text", "whole_file", "limit", "sample_seed", "system_prompt", "chunk")
"""Settings that say where prompts come from."""

_EXITS_IF_UNKNOWN = 8
"""Recurrences of a full run of a model whose trained number is not known: as many as most are trained with or more."""
_EXITS_BY_RUNS = 8
"""A model whose state cannot be set is run anew for every readout, 1 + 2 + ... + N recurrences in all; 36 for 8, a
tenth of what an analysis runs by default. Beyond that it is done on request only."""

Prompts = str | Path | Sequence[str] | Sequence[Sequence[int]]


@runtime_checkable
class Progress(Protocol):
    """Told how an analysis gets on."""

    def start(self, steps: int, done: int) -> None:
        """So many steps in all, of which so many were done by an earlier run of the same command."""

    def step(self) -> None:
        """One more step."""

    def note(self, message: str) -> None:
        """Something worth saying."""


class SilentProgress:
    """Says nothing."""

    def start(self, steps: int, done: int) -> None: ...

    def step(self) -> None: ...

    def note(self, message: str) -> None: ...


def analyze(
    model: str | Path | Subject | nn.Module,
    prompts: Prompts | None = None,
    *,
    out: str | Path | None = None,
    settings: AnalyzeSettings | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> Study:
    """Run prompts through a model to its horizon and beyond, and measure how each layer's state settles.

    **Arguments**

    - `model`: a shipped model's name, a checkpoint folder, a name on the hub, a subject, or a native model.
    - `prompts`: a file, a preset's name, a list of texts, or a list of lists of token ids.
    - `out`: folder for the study; a run that was interrupted is gone on with. Nothing is written without it.
    - `settings`, `changes`: `AnalyzeSettings`, and fields of it to change, e.g. `recurrences=64, horizon=128`, or
      `intervene=["damp=0.5"]`.

    Raises a `LoopscopeError` for input that cannot be used; what was written before is kept.
    """
    if "intervene" in changes:
        changes["intervene"] = tuple(str(each) for each in parse_interventions(changes["intervene"]))
    settings = dataclasses.replace(settings or AnalyzeSettings(), **_source(prompts), **changes)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    # Before the model: a mistyped path should not cost the loading of a large checkpoint.
    loaded = _read(prompts, settings)
    if isinstance(model, str | Path):
        subject: Subject = load(model, revision=settings.revision, dtype=settings.dtype, device=settings.device)
    else:
        subject = as_subject(model)
        settings = _settings_of(subject, settings)
    if subject.info.interventions != settings.intervene:
        subject = intervene(subject, settings.intervene)
    if str(settings.system_prompt) == PADDING:
        loaded = pad_prompts(loaded, subject.tokenizer)
    tokenized = _tokenize(loaded, subject, settings)
    check_recurrences(settings.interventions, settings.recurrences)
    check_tokens(settings.interventions, [len(prompt.token_ids) for prompt in tokenized])
    job = _Job(subject, tokenized, settings, progress or SilentProgress())
    if out is None:
        started = time.monotonic()
        return job.assemble([job.run(index) for index in range(job.shards)], started)
    return job.run_in(Path(out))


def _source(prompts: Prompts | None) -> dict[str, Any]:
    """Prompts as settings, but for lists of token ids, which no setting can hold."""
    if isinstance(prompts, str | Path):
        return {"prompts": str(prompts)}
    if prompts and all(isinstance(prompt, str) for prompt in prompts):
        return {"text": tuple(prompts)}
    return {}


def _read(prompts: Prompts | None, settings: AnalyzeSettings) -> list[Prompt]:
    """The prompts, from where the settings say or as given."""
    if prompts is None or isinstance(prompts, str | Path) or _source(prompts):
        return load_prompts(**{name: getattr(settings, name) for name in _SOURCE})
    if not prompts:
        raise PromptError("The list of prompts is empty; give at least one text, or one list of token ids.")
    for name in _SOURCE:
        if name not in ("limit", "sample_seed") and getattr(settings, name):
            raise PromptError(f"{name} means nothing for prompts that are lists of token ids; leave it out.")
    given = [_from_ids(index, prompt) for index, prompt in enumerate(prompts)]
    return draw(given, limit=settings.limit, seed=settings.sample_seed)


def _tokenize(prompts: Sequence[Prompt], subject: Subject, settings: AnalyzeSettings) -> list[TokenizedPrompt]:
    """The prompts as the model reads them; with `chunk`, the one long text cut into prompts."""
    vocab_size, max_positions = subject.info.vocab_size, subject.info.max_positions
    if settings.chunk is not None:
        return cut_text(
            prompts[0],
            subject.tokenizer,
            settings.chunk,
            vocab_size=vocab_size,
            max_positions=max_positions,
            limit=settings.limit,
            seed=settings.sample_seed,
        )
    return encode_prompts(
        prompts,
        subject.tokenizer,
        vocab_size=vocab_size,
        max_positions=max_positions,
        truncate=settings.truncate,
        chat=settings.chat,
    )


def _from_ids(index: int, prompt: Any) -> Prompt:
    if isinstance(prompt, str) or not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in prompt):
        raise PromptError(f"Prompt {index} is not a list of whole numbers; give only texts, or only lists of ids.")
    if not prompt:
        raise PromptError(f"Prompt {index} is empty; leave it out.")
    return Prompt(id=str(index), text=None, token_ids=tuple(prompt), system=None)


def _settings_of(subject: Subject, settings: AnalyzeSettings) -> AnalyzeSettings:
    """Settings that say what a subject in memory is; others are refused rather than ignored."""
    info = subject.info
    actual: dict[str, Any] = {"dtype": info.dtype, "device": info.device, "revision": info.revision}
    if info.interventions:
        actual["intervene"] = info.interventions
    default = AnalyzeSettings()
    for name, value in actual.items():
        asked = getattr(settings, name)
        if asked not in (value, getattr(default, name)):
            raise ConfigError(
                f"{name}={asked!r} comes too late: {subject.info.name} is loaded already, with {value!r}."
            )
    return dataclasses.replace(settings, **actual)


class _Job:
    """One analysis: what is run, shard by shard."""

    def __init__(
        self, subject: Subject, prompts: Sequence[TokenizedPrompt], settings: AnalyzeSettings, progress: Progress
    ) -> None:
        self.subject = subject
        self.info: SubjectInfo = subject.info
        self.prompts = prompts
        self.settings = settings
        self.progress = progress
        self.tracked = _tracked(prompts, settings) if subject.info.is_looped else []
        self.recurrences = settings.recurrences if self.info.is_looped else 0
        self.exits = self._exit_recurrences()
        self.readout = self._readout_grid()
        self.maps, notes = choose_maps(self.info, [len(prompt.token_ids) for prompt in prompts], settings)
        size = settings.batch_size
        self._batches = [range(first, min(first + size, len(prompts))) for first in range(0, len(prompts), size)]
        self.tokenizer = tokenizer_record(subject.tokenizer, prompts, chat=settings.chat)
        for note in (*(self.tokenizer["notes"] if self.tokenizer else ()), *notes):
            progress.note(note)
        self.created = datetime.now(UTC).isoformat(timespec="seconds")

    @property
    def shards(self) -> int:
        return len(self._batches)

    def run_in(self, folder: Path) -> Study:
        """In a folder, going on with what is there."""
        started = time.monotonic()
        with StudyFolder(folder, self._manifest(), self._tokens()) as study:
            if study.is_complete:
                self.progress.note(f"{folder} already holds this study, finished; nothing to do.")
                return Study.load(folder)
            missing = [index for index in range(self.shards) if not study.has(index)]
            if len(missing) < self.shards:
                done = self.shards - len(missing)
                self.progress.note(f"Going on with {folder}: {done} of {self.shards} shards are done.")
            steps = [recurrences_run(self.subject, self._plan(index)) for index in range(self.shards)]
            self.progress.start(sum(steps), sum(steps) - sum(steps[index] for index in missing))
            for index in missing:
                study.write(index, self.run(index))
            _give_memory_back()
            arrays = [study.read(index) for index in range(self.shards)]
            whole = self.assemble(arrays, started)
            _give_memory_back()
            return study.finish(whole)

    def run(self, index: int) -> Arrays:
        """Measure one shard."""
        return measure_batch(self.subject, self._batch(index), self._plan(index), self.progress.step)

    def _batch(self, index: int) -> Batch:
        return Batch.of([self.prompts[prompt].token_ids for prompt in self._batches[index]])

    def _plan(self, index: int) -> Plan:
        settings, rows = self.settings, self._batches[index]
        keep = settings.horizon_method == "keep"
        if settings.horizon_method == "auto" and self.info.is_looped:
            needed = kept_bytes(
                self.subject, self._batch(index), settings.recurrences, attention="heads" not in settings.skip
            )
            keep = needed <= settings.keep_limit * 2**20
        return Plan(
            recurrences=settings.recurrences,
            horizon=settings.horizon,
            keep=keep,
            seed=settings.seed,
            cycle_recurrences=settings.cycle_recurrences,
            tracked=tuple((prompt - rows.start, token) for prompt, token in self.tracked if prompt in rows),
            components=settings.components,
            readout=self.readout,
            exits=self.exits,
            head_stable=settings.head_stable,
            judged_layers=self._judged_layers(),
            skip=frozenset(settings.skip),
            first_prompt=rows.start,
            maps=self._maps_of(rows),
        )

    def _judged_layers(self) -> tuple[int, ...]:
        if "behaviour" in self.settings.skip or not can_be_judged(self.settings.horizon):
            return ()
        return tuple(range(self.info.recurrent))[-1 if self.settings.judged_layers == "last" else 0 :]

    def _maps_of(self, rows: range) -> MapChoice | None:
        """Of one shard, if any of its prompts is asked for."""
        if self.maps is None:
            return None
        found = tuple(prompt - rows.start for prompt in self.maps.rows if prompt in rows)
        return dataclasses.replace(self.maps, rows=found) if found else None

    def _exit_recurrences(self) -> int:
        """N, the recurrences of a full run of which exit rules may save some; 0 where they are left out."""
        settings, info = self.settings, self.info
        if not info.is_looped or "readout" in settings.skip or settings.exit_recurrences == 0:
            return 0
        asked = settings.exit_recurrences
        if asked is not None and asked > settings.recurrences:
            raise ConfigError(
                f"--exit-recurrences asks for {asked} recurrences, but only {settings.recurrences} are measured; raise "
                "--recurrences."
            )
        count = min(info.trained_recurrences or _EXITS_IF_UNKNOWN, settings.recurrences) if asked is None else asked
        reason = None
        if isinstance(self.subject, HookedSubject) and self.subject.facts.foresees:
            reason = "its loop depends on how often it will run, so that it cannot be stopped on the way"
        elif asked is None and not info.state_can_be_set and count > _EXITS_BY_RUNS:
            reason = (
                f"reading it out after each of {count} recurrences takes {count * (count + 1) // 2} more of them; ask "
                f"for it with --exit-recurrences {count}"
            )
        if reason is not None:
            self.progress.note(f"Exit rules are left out for {info.name}: {reason}.")
            return 0
        return count

    def _readout_grid(self) -> tuple[int, ...]:
        if not self.info.is_looped:
            return (1,)
        if not self.settings.readout:
            return readout_grid(self.info.trained_recurrences or 1, self.settings.recurrences, self.exits)
        if max(self.settings.readout) > self.settings.recurrences:
            raise ConfigError(
                f"--readout asks for {max(self.settings.readout)} recurrences, but only "
                f"{self.settings.recurrences} are "
                "measured; raise --recurrences."
            )
        return tuple(sorted({*self.settings.readout, *range(1, self.exits + 1)}))

    def assemble(self, shards: Sequence[Arrays], started: float) -> Study:
        """All shards as one study."""
        merged = merge(shards) | self._neurons()
        counts = np.array([len(prompt.token_ids) for prompt in self.prompts], dtype=np.int64)
        merged["token_count"] = Named(("prompt",), counts)
        dataset = xr.Dataset(
            {name: (entry.dims, entry.values) for name, entry in merged.items()},
            coords=self._coordinates(merged),
        )
        manifest = {**self._manifest(), "status": "complete", "seconds": round(time.monotonic() - started, 1)}
        return Study(dataset, manifest, self._tokens())

    def _behaviour(self) -> dict[str, Any]:
        """How the limits of the tokens were judged."""
        if not self._judged_layers():
            return {}
        methods = (("displacement", DisplacementSettings()), ("cosine", CosineSettings()))
        grids = (("displacement", DISPLACEMENT_GRID), ("cosine", COSINE_GRID))
        return {
            "behaviour": {
                **{name: dataclasses.asdict(settings) for name, settings in methods},
                "sensitivity": {name: list(grid.names) for name, grid in grids},
            }
        }

    def _padding(self) -> dict[str, Any]:
        """Of which tokens a system prompt of padding is made."""
        tokenizer = self.subject.tokenizer
        if str(self.settings.system_prompt) != PADDING or tokenizer is None:
            return {}
        return {"padding": padding_record(tokenizer)}

    def _neurons(self) -> dict[str, Named]:
        """From the weights, which are no shard's: of a native model, unless that takes too long."""
        if "neurons" in self.settings.skip or not isinstance(self.subject, NativeSubject):
            return {}
        needed = neuron_operations(self.subject.model) / 1e12
        if needed > self.settings.neuron_limit:
            self.progress.note(
                f"Prediction and suppression neurons are left out: counting them takes {needed:.3g} tera operations; "
                "raise --neuron-limit to have them."
            )
            return {}
        return neurons(self.subject.model)

    def _coordinates(self, arrays: dict[str, Named]) -> dict[str, Any]:
        lengths = {
            dim: size for entry in arrays.values() for dim, size in zip(entry.dims, entry.values.shape, strict=True)
        }
        cycle = min(self.settings.cycle_recurrences, self.recurrences)
        visits = visit_labels(self.info.prelude, self.info.recurrent, self.info.coda, cycle)
        values: dict[str, Any] = {
            "unique_layer": [
                f"{stage}.{layer}"
                for stage in ("prelude", "recurrent", "coda")
                for layer in range(getattr(self.info, stage))
            ],
            "quantile": list(LEVELS),
            "site": ["last_layer", "loop_state"],
            "horizon": ["first", "second"],
            "visit": visits,
            "visit_other": visits,
            "readout_recurrence": list(self.readout),
            "judged_layer": list(self._judged_layers()),
            "change": list(CHANGES),
            "kind": [str(kind) for kind in KINDS],
            "lag": np.arange(1, lengths.get("lag", 0) + 1),
            "tail": np.arange(2 * self.settings.horizon - lengths.get("tail", 0), 2 * self.settings.horizon),
            **{
                f"{method}_setting{other}": list(values)
                for method, grid in (("displacement", DISPLACEMENT_GRID), ("cosine", COSINE_GRID))
                for other, values in zip(("", "_other"), grid.values, strict=True)
            },
            "exit_recurrence": list(range(1, self.exits + 1)),
        }
        coordinates = {dim: (dim, values.get(dim, np.arange(size))) for dim, size in lengths.items()}
        if "depth" in lengths:
            sites = depth_sites(self.info, self.recurrences)
            for name, column in zip(("stage", "layer", "recurrence"), zip(*sites, strict=True), strict=True):
                coordinates[f"depth_{name}"] = ("depth", list(column))
        if "mapped" in lengths and self.maps is not None:
            sites = map_sites(self.info, self.maps.recurrences)
            coordinates["map_visit"] = ("map_visit", [visit_label(*site) for site in sites])
            for name, column in zip(("stage", "layer", "recurrence"), zip(*sites, strict=True), strict=True):
                coordinates[f"map_{name}"] = ("map_visit", list(column))
            coordinates["mapped_prompt"] = ("mapped", list(self.maps.rows))
        if "tracked" in lengths:
            coordinates["tracked_prompt"] = ("tracked", [prompt for prompt, _ in self.tracked])
            coordinates["tracked_token"] = ("tracked", [token for _, token in self.tracked])
        return coordinates

    def _tokens(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(prompt) for prompt in self.prompts]

    def _manifest(self) -> dict[str, Any]:
        info, settings = self.info, self.settings
        plain = {name: _plain(value) for name, value in dataclasses.asdict(settings).items()}
        digest = prompts_digest(list(self.prompts))
        source = (*_SOURCE, "truncate", "chat")
        free = (*source, "threads", "keep_limit", "horizon_method", "device", "dtype", "revision", "neuron_limit")
        return {
            "created": self.created,
            "model": {
                **info.to_dict(),
                "kind": "looped" if info.is_looped else "feed-forward",
                "layout": {"prelude": info.prelude, "recurrent": info.recurrent, "coda": info.coda},
            },
            "settings": {name: value for name, value in plain.items() if name not in source},
            "prompts": {
                # The texts themselves are in tokens.jsonl.
                **{name: plain[name] for name in source if name != "text"},
                "source": settings.prompts or "given as a list",
                **self._padding(),
                "count": len(self.prompts),
                "tokens": sum(len(prompt.token_ids) for prompt in self.prompts),
                "sha256": digest,
            },
            "tokenizer": self.tokenizer,
            **self._behaviour(),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("loopscope", "torch", "numpy", "xarray")},
            },
            "threads": torch.get_num_threads(),
            # All that the numbers depend on: a folder is gone on with only if this is the same.
            "identity": {
                "model": {name: value for name, value in info.to_dict().items() if name != "name"},
                "settings": {name: value for name, value in plain.items() if name not in free},
                "prompts": {"count": len(self.prompts), "sha256": digest},
                "versions": {name: version(name) for name in ("loopscope", "torch")},
            },
        }


def _give_memory_back() -> None:
    """Let the C library return what the passes freed to the system, where it can be told to (glibc).

    Else the whole study, when it is put together, comes on top of memory that nobody uses any more.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _plain(value: Any) -> Any:
    """JSON has no paths and no tuples."""
    if isinstance(value, Path):
        return str(value)
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _tracked(prompts: Sequence[TokenizedPrompt], settings: AnalyzeSettings) -> list[tuple[int, int]]:
    """(prompt, token from 0) of the tracked tokens, sorted. Defaults beyond the last prompt are dropped, asked ones
    refused.
    """
    default = AnalyzeSettings().track
    found = []
    for entry, (prompt, token) in zip(settings.track, settings.tracked, strict=True):
        if prompt >= len(prompts):
            if settings.track == default:
                continue
            raise ConfigError(f"--track {entry}: there are {len(prompts)} prompts, counted from 0.")
        length = len(prompts[prompt].token_ids)
        if not -length <= token < length:
            raise ConfigError(f"--track {entry}: prompt {prompt} has {length} tokens, counted from 0.")
        found.append((prompt, token % length))
    return sorted(set(found))
