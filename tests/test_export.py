"""A study as tables: what is in them, and what others read of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import loopscope
from loopscope import Study
from loopscope.cli import main
from loopscope.errors import StudyError
from synthetic_study import contracting, feed_forward_study, looped_study, orbiting, with_behaviour


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    made = with_behaviour(looped_study([contracting(), orbiting], recurrences=16, horizon=32, prompts=4))
    return made.save(tmp_path_factory.mktemp("studies") / "both")


@pytest.fixture(scope="module")
def frames(study: Study) -> dict[str, pd.DataFrame]:
    return study.to_pandas()


def test_rows_are_prompts_tokens_visits_and_heads(study: Study, frames: dict[str, pd.DataFrame]) -> None:
    sizes, data = study.dataset.sizes, study.dataset
    assert list(frames["prompts"]["id"]) == [entry["id"] for entry in study.tokens]
    assert len(frames["tokens"]) == int(data["token_count"].sum())
    assert len(frames["visits"]) == sizes["prompt"] * sizes["depth"]
    assert len(frames["heads"]) == len(frames["visits"]) * sizes["head"]
    row = frames["visits"].query("prompt == 3 and stage == 'recurrent' and layer == 2 and recurrence == 5").iloc[0]
    place = {"prompt": 3, "layer": 2, "recurrence": 5}
    assert row["relative_distance"] == data["relative_distance"].sel(place).item()
    depth = ((data["depth_stage"] == "recurrent") & (data["depth_layer"] == 2) & (data["depth_recurrence"] == 5)).values
    assert row["residual_entropy"] == data["residual_entropy"].sel(prompt=3).values[depth].item()
    assert frames["visits"].query("stage != 'recurrent'")["relative_distance"].isna().all()
    names = {name: [each for each in frame.columns if each != "generated"][:5] for name, frame in frames.items()}
    assert not any(frame.duplicated(names[name]).any() for name, frame in frames.items() if name != "prompts")


def test_shorter_prompts_end_where_they_end_and_codes_are_words(tmp_path: Path) -> None:
    texts = ["Ann has 3 apples.", "Ann has 3 apples and buys 4 more. How many has she?"]
    few = loopscope.AnalyzeSettings.preset("quick", recurrences=2, horizon=16, device="cpu")
    study = loopscope.analyze("demo:injected", texts, out=tmp_path / "study", settings=few)
    frames = study.to_pandas()
    strings = [string for entry in study.tokens for string in entry["token_strings"]]
    assert list(frames["tokens"]["token_string"]) == strings
    kinds = [str(kind) for kind in study.dataset["kind"].values]
    codes = study.dataset["verdict"].isel(judged_layer=-1).transpose("prompt", "token").values
    assert list(frames["tokens"]["verdict"]) == [kinds[code] for prompt in codes for code in prompt if code >= 0]
    assert len(frames["readouts"]) == len(strings) * study.dataset.sizes["readout_recurrence"]


def test_metrics_are_the_numbers_of_the_answers(study: Study) -> None:
    found = study.metrics()
    assert all(math.isfinite(value) and " " not in name for name, value in found.items())
    evidence = {answer.key: answer.evidence for answer in loopscope.quick_answers(study)}
    assert found["fixed_point/drift_between_horizons"] == evidence["fixed_point"]["drift_between_horizons"]
    assert sum(value for name, value in found.items() if name.startswith("tokens/")) >= 1


def test_csv_needs_no_other_package_and_says_the_same(study: Study, tmp_path: Path) -> None:
    assert study.folder is not None
    main(["export", str(study.folder), "--to", "csv", "--out", str(tmp_path)])
    for name, frame in Study.load(study.folder).to_pandas().items():
        read = pd.read_csv(tmp_path / f"{name}.csv", keep_default_na=False, na_values=[""])
        assert list(read.columns) == ["study", *frame.columns]
        assert set(read["study"]) == {"both"}
        numbers = frame.select_dtypes("number")
        np.testing.assert_allclose(read[numbers.columns].to_numpy(), numbers.to_numpy(), rtol=1e-6)


def test_a_folder_for_the_hub(study: Study, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="the extra `hub` is not installed")
    cards = pytest.importorskip("huggingface_hub", reason="the extra `hub` is not installed")
    plain = feed_forward_study(prompts=2).save(tmp_path / "plain")
    out = loopscope.write_export([study, plain], tmp_path / "data set", to="hub-folder", licence="mit")
    card = cards.DatasetCard.load(out / "README.md")
    assert card.data.license == "mit"
    tables = {each["config_name"]: out / each["data_files"] for each in card.data.to_dict()["configs"]}
    read = {name: pd.read_parquet(path) for name, path in tables.items()}
    assert list(read["studies"]["study"]) == ["both", "plain"]
    assert list(read["studies"]["recurrences"]) == [16, 0]
    assert len(read["tokens"].query("study == 'both'")) == len(study.to_pandas()["tokens"])
    assert (out / "manifests" / "plain" / "manifest.json").is_file()
    (tmp_path / "README.md").write_text("# Mine")
    with pytest.raises(StudyError, match="choose another folder"):
        loopscope.write_export([study], tmp_path, to="hub-folder")


def test_studies_need_names_of_their_own(study: Study, tmp_path: Path) -> None:
    for studies in ([], [study, study]):
        with pytest.raises(StudyError, match="names of their own"):
            loopscope.write_export(studies, tmp_path, to="csv")
