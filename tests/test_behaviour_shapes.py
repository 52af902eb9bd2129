"""How motions are reduced and fitted: exact numbers, tails cut out of tails, closed curves of any form, and what must
not be taken for one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loopscope.dynamics.trajectories.calibration import calibrate
from loopscope.dynamics.trajectories.curves import gradual, shortest_turns
from loopscope.dynamics.trajectories.judge import judge
from loopscope.dynamics.trajectories.narrowing import best_on_grid, narrow
from loopscope.dynamics.trajectories.shapes import explained_energy, families, together
from loopscope.dynamics.trajectories.states import rounding_step
from loopscope.dynamics.trajectories.tail import Tails, decompose, take_tails
from loopscope.dynamics.verdicts import Kind
from loopscope.models.inspection.facts import Dtype

Array = np.ndarray
WIDTH = 64


def directions(count: int, seed: int = 0) -> Array:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((WIDTH, count)))[0].T


def rounded(path: Array, dtype: Dtype = "float32") -> Array:
    """About a point of norm 1, as numbers of the type."""
    point = directions(19, seed=1)[-1]
    return torch.from_numpy(point + path).to(getattr(torch, dtype)).float().numpy()


def tails_of(path: Array) -> Tails:
    return take_tails(torch.from_numpy(np.atleast_3d(path)), path.shape[-2])


def pulse(time: Array, period: float, sharpness: float = 25.0) -> Array:
    """A closed curve with a short pulse once a period: a score of harmonics matters."""
    angle = 2 * math.pi / period * time
    height = np.exp(sharpness * (np.cos(angle) - 1))
    return np.asarray(0.3 * np.stack([height, np.sin(angle) * height], axis=-1) @ directions(2))


def rotations(time: Array, *periods: float) -> Array:
    plane = directions(2 * len(periods))
    waves = [wave(2 * math.pi / period * time) for period in periods for wave in (np.cos, np.sin)]
    return np.asarray(0.2 * np.stack(waves, axis=-1) @ plane)


@pytest.mark.parametrize(("size", "doubts"), [(1.0, ()), (2e-5, ("noise",))])
def test_an_orbit_as_small_as_remembered_rounding_is_marked(size: float, doubts: tuple[str, ...]) -> None:
    (verdict,) = judge(rounded(size * rotations(np.arange(256.0), 9.3)), dtype="float32")
    assert (verdict.kind, verdict.unstable) == (Kind.ORBIT, doubts)


@pytest.mark.parametrize(
    ("family", "numbers"),
    [
        ("exponential", [-3.21]),
        ("power", [-0.53]),
        ("spiral", [0.8123, -1.234]),
        ("orbit 1", [1.0101]),
        ("orbit 4", [0.5432]),
        ("logarithmic arc", [2.345, 0.77]),
    ],
)
def test_the_numbers_of_a_shape_are_found_between_the_points_of_its_grid(family: str, numbers: list[float]) -> None:
    known = next(each for each in families(64, 2.5) if each.name == family)
    times = torch.arange(65.0, 129.0, dtype=torch.float64)
    true = torch.tensor([numbers], dtype=torch.float64)
    weights = torch.randn(known.columns, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores = known.design(true, times)[0] @ weights
    scores = scores - scores.mean(-2, keepdim=True)
    found = narrow(known, times, scores, best_on_grid(known, times, scores)[0])
    np.testing.assert_allclose(found.numpy(), true.numpy(), rtol=1e-6)
    left = scores.square().sum() - explained_energy(known, found, times, scores)[0]
    assert float(left / scores.square().sum()) < 1e-13


def test_designs_change_with_their_numbers_as_they_say() -> None:
    known, times = families(64, 2.5), torch.arange(33.0, 97.0, dtype=torch.float64)
    for family in (*known, together(known[-6:])):
        numbers = torch.where(family.low.isfinite(), 0.7 * family.low + 0.3 * family.high, -0.9)
        _, changes = family.design(numbers, times)
        for place, step in enumerate(1e-6 * torch.eye(len(numbers), dtype=torch.float64)):
            ahead, back = (family.design(numbers + sign * step, times)[0] for sign in (1, -1))
            torch.testing.assert_close(changes[place], (ahead - back) / 2e-6, rtol=1e-5, atol=1e-6)


def test_in_noise_no_numbers_nearby_explain_more_than_those_found() -> None:
    known = next(each for each in families(48, 2.5) if each.name == "spiral")
    times = torch.arange(1.0, 49.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(5, 48, 4, dtype=torch.float64, generator=generator)
    columns, _ = known.design(torch.tensor([0.7, -0.9], dtype=torch.float64), times)
    scores += 3 * columns @ torch.ones(2, 4).double()
    scores -= scores.mean(1, keepdim=True)
    found = narrow(known, times, scores, best_on_grid(known, times, scores)[0])
    best = explained_energy(known, found, times, scores)
    for moved in torch.randn(50, *found.shape, dtype=torch.float64, generator=generator) * 0.01:
        assert (explained_energy(known, found + moved, times, scores) <= best).all()


def test_a_tail_cut_out_of_a_longer_one_is_the_tail_of_the_states() -> None:
    # An approach: what moves at the end is a billionth of what moved at the beginning.
    path = (0.6 ** np.arange(60))[:, None] * directions(1) + directions(1, seed=1)
    states = torch.from_numpy(path * np.linspace(1.0, 1.5, 60)[:, None])[None]
    direct, cut = take_tails(states, 20), take_tails(states, 48).last(20, torch.tensor([0]))
    for name in ("times", "products", "steps", "norms", "norm_growth"):
        torch.testing.assert_close(getattr(cut, name), getattr(direct, name), rtol=1e-10, atol=0)
    torch.testing.assert_close(cut.displacement(), direct.displacement(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("period", [2, 3, 5, 6, 9, 10, 11])
def test_a_cycle_has_its_own_period_and_no_multiple_or_fraction_of_it(period: int, dtype: Dtype) -> None:
    for length in (64, 128, 256):
        points = np.random.default_rng([period, length]).standard_normal((period, WIDTH)) / math.sqrt(WIDTH)
        verdict = judge(rounded(0.2 * points[np.arange(length) % period], dtype), dtype)[0]
        assert (verdict.kind, verdict.period) == (Kind.ORBIT, period), (length, verdict.reason)


@pytest.mark.parametrize("period", [9.33, 13.7, 21.2])
def test_a_closed_curve_of_any_form_is_an_orbit_with_its_period(period: float) -> None:
    verdict = judge(rounded(pulse(np.arange(256.0), period)), "float32")[0]
    assert verdict.kind == Kind.ORBIT, verdict.reason
    assert verdict.period == pytest.approx(period, rel=1e-3)


def test_states_in_the_order_of_their_phase_make_the_shortest_way() -> None:
    time = np.arange(128.0)
    paths = [pulse(time, 13.7), np.random.default_rng(0).standard_normal((128, WIDTH))]
    turns, distance = shortest_turns(decompose(tails_of(np.stack(paths))).gram, 2.5)
    assert 2 * math.pi / float(turns[0]) == pytest.approx(13.7, rel=2e-3)
    assert float(distance[0]) < 0.05
    assert float(distance[1]) > 0.5


def test_harmonics_fade_in_a_curve_and_not_where_rotations_nearly_close() -> None:
    orders = np.arange(1, 10)
    fading = np.repeat(np.exp(-0.5 * orders), 2)
    odd = fading * np.repeat(orders % 2, 2)
    two = np.repeat((orders == 1) + 0.8 * (orders == 7), 2)
    coefficients = torch.from_numpy(np.stack([fading, odd, two])[..., None].repeat(3, -1))
    assert gradual(coefficients).tolist() == [True, True, False]


@pytest.mark.parametrize("length", [128, 256])
def test_rotations_close_only_if_their_periods_have_a_common_multiple(length: int) -> None:
    time = np.arange(float(length))
    closes, misses = (judge(rounded(rotations(time, 7.4, 7.4 * ratio)), "float32")[0] for ratio in (1.5, 1.502))
    assert closes.kind == Kind.ORBIT, closes.reason
    assert closes.period == pytest.approx(22.2, rel=1e-4)
    assert misses.kind == Kind.BOUNDED, misses.reason


def test_a_flip_that_fades_is_no_cycle() -> None:
    """Harmonics of a period near 4 alias to nearly the same turns, of which a fading flip can be made."""
    rng = np.random.default_rng(0)
    for _ in range(12):
        flips, turns = rng.uniform(0.955, 0.985, 2), rng.uniform(1.4, 1.7)
        time = np.arange(128.0)
        modes = [(-flips[0]) ** time, 0.3 * (-flips[1]) ** time, 0.05 * 0.97**time * np.cos(turns * time)]
        verdict = judge(rounded(0.5 * np.stack(modes, axis=-1) @ directions(3)), "float32")[0]
        assert verdict.kind in (Kind.FIXED_POINT, Kind.AT_FLOOR), verdict.reason


@pytest.mark.parametrize("length", [64, 128, 256])
def test_a_sum_of_decays_approaches_a_point(length: int) -> None:
    """Two or three exponentials come near to a logarithm or a drift after a transient, but for what float32 shows."""
    rng = np.random.default_rng(length)
    states = []
    for _ in range(20):
        rates, sizes = rng.uniform(2, 12, 3), np.array([1.0, *rng.uniform(-0.5, 0.5, 2)])
        decays = sizes * np.exp(-rates * np.arange(length)[:, None] / length)
        states.append(rounded(0.5 * decays @ directions(3, seed=int(rng.integers(99)))))
    kinds = [verdict.kind for verdict in judge(np.stack(states), "float32", check_order=False)]
    assert set(kinds) <= {Kind.FIXED_POINT, Kind.AT_FLOOR}


@pytest.mark.parametrize("length", [64, 128, 256])
def test_a_drift_after_transients_still_drifts(length: int) -> None:
    rng, time = np.random.default_rng(length), np.arange(float(length))
    states = []
    for _ in range(10):
        for way in (time / length, np.log(time + 2) / 5, (time + 1) ** 0.4 / length**0.4):
            transients = rng.uniform(0.05, 0.3, 2) * np.exp(-rng.uniform(15, 40, 2) * time[:, None] / length)
            states.append(rounded(np.concatenate([way[:, None], transients], axis=1) @ directions(3)))
    kinds = [verdict.kind for verdict in judge(np.stack(states), "float32", check_order=False)]
    assert set(kinds) == {Kind.SLIDER}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [48, 128])
def test_noise_in_few_directions_is_noise(length: int, dtype: Dtype) -> None:
    rng = np.random.default_rng(7)
    for count in (1, 2, 4):
        plane = directions(count)
        for times in (4.0, 8.0, 9.0):
            noise = rng.standard_normal((20, length, count)) / math.sqrt(2 * count)
            states = directions(19, seed=1)[-1] + times * rounding_step(dtype) * noise @ plane
            kinds = {verdict.kind for verdict in judge(states.astype(np.float32), dtype, check_order=False)}
            assert kinds <= {Kind.FIXED_POINT, Kind.AT_FLOOR}, (count, times)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_noise_that_a_slow_mode_remembers_neither_turns_nor_slides_nor_grows(dtype: Dtype) -> None:
    rng = np.random.default_rng(11)
    for count in (2, WIDTH):
        kicks = rng.standard_normal((60, 328, count)) * rounding_step(dtype) / math.sqrt(count)
        rates, state, path = rng.uniform(0.8, 0.96, (60, 1)), np.zeros((60, count)), []
        for step in range(328):
            state = rates * state + kicks[:, step]
            path.append(state)
        states = directions(19, seed=1)[-1] + np.stack(path[200:], axis=1) @ directions(count)
        kinds = {verdict.kind for verdict in judge(states.astype(np.float32), dtype, check_order=False)}
        assert kinds <= {Kind.FIXED_POINT, Kind.AT_FLOOR}


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.985), ("bfloat16", 0.975)])
def test_the_default_mix_is_decided(dtype: Dtype, least: float) -> None:
    table = calibrate(156, dtype=dtype, methods=["displacement"], seed=17, lengths=(64, 128), widths=(16, 256))[0]
    assert table.total.share >= least, {name: score.wrongly for name, score in table.cases.items() if score.wrong}
    assert table.false_alarms == 0
    assert table.fixed_points >= 40
