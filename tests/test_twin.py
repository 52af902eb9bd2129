"""The measured noise floor: what a run shows that is nudged by one rounding at every recurrence."""

from __future__ import annotations

import functools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray

from loopscope import AnalyzeSettings, analyze, judge
from loopscope.analysis.settings import parts_except
from loopscope.dynamics.trajectories.calibration import calibrate
from loopscope.dynamics.trajectories.synthetic import generate
from loopscope.dynamics.trajectories.twins import grows_exponentially, growth_of
from loopscope.dynamics.verdicts import KINDS, Kind
from loopscope.experiments.cells import Cell
from loopscope.experiments.designs import NormName
from loopscope.experiments.random_models import architecture_of
from loopscope.models.inspection.facts import Dtype
from loopscope.models.native.subject import NativeSubject
from loopscope.models.native.transformer import LoopedTransformer
from small_models import INJECTED, hooked_native

ONLY_VERDICTS = AnalyzeSettings(
    recurrences=16, horizon=96, judged_layers="last", skip=parts_except("twin", "behaviour"), threads=1
)


def random_model(norm: NormName, std: float, seed: int, dtype: torch.dtype) -> tuple[LoopedTransformer, list[int]]:
    cell = Cell(norm=norm, injection="linear", depth=2, seed=seed, width=96, std=std, injection_scale=1.0, judged=True)
    model = LoopedTransformer(architecture_of(cell)).initialize(seed, std).to(dtype).eval().requires_grad_(False)
    return model, torch.randint(0, 256, (10,), generator=torch.Generator().manual_seed(seed)).tolist()


def study_of(norm: NormName, std: float, seed: int, dtype: torch.dtype) -> xarray.Dataset:
    model, prompt = random_model(norm, std, seed, dtype)
    return analyze(NativeSubject(model), [prompt], settings=ONLY_VERDICTS).dataset


@functools.cache
def true_fixed_points(norm: NormName, std: float, seed: int) -> np.ndarray:
    """By 1,000 recurrences in float64: the tokens whose last step is rounding."""
    model, prompt = random_model(norm, std, seed, torch.float64)
    with torch.no_grad():
        sequence = model.encode(torch.tensor([prompt]))
        state = model.initial_state(sequence, 0)
        for recurrence in range(1, 1001):
            before, state = state, model.recur(state, sequence, recurrence)
    steps: np.ndarray = ((state - before).norm(dim=-1) / state.norm(dim=-1))[0].numpy()
    return np.asarray(steps < 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("norm", "std"), [("residual", 0.02), ("residual", 0.07), ("pre", 0.06)])
def test_no_true_fixed_point_is_called_moving(norm: NormName, std: float, dtype: torch.dtype) -> None:
    truth = true_fixed_points(norm, std, seed=1)
    verdicts = [KINDS[code] for code in study_of(norm, std, 1, dtype)["verdict"].values[-1, 0]]
    assert truth.any()
    assert not [kind for kind, fixed in zip(verdicts, truth, strict=True) if fixed and kind.moves]


def test_at_rest_the_twin_is_as_far_as_the_motion_is_large() -> None:
    data = study_of("residual", 0.02, 0, torch.float32)
    ratio = (data["verdict_level"] / data["twin_floor"].isel(layer=-1)).values
    assert ((ratio > 0.8) & (ratio < 1.8)).all()
    assert (data["twin_parted"] == -1).all()
    assert (abs(data["twin_growth"]) < 0.01).all()


def test_chaos_is_twins_that_part() -> None:
    data = study_of("residual", 0.15, 0, torch.float32)
    assert (data["verdict"].values[-1] == KINDS.index(Kind.BOUNDED)).all()
    assert (data["twin_growth"] > 4 * data["twin_growth_error"]).all()
    assert (data["twin_parted"] > 8).all()
    distance = data["twin_distance"].values[-1, :, 0]
    assert np.isnan(distance[:96]).all()
    assert distance[96] < 2e-6
    assert distance[-1] > 0.1


