"""What interventions do to a run, against plain computation and against what is known of it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray

from loopscope import Study, analyze, capture
from loopscope.cli import main
from loopscope.errors import ConfigError, StudyError
from loopscope.models.architecture import Architecture
from loopscope.models.contract.check import check_subject
from loopscope.models.interventions.kinds import Damp, ScaleBranch
from loopscope.models.native.subject import NativeSubject
from loopscope.models.native.transformer import LoopedTransformer
from loopscope.models.subject import Batch
from loopscope.study import read_manifest, write_manifest
from random_model import random_model
from slow_interventions import Changes, run_changed
from small_models import (
    ADDED,
    FEED_FORWARD,
    GATED,
    INJECTED,
    LOOP_NORM,
    PROMPTS,
    RESIDUAL_NORM,
    checkpoint,
    linear_loop,
    relaxation,
    subject,
)

IDS, RECURRENCES = [3, 1, 4, 1, 5, 9], 4
SHORT: dict[str, Any] = {
    "recurrences": 5,
    "horizon": 4,
    "cycle_recurrences": 3,
    "batch_size": 3,
    "eigenvalue_products": 6,
    "eigenvalue_search": 30,
}


MOVES = ["token:1@3=token:4", "token:-2@3=token:1", "token:0@1=zeros"]


def moved(recurrence: int, state: np.ndarray) -> np.ndarray:
    """Tokens 1 and 4 exchanged before recurrence 3, and token 0 set to zero before recurrence 1."""
    if recurrence == 3:
        state[[1, 4]] = state[[4, 1]]
    if recurrence == 1:
        state[0] = 0
    return state


CHANGES: dict[str, tuple[list[str], Changes]] = {
    "one MLP": (["mlp:recurrent.1=0"], Changes({("mlp", "recurrent", 1, t): 0.0 for t in range(1, RECURRENCES + 1)})),
    "attention at some recurrences": (
        ["attention:recurrent.*@2-3=-0.5"],
        Changes({("attention", "recurrent", layer, t): -0.5 for layer in range(3) for t in (2, 3)}),
    ),
    "both branches late": (
        ["mlp:recurrent.0@3-=3", "attention:recurrent.0@4=0"],
        Changes({("mlp", "recurrent", 0, 3): 3, ("mlp", "recurrent", 0, 4): 3, ("attention", "recurrent", 0, 4): 0}),
    ),
    "outside the loop": (
        ["mlp:prelude.0=0.25", "attention:coda.0=2"],
        Changes({("mlp", "prelude", 0, 0): 0.25, ("attention", "coda", 0, 0): 2.0}),
    ),
    "frozen": (["inject@2=frozen"], Changes(freeze_at=2)),
    "damped": (["damp=0.3"], Changes(eta=0.3)),
    "tokens": (MOVES, Changes(replace=moved)),
    "all at once": (
        ["damp=0.6", "inject@3=frozen", "mlp:recurrent.0=0.5", *MOVES],
        Changes({("mlp", "recurrent", 0, t): 0.5 for t in range(1, RECURRENCES + 1)}, 0.6, 3, moved),
    ),
}
SHAPES: dict[str, dict[str, Any]] = {
    "pre": {"rotary": "none"},
    "residual": {"rotary": "none", "norm_placement": "residual", "loop_norm": "loop", "recurrent": 3},
    "branch in and out": {"rotary": "none", "norm_placement": "branch-in-out", "loop_norm": "recurrence"},
    "added": {"rotary": "none", "injection": "add", "state_init": "embeddings", "norm_placement": "branch-out"},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", CHANGES)
def test_states_are_those_of_the_plain_computation(shape: str, kind: str) -> None:
    texts, changes = CHANGES[kind]
    model = random_model(**SHAPES[shape]).requires_grad_(False)
    found = capture(model, IDS, recurrences=RECURRENCES, intervene=texts)
    weights = {name: parameter.double().numpy() for name, parameter in model.named_parameters()}
    wanted = run_changed(model.architecture, weights, IDS, RECURRENCES, found.initial_state[0].numpy(), changes)
    for (stage, layer, recurrence), states in wanted.residual.items():
        near(found.residual(stage, layer, recurrence), states)  # type: ignore[arg-type]
    for recurrence in range(RECURRENCES):
        near(found.injected(recurrence + 1), wanted.injected[recurrence])
        near(found.loop_state(recurrence + 1), wanted.loop_state[recurrence])
    near(found.logits, wanted.logits)
    assert np.abs(capture(model, IDS, recurrences=RECURRENCES).logits[0].numpy() - wanted.logits).max() > 1e-6


def near(found: torch.Tensor, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found[0].numpy(), wanted, rtol=1e-9, atol=1e-9)


def without(model: NativeSubject, *names: str) -> NativeSubject:
    """The same model with some of its matrices zero."""
    copy = LoopedTransformer(model.model.architecture)
    copy.load_state_dict(model.model.state_dict())
    with torch.no_grad():
        for name in names:
            copy.get_parameter(name).zero_()
    return NativeSubject(copy.eval().requires_grad_(False), name="small")


def assert_same_states(first: Any, second: Any) -> None:
    assert first.visits == second.visits
    for site in first.visits:
        assert torch.equal(first.residual(*site), second.residual(*site)), site
    assert torch.equal(first.logits, second.logits)


@pytest.mark.parametrize("shape", [INJECTED, RESIDUAL_NORM, LOOP_NORM, GATED, ADDED], ids=str)
def test_a_branch_without_effect_is_one_whose_last_matrix_is_zero(shape: Architecture) -> None:
    model = subject(shape)
    for branch, name in (("mlp", "mlp.down.weight"), ("attention", "attention.output.weight")):
        found = capture(model, PROMPTS, recurrences=4, intervene=[f"{branch}:recurrent.0=0"])
        assert_same_states(found, capture(without(model, f"recurrent.0.{name}"), PROMPTS, recurrences=4))


def test_a_feed_forward_models_layers_can_be_changed_too() -> None:
    model = subject(FEED_FORWARD)
    found = capture(model, PROMPTS, intervene=["mlp:prelude.0=0", "attention:coda.*=0"])
    bare = without(model, "prelude.0.mlp.down.weight", "coda.0.attention.output.weight")
    assert_same_states(found, capture(bare, PROMPTS))


@pytest.mark.parametrize("method", ["keep", "second-pass"])
def test_every_variable_of_a_study_is_that_of_the_changed_model(method: Any) -> None:
    """Horizon, heads, stages, path independence, readout and noise floor included."""
    model = subject()
    # Neurons are read from the weights, which an intervention leaves alone.
    options: dict[str, Any] = {**SHORT, "skip": ("neurons",)}
    texts = ["mlp:recurrent.1=0", "mlp:coda.0=0"]
    found = analyze(model, PROMPTS, intervene=texts, horizon_method=method, **options)
    wanted = analyze(without(model, "recurrent.1.mlp.down.weight", "coda.0.mlp.down.weight"), PROMPTS, **options)
    xarray.testing.assert_identical(found.dataset, wanted.dataset)
    assert "noise_floor" in found.dataset
    assert found.manifest["settings"]["intervene"] == texts
    assert "intervene" in found.manifest["identity"]["settings"]


@pytest.mark.parametrize("texts", [["damp=1"], ["mlp:recurrent.*=1", "attention:prelude.0=1"], ["start=scale:1"]])
@pytest.mark.parametrize("shape", [INJECTED, RESIDUAL_NORM, ADDED], ids=["linear", "residual norm", "add"])
def test_a_change_by_nothing_changes_no_bit(shape: Architecture, texts: list[str]) -> None:
    model = subject(shape)
    assert_same_states(capture(model, PROMPTS, recurrences=4, intervene=texts), capture(model, PROMPTS, recurrences=4))


@pytest.mark.parametrize(("rate", "eta"), [(0.5, 0.5), (-1.0, 0.25), (-0.875, 0.9), (0.75, 1.0)])
def test_damping_moves_an_eigenvalue(rate: float, eta: float) -> None:
    """lambda becomes 1 - eta + eta lambda; an orbit of period two (-1) becomes a fixed point."""
    trace = capture(relaxation(rate), IDS, recurrences=8, intervene=[Damp(eta)])
    point = trace.injected(1) - rate * trace.initial_state  # (1 - rate) e
    away = [(trace.loop_state(t) * (1 - rate) - point) for t in range(1, 9)]
    moves = 1 - eta + eta * rate
    for before, after in pairwise(away):
        torch.testing.assert_close(after, moves * before, rtol=1e-9, atol=1e-11)


def test_damping_turns_a_rotation_into_a_fixed_point_in_a_study() -> None:
    turn = torch.eye(16).roll(8, 0)
    turn[:8] *= -1  # eigenvalues i and -i: every state comes back after four recurrences
    model = linear_loop(turn, torch.eye(16))
    orbit = analyze(model, [IDS], **SHORT).dataset
    damped = analyze(model, [IDS], intervene=["damp=0.5"], **SHORT).dataset
    steps = damped["successive_difference"].values[:, 1:]
    # The loop state moves by eta of what the undamped layer would; both shrink by |1 - eta + eta i|.
    np.testing.assert_allclose(steps[:, 1:] / steps[:, :-1], np.sqrt(0.5), rtol=1e-6)
    undamped = orbit["successive_difference"].values[:, 1:]
    np.testing.assert_allclose(undamped[:, 1:] / undamped[:, :-1], 1.0, rtol=1e-6)
    assert not np.allclose(damped["token_residual_norm"][0], damped["token_residual_norm"][1])  # two sites


def test_a_frozen_input_repeats_the_recurrence() -> None:
    trace = capture(subject(), PROMPTS, recurrences=5, intervene=["inject@3=frozen"])
    free = capture(subject(), PROMPTS, recurrences=5)
    assert torch.equal(trace.loop_state(3), free.loop_state(3))
    for later in (4, 5):
        assert torch.equal(trace.injected(later), trace.injected(3))
        assert torch.equal(trace.loop_state(later), trace.loop_state(3))
        assert not torch.equal(free.loop_state(later), free.loop_state(3))


@pytest.mark.parametrize(
    ("texts", "state"),
    [
        (["start=zeros"], lambda own, encoded: torch.zeros_like(own)),
        (["start=prelude"], lambda own, encoded: encoded),
        (["start=scale:0.5"], lambda own, encoded: own * 0.5),
    ],
)
def test_another_start_is_a_run_from_that_state(texts: list[str], state: Any) -> None:
    model = subject()
    free = capture(model, IDS, recurrences=3)
    given = state(free.initial_state, free.residual("prelude", 0))
    changed = capture(model, IDS, recurrences=3, intervene=texts)
    assert torch.equal(changed.initial_state, given)
    assert_same_states(changed, capture(model, IDS, recurrences=3, initial_state=given))


def test_another_seed_starts_elsewhere_and_is_not_the_second_path() -> None:
    model = subject()
    changed = capture(model, IDS, recurrences=3, intervene=["start=seed:7"])
    assert_same_states(changed, capture(model, IDS, recurrences=3, seed=7))
    # The second path of a run with seed 0 starts from seed 1.
    assert float(analyze(model, [IDS], intervene=["start=seed:1"], **SHORT).dataset["path_distance"][0, 0, 0]) > 0


def test_noise_has_the_norm_of_what_it_replaces_and_a_direction_of_its_own() -> None:
    model = linear_loop(torch.eye(16), torch.zeros(16, 16))  # what is received is what comes out

    def after(text: str, seed: int = 0) -> torch.Tensor:
        return capture(model, IDS, recurrences=3, seed=seed, intervene=[text]).loop_state(3)[0]

    own = capture(model, IDS, recurrences=3).loop_state(3)[0]
    changed = after("token:2@2=noise")
    torch.testing.assert_close(changed[2].norm(), own[2].norm())
    untouched = [0, 1, 3, 4, 5]
    assert torch.equal(changed[untouched], own[untouched])
    directions = torch.stack([own[2], changed[2], after("token:2@3=noise")[2], after("token:2@2=noise", 1)[2]])
    directions = directions / directions.norm(dim=-1, keepdim=True)
    assert float((directions @ directions.T - torch.eye(4, dtype=torch.float64)).abs().max()) < 0.9
    assert torch.equal(changed, after("token:2@2=noise"))


EVERY = ["token:-1@2=noise", "token:0@3=zeros", "damp=0.7", "mlp:recurrent.1@2-=0.5", "inject@3=frozen"]


@pytest.mark.parametrize("left", [False, True])
def test_neither_batch_nor_padding_changes_a_prompt(left: bool) -> None:
    model = subject(dtype=torch.float64)
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 1]
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    places = [slice(width - len(each), width) if left else slice(0, len(each)) for each in prompts]
    for row, (prompt, place) in enumerate(zip(prompts, places, strict=True)):
        ids[row, place], mask[row, place] = torch.tensor(prompt), True
    together = capture(model, ids, attention_mask=mask, recurrences=4, intervene=EVERY)
    for row, (prompt, place) in enumerate(zip(prompts, places, strict=True)):
        alone = capture(model, prompt, recurrences=4, intervene=EVERY)
        for site in alone.visits:
            mine, own = together.residual(*site)[row, place], alone.residual(*site)[0]
            torch.testing.assert_close(mine, own, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("shape", "texts"),
    [
        (INJECTED, EVERY),
        (RESIDUAL_NORM, ["start=scale:2", *EVERY]),
        # Noise would be a random draw in a model that has none.
        (ADDED, ["start=scale:2", "token:-1@2=zeros", "damp=0.7", "inject@3=frozen"]),
    ],
    ids=["linear", "residual norm", "add"],
)
def test_a_changed_model_keeps_the_contract_of_subjects(shape: Architecture, texts: list[str]) -> None:
    check_subject(subject(shape).intervened(texts))


def test_the_rounding_error_is_that_of_the_changed_recurrence() -> None:
    model, batch = subject(), Batch.of([IDS])
    free = model.start(batch, recurrences=4)
    bare = model.intervened(["mlp:recurrent.*=0", "attention:recurrent.*=0", "inject@1=frozen"])
    run = bare.start(batch, recurrences=4)
    assert float(run.rounding_error().max()) > 0  # of mixing state and prelude's output
    run.advance()
    # The frozen input passes through layers that add nothing to it.
    assert float(run.rounding_error().max()) == 0
    assert float(free.rounding_error().max()) > 0


def test_a_study_goes_on_with_the_same_interventions_and_refuses_others(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    out = tmp_path / "study"
    settings: dict[str, Any] = {**SHORT, "threads": 1, "device": "cpu", "batch_size": 1}
    first = analyze(model, ["one", "two"], out=out, intervene=["damp=0.50"], **settings)
    write_manifest(out, {**read_manifest(out), "status": "running"})
    for other in ([], ["damp=0.25"], ["damp=0.5", "start=zeros"]):
        with pytest.raises(StudyError, match=r"holds another study.*intervene was \['damp=0.5'\]"):
            analyze(model, ["one", "two"], out=out, intervene=other, **settings)
    again = analyze(model, ["one", "two"], out=out, intervene=[Damp(0.5)], **settings)
    xarray.testing.assert_identical(again.dataset, first.dataset)
    assert again.manifest["status"] == "complete"


def test_a_subject_with_interventions_is_recorded_as_such() -> None:
    model = subject().intervened([ScaleBranch("mlp", "prelude", 0, 0.0)])
    study = analyze(model, PROMPTS, **SHORT)
    assert study.manifest["settings"]["intervene"] == ["mlp:prelude.0=0"]
    with pytest.raises(ConfigError, match="comes too late"):
        analyze(model, PROMPTS, intervene=["damp=0.5"], **SHORT)


def test_prompts_and_recurrences_are_checked_before_anything_is_run(tmp_path: Path) -> None:
    for texts, message in (
        (["token:6@2=zeros"], "names token 6, and prompt 1 has 3 tokens"),
        (["mlp:recurrent.0@6=0"], "names recurrence 6, and 5 are measured"),
    ):
        with pytest.raises(ConfigError, match=message):
            analyze(subject(), PROMPTS[:3], intervene=texts, out=tmp_path / "study", **SHORT)
    assert not (tmp_path / "study").exists()


def test_the_command_line_takes_several_and_the_report_shows_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = checkpoint(tmp_path / "model"), tmp_path / "study"
    arguments = ["analyze", str(model), "--text", "one", "--recurrences", "3", "--horizon", "3", "--out", str(out)]
    main([*arguments, "--intervene", "mlp:prelude.0=0", "--intervene", "token:-1@2=zeros"])
    assert Study.load(out).manifest["settings"]["intervene"] == ["mlp:prelude.0=0", "token:-1@2=zeros"]
    page = (out / "report.html").read_text(encoding="utf-8")
    header = page[page.index('class="facts"') : page.index("</dl>")]
    assert "mlp:prelude.0=0, token:-1@2=zeros" in header
    assert "The model was changed while it ran (mlp:prelude.0=0, token:-1@2=zeros)" in page
    capsys.readouterr()
    with pytest.raises(SystemExit) as refused:
        main([*arguments[:-1], str(tmp_path / "other"), "--intervene", "mlp:body.0=0"])
    assert refused.value.code == 2
    assert "STAGE one of prelude, recurrent, coda" in capsys.readouterr().err
