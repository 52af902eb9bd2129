"""How many recurrences a training step runs, and where its states start.

Every draw is a function of the run's seed and the step alone, so that a resumed run draws what an uninterrupted one
would have drawn.
"""

from __future__ import annotations

import math

import numpy as np

from loopscope.training.config import RecurrenceConfig

__all__ = ["direction_seed", "sample_recurrences", "state_seed"]

# Separate streams of random numbers under one seed; the values only have to differ.
_RECURRENCES = 1
_STATES = 2
_DIRECTIONS = 3


def sample_recurrences(config: RecurrenceConfig, mean: int, seed: int, step: int) -> int:
    """Number of recurrences of one step, at least 1.

    The Poisson-lognormal is the one that Huginn was trained with (Geiping et al., arXiv 2502.05171):
    `tau ~ Normal(log(mean) - sigma^2 / 2, sigma)`, `r ~ Poisson(exp(tau)) + 1`. So r - 1 has the given mean. A sample
    above `cap` becomes `cap`.
    """
    if config.distribution == "constant":
        return mean
    generator = np.random.default_rng([seed, _RECURRENCES, step])
    rate = math.exp(generator.normal(math.log(mean) - 0.5 * config.sigma**2, config.sigma))
    number = int(generator.poisson(rate)) + 1
    return number if config.cap is None else min(number, config.cap)


def state_seed(seed: int, step: int) -> int:
    """Seed of the initial states of one step, a number below 2**32."""
    return int(np.random.default_rng([seed, _STATES, step]).integers(2**32))


def direction_seed(seed: int, step: int) -> int:
    """Seed of the directions in which a step's derivative is followed, a number below 2**32."""
    return int(np.random.default_rng([seed, _DIRECTIONS, step]).integers(2**32))
