"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from loopscope.training.config import OptimizerConfig

__all__ = ["learning_rate"]


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Learning rate of one step, counted from 0.

    A linear rise that reaches the peak at step `warmup_steps - 1` (no step is wasted on a rate of 0), then the decay,
    which reaches `final_lr_fraction` of the peak at the last step.
    """
    if step < config.warmup_steps:
        return config.peak_lr * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.peak_lr
    way = steps - 1 - config.warmup_steps
    progress = (step - config.warmup_steps) / way if way > 0 else 1.0
    height = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.decay == "cosine" else 1.0 - progress
    return config.peak_lr * (config.final_lr_fraction + (1.0 - config.final_lr_fraction) * height)
