"""Prompts that a model stops by itself while others of the batch go on."""

from __future__ import annotations

import torch
from torch import Tensor

from loopscope._util.shapes import States
from loopscope.errors import ConfigError
from loopscope.models.subject import Batch

_MOVED, _ROUNDINGS = 1e-3, 16.0
"""A state that moved by less than this share of its largest entry, or by fewer roundings, may give the same input again
once something large is added to it."""


class Halts:
    """Watches whether each recurrence begins with what the one before put out.

    A model may call its layers for the whole batch and keep the old state of a prompt that it has stopped: what its
    layers then put out for it is thrown away, and is no state. Such a prompt's next input is the last one again,
    although what was put out is another or, where something is added in between, has moved.
    """

    def __init__(self, carries: bool, batch: Batch) -> None:
        self._carries, self._mask = carries, batch.mask
        self._before: States | None = None
        """Input of this recurrence's first layer."""
        self._ended: States | None = None
        self._last_ended: States | None = None

    def begin(self, recurrence: int, received: States) -> None:
        """Raises `ConfigError` for a prompt that the model has stopped."""
        ended, before = self._ended, self._before
        if ended is not None and before is not None:
            stopped = self._kept(received, before, ended) if self._carries else self._again(received, before, ended)
            _refuse(stopped, recurrence - 1)
        self._before = received.detach()

    def behind(self, recurrences: int, received: States) -> None:
        """The same of what a module receives after the last recurrence, where some prompts go on with what was put out.

        Where something is added between recurrences, it is not added behind the loop, so that nothing can be told.
        """
        ended, before = self._ended, self._before
        if self._carries and recurrences > 1 and ended is not None and before is not None:
            goes_on = ((received == ended).all(-1) | ~self._mask).all(-1)
            if bool(goes_on.any()):
                _refuse(self._kept(received, before, ended), recurrences)

    def end(self, state: States) -> None:
        self._last_ended, self._ended = self._ended, state.detach()

    def _kept(self, received: States, before: States, ended: States) -> Tensor:
        """(batch,), prompts with a token whose input is the last one again, and not what was put out."""
        return ((received == before).all(-1) & (received != ended).any(-1) & self._mask).any(-1)

    def _again(self, received: States, before: States, ended: States) -> Tensor:
        """(batch,), prompts whose input is the last one again in all tokens, although the output has moved."""
        if self._last_ended is None:
            return self._mask.new_zeros(len(self._mask))
        least = max(_MOVED, _ROUNDINGS * torch.finfo(ended.dtype).eps)
        moved = (ended - self._last_ended).abs().amax(-1) > least * ended.abs().amax(-1)
        same = (received == before).all(-1) | ~self._mask
        return same.all(-1) & (moved & self._mask).any(-1)


def _refuse(stopped: Tensor, recurrence: int) -> None:
    if bool(stopped.any()):
        prompt = int(stopped.int().argmax())
        raise ConfigError(
            f"The model went on without what its layers put out for prompt {prompt} of the batch in recurrence "
            f"{recurrence} of the loop: it seems to stop prompts, or tokens, by itself, while the others of a "
            "batch go on. What its layers compute for them is thrown away and is no state; switch halting off, "
            "or run prompts in batches of those that stop together."
        )
