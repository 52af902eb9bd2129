"""Local stability in a study: the same numbers as the functions give, for every way in which a study is made."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import xarray
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loopscope import AnalyzeSettings, Study, analyze
from loopscope.analysis.job import SilentProgress
from loopscope.answers.answer import Criterion
from loopscope.answers.stability import stability_answer
from loopscope.dynamics.eigenvalues.of_model import leading_eigenvalues
from loopscope.dynamics.eigenvalues.result import EigenvalueSettings
from loopscope.dynamics.observed_rate import RateReason, observed_rate
from loopscope.dynamics.prediction import (
    PREDICTED_KINDS,
    PredictedKind,
    best_damping,
    damping_needed,
    spectral_radius,
    stability_margin,
)
from loopscope.dynamics.verdicts import KINDS
from loopscope.dynamics.verdicts import Kind as Verdict
from loopscope.measures.base import RunEnd
from loopscope.measures.stability import (
    EIGENVALUE_NAMES,
    KEPT_PAIRS,
    NORMALITY_NAMES,
    RATE_NAMES,
    RATE_REASONS,
    TokenStability,
    kept_pairs,
)
from loopscope.models.hooks.wrap import hook
from loopscope.models.native.subject import NativeSubject
from loopscope.models.subject import Batch
from loopscope.models.trace import capture
from loopscope.study import view_study
from measuring import batch_info
from small_models import (
    ADDED,
    FEED_FORWARD,
    INJECTED,
    PROMPTS,
    RESIDUAL_NORM,
    hooked_native,
    linear_loop,
    relaxation,
    subject,
)

SETTINGS = AnalyzeSettings(
    recurrences=6, horizon=16, batch_size=3, track=(), skip=("heads", "maps", "readout", "behaviour")
)


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


def study_of(model: Any, prompts: list[list[int]] = PROMPTS, **changes: Any) -> Study:
    return analyze(model, prompts, settings=SETTINGS, **changes)


def tokens_of(data: xarray.Dataset) -> np.ndarray:
    """(prompt, token), False beyond a prompt's end."""
    found: np.ndarray = (data["token_count"] > data["token"]).transpose("prompt", "token").values
    return found


@pytest.mark.parametrize("shape", [INJECTED, RESIDUAL_NORM, ADDED])
def test_a_study_holds_what_the_function_finds(shape: Any) -> None:
    model = subject(shape, std=0.1, dtype=torch.float64)
    data = study_of(model).dataset
    for prompt, tokens in enumerate(PROMPTS):
        found = leading_eigenvalues(model, [tokens], recurrences=32)
        wanted = found.predict()
        here = data.isel(prompt=prompt, token=slice(len(tokens)))
        values = (here["eigenvalue_real"] + 1j * here["eigenvalue_imag"]).transpose("token", "pair").values
        np.testing.assert_allclose(spectral_radius(values), found.radius[0], rtol=1e-8)
        np.testing.assert_allclose(here["predicted_rate"], wanted.rate[0], rtol=1e-8)
        for name in NORMALITY_NAMES:
            np.testing.assert_allclose(here[name], getattr(found, name)[0], rtol=1e-6, err_msg=name)
        # Where the search ends depends on rounding; that it ends near a fixed point does not.
        np.testing.assert_allclose(here["point_step"], found.relative_step[0], atol=1e-6)
        np.testing.assert_allclose(here["stability_margin"].values[0], stability_margin(values)[0], atol=1e-8)
        needed = np.where(wanted.kind == PredictedKind.FAR, np.nan, damping_needed(found.eigenvalues))
        np.testing.assert_allclose(here["damping_needed"].values[0], needed[0, 0], rtol=1e-6)


def test_padding_has_nothing_and_tokens_have_all() -> None:
    data = study_of(subject(std=0.1)).dataset
    token = tokens_of(data)
    for name in ("predicted_rate", "predicted_rate_error", "point_step", "stability_margin", "transient_growth"):
        assert (data[name].notnull().values == token).all(), name
    for name in ("predicted_kind", "observed_rate_reason"):
        assert ((data[name].values >= 0) == token).all(), name


def test_blocks_of_tokens_give_the_numbers_of_all_at_once() -> None:
    model, batch = subject(std=0.1, dtype=torch.float64), Batch.of(PROMPTS)

    def found(block_bytes: int) -> xarray.Dataset:
        settings = EigenvalueSettings(recurrences=32, products=10, block_bytes=block_bytes)
        info = batch_info(model, batch, recurrences=32, horizon=16)
        info.plan = dataclasses.replace(info.plan, eigenvalues=settings)
        stability = TokenStability(info)
        run = model.start(batch, recurrences=32)
        stability.start(run.state)
        for _ in range(32):
            run.advance([stability])
        stability.ended(RunEnd(run, lambda: None, lambda recurrences, state: run.decode()))
        return stability.result()

    whole, parts = found(2**30), found(1)
    xarray.testing.assert_allclose(whole["predicted_rate"], parts["predicted_rate"], rtol=1e-8)
    xarray.testing.assert_allclose(whole["damping_needed"], parts["damping_needed"], rtol=1e-8)
    assert set(whole) == {*EIGENVALUE_NAMES, *RATE_NAMES}


