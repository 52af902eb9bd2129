"""Comparisons of studies whose curves are known, and what the numbers do on curves that have nothing to do with
each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopscope import compare
from loopscope.answers.answer import Outcome
from loopscope.answers.comparison.findings import comparison_answers
from loopscope.answers.comparison.null import curve_similarity, prompt_interval, surrogates
from loopscope.answers.comparison.settings import CompareSettings
from staged_study import OTHER, SHAPE, Array, answer_of, at, staged_study

SETTINGS = CompareSettings()


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
    assert found.p_values[0, 0] == sum(value >= naive[0] - 1e-9 for value in naive) / 24
    itself = curve_similarity(reference[None], reference[None], SETTINGS)
    assert itself.p_value[0] == itself.p_values[0, 0] == 1 / 24


def test_a_curve_that_rises_at_one_layer_alone_has_a_null_without_gaps() -> None:
    """At another depth it may be flat on the whole grid, and is like nothing there."""
    found = curve_similarity(np.eye(16)[:1], np.linspace(0, 1, 16)[None] ** 2, SETTINGS)
    assert np.isfinite(found.null).all()
    assert np.isfinite(found.p_values).all()


def test_the_null_shown_is_that_of_the_largest_p() -> None:
    rng = np.random.default_rng(3)
    curve, reference = rng.normal(size=(2, 1, 8)).cumsum(axis=2)
    made = surrogates(8, SETTINGS)
    found = curve_similarity(curve, reference, SETTINGS, made)
    grid = np.linspace(0, 7, SETTINGS.grid)
    there = np.interp(grid, range(8), reference[0])
    null = [
        [np.corrcoef(np.interp(grid, range(8), row), there)[0, 1] for row in curves[0, :1999]]
        for curves in made.of(curve)[1:]
    ]
    closest = int(found.p_values[:, 0].argmax())
    assert closest > 0
    for place, values in enumerate(null, 1):
        assert found.p_values[place, 0] == pytest.approx(np.mean(values >= found.value[0] - 1e-9), abs=1e-3)
    np.testing.assert_allclose(found.null[:, 0], np.quantile(null[closest - 1], [0.05, 0.5, 0.95]), atol=0.01)


@given(st.lists(st.floats(-5, 5), min_size=4, max_size=12), st.integers(0, 99))
def test_smooth_surrogates_keep_what_they_say(curve: list[float], seed: int) -> None:
    points = len(curve)
    values = np.array([curve])
    _, turned, bent = (rows[0] for rows in surrogates(points, CompareSettings(shuffles=49, seed=seed)).of(values))
    power = np.abs(np.fft.rfft(np.diff(values[0])))
    for row in turned:
        np.testing.assert_allclose(np.abs(np.fft.rfft(np.diff(row))), power, atol=1e-9)
        assert row[-1] - row[0] == pytest.approx(curve[-1] - curve[0], abs=1e-9)
    assert np.allclose(turned[0] - turned[0, 0] + curve[0], curve)
    assert np.allclose(bent[0], curve)
    np.testing.assert_allclose(bent[:, [0, -1]], np.broadcast_to([curve[0], curve[-1]], (50, 2)), atol=1e-9)
    rising = surrogates(points, CompareSettings(shuffles=49, seed=seed)).of(np.sort(values))[2][0]
    assert (np.diff(rising) >= -1e-9).all()


def _rising(rng: np.random.Generator, layers: int) -> Array:
    """Powers of depth, from either end."""
    depth, power = np.linspace(0, 1, layers), np.exp(rng.uniform(-1, 1) * math.log(4))
    return np.asarray(depth**power if rng.random() < 0.5 else 1 - (1 - depth) ** power)


@pytest.mark.parametrize("layers", [8, 16, 24])
@pytest.mark.parametrize(
    "curve",
    [
        pytest.param(lambda rng, layers: rng.normal(size=layers).cumsum(), id="random walks"),
        pytest.param(lambda rng, layers: rng.exponential(size=layers).cumsum(), id="random rises"),
        pytest.param(_rising, id="powers of depth"),
    ],
)
def test_smooth_curves_that_have_nothing_to_do_with_each_other_are_seldom_alike(
    curve: Callable[[np.random.Generator, int], Array], layers: int
) -> None:
    rng, settings = np.random.default_rng(1), CompareSettings(shuffles=199)
    made = surrogates(layers, settings)
    pairs = (np.stack([curve(rng, layers) for _ in range(2)]) for _ in range(300))
    alike = [curve_similarity(one[None], other[None], settings, made).p_value[0] <= 0.05 for one, other in pairs]
    assert np.mean(alike) <= 0.06 + 2 * math.sqrt(0.06 * 0.94 / 300)


def test_p_values_of_unrelated_curves_are_uniform_by_shuffled_layers_and_no_smaller_by_all() -> None:
    rng = np.random.default_rng(5)
    for layers in (4, 6, 9):
        settings = CompareSettings(shuffles=999)
        made = surrogates(layers, settings)
        found = [
            curve_similarity(rng.normal(size=(3, layers)), rng.normal(size=(3, 8)), settings, made).p_values
            for _ in range(300)
        ]
        p_values, largest = np.array(found)[:, 0], np.max(found, axis=1)
        assert (largest <= 0.05).mean() <= 0.05 + 3 * 0.0063
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


def test_an_interval_over_prompts_holds_the_similarity_and_shrinks_with_prompts() -> None:
    rng = np.random.default_rng(0)
    widths = {}
    for prompts in (8, 128):
        curves = np.log(2 + SHAPE)[None, :, None] + 0.3 * rng.normal(size=(6, 8, prompts))
        low, high = prompt_interval(10**curves, 10 ** curves[..., ::-1], SETTINGS, paired=False)
        value = curve_similarity(*(np.log10(np.median(10**curves, axis=-1)),) * 2, SETTINGS).value
        assert (low <= high).all()
        assert (high < value + 1e-9).all()  # with itself, of which two draws fall short
        widths[prompts] = (high - low).mean()
    assert widths[128] < 0.5 * widths[8]
    together = prompt_interval(10**curves, 10**curves, SETTINGS, paired=True)
    np.testing.assert_allclose(together, 1)
    assert np.isnan(prompt_interval(curves[..., :1], curves, SETTINGS, paired=False)).all()
    curves[2] = 1.0  # does not vary
    assert (
        np.isnan(prompt_interval(curves, curves, SETTINGS, paired=True)).tolist()
        == [[False] * 2 + [True] + [False] * 4] * 2
    )


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
    assert "Alike on their own: attention concentration, mixing" in answer.sentence


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


@pytest.mark.parametrize(
    ("models", "labels"),
    [
        (["/a/one", "../b/two", "organisation/three"], ["one", "two", "organisation/three"]),
        (["/a/same", "/b/same"], ["/a/same", "/b/same"]),
    ],
)
def test_checkpoint_folders_go_by_what_tells_them_apart(models: list[str], labels: list[str]) -> None:
    assert compare([staged_study(SHAPE, model=model) for model in models]).labels == labels


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
