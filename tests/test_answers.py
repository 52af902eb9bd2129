"""Quick answers on studies whose story is known."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import xarray
from hypothesis import given
from hypothesis import strategies as st

from loopscope._util.statistics import Share, paired_difference, wilson_interval
from loopscope._util.wording import percent, significant, spans
from loopscope.answers.answer import Answer, Criterion, Outcome
from loopscope.answers.quick import quick_answers
from loopscope.answers.readout import final_from
from loopscope.answers.settled import arrival
from loopscope.answers.stages import repetition
from loopscope.errors import ConfigError, StudyError
from loopscope.study import Study
from synthetic_study import (
    Trajectory,
    circling,
    contracting,
    feed_forward_study,
    growing,
    looped_study,
    orbiting,
    overflowing,
    sliding,
)


def answers(study: Study, criterion: Criterion | None = None) -> dict[str, Answer]:
    return {answer.key: answer for answer in quick_answers(study, criterion)}


def test_contraction_is_a_fixed_point_of_its_own_for_each_layer() -> None:
    found = answers(looped_study(contracting(rate=0.6)))
    assert found["fixed_point"].outcome is Outcome.YES
    assert "40 of 40 prompts (95 % interval 91–100 %)" in found["fixed_point"].sentence
    assert "at the noise floor of float32 (1.0e-7)" in found["fixed_point"].sentence
    assert found["fixed_point"].evidence["layers 0–2"] == "fixed point (40 of 40 prompts)"
    assert found["points"].verdict == "one per layer"
    # The distance after t recurrences is 0.6^t: within 1 % from the 10th on.
    assert found["arrival"].evidence["recurrences_median"] == 10
    assert "the same for all" in found["arrival"].sentence
    assert found["trained_depth"].verdict == "no, still moving"
    assert found["trained_depth"].evidence["relative_distance_at_trained"] == pytest.approx(0.6**4, rel=1e-3)
    assert found["initial_state"].outcome is Outcome.YES
    assert found["limits"].verdict == "little"


def test_the_answer_is_final_where_the_top_tokens_stay() -> None:
    found = answers(looped_study(contracting()))["final"]
    assert found.outcome is Outcome.YES
    assert found.verdict == "after 4"
    assert found.evidence["tokens_final_after_2"] == 0
    assert found.evidence["tokens_final_after_4"] == 1
    assert found.evidence["kl_to_last_after_4"] == pytest.approx(0.5**4)
    study = looped_study(contracting())
    study.dataset["token_top1"][-1] = 9  # the last readout changes every answer
    found = answers(study)["final"]
    assert found.outcome is Outcome.NO
    assert found.verdict == "not before 16"


def test_a_token_is_final_from_where_it_never_changes_again() -> None:
    top = np.array([[1, 1, 1, 2], [2, 1, 3, 2], [1, 1, 1, 2], [1, 1, 1, 5]])
    assert final_from(top).tolist() == [2, 0, 2, 3]


def test_heads_that_settle_are_counted_and_the_most_restless_is_named() -> None:
    found = answers(looped_study(contracting()))["heads"]
    assert found.outcome is Outcome.YES
    assert found.evidence["recurrences_median"] == 7
    assert found.evidence["threshold"] == 0.01
    study = looped_study(contracting())
    restless = study.dataset["head_stable_from"].copy()
    restless[1, 0] = np.nan  # one head of six
    study.dataset["head_stable_from"] = restless
    study.dataset["attention_change"][1, :, 0] = 0.7
    found = answers(study)["heads"]
    assert found.outcome is Outcome.PARTLY
    assert found.evidence["share_of_heads_stable"] == pytest.approx(5 / 6)
    assert found.evidence["most_restless"] == "layer 1, head 0"
    study.dataset["head_stable_from"] = restless * np.nan
    assert answers(study)["heads"].outcome is Outcome.NO


def test_stages_repeat_where_the_layer_decides() -> None:
    study = looped_study(contracting())  # its stages are drawn at random
    found = answers(study)["stages"]
    assert found.outcome is not Outcome.YES
    recurrent = study.dataset["depth_stage"] == "recurrent"
    profile = np.array([0.2, 0.9, 0.4])[study.dataset["depth_layer"].values]
    for name in ("colsum_concentration", "relative_mixing_score", "relative_residual_entropy", "mean_token_norm"):
        values = study.dataset[name]
        shaped = xarray.DataArray(profile, dims="depth").broadcast_like(values)
        study.dataset[name] = values.where(~recurrent, shaped.transpose(*values.dims))
    found = answers(study)["stages"]
    assert found.outcome is Outcome.YES
    assert found.evidence["repetition of mixing"] == pytest.approx(1)


def test_repetition_is_the_share_of_variance_that_goes_with_the_layer() -> None:
    rng = np.random.default_rng(0)
    assert repetition(np.tile([1.0, 3.0, 2.0], (8, 1))) == pytest.approx(1)
    assert repetition(np.tile(np.arange(8.0)[:, None], (1, 3))) == pytest.approx(0)
    chance = [repetition(rng.normal(size=(32, 4))) for _ in range(200)]
    assert np.mean(chance) == pytest.approx(3 / 127, abs=0.005)
    assert math.isnan(repetition(np.full((8, 3), 0.1)))
    # Half of the variance: layers at +-1, passes at +-1.
    assert repetition(np.array([[0.0, 2.0], [-2.0, 0.0]])) == pytest.approx(0.5)


def test_growing_norm_is_convergence_in_direction_only_and_to_one_shared_direction() -> None:
    found = answers(looped_study(growing, horizon=64, injection="none"))
    assert found["fixed_point"].verdict == "in direction only"
    growth = (3 + 128) / (3 + 64)
    assert found["fixed_point"].evidence["norm_growth_between_horizons"] == pytest.approx(growth, rel=1e-3)
    assert "1.96-fold" in found["fixed_point"].sentence
    assert found["points"].verdict == "all share the same one"
    assert found["arrival"].outcome is Outcome.NOT_APPLICABLE
    assert found["initial_state"].outcome is Outcome.NOT_APPLICABLE


@pytest.mark.parametrize(
    ("cosine", "unrelated", "verdict"),
    [
        (0.9995, 0.0, "all share the same one"),
        (0.995, 0.0, "one per layer"),
        (0.9995, 0.97, "one per layer"),  # near, in a model whose states all point nearly one way
        (0.9995, None, "all share the same one"),  # of prompts of one token, or by an older version
        (0.99999, 0.9999, "cannot tell"),
    ],
)
def test_layers_share_a_point_if_they_are_nearer_than_unrelated_tokens(
    cosine: float, unrelated: float | None, verdict: str
) -> None:
    study = looped_study(contracting(rate=0.6))
    alike = xarray.full_like(study.dataset["degeneracy"], cosine)
    data = study.dataset.assign(degeneracy=alike).drop_vars("unrelated_degeneracy")
    if unrelated is not None:
        data["unrelated_degeneracy"] = xarray.full_like(alike, unrelated)
    found = answers(dataclasses.replace(study, dataset=data))["points"]
    assert found.verdict == verdict
    assert ("cosine 0 is assumed" in " ".join(found.limits)) == (unrelated is None)


def test_orbit_is_no_fixed_point() -> None:
    found = answers(looped_study(orbiting))
    assert found["fixed_point"].outcome is Outcome.NO
    assert found["points"].verdict == "no points"
    assert found["arrival"].outcome is Outcome.NOT_APPLICABLE
    assert found["trained_depth"].verdict == "no, still moving"
    assert found["initial_state"].outcome is Outcome.NO


def test_orbit_whose_period_divides_the_horizon_is_not_taken_for_a_fixed_point() -> None:
    def period_four(time: np.ndarray, points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        turn = np.pi / 2 * time
        return np.asarray(points + 0.3 * (np.cos(turn) * points[::-1] + np.sin(turn) * np.roll(points, 1, axis=-1)))

    study = looped_study(period_four, horizon=32)
    assert study.dataset["horizon_drift"].max() < 1e-6  # the same state at both horizons
    found = answers(study)["fixed_point"]
    assert found.outcome is Outcome.NO
    assert "it comes back" in found.sentence


def test_what_one_recurrence_cannot_show_is_not_told() -> None:
    found = answers(looped_study(contracting(rate=0.6), recurrences=1))
    assert found["initial_state"].outcome is Outcome.CANNOT_TELL
    assert "After 1 recurrence two" in found["initial_state"].sentence


def test_no_loss_is_quoted_where_there_is_none() -> None:
    found = answers(looped_study(contracting(rate=0.6), loss=lambda count: np.full_like(count, np.nan)))
    assert "loss" not in found["trained_depth"].sentence


def test_slide_whose_norm_grows_is_not_taken_for_slowing_down() -> None:
    def sliding(time: np.ndarray, points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        aside = np.roll(points, 1, axis=-1)
        aside = aside - (aside * points).sum(-1, keepdims=True) * points
        return np.asarray(points + 0.02 * time * aside / np.linalg.norm(aside, axis=-1, keepdims=True))

    study = looped_study(sliding)
    steps = study.dataset["horizon_relative_step"].mean(("layer", "prompt"))
    assert steps.sel(horizon="second") < 0.75 * steps.sel(horizon="first")  # steps of equal length, larger norm
    assert answers(study)["fixed_point"].outcome is Outcome.NO


def test_norm_that_converges_slowly_is_not_taken_for_one_that_grows_on() -> None:
    def filling(time: np.ndarray, points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.asarray(points * (1 - 0.5 * 0.95**time))

    study = looped_study(filling)
    assert study.dataset["horizon_norm_growth"].min() > 1.05
    assert answers(study)["fixed_point"].outcome is Outcome.NOT_YET


def test_slow_contraction_is_not_there_yet() -> None:
    found = answers(looped_study(contracting(rate=0.96)))
    assert found["fixed_point"].outcome is Outcome.NOT_YET
    assert "faster than 1/t" in found["fixed_point"].sentence
    assert found["points"].outcome is Outcome.CANNOT_TELL
    assert found["arrival"].outcome is Outcome.NOT_APPLICABLE
    assert found["limits"].verdict == "the horizon"
    few = answers(looped_study(contracting(rate=0.96), prompts=1, trained=20))["limits"]
    assert few.verdict == "the horizon and the number of prompts"
    assert few.sentence == f"{few.limits[0]} {few.limits[2]}"
    # The runs from two initial states approach each other, but have not met.
    assert found["initial_state"].verdict == "not yet"


@pytest.mark.parametrize(("noise", "said"), [(0.0, "it stands still at 64"), (1e-8, "its steps are rounding alone")])
def test_a_state_that_stops_beyond_the_horizon_does_not_still_move(noise: float, said: str) -> None:
    def stopping(time: np.ndarray, points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        states = sliding(1e-3)(np.minimum(time, 50), points, rng)
        return np.asarray(states + noise * rng.normal(size=states.shape))

    given = answers(looped_study(stopping, prompts=4))
    found, limits = given["fixed_point"], given["limits"]
    assert "4 of 4 prompts came to rest only after recurrence 32" in limits.sentence
    assert (found.outcome, found.verdict) == (Outcome.NOT_YET, "not by 32")
    assert found.sentence.startswith("Not by recurrence 32, where the state still moved, but ")
    assert said in found.sentence


def test_rounding_of_a_coarse_type_is_its_own_finding() -> None:
    found = answers(looped_study(contracting(noise=0.02), floor=0.02, dtype="bfloat16"))
    assert found["fixed_point"].verdict == "to within rounding"
    assert found["fixed_point"].outcome is Outcome.PARTLY
    assert "bfloat16" in found["fixed_point"].sentence
    assert found["arrival"].evidence["level"] == pytest.approx(0.06)
    assert found["limits"].verdict == "rounding"
    # The same states without rounding to blame are a model that keeps moving.
    assert answers(looped_study(contracting(noise=0.02)))["fixed_point"].outcome is Outcome.NO


def test_few_restless_tokens_are_not_hidden_by_the_mean() -> None:
    def one_slow(time: np.ndarray, points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        quick, slow = (contracting(rate)(time, points, rng) for rate in (0.6, 0.91))
        return np.concatenate([slow[:, :, :1], quick[:, :, 1:]], axis=2)

    study = looped_study(one_slow, tokens=6)
    assert study.dataset["horizon_drift"].max() < 0.01  # that of the token is 5 %
    answer = answers(study)["fixed_point"]
    assert answer.verdict == "on average, not every token"
    assert answer.outcome is Outcome.PARTLY
    assert answer.sentence.startswith("On average every layer's state stops")
    assert "only 83 % of the tokens settle individually" in answer.sentence


@pytest.mark.parametrize(
    ("fate", "outcome"),
    [
        (sliding(5e-5), Outcome.NO),  # 0.2 % of the norm between the horizons
        (sliding(5e-8), Outcome.NO),  # by less than one rounding a recurrence, but always the same way
        (sliding(1e-3, slowing=True), Outcome.CANNOT_TELL),  # steps like 1/t have no limit, but fall
        (circling(1e-3), Outcome.CANNOT_TELL),  # may be rounding that the model amplifies
    ],
)
def test_small_motion_that_does_not_stop_is_no_fixed_point(fate: Trajectory, outcome: Outcome) -> None:
    study = looped_study(fate, prompts=4, trained=20)
    assert study.dataset["horizon_drift"].max() < 0.01
    found = answers(study)
    assert found["fixed_point"].outcome is outcome
    assert found["points"].outcome is not Outcome.YES
    assert found["arrival"].outcome is Outcome.NOT_APPLICABLE
    assert found["trained_depth"].outcome is outcome


@pytest.mark.parametrize(
    ("fates", "verdict", "points"),
    [
        # Seven that keep moving and one that may be on its way do not disagree.
        ([*[orbiting] * 7, contracting(0.96)], "no; some prompts undecided", "not settled yet"),
        ([*[contracting()] * 7, contracting(0.96)], "yes; some prompts undecided", "one per layer, where it settles"),
        ([contracting(), *[contracting(0.96)] * 3], "not yet", "one per layer, where it settles"),
        ([orbiting, overflowing], "no", "no points"),
        ([contracting(), orbiting], "depends on the prompt", "one per layer, where it settles"),
    ],
)
def test_a_prompt_that_cannot_be_told_is_no_disagreement(fates: list[Trajectory], verdict: str, points: str) -> None:
    found = answers(looped_study(fates, prompts=8))
    assert found["fixed_point"].verdict == verdict
    assert found["points"].verdict == points


def test_what_cannot_be_told_widens_the_interval() -> None:
    found = answers(looped_study([*[orbiting] * 7, contracting(0.96)], prompts=8))["fixed_point"]
    assert found.evidence["share_low"] == Share(7, 8).interval[0]
    assert found.evidence["share_high"] == 1.0
    assert "1 of 8 prompts is undecided" in found.sentence


def test_feed_forward_model_gets_a_short_list() -> None:
    found = answers(feed_forward_study())
    assert list(found) == ["fixed_point", "loss", "limits"]
    assert found["fixed_point"].verdict == "no loop"
    assert found["loss"].evidence["loss"] == pytest.approx(2.5, abs=0.1)


def test_diverged_prompts_are_counted_and_left_out_of_the_medians() -> None:
    found = answers(looped_study([contracting(), *[contracting()] * 8, overflowing]))
    assert found["fixed_point"].outcome is Outcome.YES
    assert "36 of 40 prompts" in found["fixed_point"].sentence
    assert found["fixed_point"].evidence["layers 0–2"] == "fixed point (36 of 40 prompts)"
    assert any("undefined in 4 of 40 prompts" in limit for limit in found["fixed_point"].limits)
    assert "divergence" in found["limits"].verdict

    every = answers(looped_study(overflowing))
    assert every["fixed_point"].verdict == "no, it diverges"
    assert "after 5 recurrences" in every["fixed_point"].sentence
    assert all("nan" not in answer.sentence for answer in every.values())


def test_prompts_that_disagree_are_not_averaged_away() -> None:
    found = answers(looped_study([contracting(), orbiting]))
    assert found["fixed_point"].verdict == "depends on the prompt"
    assert "fixed point in 20" in found["fixed_point"].sentence
    assert "no fixed point in 20" in found["fixed_point"].sentence


def test_a_single_prompt_is_answered_with_a_warning() -> None:
    found = answers(looped_study(contracting(), prompts=1))
    assert found["fixed_point"].outcome is Outcome.YES
    assert "1 of 1 prompts (95 % interval 20–100 %)" in found["fixed_point"].sentence
    assert "the number of prompts" in found["limits"].verdict


def test_measuring_beyond_the_horizon_is_pointed_out() -> None:
    found = answers(looped_study(contracting(), recurrences=24, horizon=20))
    assert "degenerate distances" in found["limits"].verdict
    assert found["arrival"].evidence["recurrences_median"] == 10


def test_trained_depth_outside_of_what_was_measured() -> None:
    assert answers(looped_study(contracting(), trained=None))["trained_depth"].verdict == "not known"
    assert answers(looped_study(contracting(), trained=99))["trained_depth"].verdict == "not measured"
    assert answers(looped_study(contracting(), trained=20))["trained_depth"].outcome is Outcome.YES
    first = answers(looped_study(contracting(), trained=1))["trained_depth"]
    assert first.outcome is Outcome.NO
    assert "nan" not in first.sentence
    # A distance to an earlier state, or to the state itself, says nothing.
    early = answers(looped_study(contracting(), trained=20, horizon=20))["trained_depth"]
    assert early.verdict == "horizon too early"
    assert "after 24" not in answers(looped_study(contracting(), horizon=20))["trained_depth"].sentence


@pytest.mark.parametrize(
    ("loss", "verdict", "outcome"),
    [
        (lambda count: 3 + 0.5**count, "yes, up to about 8", Outcome.YES),
        (lambda count: 3 - 0.1 * np.log2(count), "yes, to the last readout", Outcome.YES),
        (lambda count: 3 + 0.1 * abs(np.log2(count) - 2), "yes, then worse beyond 4", Outcome.PARTLY),
        (lambda count: 3 + 0.1 * np.log2(count), "no, it gets worse", Outcome.NO),
        (lambda count: 3 + 0 * count, "no clear difference", Outcome.NO),
    ],
)
def test_loss_against_recurrences(loss: object, verdict: str, outcome: Outcome) -> None:
    answer = answers(looped_study(contracting(), loss=loss))["loss"]  # type: ignore[arg-type]
    assert (answer.verdict, answer.outcome) == (verdict, outcome)


def test_a_rise_after_the_lowest_loss_that_may_be_chance_is_no_level() -> None:
    study = looped_study(contracting(), loss=lambda count: 3 + 0.5**count)
    study.dataset["loss"][-1, 0] += 40  # in one prompt of 40
    assert "It then rises to 3.96 after 16, which may be chance with 40 prompts." in answers(study)["loss"].sentence


def test_a_loss_that_may_differ_by_chance_is_told_once() -> None:
    study = looped_study(contracting(), prompts=2, loss=lambda count: 3 - 0.1 * np.log2(count))
    counts = study.dataset["readout_recurrence"].values
    study.dataset["loss"].transpose("readout_recurrence", "prompt").values[:, 0] += 0.1 * np.log2(counts)
    answer = answers(study)["loss"]
    assert re.search(
        r"2 prompts, the difference between \S+ nats after 1 recurrence and \S+ after 16 may be chance", answer.sentence
    )


def test_parts_that_were_skipped_are_said_to_be_missing() -> None:
    study = looped_study(contracting())
    parts = ["path_distance", "path_cosine_distance", "loss", "noise_floor", "cycle_similarity", "trajectory"]
    found = answers(dataclasses.replace(study, dataset=study.dataset.drop_vars(parts)))
    assert found["fixed_point"].outcome is Outcome.YES
    assert found["initial_state"].verdict == "not measured"
    assert found["loss"].verdict == "not measured"
    assert found["limits"].verdict == "the unknown noise floor"


def test_sinks_of_short_prompts_are_not_believed() -> None:
    """At 9 tokens and fewer even uniform causal attention has a sink score of 0.3 (method, section 3)."""
    short, mixed, longer = (looped_study(contracting(), prompts=40, tokens=tokens) for tokens in (9, 10, 10))
    mixed.dataset["token_count"][:3] = [1, 7, 4]
    said = [answers(study)["limits"] for study in (short, mixed, longer)]
    assert [answer.verdict for answer in said] == ["short prompts", "short prompts", "little"]
    assert "40 of 40 prompts have so few tokens (9 at most)" in said[0].sentence
    assert "3 of 40 prompts have so few tokens (7 at most)" in said[1].limits[0]
    assert answers(feed_forward_study(tokens=6))["limits"].verdict == "short prompts"
    # Nothing is said of sinks where there are none.
    without = dataclasses.replace(short, dataset=short.dataset.drop_vars("sink_score"))
    assert answers(without)["limits"].verdict == "little"


def test_incomplete_study_is_refused_by_the_name_of_what_it_lacks() -> None:
    study = looped_study(contracting(), prompts=2)
    with pytest.raises(StudyError, match="'horizon_drift'"):
        quick_answers(dataclasses.replace(study, dataset=study.dataset.drop_vars("horizon_drift")))
    with pytest.raises(StudyError, match="'settings'"):
        quick_answers(dataclasses.replace(study, manifest={"model": study.manifest["model"]}))


def test_criterion_decides_is_stored_and_is_checked() -> None:
    strict = Criterion(reached_level=0.001)
    found = answers(looped_study(contracting(rate=0.6)), strict)
    assert found["arrival"].evidence["recurrences_median"] == 14  # 0.6^14 = 0.0008
    assert all(answer.criterion == strict for answer in found.values())
    with pytest.raises(ConfigError, match="drift_tolerance"):
        Criterion(drift_tolerance=0.0)
    with pytest.raises(ConfigError, match="prompts_needed"):
        Criterion(prompts_needed=1.1)


def test_answers_are_ready_for_json() -> None:
    text = json.dumps([answer.to_dict() for answer in quick_answers(looped_study(growing))])
    assert json.loads(text)[0]["criterion"]["drift_tolerance"] == 0.01


def test_arrival_counts_the_last_time_the_level_is_crossed() -> None:
    study = looped_study(contracting(), prompts=1, recurrences=5)
    distance = study.dataset["relative_distance"]
    distance[0, :, 0] = [0.5, 0.001, 0.5, 0.001, 0.001]
    distance[1, :, 0] = [0.001, 0.001, 0.001, 0.001, 0.001]
    distance[2, :, 0] = [0.5, 0.001, 0.001, 0.001, 0.5]
    np.testing.assert_array_equal(arrival(distance, 0.01)[:, 0], [4, 1, np.inf])


def test_wilson_interval_agrees_with_published_values() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


@given(st.integers(0, 500), st.integers(1, 500))
def test_interval_holds_the_share_and_mirrors(count: int, extra: int) -> None:
    total = count + extra
    low, high = Share(count, total).interval
    assert 0 <= low <= count / total <= high <= 1
    assert wilson_interval(total - count, total) == pytest.approx((1 - high, 1 - low))


def test_min_prompts_is_where_the_interval_can_reach_the_share_needed() -> None:
    criterion = Criterion()
    at, below = (wilson_interval(n, n)[0] for n in (criterion.min_prompts, criterion.min_prompts - 1))
    assert below < criterion.prompts_needed <= at


def test_paired_difference_sees_through_scatter_between_prompts() -> None:
    rng = np.random.default_rng(0)
    scatter = rng.normal(scale=5, size=50)
    found = paired_difference(scatter + 0.1 + rng.normal(scale=0.01, size=50), scatter)
    assert found.mean == pytest.approx(0.1, abs=0.01)
    assert found.exceeds(0.05)
    assert not paired_difference(scatter, np.roll(scatter, 1) - 0.1).exceeds(0.05)
    single = paired_difference(np.array([1.0]), np.array([0.0]))
    assert math.isinf(single.half_width)
    assert not single.exceeds(0.05)


@pytest.mark.parametrize("prompts", [2, 3, 8])
def test_paired_differences_are_covered_by_their_interval(prompts: int) -> None:
    rng = np.random.default_rng(0)
    found = [paired_difference(rng.normal(0.3, size=prompts), np.zeros(prompts)) for _ in range(2000)]
    covered = np.mean([abs(each.mean - 0.3) <= each.half_width for each in found])
    assert covered == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 %"),
        (1e-9, "less than 0.001 %"),
        (0.0123, "1.2 %"),
        (0.5, "50 %"),
        (1.0, "100 %"),
        (3.456, "346 %"),
        (0.996, "99.6 %"),
        (250 / 251, "99.6 %"),
        (0.9999, "99.99 %"),
        (1 - 1e-9, "more than 99.999 %"),
    ],
)
def test_percent(value: float, text: str) -> None:
    assert percent(value) == text


@given(st.floats(1e-12, 1e12))
def test_significant_keeps_two_digits(value: float) -> None:
    assert float(significant(value)) == pytest.approx(value, rel=0.05)


def test_spans_draw_runs_together() -> None:
    assert spans([0, 1, 2, 5, 7, 8]) == "0–2, 5, 7–8"