@given(st.lists(st.complex_numbers(max_magnitude=3, allow_nan=False, allow_infinity=False), min_size=40, max_size=40))
def test_what_is_kept_answers_for_every_damping(eigenvalues: list[complex]) -> None:
    whole = np.array(eigenvalues)[None, None]
    order = np.argsort(-np.abs(whole), axis=-1, kind="stable")
    whole = np.take_along_axis(whole, order, -1)
    kept = np.take_along_axis(whole, kept_pairs(whole), -1)
    assert kept.shape[-1] == KEPT_PAIRS
    assert (np.diff(np.abs(kept)) <= 0).all()
    assert spectral_radius(kept) == spectral_radius(whole)
    np.testing.assert_allclose(best_damping(kept)[1], best_damping(whole)[1], atol=2e-3)


def test_the_rates_of_a_loop_that_is_known() -> None:
    data = study_of(relaxation(0.7)).dataset
    token = tokens_of(data)
    for name in ("predicted_rate", "observed_rate"):
        np.testing.assert_allclose(data[name].values[token], 0.7, rtol=1e-6)
    np.testing.assert_allclose(data["stability_margin"].values[token], 0.3, rtol=1e-6)
    assert (data["predicted_kind"].values[token] == PREDICTED_KINDS.index(PredictedKind.FIXED_POINT)).all()
    assert (data["observed_rate_reason"].values[token] == RATE_REASONS.index(RateReason.FITTED)).all()


def test_the_observed_rate_is_that_of_the_loop_states() -> None:
    model = subject(std=0.1, dtype=torch.float64)
    trace = capture(model, [PROMPTS[0]], recurrences=32, attention=False)
    states = torch.cat([trace.initial_state[None], torch.stack([trace.loop_state(t) for t in range(1, 33)])])[
        :, 0
    ].numpy()
    steps = np.linalg.norm(np.diff(states, axis=0), axis=-1).T
    wanted = observed_rate(steps, sizes=np.linalg.norm(states[1:], axis=-1).T, dtype="float64")
    np.testing.assert_allclose(study_of(model).dataset["observed_rate"].values[0], wanted.rate, rtol=1e-6)


def rotation(period: float, modulus: float = 1.0) -> tuple[Tensor, Tensor]:
    """`s -> A s + (1 - A) e` with A a turn of every pair of entries: around e, the fixed point."""
    angle = 2 * math.pi / period
    turn = modulus * torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = torch.block_diag(*[turn] * 8)
    return matrix, torch.eye(16) - matrix


@pytest.mark.parametrize("period", [5.0, 7.3])
def test_an_orbit_is_predicted_found_and_damped_away(period: float) -> None:
    model = linear_loop(*rotation(period))
    judged: dict[str, Any] = {"horizon": 64, "skip": (), "judged_layers": "last"}
    data = study_of(model, **judged).dataset
    token = tokens_of(data)
    assert (data["predicted_kind"].values[token] == PREDICTED_KINDS.index(PredictedKind.ORBIT)).all()
    np.testing.assert_allclose(data["predicted_period"].values[token], period, rtol=1e-6)
    assert (data["verdict"].values[-1][token] == KINDS.index(Verdict.ORBIT)).all()
    np.testing.assert_allclose(data["verdict_period"].values[-1][token], period, rtol=1e-3)
    values = (data["eigenvalue_real"] + 1j * data["eigenvalue_imag"]).transpose("prompt", "token", "pair").values
    eta = float(damping_needed(values[token].ravel(), radius=0.95))
    damped = study_of(model, intervene=(f"damp={eta}",), **judged).dataset
    np.testing.assert_allclose(damped["predicted_rate"].values[token], 0.95, rtol=1e-6)
    settled = [KINDS.index(Verdict.FIXED_POINT), KINDS.index(Verdict.AT_FLOOR)]
    assert np.isin(damped["verdict"].values[-1][token], settled).all()


def test_of_a_half_precision_model_the_eigenvalues_are_those_of_its_weights() -> None:
    half = subject(std=0.1, dtype=torch.bfloat16)
    data = study_of(half).dataset
    weights = NativeSubject(half.model.float(), name="its weights")
    wanted = study_of(weights).dataset
    token = tokens_of(data)
    # The point is where the rounded run stands, a thousandth away.
    np.testing.assert_allclose(data["predicted_rate"].values[token], wanted["predicted_rate"].values[token], rtol=0.02)


