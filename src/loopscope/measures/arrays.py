"""Functions of tensors that take numpy arrays too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np
import torch
from torch import Tensor

__all__ = ["ArrayFunction", "on_arrays"]


@runtime_checkable
class ArrayFunction(Protocol):
    """Takes one or more arrays, then settings, and answers with an array of the kind it was given."""

    @overload
    def __call__(self, array: Tensor, /, *arguments: Any, **settings: Any) -> Tensor: ...
    @overload
    def __call__(self, array: np.ndarray, /, *arguments: Any, **settings: Any) -> np.ndarray: ...


def on_arrays(function: Callable[..., Tensor]) -> ArrayFunction:
    """Let a function of tensors take numpy arrays, and answer with a numpy array then."""

    @functools.wraps(function)
    def wrapped(*arguments: Any, **settings: Any) -> Any:
        answer = function(*map(_tensor, arguments), **{name: _tensor(value) for name, value in settings.items()})
        return answer.numpy() if isinstance(arguments[0], np.ndarray) else answer

    return wrapped


def _tensor(value: Any) -> Any:
    return torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
