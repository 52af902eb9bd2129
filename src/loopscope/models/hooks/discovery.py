"""Which of a model's modules are its layers, which of them loop, and what sets how often: seen in a forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from textwrap import shorten
from typing import Any

from torch import Tensor, nn

from loopscope.errors import ConfigError
from loopscope.models.hooks.called import Call, WatchedForward, is_same
from loopscope.models.hooks.calls import FORMS, ModelCall
from loopscope.models.hooks.how_often import (
    Argument,
    Repeats,
    find_repeats,
    find_setting,
    is_one_loop,
    named_as_one,
    order_in_words,
)
from loopscope.models.hooks.layout import HookedLayer, HookLayout, two_stacks
from loopscope.models.hooks.pausing import Setting
from loopscope.models.hooks.probe import is_rounding, with_other_end
from loopscope.models.subject import Batch

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)

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


def find_layout(
    call: ModelCall, batch: Batch, *, extra: Mapping[str, Any] | None = None, with_setting: bool = True
) -> Found:
    """The layout that is known of a model of two stacks, or what `discover` finds of any other."""
    stacks = two_stacks(call.model)
    if stacks is None:
        return discover(call, batch, extra=extra, with_setting=with_setting)
    recurrences = Setting(call.model, "config.H_cycles").get()
    sentence = f"a loop of one high cycle of its two stacks, {recurrences} times; config.H_cycles sets how often"
    return Found(stacks, recurrences, "config.H_cycles", sentence)


def discover(
    call: ModelCall, batch: Batch, *, extra: Mapping[str, Any] | None = None, with_setting: bool = True
) -> Found:
    """Run the model once, see which modules it calls in which order, and then try which setting changes how often.

    A layer is an entry of a list of modules that maps states to states, or any other module of the same type or that
    is called more than once. Raises `ConfigError` that names the order of calls where it is no single loop between
    layers that are called once. What the model itself raises is passed on.
    """
    model = call.model
    for form in FORMS:
        call.form = form
        watched = WatchedForward(call, batch, extra or {})
        calls = watched.calls()
        layers = _layer_calls(model, calls)
        if not _comes_twice(layers):
            _refuse_longer(watched, batch)
        if layers:
            break
    if not layers:
        seen = shorten(", ".join(dict.fromkeys(one.path for one in calls)), 200, placeholder=" ...") or "no module"
        raise ConfigError(
            f"No layers can be told in {type(model).__name__}, which called {seen}: none of them maps states of all "
            "tokens to states of as many in a list of modules, or again and again. What loops has to be a module that "
            f"does; then {_ADVICE}."
        )
    in_words = order_in_words([one.path for one in layers])
    if not _comes_twice(layers):
        once = _looped_once(call, batch, layers) if with_setting and not extra else None
        chain = HookLayout(prelude=_hooked(layers), recurrent=(), coda=())
        if once is None:
            _refuse_products(call, batch, layers, extra or {})
        return once or Found(chain, None, None, f"{len(layers)} layers, each called once: {in_words}")
    looped = next((each for each in _without_lists(layers) if _one_loop(each) is not None), None)
    if looped is None:
        raise ConfigError(
            f"{type(model).__name__} calls its layers in the order {in_words}, which is not one loop between layers "
            f"that are called once; {_ADVICE}."
        )
    found = _one_loop(looped)
    assert found is not None  # or it would not have been taken
    setting, found = find_setting(call, batch, looped, found) if with_setting and not extra else (None, found)
    return _looped(looped, calls, found, setting)


def _refuse_longer(watched: WatchedForward, batch: Batch) -> None:
    """Raises `ConfigError` where no loop is seen in the prompt's tokens, but some module is called again and again with
    states of more of them."""
    shapes = [shape for (module, shape), times in watched.longer.most_common() if times > 1]
    if shapes:
        batches, tokens = batch.input_ids.shape
        raise ConfigError(
            f"A module is called {watched.longer.most_common()[0][1]} times with states of {shapes[0]}, for "
            f"{(batches, tokens)} tokens; if the model puts {shapes[0][1] - tokens} tokens before the text (registers, "
            f"a puzzle's tokens), say so, as in loopscope.hook(model, tokens_before={shapes[0][1] - tokens}); "
            "within the text or behind it they are not supported."
        )


def _refuse_products(call: ModelCall, batch: Batch, layers: list[Call], extra: Mapping[str, Any]) -> None:
    """Raises `ConfigError` where what is between layers that are called once, or within one of them, multiplies by one
    weight again and again: a loop that is no module's is none that hooks could see."""
    width = layers[0].width
    assert width is not None  # it maps states to states
    modules = [one.module for one in layers]
    for name, times in WatchedForward(call, batch, extra).repeated_products(modules, width).items():
        raise ConfigError(
            f"{type(call.model).__name__} calls each of its {len(layers)} layers once, and multiplies states by {name} "
            f"{times} times in between, or within one of them, so that something loops which is no layer. Make it a "
            "module that is called in every recurrence, and name it; or name the layers, as in "
            "loopscope.hook(model, prelude=...), to watch them as a chain."
        )


