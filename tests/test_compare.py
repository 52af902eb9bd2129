"""Comparisons of studies whose curves are known, and what the numbers do on curves that have nothing to do with
each other."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from loopscope import Comparison, compare, write_comparison
from loopscope.answers import Answer, Outcome
from loopscope.cli import main
from loopscope.comparison import MEASURES, comparison_answers, curve_similarity
from loopscope.errors import ConfigError, LoopscopeError, StudyError
from loopscope.settings import CompareSettings
from loopscope.study import Study
from synthetic_study import contracting, feed_forward_study, looped_study

Array = NDArray[np.float64]
Layout = tuple[int, int, int]

SHAPE = np.array([0.2, 0.9, 0.4, 0.7, 0.1, 0.8, 0.3, 0.6])
OTHER = np.array([0.5, 0.1, 0.3, 0.9, 0.8, 0.2, 0.6, 0.4])
SETTINGS = CompareSettings()


def staged_study(
    passes: Sequence[Array] | Sequence[float] | Array,
    layout: Layout = (8, 0, 0),
    *,
    model: str = "model",
    prompts: str = "questions.txt",
    trained: int | None = None,
    without: Sequence[str] = (),
) -> Study:
    """A study whose every measure but the sink rate, which is 0, has these curves (one per recurrence, over prelude,
    block and coda) as its medians over three prompts."""
    prelude, recurrent, coda = layout
    curves = np.atleast_2d(np.asarray(passes))
    loop = curves[:, prelude : prelude + recurrent].ravel()
    values = np.concatenate([curves[0, :prelude], loop, curves[0, prelude + recurrent :]])
    sites = [("prelude", layer, 0) for layer in range(prelude)]
    sites += [("recurrent", layer, at) for at in range(len(curves)) for layer in range(recurrent)]
    sites += [("coda", layer, 0) for layer in range(coda)]
    of_prompt = values[:, None] + np.array([-0.01, 0.0, 0.05])
    of_head = np.repeat(of_prompt[:, None], 2, axis=1)
    data: dict[str, Any] = {
        "colsum_concentration": (("depth", "head", "prompt"), of_head),
        "relative_mixing_score": (("depth", "head", "prompt"), of_head),
        "sink_score": (("depth", "head", "prompt"), 0 * of_head),
        "relative_residual_entropy": (("depth", "prompt"), of_prompt),
        "mean_token_norm": (("depth", "prompt"), of_prompt),
        "massive_activation": (("depth", "prompt"), 10**of_prompt),
        "token_count": ("prompt", np.full(3, 50)),
        "diverged_at": ("prompt", np.full(3, -1)),
        **{
            f"depth_{name}": ("depth", list(column))
            for name, column in zip(("stage", "layer", "recurrence"), zip(*sites, strict=True), strict=True)
        },
    }
    base = looped_study(contracting(), prompts=3, recurrences=4, horizon=4) if recurrent else feed_forward_study(3)
    if recurrent:
        # What a study of a looped model always has; of no matter here.
        names = ("relative_step", "relative_distance", *(name for name in base.dataset if "horizon" in str(name)))
        for name in (*names, "degeneracy"):
            dims = [dim for dim in base.dataset[name].dims if dim in ("layer", "recurrence", "prompt")]
            sizes = {"layer": recurrent, "recurrence": len(curves), "prompt": 3}
            data[str(name)] = dims, np.zeros([sizes[str(dim)] for dim in dims])
    manifest = {**base.manifest}
    manifest["model"] = {
        **manifest["model"],
        "name": model,
        "weights_sha256": model,
        "layout": {"prelude": prelude, "recurrent": recurrent, "coda": coda},
        "trained_recurrences": trained,
    }
    manifest["prompts"] = {"source": prompts, "count": 3, "tokens": 150, "sha256": prompts}
    dataset = xarray.Dataset({name: value for name, value in data.items() if name not in without})
    return Study(dataset, manifest, base.tokens)


def answer_of(comparison: Comparison, key: str) -> Answer:
    return next(answer for answer in comparison_answers(comparison) if answer.key == key)


def at(comparison: Comparison, name: str, study: str, span: str, recurrence: int = 0) -> Array:
    return np.asarray(comparison.dataset[name].sel(study=study, span=span).isel(recurrence=recurrence).values)


# The numbers


@given(
    st.lists(st.floats(-5, 5), min_size=4, max_size=6, unique=True),
    st.lists(st.floats(-5, 5), min_size=4, max_size=9, unique=True),
    st.floats(0.1, 10),
    st.floats(-10, 10),
)
def test_similarity_is_pearsons_on_the_common_grid(
    curve: list[float], other: list[float], scale: float, by: float
) -> None:
    one, two = np.array([curve]), np.array([other])
    if min(np.ptp(one), np.ptp(two)) < 1e-2:
        return
    grid = np.linspace(0, 1, SETTINGS.grid)
    on_grid = [np.interp(grid, np.linspace(0, 1, row.size), row) for row in (one[0], two[0], one[0, ::-1])]
    found = curve_similarity(one, two, SETTINGS)
    assert found.value[0] == pytest.approx(np.corrcoef(on_grid[0], on_grid[1])[0, 1], abs=1e-6)
    assert found.reversed[0] == pytest.approx(np.corrcoef(on_grid[2], on_grid[1])[0, 1], abs=1e-6)
    moved = curve_similarity(scale * one + by, two, SETTINGS)
    assert moved.value[0] == pytest.approx(found.value[0], abs=1e-6)
    assert 1 / math.factorial(len(curve)) <= found.p_value[0] <= 1


def test_exact_p_value_and_null_of_four_layers() -> None:
    curve, reference = np.array([1.0, 2, 4, 3]), np.array([1.0, 5, 2, 6])
    grid = np.linspace(0, 3, SETTINGS.grid)
    naive = [
        float(np.corrcoef(np.interp(grid, range(4), order), np.interp(grid, range(4), reference))[0, 1])
        for order in itertools.permutations(curve)
    ]
    found = curve_similarity(curve[None], reference[None], SETTINGS)
    assert found.p_value[0] == sum(value >= naive[0] - 1e-9 for value in naive) / 24
    np.testing.assert_allclose(found.null[:, 0], np.quantile(naive, [0.05, 0.5, 0.95]), atol=1e-9)
    assert curve_similarity(reference[None], reference[None], SETTINGS).p_value[0] == 1 / 24


def test_p_values_of_unrelated_curves_are_uniform() -> None:
    rng = np.random.default_rng(5)
    for layers in (4, 6, 9):
        settings = CompareSettings(shuffles=999)
        found = [
            curve_similarity(rng.normal(size=(3, layers)), rng.normal(size=(3, 8)), settings).p_value
            for _ in range(300)
        ]
        p_values = np.array(found)
        for level in (0.05, 0.25, 0.5):
            # 900 of single measures (three standard errors), 300 of the mean over measures.
            for column, error in ((p_values[:, :3], 0.0073), (p_values[:, 3], 0.0126)):
                share, slack = (column <= level).mean(), 3 * error * math.sqrt(level / 0.05)
                assert share <= level + slack
                assert share >= level - 1 / math.factorial(layers) - slack


def test_a_sample_of_orders_agrees_with_all_of_them_and_repeats_itself() -> None:
    rng = np.random.default_rng(0)
    curves, reference = rng.normal(size=(2, 7)), rng.normal(size=(2, 7))
    exact = curve_similarity(curves, reference, CompareSettings(shuffles=5040))
    sampled = [curve_similarity(curves, reference, CompareSettings(shuffles=5039, seed=seed)) for seed in (0, 0, 1)]
    assert np.array_equal(sampled[0].p_value, sampled[1].p_value)
    assert not np.array_equal(sampled[0].null, sampled[2].null)
    np.testing.assert_allclose(sampled[0].p_value, exact.p_value, atol=0.03)
    np.testing.assert_allclose(sampled[0].null, exact.null, atol=0.05)


@pytest.mark.parametrize(
    ("curve", "reference"),
    [
        pytest.param([1.0, 3, 2], SHAPE, id="three layers"),
        pytest.param(SHAPE, [1.0, 3, 2], id="reference of three layers"),
        pytest.param([2.0] * 8, SHAPE, id="flat"),
        pytest.param(1000 + 1e-5 * SHAPE, SHAPE, id="flat but for rounding"),
        pytest.param(SHAPE, [0.0] * 8, id="flat reference"),
        pytest.param([1.0, 2, math.nan, 3, 1], SHAPE, id="gap"),
    ],
)
def test_cannot_tell(curve: Sequence[float], reference: Sequence[float]) -> None:
    found = curve_similarity(np.array([curve], dtype=float), np.array([reference], dtype=float), SETTINGS)
    for numbers in (found.value, found.reversed, found.p_value, found.null):
        assert np.isnan(numbers).all()


def test_a_measure_that_cannot_be_judged_leaves_the_mean_to_the_others() -> None:
    found = curve_similarity(np.stack([SHAPE, np.ones(8)]), np.stack([SHAPE, SHAPE]), SETTINGS)
    np.testing.assert_allclose(found.value, [1, math.nan, 1])
    assert found.p_value[2] < 0.001


# What they say


def test_a_pass_that_is_the_feed_forward_model_as_a_whole() -> None:
    # The block's four values lie on the reference's curve at 0, 1/3, 2/3 and 1 of its seven layers.
    reference = np.interp(np.arange(7), [0, 2, 4, 6], [0.2, 0.9, 0.4, 0.7])
    looped = np.array([0.5, 0.5, 0.2, 0.9, 0.4, 0.7, 0.9, 0.1])
    comparison = compare(
        [
            staged_study([looped] * 5, (2, 4, 2), model="looped", trained=3),
            staged_study(reference, (7, 0, 0), model="ff"),
        ]
    )
    assert comparison.reference == "ff"
    assert at(comparison, "overall_similarity", "looped", "block", 2) == pytest.approx(1)
    assert at(comparison, "overall_p_value", "looped", "block", 2) == pytest.approx(1 / 24)
    answer = answer_of(comparison, "stages-0")
    assert (answer.outcome, answer.verdict) == (Outcome.YES, "yes, in the block alone")
    assert "in all of the first 3 passes" in answer.sentence
    assert answer_of(comparison, "drift-0").outcome is Outcome.YES


def test_outer_stages_that_prelude_and_coda_do_once() -> None:
    comparison = compare(
        [staged_study(SHAPE, model="ff"), staged_study([SHAPE] * 3, (2, 4, 2), model="looped", trained=2)]
    )
    similarity = at(comparison, "similarity", "looped", "pass")
    np.testing.assert_allclose(similarity[[0, 2, 3, 4, 5]], 1)
    assert np.isnan(similarity[1])  # no head sinks in either
    answer = answer_of(comparison, "stages-0")
    assert (answer.outcome, answer.verdict) == (Outcome.PARTLY, "once, with prelude and coda")
    assert "By themselves alike: attention concentration, mixing" in answer.sentence


def test_unlike_models_and_two_feed_forward_ones() -> None:
    comparison = compare([staged_study(SHAPE, model=name) for name in "ab"] + [staged_study(OTHER, model="c")])
    assert answer_of(comparison, "stages-0").outcome is Outcome.YES
    assert answer_of(comparison, "stages-1").verdict == "not shown"
    overview = comparison_answers(comparison)[0]
    assert (overview.key, overview.verdict) == ("overview", "1 of 2")


def test_back_to_front_is_not_alike() -> None:
    comparison = compare([staged_study(SHAPE, model="a"), staged_study(SHAPE[::-1], model="b")])
    assert at(comparison, "overall_reversed_similarity", "b", "pass") == pytest.approx(1)
    assert answer_of(comparison, "stages-0").outcome is Outcome.NO


def test_models_too_shallow_to_judge() -> None:
    comparison = compare([staged_study(SHAPE, model="a"), staged_study([0.1, 0.5, 0.2], (3, 0, 0), model="b")])
    answer = answer_of(comparison, "stages-0")
    assert answer.outcome is Outcome.CANNOT_TELL
    assert "It takes 4 layers to tell an order from chance, and b has 3" in answer.sentence


def test_drift_beyond_the_trained_recurrences() -> None:
    growing = [SHAPE * (1 + max(0, recurrence - 1)) for recurrence in range(6)]
    comparison = compare([staged_study(SHAPE, model="ff"), staged_study(growing, (0, 8, 0), model="looped", trained=2)])
    own = comparison.dataset.sel(study="looped", measure="residual magnitude")
    np.testing.assert_allclose(own["drift"], [0, 0, 1, 2, 3, 4], atol=1e-12)
    np.testing.assert_allclose(own["own_similarity"], 1)
    answer = answer_of(comparison, "drift-0")
    assert (answer.outcome, answer.verdict) == (Outcome.PARTLY, "1 of 6 measures")  # the sink rate stays 0
    assert answer.evidence["largest change of level, residual magnitude"] == pytest.approx(4)


def test_nothing_to_say_about_drift_that_was_not_measured() -> None:
    comparison = compare(
        [staged_study([SHAPE] * 2, (2, 4, 2), model=name, trained=trained) for name, trained in (("a", 2), ("b", None))]
    )
    assert answer_of(comparison, "drift-0").outcome is Outcome.NOT_APPLICABLE
    assert "does not say" in answer_of(comparison, "drift-1").sentence


def test_one_model_across_data_sets_pass_by_pass() -> None:
    passes = [SHAPE, OTHER, SHAPE + OTHER]
    studies = [
        staged_study([scale * row for row in passes], (0, 8, 0), prompts=f"data/{name}.jsonl", trained=2)
        for name, scale in (("sums", 1.0), ("same", 1.0), ("prose", 1.5))
    ]
    comparison = compare(studies)
    assert comparison.labels == ["data/sums.jsonl", "data/same.jsonl", "data/prose.jsonl"]
    assert comparison.manifest["kind"] == "data sets"
    for recurrence in range(3):
        # Against the same pass there, not against the trained one.
        assert at(comparison, "overall_similarity", "data/same.jsonl", "pass", recurrence) == pytest.approx(1)
    assert answer_of(comparison, "stages-0").verdict == "yes"
    answer = answer_of(comparison, "stages-1")
    assert answer.verdict == "the same stages, at other levels"
    assert "residual magnitude (50 %)" in answer.sentence


def test_one_model_under_several_settings_of_unlike_length() -> None:
    studies = [staged_study([SHAPE] * count, (0, 8, 0), trained=4) for count in (2, 5)]
    comparison = compare(studies)
    assert comparison.labels == ["model [1]", "model [2]"]
    assert comparison.manifest["kind"] == "settings"
    answer = answer_of(comparison, "stages-0")
    assert answer.outcome is Outcome.CANNOT_TELL
    assert "is judged at recurrence 4, and model [1] was measured up to 2" in answer.sentence


def test_what_limits_a_comparison_is_said() -> None:
    comparison = compare(
        [
            staged_study(SHAPE, model="a", prompts="one.txt"),
            staged_study(SHAPE, model="b", prompts="two.txt", without=["sink_score"]),
        ]
    )
    limits = " ".join(answer_of(comparison, "limits").limits)
    assert comparison.manifest["kind"] == "models and data sets"
    assert "b and a read different prompts" in limits
    assert "b has no sink rate" in limits


# Choices and bad input


def test_parts_that_were_skipped_leave_the_others() -> None:
    heads = ["colsum_concentration", "sink_score", "relative_mixing_score"]
    comparison = compare([staged_study(SHAPE, model="a"), staged_study(SHAPE, model="b", without=heads)])
    known = np.isfinite(at(comparison, "similarity", "b", "pass"))
    assert [name for name, there in zip(MEASURES, known, strict=True) if there] == list(MEASURES[3:])
    assert answer_of(comparison, "stages-0").outcome is Outcome.YES


def test_a_study_without_any_stage_measure_is_refused() -> None:
    names = ["colsum_concentration", "sink_score", "relative_mixing_score", "relative_residual_entropy"]
    bare = staged_study(SHAPE, model="b", without=[*names, "mean_token_norm", "massive_activation"])
    with pytest.raises(StudyError, match="b has no stage measures"):
        compare([staged_study(SHAPE, model="a"), bare])


def test_a_diverged_study_is_refused() -> None:
    study = staged_study(SHAPE, model="b")
    study.dataset["diverged_at"][:] = 3
    with pytest.raises(StudyError, match="Every prompt of the study b diverged"):
        compare([staged_study(SHAPE, model="a"), study])


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A feed-forward study and a looped one on disk."""
    studies = [staged_study(SHAPE, model="ff"), staged_study([SHAPE, OTHER], (2, 4, 2), model="looped", trained=2)]
    return [Path(str(study.save(tmp_path / f"study-{index}").folder)) for index, study in enumerate(studies)]


