"""A study on disk: what is written comes back, is what the documentation lists, and is refused when it is damaged."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import xarray

from document_variables import documented
from loopscope import AnalyzeSettings, Study, analyze
from loopscope.analysis.settings import Part
from loopscope.answers.quick import quick_answers
from loopscope.errors import ConfigError, StudyError
from loopscope.measures.convergence import TOKEN_NAMES
from loopscope.measures.heads import HEAD_NAMES
from loopscope.measures.readout import TOKEN_READOUTS
from loopscope.measures.registry import DECLARED, declared_variables
from loopscope.measures.stages import STAGE_NAMES
from loopscope.models.architecture import Architecture
from loopscope.study import read_manifest, write_manifest
from small_models import ADDED, FEED_FORWARD, GATED, INJECTED, LOOP_NORM, PROMPTS, subject

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "study.md"
SETTINGS = AnalyzeSettings(
    recurrences=5,
    horizon=20,
    cycle_recurrences=2,
    batch_size=4,
    track=("0:-1",),
    components=2,
    stop_at_rest=16,
    eigenvalue_products=6,
    eigenvalue_search=8,
    support_every=8,
)
GATE = {"exit_probability", "token_exit_probability", "token_exit_cumulated"}
ANSWERS = {"answer_rank", "answer_log_probability"}
"""Of studies that were given an answer, for which a tokenizer is needed."""
PATHS = {"path_distance", "path_cosine_distance", "start_distance"}
FEED_FORWARD_VARIABLES = {
    "cycle_similarity",
    "attention_cycle_distance",
    "loss",
    "token_count",
    "diverged_at",
    "prediction_neurons",
    "suppression_neurons",
    "neuron_kurtosis",
    "neuron_skew",
    "folded_prediction_neurons",
    "folded_suppression_neurons",
    "folded_neuron_kurtosis",
    "folded_neuron_skew",
    "attention_map",
    "visit_cka",
    *TOKEN_READOUTS,
    *HEAD_NAMES,
    *STAGE_NAMES,
    "effective_rank",
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Of a looped model that has every variable, saved."""
    return analyze(subject(), PROMPTS, settings=SETTINGS, out=tmp_path_factory.mktemp("studies") / "looped")


