"""Checkpoints in published formats, through everything: heads and stages of what the published code computed, whole
studies, their reports, and the comparison of them all."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray
from safetensors.torch import load_file
from torch import Tensor

import loopscope
from loopscope import measures
from loopscope.measures.heads import HEAD_NAMES, HeadMeasures
from loopscope.measures.horizon import Horizons
from loopscope.measures.similarity import AttentionCycle
from loopscope.measures.stages import STAGE_NAMES, StageMeasures
from loopscope.models.subject import Batch, SubjectInfo
from measuring import batch_info, watched
from test_reference import FAMILIES, LOOPED, REFERENCE

pytestmark = pytest.mark.reference

Functions = dict[str, Callable[[Tensor], Tensor]]

STAGES: Functions = {
    "residual_entropy": measures.residual_entropy,
    "relative_residual_entropy": measures.relative_residual_entropy,
    "mean_token_norm": lambda states: states.norm(dim=-1).mean(-1),
    "largest_token_norm": lambda states: states.norm(dim=-1).amax(-1),
    "massive_activation": measures.massive_activation,
    "massive_token": lambda states: measures.massive_activation_place(states)[..., 0],
    "massive_dimension": lambda states: measures.massive_activation_place(states)[..., 1],
}


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    kept: Path = REFERENCE / request.param
    return kept if kept.is_dir() else Path(request.getfixturevalue("reference_case")(request.param))


def recorded_name(info: SubjectInfo, stage: str, layer: int, recurrence: int) -> str:
    if not info.is_looped:
        return f"layer.{layer}"
    return f"{stage}.{recurrence - 1}.{layer}" if stage == "recurrent" else f"{stage}.{layer}"


@pytest.mark.parametrize("folder", list(FAMILIES), indirect=True)
def test_heads_and_stages_are_those_of_the_recorded_maps_and_states(folder: Path) -> None:
    subject, recorded = loopscope.load(folder, device="cpu"), load_file(folder / "expected.safetensors")
    about = json.loads((folder / "case.json").read_text())
    info, recurrences = subject.info, about["recurrences"] or 0
    batch = Batch(recorded["input_ids"], torch.ones_like(recorded["input_ids"], dtype=torch.bool))
    about_batch = batch_info(
        subject,
        batch,
        recurrences=max(recurrences, 1),
        horizon=max(recurrences, 2),
        cycle_recurrences=max(recurrences, 1),
        skip=("maps",),
    )
    assert info.heads is not None
    if recurrences:
        about_batch.horizon = horizon = Horizons(about_batch)
        watched([horizon], about_batch, recorded.get("initial_state"))
    heads, stages, cycle = (kind(about_batch) for kind in (HeadMeasures, StageMeasures, AttentionCycle))
    watched([heads, stages, cycle], about_batch, recorded.get("initial_state"))
    found = heads.result().merge(stages.result())

    sites = info.sites(range(1, recurrences + 1))
    names = [recorded_name(info, *site) for site in sites]
    states = torch.stack([recorded[name] for name in names])
    maps = torch.stack([recorded[f"attention.{name}".replace("attention.layer", "attention")] for name in names])

    def compare(name: str, ours: np.ndarray, theirs: Tensor) -> None:
        np.testing.assert_allclose(ours, theirs.numpy(), atol=about["tolerance"]["atol"], rtol=1e-4, err_msg=name)

    for name in HEAD_NAMES:
        compare(name, found[name].values, getattr(measures, name)(maps).movedim(1, -1))
    for name, function in STAGES.items():
        compare(name, found[name].values, function(states))
    for depth, (stage, layer, recurrence) in enumerate(sites):
        if stage != "recurrent":
            continue
        end = len(sites) - info.coda - info.recurrent + layer
        for name, other in (("attention_change", depth - info.recurrent), ("attention_distance_to_horizon", end)):
            if name == "attention_distance_to_horizon" or recurrence > 1:
                away = measures.attention_distance(maps[depth], maps[other]).movedim(0, -1)
                compare(name, found[name].values[layer, recurrence - 1], away)
    squares = (maps[:, None] - maps[None]).square().sum((-1, -2)).sum(-1) / (info.heads * about_batch.tokens)
    compare("cycle", cycle.result()["attention_cycle_distance"].values, squares.sqrt().sum(-1))


PROMPTS = [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46], [26, 43, 38, 32, 79], [50, 28, 84, 19, 71, 69, 39, 93]]


@pytest.fixture(scope="module")
def study_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], loopscope.Study]:
    """A study of a checkpoint, made once."""

    @functools.cache
    def study(folder: Path) -> loopscope.Study:
        out = tmp_path_factory.mktemp("studies") / folder.name
        settings = loopscope.AnalyzeSettings(
            recurrences=4, horizon=4, cycle_recurrences=3, device="cpu", eigenvalue_search=8
        )
        return loopscope.analyze(folder, PROMPTS, out=out, settings=settings)

    return study


def assert_whole(name: str, values: xarray.DataArray) -> None:
    assert bool(np.isfinite(values).all()), name


@pytest.mark.parametrize("folder", list(FAMILIES), indirect=True)
def test_a_study_of_a_published_format_is_whole(
    folder: Path, study_of: Callable[[Path], loopscope.Study], tmp_path: Path
) -> None:
    study = study_of(folder)
    data, looped = study.dataset, folder.name in LOOPED
    assert study.manifest["model"]["kind"] == ("looped" if looped else "feed-forward")
    for name in (*HEAD_NAMES, *STAGE_NAMES, "loss", "neuron_kurtosis", "attention_cycle_distance"):
        assert_whole(name, data[name])
    for name in ("colsum_concentration", "sink_score", "relative_mixing_score", "relative_residual_entropy"):
        assert float(data[name].min()) >= -1e-6, name
        assert float(data[name].max()) <= 1 + 1e-6, name
    for name in ("token_entropy", "token_kl_to_last"):
        assert (data[name].notnull().sum("token") == data["token_count"]).all(), name
    if looped:
        ratio = data["attention_bound_ratio"][:, 1:]
        assert_whole("attention_change", data["attention_change"][:, 1:])
        assert_whole("attention_distance_to_horizon", data["attention_distance_to_horizon"])
        assert 0 < float(ratio.min()) <= float(ratio.max()) <= 1
    if folder.name == "ouro-tiny":
        np.testing.assert_allclose(data["exit_probability"].sum("recurrence"), 1, rtol=1e-6)
    assert len(loopscope.quick_answers(study)) > 2
    assert loopscope.write_report(study, tmp_path / "report.html").stat().st_size > 0


def test_published_formats_are_compared(study_of: Callable[[Path], loopscope.Study], tmp_path: Path) -> None:
    kept = [name for name in FAMILIES if (REFERENCE / name).is_dir()]
    comparison = loopscope.compare([study_of(REFERENCE / name) for name in kept], reference="llama-tiny")
    # Their own names, not the paths of their folders.
    assert comparison.dataset["study"].values.tolist() == kept
    assert bool(comparison.dataset["curve"].isel(recurrence=0).notnull().any("position").all())
    assert loopscope.write_comparison(comparison, tmp_path / "compared.html").stat().st_size > 0
