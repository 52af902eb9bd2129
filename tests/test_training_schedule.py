"""What a training step draws from its number: learning rate, recurrences, states."""

import math
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopscope.experiments.training.config import OptimizerConfig, RecurrenceConfig
from loopscope.experiments.training.step import learning_rate, sample_recurrences, state_seed


@given(
    warmup=st.integers(0, 20),
    after=st.integers(2, 100),
    final=st.floats(0, 1),
    decay=st.sampled_from(["cosine", "linear"]),
)
def test_the_rate_rises_to_its_peak_and_falls_to_its_end(
    warmup: int, after: int, final: float, decay: Literal["cosine", "linear"]
) -> None:
    config = OptimizerConfig(peak_lr=0.01, warmup_steps=warmup, final_lr_fraction=final, decay=decay)
    steps = warmup + after
    rates = np.array([learning_rate(step, steps, config) for step in range(steps)])
    assert (np.diff(rates[:warmup]) > 0).all()
    assert (np.diff(rates[warmup:]) <= 1e-15).all()
    assert rates.max() == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(0.01 * final)
    if warmup:
        assert rates[0] == pytest.approx(0.01 / warmup)


def test_half_way_down_cosine_and_line_cross() -> None:
    decays: tuple[Literal["cosine", "linear"], ...] = ("cosine", "linear")
    for decay in decays:
        config = OptimizerConfig(peak_lr=1.0, warmup_steps=0, final_lr_fraction=0.2, decay=decay)
        assert learning_rate(50, 101, config) == pytest.approx(0.6)
    quarter = OptimizerConfig(peak_lr=1.0, warmup_steps=0, final_lr_fraction=0.0)
    assert learning_rate(25, 101, quarter) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_a_constant_rate_stays_at_its_peak() -> None:
    config = OptimizerConfig(peak_lr=0.3, warmup_steps=2, decay="constant")
    assert [learning_rate(step, 6, config) for step in range(6)] == [0.15, 0.3, 0.3, 0.3, 0.3, 0.3]


def test_a_constant_number_of_recurrences_is_the_architectures() -> None:
    assert {sample_recurrences(RecurrenceConfig(), 4, seed=0, step=step) for step in range(50)} == {4}


def test_sampled_recurrences_have_the_moments_of_the_poisson_lognormal() -> None:
    config = RecurrenceConfig(distribution="poisson-lognormal", sigma=0.5)
    numbers = np.array([sample_recurrences(config, 8, seed=3, step=step) for step in range(8000)])
    assert numbers.min() >= 1
    # r - 1 is Poisson with a lognormal rate of mean 8: its variance is 8 + 64 (exp(sigma^2) - 1).
    deviation = math.sqrt(8 + 64 * (math.exp(0.25) - 1))
    assert numbers.mean() == pytest.approx(9, abs=4 * deviation / math.sqrt(8000))
    assert numbers.std() == pytest.approx(deviation, rel=0.1)


def test_the_cap_cuts_the_upper_tail_and_nothing_else() -> None:
    free = RecurrenceConfig(distribution="poisson-lognormal")
    capped = RecurrenceConfig(distribution="poisson-lognormal", cap=10)
    for step in range(200):
        number = sample_recurrences(free, 8, seed=0, step=step)
        assert sample_recurrences(capped, 8, seed=0, step=step) == min(number, 10)


def test_draws_depend_on_seed_and_step() -> None:
    config = RecurrenceConfig(distribution="poisson-lognormal")
    assert sample_recurrences(config, 30, seed=1, step=7) == sample_recurrences(config, 30, seed=1, step=7)
    assert len({sample_recurrences(config, 300, seed=seed, step=0) for seed in range(20)}) > 10
    assert len({state_seed(seed, step) for seed in range(10) for step in range(100)}) == 1000
