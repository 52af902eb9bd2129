"""The noise floor: the relative step below which arithmetic alone moves the state."""

from __future__ import annotations

import math

import torch

from loopscope.measures.base import Arrays, Frame, Named, masked_mean
from loopscope.subject import Run

__all__ = ["noise_floor"]


def noise_floor(frame: Frame, run: Run) -> Arrays:
    """`sqrt(2)` times the relative rounding error of one recurrence, per layer and prompt, where the run stands.

    Two consecutive states of a settled trajectory carry independent rounding errors of size sigma, so they differ by
    sqrt(2) sigma even though nothing moves. Errors that the loop carries on add to it: with a leading eigenvalue
    lambda the step becomes `sigma sqrt(2 / (1 + lambda))`, between 1 and sqrt(2) times sigma for lambda in [0, 1),
    and more for negative or non-normal ones. So this is the floor that no verdict may go below; a model can settle
    above it.
    """
    error = run.rounding_error()
    if error is None:
        floor = torch.full((frame.info.recurrent, frame.prompts), torch.nan)
    else:
        floor = math.sqrt(2) * masked_mean(error.square(), frame.mask).sqrt()
    return Arrays({"noise_floor": Named(("layer", "prompt"), floor.double().cpu().numpy())})
