"""One forward pass of a hooked model: what its layers do, as events, one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loopscope._util.shapes import Logits, States
from loopscope._util.sites import Site, Stage
from loopscope.errors import ConfigError
from loopscope.models.hooks.attention import AttentionWatch
from loopscope.models.hooks.calls import ModelCall, arguments_of, outputs_of, with_other
from loopscope.models.hooks.halting import Halts
from loopscope.models.hooks.layout import Cursor, HookLayout
from loopscope.models.hooks.pausing import CallerState, ForwardContext, Pauses, Returned, SteppedCall
from loopscope.models.subject import Batch
from loopscope.models.visits import LoopState, Visit


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """What comes before the loop is done."""

    state: States
    """Input of the first recurrent layer, (batch, token, width); without a loop, the last layer's output."""


@dataclass(frozen=True, slots=True, eq=False)
class Injected:
    """A recurrence begins."""

    recurrence: int
    """Which one, from 1."""
    state: States
    """Input of the first recurrent layer, (batch, token, width)."""


Event = Ready | Injected | Visit | LoopState


@dataclass(frozen=True)
class ForwardSpec:
    """What one forward pass is made of."""

    call: ModelCall
    layout: HookLayout
    batch: Batch
    recurrences: int | None
    """None where the model itself knows and nobody else."""
    extra: Callable[[], Mapping[str, Any]]
    """More keyword arguments for the call, asked for when it begins."""
    context: ForwardContext
    blind: frozenset[tuple[Stage, int]]
    """(stage, layer) of the layers whose attention is not to be trusted."""
    copies: bool
    """The model overwrites what it announced: layers' outputs, or what attention was computed from."""
    width: int | None
    """Of every state; None where it is not known yet."""
    begins_with: States | None = None
    """What the first recurrent layer receives at the first call in place of its own input, (batch, token, width)."""
    gradients: bool = False
    """States are announced with the gradients that flow from them, as to `begins_with`."""
    attention_call: int | None = None
    """Of a layer that computes attention more than once, which is announced; None for none."""
    carries: bool | None = None
    """A recurrence begins with what the one before put out (True), or with that and something else (False), so that
    prompts that do otherwise have stopped by themselves. None where nobody knows."""


class HookedForward:
    """Iterates over the events of a forward pass, which stands still between them; afterwards there are `logits`.

    Where nobody is `listening`, only `Ready` and `LoopState` come.
    """

    def __init__(self, one: ForwardSpec) -> None:
        self.logits: Logits | None = None
        self._listener = _Listener()
        caller = CallerState(one.batch.input_ids.device)
        worker = _Worker(one, caller, self._listener)
        self._context = one.context
        self._call: SteppedCall[Event, Logits] = SteppedCall(worker.run)

    @property
    def listening(self) -> bool:
        return self._listener.listening

    @listening.setter
    def listening(self, value: bool) -> None:
        self._listener.listening = value

    def nudge(self, factors: Tensor) -> None:
        """Multiply what the first recurrent layer receives next by these."""
        self._listener.nudge = factors

    @property
    def attention_calls(self) -> dict[tuple[Stage, int], int]:
        """Attention computations in the last call of each layer that was listened to."""
        return self._listener.attention_calls

    @property
    def drew(self) -> bool:
        """The forward pass took random numbers, where its `ForwardContext` was given a seed."""
        return self._context.drew

    def next(self) -> Event | None:
        """Go on until the next event; None at the end. What the model raises is raised here."""
        if self.logits is not None:
            return None
        event = self._call.resume()
        if isinstance(event, Returned):
            self.logits = event.value
            return None
        return event

    def __iter__(self) -> Iterator[Event]:
        while (event := self.next()) is not None:
            yield event

    def close(self) -> None:
        """End the forward pass where it stands and take everything off the model."""
        self._call.close()


class _Listener:
    """What the caller lets the running forward pass know, and learns besides its events."""

    def __init__(self) -> None:
        self.listening = True
        self.nudge: Tensor | None = None
        """By which the state that the next recurrence receives is multiplied."""
        self.attention_calls: dict[tuple[Stage, int], int] = {}


