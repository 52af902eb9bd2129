"""Verdicts on trajectories whose truth is known by construction, and what a verdict must not depend on."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopscope import AnalyzeSettings, analyze, capture
from loopscope.dynamics.trajectories.displacement import same_limit
from loopscope.dynamics.trajectories.judge import judge
from loopscope.dynamics.trajectories.noise import Noise
from loopscope.dynamics.trajectories.sensitivity import judge_over_grid
from loopscope.dynamics.trajectories.settings import CosineSettings, DisplacementSettings
from loopscope.dynamics.trajectories.states import rounding_step
from loopscope.dynamics.trajectories.synthetic import CASES, make_trajectory
from loopscope.dynamics.trajectories.tail import mean_squared_displacement
from loopscope.dynamics.verdicts import KINDS, Doubt, Kind, Verdict
from loopscope.errors import ConfigError
from loopscope.measures.behaviour import movers
from loopscope.models.inspection.facts import Dtype
from small_models import subject as looped_subject

Array = np.ndarray
LENGTH, WIDTH = 128, 64
TIME = np.arange(LENGTH, dtype=np.float64)


def directions(count: int, seed: int = 0) -> Array:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((WIDTH, count)))[0].T


def rounded(path: Array, dtype: Dtype) -> Array:
    """About a point of norm 1, as numbers of the type."""
    point = directions(9, seed=1)[-1]
    return torch.from_numpy(point + path).to(getattr(torch, dtype)).float().numpy()


def _norm(path: Array) -> float:
    """Of a typical state of the tail, in which lengths are given."""
    norms = np.linalg.norm(rounded(path, "float32")[LENGTH // 2 :], axis=1)
    return float(torch.from_numpy(norms).median())  # the lower one of two


def circle(period: float, size: float = 0.2, rate: float = 1.0) -> Array:
    angle = 2 * math.pi / period * TIME
    plane = directions(2)
    turning = np.cos(angle)[:, None] * plane[0] + np.sin(angle)[:, None] * plane[1]
    return np.asarray(size * (rate**TIME)[:, None] * turning)


def logistic(growth: float) -> Array:
    value, path = 0.3, []
    for _ in range(LENGTH):
        value = growth * value * (1 - value)
        path.append(value)
    return np.asarray(0.3 * np.array(path)[:, None] * directions(1))


ALONG = directions(1, seed=2)
SHAPES = {
    "contraction": (0.5 * (0.8**TIME)[:, None] * ALONG, {Kind.FIXED_POINT, Kind.AT_FLOOR}),
    "slow contraction": (0.5 * (0.975**TIME)[:, None] * ALONG, {Kind.FIXED_POINT}),
    "damped rotation": (circle(7.3, rate=0.97), {Kind.FIXED_POINT}),
    "barely damped rotation": (circle(7.3, rate=0.995), {Kind.FIXED_POINT}),
    "rotation": (circle(7.3), {Kind.ORBIT}),
    "cycle of five": (0.1 * np.random.default_rng(3).standard_normal((5, WIDTH))[np.arange(LENGTH) % 5], {Kind.ORBIT}),
    "two rotations": (circle(7.3) + circle(7.3 / 1.618) @ np.roll(np.eye(WIDTH), 7, 0), {Kind.BOUNDED}),
    "chaos": (logistic(3.99), {Kind.BOUNDED}),
    "drift": (TIME[:, None] / LENGTH * ALONG, {Kind.SLIDER}),
    "logarithmic drift": (0.3 * np.log(TIME + 5)[:, None] * ALONG, {Kind.SLIDER}),
    "growing rotation": (circle(7.3, size=0.01, rate=1.04), {Kind.DIVERGING}),
    "exponential growth": (0.01 * (1.05**TIME)[:, None] * ALONG, {Kind.DIVERGING}),
    "norm in proportion to time": (TIME[:, None] * ALONG, {Kind.DIVERGING}),
}


@pytest.mark.parametrize(
    ("turns", "kind"), [(0.3, Kind.SLIDER), (0.8, Kind.UNKNOWN), (1.7, Kind.UNKNOWN), (4.3, Kind.ORBIT)]
)
def test_few_turns_are_neither_a_way_nor_a_cycle(turns: float, kind: Kind) -> None:
    verdict = judge(rounded(circle(LENGTH / 2 / turns), "float32"), "float32")[0]
    assert verdict.kind == kind
    assert (verdict.doubt is Doubt.FEW_TURNS) == (kind == Kind.UNKNOWN)


def test_turns_that_cancel_are_no_approach() -> None:
    # Its size is a polynomial of time, which three spirals of nearly the same turn make, each many times as large.
    late = TIME / (LENGTH / 2) - 1
    size, angle = 1 - 1.4 * late + 0.9 * late**2, 2 * math.pi * TIME / (LENGTH / 2)
    parts = [size * np.cos(angle), size * np.sin(angle) * (1 - 0.3 * late), 0.5 * late * np.cos(angle + 1)]
    path = 0.2 * np.stack(parts, axis=-1) @ directions(3)
    assert judge(rounded(path, "float32"), "float32")[0].kind == Kind.UNKNOWN


def test_nothing_rests_in_noise_that_is_a_share_of_the_norm() -> None:
    rng, state, states = np.random.default_rng(0), np.zeros((8, 2)), []
    for _ in TIME:
        state = 0.8 * state + rng.standard_normal((8, 2))
        states.append(0.12 * state @ directions(2) + directions(9, seed=1)[-1])
    array = np.stack(states, axis=1).astype(np.float32)
    level = [verdict.level for verdict in judge(array, "bfloat16", try_window=False)]
    noise = Noise(rounding_step("bfloat16"), 0.5 * torch.tensor(level), torch.zeros(8, dtype=torch.bool))
    for some in (noise, dataclasses.replace(noise, floor=0.45 * torch.tensor(level))):
        assert {verdict.kind for verdict in judge(array, "bfloat16", noise=some)} == {Kind.UNKNOWN}


def test_a_smooth_motion_that_may_be_amplified_rounding_is_marked() -> None:
    slow = circle(29.0, size=0.01) + circle(47.0, size=0.01) + 0.01 * np.sin(TIME / 17)[:, None] * directions(5)[4]
    verdict = judge(rounded(slow, "float16"), "float16")[0]
    assert verdict.kind == Kind.AT_FLOOR
    assert "noise" in verdict.unstable


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_motion_is_called_what_it_is(shape: str, dtype: Dtype) -> None:
    path, right = SHAPES[shape]
    verdict = judge(rounded(path, dtype), dtype)[0]
    assert verdict.kind in right, verdict.reason
    assert verdict.reason
    assert (verdict.doubt is None) == (verdict.kind is not Kind.UNKNOWN)
    assert verdict.floor >= rounding_step(dtype)


@pytest.mark.parametrize("period", [2.0, 3.0, 5.0, 7.3, 12.9])
def test_an_orbit_comes_with_its_period_and_size(period: float) -> None:
    verdict = judge(rounded(circle(period, size=0.3), "float32"), "float32")[0]
    assert verdict.kind == Kind.ORBIT
    assert verdict.period == pytest.approx(period, rel=1e-4)
    assert verdict.amplitude == pytest.approx(0.3 / _norm(circle(period, size=0.3)), rel=0.01)


@pytest.mark.parametrize("rate", [0.9, 0.96, 0.98])
def test_an_approach_comes_with_its_rate(rate: float) -> None:
    verdict = judge(rounded(0.5 * (rate**TIME)[:, None] * ALONG, "float64"), "float32")[0]
    assert verdict.kind == Kind.FIXED_POINT
    assert verdict.rate == pytest.approx(rate, abs=1e-3)


def test_a_slider_comes_with_its_speed() -> None:
    path = 0.004 * TIME[:, None] * ALONG
    verdict = judge(rounded(path, "float32"), "float32")[0]
    assert verdict.kind == Kind.SLIDER
    assert verdict.speed == pytest.approx(0.004 / _norm(path), rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_noise_about_a_point_is_neither_an_orbit_nor_a_slider(dtype: Dtype) -> None:
    noise = np.random.default_rng(5).standard_normal((50, LENGTH, WIDTH)) / math.sqrt(WIDTH)
    for times in (0.3, 2.0, 8.0):
        states = directions(1, seed=1) + times * rounding_step(dtype) * noise
        kinds = {verdict.kind for verdict in judge(states.astype(np.float32), dtype)}
        assert kinds <= {Kind.FIXED_POINT, Kind.AT_FLOOR}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rounding_moves_a_state_by_what_is_said(dtype: Dtype) -> None:
    exact = torch.randn(400, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    error = (exact.to(getattr(torch, dtype)).double() - exact).norm() / exact.norm()
    assert math.sqrt(2) * float(error) == pytest.approx(rounding_step(dtype), rel=0.01)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(SHAPES)), st.integers(-30, 30), st.integers(0, 10**6))
def test_a_verdict_depends_on_neither_scale_nor_orientation_nor_company(shape: str, power: int, seed: int) -> None:
    path, _ = SHAPES[shape]
    states = rounded(path, "float32").astype(np.float64)
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((WIDTH, WIDTH)))[0]
    alone = judge(states, "float32")[0]
    changed = judge(np.stack([states * 2.0**power, states @ turn, -states]), "float32")
    assert [verdict.kind for verdict in changed] == [alone.kind] * 3


def test_displacement_is_the_mean_over_pairs_of_states() -> None:
    states = np.random.default_rng(0).standard_normal((3, 20, 6)).cumsum(1)
    centred = torch.from_numpy(states - states.mean(1, keepdims=True))
    found = mean_squared_displacement(centred @ centred.mT).numpy()
    assert found.shape == (3, 15)
    for lag in range(1, 16):
        slow = [((states[:, t + lag] - states[:, t]) ** 2).sum(-1) for t in range(20 - lag)]
        np.testing.assert_allclose(found[:, lag - 1], np.mean(slow, axis=0), rtol=1e-10)


def test_cosine_follows_its_definition() -> None:
    chosen = CosineSettings()
    for shape, (path, _) in SHAPES.items():
        states = rounded(path, "float32").astype(np.float64)
        tail = states[-64:]
        cosines = tail @ tail[-1] / np.linalg.norm(tail, axis=1) / np.linalg.norm(tail[-1])
        verdict = judge(states, "float32", "cosine")[0]
        if np.mean(1 - cosines <= chosen.tau) >= chosen.rho:
            assert verdict.kind == Kind.FIXED_POINT, shape
            continue
        detrended = cosines - np.polyval(np.polyfit(np.arange(64), cosines, 1), np.arange(64))
        power = np.abs(np.fft.rfft(detrended))[1:] ** 2
        peak = int(power.argmax())
        share = power[max(0, peak - 1) : peak + 2].sum() / power.sum()
        assert verdict.evidence["peak"] == pytest.approx(share, rel=1e-6), shape
        assert (verdict.kind == Kind.ORBIT) == (share >= chosen.peak), shape


@pytest.mark.parametrize("case", CASES)
def test_a_generated_trajectory_repeats_itself_and_is_of_its_type(case: str) -> None:
    one, other = (make_trajectory(case, seed=4, length=48, width=32, dtype="bfloat16") for _ in range(2))
    np.testing.assert_array_equal(one.states, other.states)
    assert one.states.shape == (48, 32)
    assert torch.equal(torch.from_numpy(one.states).bfloat16().float(), torch.from_numpy(one.states))
    assert one.truth


@pytest.mark.reference
def test_real_trajectories_are_at_the_floor(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "huginn-trajectories"
    files = sorted(folder.glob("*ns64*.npy"))
    if not files:
        pytest.skip(f"No recorded trajectories in {folder}.")
    for file in files:
        verdict = judge(np.load(file), "bfloat16")[0]
        assert verdict.kind == Kind.AT_FLOOR, (file.name, verdict.reason)
        assert 0.005 < verdict.floor < 0.03


BAD: dict[str, tuple[Any, str]] = {
    "too few": (np.zeros((2, 5, 8), np.float32), "5 recurrences are too few"),
    "one": (np.zeros((2, 1, 8), np.float32), "1 recurrence is too few"),
    "nothing finite": (np.full((2, 32, 8), np.nan, np.float32), "No state is finite"),
    "whole numbers": (np.zeros((2, 32, 8), np.int64), "floating-point"),
    "one axis": (np.zeros(32, np.float32), "axes"),
    "four axes": (np.zeros((1, 2, 32, 8), np.float32), "axes"),
    "empty": (np.zeros((0, 32, 8), np.float32), "no states"),
    "mixed lengths": ([np.zeros((32, 8), np.float32), np.zeros((40, 8), np.float32)], "one shape"),
    "swapped axes": (np.stack([rounded(SHAPES["contraction"][0], "float32")] * 3).swapaxes(0, 1), "swapaxes"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_trajectory_is_refused_with_a_sentence(what: str) -> None:
    states, words = BAD[what]
    if what == "swapped axes":
        tokens = np.stack([rounded(SHAPES["contraction"][0], "float32") * scale for scale in np.linspace(-3, 3, 40)])
        states = (tokens + np.random.default_rng(0).standard_normal((40, 1, WIDTH))).swapaxes(0, 1)
    with pytest.raises(ConfigError, match=words):
        judge(states, "float32")


def test_one_broken_token_spoils_no_other() -> None:
    states = np.stack([rounded(circle(5.0), "float32")] * 4)
    states[1, 60:] = np.nan
    states[2, 100:] = np.inf
    states[3] = 0
    kinds = [verdict.kind for verdict in judge(states, "float32")]
    assert kinds == [Kind.ORBIT, Kind.UNKNOWN, Kind.DIVERGING, Kind.UNKNOWN]


def test_states_that_never_change_are_a_fixed_point() -> None:
    verdict = judge(np.ones((32, 8), np.float32), "bfloat16")[0]
    assert verdict.kind == Kind.FIXED_POINT
    assert "the same" in verdict.reason


def test_a_few_recurrences_that_slow_down_are_no_point() -> None:
    """The steps of t^-2 hide at first that the rest goes on like the root of time."""
    time = np.arange(1, 33)[:, None]
    states = np.eye(16)[5] + 10 * (time**-2.0 * np.eye(16)[0] + 2e-3 * time**0.5 * np.eye(16)[1])
    twin = states + 1e-6 * np.random.default_rng(0).normal(size=states.shape)
    (verdict,) = judge(states[None].astype(np.float32), "float32", twins=[twin[None].astype(np.float32)])
    assert (verdict.kind, verdict.doubt) == (Kind.UNKNOWN, Doubt.BRIEF)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_comes_down_to_an_orbit_is_no_approach_to_a_point(dtype: Dtype) -> None:
    """Nor where noise would hide how far an exponential bends otherwise."""
    time, (centre, way) = np.arange(256)[:, None], np.random.default_rng(0).normal(size=(2, 64))
    shrinking = np.stack([rate**time * (-1.0) ** time * way for rate in (0.98, 0.985, 0.99, 0.995)])
    lasting = 0.1 * (-1.0) ** time * way
    orbits = judge((centre + lasting + 0.1 * shrinking).astype(np.float32), dtype)
    assert {verdict.kind for verdict in orbits} <= {Kind.ORBIT, Kind.UNKNOWN}
    assert Doubt.SLIGHT in {verdict.doubt for verdict in orbits}
    doubled = (0.01 + 0.1 * 0.9782 ** time[:128]) * (-1.0) ** time[:128] * way
    assert judge((centre + doubled)[None].astype(np.float32), "float32")[0].doubt is Doubt.SLIGHT
    assert {verdict.kind for verdict in judge((centre + shrinking).astype(np.float32), dtype)} == {Kind.FIXED_POINT}


@pytest.mark.parametrize(("rate", "kind"), [(0.998, Kind.FIXED_POINT), (1.002, Kind.DIVERGING), (1.0, Kind.SLIDER)])
def test_a_slow_exponential_whose_bend_is_seen_ends_where_exponentials_do(rate: float, kind: Kind) -> None:
    time, (centre, way) = np.arange(128)[:, None], np.random.default_rng(0).normal(size=(2, 64))
    moved = rate**time if rate != 1 else 1e-3 * time
    assert judge((centre + moved * way)[None], "float32")[0].kind is kind


def test_states_that_become_zero_or_are_left_are_told_without_a_number_that_is_none() -> None:
    states = np.stack([rounded(np.zeros((LENGTH, WIDTH)), "float32")] * 3)
    moves = 0.01 * np.random.default_rng(0).standard_normal((LENGTH, WIDTH)).astype(np.float32)
    states[0] = (states[0] + moves) * (TIME < 0.7 * LENGTH)[:, None]
    states[1] = (states[1] + moves) * (TIME >= 0.85 * LENGTH)[:, None]
    later = np.maximum(TIME - 0.875 * LENGTH, 0)
    states[2] += (moves.cumsum(0) * later[:, None] ** 2).astype(np.float32)
    verdicts = judge(states, "float32")
    assert [verdict.kind for verdict in verdicts[:2]] == [Kind.FIXED_POINT, Kind.DIVERGING]
    assert all(math.isfinite(verdict.level) for verdict in verdicts)
    assert not any(word in verdict.reason for verdict in verdicts for word in ("nan", "inf", "e+"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("length", [17, 28, 40])
def test_a_logarithm_of_time_has_no_limit_from_its_first_steps_on(length: int, dtype: Dtype) -> None:
    """Half of so short a trajectory is judged with what comes before it, where the steps shrink as in an approach."""
    path = np.log(np.arange(1, length + 1))[:, None] * directions(1)
    assert judge(rounded(0.1 * path, dtype), dtype)[0].kind == Kind.SLIDER


@pytest.mark.parametrize(("width", "taken"), [(3, 3), (5, 2), (16, 1), (16, 3), (16, 16)])
def test_noise_in_narrow_states_looks_as_structured_as_its_p_value_says(width: int, taken: int) -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((200, 32, width)) * np.where(np.arange(width) < taken, 1.0, 0.01)
    verdicts = judge(1 + 1e-4 * noise, "float64", try_window=False)
    assert np.mean([verdict.p_value < 0.01 for verdict in verdicts]) < 0.06


def test_more_periods_than_the_shortest_tail_could_hold_are_refused() -> None:
    with pytest.raises(ConfigError, match="least_periods"):
        DisplacementSettings(least_periods=8)
    most = DisplacementSettings(least_periods=3)
    assert judge(rounded(circle(4.0), "float32")[:16], "float32", settings=most)[0].kind == Kind.ORBIT


@pytest.mark.parametrize("dtype", [torch.bfloat16, np.float32, "bf16", "torch.float16"])
def test_a_number_type_may_be_an_object(dtype: object) -> None:
    assert judge(np.ones((32, 8), np.float32), dtype)[0].kind == Kind.FIXED_POINT


def test_an_unknown_number_type_is_named() -> None:
    with pytest.raises(ConfigError, match="int8"):
        judge(np.ones((32, 8), np.float32), "int8")


def test_the_defaults_lie_in_the_middle_of_the_sensitivity_map() -> None:
    states = torch.stack([torch.from_numpy(rounded(path, "float32")) for path, _ in SHAPES.values()])
    for chosen, method in ((DisplacementSettings(), "displacement"), (CosineSettings(), "cosine")):
        verdicts, places = judge_over_grid(states, "float32", chosen)
        alone = judge(states, "float32", method)  # type: ignore[arg-type]
        assert [verdict.reason for verdict in verdicts] == [verdict.reason for verdict in alone]
        assert [KINDS[place] for place in places[:, 2, 2]] == [verdict.kind for verdict in verdicts]


def test_a_study_holds_the_verdicts_of_its_states() -> None:
    subject = looped_subject()
    prompts = [[5, 6, 7, 8, 9], [3, 4, 5]]
    chosen = AnalyzeSettings(recurrences=24, horizon=32, batch_size=2, threads=1)
    data = analyze(subject, prompts, settings=chosen).dataset
    assert list(data["kind"].values) == [str(kind) for kind in KINDS]
    for row, prompt in enumerate(prompts):
        trace = capture(subject, [prompt], recurrences=64)
        for layer in data["judged_layer"].values:
            states = torch.stack([trace.residual("recurrent", int(layer), t)[0] for t in range(33, 65)], dim=1)
            verdicts = judge(states, "float32", first_recurrence=33)
            stored = data["verdict"].sel(judged_layer=layer, prompt=row).values[: len(prompt)]
            assert all(same_limit(KINDS[code], verdict.kind) for code, verdict in zip(stored, verdicts, strict=True))
    beyond = data["verdict"].sel(prompt=1).values[:, 3:]
    assert (beyond == -1).all()
    assert int(data["displacement_sensitivity"].sum()) == 8 * 25


def test_the_mover_of_a_prompt_is_its_widest_orbit_or_slider() -> None:
    kinds = [Kind.ORBIT, Kind.BOUNDED, Kind.SLIDER, Kind.FIXED_POINT, Kind.AT_FLOOR, Kind.ORBIT]
    levels = [0.1, 0.9, 0.2, 0.5, 0.3, 0.4]
    verdicts = [
        Verdict(kind=kind, reason="", method="displacement", level=level)
        for kind, level in zip(kinds, levels, strict=True)
    ]
    mask = np.array([[True, True, True], [True, True, False], [True, False, False]])
    assert movers(verdicts, mask) == [(0, 2), (2, 5)]


def test_too_short_a_horizon_gives_no_verdicts() -> None:
    study = analyze(looped_subject(), [[5, 6, 7]], settings=AnalyzeSettings(recurrences=4, horizon=6, threads=1))
    assert "verdict" not in study.dataset


@pytest.mark.parametrize("period", [2, 3, 7])
@pytest.mark.parametrize("approach", ["drift", "slow", "fast"])
def test_a_cycle_that_is_still_approached_has_its_own_period(period: int, approach: str) -> None:
    """Curves of several times the period follow the approach too, and leave less of it."""
    rng = np.random.default_rng(period)
    time = np.arange(64)
    points, way, centre = rng.standard_normal((period, 32)), rng.standard_normal(32), rng.standard_normal(32)
    places = {"drift": 2e-4 * time, "slow": 2e-2 * np.exp(-time / 100), "fast": 1e-2 * np.exp(-time / 40)}
    states = 10 * centre + points[time % period] + places[approach][:, None] * way
    (verdict,) = judge(states[None].astype(np.float32), "float32", first_recurrence=65)
    assert verdict.kind == Kind.ORBIT
    assert verdict.period == pytest.approx(period, rel=1e-3)


def test_what_alternates_for_ever_does_not_slide() -> None:
    """Every second state is near: the displacement at even lags grows like that of a drift, and is none."""
    rng = np.random.default_rng(0)
    time = np.arange(64, 128)
    centre, across, way = rng.standard_normal((3, 32))
    steps = 0.06 * (-1.0) ** time * time**-0.06
    states = 10 * centre + steps[:, None] * across + 1e-4 * np.sqrt(time)[:, None] * way
    (verdict,) = judge(states[None].astype(np.float32), "float32", first_recurrence=65)
    assert verdict.kind not in (Kind.SLIDER, Kind.DIVERGING)
