"""Non-normality of a token's recurrence, against known matrices and whole Jacobians of small models."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import solve_discrete_lyapunov
from torch import Tensor

from loopscope import leading_eigenvalues
from loopscope.dynamics.eigenvalues.krylov import DifferenceProducts, ExactProducts, KrylovSpace, ritz_values
from loopscope.dynamics.eigenvalues.normality import largest_singular_value, non_normality
from random_model import random_model
from small_models import PROMPTS, RESIDUAL_NORM, linear_loop, subject
from test_stability import SHAPES, blocks, jacobian, one_prompt


def found_of(made: Tensor, products: int, *, exact: bool = True) -> dict[str, np.ndarray]:
    """Of matrices, (token, width, width), from random vectors."""
    generator = torch.Generator().manual_seed(0)
    start, spare, point = (torch.randn(made.shape[:2], dtype=made.dtype, generator=generator) for _ in range(3))
    derivative = (ExactProducts if exact else DifferenceProducts)(lambda x: torch.einsum("nij,nj->ni", made, x), point)
    space = KrylovSpace(start, spare, products)
    space.grow(derivative, products)
    coefficients = space.coefficients
    singular = largest_singular_value(derivative, space)
    found = non_normality(coefficients, ritz_values(coefficients).values, singular)
    return {name: values.numpy() for name, values in found.items()}


def wanted_of(matrix: np.ndarray, longest: int) -> dict[str, float]:
    """The same of one matrix by the textbook; growth after 1, 2, 4, ... recurrences, fewer than `longest`."""
    values, width = np.abs(np.linalg.eigvals(matrix)), len(matrix)
    powers = [1, *(2**k for k in range(1, 10) if 2**k < longest)]
    size = (matrix**2).sum()
    stable = values.max() < 1
    found: dict[str, Any] = {
        "singular_value": np.linalg.norm(matrix, 2),
        "krylov_singular_value": np.linalg.norm(matrix, 2),
        "krylov_departure": math.sqrt(max(0.0, 1 - (values**2).sum() / size)) if size else 0.0,
        "noise_gain": math.sqrt(np.trace(solve_discrete_lyapunov(matrix, np.eye(width))) / width)
        if stable
        else math.nan,
        "transient_growth": max(np.linalg.norm(np.linalg.matrix_power(matrix, k), 2) for k in powers),
    }
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("kind", ["normal", "rotation", "zero", "identity", "nilpotent", "far from normal", "grows"])
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), width=st.integers(2, 7))
def test_with_all_products_the_numbers_are_those_of_the_matrix(kind: str, seed: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(width, width, dtype=torch.float64, generator=generator) / math.sqrt(width)
    turn, upper = torch.linalg.qr(made)
    rates = torch.linspace(0.2, 0.9, width, dtype=torch.float64)
    made = {
        "normal": turn @ torch.diag(rates) @ turn.T,
        "rotation": 0.9 * turn,
        "zero": torch.zeros_like(made),
        "identity": 0.7 * torch.eye(width, dtype=torch.float64),
        "nilpotent": turn @ torch.triu(3 * upper, 1) @ turn.T,
        "far from normal": turn @ (torch.diag(rates) + torch.triu(2 * upper, 1)) @ turn.T,
        "grows": turn @ torch.diag(rates + 0.5) @ turn.T,
    }[kind]
    found = found_of(made[None], width)
    for name, value in wanted_of(made.numpy(), width).items():
        # Eigenvalues of a nilpotent matrix are found to a root of the rounding alone, and so is what they take away.
        loose = 1e-3 if name == "krylov_departure" else 1e-8
        np.testing.assert_allclose(found[name][0], value, rtol=1e-8, atol=loose, err_msg=name)


def test_two_dimensions_by_hand() -> None:
    """Of [[a, c], [0, a]]: a^k on the diagonal of the power and k a^(k-1) c above."""
    rate, coupling = 0.8, 10.0
    made = torch.tensor([[[rate, coupling], [0.0, rate]]], dtype=torch.float64)
    found = found_of(made, 2)
    powers = sum(2 * rate ** (2 * k) + (k * rate ** (k - 1) * coupling) ** 2 for k in range(400))
    np.testing.assert_allclose(found["noise_gain"], math.sqrt(powers / 2), rtol=1e-9)
    np.testing.assert_allclose(
        found["krylov_departure"], coupling / math.hypot(coupling, rate * math.sqrt(2)), rtol=1e-9
    )


@settings(max_examples=15)
@given(st.integers(0, 2**32), st.sampled_from([0.3, 1.0, 3.0]))
def test_with_few_products_growth_is_never_more_than_there_is(seed: int, coupling: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    width, products = 40, 16
    made = torch.diag_embed(0.95 * torch.rand(3, width, dtype=torch.float64, generator=generator))
    made = made + coupling * torch.triu(torch.randn(3, width, width, dtype=torch.float64, generator=generator), 1) / 6
    turn, _ = torch.linalg.qr(torch.randn(3, width, width, dtype=torch.float64, generator=generator))
    made = turn @ made @ turn.mT
    found = found_of(made, products)
    for token, matrix in enumerate(made.numpy()):
        wanted = wanted_of(matrix, products)
        for name in ("singular_value", "krylov_singular_value", "transient_growth"):
            assert found[name][token] <= wanted[name] * (1 + 1e-9), name
        assert found["singular_value"][token] >= 0.8 * wanted["singular_value"]
    by_differences = found_of(made, products, exact=False)
    np.testing.assert_allclose(by_differences["singular_value"], found["krylov_singular_value"], rtol=1e-4)


def test_float32_finds_the_gain_up_to_a_thousand() -> None:
    generator = torch.Generator().manual_seed(0)
    made = torch.diag_embed(torch.rand(20, 12, dtype=torch.float64, generator=generator) * 0.9)
    made = made + torch.triu(torch.randn(20, 12, 12, dtype=torch.float64, generator=generator), 1)
    single, double = (found_of(each, 12)["noise_gain"] for each in (made.float(), made))
    assert (double > 100).sum() > 5
    np.testing.assert_allclose(single[double < 1000], double[double < 1000], rtol=1e-4)


@pytest.mark.parametrize("shape", ["pre, linear injection", "residual, adjacent pairs, biases", "window"])
def test_of_a_model_they_are_those_of_the_diagonal_blocks_of_its_whole_jacobian(shape: str) -> None:
    plain, batch = one_prompt(random_model(**SHAPES[shape]))
    found = leading_eigenvalues(plain, batch, recurrences=3, products=1000, search=0)
    for token, block in enumerate(blocks(jacobian(plain, batch, 3)).numpy()):
        for name, value in wanted_of(block, 12).items():
            np.testing.assert_allclose(getattr(found, name)[0, token], value, rtol=1e-6, err_msg=name)


def test_the_predicted_floor_is_that_of_a_noisy_loop() -> None:
    """`s -> A s + e` with noise in each recurrence: its level over the noise, against the gain."""
    generator = torch.Generator().manual_seed(0)
    made = torch.diag(torch.linspace(0.1, 0.9, 16)) + 2 * torch.triu(torch.randn(16, 16, generator=generator), 1) / 4
    model = linear_loop(made, torch.eye(16), dtype=torch.float64)
    gain = leading_eigenvalues(model, PROMPTS[:1], recurrences=64, search=0).noise_gain
    state, total = torch.zeros(4000, 16), 0.0
    for _ in range(300):
        state = state @ made.T + torch.randn(state.shape, generator=generator)
    total = float(state.square().mean().sqrt())
    np.testing.assert_allclose(gain, total, rtol=0.05)
    assert gain.min() > 5


def test_padding_and_states_that_overflow_have_none() -> None:
    found = leading_eigenvalues(subject(RESIDUAL_NORM, std=0.1, dtype=torch.float64), PROMPTS[:3], products=8)
    lost = leading_eigenvalues(linear_loop(1e3 * torch.eye(16), torch.eye(16), dtype=torch.float32), PROMPTS[:1])
    for name in ("singular_value", "krylov_singular_value", "krylov_departure", "transient_growth"):
        np.testing.assert_array_equal(np.isfinite(getattr(found, name)), found.mask)
        assert np.isnan(getattr(lost, name)).all()
