"""What a comparison takes, refuses, writes and shows."""

from __future__ import annotations

import csv
import io
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray

from loopscope import Comparison, analyze, compare, quick_answers, side_by_side, write_comparison
from loopscope.analysis.settings import parts_except
from loopscope.answers.answer import Outcome
from loopscope.answers.comparison.curves import MEASURES
from loopscope.answers.comparison.findings import comparison_answers
from loopscope.answers.comparison.null import curve_similarity
from loopscope.answers.comparison.settings import CompareSettings
from loopscope.answers.comparison.side_by_side import training_steps
from loopscope.cli import main
from loopscope.errors import ConfigError, LoopscopeError, StudyError
from loopscope.report.figures.comparison import COMPARED
from loopscope.report.figures.plot import Line
from loopscope.report.figures.write import draw_figure
from loopscope.report.settings import ReportSettings
from loopscope.study import Study, read_manifest, write_manifest
from staged_study import OTHER, SHAPE, answer_of, at, staged_study

SETTINGS = CompareSettings()


@cache
def demo_study(intervene: tuple[str, ...] = ()) -> Study:
    text = "Ann has 3 apples and buys 4 more."
    skip = parts_except("readout", "stages", "noise-floor")
    return analyze("demo:injected", [text], recurrences=8, horizon=32, skip=skip, intervene=intervene, threads=1)


def test_parts_that_were_skipped_leave_the_others() -> None:
    heads = ["colsum_concentration", "sink_score", "relative_mixing_score"]
    comparison = compare([staged_study(SHAPE, model="a"), staged_study(SHAPE, model="b", without=heads)])
    known = np.isfinite(at(comparison, "similarity", "b", "pass"))
    assert [name for name, there in zip(MEASURES, known, strict=True) if there] == list(MEASURES[3:])
    assert answer_of(comparison, "stages-0").outcome is Outcome.YES


@pytest.mark.parametrize("what", ["skipped", "diverged"])
def test_a_study_without_stages_has_answers_beside_the_others(what: str) -> None:
    names = ["colsum_concentration", "sink_score", "relative_mixing_score", "relative_residual_entropy"]
    missing = [*names, "mean_token_norm", "massive_activation"] if what == "skipped" else []
    bare = staged_study([SHAPE, OTHER], (2, 4, 2), model="b", without=missing)
    if what == "diverged":
        bare.dataset["diverged_at"][:] = 3
    comparison = compare([staged_study(SHAPE, model="a"), bare])
    assert answer_of(comparison, "stages-0").outcome is Outcome.CANNOT_TELL
    known = {answer.key: answer.verdict for answer in quick_answers(bare)}
    assert {key: cell.verdict for key, cell in comparison.cells("b").items()}.items() <= known.items()
    assert "b has no attention concentration" in answer_of(comparison, "limits").sentence


