"""What does not settle is damped as its eigenvalues ask for, and settles."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loopscope import AnalyzeSettings, Study, analyze, control
from loopscope.dynamics.verdicts import KINDS, Kind
from loopscope.errors import ConfigError, StudyError
from loopscope.experiments.damping import Control
from loopscope.models.interventions.kinds import Damp
from loopscope.models.interventions.parsing import parse_interventions
from loopscope.models.native.subject import NativeSubject
from small_models import PROMPTS, linear_loop, relaxation, subject
from test_stability_study import rotation

SETTINGS = AnalyzeSettings(
    recurrences=8, horizon=64, batch_size=3, track=(), judged_layers="last", skip=("heads", "maps", "readout", "stages")
)
SETTLED = [KINDS.index(kind) for kind in (Kind.FIXED_POINT, Kind.AT_FLOOR)]


def turning() -> NativeSubject:
    return linear_loop(*rotation(7.3))


@pytest.fixture(scope="module")
def orbits() -> Study:
    return analyze(turning(), PROMPTS, settings=SETTINGS)


def test_an_orbit_is_damped_away(orbits: Study, tmp_path: Path) -> None:
    found = control(orbits, model=turning(), out=tmp_path / "damped")
    assert found.prompts == tuple(range(len(PROMPTS)))
    assert found.moving == found.settled == sum(map(len, PROMPTS))
    assert found.predicted_radius == pytest.approx(0.95)
    assert found.observed_rate == pytest.approx(0.95, abs=1e-3)
    assert found.transitions[KINDS.index(Kind.ORBIT), SETTLED].sum() == found.moving
    record = json.loads((tmp_path / "damped" / "control.json").read_text())
    assert record["of_these_settled_after"] == found.settled
    assert record["intervene"] == [str(Damp(found.eta))]
    assert Study.load(tmp_path / "damped").manifest["settings"]["intervene"] == record["intervene"]
    again = control(orbits, model=turning(), out=tmp_path / "damped")
    assert np.array_equal(again.transitions, found.transitions)


def test_only_prompts_that_do_not_settle_are_run_again() -> None:
    # Half of the vocabulary starts on the fixed point, where a turning loop leaves it.
    model = turning()
    with torch.no_grad():
        model.model.embedding.weight[:20] = 0
    zeros = analyze(model, [[1, 2, 3], [30, 31], [4, 5]], settings=SETTINGS, intervene=("start=zeros",))
    found = control(zeros, model=model)
    assert found.prompts == (1,)
    assert [list(line["token_ids"]) for line in found.after.tokens] == [[30, 31]]


def test_a_step_of_ones_own_multiplies_one_that_was_there() -> None:
    slow = analyze(turning(), PROMPTS[:2], settings=SETTINGS, intervene=("damp=0.999999", "start=seed:3"))
    found = control(slow, model=turning(), eta=0.5)
    assert found.asked_by == "the user"
    damp, start = sorted(parse_interventions(found.after.manifest["settings"]["intervene"]), key=str)
    assert damp == Damp(0.999999 * 0.5)
    assert str(start) == "start=seed:3"


def test_what_no_damping_helps_is_said() -> None:
    grows = linear_loop(1.02 * torch.eye(16), torch.eye(16))
    study = analyze(grows, PROMPTS, settings=SETTINGS)
    with pytest.raises(ConfigError, match=r"--eta 0\.5"):
        control(study, model=grows)
    tried = control(study, model=grows, eta=0.5)
    assert tried.settled == 0
    assert any("before: now" in sentence for sentence in tried.sentences())


@pytest.mark.parametrize(
    ("changes", "model", "error", "said"),
    [
        ({}, relaxation(0.5), StudyError, "nothing to damp"),
        ({"skip": (*SETTINGS.skip, "behaviour"), "judged_layers": "all"}, relaxation(0.5), StudyError, "no verdicts"),
        ({"skip": (*SETTINGS.skip, "stability")}, turning(), StudyError, "no eigenvalues"),
    ],
)
def test_a_study_that_cannot_be_controlled_is_refused(
    changes: dict[str, Any], model: NativeSubject, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        control(analyze(model, PROMPTS[:2], settings=SETTINGS, **changes), model=model)


def test_undecided_tokens_are_counted(orbits: Study) -> None:
    unknown, turns = Kind.UNKNOWN.code, Kind.ORBIT.code
    codes = orbits.dataset["verdict"]
    left_open = orbits.dataset.assign(verdict=codes.where(codes < 0, unknown).astype(codes.dtype))
    with pytest.raises(StudyError, match=r"nothing to damp; 24 of 24 tokens are undecided, and a longer horizon may"):
        control(dataclasses.replace(orbits, dataset=left_open), model=turning())
    transitions = np.zeros((len(KINDS), len(KINDS)), dtype=np.int64)
    transitions[turns, SETTLED[0]], transitions[unknown, unknown] = 1, 2
    found = Control(
        eta=0.5,
        asked_by="the user",
        prompts=(0,),
        known=3,
        predicted_radius=0.9,
        transitions=transitions,
        observed_rate=float("nan"),
        before=orbits,
        after=orbits,
    )
    assert found.sentences() == [
        "1 prompt with 1 token that did not settle was run again with the step 0.500, which the user asked for.",
        "Of the 3 tokens whose fixed point is known, the damped eigenvalues reach 0.900 at most.",
        "Of the 1 token that did not settle, 1 does now.",
        "Orbit before: now 1 fixed point.",
        "Unknown before: now 2 unknown.",
    ]


def test_another_model_is_refused(orbits: Study) -> None:
    with pytest.raises(StudyError, match="other weights"):
        control(orbits, model=subject())
    with pytest.raises(StudyError, match="other weights"):
        control(orbits, model="demo:injected")


def test_a_step_outside_its_range_is_refused(orbits: Study) -> None:
    for eta in (0.0, 1.5):
        with pytest.raises(ConfigError, match="above 0"):
            control(orbits, model=turning(), eta=eta)
    with pytest.raises(ConfigError, match="radius"):
        control(orbits, model=turning(), radius=1.5)
    with pytest.raises(ConfigError, match="at least 8"):
        control(orbits, model=turning(), horizon=7)


def test_texts_and_roles_of_the_prompts_are_kept(tmp_path: Path) -> None:
    study = analyze(
        "demo:uninjected",
        ["Ann has 3 apples."],
        recurrences=8,
        horizon=128,
        judged_layers="last",
        skip=("heads", "maps", "readout", "stages", "neurons", "stability"),
        out=tmp_path / "study",
    )
    control(tmp_path / "study", eta=0.5, horizon=16, out=tmp_path / "damped")
    damped = Study.load(tmp_path / "damped")
    assert [dict(line) for line in damped.tokens] == [dict(line) for line in Study.load(tmp_path / "study").tokens]
    assert damped.manifest["settings"]["horizon"] == 16
    assert study.tokens[0]["text"] == damped.tokens[0]["text"] == "Ann has 3 apples."
