"""A run to twice the horizon that ends once all is at rest says what the whole one says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray

from loopscope import AnalyzeSettings, Study, analyze, load
from loopscope.analysis.settings import parts_except
from loopscope.answers.quick import quick_answers
from loopscope.dynamics.verdicts import SETTLED_CODES
from loopscope.errors import ConfigError
from loopscope.models.subject import Subject
from loopscope.report.figures.token_panel import walked
from loopscope.report.page.write import write_report
from loopscope.study import view_study
from small_models import INJECTED, PROMPTS, hooked_native, linear_loop, relaxation, subject

SETTINGS = AnalyzeSettings(
    recurrences=6, horizon=40, stop_at_rest=16, skip=("maps", "neurons", "cycle-similarity"), eigenvalue_products=6
)
ENDS = AnalyzeSettings(
    recurrences=6, horizon=32, stop_at_rest=16, skip=parts_except("twin", "noise-floor", "behaviour")
)
"""Of the end of the run alone."""
LATE = ("horizon_", "point_", "eigenvalue", "twin_", "verdict", "noise_floor", "displacement", "tail_path", "mover")
"""Begin the names of variables of the end of the run; distances to X[2H] are others."""


def both(model: Subject, prompts: list[list[int]], settings: AnalyzeSettings) -> tuple[Study, Study]:
    """Of the whole run, and of the one that may end."""
    return analyze(model, prompts, settings=settings, stop_at_rest=0), analyze(model, prompts, settings=settings)


def test_what_is_at_rest_ends_early_and_says_the_same() -> None:
    whole, ended = both(subject(std=0.02), PROMPTS[:3], SETTINGS)
    (at,) = set(ended.dataset["stopped_at"].values.tolist())
    assert 40 + 16 + 2 <= at < 80
    assert "stopped_at" not in whole.dataset
    assert "--stop-at-rest" in whole.manifest["left_out"]["stopped_at"]
    for name, values in whole.dataset.data_vars.items():
        late = str(name).startswith(LATE) or "second_horizon" in str(name) or "horizon_drift" in str(name)
        if not late and values.dtype.kind == "f":
            np.testing.assert_allclose(ended.dataset[name], values, rtol=2e-3, atol=2e-6, err_msg=str(name))
    after = ended.dataset["twin_distance"].sel(long_recurrence=slice(at + 1, None))
    assert after.size
    assert after.isnull().all()
    kinds = [set(each.dataset["verdict"].values[each.dataset["verdict"].values >= 0]) for each in (whole, ended)]
    assert all(kind <= set(SETTLED_CODES) for kind in kinds)
    for one, other in zip(quick_answers(whole), quick_answers(ended), strict=True):
        assert (other.outcome, other.verdict) == (one.outcome, one.verdict), one.question


def test_the_answers_name_where_the_run_ended(tmp_path: Path) -> None:
    ended = analyze(subject(std=0.02), PROMPTS[:2], settings=ENDS)
    at = int(ended.dataset["stopped_at"][0])
    assert view_study(ended).second_horizon == at
    told = " ".join(quick_answers(ended)[-1].limits)
    assert f"ended after {at} recurrences rather than 64" in told
    page = write_report(ended, tmp_path / "report.html").read_text()
    assert f"32 and {at}" in page
    path = ended.dataset["tail_path"].isel(prompt=0, token=0).transpose("tail", "plane")
    assert int(path["tail"][len(walked(path.values)) - 1]) == at


def test_one_run_or_two_make_no_difference() -> None:
    """Measured for longer than the run to twice the horizon takes, with the states kept, and run again."""
    one, two = (
        analyze(subject(std=0.02), PROMPTS[:2], settings=ENDS, recurrences=70, horizon_method=method)
        for method in ("keep", "second-pass")
    )
    assert (one.dataset["stopped_at"] > 0).all()
    xarray.testing.assert_identical(one.dataset, two.dataset)


def test_a_hooked_model_ends_where_the_native_one_does() -> None:
    studies = [analyze(each, PROMPTS[:2], settings=ENDS) for each in hooked_native(INJECTED, std=0.02)]
    native, hooked = (study.dataset for study in studies)
    assert (native["stopped_at"] > 0).all()
    for name in ("stopped_at", "verdict"):
        np.testing.assert_array_equal(hooked[name].values, native[name].values)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(subject(std=0.3), id="wanders"),
        pytest.param(relaxation(0.97, dtype=torch.float32), id="still on its way"),
        pytest.param(linear_loop(torch.eye(16).roll(1, 0), torch.zeros(16, 16)), id="turns for ever"),
        pytest.param(linear_loop(torch.eye(16), 1e-6 * torch.eye(16)), id="drifts"),
    ],
)
def test_what_moves_runs_to_the_end_with_the_same_numbers(model: Subject) -> None:
    whole, ended = both(model, PROMPTS[:2], dataclasses.replace(ENDS, skip=parts_except("twin")))
    assert (ended.dataset["stopped_at"] == -1).all()
    xarray.testing.assert_identical(ended.dataset.drop_vars("stopped_at").drop_attrs(), whole.dataset.drop_attrs())


def test_batches_that_end_at_different_recurrences_make_one_study() -> None:
    text = "Ann has 3 apples and buys 4 more."
    model = load("demo:injected", device="cpu")
    study = analyze(model, [text, text[:4]], settings=ENDS, batch_size=1, intervene=("damp=0.5",))
    alone = analyze(model, [text[:4]], settings=ENDS, intervene=("damp=0.5",))
    assert study.dataset["stopped_at"].values[1] == alone.dataset["stopped_at"].values[0]
    assert study.dataset.sizes["tail"] == alone.dataset.sizes["tail"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stop_at_rest": 8}, "0 for never, or at least 16"),
        ({"horizon": 18}, "At a horizon of 18 no run .* or leave --stop-at-rest out"),
        ({"stop_at_rest": 36}, "raise --horizon, or take at most 32"),
        ({"stop_at_rest": 256, "horizon": 900}, "raise --horizon, or take at most 252"),
        ({"skip": ("twin",)}, "leave one of it and --skip twin out"),
        ({"intervene": ("token:0@50=zeros",)}, "before 'token:0@50=zeros' has changed all that it changes"),
        ({"intervene": ("mlp:recurrent.0@3-60=0.5",)}, "before 'mlp"),
        ({"intervene": ("inject@41=frozen",)}, r"beyond the horizon \(40\)"),
    ],
)
def test_settings_that_would_hide_something_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        analyze(subject(std=0.02), PROMPTS, settings=SETTINGS, recurrences=64, **changes)


def test_what_acts_before_the_horizon_or_all_the_time_is_no_obstacle() -> None:
    changes: dict[str, Any] = {"intervene": ("mlp:recurrent.0@3-=0.5", "attention:recurrent.1@2-6=0", "damp=0.9")}
    study = analyze(subject(std=0.02), PROMPTS[:1], settings=ENDS, **changes)
    assert (study.dataset["stopped_at"] > 0).all()


def test_a_folder_from_before_the_setting_is_resumed(tmp_path: Path) -> None:
    settings = AnalyzeSettings(recurrences=3, horizon=20, skip=("behaviour", "stability", "maps"))
    analyze(subject(), PROMPTS[:1], settings=settings, out=tmp_path / "study")
    path = tmp_path / "study" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["identity"]["settings"]["stop_at_rest"], manifest["checksum"]
    path.write_text(json.dumps(manifest))
    analyze(subject(), PROMPTS[:1], settings=settings, out=tmp_path / "study")
    with pytest.raises(Exception, match="stop_at_rest was 0, now 16"):
        analyze(subject(), PROMPTS[:1], settings=settings, out=tmp_path / "study", stop_at_rest=16)
