"""Several devices on a machine that has one: torch's device `lazy`, which no build implements, done by the CPU.

A tensor there is a CPU tensor that says where it is. Operations on tensors of two places are refused, as on real
devices, so that a state that was not moved is noticed, and numbers are the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_CPU = torch.device("cpu")


class _Elsewhere(Tensor):
    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> _Elsewhere:
        made: _Elsewhere = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=device
        )
        made.held = inner
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            # Torch would take this apart for a device without kernels, which rounds otherwise than the CPU's own.
            if func is functional.scaled_dot_product_attention and not args[0].requires_grad:
                result: Tensor = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
                return _Elsewhere(result, args[0].device)
            return func(*args, **kwargs)

    __torch_dispatch__: Any = classmethod(lambda cls, func, types, args=(), kwargs=None: _run(func, args, kwargs or {}))


class LogicalDevices(TorchDispatchMode):
    """In force, `lazy:0`, `lazy:1` ... are devices. `moves` counts the tensors that were copied from one to another."""

    def __init__(self) -> None:
        initialise: Callable[[], None] = super().__init__
        initialise()
        self.moves = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if "device" not in kwargs and _Elsewhere not in types:
            return func(*args, **kwargs)
        if func.overloadpacket is torch.ops.aten._to_copy and kwargs.get("device", args[0].device) != args[0].device:
            self.moves += 1
        return _run(func, args, kwargs)


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    # A tensor without dimensions may come from the CPU, as on real devices.
    places = {each.device for each in tensors if each.ndim or each.device.type != "cpu"}
    copies = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
    if len(places) > 1 and not copies:
        raise RuntimeError(f"{func} was given tensors on {', '.join(sorted(map(str, places)))}")
    asked = kwargs.get("device")
    device = torch.device(asked) if asked is not None else next(iter(places), _CPU)
    result = func(*tree_map(_inside, args), **tree_map(_inside, dict(kwargs)))
    if func._schema.is_mutable:
        return args[0]
    return result if device.type == "cpu" else tree_map(lambda each: _outside(each, device), result)


def _inside(value: Any) -> Any:
    if isinstance(value, torch.device):
        return _CPU
    return value.held if isinstance(value, _Elsewhere) else value


def _outside(value: Any, device: torch.device) -> Any:
    return _Elsewhere(value, device) if isinstance(value, Tensor) else value


def capacities(**sizes: int) -> Callable[[torch.device], int]:
    """`available_memory` of devices with that much, such as `cpu=10**6, lazy_1=10**6`."""
    return lambda device: sizes.get(str(device).replace(":", "_"), 0)
