"""The noise floor: the relative step that arithmetic alone keeps up."""

from __future__ import annotations

import math

import torch

from loopscope.measures.base import Arrays, Frame, Named, masked_mean
from loopscope.subject import Run

__all__ = ["noise_floor"]


def noise_floor(frame: Frame, run: Run) -> Arrays:
    """`sqrt(2)` times the relative rounding error of one recurrence, per layer and prompt, where the run stands.

    Two consecutive states of a settled trajectory carry rounding errors of size sigma, so they differ by about
    sqrt(2) sigma even though nothing moves. It is an estimate. Errors that the loop carries on add to it:
    independent ones at a leading eigenvalue lambda make the step `sigma sqrt(2 / (1 + lambda))`, more for negative
    or non-normal ones. And rounding is deterministic, so that a state can also come to rest below it.
    """
    error = run.rounding_error()
    if error is None:
        floor = torch.full((frame.info.recurrent, frame.prompts), torch.nan)
    else:
        floor = math.sqrt(2) * masked_mean(error.square(), frame.mask).sqrt()
    return Arrays({"noise_floor": Named(("layer", "prompt"), floor.double().cpu().numpy())})
