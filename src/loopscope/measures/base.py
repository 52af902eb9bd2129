"""What a measure is: an observer that reduces while visits pass, and ends with named arrays."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from loopscope.subject import Batch, SubjectInfo
from loopscope.visits import Observer

__all__ = ["Arrays", "Frame", "Measure", "Named", "masked_mean"]


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
