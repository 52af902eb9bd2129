"""What a layer is given and what it returns, in whatever form a model passes its states around."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["arguments_of", "outputs_of", "with_other"]


def outputs_of(output: Any) -> Sequence[Any]:
    """What a layer returns, one after the other: a tensor, a tuple, a mapping or a dataclass."""
    if isinstance(output, Mapping):
        return list(output.values())
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return [getattr(output, field.name) for field in dataclasses.fields(output)]
    return output if isinstance(output, tuple | list) else (output,)


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """A layer's arguments in the order of its parameters, in whatever order a caller names them."""
    try:
        names = list(inspect.signature(module.forward).parameters)
    except ValueError:  # a scripted module has none to be read
        names = []
    known = [kwargs[name] for name in names if name in kwargs]
    return [*args, *known, *(value for name, value in kwargs.items() if name not in names)]


def with_other(
    args: tuple[Any, ...], kwargs: dict[str, Any], old: Tensor, new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with another tensor in the first place where the old one is."""
    for index, value in enumerate(args):
        if value is old:
            return (*args[:index], new, *args[index + 1 :]), kwargs
    name = next(name for name, value in kwargs.items() if value is old)
    return args, kwargs | {name: new}
