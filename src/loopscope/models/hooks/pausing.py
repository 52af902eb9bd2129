"""What lets a hooked forward pass stand still: settings it takes and gives back, and a call that can be resumed."""

from __future__ import annotations

import contextvars
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from loopscope.errors import ConfigError

_COMPUTING = threading.Lock()
"""What a `ForwardContext` takes, a model's modes and the process's generators, belongs to one computing run at a time,
in whatever thread of the caller's."""

EventT = TypeVar("EventT")
ResultT = TypeVar("ResultT")

# An abandoned call ends at its next pause. Waiting for that has a limit: a layer that hangs must not hang the caller.
_PATIENCE = 30.0


class Setting:
    """The attribute, or the entry of a dictionary, at a dotted path, where a model keeps its number of recurrences."""

    def __init__(self, model: nn.Module, path: str) -> None:
        self.path = path
        *owner, self.name = path.split(".")
        self.owner: Any = model
        try:
            for part in owner:
                self.owner = self.owner[part] if isinstance(self.owner, dict) else getattr(self.owner, part)
            value = self.owner[self.name] if isinstance(self.owner, dict) else getattr(self.owner, self.name)
        except (AttributeError, KeyError) as error:
            raise ConfigError(f"set_recurrences={path!r} leads nowhere: {error}.") from None
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"set_recurrences={path!r} must be a whole number in the model, which has {value!r}.")

    def get(self) -> int:
        return int(self.owner[self.name] if isinstance(self.owner, dict) else getattr(self.owner, self.name))

    def set(self, value: int) -> None:
        if isinstance(self.owner, dict):
            self.owner[self.name] = value
        else:
            setattr(self.owner, self.name, value)


class ForwardContext:
    """Evaluation mode, the number of recurrences, the random generators, and which of torch's ways to compute.

    They are taken while the model computes and given back at every pause, so that runs that stand still, another run
    of the same model and the caller do not see each other's.
    """

    def __init__(self, model: nn.Module, *, setting: Setting | None, recurrences: int, seed: int | None) -> None:
        self._modules = list(model.modules())
        # A function that a layer calls may be compiled as well as a module, and only torch knows of it.
        self._compiled = "torch._dynamo" in sys.modules
        # Its fast path is left as soon as anything watches, and rounds differently: a run must not depend on who does.
        self._has_fast_path = any(isinstance(module, nn.MultiheadAttention) for module in self._modules)
        self._setting = setting
        self._recurrences = recurrences
        self._generators = _Generators(seed, devices_of(model)) if seed is not None else None
        self._back: ExitStack | None = None

    @property
    def drew(self) -> bool:
        """The model took random numbers."""
        return self._generators is not None and self._generators.drew

    def take(self) -> None:
        """Waits while another thread's run computes."""
        with ExitStack() as stack:
            stack.enter_context(_COMPUTING)
            # Looked at each time: the owner may have changed modes while the run stood still.
            for module in [module for module in self._modules if module.training]:
                stack.callback(setattr, module, "training", module.training)
                module.training = False
            if self._setting is not None:
                stack.callback(self._setting.set, self._setting.get())
                self._setting.set(self._recurrences)
            if self._generators is not None:
                stack.callback(self._generators.leave)
                self._generators.enter()
            if self._has_fast_path:
                stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
                torch.backends.mha.set_fastpath_enabled(False)
            if self._compiled:
                # Compiled code has no hooks to call and no functions to watch.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            self._back = stack.pop_all()

    def give_back(self) -> None:
        """Everything as it was; nothing happens the second time."""
        back, self._back = self._back, None
        if back is not None:
            back.close()


class _Generators:
    """The process's random generators, of the CPU and of the model's devices, as one run leaves and finds them."""

    def __init__(self, seed: int, devices: Sequence[torch.device]) -> None:
        self._sources: list[tuple[Callable[[], Tensor], Callable[[Tensor], None]]] = [
            (torch.get_rng_state, torch.set_rng_state)
        ]
        own = [torch.Generator().manual_seed(seed).get_state()]
        for device in (each for each in devices if each.type == "cuda"):
            self._sources.append(
                (partial(torch.cuda.get_rng_state, device), partial(torch.cuda.set_rng_state, device=device))
            )
            own.append(torch.Generator(device).manual_seed(seed).get_state())
        self._first = self._own = own
        self._outer: list[Tensor] = []

    @property
    def drew(self) -> bool:
        return any(not torch.equal(first, now) for first, now in zip(self._first, self._own, strict=True))

    def enter(self) -> None:
        self._outer = [get() for get, _ in self._sources]
        for (_, set_state), state in zip(self._sources, self._own, strict=True):
            set_state(state)

    def leave(self) -> None:
        self._own = [get() for get, _ in self._sources]
        for (_, set_state), state in zip(self._sources, self._outer, strict=True):
            set_state(state)


