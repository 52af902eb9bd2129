"""The calls of a model's modules in one forward pass, in order, with the states that they receive and put out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loopscope.models.hooks.calls import ModelCall, arguments_of, outputs_of
from loopscope.models.hooks.pausing import ForwardContext
from loopscope.models.subject import Batch


@dataclass(slots=True, eq=False)
class Call:
    """One call of one module."""

    path: str
    module: nn.Module
    inside: Call | None
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
        model = self._call.model
        context = ForwardContext(model, setting=None, recurrences=0, seed=0)
        with ExitStack() as stack:
            for path, module in model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue  # it takes no hooks
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
            begun = Call(path, module, inside, self._states(arguments_of(module, args, kwargs)))
            self._calls.append(begun)
            self._open.append(begun)

        return begin

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        while (done := self._open.pop()).module is not module:
            pass  # it failed, and the model went on without it
        done.put_out, done.end = self._states(outputs_of(output)), len(self._calls)
        received = {tuple(each.shape) for each in args if isinstance(each, Tensor)}
        batch, tokens = self._batch.input_ids.shape
        for each in outputs_of(output):
            shape = tuple(each.shape) if isinstance(each, Tensor) else ()
            if len(shape) == 3 and shape[0] == batch and shape[1] > tokens and shape in received:
                self.longer[module, shape] += 1

    def _states(self, values: Sequence[Any]) -> Tensor | None:
        batch, tokens = self._batch.input_ids.shape
        shape = (batch, tokens + self._call.tokens_before)
        floats = (each for each in values if isinstance(each, Tensor) and each.is_floating_point())
        found = next((each for each in floats if each.ndim == 3 and each.shape[:2] == shape), None)
        return None if found is None else found.to(self._batch.input_ids.device)


def is_same(one: Tensor | None, other: Tensor | None) -> bool:
    """The same numbers; of tensors without numbers, the same tensor."""
    if one is None or other is None or one.shape != other.shape:
        return False
    return one is other or (not one.is_meta and torch.equal(one, other))