def test_a_prompt_that_overflows_has_no_eigenvalues() -> None:
    model = linear_loop(1e3 * torch.eye(16), torch.eye(16), dtype=torch.float32)
    data = study_of(model).dataset
    assert data["predicted_rate"].isnull().all()
    token = tokens_of(data)
    assert (data["predicted_kind"].values[token] == PREDICTED_KINDS.index(PredictedKind.UNRESOLVED)).all()
    assert (data["observed_rate_reason"].values[token] == RATE_REASONS.index(RateReason.NOT_FINITE)).all()


def test_a_hooked_model_has_eigenvalues_on_request() -> None:
    native, hooked = hooked_native(INJECTED, std=0.1, dtype=torch.float64)
    notes = Notes()
    plain = study_of(hooked, progress=notes).dataset
    assert not set(EIGENVALUE_NAMES) & set(plain)
    assert set(RATE_NAMES) <= set(plain)
    assert any("--hooked-eigenvalues" in note for note in notes.said)
    asked, wanted = (study_of(each, PROMPTS[:3], hooked_eigenvalues=True).dataset for each in (hooked, native))
    np.testing.assert_allclose(asked["predicted_rate"], wanted["predicted_rate"], rtol=1e-3)


def test_of_a_hooked_state_that_overflows_nothing_is_said() -> None:
    class Growing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(48, 16), torch.nn.Linear(16, 48)
            layers = [torch.nn.Linear(16, 16, bias=False) for _ in range(2)]
            for layer in layers:
                torch.nn.init.orthogonal_(layer.weight, gain=4.0)
            self.layers = torch.nn.ModuleList(layers)

        def forward(self, ids: Tensor, recurrences: int = 4) -> Tensor:
            state = self.embedding(ids)
            for _ in range(recurrences):
                for layer in self.layers:
                    state = layer(state)
            found: Tensor = self.head(state)
            return found

    hooked = hook(Growing().eval(), recurrent="layers", set_recurrences=lambda _, count: {"recurrences": count})
    data = study_of(hooked, hooked_eigenvalues=True).dataset
    token = tokens_of(data)
    assert np.isnan(data["eigenvalue_real"].values).all()
    assert set(data["predicted_kind"].values[token]) == {PREDICTED_KINDS.index(PredictedKind.UNRESOLVED)}


def test_where_a_token_is_replaced_there_are_no_eigenvalues() -> None:
    notes = Notes()
    model = subject(std=0.1)
    found = study_of(model, recurrences=40, intervene=("token:0@33=zeros",), progress=notes).dataset
    assert "predicted_rate" not in found
    assert any("token:0@33=zeros" in note for note in notes.said)


def test_interventions_act_on_the_eigenvalues() -> None:
    model = subject(std=0.04, dtype=torch.float64)  # with or without damping it settles, at the same point
    plain, damped = (study_of(model, intervene=each).dataset for each in ((), ("damp=0.5",)))
    frozen = study_of(model, intervene=("inject@4=frozen",)).dataset
    token = tokens_of(plain)
    values = (plain["eigenvalue_real"] + 1j * plain["eigenvalue_imag"]).transpose("prompt", "token", "pair").values
    np.testing.assert_allclose(
        damped["predicted_rate"].values[:, 0], np.abs(0.5 + 0.5 * values[:, 0]).max(-1), rtol=1e-5
    )
    # With its input frozen a recurrence no longer looks at the state.
    np.testing.assert_allclose(frozen["predicted_rate"].values[token], 0, atol=1e-12)


def test_a_feed_forward_model_has_no_recurrence_to_take_eigenvalues_of() -> None:
    assert not {*EIGENVALUE_NAMES, *RATE_NAMES} & set(study_of(subject(FEED_FORWARD)).dataset)


def test_a_study_of_the_last_tokens_predicts_nothing_and_says_why() -> None:
    study = study_of(subject(std=0.1), eigenvalue_every=0)
    data, last = study.dataset, study.dataset["token_count"].values - 1
    np.testing.assert_array_equal(data["eigenvalue_products"].notnull().sum("token"), 1)
    assert data["eigenvalue_products"].values[np.arange(len(last)), last].tolist() == [16] * len(last)
    assert data["predicted_rate"].isnull().values[tokens_of(data) & (data["token"].values > 0)].all()
    assert (data["predicted_kind"].values >= 0).sum() == len(last)
    answer = stability_answer(view_study(study), Criterion())
    assert answer.verdict == "cannot tell"
    assert "(--eigenvalue-every)" in answer.sentence
    assert study.manifest["stability"]["eigenvalues"]["every"] == 0
    assert study.manifest["stability"]["eigenvalues"]["tolerance"] == 1e-3


def test_the_manifest_says_how_it_was_done() -> None:
    study = study_of(subject(std=0.1), eigenvalue_products=12)
    record = study.manifest["stability"]
    assert record["eigenvalues"]["products"] == 12
    assert record["eigenvalues"]["recurrences"] == 32
    assert record["criterion"]["horizon"] == 16
    assert record["kinds"] == [str(kind) for kind in PREDICTED_KINDS]
    assert study.dataset.sizes["pair"] == 12
