"""Lyapunov exponents, where they are known: linear maps, the Henon map, and a loop that settles."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import loopscope
from loopscope.dynamics.eigenvalues.exponents import vectors_along
from loopscope.dynamics.eigenvalues.krylov import ExactProducts
from loopscope.dynamics.eigenvalues.recurrence import TokenBlock
from loopscope.errors import ConfigError
from small_models import FEED_FORWARD, INJECTED, PROMPTS, hooked_native, linear_loop, relaxation, subject


def henon(state: Tensor) -> Tensor:
    """Hénon, Comm. Math. Phys. 50 (1976)."""
    x, y = state.unbind(-1)
    return torch.stack([1 - 1.4 * x.square() + y, 0.3 * x], dim=-1)


def test_the_henon_map() -> None:
    # 0.4192 and -1.6232 (Sprott, Chaos and Time-Series Analysis, 2003); their sum is the logarithm of 0.3 exactly.
    mask = torch.ones(1, 32, dtype=torch.bool)
    state = 0.1 * torch.rand(32, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(100):
        state = henon(state)

    def steps() -> Iterator[list[TokenBlock]]:
        nonlocal state
        for _ in range(500):
            yield [TokenBlock(mask, ExactProducts(henon, state), "exact")]
            state = henon(state)

    found = vectors_along(steps(), mask, 2, 2, seed=0).mean((0, 1, 2)).numpy()
    assert found == pytest.approx([0.4192, -1.6232], abs=4e-3)
    assert found.sum() == pytest.approx(np.log(0.3), abs=1e-12)


def test_a_linear_loop_has_the_logarithms_of_its_eigenvalues() -> None:
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    sizes = torch.linspace(1.2, 0.3, 16)
    symmetric = turn @ torch.diag(sizes) @ turn.T
    found = loopscope.lyapunov_exponents(
        linear_loop(symmetric, torch.eye(16)), PROMPTS[1:4:2], recurrences=100, exponents=3
    )
    assert found.growth.shape == (2, 3, 100, 3)
    assert np.isnan(found.exponents[~found.mask]).all()
    last, known = found.growth[found.mask][:, -1], np.log(sizes[:3].numpy())
    assert last == pytest.approx(np.broadcast_to(known, last.shape), abs=1e-3)
    assert (np.abs(found.change[found.mask]) < 0.1).all()


def test_all_of_them_add_up_to_the_determinant() -> None:
    # However the map is sheared, and after any number of recurrences.
    sheared = torch.eye(16) * 0.9 + torch.diag(torch.full((15,), 2.0), 1)
    found = loopscope.lyapunov_exponents(linear_loop(sheared, torch.eye(16)), PROMPTS[1:2], recurrences=3, exponents=16)
    assert found.exponents[0].sum(-1) == pytest.approx(16 * np.log(0.9), abs=1e-4)
    # What shears grows at first, though every eigenvalue is 0.9.
    assert (found.growth[0, :, 0, 0] > 0).all()


def test_where_a_state_settles_they_are_its_eigenvalues() -> None:
    model = subject(INJECTED, std=0.1, dtype=torch.float64)
    found = loopscope.lyapunov_exponents(model, PROMPTS[1:2], recurrences=60, exponents=4)
    stable = loopscope.leading_eigenvalues(model, PROMPTS[1:2], recurrences=60, products=16)
    known, last = np.log(np.abs(stable.eigenvalues[0, :, :5])), found.growth[0, :, -1]
    # A pair turns and grows by turns, but what several span always by as much, where the next are well below them.
    for count in (2, 4):
        apart = known[:, count - 1] - known[:, count] > 0.1
        assert apart.any()
        assert last[apart, :count].sum(-1) == pytest.approx(known[apart, :count].sum(-1), abs=1e-3)


def test_interventions_are_in_them() -> None:
    found = loopscope.lyapunov_exponents(relaxation(0.2), [[1, 2]], recurrences=2, exponents=2, intervene="damp=0.5")
    assert found.exponents == pytest.approx(np.log(0.6))


def test_what_has_no_exponents_is_refused() -> None:
    with pytest.raises(ConfigError, match="no recurrent layers"):
        loopscope.lyapunov_exponents(subject(FEED_FORWARD), PROMPTS)
    with pytest.raises(ConfigError, match="only watched"):
        loopscope.lyapunov_exponents(hooked_native(INJECTED)[1], PROMPTS)
    with pytest.raises(ConfigError, match="between 1 and the model's width of 16, got 17"):
        loopscope.lyapunov_exponents(subject(), PROMPTS, exponents=17)
    with pytest.raises(ConfigError, match="replaces a state"):
        loopscope.lyapunov_exponents(subject(), PROMPTS, intervene="token:0@3=zeros")
    with pytest.raises(ConfigError, match="at least 1"):
        loopscope.lyapunov_exponents(subject(), PROMPTS, recurrences=0)
