"""What an earlier release wrote counts recurrences from 0; it is read as if it had been written now."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray

from loopscope import Comparison, Study, analyze, compare
from loopscope._util.files import write_atomically
from loopscope._util.netcdf import netcdf
from loopscope._util.old_counts import COUNTS_FROM
from loopscope.errors import StudyError
from small_models import subject
from synthetic_study import contracting, feed_forward_study, looped_study

NOW = ("mlp:recurrent.*@2-3=0.5", "attention:recurrent.1@4-=0", "token:-1@5=noise", "inject@1=frozen")
BEFORE = ("mlp:recurrent.*@1-2=0.5", "attention:recurrent.1@3-=0", "token:-1@4=noise", "inject@0=frozen")
OPTIONS: dict[str, Any] = {"recurrences": 6, "horizon": 8, "skip": ("behaviour", "stability", "neurons", "twin")}


def written_before(manifest: dict[str, Any], dataset: xarray.Dataset) -> tuple[dict[str, Any], xarray.Dataset]:
    """What an earlier release would have written."""
    text = json.dumps(manifest)
    for now, before in zip(NOW, BEFORE, strict=True):
        text = text.replace(now, before)
    changed: dict[str, Any] = {}
    for name in ("recurrence", "tail", "head_stable_from"):
        if name in dataset.variables:
            changed[name] = dataset[name].variable - 1
    for name in ("depth", "map"):
        if f"{name}_recurrence" in dataset.variables:
            inside = dataset[f"{name}_stage"] == "recurrent"
            changed[f"{name}_recurrence"] = (dataset[f"{name}_recurrence"] - inside).variable
    for name in ("visit", "visit_other", "map_visit"):
        if name in dataset.variables:
            labels = [re.sub(r"@(\d+)", lambda found: f"@{int(found[1]) - 1}", label) for label in dataset[name].values]
            changed[name] = xarray.Variable(dataset[name].dims, labels)
    if "diverged_at" in dataset:
        diverged = dataset["diverged_at"].variable
        changed["diverged_at"] = diverged - (diverged >= 0)
    coordinates = {name: changed.pop(name) for name in list(changed) if name in dataset.coords}
    ignored = (COUNTS_FROM, "checksum", "files")
    known = {name: entry for name, entry in json.loads(text).items() if name not in ignored}
    return known, dataset.assign(changed).assign_coords(coordinates)


def make_old(folder: Path, **changes: Any) -> None:
    """Of a saved study."""
    study = Study.load(folder)
    manifest, dataset = written_before(dict(study.manifest), study.dataset)
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    write_atomically(folder / "study.nc", netcdf(dataset))


def assert_same(found: xarray.Dataset, wanted: xarray.Dataset) -> None:
    assert set(found.variables) == set(wanted.variables)
    for name in wanted.variables:
        assert (name in found.coords) == (name in wanted.coords), name
        assert found[name].dims == wanted[name].dims
        np.testing.assert_array_equal(found[name].values, wanted[name].values, err_msg=str(name))


def test_a_study_is_read_as_if_it_had_been_written_now(tmp_path: Path) -> None:
    now = analyze(subject(), [[1, 2, 3, 4], [5, 6]], out=tmp_path / "study", intervene=NOW, **OPTIONS)
    assert json.loads((tmp_path / "study" / "manifest.json").read_text())[COUNTS_FROM] == 1
    make_old(tmp_path / "study")
    stored = json.loads((tmp_path / "study" / "manifest.json").read_text())
    assert stored["settings"]["intervene"] == stored["identity"]["settings"]["intervene"] == list(BEFORE)

    found = Study.load(tmp_path / "study")
    assert_same(found.dataset, now.dataset)
    for name in ("settings", "identity", "model"):
        assert found.manifest[name] == now.manifest[name]
    assert found.manifest["settings"]["intervene"] == list(NOW)
    for name, frame in now.to_pandas().items():
        assert found.to_pandas()[name][frame.columns].equals(frame), name
    # Saved again it is a study of today, and is not moved on once more.
    again = Study.load(found.save(tmp_path / "again").folder or "")
    assert_same(again.dataset, now.dataset)
    # The same command finds it finished, and other interventions are others.
    assert_same(
        analyze(subject(), [[1, 2, 3, 4], [5, 6]], out=tmp_path / "study", intervene=NOW, **OPTIONS).dataset,
        now.dataset,
    )
    with pytest.raises(StudyError, match="holds another study"):
        analyze(subject(), [[1, 2, 3, 4], [5, 6]], out=tmp_path / "study", intervene=BEFORE[:3], **OPTIONS)


def test_where_prompts_diverged(tmp_path: Path) -> None:
    study = looped_study(contracting())
    diverged = study.dataset["diverged_at"].copy()
    diverged[:2] = [1, 7]
    now = dataclasses.replace(study, dataset=study.dataset.assign(diverged_at=diverged)).save(tmp_path / "study")
    make_old(tmp_path / "study")
    found = Study.load(tmp_path / "study")
    assert found.dataset["diverged_at"].values[:3].tolist() == [1, 7, -1]
    assert_same(found.dataset, Study.load(now.folder or "").dataset)


def test_a_study_of_no_loop_stays_as_it_is(tmp_path: Path) -> None:
    now = feed_forward_study().save(tmp_path / "study")
    make_old(tmp_path / "study")
    assert_same(Study.load(tmp_path / "study").dataset, now.dataset)


def test_a_comparison(tmp_path: Path) -> None:
    one = looped_study(contracting())
    manifest = {**one.manifest, "settings": {**one.manifest["settings"], "intervene": list(NOW)}}
    comparison = compare([one, dataclasses.replace(one, manifest=manifest)])
    assert any(NOW[0] in label for label in comparison.labels)
    now = comparison.save(tmp_path / "comparison")
    assert now.dataset["recurrence"].values[0] == 1
    known, dataset = written_before(dict(now.manifest), now.dataset)
    labels = [entry["label"] for entry in known["studies"]]
    assert labels != now.labels
    (tmp_path / "comparison" / "comparison.json").write_text(json.dumps(known))
    write_atomically(tmp_path / "comparison" / "comparison.nc", netcdf(dataset.assign_coords(study=labels)))
    found = Comparison.load(tmp_path / "comparison")
    assert_same(found.dataset, now.dataset)
    assert json.dumps(found.manifest, sort_keys=True) == json.dumps(now.manifest, sort_keys=True)


def test_a_study_that_was_begun_is_refused(tmp_path: Path) -> None:
    analyze(subject(), [[1, 2, 3, 4]], out=tmp_path / "study", **OPTIONS)
    make_old(tmp_path / "study", status="running")
    with pytest.raises(StudyError, match="an earlier release began, which counted recurrences from 0; choose another"):
        analyze(subject(), [[1, 2, 3, 4]], out=tmp_path / "study", **OPTIONS)