def test_answers_stand_side_by_side_with_what_differs(tmp_path: Path) -> None:
    turning = demo_study(intervene=("attention:recurrent.*=6",))
    comparison = compare([demo_study(), turning])
    label = "demo:injected with attention:recurrent.*=6"
    assert comparison.labels == ["demo:injected", label]
    table = side_by_side(comparison)
    assert table.differing == ["interventions"]
    question, (still, moving) = table.rows["fixed_point"]
    assert question == "Does it settle?"
    assert still is not None
    assert moving is not None
    assert (still.verdict, moving.verdict) == ("yes", "no")
    answer = answer_of(comparison, "stages-0")
    assert answer.outcome is not Outcome.YES
    assert "it was changed while it ran (attention:recurrent.*=6)" in answer.sentence
    limits = answer_of(comparison, "limits").sentence
    assert f"{label} has 1 prompt: what all of them show may still fail for up to 80 %" in limits

    again = side_by_side(Comparison.load(str(comparison.save(tmp_path).folder)))
    assert again == table
    rows = list(csv.reader(io.StringIO(table.to_csv())))
    assert rows[0] == ["question", "demo:injected", "demo:injected: value", label, f"{label}: value"]
    losses = {row[0]: float(row[2]) for row in rows if row[0].startswith("Loss after")}
    means = demo_study().dataset["loss"].mean("prompt").sel(readout_recurrence=[1, 4, 8])
    np.testing.assert_allclose([losses[f"Loss after {count}"] for count in (1, 4, 8)], means, rtol=1e-6)
    latex = table.to_latex()
    assert r"recurrent.*=6" in latex
    assert r"100 \%" in latex
    assert latex.count(r"\\") == 1 + len(table.heads) + len(table.rows)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A feed-forward study and a looped one on disk."""
    studies = [staged_study(SHAPE, model="ff"), staged_study([SHAPE, OTHER], (2, 4, 2), model="looped", trained=2)]
    return [Path(str(study.save(tmp_path / f"study-{index}").folder)) for index, study in enumerate(studies)]


def test_input_that_cannot_be_compared(folders: list[Path], tmp_path: Path) -> None:
    study = Study.load(folders[0])
    running = tmp_path / "running"
    study.save(running)
    write_manifest(running, {**read_manifest(running), "status": "running"})
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
        "answers.csv",
        "answers.tex",
        "comparison.json",
        "comparison.nc",
        "report.html",
    ]
    assert "Does it settle?" in shown
    assert Comparison.load(tmp_path / "out").settings.seed == 1
    main(["compare", first, second, "--reference", second, "--out", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study-0", "study-0"], "is given twice"),
        (["study-0"], "needs at least two studies, got 1"),
        (["study-0", "elsewhere"], "elsewhere does not exist"),
        (["study-0", "study-1", "--alpha", "2"], "--alpha must be below 1, got 2.0"),
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
    anchors = set(re.findall(r'<(?:figure|article|section|div)[^>]* id="([^"]+)"', page))
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
    assert rows["mixing"][4:] == ["below 0.001", "alike", "0\u00a0%"]
    assert rows["sink rate"] == ["–", "–", "–", "–", "–", "cannot tell", "0\u00a0%"]


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    hostile = '<script>alert(1)</script><img src=x onerror="alert(2)">'
    comparison = compare([staged_study(SHAPE, model=hostile), staged_study([SHAPE] * 2, (2, 4, 2), model="b")])
    page = write_comparison(comparison, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "<img src=x" not in page


def test_checkpoints_of_one_run_have_a_curve_over_training(tmp_path: Path) -> None:
    def checkpoint(step: int) -> Study:
        study = demo_study()
        model = {**study.manifest["model"], "name": f"run/step-{step}", "weights_sha256": str(step)}
        return Study(study.dataset, {**study.manifest, "model": model}, study.tokens)

    comparison = compare([checkpoint(step) for step in (900, 20, 100)])
    assert training_steps(comparison) == [900, 20, 100]
    (figure,) = [each for each in COMPARED if each.name == "over-training"]
    losses = next(p for p in figure.draw(comparison, ReportSettings()).panels if p.title == "Loss after the last")
    (line,) = losses.marks
    assert isinstance(line, Line)
    np.testing.assert_array_equal(line.x, [20, 100, 900])
    np.testing.assert_allclose(line.y, float(demo_study().dataset["loss"].mean("prompt")[-1]), rtol=1e-6)
    assert len(draw_figure(comparison, "over-training").axes) > 5
    page = write_comparison(comparison, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "How do the answers change over training?" in page
    others = compare([demo_study(), checkpoint(3)])
    assert figure.absent(others) == "the studies are not checkpoints of one run, named after their steps"


def test_studies_without_stages_have_a_page(tmp_path: Path) -> None:
    names = ["colsum_concentration", "sink_score", "relative_mixing_score", "relative_residual_entropy"]
    bare = [
        staged_study(SHAPE, model=model, without=[*names, "mean_token_norm", "massive_activation"]) for model in "ab"
    ]
    page = write_comparison(compare(bare), tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Side by side" in page