class _Worker:
    """The side that runs in a thread of its own."""

    def __init__(self, one: ForwardSpec, caller: CallerState, listener: _Listener) -> None:
        self._spec = one
        self._caller = caller
        self._listener = listener
        self._cursor = Cursor(one.layout, one.recurrences)
        self._site: Site | None = None
        self._ends = 0
        """Calls of `loop_end` since the last layer of a recurrence."""
        self._halts = None if one.carries is None else Halts(one.carries, one.batch)
        mask = None if bool(one.batch.mask.all()) else one.batch.mask
        batch, tokens = one.batch.input_ids.shape
        self._home = one.batch.input_ids.device
        self._watch = AttentionWatch(batch, tokens, mask, copies=one.copies, home=self._home, shown=one.attention_call)
        self._watching: ExitStack | None = None

    def run(self, pauses: Pauses[Event]) -> Logits:
        self._pauses = pauses
        self._thread = threading.get_ident()
        with ExitStack() as self._stack:
            stack = self._stack
            self._caller.enter(stack)
            stack.enter_context(torch.set_grad_enabled(self._spec.gradients))
            # Hooks come and go while nobody else computes, who might be looking through them.
            stack.callback(self._spec.context.give_back)
            self._spec.context.take()
            own = self._spec.layout.modules
            self._twins = {twin: one for twin, one in self._spec.call.twins.items() if one in own and twin not in own}
            for module in (*own, *self._twins):
                # Other threads run the same modules: another run of the model, or its owner.
                before = module.register_forward_pre_hook(self._before, with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(module.register_forward_hook(self._after).remove)
            if self._spec.layout.loop_end is not None:
                end = self._spec.layout.loop_end.module
                for module in (end, *(twin for twin, one in self._spec.call.twins.items() if one is end)):
                    stack.callback(module.register_forward_hook(self._after_loop_end).remove)
            stack.callback(self._stop_watching)  # where a layer failed
            logits = self._spec.call(self._spec.batch, self._spec.extra())
            self._cursor.finish()
            self._check_end("after the last recurrence", self._ends > 0)
            return logits

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # A thread that was going through the hooks when this one was taken off calls it without keyword arguments.
        if threading.get_ident() != self._thread or kwargs is None:
            return None
        self._pauses.check()
        site = self._site = self._cursor.enter(self._twins.get(module, module))
        changed = None
        if site.stage == "recurrent" and site.layer == 0:
            values, call = arguments_of(module, args, kwargs), self._spec.call
            given, received = self._find(values, site, "received")
            states = [value for value in values if call.as_states(value, *received.shape[:2]) is not None]
            earlier = sum(value is given for value in states[: call.skips.get(self._twins.get(module, module), 0)])
            if self._halts is not None:
                self._halts.begin(site.recurrence, self._announced(received))
            before = call.tokens_before
            if site.recurrence == 1 and self._spec.begins_with is not None:
                received = torch.cat((received[:, :before], self._spec.begins_with.to(received.device)), 1)
                changed = with_other(module, args, kwargs, given, earlier, call.in_its_form(received, given))
            factors, self._listener.nudge = self._listener.nudge, None
            if factors is not None:
                nudged = received[:, before:] * factors.to(received.device)
                received = torch.cat((received[:, :before], nudged.to(received.dtype)), 1)
                changed = with_other(module, args, kwargs, given, earlier, call.in_its_form(received, given))
            self._begin_recurrence(site, self._announced(received))
        if self._listener.listening:
            self._watching = ExitStack()
            self._watching.enter_context(self._watch)
        return changed

    def _begin_recurrence(self, site: Site, state: States) -> None:
        if site.recurrence == 1:
            self._announce(Ready(state))
        else:
            self._check_end(f"between recurrence {site.recurrence - 1} and the next", self._ends == 1)
        if self._listener.listening:
            self._announce(Injected(site.recurrence, state))

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        site = self._site
        assert site is not None  # a layer that ends has begun
        attention = sink = None
        if self._watching is not None:
            self._stop_watching()
            attention, sink, calls = self._watch.collect()
            self._listener.attention_calls[site.stage, site.layer] = calls
            if (site.stage, site.layer) in self._spec.blind:
                attention = None
        state = self._announced(self._find(outputs_of(output), site, "put out")[1])
        if self._listener.listening:
            self._announce(Visit(site.stage, site.layer, site.recurrence, state, attention, sink))
        is_last = self._cursor.leave(site)
        layout = self._spec.layout
        if is_last:
            self._ends = 0
            if layout.loop_end is None:
                self._end_recurrence(LoopState(site.recurrence, state))
        elif not layout.recurrent and self._cursor.done["prelude"] == len(layout.prelude) and site.stage == "prelude":
            self._announce(Ready(state))

    def _after_loop_end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        done = self._cursor.done
        if threading.get_ident() != self._thread or not self._cursor.recurrences or done["recurrent"] or done["coda"]:
            return
        self._ends += 1
        if self._ends == 1:
            site = Site("recurrent", len(self._spec.layout.recurrent) - 1, self._cursor.recurrences)
            state = self._announced(self._find(outputs_of(output), site, "was followed by")[1])
            self._end_recurrence(LoopState(site.recurrence, state))

    def _end_recurrence(self, loop_state: LoopState) -> None:
        if self._halts is not None:
            self._halts.end(loop_state.state)
        self._announce(loop_state)
        if self._halts is not None and loop_state.recurrence == self._spec.recurrences:
            for module in self._spec.call.model.modules():
                if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                    self._stack.callback(module.register_forward_pre_hook(self._behind).remove)

    def _behind(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.get_ident() != self._thread or self._halts is None:
            return
        call, (prompts, tokens) = self._spec.call, self._spec.batch.input_ids.shape
        shape = (prompts, tokens + call.tokens_before)
        state = next((call.as_states(v, *shape) for v in args if isinstance(v, Tensor)), None)
        if state is not None and state.shape == (*shape, self._spec.width):
            self._halts.behind(self._cursor.recurrences, self._announced(state))

    def _find(self, values: Sequence[Any], site: Site, verb: str) -> tuple[Tensor, Tensor]:
        """The first tensor of states among a layer's arguments or outputs, and the same as (batch, token, width)."""
        prompts, tokens = self._spec.batch.input_ids.shape
        batch = (prompts, tokens + self._spec.call.tokens_before)
        states = ((v, self._spec.call.as_states(v, *batch)) for v in values)
        layer = self._spec.layout.stage(site.stage)[site.layer]
        there = [pair for pair in states if pair[1] is not None]
        skip = self._spec.call.skips.get(layer.module, 0) if verb == "received" else 0
        given, found = next(iter([*there[skip:], *there]), (None, None))
        if given is None or found is None or found.shape[:2] != batch:
            seen = [tuple(v.shape) for v in values if isinstance(v, Tensor)]
            but = f", but {', '.join(str(shape) for shape in seen[:3])} for {(prompts, tokens)} tokens" if seen else ""
            advice = "name modules that map states to states"
            if found is not None and found.shape[0] < prompts and found.shape[1:2] == batch[1:]:
                advice = (
                    "the model seems to run only some prompts of the batch, as if it had stopped the others; switch "
                    "halting off, or run prompts in batches of those that stop together"
                )
            if found is not None and found.shape[0] == prompts and found.shape[1] > tokens:
                advice = (
                    f"if {found.shape[1] - tokens} tokens stand before the prompt's, as registers or those of a puzzle "
                    f"do, say tokens_before={found.shape[1] - tokens}; in other places they are not supported"
                )
            raise ConfigError(
                f"{layer.path} ({site.label}) {verb} no states of shape (batch, token, width){but}; {advice}."
            )
        width = self._spec.width
        if verb != "received" and width is not None and found.shape[2] != width:
            raise ConfigError(
                f"{layer.path} ({site.label}) {verb} {tuple(found.shape)} for {batch} tokens, where the model's states "
                f"have a width of {width}; name modules whose first output is the state."
            )
        return given, found

    def _announced(self, state: Tensor) -> Tensor:
        seen = (state if self._spec.gradients else state.detach())[:, self._spec.call.tokens_before :]
        here = seen.to(self._home)
        return here.clone() if self._spec.copies and here.device == state.device else here

    def _check_end(self, where: str, held: bool) -> None:
        end = self._spec.layout.loop_end
        if end is not None and not held:
            raise ConfigError(
                f"loop_end={end.path!r} was called {self._ends} times {where}; name a module that is called once at "
                "each recurrence's end."
            )

    def _stop_watching(self) -> None:
        watching, self._watching = self._watching, None
        if watching is not None:
            watching.close()

    def _announce(self, event: Event) -> None:
        self._spec.context.give_back()
        self._pauses.pause(event)
        self._spec.context.take()