def test_what_a_coarse_dtype_cannot_tell_from_noise_is_said() -> None:
    data = study_of("residual", 0.15, 0, torch.bfloat16)
    assert {KINDS[code] for code in data["verdict"].values[-1, 0]} <= {Kind.UNKNOWN, Kind.BOUNDED}


def test_growth_is_the_exponent_of_what_grows_and_nothing_of_what_does_not() -> None:
    time, rng = np.arange(200.0), np.random.default_rng(0)
    noise = np.exp(0.2 * rng.standard_normal((200, 1, 2)))
    grows = np.minimum(1e-7 * np.exp(0.08 * time), 0.5)[:, None]
    rests = np.full((200, 1), 3e-7)
    growth, error = growth_of(torch.from_numpy(np.stack([grows, rests], axis=-1) * noise))
    assert abs(float(growth[0, 0]) - 0.08) < 3 * float(error[0, 0]) < 0.01
    assert abs(float(growth[0, 1])) < 3 * float(error[0, 1]) < 0.01


def test_a_hooked_model_is_nudged_as_well() -> None:
    settings = AnalyzeSettings(recurrences=4, horizon=24, skip=parts_except("twin"), batch_size=1)
    native, hooked = (
        analyze(subject, [[1, 2, 3, 4, 5]], settings=settings).dataset["twin_floor"].values
        for subject in hooked_native(INJECTED, std=0.05)
    )
    assert (native > 0).all()
    np.testing.assert_allclose(np.log(hooked), np.log(native), atol=math.log(3))


@pytest.mark.parametrize(("dtype", "length"), [("float32", 128), ("bfloat16", 256)])
def test_rounding_that_a_contraction_amplifies_does_not_move(dtype: Dtype, length: int) -> None:
    cases = ("noisy mode", "non-normal")
    (found,) = calibrate(
        80, dtype=dtype, methods=("displacement",), seed=3, cases=cases, lengths=(length,), widths=(64, 256)
    )
    moving = sum(count for kind, count in found.total.said.items() if kind.moves)
    assert found.fixed_points >= 40
    assert moving == 0
    assert found.total.share >= 0.95


def test_an_approach_like_a_power_of_time_is_no_slider() -> None:
    said: Counter[Kind] = Counter()
    for each in generate(30, seed=2, cases=("power law",), lengths=(128, 256), widths=(64,)):
        if each.decidable:
            said[judge(each.states, "float32")[0].kind] += 1
    assert said[Kind.FIXED_POINT] + said[Kind.AT_FLOOR] >= 0.95 * said.total() > 15
    assert said[Kind.SLIDER] == 0


@pytest.mark.reference
def test_a_dtype_that_contradicts_the_numbers_is_said_and_changes_nothing(shared_dir: Path) -> None:
    for path in (shared_dir / "data" / "huginn-trajectories").glob("*.npy"):
        states = np.load(path)
        (right,), (wrong,) = (judge(states, dtype=dtype) for dtype in ("bfloat16", "float32"))
        assert right.kind == wrong.kind
        assert "every number is one of bfloat16" in wrong.reason
        assert "every number" not in right.reason


def test_a_distance_grows_exponentially_or_like_a_power_of_time() -> None:
    time = np.arange(1.0, 129.0)
    noise = np.exp(0.3 * np.random.default_rng(0).standard_normal((128, 40)))
    exponential, root, chain = 1e-7 * np.exp(0.05 * time), 1e-7 * np.sqrt(time), 1e-7 * time**1.5
    saturated = np.minimum(exponential, 2e-7)
    for curve, wanted in ((exponential, True), (root, False), (chain, False), (saturated, False)):
        found = grows_exponentially(torch.from_numpy(curve[:, None] * noise)[:, None])
        assert bool((found == wanted).all())
