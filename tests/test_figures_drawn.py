"""Paper figures, artist by artist: what is drawn are the study's numbers, by the formulas that captions state."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from loopscope import compare
from loopscope.dynamics.verdicts import KINDS
from loopscope.errors import StudyError
from loopscope.report.figures import in_matplotlib, in_plotly, stages
from loopscope.report.figures.curves import drawn_recurrences
from loopscope.report.figures.look import decade, decade_ticks, kind_label, number, ordered_colours
from loopscope.report.figures.plot import Line
from loopscope.report.figures.write import STUDY_FIGURES, draw_figure
from loopscope.report.settings import ReportSettings
from loopscope.study import Study, view_study
from staged_study import OTHER, SHAPE, staged_study
from synthetic_study import (
    LAYERS,
    contracting,
    feed_forward_study,
    growing,
    looped_study,
    overflowing,
    with_behaviour,
)

Array = NDArray[np.float64]
RECURRENCES, PROMPTS = 24, 7


@pytest.fixture(scope="module")
def study() -> Study:
    """A study of a (1, 3 (x) 24, 1) model, trained with 4."""
    made = looped_study(contracting(), prompts=PROMPTS, recurrences=RECURRENCES)
    count = 1 + LAYERS * 12
    labels = ["prelude.0", *(f"recurrent.{layer}@{at}" for at in range(1, 13) for layer in range(LAYERS)), "coda.0"]
    rng = np.random.default_rng(3)
    similarity = rng.uniform(-0.2, 1, size=(count + 1, count + 1))
    dataset = made.dataset.drop_dims(["visit", "visit_other"]).assign(
        cycle_similarity=(("visit", "visit_other"), similarity),
        attention_cycle_distance=(("visit", "visit_other"), 1 - similarity),
        visit=("visit", labels),
        visit_other=("visit_other", labels),
        massive_token=(("depth", "prompt"), rng.integers(0, 2, size=(2 + LAYERS * RECURRENCES, PROMPTS))),
        massive_dimension=(("depth", "prompt"), rng.integers(0, 3, size=(2 + LAYERS * RECURRENCES, PROMPTS))),
        exit_probability=(("recurrence", "prompt"), rng.dirichlet(np.ones(RECURRENCES), size=PROMPTS).T),
    )
    return dataclasses.replace(made, dataset=dataset)


def panels(figure: Figure) -> list[Axes]:
    """Without colour bars, which are inside the axes of their maps."""
    return list(figure.axes)


def line(axes: Axes, label: str) -> tuple[Array, Array]:
    (found,) = [line for line in axes.lines if line.get_label() == label]
    return np.asarray(found.get_xdata(), dtype=np.float64), np.asarray(found.get_ydata(), dtype=np.float64)


def labels(axes: Axes) -> list[str]:
    return [str(line.get_label()) for line in axes.lines if not str(line.get_label()).startswith("_")]


def band(axes: Axes) -> Array:
    """All corners of the grey bands, as (x, y)."""
    corners = [np.asarray(path.vertices) for drawn in axes.collections for path in drawn.get_paths()]
    return np.concatenate(corners).astype(np.float64)


def image(axes: Axes) -> Array:
    (found,) = axes.images
    return np.ma.filled(np.ma.asarray(found.get_array(), dtype=np.float64), np.nan)


def medians(array: xarray.DataArray) -> Array:
    return np.asarray(np.median(array.transpose(..., "prompt").values, axis=-1), dtype=np.float64)


CONVERGENCE: dict[str, list[str]] = {
    "step": ["successive_difference", "relative_step"],
    "distance": ["distance_to_horizon", "relative_distance", "relative_distance_second_horizon"],
    "direction": ["cosine_distance_to_previous", "cosine_distance_to_horizon"],
    "norm": ["residual_norm", "norm_growth"],
    "path-independence": ["path_distance", "path_cosine_distance"],
}


@pytest.mark.parametrize("name", CONVERGENCE)
def test_curves_by_layer_are_medians_over_prompts(study: Study, name: str) -> None:
    figure = draw_figure(study, f"{name}-by-layer")
    for axes, variable in zip(panels(figure), CONVERGENCE[name], strict=True):
        wanted = medians(study.dataset[variable])
        for layer in range(LAYERS):
            x, y = line(axes, str(layer))
            np.testing.assert_array_equal(x, np.arange(1, RECURRENCES + 1))
            there = np.isfinite(y)
            np.testing.assert_allclose(y[there], wanted[layer][there])
            # On a logarithmic axis alone, and there only what has no logarithm, is left out.
            gaps = ~np.isfinite(wanted[layer]) | ((wanted[layer] <= 0) & (axes.get_yscale() == "log"))
            np.testing.assert_array_equal(~there, gaps)


def test_the_band_is_the_middle_ninety_per_cent_of_the_tokens_at_the_last_layer(study: Study) -> None:
    axes = panels(draw_figure(study, "step-by-layer"))[1]
    corners = band(axes)
    for level in (0.05, 0.95):
        edge = medians(study.dataset["relative_step_quantile"].sel(quantile=level))[-1]
        for count in range(2, RECURRENCES + 1):
            heights = corners[corners[:, 0] == count, 1]
            assert np.isclose(heights, edge[count - 1], rtol=1e-6).any()


def test_a_band_of_one_minus_cosine_has_its_edges_the_right_way_round(study: Study) -> None:
    axes = panels(draw_figure(study, "norm-by-layer"))[0]
    low, high = (medians(study.dataset["residual_norm_quantile"].sel(quantile=q))[-1] for q in (0.05, 0.95))
    corners = band(axes)
    assert corners[:, 1].min() == pytest.approx(low.min())
    assert corners[:, 1].max() == pytest.approx(high.max())
    turned = draw_figure(looped_study(growing, prompts=3, recurrences=8, horizon=8), "direction-by-layer")
    for axes in panels(turned):
        corners = band(axes)
        for count in range(2, 8):
            heights = corners[corners[:, 0] == count, 1]
            _, y = line(axes, str(LAYERS - 1))
            assert heights.min() <= y[count - 1] <= heights.max()


def test_a_study_that_has_cosines_alone_draws_their_distance_from_one(study: Study) -> None:
    data = study.dataset
    names = {name: name.replace("cosine_distance", "cosine") for name in map(str, data) if "cosine_distance" in name}
    cosines = {old: 1 - data[name].astype(np.float64) for name, old in names.items()}
    for name in cosines:
        if name.endswith("_quantile"):  # the levels of a cosine run the other way
            cosines[name] = cosines[name].copy(data=cosines[name].values[::-1])
    older = dataclasses.replace(study, dataset=data.drop_vars(names).assign(cosines))
    for now, before in zip(*(panels(draw_figure(each, "direction-by-layer")) for each in (study, older)), strict=True):
        for layer in range(LAYERS):
            np.testing.assert_allclose(line(before, str(layer)), line(now, str(layer)), atol=1e-7)
        np.testing.assert_allclose(band(before), band(now), atol=1e-6)


def test_curves_by_recurrence_lie_on_relative_depth(study: Study) -> None:
    axes = panels(draw_figure(study, "distance-by-recurrence"))[1]
    wanted = medians(study.dataset["relative_distance"])
    picked = [1, 2, 4, 8, 16, 24]
    assert labels(axes)[: len(picked)] == [str(count) for count in picked]
    for count, colour in zip(picked, ordered_colours(len(picked)), strict=True):
        x, y = line(axes, str(count))
        # (1, 3, 1): the block's layers are the middle three of 5, of which the first is at 0 and the last at 100.
        np.testing.assert_allclose(x, [25, 50, 75])
        np.testing.assert_allclose(y, wanted[:, count - 1])
        (drawn,) = [line for line in axes.lines if line.get_label() == str(count)]
        assert drawn.get_color() == colour


def test_curves_by_depth_go_through_all_visits_in_order(study: Study) -> None:
    axes = panels(draw_figure(study, "step-by-depth"))[0]
    wanted = medians(study.dataset["successive_difference"])
    x, y = line(axes, "every visit")
    # A prelude of one layer before, a coda of one after: neither has a step.
    np.testing.assert_array_equal(x, np.arange(1, 3 + LAYERS * RECURRENCES))
    np.testing.assert_allclose(y, np.concatenate([[np.nan], wanted.T.ravel(), [np.nan]]))
    at, of_layer = line(axes, "2")
    np.testing.assert_array_equal(at, 4 + LAYERS * np.arange(RECURRENCES))
    np.testing.assert_allclose(of_layer, wanted[2])


def test_the_trained_number_and_the_floor_are_marked(study: Study) -> None:
    figure = draw_figure(study, "step-by-layer")
    for axes in panels(figure):
        marked = [line for line in axes.lines if line.get_gid() == "mark" and line.get_label() != "noise floor"]
        assert [list(np.asarray(line.get_xdata())) for line in marked] == [[4, 4]]
        assert [note.get_text() for note in axes.texts] == ["trained: 4"]
    _, level = line(panels(figure)[1], "noise floor")
    assert set(level) == {float(study.dataset["noise_floor"].median())}


def test_a_floor_far_below_would_flatten_the_curves() -> None:
    restless = looped_study(contracting(0.97), prompts=3, recurrences=8, floor=1e-12)
    assert "noise floor" not in labels(panels(draw_figure(restless, "step-by-layer"))[1])


def test_attention_distances_are_per_row_and_over_heads(study: Study) -> None:
    figure = draw_figure(study, "attention-by-layer")
    for axes, name in zip(panels(figure), ("attention_change", "attention_distance_to_horizon"), strict=True):
        per_row = study.dataset[name] / np.sqrt(study.dataset["token_count"])
        wanted = medians(per_row.mean("head"))
        for layer in range(LAYERS):
            np.testing.assert_allclose(line(axes, str(layer))[1], wanted[layer], rtol=1e-6)


def test_horizons_have_a_dot_per_layer_and_kind(study: Study) -> None:
    (axes,) = panels(draw_figure(study, "horizons"))
    drawn: dict[str, Any] = {str(container.get_label()): container for container in axes.containers}
    assert list(drawn) == ["moved from 32 to 64", "step into 32", "step into 64", "noise floor"]
    moved = drawn["moved from 32 to 64"].lines[0]
    np.testing.assert_allclose(moved.get_ydata(), medians(study.dataset["horizon_drift"]))
    step = drawn["step into 64"].lines[0]
    np.testing.assert_allclose(step.get_ydata(), medians(study.dataset["horizon_relative_step"].sel(horizon="second")))


@pytest.mark.parametrize("name", ["trajectories", "trajectories-3d"])
def test_trajectories_are_the_principal_components(study: Study, name: str) -> None:
    (axes,) = panels(draw_figure(study, name))
    scores = study.dataset["trajectory"].values[0]
    for layer in range(LAYERS):
        (found,) = [line for line in axes.lines if line.get_label() == str(layer)]
        flat: Any = found
        data = flat.get_data_3d() if name.endswith("3d") else flat.get_data()
        for component, values in enumerate(data):
            np.testing.assert_allclose(values, scores[layer, :, component])
    # Behind them the way through all layers, pass after pass.
    whole: Any = axes.lines[0]
    data = whole.get_data_3d() if name.endswith("3d") else whole.get_data()
    visited = scores.transpose(1, 0, 2).reshape(-1, scores.shape[-1])
    for component, values in enumerate(np.asarray(data)):
        at = np.flatnonzero(np.r_[True, np.diff(values) != 0])  # each pass ends where the next begins
        np.testing.assert_allclose(values[at], visited[:, component])
    share = study.dataset["trajectory_variance"].values[0]
    assert axes.get_xlabel() == f"PC 1 ({100 * share[0]:.0f} %)"


def test_the_way_through_the_layers_has_gaps_where_recurrences_are_left_out(study: Study) -> None:
    (kind,) = [kind for kind in STUDY_FIGURES if kind.name == "trajectories"]
    plot = kind.draw(view_study(study), ReportSettings(most_recurrences=8))
    way = plot.panels[0].marks[0]
    assert isinstance(way, Line)
    drawn = drawn_recurrences(RECURRENCES, ReportSettings(most_recurrences=8))
    assert np.isnan(way.x).sum() == (np.diff(drawn) > 1).sum() > 0


@pytest.mark.parametrize(
    ("name", "variable"), [("cycle-residual", "cycle_similarity"), ("cycle-attention", "attention_cycle_distance")]
)
def test_maps_of_visits_show_the_first_recurrences_or_all(study: Study, name: str, variable: str) -> None:
    whole = study.dataset[variable].values
    (axes,) = panels(draw_figure(study, name))
    few = 1 + 8 * LAYERS
    np.testing.assert_array_equal(image(axes), whole[:few, :few])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["prelude", *(str(n) for n in range(1, 9))]
    # A white line before every recurrence.
    assert len(axes.lines) == 2 * 8
    (axes,) = panels(draw_figure(study, f"{name}-long"))
    np.testing.assert_array_equal(image(axes), whole)
    assert axes.get_xticklabels()[-1].get_text() == "coda"


def test_the_map_of_layers_is_numbered(study: Study) -> None:
    (axes,) = panels(draw_figure(study, "layer-cosine"))
    wanted = medians(study.dataset["layer_cosine"])
    np.testing.assert_allclose(image(axes), wanted)
    assert [note.get_text() for note in axes.texts] == [f"{value:.2f}" for value in wanted.ravel()]


def test_the_map_of_heads_has_a_row_per_head(study: Study) -> None:
    (axes,) = panels(draw_figure(study, "head-change"))
    per_row = study.dataset["attention_change"] / np.sqrt(study.dataset["token_count"])
    wanted = np.log10(medians(per_row.transpose("layer", "head", "recurrence", "prompt"))[..., 1:])
    np.testing.assert_allclose(image(axes), wanted.reshape(-1, RECURRENCES - 1), rtol=1e-6)
    assert axes.get_ylabel() == "recurrent layer, a row per head"


def test_a_head_that_does_not_change_at_all_has_no_colour(study: Study) -> None:
    still = study.dataset["attention_change"].copy()
    still[0, 5, 1] = 0
    (axes,) = panels(
        draw_figure(dataclasses.replace(study, dataset=study.dataset.assign(attention_change=still)), "head-change")
    )
    assert np.isnan(image(axes)[1, 4])
    assert np.isnan(image(axes)).sum() == 1


def test_shares_of_stable_heads_count_heads_and_prompts(study: Study) -> None:
    stable = study.dataset["head_stable_from"].copy()
    stable[0, 0, :2] = [4, np.nan]
    (axes,) = panels(
        draw_figure(dataclasses.replace(study, dataset=study.dataset.assign(head_stable_from=stable)), "heads-stable")
    )
    x, y = line(axes, "0")
    np.testing.assert_array_equal(x, np.arange(1, RECURRENCES + 1))
    # Stable after 7 recurrences; one after 4, one never.
    of = 2 * PROMPTS
    wanted = np.where(x >= 7, of - 1, np.where(x >= 4, 1, 0)) / of
    np.testing.assert_allclose(y, wanted)


def test_sinks_are_those_of_the_trained_pass(study: Study) -> None:
    (axes,) = panels(draw_figure(study, "head-sinks"))
    rows = [0, *(1 + 3 * LAYERS + layer for layer in range(LAYERS)), 1 + RECURRENCES * LAYERS]
    wanted = medians(study.dataset["sink_score"])[rows]
    np.testing.assert_allclose(image(axes), wanted, rtol=1e-6)


STAGES = ["colsum_concentration", "sink", "relative_mixing_score", "relative_residual_entropy", "mean_token_norm"]


def of_stage(study: Study, name: str) -> Array:
    """(visit,): medians over prompts of what docs/study.md calls so, means over heads."""
    data = study.dataset
    if name == "sink":
        return medians((data["sink_score"] >= 0.3).mean("head"))
    found = data[name]
    return medians(found.mean("head") if "head" in found.dims else found)


def test_stages_in_all_layouts(study: Study) -> None:
    by_recurrence, by_layer, few, whole = (
        panels(figure)
        for figure in (
            draw_figure(study, "stages-by-recurrence"),
            draw_figure(study, "stages-by-layer"),
            draw_figure(study, "stages-by-depth"),
            draw_figure(study, "concentration-by-depth-long"),
        )
    )
    for place, name in enumerate(STAGES):
        wanted = of_stage(study, name)
        loop = wanted[1:-1].reshape(RECURRENCES, LAYERS)

        axes = by_recurrence[place]
        assert labels(axes) == ["1", "2", "3", "4", "prelude, coda", "prelude, coda"]
        np.testing.assert_allclose(line(axes, "3")[1], loop[2], rtol=1e-6)
        outer = [drawn for drawn in axes.lines if drawn.get_label() == "prelude, coda"]
        assert [float(np.asarray(drawn.get_xdata())[0]) for drawn in outer] == [0, 100]
        values = [float(np.asarray(drawn.get_ydata())[0]) for drawn in outer]
        np.testing.assert_allclose(values, wanted[[0, -1]], rtol=1e-6)

        np.testing.assert_allclose(line(by_layer[place], "1")[1], loop[:, 1], rtol=1e-6)
        np.testing.assert_allclose(line(few[place], "every visit")[1], wanted[: 1 + 8 * LAYERS], rtol=1e-6)
        if place < len(whole):
            np.testing.assert_allclose(line(whole[place], "every visit")[1], wanted, rtol=1e-6)


def test_passes_beyond_training_begin_with_the_trained_one(study: Study) -> None:
    assert stages.within(view_study(study)) == [1, 2, 3, 4]
    assert stages.beyond(view_study(study)) == [4, 8, 16, 24]
    unknown = looped_study(contracting(), prompts=2, recurrences=12, trained=None)
    assert stages.within(view_study(unknown)) == [1, 2, 4, 8, 12]
    assert stages.beyond(view_study(unknown)) == []
    assert stages.beyond(view_study(looped_study(contracting(), prompts=2, recurrences=4, trained=4))) == []


def test_the_band_of_stages_is_over_prompts_and_absent_for_one(study: Study) -> None:
    axes = panels(draw_figure(study, "magnitude-by-depth"))[0]
    corners = band(axes)
    of_visit = study.dataset["mean_token_norm"].transpose("depth", "prompt").values
    for visit in (0, 5, 8 * LAYERS):
        heights = corners[corners[:, 0] == visit + 1, 1]
        assert heights.min() == pytest.approx(np.quantile(of_visit[visit], 0.05))
        assert heights.max() == pytest.approx(np.quantile(of_visit[visit], 0.95))
    alone = dataclasses.replace(study, dataset=study.dataset.isel(prompt=[0]), tokens=study.tokens[:1])
    assert not panels(draw_figure(alone, "magnitude-by-depth"))[0].collections


def test_a_feed_forward_model_has_its_layers_in_order() -> None:
    study = feed_forward_study(prompts=5)
    axes = panels(draw_figure(study, "magnitude-by-depth"))[0]
    (drawn,) = axes.lines
    np.testing.assert_array_equal(drawn.get_xdata(), [0, 1, 2, 3])
    np.testing.assert_allclose(np.asarray(drawn.get_ydata()), of_stage(study, "mean_token_norm"))
    assert axes.get_xlabel() == "layer"
    (axes,) = panels(draw_figure(study, "cycle-residual"))
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "1", "2", "3"]


def test_neurons_are_bars_in_per_cent(study: Study) -> None:
    drawn = panels(draw_figure(study, "neurons"))
    for axes, prefix in zip(drawn, ("folded_", ""), strict=True):
        for container, name in zip(axes.containers, ("prediction_neurons", "suppression_neurons"), strict=True):
            heights = [bar.get_height() for bar in container]
            np.testing.assert_allclose(heights, study.dataset[prefix + name].values)
    older = study.dataset.drop_vars(["folded_prediction_neurons", "folded_suppression_neurons"])
    (axes,) = panels(draw_figure(dataclasses.replace(study, dataset=older), "neurons"))
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["c0", "p0", "r0", "r1", "r2"]
    assert axes.yaxis.get_major_formatter()(0.02).endswith("%")


def test_no_empty_frame_where_no_neuron_stands_out(study: Study) -> None:
    names = [str(name) for name in study.dataset if str(name).endswith("_neurons")]
    none = study.dataset.assign({name: 0 * study.dataset[name] for name in names})
    with pytest.raises(StudyError, match="no neuron has a kurtosis above 10"):
        draw_figure(dataclasses.replace(study, dataset=none), "neurons")


def test_each_kind_is_shown_by_its_token_that_moves_most(study: Study) -> None:
    judged = with_behaviour(study)
    level = judged.dataset["verdict_level"].copy()
    level[-1, 2, 3] = 0.9  # of whichever kind that token is
    judged = dataclasses.replace(judged, dataset=judged.dataset.assign(verdict_level=level))
    name = kind_label(KINDS[int(judged.dataset["verdict"].values[-1, 2, 3])])
    near, far = panels(draw_figure(judged, "verdict-cosine"))
    away = study.dataset["token_cosine_distance_to_horizon"].sel(site="last_layer").values[:, 2, 3]
    np.testing.assert_allclose(line(near, name)[1], 1 - away)
    np.testing.assert_allclose(line(far, name)[1], np.where(away > 0, away, np.nan))
    assert len(labels(near)) == len(KINDS)


def test_all_attention_maps_of_a_prompt_lie_side_by_side(study: Study) -> None:
    codes = study.dataset["attention_map"].values[0]
    first = panels(draw_figure(study, "attention-maps"))[0]
    side = codes.shape[-1]
    drawn = image(first)[:side]
    for head in range(codes.shape[1]):
        at = head * (side + 1)
        lower = np.tril_indices(side)
        np.testing.assert_allclose(drawn[:, at : at + side][lower], codes[0, head][lower] / 254)
    assert np.isnan(drawn[np.triu_indices(side, 1)]).all()
    assert first.get_title() == "prelude"


def test_places_of_massive_activations_are_shares_of_prompts(study: Study) -> None:
    (axes,) = panels(draw_figure(study, "massive-places"))
    token = study.dataset["massive_token"].values[: 1 + 8 * LAYERS]
    np.testing.assert_allclose(line(axes, "on the first token")[1], (token == 0).mean(axis=1))
    place = study.dataset["massive_dimension"].values[: 1 + 8 * LAYERS]
    most = [max(list(row).count(value) for value in row) / PROMPTS for row in place.tolist()]
    np.testing.assert_allclose(line(axes, "in the most common coordinate")[1], most)


def test_the_loss_is_a_mean_over_prompts(study: Study) -> None:
    (axes,) = panels(draw_figure(study, "loss"))
    x, y = line(axes, "mean over prompts")
    np.testing.assert_array_equal(x, [1, 2, 3, 4, 8, 16])
    np.testing.assert_allclose(y, study.dataset["loss"].mean("prompt"))
    assert axes.get_xscale() == "log"


def test_predictions_are_compared_with_the_last(study: Study) -> None:
    shares, distances = panels(draw_figure(study, "prediction"))
    # The top token is the last one's from 4 recurrences on, and the divergence halves.
    np.testing.assert_allclose(line(shares, "the same from there on")[1], [0, 0, 0, 1, 1, 1])
    x, y = line(distances, "mean over tokens")
    np.testing.assert_array_equal(x, [1, 2, 3, 4, 8])
    np.testing.assert_allclose(y, 0.5 ** np.array([1, 2, 3, 4, 8]))


def test_exit_probabilities_are_bars(study: Study) -> None:
    (axes,) = panels(draw_figure(study, "exit-gate"))
    heights = [bar.get_height() for bar in axes.containers[0]]
    np.testing.assert_allclose(heights, study.dataset["exit_probability"].mean("prompt"))


def test_tokens_of_an_ordinary_prompt_and_of_the_farthest(study: Study) -> None:
    figure = draw_figure(study, "tokens")
    end = study.dataset["relative_distance_second_horizon"].values[-1, -1]
    order = np.argsort(end)
    for axes, prompt in zip(panels(figure), (order[PROMPTS // 2], order[-1]), strict=True):
        assert axes.get_title().startswith(f"Prompt {prompt}, ")
        wanted = study.dataset["token_relative_distance"].sel(site="last_layer").isel(prompt=int(prompt))
        wanted = wanted.transpose("token", "recurrence").astype(np.float64)
        np.testing.assert_allclose(image(axes), np.log10(wanted.values))
        names = [tick.get_text() for tick in axes.get_yticklabels()]
        assert names[:7] == ["Two", "apples", "cost", "three", "coins", ".", "Two"]
    # One range of colours for both.
    assert len({axes.images[0].get_clim() for axes in panels(figure)}) == 1


def test_diverged_prompts_are_left_out_of_medians() -> None:
    mixed = looped_study([contracting(), contracting(), overflowing], prompts=6, recurrences=8, horizon=8)
    finite = mixed.dataset.isel(prompt=np.flatnonzero(mixed.dataset["diverged_at"].values < 0))
    axes = panels(draw_figure(mixed, "norm-by-layer"))[0]
    np.testing.assert_allclose(line(axes, "0")[1], medians(finite["residual_norm"])[0])


def test_what_all_prompts_have_before_they_diverge_is_drawn() -> None:
    lost = looped_study(overflowing, prompts=3, recurrences=8, horizon=8)
    _, y = line(panels(draw_figure(lost, "norm-by-layer"))[0], "0")
    np.testing.assert_array_equal(np.isfinite(y), [True] * 4 + [False] * 4)


def test_a_study_of_one_recurrence_has_points() -> None:
    single = looped_study(contracting(), prompts=3, recurrences=1, horizon=4)
    axes = panels(draw_figure(single, "norm-by-layer"))[0]
    (drawn,) = [line for line in axes.lines if line.get_label() == "0"]
    assert drawn.get_marker() == "o"


@pytest.mark.parametrize(
    "name", ["distance-by-layer", "direction-by-recurrence", "stages-by-depth", "head-change", "horizons"]
)
def test_page_and_paper_show_the_same(study: Study, name: str) -> None:
    (kind,) = [kind for kind in STUDY_FIGURES if kind.name == name]
    plot = kind.draw(view_study(study), ReportSettings())
    for panel, axes in zip(plot.panels, panels(in_matplotlib.draw(plot)), strict=True):
        chart = go.Figure(in_plotly.draw(plot, panel))
        assert (chart.layout.yaxis.type == "log") == (axes.get_yscale() == "log")
        traces = [trace for trace in chart.data if trace.type == "scatter" and trace.hoverinfo != "skip"]
        drawn = [one for one in axes.lines if one.get_gid() != "mark" and not str(one.get_label()).startswith("_")]
        for trace in traces:
            if trace.name in {str(one.get_label()) for one in drawn}:
                one = next(one for one in drawn if one.get_label() == trace.name)
                np.testing.assert_allclose(trace.y, np.asarray(one.get_ydata(), dtype=np.float64), rtol=1e-6)
        assert {trace.name for trace in traces} >= {str(one.get_label()) for one in drawn}
        for heat in (trace for trace in chart.data if trace.type == "heatmap"):
            np.testing.assert_allclose(heat.z, image(axes), rtol=1e-6)


def test_plotly_knows_every_name_in_the_charts(study: Study) -> None:
    view = view_study(study)
    plots = [
        kind.draw(view, ReportSettings()) for kind in STUDY_FIGURES if not kind.for_paper and not kind.absent(view)
    ]
    charts = [in_plotly.draw(plot, panel) for plot in plots for panel in plot.panels]
    found = {trace.type for chart in charts for trace in go.Figure(chart).data}  # which raises for an unknown name
    assert found == {"scatter", "bar", "heatmap"}


LOOPED = staged_study([SHAPE, OTHER, SHAPE, OTHER], (2, 4, 2), model="looped", trained=2)
LONGER = staged_study([SHAPE] * 4 + [OTHER], (0, 8, 0), model="longer", trained=4)
PLAIN = staged_study(SHAPE, model="plain")


def test_compared_passes_and_their_reference() -> None:
    comparison = compare([LOOPED, LONGER, PLAIN])
    figure = draw_figure(comparison, "compared-concentration")
    first, second = panels(figure)
    assert labels(first) == ["1", "2", "plain (reference)"]
    assert labels(second) == ["1", "2", "3", "4", "plain (reference)"]
    x, y = line(first, "2")
    np.testing.assert_allclose(x, np.linspace(0, 100, 8), rtol=1e-6)
    np.testing.assert_allclose(y, np.concatenate([SHAPE[:2], OTHER[2:6], SHAPE[6:]]), rtol=1e-6)
    (reference,) = [line for line in first.lines if line.get_label() == "plain (reference)"]
    assert reference.get_linestyle() == "--"
    np.testing.assert_allclose(np.asarray(reference.get_ydata()), SHAPE, rtol=1e-6)


def test_a_recurrence_has_one_colour_in_all_panels_of_a_comparison() -> None:
    figure = draw_figure(compare([LOOPED, LONGER, PLAIN]), "compared-stages")
    colours: dict[str, set[Any]] = {}
    for axes in panels(figure):
        for drawn in axes.lines:
            colours.setdefault(str(drawn.get_label()), set()).add(drawn.get_color())
    assert set(colours) == {"1", "2", "3", "4", "plain (reference)"}
    assert all(len(found) == 1 for found in colours.values())


def test_panels_that_share_an_axis_show_all_of_it() -> None:
    high = staged_study([5 * SHAPE] * 2, (0, 8, 0), model="high", trained=2)
    figure = draw_figure(compare([LOOPED, high, PLAIN]), "compared-magnitude")
    for axes in panels(figure):
        bottom, top = axes.get_ylim()
        assert bottom <= 0.1
        assert top >= 4.5


def test_compared_curves_have_every_study() -> None:
    comparison = compare([LOOPED, LONGER, PLAIN])
    axes = panels(draw_figure(comparison, "compared-curves"))[0]
    assert labels(axes) == ["looped", "longer", "plain (reference)"]
    np.testing.assert_allclose(line(axes, "plain (reference)")[1], SHAPE, rtol=1e-6)
    # At the trained recurrence.
    np.testing.assert_allclose(line(axes, "looped")[1][2:6], OTHER[2:6], rtol=1e-6)


def test_likeness_and_drift_are_the_comparisons_own() -> None:
    comparison = compare([LOOPED, PLAIN])
    block, whole = panels(draw_figure(comparison, "compared-likeness"))
    for axes, span in ((block, "block"), (whole, "pass")):
        wanted = comparison.dataset["overall_similarity"].sel(study="looped", span=span).values[:4]
        np.testing.assert_allclose(line(axes, "correlation")[1], wanted)
    level, order = panels(draw_figure(comparison, "compared-drift"))
    for axes, variable in ((level, "drift"), (order, "own_similarity")):
        wanted = comparison.dataset[variable].sel(study="looped", measure="residual magnitude").values[:4]
        y = line(axes, "residual magnitude")[1]
        np.testing.assert_allclose(y[np.isfinite(y)], wanted[np.isfinite(y)])
        # Where it is the pass itself, nothing has moved, and 0 has no logarithm.
        assert np.isfinite(y).sum() == (2 if variable == "drift" and axes.get_yscale() == "log" else 4)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.02, "0.02"),
        (350.0, "350"),
        (2e-7, "2·10⁻⁷"),
        (-0.5, "−0.5"),
        (1e6, "1·10⁶"),
        (0.999e-3, "9.99·10⁻⁴"),
    ],
)
def test_numbers_on_axes_need_no_markup(value: float, shown: str) -> None:
    assert number(value) == shown


def test_powers_of_ten_are_few_and_even() -> None:
    assert decade(-12) == "10⁻¹²"
    assert decade_ticks(-7.2, 0.3) == [-7, -5, -3, -1]
    assert decade_ticks(-2.0, 0.0) == [-2, -1, 0]
    assert len(decade_ticks(-300.0, 300.0)) <= 7


def test_a_study_and_a_comparison_put_the_same_layers_in_the_same_place() -> None:
    shallow = staged_study([OTHER] * 3, (2, 4, 2), model="looped", trained=2)
    own = panels(draw_figure(shallow, "concentration-by-recurrence"))[0]
    beside = panels(draw_figure(compare([staged_study(SHAPE, model="ff"), shallow]), "compared-concentration"))[0]
    everywhere = np.concatenate([np.asarray(drawn.get_xdata(), dtype=np.float64) for drawn in own.lines])
    block = line(own, "2")[0]
    np.testing.assert_allclose(block, line(beside, "2")[0][2:6])
    np.testing.assert_allclose(np.unique(everywhere), np.linspace(0, 100, 8))
