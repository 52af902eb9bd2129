"""Distance to one's own later state, and remaining path against margin, on studies whose numbers are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loopscope import AnalyzeSettings, Study, analyze, quick_answers
from loopscope.answers.answer import Answer, Criterion, Outcome
from loopscope.answers.criteria import sensitivity
from loopscope.models.subject import Batch
from loopscope.models.trace import capture
from small_models import PROMPTS, subject
from synthetic_study import contracting, looped_study


def answer_of(study: Study) -> Answer:
    return next(answer for answer in quick_answers(study) if answer.key == "criteria")


def study_of(path: float, margin: float, *, distance: float | None = None) -> Study:
    """A contraction that has arrived; the margin of each token changes by 0.4 per length on its way."""
    study = looped_study(contracting(rate=0.6), prompts=4)
    data = study.dataset.copy(deep=True)
    counts = data["readout_recurrence"].values
    step = data["token_successive_difference"].isel(site=-1).transpose("recurrence", "prompt", "token").values
    margins = np.full((len(counts), 4, 10), margin)
    # Readouts are after 1, 2, 3, 4, 8, ... recurrences.
    margins[0] += 0.4 * step[1]
    data["token_margin"] = ("readout_recurrence", "prompt", "token"), margins
    data["remaining_path"] = ("prompt", "token"), np.full((4, 10), path)
    if distance is not None:
        data["token_distance_to_horizon"][...] = distance
        data["token_relative_distance"][...] = distance
    return Study(data, study.manifest, study.tokens)


def test_the_margin_changes_by_as_much_as_was_seen() -> None:
    np.testing.assert_allclose(sensitivity(study_of(0.1, 1.0).dataset, Criterion()), 0.4, rtol=1e-4)


@pytest.mark.parametrize(
    ("path", "margin", "distance", "near", "safe", "reason"),
    [
        (1e-6, 1.0, None, 1, 1, None),
        (3.0, 1.0, None, 1, 0, "near_but_winding_path"),
        (2e-6, 4e-7, 1e-7, 1, 0, "near_but_path_of_rounding"),
        (2e-3, 1e-7, 1e-3, 1, 0, "near_but_close_to_a_tie"),
        (0.6, 1.0, 0.5, 0, 1, None),
        (9.0, 1.0, 0.5, 0, 0, None),
    ],
)
def test_the_criteria_part_for_a_reason_that_is_named(
    path: float, margin: float, distance: float | None, near: int, safe: int, reason: str | None
) -> None:
    answer = answer_of(study_of(path, margin, distance=distance))
    assert (answer.evidence["near_by_distance"], answer.evidence["safe_by_remaining_path"]) == (near, safe)
    assert answer.outcome is (Outcome.YES if near == safe else Outcome.NO)
    assert answer.evidence["tokens_judged"] == 40
    for name in ("near_but_close_to_a_tie", "near_but_path_of_rounding", "near_but_winding_path"):
        assert answer.evidence[name] == (40 if name == reason else 0)


def test_the_level_is_that_of_rounding_where_that_is_more() -> None:
    study = study_of(1e-6, 1.0)
    data = study.dataset.copy(deep=True)
    data["token_relative_distance"][...] = 0.05
    answer = answer_of(Study(data, study.manifest, study.tokens))
    assert (answer.evidence["near_by_distance"], answer.evidence["level"]) == (0, 0.01)
    data["noise_floor"][...] = 0.02
    answer = answer_of(Study(data.drop_vars("twin_floor", errors="ignore"), study.manifest, study.tokens))
    assert answer.evidence["near_by_distance"] == 1
    assert answer.evidence["level"] == pytest.approx(3 * 0.02)
    assert "forced the level up from 1.0 % to 6.0 %" in answer.limits[-1]


def test_without_path_or_margin_or_way_to_the_horizon_nothing_is_said() -> None:
    assert answer_of(looped_study(contracting())).outcome is Outcome.NOT_APPLICABLE
    whole = analyze(subject(std=0.1), PROMPTS, settings=AnalyzeSettings(recurrences=8, horizon=8, skip=("heads",)))
    assert "by construction" in answer_of(whole).sentence


def test_a_real_study_has_the_path_and_the_margin_of_its_states() -> None:
    model = subject(std=0.1, dtype=torch.float64)
    settings = AnalyzeSettings(recurrences=6, horizon=16, skip=("heads", "maps", "behaviour", "stages", "neurons"))
    study = analyze(model, PROMPTS[:1], settings=settings)
    trace = capture(model, PROMPTS[:1], recurrences=16, attention=False)
    states = torch.stack([trace.loop_state(index)[0] for index in range(1, 17)])
    steps = (states[1:] - states[:-1]).norm(dim=-1)
    path = study.dataset["remaining_path"].values[0]
    np.testing.assert_allclose(path, steps[5:].sum(0), rtol=1e-8)
    away = study.dataset["token_distance_to_horizon"].isel(site=-1, recurrence=-1).values[0]
    np.testing.assert_allclose(away, (states[5] - states[15]).norm(dim=-1), rtol=1e-5)
    assert (path >= away * (1 - 1e-6)).all()
    logits = model.start(Batch.of(PROMPTS[:1]), recurrences=6).decode(state=states[5:6])[0]
    largest, following = logits.topk(2).values.unbind(-1)
    np.testing.assert_allclose(study.dataset["token_margin"].values[-1, 0], largest - following, rtol=1e-5, atol=1e-6)
    assert answer_of(study).evidence["tokens_judged"] == len(PROMPTS[0])
