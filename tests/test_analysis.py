"""What an analysis finds, against a slow computation of the same variables and against dynamics that are known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray

from loopscope import AnalyzeSettings, analyze, capture
from loopscope.analysis.job import SilentProgress
from loopscope.analysis.settings import Part, parts_except
from loopscope.answers.initial_state import INITIAL_STATE
from loopscope.answers.quick import quick_answers
from loopscope.errors import ConfigError, NonFiniteError, PromptError
from loopscope.measures import similarity
from loopscope.measures.twin import Twin
from loopscope.models import loading
from loopscope.models.architecture import Architecture
from loopscope.models.native.subject import NativeSubject
from slow_dataset import slow_dataset
from small_models import (
    ADDED,
    ARCHITECTURES,
    FEED_FORWARD,
    GATED,
    INJECTED,
    LOOP_NORM,
    PROMPTS,
    RESIDUAL_NORM,
    architecture,
    linear_loop,
    relaxation,
    subject,
)

SETTINGS = AnalyzeSettings(
    recurrences=7,
    horizon=5,
    cycle_recurrences=3,
    batch_size=3,
    track=("0:-1", "1:0", "4:2"),
    components=4,
    map_prompts=(1, 2, 3),  # in two batches, the first of which is padded
    seed=3,
    skip=("stability",),  # its slow version is the full decomposition, in test_stability.py
)
WITHOUT_VERDICTS: tuple[Part, ...] = ("behaviour", "stability", "heads", "maps", "stages", "twin", "trajectories")
LOOPED = {name: each for name, each in ARCHITECTURES.items() if each.is_looped}


def dataset_of(model: NativeSubject, settings: AnalyzeSettings = SETTINGS, **changes: Any) -> xarray.Dataset:
    return analyze(model, PROMPTS, settings=settings, **changes).dataset


def assert_near(found: xarray.Dataset, wanted: xarray.Dataset, tolerance: float) -> None:
    """Equal but for `tolerance` of the size of the states, which is what rounding errors are proportional to.

    Variables that are stored in float32 have a relative error of half a unit in the last place more. Of those that
    are rounded to whole numbers, one that lies between two may go either way.
    """
    size = float(wanted["mean_token_norm"].max())
    for name in sorted({str(name) for name in found.data_vars} & {str(name) for name in wanted.data_vars}):
        mine, theirs = found[name], wanted[name]
        assert mine.dims == theirs.dims, name
        if mine.dtype == np.uint8:
            np.testing.assert_allclose(mine.values.astype(int), theirs.values.astype(int), atol=1, err_msg=name)
            continue
        stored = 1e-6 if mine.dtype == np.float32 else 0.0
        np.testing.assert_allclose(
            mine.values, theirs.values, rtol=tolerance + stored, atol=tolerance * size, err_msg=name
        )


@pytest.mark.parametrize("shape", [*ARCHITECTURES.values(), GATED], ids=[*ARCHITECTURES, "gated"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"]
)
def test_every_variable_is_what_its_definition_says(shape: Architecture, dtype: torch.dtype, tolerance: float) -> None:
    # In the long run these states wander about, which multiplies rounding errors; so they get less far here.
    model = subject(shape, dtype=dtype, std=0.1)
    found, wanted = dataset_of(model), slow_dataset(model, PROMPTS, SETTINGS)
    # What rounding does is no function of the exact states.
    looped = {"noise_floor", *Twin.variables} if shape.is_looped else set()
    assert set(found.data_vars) == set(wanted.data_vars) | looped
    assert_near(found, wanted, tolerance)


@pytest.mark.parametrize("recurrences", [1, 5, 10, 14])
def test_any_number_of_recurrences_is_measured_against_the_same_horizon(recurrences: int) -> None:
    # Two states lie opposite each other about their mean, so that rounding decides which score is positive.
    track = ("0:1",) if recurrences > 1 else ()
    settings = AnalyzeSettings(recurrences=recurrences, horizon=5, track=track, components=2)
    model = subject(dtype=torch.float64)
    found = dataset_of(model, settings)
    assert_near(found, slow_dataset(model, PROMPTS, settings), 1e-12)
    if recurrences >= 5:
        assert (found["distance_to_horizon"][:, 4] == 0).all()
    if recurrences >= 10:
        assert (found["distance_to_second_horizon"][:, 9] == 0).all()


@pytest.mark.parametrize("lengths", [(12, 7), (70, 55)], ids=["maps kept", "queries and keys kept"])
def test_maps_are_compared_over_tiles_of_rows(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_TILE_ENTRIES", 1200)
    tokens = torch.arange(sum(lengths)).mul(11).remainder(48).split(lengths)
    prompts, model = [prompt.tolist() for prompt in tokens], subject(dtype=torch.float64, std=0.2)
    settings = AnalyzeSettings(
        recurrences=3, horizon=4, batch_size=2, track=(), skip=(*WITHOUT_VERDICTS[:2], "stages", "twin")
    )
    found = analyze(model, prompts, settings=settings).dataset["attention_cycle_distance"]
    wanted = slow_dataset(model, prompts, settings)["attention_cycle_distance"]
    np.testing.assert_allclose(found.values, wanted.values, atol=1e-9)


def test_the_loop_state_is_another_site_where_the_recurrence_ends_with_a_norm() -> None:
    kept = dataset_of(subject(LOOP_NORM))["token_residual_norm"]
    last_layer, loop_state = kept.sel(site="last_layer"), kept.sel(site="loop_state")
    np.testing.assert_allclose(loop_state.values[:, 0], math.sqrt(LOOP_NORM.width), rtol=1e-5)
    assert float(abs(last_layer - loop_state).min()) > 0.1
    same = dataset_of(subject(RESIDUAL_NORM))["token_residual_norm"]
    assert (same.sel(site="last_layer") == same.sel(site="loop_state"))[:, 0].all()


def test_a_model_that_gets_its_prompt_by_the_initial_state_has_no_second_path() -> None:
    assert "path_distance" not in dataset_of(subject(LOOP_NORM))
    assert "path_distance" in dataset_of(subject(ADDED))


def test_tracked_tokens_are_named_in_the_order_of_prompts() -> None:
    found = dataset_of(subject(), track=("4:-1", "1:1", "1:-2"))
    assert found["tracked_prompt"].values.tolist() == [1, 4]  # 1:1 and 1:-2 are the same token
    assert found["tracked_token"].values.tolist() == [1, len(PROMPTS[4]) - 1]


@pytest.mark.parametrize("method", ["keep", "second-pass"])
def test_distances_between_all_scores_are_distances_between_states(method: Any) -> None:
    model = subject()
    found = dataset_of(model, track=("0:3",), components=14, horizon_method=method)["trajectory"][0]
    trace = capture(model, PROMPTS[0], recurrences=7, seed=3)
    states = np.array(
        [[trace.residual("recurrent", i, t)[0, 3].double().numpy() for t in range(1, 8)] for i in range(2)]
    )
    for layer, recurrence in [(0, 0), (0, 6), (1, 3)]:
        wanted = np.linalg.norm(states - states[layer, recurrence], axis=-1)
        away = np.linalg.norm(found.values - found.values[layer, recurrence], axis=-1)
        np.testing.assert_allclose(away, wanted, atol=1e-5 * np.abs(states).max())


# Dynamics that are known


@pytest.mark.parametrize("rate", [0.5, -0.5, 0.9])
def test_a_linear_relaxation_has_the_rate_that_it_was_given(rate: float) -> None:
    found = analyze(
        relaxation(rate), PROMPTS[:2], recurrences=12, horizon=200, skip=("noise-floor", "behaviour", "stability")
    ).dataset
    for name in ("successive_difference", "distance_to_horizon", "distance_to_second_horizon"):
        values = found[name].values
        ratio = values[:, 2:] / values[:, 1:-1]
        np.testing.assert_allclose(ratio, abs(rate), rtol=1e-6, err_msg=name)
    # The path distance is relative to the norms of the states, which still move a little.
    apart = found["path_distance"].values
    np.testing.assert_allclose(apart[:, -3:] / apart[:, -4:-1], abs(rate), rtol=0.1)
    start = found["distance_to_horizon"].values[:, 0]
    np.testing.assert_allclose(
        found["distance_to_horizon"].values, start[:, None] * abs(rate) ** np.arange(12)[:, None], rtol=1e-6
    )


def test_a_linear_relaxation_ends_in_the_embeddings_which_all_layers_share() -> None:
    model = relaxation(0.25)
    found = dataset_of(model, recurrences=40, horizon=64, skip=("behaviour", "stability"))
    embedded = model.model.embed(torch.tensor(PROMPTS[0])[None])[0].norm(dim=-1)
    last = found["token_residual_norm"].sel(site="loop_state")[-1, 0, : len(PROMPTS[0])]
    np.testing.assert_allclose(last.values, embedded.numpy(), rtol=1e-6)
    np.testing.assert_allclose(found["degeneracy"], 1.0)
    np.testing.assert_allclose(found["layer_cosine"], 1.0)
    assert (found["horizon_drift"] < 1e-15).all()
    assert (found["path_distance"][:, -1] < 1e-15).all()
    assert (found["diverged_at"] == -1).all()


def test_several_starts_end_together_where_the_loop_contracts_and_apart_where_nothing_moves() -> None:
    forgets = analyze(relaxation(0.25), PROMPTS[:2], recurrences=40, horizon=64, other_starts=3, skip=WITHOUT_VERDICTS)
    stays = analyze(
        linear_loop(torch.eye(16), torch.zeros(16, 16)),
        PROMPTS[:2],
        recurrences=4,
        horizon=4,
        other_starts=3,
        skip=WITHOUT_VERDICTS,
    )
    for study, count in ((forgets, 1), (stays, 4)):
        apart = study.dataset["start_distance"]
        assert apart.sizes["start"] == 4
        there = np.isfinite(apart.values).all((0, 1))
        np.testing.assert_array_equal(there.sum(1), [len(prompt) for prompt in PROMPTS[:2]])
        answer = next(each for each in quick_answers(study) if each.key == INITIAL_STATE.key)
        assert answer.evidence["most_ends_of_a_token"] == count
        assert answer.evidence["initial_states"] == 4
        # What is told of a layer and prompt is the farthest of the three.
        by_prompt = apart[0].mean("token").max("start_other").values
        np.testing.assert_allclose(study.dataset["path_distance"].values[-1, -1], by_prompt, rtol=1e-3, atol=1e-12)
    one = analyze(relaxation(0.25), PROMPTS[:2], recurrences=40, horizon=64, skip=WITHOUT_VERDICTS).dataset
    np.testing.assert_array_equal(one["start_distance"][:2, :2], forgets.dataset["start_distance"][:2, :2])


def test_the_distance_of_two_paths_is_relative_to_the_mean_of_both_norms() -> None:
    # Two states that never meet, and never move: s and a state drawn apart.
    model = linear_loop(torch.eye(16), torch.zeros(16, 16))
    found = dataset_of(model, recurrences=3, horizon=2)
    one = torch.tensor(PROMPTS[0])[None]
    both = [capture(model, one, recurrences=1, seed=seed).initial_state[0].numpy() for seed in (3, 4)]
    norms = [np.linalg.norm(state, axis=-1) for state in both]
    wanted = (np.linalg.norm(both[0] - both[1], axis=-1) / ((norms[0] + norms[1]) / 2)).mean()
    np.testing.assert_allclose(found["path_distance"][:, :, 0], wanted, rtol=1e-12)
    assert (found["successive_difference"][:, 1:] == 0).all()


def test_a_rotation_is_an_orbit_that_never_gets_nearer() -> None:
    angle = 2 * math.pi / 6
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    model = linear_loop(torch.block_diag(*[turn.double()] * 8), torch.zeros(16, 16, dtype=torch.float64))
    found = dataset_of(model, recurrences=18, horizon=20)
    np.testing.assert_allclose(found["norm_growth"], 1.0, rtol=1e-6)
    # One step is the chord of a sixth of a circle, which is as long as its radius.
    np.testing.assert_allclose(found["relative_step"][:, 1:], 1.0, rtol=1e-6)
    np.testing.assert_allclose(found["cosine_distance_to_previous"][:, 1:], 0.5, rtol=1e-6)
    away = found["relative_distance"].transpose("recurrence", "layer", "prompt").values
    np.testing.assert_allclose(away[6:12], away[:6], atol=1e-6)
    np.testing.assert_allclose(away[12:], away[:6], atol=1e-6)
    # The horizon is at a multiple of the period plus 2, so the states of that phase are on it, and the others are not.
    np.testing.assert_allclose(away[1::6], 0.0, atol=1e-6)
    np.testing.assert_allclose(away[4::6], 2.0, rtol=1e-6)


def test_a_flip_is_an_orbit_of_two() -> None:
    found = dataset_of(relaxation(-1.0), recurrences=8, horizon=9)
    away = found["distance_to_horizon"].values
    assert (away[:, 0::2] < 1e-12).all()
    assert (np.ptp(away[:, 1::2], axis=1) < 1e-12).all()
    assert (away[:, 1::2] > 1).all()
    step, drift = found["horizon_relative_step"], found["horizon_drift"]
    np.testing.assert_allclose(step.sel(horizon="second"), drift, rtol=1e-9)  # 9 steps further is one step further


def diverging(rate: float = 100.0) -> NativeSubject:
    """Coordinate 0 grows by `rate` in each recurrence, the others relax to e.

    Tokens below 10 have a zero there, and so stay finite.
    """
    rates = torch.full((16,), 0.5)
    rates[0] = rate
    model = linear_loop(torch.diag(rates), torch.eye(16) / 2, dtype=torch.float32, state_init="embeddings")
    with torch.no_grad():
        model.model.embedding.weight[:, 0] = (torch.arange(48) >= 10).float()
    return model


@pytest.mark.parametrize("method", ["keep", "second-pass"])
@pytest.mark.parametrize(("recurrences", "horizon"), [(24, 12), (6, 30)])
def test_a_model_that_diverges_is_a_result_and_touches_no_other_prompt(
    recurrences: int, horizon: int, method: Any
) -> None:
    prompts = [[10, 11, 12], [1, 2], [3, 30]]
    options: dict[str, Any] = {"recurrences": recurrences, "horizon": horizon, "horizon_method": method}
    found = analyze(diverging(), prompts, **options, track=("0:0", "1:0")).dataset
    alone = analyze(diverging(), [[1, 2]], **options, track=("0:0",)).dataset
    # The norm is about 100^(t + 1). A prompt has diverged when the square of that overflows, beyond 3.4e38; its state,
    # whose norm is measured in float64, does so later.
    assert found["diverged_at"].values.tolist() == [10, -1, 10]
    for name in set(found.data_vars) - {"cycle_similarity"}:
        if "prompt" in found[name].dims:
            mine, theirs = found[name].isel(prompt=1), alone[name].isel(prompt=0)
            mine = mine.isel(token=slice(2)) if "token" in mine.dims else mine
            np.testing.assert_allclose(mine.values, theirs.values, rtol=1e-5, atol=1e-5, err_msg=name)
    norm = found["residual_norm"].isel(prompt=0).values
    np.testing.assert_allclose(norm[:, 2:6] / norm[:, 1:5], 100.0, rtol=0.02)
    assert not np.isfinite(norm[:, 19:]).any()
    if recurrences > 20:
        assert np.isnan(found["trajectory"].sel(tracked=0)).all()
    assert np.isfinite(found["trajectory"].sel(tracked=1)).all()
    # What is far away stays so: no distance to a horizon that does not exist looks like an arrival.
    if horizon > 10:
        assert not (found["relative_distance"].isel(prompt=0).values[:, :6] < 0.99).any()


def test_auto_takes_float64_for_a_small_model_on_a_cpu_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []

    class Notes(SilentProgress):
        def note(self, message: str) -> None:
            notes.append(message)

    settings = AnalyzeSettings(recurrences=2, horizon=2, dtype="auto", device="cpu", skip=parts_except())
    study = analyze("demo:injected", [[1, 2]], settings=settings, progress=Notes())
    assert study.manifest["settings"]["dtype"] == "float64"
    assert study.dataset["token_relative_step"].dtype == np.float64
    assert "demo:injected runs in float64 (--dtype auto)." in notes
    monkeypatch.setattr(loading, "_AUTO_FLOAT64", 1000)
    assert loading.load("demo:injected", dtype="auto", device="cpu").info.dtype == "float32"
    assert analyze(subject(), [[1, 2]], settings=settings).manifest["settings"]["dtype"] == "float32"


def test_weights_that_break_the_first_pass_are_the_models_fault_and_named() -> None:
    with pytest.raises(NonFiniteError, match=r"recurrent\.0@1 of prompt 0"):
        analyze(relaxation(1e38, dtype=torch.float32, state_std=10.0), [[1, 2], [3]], batch_size=1)


# Rounding


def plateau(model: NativeSubject) -> tuple[float, float]:
    """Relative step at the second horizon, where a contraction only rounds, and the estimated floor: means."""
    found = dataset_of(
        model,
        recurrences=4,
        horizon=64,
        skip=("readout", "trajectories", "behaviour", "stability"),
        track=(),
        components=3,
    )
    return float(found["horizon_relative_step"].sel(horizon="second").mean()), float(found["noise_floor"].mean())


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(torch.float32, 1e-8, 1e-6), (torch.bfloat16, 1e-3, 2e-2), (torch.float16, 1e-4, 2e-3), (torch.float64, 0, 1e-14)],
    ids=str,
)
def test_the_noise_floor_is_where_a_contraction_settles(dtype: torch.dtype, low: float, high: float) -> None:
    settled, floor = plateau(subject(architecture(norm_placement="pre", recurrent=2), std=0.05, dtype=dtype))
    assert low <= floor <= high
    assert settled <= 10 * floor
    # A state that no longer changes at all is as settled as can be.
    assert settled == 0 or settled >= floor / 10


def test_the_noise_floor_is_the_rounding_of_one_recurrence() -> None:
    # Without prelude and rotation, the float64 model reads exactly what the float32 one reads.
    shape = architecture(prelude=0, rotary="none")
    coarse, fine = subject(shape), subject(shape, dtype=torch.float64)
    found = analyze(coarse, PROMPTS[:1], recurrences=2, horizon=6, track=()).dataset["noise_floor"]
    state = capture(coarse, PROMPTS[0], recurrences=12).loop_state(12)
    fine.model.load_state_dict({name: value.double() for name, value in coarse.model.state_dict().items()})
    rough = capture(coarse, PROMPTS[0], recurrences=1, initial_state=state)
    exact = capture(fine, PROMPTS[0], recurrences=1, initial_state=state.double())
    for layer in range(2):
        one, other = (trace.residual("recurrent", layer, 1)[0].double().numpy() for trace in (rough, exact))
        relative = np.linalg.norm(one - other, axis=-1) / np.linalg.norm(other, axis=-1)
        wanted = math.sqrt(2 * (relative**2).mean())
        assert found.values[layer, 0] == pytest.approx(wanted, rel=1e-3)


# What it is given


def test_settings_and_changes_are_the_same_thing() -> None:
    model = subject()
    one = analyze(model, PROMPTS, settings=SETTINGS)
    other = analyze(
        model,
        PROMPTS,
        settings=AnalyzeSettings(),
        **{name: getattr(SETTINGS, name) for name in ("recurrences", "horizon", "cycle_recurrences", "batch_size")},
        track=SETTINGS.track,
        map_prompts=SETTINGS.map_prompts,
        components=4,
        seed=3,
        skip=SETTINGS.skip,
    )
    xarray.testing.assert_identical(one.dataset, other.dataset)
    assert one.manifest["identity"] == other.manifest["identity"]


def test_a_limit_counts_for_lists_of_token_ids_too() -> None:
    study = analyze(subject(), PROMPTS, recurrences=2, horizon=2, limit=2)
    assert [entry["token_ids"] for entry in study.tokens] == [tuple(prompt) for prompt in PROMPTS[:2]]
    drawn = analyze(subject(FEED_FORWARD), PROMPTS, limit=2, sample_seed=1)
    again = analyze(subject(FEED_FORWARD), PROMPTS, limit=2, sample_seed=1)
    assert [entry["id"] for entry in drawn.tokens] == [entry["id"] for entry in again.tokens]
    assert len(drawn.tokens) == 2


@pytest.mark.parametrize(
    ("prompts", "changes", "error", "message"),
    [
        (None, {}, PromptError, "neither was given"),
        ([], {}, PromptError, "list of prompts is empty"),
        ([[]], {}, PromptError, "Prompt 0 is empty"),
        ([[1, 48]], {}, PromptError, "token id 48.*48 tokens"),
        ([[1], "a text"], {}, PromptError, "Prompt 1 is not a list"),
        ([[True]], {}, PromptError, "Prompt 0 is not a list"),
        ([[1]], {"system_prompt": Path("system.txt")}, PromptError, "system_prompt means nothing"),
        (["a text"], {}, PromptError, "no tokenizer"),
        ([[1]], {"track": ("1:0",)}, ConfigError, "prompts are counted from 0, and the last one is 0"),
        ([[1]], {"track": ("0:1",)}, ConfigError, "prompt 0 has 1 token, counted from 0"),
        ([[1]], {"readout": (65,)}, ConfigError, "asks for 65"),
        ([[1]], {"recurrences": 0}, ConfigError, "--recurrences must be at least 1"),
        ([[1]], {"readout": (0,)}, ConfigError, "--readout"),
        ([[1]], {"track": ("first",)}, ConfigError, "PROMPT:TOKEN"),
        ([[1]], {"skip": "heads"}, ConfigError, "--skip takes several values"),
        ([[1]], {"out": 5}, ConfigError, "out takes a path, got 5"),
        (5, {}, ConfigError, "prompts takes .*, got 5"),
        ([1.5], {}, PromptError, "Prompt 0 is not a list"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(
    prompts: Any, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        analyze(subject(INJECTED), prompts, **changes)