def test_input_that_cannot_be_compared(folders: list[Path], tmp_path: Path) -> None:
    study = Study.load(folders[0])
    running = tmp_path / "running"
    study.save(running)
    manifest = json.loads((running / "manifest.json").read_text(encoding="utf-8"))
    (running / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}), encoding="utf-8")
    for studies, message in (
        ([folders[0]], "at least two studies, got 1"),
        ([], "at least two studies, got 0"),
        ([folders[0], tmp_path / "study-1" / ".." / "study-0"], "given twice"),
        ([study, study], "given twice"),
        ([folders[0], running], "not finished"),
        ([folders[0], tmp_path / "nowhere"], "does not exist"),
    ):
        with pytest.raises(StudyError, match=message):
            compare(studies)
    with pytest.raises(StudyError, match="reference nobody names none of the studies; they are ff, looped"):
        compare(folders, reference="nobody")


@pytest.mark.parametrize("reference", ["looped", "folder"])
def test_the_reference_can_be_chosen(folders: list[Path], reference: str) -> None:
    comparison = compare(folders, reference=folders[1] if reference == "folder" else reference)
    assert comparison.reference == "looped"
    # A looped reference stands with its pass at the trained recurrence.
    expected = curve_similarity(SHAPE[None], np.concatenate([SHAPE[:2], OTHER[2:6], SHAPE[6:]])[None], SETTINGS).value[
        0
    ]
    assert at(comparison, "similarity", "ff", "pass")[0] == pytest.approx(expected)


