"""The calls of a model's modules in one forward pass, in order, with the states that they receive and put out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from loopscope.models.hooks.calls import FORMS, ModelCall, arguments_of, outputs_of
from loopscope.models.hooks.pausing import ForwardContext
from loopscope.models.subject import Batch

_PRODUCTS = frozenset(
    {
        functional.linear,
        torch.matmul,
        Tensor.matmul,
        Tensor.__matmul__,
        torch.bmm,
        Tensor.bmm,
        torch.einsum,
        torch.addmm,
    }
)


class _Products(TorchFunctionMode):
    """Tells of every product of tensors."""

    def __init__(self, tell: Callable[[Tensor, tuple[Any, ...]], None]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            self._tell(result, args)
        return result


@dataclass(slots=True, eq=False)
class Call:
    """One call of one module, or of one that shares all of its weights."""

    path: str
    module: nn.Module
    inside: Call | None
    given: list[Tensor]
    """All that may be states among its arguments."""
    received: Tensor | None
    put_out: Tensor | None = None
    end: int = -1
    """How many calls had begun when it ended."""

    def around(self) -> Iterator[Call]:
        """The calls that this one lies in, from the inside outwards."""
        outer = self.inside
        while outer is not None:
            yield outer
            outer = outer.inside

    @property
    def width(self) -> int | None:
        """Of the states, for a module that maps states to states."""
        if self.received is None or self.put_out is None or self.received.shape != self.put_out.shape:
            return None
        return self.put_out.shape[2]


class WatchedForward:
    """A forward pass of which the order of calls is kept, and nothing else is changed."""

    def __init__(self, call: ModelCall, batch: Batch, extra: Mapping[str, Any]) -> None:
        self._call, self._batch, self._extra = call, batch, extra
        self._calls: list[Call] = []
        self._open: list[Call] = []
        self.longer: Counter[tuple[nn.Module, tuple[int, ...]]] = Counter()
        """How often a module mapped what may be states of more tokens than there are to as many, by their shape."""

    def calls(self, only: Sequence[nn.Module] | None = None) -> list[Call]:
        """Of all modules, or of those."""
        model, twins = self._call.model, self._call.twins
        paths = {module: path for path, module in model.named_modules()}
        context = ForwardContext(model, setting=None, recurrences=0, seed=0)
        with ExitStack() as stack:
            for module in paths:
                if isinstance(module, torch.jit.ScriptModule):
                    continue  # it takes no hooks
                same = twins.get(module, module)
                if module is not model and (only is None or any(one in (module, same) for one in only)):
                    before = module.register_forward_pre_hook(self._before(paths[same], same), with_kwargs=True)
                    stack.callback(before.remove)
                    stack.callback(module.register_forward_hook(self._after).remove)
            stack.callback(context.give_back)
            context.take()
            with torch.no_grad():
                self._call(self._batch, self._extra)
        return self._calls

    def _before(self, path: str, same: nn.Module) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inside = self._open[-1] if self._open else None
            given = self._states(arguments_of(module, args, kwargs))
            received = next(iter([*given[self._call.skips.get(same, 0) :], *given]), None)
            begun = Call(path, same, inside, given, received)
            self._calls.append(begun)
            self._open.append(begun)

        return begin

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        same = self._call.twins.get(module, module)
        while (done := self._open.pop()).module is not same:
            pass  # it failed, and the model went on without it
        done.put_out, done.end = next(iter(self._states(outputs_of(output))), None), len(self._calls)
        batch, tokens = self._batch.input_ids.shape
        given, returned = (
            {tuple(each.shape) for value in values if (each := self._call.as_states(value, batch, tokens)) is not None}
            for values in (args, outputs_of(output))
        )
        self.longer.update((module, shape) for shape in given & returned if shape[0] == batch and shape[1] > tokens)

    def repeated_products(self, layers: Sequence[nn.Module], width: int) -> dict[str, int]:
        """The weights by which something is multiplied more than once between these modules' calls, or within one of
        them, to states of all tokens; how often."""
        counts: Counter[tuple[nn.Parameter, int]] = Counter()
        factors: dict[tuple[nn.Parameter, int], list[Tensor]] = {}
        known, size = set(layers), self._batch.input_ids.shape.numel() * width

        def count(result: Tensor, args: tuple[Any, ...]) -> None:
            call = next((id(one) for one in self._open if one.module in known), 0)
            for weight in (each for each in args if isinstance(each, nn.Parameter) and result.numel() == size):
                # One thing that is multiplied by one weight twice, for keys and values, is no loop.
                others = factors.setdefault((weight, call), [])
                if not any(args[0] is other for other in others):
                    others.append(args[0])
                    counts[weight, call] += 1

        with _Products(count):
            self.calls()
        names = {weight: name for name, weight in self._call.model.named_parameters()}
        return {names[weight]: times for (weight, _), times in counts.items() if times > 1}

    def _states(self, values: Sequence[Any]) -> list[Tensor]:
        batch, tokens = self._batch.input_ids.shape
        shape = (batch, tokens + self._call.tokens_before)
        states = (self._call.as_states(each, *shape) for each in values)
        home = self._batch.input_ids.device
        return [each.to(home) for each in states if each is not None and each.shape[:2] == shape]


def settle_form(call: ModelCall, batch: Batch, module: nn.Module, extra: Mapping[str, Any]) -> None:
    """Find in which form the model's states go through this module; "batch first" where none of them does."""
    for form in FORMS:
        call.form = form
        first = next(iter(WatchedForward(call, batch, extra).calls([module])), None)
        if first is None:
            break
        if first.received is not None and first.put_out is not None:
            return
    call.form = "batch first"


def settle_place(call: ModelCall, batch: Batch, ends: Sequence[nn.Module], first: nn.Module, extra: Any) -> None:
    """Find which of the states that the loop's first layer is given goes round: what one of `ends` has just put out.
    The first one, where none is."""
    ended: Tensor | None = None
    for one in WatchedForward(call, batch, extra).calls([first, *ends]):
        if one.module is first and ended is not None:
            place = next((place for place, given in enumerate(one.given) if is_same(given, ended)), 0)
            call.skips = {first: place}
            return
        ended = one.put_out if one.module in ends else ended


def is_same(one: Tensor | None, other: Tensor | None) -> bool:
    """The same numbers; of tensors without numbers, the same tensor."""
    if one is None or other is None or one.shape != other.shape:
        return False
    return one is other or (not one.is_meta and torch.equal(one, other))
