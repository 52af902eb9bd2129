"""What an analysis takes in memory, batch by batch, and how many prompts it runs at once."""

from __future__ import annotations

from collections.abc import Iterable

from loopscope.measures.base import BatchInfo, Measure
from loopscope.measures.horizon import Horizons
from loopscope.measures.memory import Memory, array_bytes
from loopscope.measures.registry import asked_for
from loopscope.models.inspection.facts import numbers_in_a_layer


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
    whole = sum(array_bytes(kind, batch) for kind in kinds) + kept_states

    def kept(some: Iterable[type[Measure]]) -> int:
        return sum(memory[kind].kept for kind in some)

    def most(some: Iterable[type[Measure]], part: str) -> int:
        return max((getattr(memory[kind], part) for kind in some), default=0)

    long_run = kept([*far, *early]) + run + most([*far, *early], "visit")
    its_end = kept([*far, *early]) + most(far, "ended")
    measured = kept(kinds) + run + most(near, "visit")
    its_end_too = kept(kinds) + most(near, "ended")
    return whole + max(long_run, its_end, measured, its_end_too, _results(memory) - kept_states)


def _results(memory: dict[type[Measure], Memory]) -> int:
    """While measures are asked one by one, and let go; the horizon's states stay, since others look at them."""
    held = sum(each.kept for each in memory.values())
    most = 0
    for kind, each in memory.items():
        most = max(most, held + each.result)
        held -= 0 if kind is Horizons else each.kept
    return most
