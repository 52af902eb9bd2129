"""The loop that shows in the order in which a forward pass calls its layers, and what sets how often it runs: a number
that, one higher, adds one recurrence to that order."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

from torch import Tensor, nn

from loopscope.models.hooks.called import Call, WatchedForward
from loopscope.models.hooks.calls import ModelCall
from loopscope.models.hooks.pausing import Setting
from loopscope.models.subject import Batch

_SHOWN, _LENGTH = 40, 300
"""Calls of an order that a message names, and characters that they take."""

LOOPS = re.compile(r"loop|recur|cycle|iter|pass|repeat|ponder|ut_steps|hops")
"""What a number is called that may be one of recurrences where it is 1, as so many others are."""

_COUNTS = re.compile(r"step|loop|recur|cycle|iter|pass|turn|repeat|depth|times|ponder|n_|num")
"""What an argument of `forward` is called that may be the number of recurrences and has no default number."""


@dataclass(frozen=True, slots=True)
class Repeats:
    """`order[:start]`, then `order[start : start + length]`, `times` times, then the rest."""

    start: int
    length: int
    times: int

    @property
    def stop(self) -> int:
        return self.start + self.length * self.times


def find_repeats(order: Sequence[int]) -> Repeats | None:
    """The stretch of calls that repeats a block of them and covers the most; of two that cover as many, the one with
    the shorter block. None where no block comes twice in a row.
    """
    best: Repeats | None = None
    for length in range(1, len(order) // 2 + 1):
        run = 0
        # `run` calls up to here are the same as those a block earlier; the last place closes the last run.
        for place in range(length, len(order) + 1):
            if place < len(order) and order[place] == order[place - length]:
                run += 1
                continue
            times = run // length + 1
            covered = times * length
            if times > 1 and (best is None or covered > best.length * best.times):
                best = Repeats(place - run - length, length, times)
            run = 0
    return best


def is_one_loop(order: Sequence[int], found: Repeats) -> bool:
    """Nothing outside the stretch is called twice, or is called within it too: the order is p + k x R + c."""
    outside = [*order[: found.start], *order[found.stop :]]
    block = order[found.start : found.start + found.length]
    return len(set(outside)) == len(outside) and not set(outside) & set(block)


def order_in_words(names: Sequence[str]) -> str:
    """`model.layers 0 1 2 1 2 3`: names after their common path, cut where there are many."""
    paths = {name.rpartition(".")[0] for name in names}
    shared = paths.pop() if len(paths) == 1 else ""
    shown = [name.rpartition(".")[2] if shared else name for name in names[:_SHOWN]]
    lengths = accumulate(len(name) + 1 for name in shown)
    shown = [name for name, length in zip(shown, lengths, strict=True) if length <= _LENGTH]
    more = [f"... ({len(names)} calls)"] if len(names) > len(shown) else []
    return " ".join([*([shared] if shared else []), *shown, *more])


class Argument:
    """A keyword argument of the model's forward as `set_recurrences`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, model: nn.Module, recurrences: int) -> dict[str, int]:
        return {self._name: recurrences}

    def __str__(self) -> str:
        return f"the argument {self._name} of its forward"


def find_setting(
    call: ModelCall, batch: Batch, layers: list[Call], found: Repeats
) -> tuple[str | Argument | None, Repeats]:
    """What sets the number of recurrences, if it is found, and the loop as it counts them: a block may be repeated a
    fixed number of times within a recurrence."""
    modules = list({one.module for one in layers})
    order = [one.module for one in layers]

    def after(change: Callable[[int], Mapping[str, Any]], count: int) -> list[nn.Module] | None:
        with suppress(Exception):  # what a wrong setting breaks is no matter
            return [one.module for one in WatchedForward(call, batch, change(count)).calls(modules)]
        return None

    def expected(loop: Repeats, times: int) -> list[nn.Module]:
        return order[: loop.start] + order[loop.start :][: loop.length] * times + order[loop.stop :]

    def sets(change: Callable[[int], Mapping[str, Any]], loop: Repeats) -> bool:
        more = after(change, loop.times + 1)
        if more is None and loop.times > 1:  # it may have a table with an entry for each of its recurrences
            return after(change, loop.times - 1) == expected(loop, loop.times - 1)
        return more == expected(loop, loop.times + 1)

    model = call.model
    for loop in _divided(found):
        for path in whole_numbers(model, layers, loop.times):
            setting = Setting(model, path)

            def set_it(count: int, setting: Setting = setting) -> Mapping[str, Any]:
                setting.set(count)
                return {}

            try:
                if sets(set_it, loop):
                    return path, loop
            finally:
                setting.set(loop.times)
    for name in _arguments(call):
        argument = Argument(name)
        if sets(partial(argument, model), found):
            return argument, found
    return None, found


def _divided(found: Repeats) -> Iterator[Repeats]:
    """The loop with one block a recurrence, and then with two and more."""
    for blocks in range(1, found.times // 2 + 1):
        if found.times % blocks == 0:
            yield Repeats(found.start, found.length * blocks, found.times // blocks)


def whole_numbers(model: nn.Module, layers: list[Call], value: int) -> list[str]:
    """Paths of whole numbers of this value: in the model, in what lies around its layers, and in their
    configurations."""
    inside = tuple(f"{one.path}." for one in layers)
    found: list[str] = []
    for path, module in model.named_modules():
        if not any(f"{path}.".startswith(prefix) for prefix in inside):
            found += _numbers_in(module, f"{path}." if path else "", value, depth=3)
    # A configuration is what a user would set; the same one hangs on many modules.
    by_place = {(id(Setting(model, path).owner), path.rpartition(".")[2]): path for path in reversed(found)}
    return sorted(by_place.values(), key=lambda path: (not path.startswith("config."), path.count("."), path))


def named_as_one(model: nn.Module, layers: list[Call]) -> list[str]:
    """Paths of numbers of 1 that are called as a number of recurrences is."""
    return [path for path in whole_numbers(model, layers, 1) if LOOPS.search(path.rpartition(".")[2])]


def _numbers_in(owner: Any, prefix: str, value: int, depth: int) -> list[str]:
    found: list[str] = []
    entries = owner if isinstance(owner, dict) else getattr(owner, "__dict__", {})
    for name, entry in list(entries.items()):
        if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
            continue
        if isinstance(entry, bool | nn.Module | Tensor | type) or callable(entry):
            continue
        if isinstance(entry, int):
            found += [f"{prefix}{name}"] if entry == value else []
        elif depth > 1 and (isinstance(entry, dict) or hasattr(entry, "__dict__")):
            found += _numbers_in(entry, f"{prefix}{name}.", value, depth - 1)
    return found


def _arguments(call: ModelCall) -> list[str]:
    """Arguments of the model's forward that may hold the number."""
    if call.is_given:
        return []
    with suppress(ValueError):
        parameters = list(inspect.signature(call.model.forward).parameters.values())[1:]
        kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return [
            each.name
            for each in parameters
            if each.kind in kinds
            and ((isinstance(each.default, int) and not isinstance(each.default, bool)) or each.default is None)
            and _COUNTS.search(each.name)
        ]
    return []
