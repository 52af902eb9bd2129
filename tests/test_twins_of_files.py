"""What other runs of the same tokens tell of a trajectory, where no model is at hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from loopscope import judge
from loopscope.cli import main
from loopscope.dynamics.trajectories.states import rounding_step
from loopscope.dynamics.verdicts import Kind, Verdict
from loopscope.errors import ConfigError

ROUNDING = rounding_step("float32")
TOKENS, LENGTH, WIDTH = 6, 128, 64
CENTRE = np.random.default_rng(9).standard_normal(WIDTH)
SIZE = float(np.linalg.norm(CENTRE))
U, V = np.linalg.qr(np.random.default_rng(8).standard_normal((WIDTH, 2)))[0].T * SIZE
TIME = np.arange(1, LENGTH + 1)[:, None]


def hovering(seed: int, start: float, new: float, rate: float = 0.8) -> NDArray[np.float64]:
    """A contraction that noise of `new` roundings a recurrence drives, `start` of its norm away at first."""
    rng = np.random.default_rng(seed)
    state = CENTRE + start * rng.standard_normal((TOKENS, WIDTH))
    found = []
    for _ in range(LENGTH):
        noise = new * ROUNDING / math.sqrt(2) * SIZE / math.sqrt(WIDTH) * rng.standard_normal((TOKENS, WIDTH))
        state = CENTRE + rate * (state - CENTRE) + noise
        found.append(state)
    return np.stack(found, axis=1)


def turning(phase: float, seed: int) -> NDArray[np.float64]:
    noise = ROUNDING * np.random.default_rng(seed).standard_normal((TOKENS, LENGTH, WIDTH))
    return np.asarray(CENTRE + 1e-5 * (np.cos(0.9 * TIME + phase) * U + np.sin(0.9 * TIME + phase) * V) + noise)


def chaotic(start: float) -> NDArray[np.float64]:
    """A logistic map of its own in each direction."""
    state = np.random.default_rng(3).uniform(0.2, 0.8, (TOKENS, WIDTH)) + start
    found = []
    for _ in range(LENGTH):
        state = 3.9 * state * (1 - state)
        found.append(state)
    return np.stack(found, axis=1) + 1


def told(states: NDArray[np.float64], *twins: NDArray[np.float64]) -> list[Verdict]:
    return judge(states.astype(np.float32), "float32", twins=[twin.astype(np.float32) for twin in twins])


def floors(verdicts: list[Verdict]) -> NDArray[np.float64]:
    return np.array([each.evidence["measured_floor"] for each in verdicts])


def test_noise_beyond_what_a_single_run_can_tell_is_rest_by_runs_from_elsewhere() -> None:
    """Of independent stationary noise, the difference is sqrt(2) times as large as each."""
    states = hovering(0, 0.1, new=30.0)
    assert {each.kind for each in told(states)} == {Kind.BOUNDED}
    by_twins = told(states, hovering(1, 0.2, new=30.0), hovering(2, 0.3, new=30.0))
    assert {each.kind for each in by_twins} == {Kind.AT_FLOOR}
    tail = states[:, LENGTH // 2 :]
    level = np.sqrt(np.square(tail - tail.mean(1, keepdims=True)).sum(-1).mean(-1)) / SIZE
    np.testing.assert_allclose(floors(by_twins), math.sqrt(2) * level, rtol=0.15)


@pytest.mark.parametrize("phase", [0.0, 0.3, 2.0, math.pi])
def test_an_orbit_is_one_at_whatever_phase_the_other_run_is(phase: float) -> None:
    found = told(turning(0.0, seed=0), turning(phase, seed=1))
    assert {each.kind for each in found} == {Kind.ORBIT}
    assert bool(np.isnan(floors(found)).all()) == (phase > 0)


def test_an_approach_is_no_noise_from_wherever_it_comes() -> None:
    found = told(hovering(0, 0.3, new=1.0, rate=0.97), hovering(1, 0.5, new=1.0, rate=0.97))
    assert {each.kind for each in found} == {Kind.FIXED_POINT}
    assert all("measured" not in each.reason for each in found)


def test_runs_that_began_one_rounding_apart_and_part_are_chaos() -> None:
    found = told(chaotic(0.0), chaotic(1e-7))
    assert {each.kind for each in found} == {Kind.BOUNDED}
    assert all("differ by rounding alone part" in each.reason for each in found)
    alone = told(chaotic(0.0), chaotic(0.05))
    assert [each.kind for each in alone] == [each.kind for each in told(chaotic(0.0))]
    assert np.isnan(floors(alone)).all()


def test_runs_that_became_the_same_or_broke_say_nothing() -> None:
    states = hovering(0, 0.1, new=30.0)
    same, gone = states.copy(), states.copy()
    same[:, :8] += 0.01
    gone[:, 40:] = np.nan
    assert np.isnan(floors(told(states, same, gone))).all()


@pytest.mark.reference
def test_huginn_hovers_by_its_three_initial_states(shared_dir: Path, tmp_path: Path) -> None:
    files = [shared_dir / "data" / "huginn-trajectories" / f"track_n48_ns64_init{start}.npy" for start in range(3)]
    runs = [np.load(path) for path in files]
    for place, states in enumerate(runs):
        (found,) = judge(states, "bfloat16", twins=runs[:place] + runs[place + 1 :])
        assert found.kind == Kind.AT_FLOOR
        assert "measured noise floor" in found.reason
    arguments = ["--dtype", "bfloat16", "--no-report", "--out", str(tmp_path / "out")]
    main(["behaviour", str(files[0]), "--twins", *map(str, files[1:]), *arguments])
    assert "measured noise floor" in (tmp_path / "out" / "verdicts.jsonl").read_text()


def test_what_is_no_twin_is_refused_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = hovering(0, 0.1, new=1.0)
    with pytest.raises(ConfigError, match=r"its shape is \(6, 100, 64\), that of the states \(6, 128, 64\)"):
        told(states, states[:, :100])
    with pytest.raises(ConfigError, match="the very same states"):
        told(states, states)
    with pytest.raises(ConfigError, match="cosine method has no noise floor"):
        judge(states, "float32", "cosine", twins=[hovering(1, 0.1, new=1.0)])
    np.save(tmp_path / "one.npy", states)
    np.savez(tmp_path / "two.npz", a=states, b=states)
    np.save(tmp_path / "whole.npy", np.zeros((6, 128, 64), dtype=int))
    given = ["--twins", str(tmp_path / "one.npy"), "--dtype", "float32", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(["behaviour", str(tmp_path / "two.npz"), *given])
    assert "say whose twin it is (--array a)" in capsys.readouterr().err
    for name, sentence in (
        ("two.npz", "two.npz holds 2 arrays"),
        ("whole.npy", "whole.npy: States are floating-point"),
    ):
        given = ["--twins", str(tmp_path / name), "--dtype", "float32", "--out", str(tmp_path / "out")]
        with pytest.raises(SystemExit):
            main(["behaviour", str(tmp_path / "one.npy"), *given])
        assert sentence in capsys.readouterr().err