def _one_loop(layers: Sequence[Call]) -> Repeats | None:
    known: dict[nn.Module, int] = {}  # the same number for the same module
    order = [known.setdefault(module, len(known)) for module in (one.module for one in layers)]
    found = find_repeats(order)
    return found if found is not None and is_one_loop(order, found) else None


def _without_lists(layers: list[Call]) -> Iterator[list[Call]]:
    """All of the layers, and then without one list of which no entry is called twice, such as one with an entry for
    each recurrence."""
    yield layers
    times = Counter(one.module for one in layers)
    lists = dict.fromkeys(one.path.rpartition(".")[0] for one in layers)
    for path in lists:
        entries = [one for one in layers if one.path.rpartition(".")[0] == path]
        if all(times[one.module] == 1 for one in entries) and len(entries) < len(layers):
            yield [one for one in layers if one not in entries]


def _looped_once(call: ModelCall, batch: Batch, layers: list[Call]) -> Found | None:
    """Of layers that are called once: the loop that shows when a number of 1 that is named like one is set to 2."""
    for path in named_as_one(call.model, layers):
        setting = Setting(call.model, path)
        try:
            with suppress(Exception):  # what a wrong setting breaks is no matter
                setting.set(2)
                calls = WatchedForward(call, batch, {}).calls()
                twice = _layer_calls(call.model, calls)
                found = _one_loop(twice)
                if found is not None and found.times == 2:
                    once = [*twice[: found.start + found.length], *twice[found.stop :]]
                    if [one.module for one in once] == [one.module for one in layers]:
                        return _looped(twice, calls, found, path, recurrences=1)
        finally:
            setting.set(1)
    return None


def branches(call: ModelCall, batch: Batch, layout: HookLayout, extra: Mapping[str, Any]) -> str | None:
    """Why what the watched modules put out may be no states, in words; None where one receives what another put out.

    A module that is given the residual stream and returns what is to be added to it is no layer: its output is not the
    next one's input, and often that input is its own plus its output.
    """
    calls = WatchedForward(call, batch, extra).calls(layout.modules)
    loop = slice(len(layout.prelude), len(calls) - len(layout.coda))
    for part in (calls[: loop.start], calls[loop], calls[loop.stop :]):
        found = _branches(part, layout)
        if found is not None:
            return found
    return None


def _branches(calls: Sequence[Call], layout: HookLayout) -> str | None:
    """Of one stage."""
    pairs = [(one, after) for one, after in pairwise(calls) if one.put_out is not None and after.received is not None]
    # From one recurrence to the next, something may be added to a state as well.
    first = layout.recurrent[0].module if layout.recurrent else None
    within = [pair for pair in pairs if pair[1].module is not first]
    # A loop from zero to which the prompt is added begins with what looks like such a sum.
    sums = {id(one): _is_sum(after.received, one) for one, after in pairs}
    added = [one for one, _ in pairs if all(sums[id(each)] for each, _ in pairs if each.module is one.module)]
    if not pairs or any(is_same(after.received, one.put_out) for one, after in pairs):
        return None
    if added:
        return (
            f"what {added[0].path} puts out is added to what it received before the next layer receives it; it returns "
            "a branch, and so its 'states' are no states of the residual stream; watch the module around it, or one "
            "whose first output is the state"
        )
    if within:
        return (
            "no watched layer receives what the one before it put out, so that they may return branches which are "
            "added outside, and their outputs be no states of the residual stream"
        )
    return None


def check_places(call: ModelCall, batch: Batch, layout: HookLayout, extra: Mapping[str, Any], *, whole: bool) -> None:
    """Raises `ConfigError` where another first or last token of the prompt changes another place of what the first
    layer receives than `tokens_before` says; of a layout that is the `whole` model, also where it changes the tokens
    before."""
    first = [(layout.prelude or layout.recurrent)[0].module]
    before, tokens = call.tokens_before, batch.input_ids.shape[1]
    as_it_is = WatchedForward(call, batch, extra).calls(first)[0].received
    for place in (0, tokens - 1):
        other = WatchedForward(call, with_other_end(batch, place), extra).calls(first)[0].received
        if as_it_is is None or other is None:
            return
        moved = (as_it_is != other).any(-1)[0].nonzero().flatten().tolist()
        if moved and (before + place not in moved or (whole and moved[0] < before)):
            raise ConfigError(
                f"tokens_before={before} is not where the text begins: another token {place} of {tokens} changes the "
                f"state in place {moved[0]} of {as_it_is.shape[1]} before any layer, not {before + place}. "
                "Tokens that a model puts within the text or behind it, or states of others than tokens, are not "
                "supported; hook it with all that it adds in front."
            )