@pytest.mark.parametrize(
    "wrong", [{"alpha": 0.0}, {"alpha": 1.0}, {"shuffles": 10}, {"seed": -1}, {"grid": 2}, {"kept_similarity": 1.5}]
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(wrong)).replace('_', '-')} must"):
        CompareSettings(**wrong)


# Files


def test_a_saved_comparison_is_the_same_again(folders: list[Path], tmp_path: Path) -> None:
    comparison = compare(folders, settings=CompareSettings(seed=3))
    comparison.save(tmp_path / "out")
    again = Comparison.load(tmp_path / "out")
    xarray.testing.assert_identical(comparison.dataset, again.dataset)
    assert again.settings == CompareSettings(seed=3)
    assert [one.to_dict() for one in comparison_answers(again)] == [
        one.to_dict() for one in comparison_answers(comparison)
    ]


def test_files_that_cannot_be_used(folders: list[Path], tmp_path: Path) -> None:
    comparison = compare(folders)
    with pytest.raises(StudyError, match="holds a study; choose another folder"):
        comparison.save(folders[0])
    with pytest.raises(StudyError, match="is not a comparison"):
        Comparison.load(folders[0])
    comparison.save(tmp_path / "out")
    manifest = tmp_path / "out" / "comparison.json"
    manifest.write_text(manifest.read_text(encoding="utf-8").replace('"alpha"', '"beta"'), encoding="utf-8")
    with pytest.raises(LoopscopeError, match="is damaged"):
        Comparison.load(tmp_path / "out")
    comparison.save(tmp_path / "out")
    (tmp_path / "out" / "comparison.nc").write_bytes(b"damaged")
    with pytest.raises(LoopscopeError, match="is damaged"):
        Comparison.load(tmp_path / "out")


