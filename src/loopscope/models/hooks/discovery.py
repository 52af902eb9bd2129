"""Which of a model's modules are its layers, which of them loop, and what sets how often: seen in a forward pass."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from loopscope.errors import ConfigError
from loopscope.models.hooks.calls import ModelCall, arguments_of, outputs_of
from loopscope.models.hooks.layout import HookedLayer, HookLayout, two_stacks
from loopscope.models.hooks.order import Repeats, find_repeats, is_one_loop, order_in_words
from loopscope.models.hooks.pausing import ForwardContext, Setting
from loopscope.models.hooks.probe import is_rounding
from loopscope.models.subject import Batch

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)

_COUNTS = re.compile(r"step|loop|recur|cycle|iter|pass|turn|repeat|depth|times|ponder|n_|num")
"""What an argument of `forward` is called that may be the number of recurrences and has no default number."""

_ADVICE = "say which layers to watch, as in loopscope.hook(model, prelude=..., recurrent=..., coda=...)"


@dataclass(frozen=True, slots=True)
class Found:
    """What a forward pass showed of a model."""

    layout: HookLayout
    recurrences: int | None
    """None without a loop."""
    setting: str | Callable[[nn.Module, int], Mapping[str, Any] | None] | None
    """What sets the number of recurrences, as `set_recurrences` takes it; None where nothing was found."""
    sentence: str
    """All of it, for the user."""


@dataclass(slots=True, eq=False)
class _Call:
    path: str
    module: nn.Module
    inside: _Call | None
    received: Tensor | None
    put_out: Tensor | None = None
    end: int = -1
    """How many calls had begun when it ended."""

    @property
    def width(self) -> int | None:
        """Of the states, for a module that maps states to states."""
        if self.received is None or self.put_out is None or self.received.shape[:2] != self.put_out.shape[:2]:
            return None
        return self.put_out.shape[2]


def find_layout(
    call: ModelCall, batch: Batch, *, extra: Mapping[str, Any] | None = None, find_setting: bool = True
) -> Found:
    """The layout that is known of a model of two stacks, or what `discover` finds of any other."""
    stacks = two_stacks(call.model)
    if stacks is None:
        return discover(call, batch, extra=extra, find_setting=find_setting)
    recurrences = Setting(call.model, "config.H_cycles").get()
    sentence = f"a loop of one high cycle of its two stacks, {recurrences} times; config.H_cycles sets how often"
    return Found(stacks, recurrences, "config.H_cycles", sentence)


def discover(
    call: ModelCall, batch: Batch, *, extra: Mapping[str, Any] | None = None, find_setting: bool = True
) -> Found:
    """Run the model once, see which modules it calls in which order, and then try which setting changes how often.

    A layer is an entry of a list of modules that maps states to states, or any other module of the same type or that
    is called more than once. Raises `ConfigError` that names the order of calls where it is no single loop between
    layers that are called once. What the model itself raises is passed on.
    """
    model = call.model
    calls = _Forward(call, batch, extra or {}).calls()
    layers = _layer_calls(model, calls)
    if not layers:
        seen = ", ".join(dict.fromkeys(one.path for one in calls if one.path))[:200] or "no module"
        raise ConfigError(f"No layers can be told in {type(model).__name__}, which called {seen}; {_ADVICE}.")
    order = _numbers([one.module for one in layers])
    found = find_repeats(order)
    if found is None:
        return Found(
            HookLayout(prelude=_hooked(layers), recurrent=(), coda=()),
            None,
            None,
            f"{len(layers)} layers, each called once: {order_in_words([one.path for one in layers])}",
        )
    if not is_one_loop(order, found):
        raise ConfigError(
            f"{type(model).__name__} calls its layers in the order {order_in_words([one.path for one in layers])}, "
            f"which is not one loop between layers that are called once; {_ADVICE}."
        )
    setting, found = _setting(call, batch, layers, found) if find_setting and not extra else (None, found)
    return _looped(layers, calls, found, setting)


def calls_whatever_is_set(
    call: ModelCall, batch: Batch, first: nn.Module, set_to: Callable[[int], Mapping[str, Any]], counts: Sequence[int]
) -> int | None:
    """How often the model calls the first layer of its loop, if that is the same whichever of the numbers is set."""
    found = {len(_Forward(call, batch, set_to(count)).calls([first])) for count in counts}
    return found.pop() if len(found) == 1 else None


def branches(call: ModelCall, batch: Batch, layout: HookLayout, extra: Mapping[str, Any]) -> str | None:
    """Why what the watched modules put out may be no states, in words; None where one receives what another put out.

    A module that is given the residual stream and returns what is to be added to it is no layer: its output is not the
    next one's input, and often that input is its own plus its output.
    """
    calls = _Forward(call, batch, extra).calls(layout.modules)
    loop = slice(len(layout.prelude), len(calls) - len(layout.coda))
    for part in (calls[: loop.start], calls[loop], calls[loop.stop :]):
        found = _branches(part, layout)
        if found is not None:
            return found
    return None


def _branches(calls: Sequence[_Call], layout: HookLayout) -> str | None:
    """Of one stage."""
    pairs = [(one, after) for one, after in pairwise(calls) if one.put_out is not None and after.received is not None]
    # From one recurrence to the next, something may be added to a state as well.
    first = layout.recurrent[0].module if layout.recurrent else None
    within = [pair for pair in pairs if pair[1].module is not first]
    added = [one for one, after in pairs if _is_sum(after.received, one)]
    if not pairs or any(_same(after.received, one.put_out) for one, after in pairs):
        return None
    if added:
        return (
            f"what {added[0].path} puts out is added to what it received before the next layer receives it; it returns "
            "a branch, and so its 'states' are no states of the residual stream; watch the module around it"
        )
    if within:
        return (
            "no watched layer receives what the one before it put out, so that they may return branches which are "
            "added outside, and their outputs be no states of the residual stream"
        )
    return None


def _is_sum(received: Tensor | None, one: _Call) -> bool:
    """What it received plus what it put out, to rounding."""
    if received is None or one.received is None or one.put_out is None or one.put_out.shape != received.shape:
        return False
    return one.received.shape == received.shape and is_rounding(one.received + one.put_out, received)


def _looped(layers: list[_Call], calls: list[_Call], found: Repeats, setting: str | _Argument | None) -> Found:
    block = layers[found.start : found.start + found.length]
    end = _loop_end(layers, calls, found)
    layout = HookLayout(
        prelude=_hooked(layers[: found.start]),
        recurrent=_hooked(block),
        coda=_hooked(layers[found.stop :]),
        loop_end=end,
    )
    how = "nothing was found that sets how often"
    if setting is not None:
        how = f"{setting} sets how often"
    sentence = (
        f"a loop of {order_in_words([one.path for one in block])}, {found.times} times, with {found.start} layers "
        f"before and {len(layout.coda)} after it; {how}"
    )
    if end is not None:
        sentence += f"; {end.path} ends each recurrence"
    return Found(layout, found.times, setting, sentence)


def _hooked(layers: Sequence[_Call]) -> tuple[HookedLayer, ...]:
    return tuple(HookedLayer(one.path, one.module) for one in layers)


def _numbers(modules: Sequence[nn.Module]) -> list[int]:
    """The same number for the same module."""
    known: dict[nn.Module, int] = {}
    return [known.setdefault(module, len(known)) for module in modules]


class _Forward:
    """A forward pass of which the order of calls is kept, and nothing else is changed."""

    def __init__(self, call: ModelCall, batch: Batch, extra: Mapping[str, Any]) -> None:
        self._call, self._batch, self._extra = call, batch, extra
        self._calls: list[_Call] = []
        self._open: list[_Call] = []

    def calls(self, only: Sequence[nn.Module] | None = None) -> list[_Call]:
        """Of all modules, or of those."""
        model = self._call.model
        context = ForwardContext(model, setting=None, recurrences=0, seed=0)
        with ExitStack() as stack:
            for path, module in model.named_modules():
                if path and (only is None or any(module is one for one in only)):
                    before = module.register_forward_pre_hook(self._before(path), with_kwargs=True)
                    stack.callback(before.remove)
                    stack.callback(module.register_forward_hook(self._after).remove)
            stack.callback(context.give_back)
            context.take()
            with torch.no_grad():
                self._call(self._batch, self._extra)
        return self._calls

    def _before(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inside = self._open[-1] if self._open else None
            begun = _Call(path, module, inside, self._states(arguments_of(module, args, kwargs)))
            self._calls.append(begun)
            self._open.append(begun)

        return begin

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        while (done := self._open.pop()).module is not module:
            pass  # it failed, and the model went on without it
        done.put_out, done.end = self._states(outputs_of(output)), len(self._calls)

    def _states(self, values: Sequence[Any]) -> Tensor | None:
        shape = self._batch.input_ids.shape
        floats = (each for each in values if isinstance(each, Tensor) and each.is_floating_point())
        return next((each for each in floats if each.ndim == 3 and each.shape[:2] == shape), None)


def _layer_calls(model: nn.Module, calls: list[_Call]) -> list[_Call]:
    """The calls of layers, in order, none within another.

    The outermost lists are looked at first. Where nothing in them comes twice, a list further inside may hold the loop,
    or a module that is in no list.
    """
    widths = Counter(one.width for one in calls if one.width is not None)
    width = max(widths, key=lambda each: widths[each], default=None)
    maps = [one for one in calls if one.width is not None and one.width == width]
    entries = {entry for module in model.modules() if isinstance(module, _LISTS) for entry in module.children()}
    listed = _same_kind([one for one in maps if one.module in entries])
    times = Counter(one.module for one in maps)
    blocks = [one for one in maps if one.module not in entries and times[one.module] > 1]
    blocks = [one for one in blocks if next(one.module.parameters(), None) is not None]
    if listed or any(any(one.module.children()) for one in blocks):
        blocks = [one for one in blocks if any(one.module.children())]
    # A block that comes twice is a layer whatever lists are in it, unless it is a stack of layers.
    stacks = {one.module for one in blocks if _is_stack(one, listed)}
    blocks = _outermost([one for one in blocks if one.module not in stacks])
    within = set(blocks)
    listed = [one for one in listed if not any(each in within for each in _around(one))]
    outermost = _outermost(listed)
    for chosen in (outermost, *_further_inside(listed, outermost)):
        if _comes_twice(chosen):
            outermost = chosen
            break
    chosen = _outermost(sorted({*outermost, *blocks}, key=calls.index))
    return _with_kin(maps, chosen)


def _is_stack(block: _Call, listed: Sequence[_Call]) -> bool:
    """It calls the layers of a list, each with what the one before it put out, and little else."""
    inside = _outermost([one for one in listed if block in _around(one)])
    if not inside or not all(any(one.module.children()) for one in inside):
        return False
    if len(inside) == 1:
        return _same(inside[0].put_out, block.put_out)
    return all(_same(after.received, one.put_out) for one, after in pairwise(inside))


def _comes_twice(layers: Sequence[_Call]) -> bool:
    return len({one.module for one in layers}) < len(layers)


def _same_kind(layers: list[_Call]) -> list[_Call]:
    """Without norms and projections that are in a list, where other entries are made of modules."""
    made = [one for one in layers if any(one.module.children())]
    return made or layers


def _outermost(layers: Sequence[_Call]) -> list[_Call]:
    there = set(layers)
    return [one for one in layers if not any(each in there for each in _around(one))]


def _around(one: _Call) -> Iterator[_Call]:
    while one.inside is not None:
        one = one.inside
        yield one


def _further_inside(listed: list[_Call], outermost: list[_Call]) -> Iterator[list[_Call]]:
    """The same with an entry given up for those of the lists within it, level by level."""
    while True:
        known = set(outermost)
        inner = _outermost([one for one in listed if one not in known and any(each in known for each in _around(one))])
        opened = {each for one in inner for each in _around(one)}
        if not inner:
            return
        outermost = [one for one in listed if (one in known and one not in opened) or one in set(inner)]
        yield outermost


def _with_kin(maps: Sequence[_Call], layers: list[_Call]) -> list[_Call]:
    """With single modules of the type of a layer that stand beside them, such as a last block."""
    kinds = {type(one.module) for one in layers if any(one.module.children())}
    known = set(layers)
    within = {each for one in layers for each in _around(one)}
    return [
        one
        for one in maps
        if one in known
        or (type(one.module) in kinds and one not in within and not any(each in known for each in _around(one)))
    ]


def _loop_end(layers: list[_Call], calls: list[_Call], found: Repeats) -> HookedLayer | None:
    """A module that ends once in every recurrence after its last layer, and whose output the next one begins with."""
    firsts = [layers[found.start + turn * found.length] for turn in range(found.times)]
    lasts = [layers[found.start + (turn + 1) * found.length - 1] for turn in range(found.times)]
    following = [*firsts[1:], layers[found.stop] if found.stop < len(layers) else None]
    place = {id(one): number for number, one in enumerate(calls)}
    ends: list[set[nn.Module]] = []
    for last, begins in zip(lasts, following, strict=True):
        until = len(calls) if begins is None else place[id(begins)]
        # Also one around the layers: a stack that ends with a norm.
        gap = [one for one in calls if place[id(last)] != place[id(one)] and last.end <= one.end <= until]
        gap = [one for one in gap if one is not last and last not in _around(one)]
        ends.append({one.module for one in gap if one.width is not None})
    for one in reversed(calls):
        if not all(one.module in those for those in ends):
            continue
        outputs = [each.put_out for each in calls if each.module is one.module]
        if len(outputs) != found.times:
            continue
        passed = all(_same(got, begun.received) for got, begun in zip(outputs[:-1], firsts[1:], strict=True))
        if passed and not all(_same(got, last.put_out) for got, last in zip(outputs, lasts, strict=True)):
            return HookedLayer(one.path, one.module)
    return None


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one.shape != other.shape:
        return False
    return one is other or (not one.is_meta and torch.equal(one, other))


class _Argument:
    """A keyword argument of the model's forward as `set_recurrences`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, model: nn.Module, recurrences: int) -> dict[str, int]:
        return {self._name: recurrences}

    def __str__(self) -> str:
        return f"the argument {self._name} of its forward"