class CallerState:
    """What torch keeps for each thread, read in the caller's and put in force in the thread that runs the model.

    Gradients are off whatever the caller has.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._autocast: dict[str, Any] | None = None
        if torch.is_autocast_enabled(device.type):
            self._autocast = {"device_type": device.type, "dtype": torch.get_autocast_dtype(device.type)}
        self._default_device = torch.get_default_device()
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def enter(self, stack: ExitStack) -> None:
        stack.enter_context(torch.no_grad())
        if self._stream is not None:
            stack.enter_context(torch.cuda.device(self._device))
            stack.enter_context(torch.cuda.stream(self._stream))
        if self._autocast is not None:
            stack.enter_context(torch.autocast(**self._autocast))
        if self._default_device != torch.get_default_device():
            stack.enter_context(self._default_device)


def devices_of(model: nn.Module) -> list[torch.device]:
    """Where its weights are; the first is where what goes in, and all that is announced, is put. Those that accelerate
    brings from memory or disk, while a layer runs, are on the device meta until then, and run where its hook says."""
    devices = dict.fromkeys(weight.device for weight in model.parameters())
    there = [device for device in devices if device.type != "meta"]
    runs = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    return there or ([] if runs is None else [torch.device(runs)]) or list(devices) or [torch.device("cpu")]


class Abandoned(BaseException):
    """Raised inside a call that nobody waits for any more. No `Exception`: a model's own handlers let it pass."""


@dataclass(frozen=True, slots=True)
class Returned(Generic[ResultT]):
    """The call is over."""

    value: ResultT


@dataclass(frozen=True, slots=True)
class _Raised:
    error: BaseException


class Pauses(Generic[EventT]):
    """The side of the call: what it holds to hand something over and wait until it is wanted again."""

    def __init__(self) -> None:
        # SimpleQueue, since a finalizer may put into it at any moment, also while this thread gets from it.
        self.orders: SimpleQueue[None] = SimpleQueue()
        self.events: SimpleQueue[EventT | Returned[object] | _Raised] = SimpleQueue()
        self.abandoned = False

    def pause(self, event: EventT) -> None:
        """Hand over an event; returns when the call is resumed. Raises `Abandoned` if it never will be."""
        self.check()
        self.events.put(event)
        self.orders.get()
        self.check()

    def check(self) -> None:
        """Raises `Abandoned` if nobody waits for this call any more."""
        if self.abandoned:
            raise Abandoned


class SteppedCall(Generic[EventT, ResultT]):
    """`function(pauses)` in a thread of its own that runs only while `resume` waits for it: nothing is concurrent.

    A generator would do the same if every frame between were one; the frames here are a model's own `forward`.

    The call is abandoned by `close`, when this object is garbage, and at the interpreter's exit: `Abandoned` is raised
    where it stands, and what it has on its stack is unwound.
    """

    def __init__(self, function: Callable[[Pauses[EventT]], ResultT]) -> None:
        self._pauses: Pauses[EventT] = Pauses()
        context = contextvars.copy_context()
        # The thread knows nothing of this object, which could never become garbage otherwise. A daemon, since the
        # interpreter joins other threads before it calls finalizers.
        self._thread = threading.Thread(
            target=context.run, args=(_work, function, self._pauses), name="loopscope hooked forward", daemon=True
        )
        self._end = weakref.finalize(self, _abandon, self._pauses, self._thread)
        self._thread.start()

    def resume(self) -> EventT | Returned[ResultT]:
        """Go on until the next event or the end. What the function raises is raised here.

        An exception that arrives while waiting, such as Ctrl-C, abandons the call. Raises `RuntimeError` for a call
        that was abandoned or has ended: nobody would ever answer.
        """
        if not self._end.alive:
            raise RuntimeError("The call is over; there is nothing to resume.")
        try:
            self._pauses.orders.put(None)
            event = self._pauses.events.get()
        except BaseException:
            self.close()
            raise
        if isinstance(event, Returned | _Raised):
            self.close()
        if isinstance(event, _Raised):
            raise event.error
        return event  # type: ignore[return-value]  # Returned holds what `function` returned

    def close(self) -> None:
        """Abandon the call, if it is not over, and wait until it has unwound."""
        self._end()


def _work(function: Callable[[Pauses[EventT]], ResultT], pauses: Pauses[EventT]) -> None:
    outcome: Returned[object] | _Raised
    try:
        pauses.orders.get()
        pauses.check()
        outcome = Returned(function(pauses))
    except Abandoned:
        return
    except BaseException as error:
        outcome = _Raised(error)
    pauses.events.put(outcome)


def _abandon(pauses: Pauses[EventT], thread: threading.Thread) -> None:
    pauses.abandoned = True
    pauses.orders.put(None)
    if thread is not threading.current_thread():
        thread.join(_PATIENCE)
