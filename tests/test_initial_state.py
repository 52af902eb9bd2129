"""The random initial state: a function of the seed and the prompt, and of nothing else."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import loopscope
from loopscope.models.native.interventions import initial_noise
from random_model import random_ids, random_model

PROMPTS = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=5), min_size=1, max_size=4)


def noise(prompt: list[int], seed: int = 0, width: int = 7, std: float = 1.0) -> Tensor:
    return initial_noise(torch.tensor([prompt]), None, width, std=std, seed=seed)[0]


@given(prompts=PROMPTS, left=st.integers(0, 2), seed=st.integers(0, 2**40), draw=st.randoms(use_true_random=False))
def test_batching_order_and_padding_do_not_change_it(
    prompts: list[list[int]], left: int, seed: int, draw: random.Random
) -> None:
    draw.shuffle(prompts)
    length = left + max(map(len, prompts)) + 1
    ids = torch.full((len(prompts), length), 29)
    mask = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, left : left + len(prompt)] = torch.tensor(prompt)
        mask[row, left : left + len(prompt)] = True
    batch = initial_noise(ids, mask, 7, std=1.0, seed=seed)
    assert not bool(batch[~mask].any())
    for row, prompt in enumerate(prompts):
        assert torch.equal(batch[row][mask[row]], noise(prompt, seed))


def test_another_seed_or_another_prompt_gives_another_state() -> None:
    assert torch.equal(noise([3, 4, 5], seed=1), noise([3, 4, 5], seed=1))
    for other in (noise([3, 4, 5], seed=2), noise([3, 4, 6], seed=1), noise([4, 3, 5], seed=1), noise([3, 4, 5], -1)):
        assert (
            abs(float(torch.corrcoef(torch.stack([noise([3, 4, 5], seed=1).flatten(), other.flatten()]))[0, 1])) < 0.9
        )
        assert not bool((noise([3, 4, 5], seed=1) == other).any())


def test_it_has_the_distribution_of_a_normal_cut_at_three_standard_deviations() -> None:
    std = 0.4
    values = noise(list(range(200)), width=1000, std=std).double() / std
    # Of a standard normal cut at +-3: variance 1 - 2 * 3 phi(3) / (2 Phi(3) - 1).
    inside = math.erf(3 / math.sqrt(2))
    variance = 1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / inside
    count = values.numel()
    assert abs(float(values.mean())) < 4 / count**0.5
    assert float(values.var()) == pytest.approx(variance, abs=4 * (2 / count) ** 0.5)
    assert 2.99 < float(values.abs().max()) <= 3 * (1 + 1e-6)
    for cut in (0.5, 1.0, 2.0, 2.8):
        share = float((values.abs() < cut).double().mean())
        expected = math.erf(cut / math.sqrt(2)) / inside
        assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / count) ** 0.5)


def test_positions_and_coordinates_are_independent() -> None:
    values = noise([7] * 300, width=300).double()
    for correlations in (torch.corrcoef(values), torch.corrcoef(values.T)):
        apart = correlations - torch.eye(300, dtype=torch.float64)
        assert float(apart.abs().max()) < 6 / 300**0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_another_dtype_rounds_the_same_state(dtype: torch.dtype) -> None:
    ids = random_ids(2, 4)
    single = loopscope.capture(random_model(dtype=torch.float32), ids, seed=3).initial_state
    other = loopscope.capture(random_model(dtype=dtype), ids, seed=3).initial_state
    assert other.dtype == dtype
    assert torch.equal(other, single.to(dtype))


def test_the_standard_deviation_of_the_architecture_is_used() -> None:
    ids = random_ids(1, 4)
    narrow, wide = (loopscope.capture(random_model(state_std=std), ids).initial_state for std in (0.25, 1.0))
    torch.testing.assert_close(4 * narrow, wide)


def test_the_state_starts_as_the_preludes_output_where_it_is_not_random() -> None:
    model = random_model(state_init="embeddings")
    trace = loopscope.capture(model, random_ids(1, 4), seed=1)
    assert torch.equal(trace.initial_state, trace.residual("prelude", 0))
    assert torch.equal(trace.logits, loopscope.capture(model, random_ids(1, 4), seed=2).logits)


def test_the_seed_of_a_run_is_the_seed_of_its_state() -> None:
    model, ids = random_model(), random_ids(2, 4)
    assert torch.equal(model(ids, seed=5), loopscope.capture(model, ids, seed=5).logits)
    assert not torch.allclose(model(ids, seed=5), model(ids, seed=6))
