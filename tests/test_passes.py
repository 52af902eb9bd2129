"""How the forward passes of an analysis are arranged never shows in its numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import xarray
from hypothesis import given, settings
from hypothesis import strategies as st

from loopscope import AnalyzeSettings, analyze
from loopscope._util.estimate import Phase
from loopscope.analysis.memory import kept_bytes
from loopscope.analysis.passes import steps_of
from loopscope.analysis.settings import HorizonMethod, Part, without_left_out
from loopscope.dynamics.eigenvalues.leading import SEARCH_STEPS
from loopscope.dynamics.verdicts import VERDICT_NUMBERS
from loopscope.measures.base import Plan
from loopscope.measures.cache import SharedCache
from loopscope.measures.heads import CHANGE_NAMES, HEAD_NAMES
from loopscope.measures.layer_readout import LayerReadout
from loopscope.measures.readout import EXIT_READOUTS, TOKEN_READOUTS
from loopscope.measures.registry import DECLARED
from loopscope.measures.stability import EIGENVALUE_NAMES, RATE_NAMES
from loopscope.measures.support import AttentionSupport
from loopscope.measures.twin import Twin
from loopscope.models.architecture import Architecture
from loopscope.models.native.subject import NativeSubject
from loopscope.models.subject import Batch
from small_models import ADDED, ARCHITECTURES, FEED_FORWARD, INJECTED, LOOP_NORM, PROMPTS, RESIDUAL_NORM, subject

SETTINGS = AnalyzeSettings(
    recurrences=6,
    horizon=4,
    cycle_recurrences=3,
    batch_size=3,
    track=("0:-1", "3:0"),
    components=2,
    eigenvalue_products=6,
    eigenvalue_search=8,
    support_every=8,
)
SETTLES = subject(std=0.02)
"""It is at rest after 56 recurrences."""
LOOPED = {name: each for name, each in ARCHITECTURES.items() if each.is_looped}


class Counting:
    """A progress that counts."""

    def __init__(self) -> None:
        self.expected, self.steps = Counter[str](), Counter[str]()
        self.done = -1

    def start(self, phases: Sequence[Phase]) -> None:
        self.expected = Counter({phase.name: phase.steps for phase in phases})
        self.done = sum(phase.done for phase in phases)

    def step(self, phase: str, count: int = 1) -> None:
        self.steps[phase] += count

    def first_batch(self, memory: int | None) -> None: ...

    def note(self, message: str) -> None: ...


def dataset_of(model: NativeSubject, prompts: list[list[int]] = PROMPTS, **changes: Any) -> xarray.Dataset:
    asked = AnalyzeSettings(**without_left_out({**vars(SETTINGS), **changes}))
    return analyze(model, prompts, settings=asked).dataset


def steady(data: xarray.Dataset) -> xarray.Dataset:
    """Without the eigenvalues inside the spectrum and the place where a search for a fixed point ends, which rounding
    moves further than other numbers, and the twin, which shows what rounding does. What follows from them is left."""
    return data.drop_vars([name for name in data if str(name).startswith(("eigenvalue_", "point_step", "twin_"))])


HORIZONS = [(INJECTED, count) for count in (3, 4, 8, 11)] + [(shape, 6) for shape in LOOPED.values()]


@pytest.mark.parametrize(("shape", "recurrences"), HORIZONS)
def test_kept_states_and_a_second_pass_give_the_same_numbers(shape: Architecture, recurrences: int) -> None:
    model = subject(shape)
    one, other = (
        dataset_of(model, recurrences=recurrences, horizon_method=method) for method in ("keep", "second-pass")
    )
    xarray.testing.assert_identical(one, other)


def test_two_runs_are_equal_bit_for_bit() -> None:
    xarray.testing.assert_identical(dataset_of(subject()), dataset_of(subject()))


def test_another_seed_is_another_initial_state() -> None:
    model = subject()
    assert (dataset_of(model)["residual_norm"] != dataset_of(model, seed=1)["residual_norm"]).all()


@pytest.mark.parametrize("shape", [INJECTED, RESIDUAL_NORM, LOOP_NORM, ADDED, FEED_FORWARD], ids=ARCHITECTURES)
def test_the_batch_size_changes_numbers_by_rounding_only(shape: Architecture) -> None:
    model = subject(shape, dtype=torch.float64, std=0.1)
    one_by_one = dataset_of(model, batch_size=1)
    xarray.testing.assert_allclose(steady(dataset_of(model, batch_size=4)), steady(one_by_one), rtol=1e-6, atol=1e-10)


@pytest.fixture(scope="module")
def in_order() -> xarray.Dataset:
    return dataset_of(subject(dtype=torch.float64, std=0.1), track=(), map_prompts=())


@settings(max_examples=5)
@given(order=st.permutations(range(len(PROMPTS))))
def test_the_order_of_prompts_changes_their_place_only(in_order: xarray.Dataset, order: list[int]) -> None:
    model = subject(dtype=torch.float64, std=0.1)
    found = dataset_of(model, [PROMPTS[prompt] for prompt in order], track=(), map_prompts=())
    wanted = in_order.isel(prompt=order).assign_coords(prompt=found["prompt"])
    xarray.testing.assert_allclose(steady(found), steady(wanted), rtol=1e-6, atol=1e-10)


def test_a_prompts_numbers_do_not_depend_on_the_others() -> None:
    model = subject(ADDED, dtype=torch.float64, std=0.1)  # its second initial state is as large as the first one
    alone = dataset_of(model, PROMPTS[1:2], track=(), map_prompts=())
    among = dataset_of(model, track=(), map_prompts=()).isel(prompt=[1], token=slice(len(PROMPTS[1])))
    among = among.assign_coords(prompt=[0])
    means = ["cycle_similarity", "attention_cycle_distance", "visit_cka"]
    xarray.testing.assert_allclose(
        steady(among.drop_vars(means)), steady(alone.drop_vars(means)), rtol=1e-6, atol=1e-10
    )


def test_padding_is_nan_token_by_token_and_nowhere_else() -> None:
    found = dataset_of(subject())["token_residual_norm"]
    lengths = xarray.DataArray([len(prompt) for prompt in PROMPTS], dims="prompt")
    assert (found.isnull() == (found["token"] >= lengths)).all()


PARTS: Mapping[Part, set[str]] = {
    "path-independence": {"path_distance", "path_cosine_distance", "start_distance"},
    "cycle-similarity": {"cycle_similarity", "attention_cycle_distance"},
    "trajectories": {"trajectory", "trajectory_variance"},
    "readout": {"loss", *TOKEN_READOUTS, *EXIT_READOUTS, *LayerReadout.variables},
    "noise-floor": {"noise_floor"},
    "twin": set(Twin.variables),
    "maps": {"attention_map"},
    "heads": {
        *(*HEAD_NAMES, *CHANGE_NAMES, *AttentionSupport.variables, *SharedCache.variables),
        *("head_stable_from", "token_attention_change", "attention_cycle_distance"),
    },
    "support": {*AttentionSupport.variables, *SharedCache.variables, "visit_cka"},
    "stages": {name for kind in DECLARED if kind.part == "stages" for name in kind.variables},
    "behaviour": {
        "verdict",
        "verdict_cosine",
        "verdict_changes",
        "verdict_doubt",
        *(f"verdict_{name}" for name in VERDICT_NUMBERS),
        "displacement",
        "tail_path",
        "mover",
        "mover_path",
        "displacement_sensitivity",
        "cosine_sensitivity",
    },
    "stability": {*EIGENVALUE_NAMES, *RATE_NAMES},
    "neurons": {
        f"{prefix}{name}"
        for prefix in ("", "folded_")
        for name in ("prediction_neurons", "suppression_neurons", "neuron_kurtosis", "neuron_skew")
    },
}


@pytest.fixture(scope="module")
def whole() -> xarray.Dataset:
    return dataset_of(subject())


@pytest.mark.parametrize("part", get_args(Part))
@pytest.mark.parametrize("method", ["keep", "second-pass"])
def test_a_part_that_is_skipped_is_missing_and_the_others_are_the_same(
    whole: xarray.Dataset, part: Part, method: HorizonMethod
) -> None:
    without = dataset_of(subject(), horizon_method=method, skip=(part,))
    xarray.testing.assert_identical(without, whole[[name for name in whole if name not in PARTS[part]]])


def test_all_parts_can_be_skipped() -> None:
    found = dataset_of(subject(), skip=get_args(Part))
    assert not set(found.data_vars) & set().union(*PARTS.values())
    assert "relative_distance" in found
    assert set(dataset_of(subject(FEED_FORWARD), skip=get_args(Part)).data_vars) == {"token_count", "diverged_at"}


@pytest.mark.parametrize("method", ["keep", "second-pass"])
@pytest.mark.parametrize(
    ("model", "recurrences", "changes"),
    [
        (subject(), 3, {}),
        (subject(), 11, {}),
        (subject(), 11, {"skip": ("path-independence",)}),
        (subject(LOOP_NORM), 3, {}),
        (subject(FEED_FORWARD), 3, {}),
        (SETTLES, 3, {"stop_at_rest": 16, "horizon": 32}),
        (SETTLES, 70, {"stop_at_rest": 16, "horizon": 32}),
    ],
)
def test_every_step_that_is_announced_is_counted(
    method: HorizonMethod, model: NativeSubject, recurrences: int, changes: dict[str, Any]
) -> None:
    progress = Counting()
    changes = {"recurrences": recurrences, "horizon_method": method, **changes}
    analyze(model, PROMPTS, settings=SETTINGS, progress=progress, **changes)
    assert progress.done == 0
    assert progress.steps == progress.expected


def plan(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "recurrences": 10,
        "horizon": 4,
        "seed": 0,
        "cycle_recurrences": 2,
        "tracked": (),
        "other_starts": 1,
        "components": 1,
        "readout": (),
        "answers": (),
        "exits": 0,
        "head_stable": 0.01,
        "support_every": 0,
        "judged_layers": (),
        "eigenvalues": None,
        "skip": frozenset(),
        "maps": None,
    }
    return Plan(**(fields | changes))


def test_a_second_pass_costs_the_recurrences_to_the_second_horizon() -> None:
    batch = Batch.of(PROMPTS)
    assert steps_of(subject(), batch, plan(), keep=True) == {"passes": 10 + 10 + 4}
    assert steps_of(subject(), batch, plan(), keep=False) == {"passes": 10 + 10 + 8 + 4}
    alone = plan(horizon=20, skip=frozenset({"path-independence", "twin"}))
    assert steps_of(subject(), batch, alone, keep=True) == {"passes": 40}
    assert steps_of(subject(LOOP_NORM), batch, plan(), keep=True) == {"passes": 10 + 4}
    assert steps_of(subject(FEED_FORWARD), batch, plan(), keep=True) == {"passes": 1}


def test_states_are_kept_while_they_fit() -> None:
    batch = Batch.of(PROMPTS)
    states = 5 * 8 * 16  # prompts, tokens with padding, width
    bare = plan(skip=frozenset({"heads"}))
    assert kept_bytes(subject(), batch, bare) == states * 4 * 2 * 10
    assert kept_bytes(subject(dtype=torch.bfloat16), batch, bare) == states * 2 * 2 * 10
    # The loop state is another state than the last layer's output there.
    assert kept_bytes(subject(LOOP_NORM), batch, bare) == states * 4 * 3 * 10
    # Queries, keys and values are as wide as the state.
    assert kept_bytes(subject(), batch, plan(skip=frozenset())) == states * 4 * 6 * 10
    assert kept_bytes(subject(), batch, plan(skip=frozenset(), support_every=8)) == states * 4 * 8 * 10


@pytest.mark.parametrize(("limit", "steps"), [(0, 6 + 8 + 6 + 4), (1, 8 + 6 + 4)])
def test_auto_runs_again_what_it_may_not_keep(tmp_path: Path, limit: int, steps: int) -> None:
    progress = Counting()
    changes: dict[str, Any] = {"keep_limit": limit, "track": ()}
    analyze(subject(), PROMPTS[:1], out=tmp_path / "study", settings=SETTINGS, progress=progress, **changes)
    assert progress.steps["passes"] == steps * len(PROMPTS[0])
    assert progress.steps["eigenvalues"] == (SEARCH_STEPS + SETTINGS.eigenvalue_products) * len(PROMPTS[0])


def test_half_precision_runs_and_is_measured_in_float32() -> None:
    found = dataset_of(subject(dtype=torch.bfloat16, std=0.1))
    wanted = dataset_of(subject(std=0.1))
    np.testing.assert_allclose(found["residual_norm"], wanted["residual_norm"], rtol=0.05)
    # Averages of float32 numbers: bfloat16 ones would have 8 bits.
    values = found["residual_norm"].values.ravel()
    assert (values != torch.from_numpy(values).bfloat16().double().numpy()).any()
