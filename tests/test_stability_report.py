"""What answers and report say of a study's eigenvalues."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.container import ErrorbarContainer

from loopscope import AnalyzeSettings, Study, analyze, quick_answers
from loopscope.answers.answer import Answer, Outcome
from loopscope.answers.predictions import EXPECTED, agreement, prediction_table, rate_pairs
from loopscope.dynamics.prediction import PREDICTED_KINDS
from loopscope.dynamics.prediction import PredictedKind as Predicted
from loopscope.dynamics.verdicts import KINDS
from loopscope.dynamics.verdicts import Kind as Verdict
from loopscope.errors import StudyError
from loopscope.report.figures.write import draw_figure
from report_page import page_of
from small_models import PROMPTS, linear_loop, relaxation
from test_stability_study import rotation

SETTINGS = AnalyzeSettings(
    recurrences=8, horizon=32, track=(), judged_layers="last", skip=("heads", "maps", "readout", "stages", "neurons")
)
TOKENS = sum(map(len, PROMPTS))


def study_of(model: Any, **changes: Any) -> Study:
    return analyze(model, PROMPTS, settings=SETTINGS, **changes)


def answer_of(study: Study) -> Answer:
    return next(answer for answer in quick_answers(study) if answer.key == "stability")


@pytest.fixture(scope="module")
def settles() -> Study:
    return study_of(relaxation(0.6))


@pytest.fixture(scope="module")
def turns() -> Study:
    return study_of(linear_loop(*rotation(5.0)))


def test_a_stable_fixed_point(settles: Study) -> None:
    answer = answer_of(settles)
    assert (answer.outcome, answer.verdict) == (Outcome.YES, "yes, all")
    assert answer.evidence["predicted_rate_largest"] == pytest.approx(0.6, rel=1e-6)
    assert answer.evidence["smallest_stability_margin"] == pytest.approx(0.4, rel=1e-5)
    assert answer.evidence["predicted_minus_observed_median_absolute"] == pytest.approx(0, abs=1e-5)
    assert f"{TOKENS} of {TOKENS} verdicts confirm the prediction" in answer.sentence


def test_disturbances_that_grow_before_they_shrink_are_told(settles: Study) -> None:
    assert "can grow first" not in answer_of(settles).sentence
    assert answer_of(settles).evidence["transient_growth_largest"] == pytest.approx(0.6, rel=1e-6)
    # s -> A s + (1 - A) e with A of radius 0.6, in which pairs of entries feed each other.
    coupled = torch.block_diag(*[torch.tensor([[0.6, 5.0], [0.0, 0.6]])] * 8)
    study = study_of(linear_loop(coupled, torch.eye(16) - coupled))
    answer = answer_of(study)
    assert (answer.outcome, answer.verdict) == (Outcome.YES, "yes, all")
    largest = max(float(torch.linalg.matrix_norm(torch.matrix_power(coupled, k), 2)) for k in (1, 2, 4, 8))
    assert answer.evidence["transient_growth_largest"] == pytest.approx(largest, rel=1e-4)
    assert "small disturbances can grow first, by a factor of at least 6" in answer.sentence
    powers = sum(float(torch.matrix_power(coupled, k).square().sum()) for k in range(99))
    assert answer.evidence["noise_gain_median"] == pytest.approx((powers / 16) ** 0.5, rel=1e-6)
    older = Study(study.dataset.drop_vars(["transient_growth", "noise_gain"]), study.manifest, study.tokens)
    assert "can grow first" not in answer_of(older).sentence


def test_rates_that_show_the_transient_are_said_to(settles: Study) -> None:
    assert not any("Observed rates lie" in limit for limit in answer_of(settles).limits)
    assert "within their uncertainty for 100 % of" in answer_of(settles).sentence.replace("\u00a0", " ")
    data = settles.dataset.assign(observed_rate=settles.dataset["observed_rate"] + 0.05)
    answer = answer_of(dataclasses.replace(settles, dataset=data))
    assert any("Observed rates lie 0.050 above the predicted ones" in limit for limit in answer.limits)


def test_a_fixed_point_that_repels(turns: Study) -> None:
    answer = answer_of(turns)
    assert (answer.outcome, answer.verdict) == (Outcome.NO, "no")
    assert "repels with rotation" in answer.sentence
    assert answer.evidence["verdicts_that_agree"] == f"{TOKENS}, 0 do not, 0 open"


def test_an_approach_to_a_point_that_repels_is_undecided(turns: Study) -> None:
    data = turns.dataset
    numbers = {"verdict": Verdict.FIXED_POINT.code, "verdict_level": 1e-3, "verdict_floor": 1e-7}
    seems = dataclasses.replace(turns, dataset=data.assign({name: 0 * data[name] + at for name, at in numbers.items()}))
    behaviour = next(answer for answer in quick_answers(seems) if answer.key == "behaviour")
    assert behaviour.outcome is Outcome.CANNOT_TELL
    assert any(f"{TOKENS} tokens seem to approach a point" in limit for limit in behaviour.limits)
    rests = dataclasses.replace(seems, dataset=seems.dataset.assign(verdict_level=seems.dataset["verdict_floor"]))
    assert next(answer for answer in quick_answers(rests) if answer.key == "behaviour").verdict == "all settle"


@pytest.mark.parametrize("period", [5.0, 2.0, None])
def test_a_slow_approach_is_on_the_edge_and_does_not_repel(period: float | None) -> None:
    study = study_of(relaxation(0.985) if period is None else linear_loop(*rotation(period, 0.985)))
    answer, agreed = answer_of(study), agreement(prediction_table(study.dataset))
    assert (answer.outcome, answer.verdict) == (Outcome.CANNOT_TELL, "on the edge of stability")
    assert "indistinguishable from 1" in answer.sentence
    assert "repels" not in answer.sentence
    assert agreed.disagree == 0
    settled = next(answer for answer in quick_answers(study) if answer.key == "behaviour")
    assert settled.verdict == "all settle"
    assert "contradicted" not in answer.verdict


def test_where_there_is_no_fixed_point_it_cannot_be_told() -> None:
    # s -> s + e goes on for ever: in steps of a share of the state that is above the tolerance to begin with.
    answer = answer_of(study_of(linear_loop(torch.eye(16), torch.eye(16)), horizon=16, eigenvalue_search=4))
    assert answer.outcome is Outcome.CANNOT_TELL
    assert any("no fixed point was found" in limit for limit in answer.limits)


def test_one_token_stands_where_two_stand() -> None:
    one = analyze(relaxation(0.5), [[3]], settings=SETTINGS)
    assert "1 of 1 tokens (100 %) stands at" in answer_of(one).sentence


@pytest.mark.parametrize("skip", ["stability", "behaviour"])
def test_skipped_parts_are_not_measured(skip: str, tmp_path: Path) -> None:
    study = study_of(relaxation(0.6), skip=(*SETTINGS.skip, skip), judged_layers="all")
    answer, figures = answer_of(study), page_of(study, tmp_path).figures
    if skip == "stability":
        assert answer.outcome is Outcome.NOT_APPLICABLE
        told = "No eigenvalues were taken: the analysis was told to leave it out (--skip stability)."
        assert answer.sentence == told
        assert not [name for name in figures if name.startswith("stability")]
        with pytest.raises(StudyError, match="no eigenvalues"):
            rate_pairs(study.dataset)
    else:
        assert "verdicts" not in answer.sentence
        assert "stability-agreement" not in figures
        assert "stability-rates" in figures
        with pytest.raises(StudyError, match="no verdicts"):
            prediction_table(study.dataset)


def test_every_prediction_that_says_something_has_its_verdicts() -> None:
    assert set(EXPECTED) == set(Predicted) - {Predicted.FAR, Predicted.UNRESOLVED}
    table = np.zeros((len(PREDICTED_KINDS), len(KINDS)), dtype=np.int64)
    table[PREDICTED_KINDS.index(Predicted.ORBIT), KINDS.index(Verdict.ORBIT)] = 5
    table[PREDICTED_KINDS.index(Predicted.ORBIT), KINDS.index(Verdict.UNKNOWN)] = 2
    table[PREDICTED_KINDS.index(Predicted.FIXED_POINT), KINDS.index(Verdict.ORBIT)] = 3
    table[PREDICTED_KINDS.index(Predicted.FAR), KINDS.index(Verdict.ORBIT)] = 4
    found = agreement(table)
    assert (found.agree, found.disagree, found.open) == (5, 3, 6)


def test_the_section_shows_a_point_for_each_token(settles: Study, turns: Study, tmp_path: Path) -> None:
    page = page_of(settles, tmp_path)
    names = ("rates", "spectrum", "agreement", "radii", "growth", "damping")
    assert {f"stability-{name}" for name in names} <= page.anchors
    assert f"The verdicts confirm the predictions of all {TOKENS} tokens." in page.words
    points = [trace for trace in page.figures["stability-rates"]["data"] if trace["mode"] == "markers"]
    assert sum(len(trace["text"]) for trace in points) == TOKENS
    spectrum = page_of(turns, tmp_path).figures["stability-spectrum"]["data"]
    circle, orbits = spectrum[0], next(trace for trace in spectrum if trace["name"] == "orbit")
    assert circle["name"] == "modulus 1"
    assert len(orbits["text"]) == 2 * TOKENS  # with the conjugates


def test_papers_get_the_same_figures(settles: Study) -> None:
    (axes,) = draw_figure(settles, "stability-rates").axes
    pairs = rate_pairs(settles.dataset)
    (points,) = axes.containers
    assert isinstance(points, ErrorbarContainer)
    np.testing.assert_allclose(np.asarray(points.lines[0].get_xdata()), pairs.predicted)
    np.testing.assert_allclose(np.asarray(points.lines[0].get_ydata()), pairs.observed)
    for name in ("spectrum", "agreement", "radii", "growth", "damping"):
        assert len(draw_figure(settles, f"stability-{name}").axes) == 1


def test_a_token_of_the_panel_has_its_eigenvalues(turns: Study, tmp_path: Path) -> None:
    page = page_of(turns, tmp_path)
    panel = next(attributes for attributes, _ in page.scripts if attributes.get("id") == "token-panel")
    assert panel["data-eigenvalues"] == "there"