def _is_sum(received: Tensor | None, one: Call) -> bool:
    """What it received plus what it put out, to rounding."""
    if received is None or one.received is None or one.put_out is None or one.put_out.shape != received.shape:
        return False
    return one.received.shape == received.shape and is_rounding(one.received + one.put_out, received)


def _looped(
    layers: list[Call],
    calls: list[Call],
    found: Repeats,
    setting: str | Argument | None,
    recurrences: int | None = None,
) -> Found:
    """What was found, of a model whose own number is another than these calls show if it is given."""
    times = found.times if recurrences is None else recurrences
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
        f"a loop of {order_in_words([one.path for one in block])}, {times} times, with {found.start} layers "
        f"before and {len(layout.coda)} after it; {how}"
    )
    if end is not None:
        sentence += f"; {end.path} ends each recurrence"
    return Found(layout, times, setting, sentence)


def _hooked(layers: Sequence[Call]) -> tuple[HookedLayer, ...]:
    return tuple(HookedLayer(one.path, one.module) for one in layers)


def _layer_calls(model: nn.Module, calls: list[Call]) -> list[Call]:
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
    # A norm that comes again and again is a part of what loops, and its output is not what goes round.
    blocks = [one for one in blocks if not type(one.module).__name__.endswith("Norm")]
    blocks = [one for one in blocks if next(one.module.parameters(), None) is not None]
    if listed or any(any(one.module.children()) for one in blocks):
        blocks = [one for one in blocks if any(one.module.children())]
    # A block that comes twice is a layer whatever lists are in it, unless it is a stack of layers.
    stacks = {one.module for one in blocks if _is_stack(one, listed)}
    blocks = _outermost([one for one in blocks if one.module not in stacks])
    within = set(blocks)
    listed = [one for one in listed if not any(each in within for each in one.around())]
    outermost = _outermost(listed)
    for chosen in (outermost, *_further_inside(listed, outermost)):
        if _comes_twice(chosen):
            outermost = chosen
            break
    chosen = _outermost(sorted({*outermost, *blocks}, key=calls.index))
    return _with_kin(maps, chosen)


def _is_stack(block: Call, listed: Sequence[Call]) -> bool:
    """It calls the layers of a list, each with what the one before it put out, and little else."""
    inside = _outermost([one for one in listed if block in one.around()])
    if not inside or not all(any(one.module.children()) for one in inside):
        return False
    if len(inside) == 1:
        return is_same(inside[0].put_out, block.put_out)
    return all(is_same(after.received, one.put_out) for one, after in pairwise(inside))


def _comes_twice(layers: Sequence[Call]) -> bool:
    return len({one.module for one in layers}) < len(layers)


def _same_kind(layers: list[Call]) -> list[Call]:
    """Without norms and projections that are in a list, where other entries are made of modules."""
    made = [one for one in layers if any(one.module.children())]
    return made or layers


def _outermost(layers: Sequence[Call]) -> list[Call]:
    there = set(layers)
    return [one for one in layers if not any(each in there for each in one.around())]


def _further_inside(listed: list[Call], outermost: list[Call]) -> Iterator[list[Call]]:
    """The same with an entry given up for those of the lists within it, level by level."""
    while True:
        known = set(outermost)
        inner = _outermost([one for one in listed if one not in known and any(each in known for each in one.around())])
        opened = {each for one in inner for each in one.around()}
        if not inner:
            return
        outermost = [one for one in listed if (one in known and one not in opened) or one in set(inner)]
        yield outermost


def _with_kin(maps: Sequence[Call], layers: list[Call]) -> list[Call]:
    """With single modules of the type of a layer that stand beside them, such as a last block."""
    kinds = {type(one.module) for one in layers if any(one.module.children())}
    known = set(layers)
    within = {each for one in layers for each in one.around()}
    return [
        one
        for one in maps
        if one in known
        or (type(one.module) in kinds and one not in within and not any(each in known for each in one.around()))
    ]


def _loop_end(layers: list[Call], calls: list[Call], found: Repeats) -> HookedLayer | None:
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
        gap = [one for one in gap if one is not last and last not in one.around()]
        ends.append({one.module for one in gap if one.width is not None})
    for one in reversed(calls):
        if not all(one.module in those for those in ends):
            continue
        outputs = [each.put_out for each in calls if each.module is one.module]
        if len(outputs) != found.times:
            continue
        passed = all(is_same(got, begun.received) for got, begun in zip(outputs[:-1], firsts[1:], strict=True))
        if passed and not all(is_same(got, last.put_out) for got, last in zip(outputs, lasts, strict=True)):
            return HookedLayer(one.path, one.module)
    return None