@pytest.fixture
def folder(study: Study, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    study.save(tmp_path / "study")
    return tmp_path / "study"


@functools.cache
def analyzed(shape: Architecture | None = None, skip: tuple[Part, ...] = ()) -> Study:
    """A study that was not written, once for all tests."""
    settings = dataclasses.replace(SETTINGS, skip=skip)
    return analyze(subject(shape) if shape else subject(), PROMPTS, settings=settings)


def table(section: str) -> list[list[str]]:
    """Cells of the table below a heading of the document, without its head."""
    text = DOCUMENT.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").replace(r"\|", "¦").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def documented_variables() -> dict[str, tuple[str, ...]]:
    return {name.strip("`"): tuple(dims.split(", ")) for name, dims, _, _ in table("Variables")}


def test_the_document_has_what_the_measures_declare() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert documented(text) == text, "run tools/document_variables.py"


def test_every_part_of_an_analysis_is_a_measures_and_the_other_way_round() -> None:
    assert {kind.part for kind in DECLARED} - {None} == set(get_args(Part))


def test_variables_say_what_they_are(study: Study) -> None:
    for name, values in study.dataset.data_vars.items():
        about = declared_variables()[str(name)]
        assert tuple(map(str, values.dims)) == about.dims
        assert values.attrs["long_name"] == about.meaning
        assert values.attrs["units"] == about.units
        assert len(values.attrs.get("flag_meanings", "").split()) == len(about.flags)
        if about.flags:
            assert values.max() < len(about.flags)


@pytest.mark.parametrize(
    ("model", "skip", "name", "why"),
    [
        (None, ("heads",), "sink_score", "the analysis was told to leave it out (--skip heads)"),
        (None, ("heads",), "attention_cycle_distance", "the analysis was told to leave it out (--skip heads)"),
        (None, (), "exit_probability", "the model has no exit gate"),
        (LOOP_NORM, (), "path_distance", "the model cannot be started from another initial state"),
        (FEED_FORWARD, (), "relative_step", "a feed-forward model has no recurrences"),
        (FEED_FORWARD, (), "attention_change", "a feed-forward model has no recurrences"),
    ],
)
def test_a_study_says_why_it_lacks_a_variable(
    model: Architecture | None, skip: tuple[Part, ...], name: str, why: str
) -> None:
    found = analyzed(model, skip)
    assert name not in found.dataset
    assert found.manifest["left_out"][name] == why
    assert set(found.manifest["left_out"]) | {str(each) for each in found.dataset} == set(declared_variables())


def test_the_documentation_lists_the_variables_and_their_dimensions(study: Study) -> None:
    produced = {str(name): tuple(map(str, values.dims)) for name, values in study.dataset.data_vars.items()}
    gated = analyzed(GATED).dataset
    produced |= {str(name): tuple(map(str, values.dims)) for name, values in gated.data_vars.items()}
    produced |= {"sink_mass": ("depth", "head", "prompt")}  # of models with a sink
    produced |= dict.fromkeys(ANSWERS, ("answer", "readout_recurrence", "prompt", "token"))
    assert produced == documented_variables()


def test_the_documentation_lists_the_coordinates(study: Study) -> None:
    listed = {name for names, _ in table("Coordinates") for name in re.findall(r"`([^`]+)`", names)}
    beside = {"tracked_prompt", "tracked_token", "mapped_prompt", "predicted_text"}
    beside |= {f"{kind}_{name}" for kind in ("depth", "map") for name in ("stage", "layer", "recurrence")}
    tokenized = {"answer", "predicted_token", "predicted_text"}
    assert {str(name) for name in study.dataset.coords} | tokenized == listed | beside


@pytest.mark.parametrize(
    ("shape", "missing"),
    [
        (LOOP_NORM, GATE | {"path_distance", "path_cosine_distance", "start_distance"}),
        (ADDED, GATE | {"layer_top1", "layer_top1_probability", "layer_entropy"}),
        (FEED_FORWARD, None),
    ],
    ids=["uninjected", "one layer", "feed-forward"],
)
def test_other_models_lack_what_the_documentation_says(shape: Architecture, missing: set[str] | None) -> None:
    produced = set(analyzed(shape).dataset.data_vars)
    documented = set(documented_variables()) - {"sink_mass"} - ANSWERS
    assert produced == (FEED_FORWARD_VARIABLES if missing is None else documented - missing)
    assert documented > FEED_FORWARD_VARIABLES


def test_variables_that_are_kept_token_by_token_are_kept_as_averages_too(study: Study) -> None:
    assert {name for name in TOKEN_NAMES if name in study.dataset} == set(TOKEN_NAMES)


def test_coordinates_say_what_each_entry_is(study: Study) -> None:
    dataset = study.dataset
    assert dataset["quantile"].values.tolist() == [0.05, 0.25, 0.5, 0.75, 0.95]
    assert dataset["site"].values.tolist() == ["last_layer", "loop_state"]
    assert dataset["horizon"].values.tolist() == ["first", "second"]
    assert dataset["readout_recurrence"].values.tolist() == [1, 2, 3, 4, 5]
    assert dataset["exit_recurrence"].values.tolist() == [1, 2, 3, 4]  # as many as in training
    assert dataset["visit"].values.tolist() == dataset["visit_other"].values.tolist()
    assert dataset["visit"].values.tolist() == [
        "prelude.0",
        *("recurrent.0@1", "recurrent.1@1", "recurrent.0@2", "recurrent.1@2"),
        "coda.0",
    ]
    for name, size in (("layer", 2), ("prompt", 5), ("token", 8), ("component", 2)):
        assert dataset[name].values.tolist() == list(range(size))
    assert dataset["recurrence"].values.tolist() == [1, 2, 3, 4, 5]
    assert dataset["token_count"].values.tolist() == [len(prompt) for prompt in PROMPTS]


def test_a_notebook_shows_a_study_as_its_answers(study: Study) -> None:
    assert len(repr(study)) < 200
    shown = study._repr_html_()
    for answer in quick_answers(study):
        assert escape(answer.question) in shown
        assert escape(answer.verdict) in shown


def test_what_is_saved_is_loaded(study: Study) -> None:
    assert study.folder is not None
    again = Study.load(study.folder)
    xarray.testing.assert_identical(again.dataset, study.dataset)
    assert {name: values.dtype for name, values in again.dataset.items()} == {
        name: values.dtype for name, values in study.dataset.items()
    }
    assert json.loads(json.dumps(study.manifest)) == again.manifest
    assert again.folder == study.folder
    assert [entry["token_ids"] for entry in again.tokens] == PROMPTS


def test_a_study_is_the_same_whether_it_was_written_or_not(study: Study) -> None:
    xarray.testing.assert_identical(analyzed().dataset, study.dataset)


def test_a_saved_study_can_be_saved_elsewhere_and_over_itself(study: Study, tmp_path: Path) -> None:
    for _ in range(2):
        copy = study.save(tmp_path / "deep" / "copy")
        assert copy.folder == tmp_path / "deep" / "copy"
        xarray.testing.assert_identical(Study.load(copy.folder).dataset, study.dataset)
    assert sorted(path.name for path in (tmp_path / "deep" / "copy").iterdir()) == [
        "manifest.json",
        "study.nc",
        "tokens.jsonl",
    ]


def test_nothing_but_the_study_is_left_in_its_folder(study: Study) -> None:
    assert study.folder is not None
    assert sorted(path.name for path in study.folder.iterdir()) == ["manifest.json", "study.nc", "tokens.jsonl"]


def test_the_manifest_says_what_was_run_on_what(study: Study) -> None:
    manifest = study.manifest
    assert manifest["status"] == "complete"
    assert manifest["model"]["weights_sha256"] == subject().info.weights_sha256
    assert manifest["model"]["layout"] == {"prelude": 1, "recurrent": 2, "coda": 1}
    assert manifest["model"]["dtype"] == "float32"
    assert manifest["settings"]["horizon"] == 20
    assert manifest["prompts"]["count"] == 5
    assert manifest["prompts"]["tokens"] == sum(map(len, PROMPTS))
    assert set(manifest["versions"]) >= {"loopscope", "python", "torch"}


@pytest.mark.parametrize("text", ["one\u2028two", "one\u0085two\x1c", 'tab\tquote"back\\slash', "line\r\nfeed", "漢🙂"])
def test_any_text_survives(text: str, study: Study, tmp_path: Path) -> None:
    tokens = [{"id": "a", "text": text, "token_ids": [1], "token_strings": [text], "system_tokens": 0}] * 2
    few = study.dataset.isel(prompt=slice(2)).assign(token_count=("prompt", [1, 1]))
    Study(few, study.manifest, tokens).save(tmp_path / "study")
    assert Study.load(tmp_path / "study").tokens == tokens


def edit_manifest(**changes: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        write_manifest(folder, read_manifest(folder) | changes)

    return edit


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def cut(name: str, size: int = 40) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def overwrite(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("manifest.json"), "is not a study .it has no manifest.json"),
        (remove("study.nc"), "lacks study.nc"),
        (remove("tokens.jsonl"), "lacks tokens.jsonl"),
        (edit_manifest(status="running"), "is not finished; run the same"),
        (cut("manifest.json"), "manifest.json is damaged"),
        (overwrite("manifest.json", b"\xff\xfe\x00"), "manifest.json is damaged"),
        (overwrite("manifest.json", b"[1, 2]"), "not hold a JSON object"),
        (cut("study.nc", 0), "damaged"),
        (cut("study.nc"), "damaged"),
        (cut("study.nc", 9000), "damaged"),
        (overwrite("study.nc", b"not a file of arrays" * 50), "damaged"),
        (cut("tokens.jsonl"), "damaged"),
        (overwrite("tokens.jsonl", b"\xff\n"), "damaged"),
    ],
)
def test_a_damaged_study_is_refused_in_one_sentence(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(StudyError, match=message) as caught:
        Study.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_folder_that_is_missing_and_one_that_is_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="does not exist"):
        Study.load(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(StudyError):
        Study.load(tmp_path / "file")
    with pytest.raises(ConfigError, match="folder takes a path, got None"):
        Study.load(cast(Any, None))


def test_an_injected_and_an_uninjected_study_can_be_told_apart_by_their_manifests() -> None:
    kinds = [analyze(subject(shape), [[1, 2]], settings=SETTINGS).manifest for shape in (INJECTED, LOOP_NORM)]
    assert [manifest["model"]["injection"] for manifest in kinds] == ["linear", "none"]
