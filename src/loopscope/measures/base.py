"""What a measure is: an observer that reduces while visits pass, and ends with named arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from loopscope._util.sites import Stage
from loopscope.models.subject import Batch, SubjectInfo
from loopscope.models.visits import Observer


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


@dataclass(frozen=True, slots=True)
class Frame:
    """What every measure of one batch shares: the shapes that its arrays have."""

    info: SubjectInfo
    mask: Tensor
    """(batch, token), True for tokens, on the subject's device."""
    recurrences: int
    """R, how many are measured."""

    @classmethod
    def of(cls, info: SubjectInfo, batch: Batch, device: torch.device, recurrences: int) -> Frame:
        return cls(info, batch.mask.to(device), recurrences)

    @property
    def counts(self) -> Tensor:
        """Tokens per prompt, (batch,)."""
        return self.mask.sum(-1)

    @property
    def prompts(self) -> int:
        return self.mask.shape[0]

    @property
    def tokens(self) -> int:
        return self.mask.shape[1]


@dataclass(frozen=True, slots=True)
class Named:
    """An array with named dimensions."""

    dims: tuple[str, ...]
    values: np.ndarray


@dataclass(slots=True)
class Arrays:
    """What a measure found in one batch."""

    per_prompt: dict[str, Named] = field(default_factory=dict)
    """With a dimension `prompt`; batches are concatenated along it."""
    summed: dict[str, Named] = field(default_factory=dict)
    """Sums over prompts of quantities of which the study holds the mean; batches are added up."""
    weight: dict[str, np.ndarray] = field(default_factory=dict)
    """How many prompts each entry of a sum counts, by the same name."""

    def update(self, other: Arrays) -> None:
        self.per_prompt.update(other.per_prompt)
        self.summed.update(other.summed)
        self.weight.update(other.weight)


class Measure(Observer):
    """Told of every visit of a run, then asked once for its arrays."""

    def finish(self) -> Arrays:
        """The arrays of this batch."""
        raise NotImplementedError


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last dimension of the entries that `mask` keeps; NaN where one of them is."""
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1)


def depth_count(frame: Frame) -> int:
    """Visits of a run, p + k R + c."""
    return depth_of(frame, "coda", frame.info.coda, 0)


def depth_of(frame: Frame, stage: Stage, layer: int, recurrence: int) -> int:
    """Place of a visit among the p + k R + c of a run, from 0."""
    info = frame.info
    if stage == "prelude":
        return layer
    if stage == "recurrent":
        return info.prelude + recurrence * info.recurrent + layer
    return info.prelude + frame.recurrences * info.recurrent + layer