def _setting(
    call: ModelCall, batch: Batch, layers: list[_Call], found: Repeats
) -> tuple[str | _Argument | None, Repeats]:
    """What sets the number of recurrences, if it is found, and the loop as it counts them: a block may be repeated a
    fixed number of times within a recurrence."""
    modules = list({one.module for one in layers})
    order = [one.module for one in layers]

    def after(change: Callable[[int], Mapping[str, Any]], count: int) -> list[nn.Module] | None:
        with suppress(Exception):  # what a wrong setting breaks is no matter
            return [one.module for one in _Forward(call, batch, change(count)).calls(modules)]
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
        for path in _attributes(model, layers, loop.times):
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
        argument = _Argument(name)
        if sets(lambda count, argument=argument: argument(model, count), found):  # type: ignore[misc]
            return argument, found
    return None, found


def _divided(found: Repeats) -> Iterator[Repeats]:
    """The loop with one block a recurrence, and then with two and more."""
    for blocks in range(1, found.times // 2 + 1):
        if found.times % blocks == 0:
            yield Repeats(found.start, found.length * blocks, found.times // blocks)


def _attributes(model: nn.Module, layers: list[_Call], value: int) -> list[str]:
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


def _numbers_in(owner: Any, prefix: str, value: int, depth: int) -> list[str]:
    found: list[str] = []
    for name, entry in list(getattr(owner, "__dict__", {}).items()):
        if name.startswith("_") or isinstance(entry, bool | nn.Module | Tensor | type) or callable(entry):
            continue
        if isinstance(entry, int):
            found += [f"{prefix}{name}"] if entry == value else []
        elif depth > 1 and hasattr(entry, "__dict__"):
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
