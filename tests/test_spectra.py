"""What follows from eigenvalues, and what a trajectory shows: arrays in, arrays out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopscope.dynamics.observed_rate import RateReason, RateSettings, observed_rate
from loopscope.dynamics.prediction import (
    PredictedKind,
    StabilityCriterion,
    best_damping,
    damped,
    damping_needed,
    period,
    predict,
    predicted_rate,
    stability_margin,
    undamped,
)
from loopscope.errors import ConfigError

NAN = complex(math.nan, math.nan)


def drawn(seed: int, size: int = 5, spread: float = 1.5) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return spread * (generator.normal(size=size) + 1j * generator.normal(size=size))


@given(st.integers(0, 2**32), st.floats(0.01, 1.0))
def test_damping_moves_eigenvalues_as_it_moves_those_of_the_damped_matrix(seed: int, eta: float) -> None:
    matrix = np.random.default_rng(seed).normal(size=(6, 6))
    wanted = np.linalg.eigvals((1 - eta) * np.eye(6) + eta * matrix)
    found = damped(np.linalg.eigvals(matrix), eta)
    for value in found:
        assert np.abs(wanted - value).min() < 1e-8
    np.testing.assert_allclose(undamped(found, eta), np.linalg.eigvals(matrix), atol=1e-9 / eta)


def radii(eigenvalues: np.ndarray, etas: np.ndarray) -> np.ndarray:
    largest: np.ndarray = np.abs(1 - etas[:, None] + etas[:, None] * eigenvalues).max(-1)
    return largest


@given(st.integers(0, 2**32), st.sampled_from([1.0, 0.95, 0.6]), st.sampled_from([0.3, 0.8, 1.5]))
def test_the_damping_needed_is_the_largest_of_a_fine_grid(seed: int, radius: float, spread: float) -> None:
    eigenvalues = drawn(seed, 4, spread)
    etas = np.linspace(1e-4, 1, 10_000)
    enough = etas[radii(eigenvalues, etas) <= radius + 1e-12]
    found = float(damping_needed(eigenvalues, radius))
    if math.isnan(found):
        assert len(enough) <= 2  # two circles may touch between points of the grid
    else:
        assert radii(eigenvalues, np.array([found])) <= radius + 1e-9
        assert len(enough) == 0 or found >= enough[-1] - 1e-9
        assert not len(etas[etas > found + 2e-4]) or (radii(eigenvalues, etas[etas > found + 2e-4]) > radius).all()


def test_no_damping_holds_a_real_part_of_one_or_more() -> None:
    values = np.array([[1.0 + 0.5j, 0.2], [1.2, 0.2], [1.0 + 0j, 0.2], [0.99, 0.2], [-3.0, NAN], [NAN, NAN]])
    needed = damping_needed(values, 0.999)
    assert np.isnan(needed).tolist() == [True, True, True, False, False, True]
    assert needed[4] == pytest.approx(1.999 / 4)
    # On the circle itself an eigenvalue of exactly 1 may stay.
    assert damping_needed(values[2:3], 1.0)[0] == 1.0
    assert damping_needed(np.array([-3.0 + 0j]), 1.0) == pytest.approx(0.5)


@given(st.integers(0, 2**32), st.sampled_from([0.3, 0.8, 1.5]))
def test_the_best_damping_is_the_best_of_a_fine_grid(seed: int, spread: float) -> None:
    eigenvalues = drawn(seed, 4, spread)
    etas = np.linspace(1e-4, 1, 10_000)
    eta, radius = best_damping(eigenvalues)
    assert radius <= radii(eigenvalues, etas).min() + 1e-9
    assert radii(eigenvalues, np.array([float(eta)]))[0] == pytest.approx(float(radius))


def one_token(value: complex, error: float = 1e-6, step: float = 1e-7) -> PredictedKind:
    eigenvalues = np.array([[[value, 0.1]]], dtype=np.complex128)
    prediction = predict(eigenvalues, np.full((1, 1, 2), error), np.full((1, 1), step))
    return PredictedKind(prediction.kind[0, 0])


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (0.9, PredictedKind.FIXED_POINT),
        (0.98, PredictedKind.FIXED_POINT),
        (0.999, PredictedKind.SLIDER),
        (1.004, PredictedKind.SLIDER),
        (1.02, PredictedKind.UNSTABLE),
        (-0.9, PredictedKind.DAMPED_ROTATION),
        (-0.1, PredictedKind.FIXED_POINT),
        (-0.999, PredictedKind.PERIOD_TWO),
        (-1.3, PredictedKind.PERIOD_TWO),
        (0.95 * np.exp(0.5j), PredictedKind.DAMPED_ROTATION),
        (0.5 * np.exp(0.5j), PredictedKind.FIXED_POINT),
        (0.998 * np.exp(0.5j), PredictedKind.ORBIT),
        (1.2 * np.exp(-0.5j), PredictedKind.ORBIT),
        (0.998 * np.exp(0.01j), PredictedKind.SLIDER),
    ],
)
def test_the_kind_is_where_the_leading_eigenvalue_lies(value: complex, kind: PredictedKind) -> None:
    assert one_token(value) == kind
    assert one_token(np.conj(value)) == kind


def test_what_the_error_leaves_open_is_not_told() -> None:
    assert one_token(0.98, error=0.05) == PredictedKind.UNRESOLVED
    assert one_token(0.8, error=0.05) == PredictedKind.FIXED_POINT
    assert one_token(0.998 * np.exp(0.06j), error=0.05) == PredictedKind.UNRESOLVED  # a slider as well as an orbit
    assert one_token(0.7 * np.exp(0.8j), error=0.1) in (PredictedKind.FIXED_POINT, PredictedKind.DAMPED_ROTATION)
    assert one_token(0.9, error=math.inf) == PredictedKind.UNRESOLVED
    assert one_token(0.3 * np.exp(2j), error=0.4) == PredictedKind.FIXED_POINT  # also where the modulus may be 0
    assert one_token(0.9, step=0.3) == PredictedKind.FAR


def test_a_token_follows_the_slowest_before_it_and_padding_follows_none() -> None:
    eigenvalues = np.full((2, 4, 2), NAN)
    eigenvalues[0, :3, 0] = [0.5, 0.9 * np.exp(-0.7j), 0.6]
    eigenvalues[1, 1:, 0] = [0.3, 0.2, 0.4]  # padding in front
    errors = np.where(np.isnan(eigenvalues), np.nan, 1e-6)
    step = np.where(np.isnan(eigenvalues[..., 0]), np.nan, 1e-8)
    prediction = predict(eigenvalues, errors, step)
    np.testing.assert_allclose(prediction.rate, [[0.5, 0.9, 0.9, np.nan], [np.nan, 0.3, 0.3, 0.4]])
    assert prediction.source.tolist() == [[0, 1, 1, -1], [-1, 1, 1, 3]]
    assert prediction.kind.tolist() == [
        ["fixed point", "damped rotation", "damped rotation", "cannot tell"],
        ["cannot tell", "fixed point", "fixed point", "fixed point"],
    ]
    np.testing.assert_allclose(prediction.period[0], [np.nan, 2 * np.pi / 0.7, 2 * np.pi / 0.7, np.nan])
    assert prediction.eigenvalue[0, 2] == pytest.approx(0.9 * np.exp(0.7j))
    np.testing.assert_allclose(stability_margin(eigenvalues)[0, :3], [0.5, 0.1, 0.4])
    np.testing.assert_array_equal(predicted_rate(eigenvalues), prediction.rate)
    # A token is no nearer to a fixed point than those that it follows.
    step[0, 0] = 0.5
    assert predict(eigenvalues, errors, step).kind[0, 2] == PredictedKind.FAR


def test_periods() -> None:
    np.testing.assert_allclose(period(np.array([1j, -1j, -0.5, np.exp(2j * np.pi / 7)])), [4, 4, 2, 7])
    assert np.isnan(period(np.array([0.5 + 0j, 0j]))).all()


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="horizon must be at least 2"):
        StabilityCriterion(horizon=1)
    with pytest.raises(ConfigError, match="largest_step must be a positive"):
        StabilityCriterion(largest_step=0.0)
    with pytest.raises(ConfigError, match="eta must be above 0 and at most 1"):
        damped(np.array([0.5 + 0j]), 0.0)
    with pytest.raises(ConfigError, match="radius must be above 0 and at most 1"):
        damping_needed(np.array([0.5 + 0j]), 1.5)
    with pytest.raises(ConfigError, match="fewest must be at least 6"):
        RateSettings(fewest=3)
    with pytest.raises(ConfigError, match="transient must be below 1 and no less than least_transient"):
        RateSettings(transient=0.2)
    with pytest.raises(ConfigError, match="dtype must be one of float64"):
        observed_rate(np.ones(20), dtype="int8")
    with pytest.raises(ConfigError, match=r"sizes has shape \(3,\), and steps \(20,\)"):
        observed_rate(np.ones(20), sizes=np.ones(3))


def test_a_geometric_sequence_has_its_rate_down_to_the_floor() -> None:
    steps = 0.8 ** np.arange(200)
    for dtype, roundoff in (("float64", 2.0**-52), ("float32", 2.0**-23)):
        found = observed_rate(np.maximum(steps, 5 * roundoff), dtype=dtype)
        assert found.rate == pytest.approx(0.8, abs=1e-9)
        # All that is left open is a factor of t^2, which this window is too short to rule out.
        assert found.uncertainty == pytest.approx(1.6 / ((int(found.first) + int(found.stop)) / 2), rel=1e-6)
        assert found.reason == RateReason.FITTED
        assert steps[int(found.stop)] == pytest.approx(50 * roundoff, rel=0.25)
        assert found.first == int(found.stop) // 2
    known = observed_rate(steps, dtype="float64", floor=np.array(1e-6))
    assert steps[int(known.stop)] == pytest.approx(1e-5, rel=0.25)


def test_steps_that_do_not_shrink_have_a_rate_of_one_unless_rounding_explains_them() -> None:
    noise = np.random.default_rng(0).uniform(0.9, 1.1, size=128)
    assert observed_rate(0.3 * noise).rate == pytest.approx(1, abs=0.01)
    assert observed_rate(3e-7 * noise).reason == RateReason.TOO_SHORT
    grows = observed_rate(1e-3 * 1.1 ** np.arange(60), sizes=1 + 1.1 ** np.arange(60))
    assert grows.rate == pytest.approx(1.1)


def test_a_rotations_dips_do_not_move_its_rate() -> None:
    times = np.arange(160)
    steps = 0.93**times * np.abs(np.cos(0.4 * times + 0.3)) + 1e-300
    found = observed_rate(steps, dtype="float64")
    assert found.rate == pytest.approx(0.93, abs=0.004)
    assert abs(float(found.rate) - 0.93) <= float(found.uncertainty) + 1e-3


@pytest.mark.parametrize("power", [-2, -1, 1, 2])
def test_a_power_beside_the_geometric_fall_is_within_the_uncertainty(power: int) -> None:
    for rate in (0.35, 0.6, 0.9):
        steps = rate ** np.arange(1, 200) * np.arange(1.0, 200) ** power
        for dtype in ("float32", "float64"):
            found = observed_rate(steps, dtype=dtype)
            assert 0 < abs(float(found.rate) - rate) <= float(found.uncertainty)


def test_why_there_is_no_rate_is_said() -> None:
    steps = np.stack([np.zeros(40), np.full(40, np.nan), 0.1 ** np.arange(40), 0.9 ** np.arange(40)])
    found = observed_rate(steps)
    assert found.reason.tolist() == [
        "the state does not move",
        "the steps are not finite",
        "too few steps above the noise floor",
        "fitted",
    ]
    assert np.isnan(found.rate).tolist() == [True, True, True, False]
    assert observed_rate(np.ones((2, 0, 9))).rate.shape == (2, 0)
    # A bfloat16 floor leaves room for transients alone; six steps do where the fall is long enough.
    assert observed_rate(np.maximum(0.8 ** np.arange(64), 0.02), dtype="bfloat16").reason == RateReason.TOO_SHORT
    fast = observed_rate(np.maximum(0.2 ** np.arange(64), 2e-7))
    assert fast.rate == pytest.approx(0.2, abs=0.01)
    assert fast.stop - fast.first == 6


@pytest.mark.parametrize(("dtype", "noise", "within"), [("float64", 1e-16, 0.005), ("float32", 6e-8, 0.01)])
def test_rates_of_linear_maps_with_known_spectra(dtype: str, noise: float, within: float) -> None:
    """Non-normal maps of 24 dimensions, a real or complex leading eigenvalue, others up to 0.95 of it, and noise."""
    generator = np.random.default_rng(0)
    rates, found = [], []
    for index in range(60):
        rate, angle = generator.uniform(0.3, 0.95), generator.uniform(0.1, 3.0)
        rest = rate * generator.uniform(0.5, 0.95)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        inner = np.diag(generator.uniform(-rest, rest, size=24))
        inner[:2, :2] = rate * turn if index % 2 else np.diag([rate, 0])
        basis = np.eye(24) + 0.7 * generator.normal(size=(24, 24)) / np.sqrt(24)
        matrix = basis @ inner @ np.linalg.inv(basis)
        point, state = generator.normal(size=(2, 24))
        steps = []
        for _ in range(128):
            following = point + matrix @ (state - point) + noise * np.linalg.norm(state) * generator.normal(size=24)
            steps.append(np.linalg.norm(following - state) / np.linalg.norm(state))
            state = following
        rates.append(rate)
        found.append(steps)
    seen = observed_rate(np.array(found), dtype=dtype)
    away = np.abs(seen.rate - rates)
    assert np.nanmedian(away) < within
    fitted = np.isfinite(away)
    assert fitted.mean() > 0.8
    assert np.mean(away[fitted] <= seen.uncertainty[fitted] + 0.002) > 0.9
