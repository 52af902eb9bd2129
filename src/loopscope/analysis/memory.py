"""What an analysis takes in memory, batch by batch; what there is; and what would save some."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch

from loopscope.analysis.engine.cpus import cpu_count
from loopscope.analysis.passes import planned_batch
from loopscope.analysis.plan import choose
from loopscope.analysis.settings import AnalyzeSettings, Part, without_left_out
from loopscope.errors import ConfigError
from loopscope.measures.base import BatchInfo, Measure, Plan
from loopscope.measures.horizon import Horizons
from loopscope.measures.lengths import array_bytes
from loopscope.measures.memory import Memory
from loopscope.measures.neurons import Neurons
from loopscope.measures.registry import asked_for, why_absent
from loopscope.models.checkpoints.free_memory import available_memory
from loopscope.models.inspection.facts import Inspection, numbers_in_a_layer
from loopscope.models.native.subject import NativeSubject
from loopscope.models.native.transformer import LoopedTransformer
from loopscope.models.subject import Batch, Subject

_KEPT_SHARE, _BATCH_SHARE = 1 / 8, 1 / 2
"""Of free memory, that kept states may take, and that a batch is made to take: the C library may hold a quarter more
than is in use, and others want memory too. States that are not kept cost another run."""
_MOST_ON_A_CPU, _MOST_ON_A_GPU = 8, 64
_ENOUGH_TOKENS, _ENOUGH_NUMBERS = 384, 2**17
"""With so many tokens, and numbers in their states, a batch on a CPU costs as much a token as a larger one, to 4 %."""
_ERROR = 0.2
"""Relative error of what is said to be needed."""
_WORKER = 2**28
"""Of a process that has imported torch, beside its model."""


class MemoryPlan:
    """What batches of an analysis take, and what there is for them."""

    def __init__(self, subject: Subject, plan: Plan, settings: AnalyzeSettings) -> None:
        self._subject, self._plan, self._settings = subject, plan, settings
        self._machine = available_memory(torch.device("cpu"))
        workers = 1 if settings.engine == "serial" else settings.workers or cpu_count()
        placement = subject.placement if isinstance(subject, NativeSubject) else None
        free = available_memory(subject.device)
        if placement is not None:
            free = max(0, free - placement.largest_brought)
        if workers > 1:
            item = planned_batch(subject, Batch.of([[0]]), plan).itemsize
            free = max(0, free // workers - _WORKER - subject.info.parameters * item)
        limit = None if settings.memory_limit is None else settings.memory_limit * 2**20
        self._unlimited = free
        """The same without --memory-limit."""
        self.free = free if limit is None else min(free, limit)
        """Bytes that there are for one worker, beside its model."""
        self.room = int(_BATCH_SHARE * free) if limit is None else self.free
        """Of these, that what runs at once may take."""
        self.budget = keep_budget(subject, settings, self.free)
        """Bytes of states that may be kept."""
        elsewhere = () if placement is None else placement.elsewhere
        self._elsewhere = {str(device): int(_BATCH_SHARE * available_memory(device)) for device in elsewhere}
        """Bytes for one layer's run of a batch, on devices other than the subject's own."""

    def kept(self, batch: Batch) -> int:
        """Bytes of states that are kept rather than made twice; 0 where they would not fit."""
        if not self._subject.info.is_looped:
            return 0
        asked = kept_bytes(self._subject, batch, self._plan)
        return asked if asked <= self.budget else 0

    def needed(self, batch: Batch) -> int:
        """Bytes beside the model, of the batch and of what is counted once it is done."""
        planned = planned_batch(self._subject, batch, self._plan)
        found = batch_bytes(planned, kept_states=self.kept(batch))
        neurons = why_absent(Neurons, self._subject.info, self._plan) is None
        return max(found, Neurons.memory(planned.sizes, self._settings.neuron_limit) if neurons else 0)

    def at_once(self, lengths: Sequence[int], most: int) -> int:
        """Prompts of these lengths, one batch after the other, that a batch has room for; at least 1."""
        for size in range(min(most, len(lengths)), 1, -1):
            batch = _largest(lengths, size)
            if self.needed(batch) <= self.room and self._too_small(batch) is None:
                return size
        return 1

    def _too_small(self, batch: Batch) -> str | None:
        """Another device that has no room to run a layer."""
        planned = planned_batch(self._subject, batch, self._plan)
        run = batch.mask.numel() * planned.itemsize * numbers_in_a_layer(planned.sizes)
        return next((device for device, room in self._elsewhere.items() if run > room), None)

    def check(self, lengths: Sequence[int]) -> None:
        """Raises `ConfigError` where the longest prompt does not fit even alone, whatever the error of the estimate, or
        the arrays of all prompts do not while they are put together."""
        alone = _largest(lengths, 1)
        needed = self.needed(alone)
        if needed * (1 - _ERROR) > self.free:
            raise ConfigError(
                f"A prompt of {max(lengths):,} tokens needs about {size_text(needed)} beside the model, and "
                f"{size_text(self.free)} may be taken on {self._subject.device}; {self._advice(lengths, needed)}."
            )
        device = self._too_small(alone)
        if device is not None:
            raise ConfigError(
                f"A prompt of {max(lengths):,} tokens needs more than {size_text(self._elsewhere[device])} on {device} "
                "while a layer runs there; put fewer layers there (--device-map), or take shorter prompts (--truncate)."
            )
        whole = planned_batch(self._subject, Batch.of([[0] * length for length in lengths]), self._plan)
        arrays = sum(array_bytes(kind, whole) for kind in asked_for(whole))
        if 2 * arrays * (1 - _ERROR) > self._machine:
            raise ConfigError(
                f"The arrays of {len(lengths):,} prompts take about {size_text(2 * arrays)} while they are put "
                f"together, and {size_text(self._machine)} are free; analyse fewer prompts at a time (--limit), or "
                "measure fewer recurrences (--recurrences)."
            )

    def _advice(self, lengths: Sequence[int], needed: int) -> str:
        saved = sorted(self.saved(lengths, 1), reverse=True)
        enough = [each for each in saved if needed - each[0] <= self.free]
        told = ", ".join(f"{option} ({size_text(less)} less)" for less, option in (enough or saved)[:5])
        raised = self.free < needed * (1 - _ERROR) <= self._unlimited
        if enough:
            return f"it would fit with {told.replace(', ', ' or ')}{' or a larger --memory-limit' if raised else ''}"
        if raised:
            return f"raise --memory-limit{f', or take several of {told}' if told else ''}"
        return f"take several of {told}" if told else "take shorter prompts, or a machine with more"

    def saved(self, lengths: Sequence[int], size: int) -> Iterator[tuple[int, str]]:
        """(bytes, option) of what would make batches of that many prompts need clearly less."""
        half, settings, needed = max(lengths) // 2, self._settings, self.needed(_largest(lengths, size))
        changes: dict[str, dict[str, Any]] = {
            **{f"--skip {part}": {"skip": (*settings.skip, part)} for part in get_args(Part)},
            f"--recurrences {settings.recurrences // 2}": {"recurrences": settings.recurrences // 2},
            f"--horizon {settings.horizon // 2}": {"horizon": settings.horizon // 2},
            "--keep-limit 0": {"keep_limit": 0, "horizon_method": "auto"},
        }
        for option, change in changes.items():
            try:
                changed = AnalyzeSettings(**without_left_out({**vars(settings), **change}))
                plan = choose(self._subject, lengths, changed, lambda message: None)
            except ConfigError:  # that setting would not do
                continue
            less = needed - MemoryPlan(self._subject, plan, changed).needed(_largest(lengths, size))
            if less > needed // 20:
                yield less, option
        less = needed - self.needed(_largest([half] * size, size)) if half else 0
        if less > needed // 20:
            yield less, f"--truncate {half}"


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """What an analysis of a model that is not loaded would take."""

    needed: int
    """Bytes beside the model, everything on."""
    kept_states: int
    """Of these, states that are kept rather than made twice."""
    saved: dict[str, int]
    """Bytes that an option would save, where that is more than a twentieth."""


def foresee(inspection: Inspection) -> Foreseen | None:
    """By the same count that `analyze` acts on, with the memory that is free here, of the run that was inspected; None
    for a model that is not run natively, whose layers are known once it is loaded."""
    if inspection.architecture is None or inspection.memory is None:
        return None
    run = inspection.memory.run
    with torch.device("meta"):
        model = LoopedTransformer(inspection.architecture).to(getattr(torch, run.dtype))
    subject = NativeSubject(model, name=inspection.name, weights_sha256="not loaded")
    settings = AnalyzeSettings(
        recurrences=run.recurrences, horizon=run.horizon, batch_size=run.batch_size, dtype=run.dtype
    )
    lengths = [run.tokens] * run.batch_size
    memory = MemoryPlan(subject, choose(subject, lengths, settings, lambda message: None), settings)
    batch = _largest(lengths, run.batch_size)
    needed = memory.needed(batch)
    saved = sorted(memory.saved(lengths, run.batch_size), reverse=True)
    return Foreseen(needed=needed, kept_states=memory.kept(batch), saved={option: less for less, option in saved})


def most_prompts(subject: Subject, lengths: Sequence[int]) -> int:
    """In a batch, that are of use: on a CPU no more than keep it busy, since all that is kept grows with them."""
    if subject.device.type != "cpu":
        return _MOST_ON_A_GPU
    enough = max(_ENOUGH_TOKENS, _ENOUGH_NUMBERS // subject.info.width)
    return min(_MOST_ON_A_CPU, -(-enough * len(lengths) // sum(lengths)))


def size_text(nbytes: int) -> str:
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:,.1f} GB"
    return f"{nbytes / 1e3:,.0f} kB" if 0 < nbytes < 1e6 else f"{nbytes / 1e6:,.0f} MB"


def _largest(lengths: Sequence[int], size: int) -> Batch:
    """Of the batches of that many prompts the one with most entries."""
    batches = [lengths[first : first + size] for first in range(0, len(lengths), size)]
    return Batch.of([[0] * length for length in max(batches, key=lambda each: len(each) * max(each))])


def kept_bytes(subject: Subject, batch: Batch, plan: Plan) -> int:
    """Bytes that the states of all measured visits take, with queries and keys if attention is measured, and values if
    a shared cache is.

    Each is counted as wide as a state, which it is where heads times their width is the residual stream's.
    """
    info = subject.info
    attention = 0 if "heads" in plan.skip else 3 if plan.support_every else 2
    sites = info.recurrent * (1 + attention) + (0 if info.carries_raw_output else 1)
    dtype: torch.dtype = getattr(torch, info.dtype)
    return batch.mask.numel() * info.width * dtype.itemsize * sites * plan.recurrences


def keep_budget(subject: Subject, settings: AnalyzeSettings, free: int) -> int:
    """Bytes of states that a batch may keep rather than make twice, of those that are free."""
    if settings.horizon_method != "auto" or not subject.info.is_looped:
        return sys.maxsize if settings.horizon_method == "keep" else 0
    return int(free * _KEPT_SHARE) if settings.keep_limit is None else settings.keep_limit * 2**20


def batch_bytes(batch: BatchInfo, *, kept_states: int) -> int:
    """The most that a batch takes beside the model, at whatever moment; `kept_states` is what the states take that are
    kept rather than made twice, if they are.

    Right to a fifth on a CPU, where the C library gives large tensors back at once (`benchmarks/memory.py`).
    """
    kinds = list(asked_for(batch))
    memory = {kind: kind.memory(batch) for kind in kinds}
    far = [kind for kind in kinds if kind.needs.long_run]
    near = [kind for kind in kinds if not kind.needs.long_run]
    early = [kind for kind in near if not kind.needs.horizon] if kept_states else []
    run = batch.mask.numel() * batch.itemsize * numbers_in_a_layer(batch.sizes)

    def total(some: Iterable[type[Measure]], part: str) -> int:
        return sum(getattr(memory[kind], part) for kind in some)

    def passing(some: Sequence[type[Measure]]) -> int:
        return total(some, "until_ended") + run + max((memory[kind].visit for kind in some), default=0)

    def ending(some: Sequence[type[Measure]]) -> int:
        # One by one: what one kept until then goes before the next.
        later = [total(some[place:], "until_ended") + memory[kind].ended for place, kind in enumerate(some)]
        return max(later, default=0)

    def arrays(some: Iterable[type[Measure]]) -> int:
        return sum(array_bytes(kind, batch) for kind in some)

    # Where states are kept, all measures are there from the beginning.
    first = (
        arrays(kinds if kept_states else far)
        + total([*far, *early], "kept")
        + max(passing([*far, *early]), ending(far))
    )
    second = arrays(kinds) + total(kinds, "kept") + max(passing(near), ending(near))
    if kept_states:
        kept_states -= total(near, "as_seen")
    return max(first + kept_states, second + kept_states, arrays(kinds) + _results(memory))


def _results(memory: dict[type[Measure], Memory]) -> int:
    """While measures are asked one by one, and let go; the horizon's states stay, since others look at them."""
    held = sum(each.kept for each in memory.values())
    most = 0
    for kind, each in memory.items():
        most = max(most, held + each.result)
        held -= 0 if kind is Horizons else each.kept
    return most


def peak_bytes() -> int:
    """The most that this process has held at a time so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