def test_the_command_writes_a_folder_or_a_page(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = map(str, folders)
    main(["compare", first, second, "--out", str(tmp_path / "out"), "--seed", "1"])
    shown = capsys.readouterr().out
    assert "Does each pass of looped go through the stages of ff?" in shown
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "comparison.json",
        "comparison.nc",
        "report.html",
    ]
    assert Comparison.load(tmp_path / "out").settings.seed == 1
    main(["compare", first, second, "--reference", second, "--out", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study-0", "study-0"], "is given twice"),
        (["study-0"], "needs at least two studies, got 1"),
        (["study-0", "elsewhere"], "elsewhere does not exist"),
        (["study-0", "study-1", "--alpha", "2"], "--alpha must lie between 0 and 1"),
        (["study-0", "study-1", "--out", "study-1"], "holds a study"),
    ],
)
def test_the_command_says_what_is_wrong_in_a_sentence(
    folders: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folders[0].parent)
    with pytest.raises(SystemExit) as end:
        main(["compare", "--out", "new", *arguments])
    assert end.value.code == 2
    sentence = capsys.readouterr().err
    assert message in sentence
    assert sentence.count("\n") == 1
    assert not Path("new").exists()


# The page


def test_every_answer_leads_to_something_on_the_page(folders: list[Path], tmp_path: Path) -> None:
    comparison = compare([*folders, staged_study(OTHER, model="third")])
    page = write_comparison(comparison, tmp_path / "report.html").read_text(encoding="utf-8")
    anchors = set(re.findall(r'<(?:figure|article|section)[^>]* id="([^"]+)"', page))
    assert {answer.figure for answer in comparison_answers(comparison)} <= anchors
    assert {f"curves-{name}" for name in ("concentration", "mixing", "entropy", "magnitude", "massive")} <= anchors
    assert {"passes-1-entropy", "likeness-1-block", "likeness-1-pass", "drift-0", "own-0", "table-1-pass"} <= anchors


def test_the_table_shows_the_null_beside_each_number(tmp_path: Path) -> None:
    comparison = compare([staged_study(SHAPE, model="a"), staged_study(SHAPE, model="b")])
    page = write_comparison(comparison, tmp_path / "report.html").read_text(encoding="utf-8")
    rows = {
        cells[0]: cells[1:]
        for row in re.findall(r"<tr>(.*?)</tr>", page)
        if (cells := re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row))
    }
    assert rows["mixing"][0] == "1.00"
    assert rows["mixing"][3:] == ["below 0.001", "alike", "0 %"]
    assert rows["sink rate"] == ["–", "–", "–", "–", "cannot tell", "0 %"]


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    hostile = '<script>alert(1)</script><img src=x onerror="alert(2)">'
    comparison = compare([staged_study(SHAPE, model=hostile), staged_study([SHAPE] * 2, (2, 4, 2), model="b")])
    page = write_comparison(comparison, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "<img src=x" not in page
