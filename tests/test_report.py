"""The report as a file: self-contained, complete, and safe with any text. Drawing is tested in a browser."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import pytest

from loopscope.answers.answer import Criterion
from loopscope.answers.quantities import VISIT_QUANTITIES
from loopscope.answers.quick import quick_answers
from loopscope.errors import ConfigError, StorageError, StudyError
from loopscope.measures.heads import CHANGE_NAMES, HEAD_NAMES
from loopscope.measures.readout import EXIT_READOUTS, TOKEN_READOUTS
from loopscope.measures.registry import DECLARED
from loopscope.report.page.write import write_report
from loopscope.report.settings import ReportSettings
from loopscope.study import Study
from report_page import Page, decoded, page_of
from synthetic_study import (
    contracting,
    feed_forward_study,
    growing,
    looped_study,
    orbiting,
    overflowing,
)

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)"></title>&amp;{{7*7}}'

LOOPED_FIGURES = {
    "horizon-drift",
    "norm-growth",
    "distance",
    "distance-by-recurrence",
    "step",
    "step-by-recurrence",
    "cosine",
    "second-horizon",
    "layer-cosine",
    "cycle-similarity",
    "trajectory-2d-0",
    "path-independence",
    "loss",
    "final-token",
    "readout-divergence",
    "exit-changed",
    "exit-loss",
    "exit-kl",
    "norm-by-layer",
    "head-change",
    "heads-stable",
    "head-distance",
    "attention-cycle",
    "neurons",
    *(
        f"{quantity}-by-{layout}"
        for quantity in ("concentration", "sinks", "mixing", "entropy", "magnitude", "massive")
        for layout in ("depth", "recurrence")
    ),
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(looped_study(contracting()), tmp_path_factory.mktemp("report"))


def test_every_figure_is_there_and_every_answer_links_to_one(page: Page) -> None:
    assert page.anchors >= LOOPED_FIGURES
    links = {str(attributes.get("href")) for tag, attributes in page.elements if tag == "a"}
    targets = {f"#{name}" for name in page.anchors | page.ids("section")}
    assert links <= targets
    assert {"#horizon-drift", "#layer-cosine", "#distance", "#step", "#path-independence", "#loss", "#limits"} <= links


def test_answers_come_first_and_word_for_word(page: Page) -> None:
    for answer in quick_answers(looped_study(contracting())):
        assert answer.sentence in page.words
    tags = [tag for tag, _ in page.elements]
    assert tags.index("article") < tags.index("figure")


def test_every_figure_has_a_title_a_caption_and_named_axes(page: Page) -> None:
    tags = [tag for tag, _ in page.elements]
    maps = {"head-maps", "floorplan"}
    charts = {key.removesuffix(f"-{letter}") for key in page.figures for letter in ascii_lowercase} | maps
    assert page.anchors >= maps
    # Of these every panel has an anchor of its own.
    whole = {"stages-by-recurrence", "stages-by-depth", "trajectories-2d", "token-distances"}
    assert page.ids("figure") <= charts | whole | {"first-figure"}
    assert tags.count("figure") == tags.count("figcaption") == len(page.ids("figure"))
    for anchor, plot in page.figures.items():
        layout = plot["layout"]
        assert layout["xaxis"]["title"]["text"], anchor
        if not anchor.startswith("tokens"):  # their rows are named by the tokens
            assert layout["yaxis"]["title"]["text"], anchor


def test_nothing_is_loaded_and_no_data_can_be_sent(page: Page) -> None:
    for tag, attributes in page.elements:
        assert not attributes.keys() & {"src", "srcset", "action", "onclick", "onload"}, tag
        assert tag not in {"iframe", "object", "embed", "base", "form", "img"}
        if tag in {"a", "link"}:
            assert str(attributes["href"]).startswith(("#", "data:"))
    policy = next(a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.split("style-src")[0]
    options = next(json.loads(text) for attributes, text in page.scripts if attributes.get("id") == "plot-options")
    assert options["displaylogo"] is False
    assert options["showSendToCloud"] is False
    assert options["plotlyServerURL"] == ""
    assert "sendChartToCloud" in options["modeBarButtonsToRemove"]


@pytest.fixture
def hostile_study() -> Study:
    study = looped_study(contracting(), prompts=3)
    tokens = [{**entry, "text": HOSTILE, "token_strings": [HOSTILE] * 10} for entry in study.tokens]
    manifest = dict(study.manifest)
    manifest["model"] = {**manifest["model"], "name": HOSTILE, "norm_placement": HOSTILE}
    manifest["prompts"] = {"source": HOSTILE, HOSTILE: HOSTILE}
    return dataclasses.replace(study, tokens=tokens, manifest=manifest)


def test_text_from_outside_stays_text(hostile_study: Study, tmp_path: Path, page: Page) -> None:
    found = page_of(hostile_study, tmp_path)
    kinds = {tag for tag, _ in page.elements}
    assert {tag for tag, _ in found.elements} <= kinds  # no img, no element that a plain study does not have
    assert sum(tag == "script" for tag, _ in found.elements) == len(found.scripts)
    assert HOSTILE in found.words
    # Plotly reads a little HTML in its texts: there, markup must arrive as entities.
    drawn = next(plot for anchor, plot in found.figures.items() if anchor.startswith("tokens"))
    for text in [*drawn["layout"]["yaxis"]["ticktext"], *drawn["data"][0]["text"][0]]:
        assert text.startswith("&lt;script&gt;")
        assert "<" not in text


def test_feed_forward_study_gets_a_shorter_report(tmp_path: Path) -> None:
    found = page_of(feed_forward_study(), tmp_path)
    quantities = [quantity.anchor for quantity in VISIT_QUANTITIES]
    alone = {"cycle-similarity", "attention-cycle", "head-sinks", "neurons", "stages-by-depth", "massive-places"}
    assert found.anchors - {"head-maps", "floorplan"} == alone | {f"{quantity}-by-depth" for quantity in quantities}
    assert "This model is feed-forward" in found.words
    assert "4 layers, feed-forward" in found.words


@pytest.mark.parametrize(
    "study",
    [
        pytest.param(lambda: looped_study(growing, injection="none"), id="norm grows"),
        pytest.param(lambda: looped_study([contracting(), orbiting, overflowing]), id="prompts differ"),
        pytest.param(lambda: looped_study(overflowing, prompts=2), id="all diverged"),
        pytest.param(lambda: looped_study(contracting(), prompts=1, tokens=1), id="one token"),
        pytest.param(lambda: looped_study(contracting(), recurrences=1, trained=1), id="one recurrence"),
        pytest.param(lambda: looped_study(contracting(), recurrences=24, horizon=16), id="beyond the horizon"),
        pytest.param(lambda: looped_study(contracting(noise=0.0, rate=0.1), floor=0.0), id="exact zeros"),
    ],
)
def test_unusual_studies_are_drawn(study: object, tmp_path: Path) -> None:
    assert callable(study)
    found = page_of(study(), tmp_path)
    assert "norm-growth" in found.anchors
    assert not re.search(r"\bnan\b|\binf\b", found.words, re.IGNORECASE)


def test_parts_that_were_skipped_are_left_out(tmp_path: Path) -> None:
    study = looped_study(contracting())
    parts = [
        "path_distance",
        "path_cosine_distance",
        "loss",
        "noise_floor",
        "cycle_similarity",
        "attention_cycle_distance",
    ]
    parts += ["trajectory", "trajectory_variance", "visit", "visit_other"]
    parts += [
        "prediction_neurons",
        "suppression_neurons",
        *TOKEN_READOUTS,
        *EXIT_READOUTS,
        "token_attention_change",
        *HEAD_NAMES,
        *CHANGE_NAMES,
        "head_stable_from",
        *(name for kind in DECLARED if kind.part == "stages" for name in kind.variables),
        "attention_map",
        "mapped_prompt",
    ]
    parts += [str(name) for name in study.dataset.coords if str(name).startswith(("depth", "map_"))]
    found = page_of(dataclasses.replace(study, dataset=study.dataset.drop_vars(parts)), tmp_path)
    left_out = {
        "path-independence",
        "loss",
        "exit-changed",
        "cycle-similarity",
        "trajectory-2d-0",
        "head-change",
        "magnitude-by-depth",
    }
    assert not found.anchors & left_out
    assert not found.ids("figure") & {"head-maps", "floorplan"}
    assert "distance" in found.anchors


def test_prompts_can_be_chosen(tmp_path: Path) -> None:
    study = looped_study(contracting(), prompts=5)
    found = page_of(study, tmp_path, ReportSettings(prompts=(3, 1)))
    assert [name for name in found.figures if name.startswith("tokens")] == ["tokens-3", "tokens-1"]
    with pytest.raises(ConfigError, match="prompts 0 to 4"):
        page_of(study, tmp_path, ReportSettings(prompts=(5,)))


def test_slowest_prompt_is_drawn_beside_an_ordinary_one(tmp_path: Path) -> None:
    study = looped_study([contracting(0.5), contracting(0.5), contracting(0.5), contracting(0.8)], prompts=4)
    found = page_of(study, tmp_path)
    drawn = [name for name in found.figures if name.startswith("tokens")]
    assert drawn[1] == "tokens-3"
    assert drawn[0] in {"tokens-0", "tokens-1", "tokens-2"}


def test_criterion_of_the_settings_is_used_and_shown(tmp_path: Path) -> None:
    settings = ReportSettings(criterion=Criterion(reached_level=0.037))
    words = page_of(looped_study(contracting(), prompts=2), tmp_path, settings).words
    assert "reached level 0.037" in words
    assert "Differences of the mean loss below this many nats" in words  # the reasons of the thresholds


def test_large_study_stays_a_small_file(tmp_path: Path) -> None:
    study = looped_study(contracting(0.99), prompts=2, tokens=80, recurrences=1000, horizon=500)
    found = page_of(study, tmp_path)
    plotted = sum(len(text) for attributes, text in found.scripts if attributes.get("type") == "application/json")
    assert plotted < 1_000_000
    tokens = next(plot for name, plot in found.figures.items() if name.startswith("tokens"))
    assert len(tokens["layout"]["yaxis"]["ticktext"]) == 32
    assert "only the last 32 of its 80 tokens are drawn" in found.words


def test_lines_are_medians_over_prompts(page: Page) -> None:
    lines = [trace for trace in page.figures["distance-b"]["data"] if str(trace.get("name", "")).isdigit()]
    assert [line["name"] for line in lines] == ["0", "1", "2"]
    assert [line["hovertemplate"].partition(":")[0] for line in lines] == ["layer 0", "layer 1", "layer 2"]
    study = looped_study(contracting())
    expected = np.median(study.dataset["relative_distance"].sel(layer=1).values, axis=-1)
    np.testing.assert_allclose(decoded(lines[1]["y"]), expected, rtol=1e-6)


def test_study_that_was_saved_gives_the_same_report(tmp_path: Path) -> None:
    study = looped_study(contracting(), prompts=2)
    study.save(tmp_path / "study")
    first = write_report(study, tmp_path / "first.html").read_text()
    assert write_report(Study.load(tmp_path / "study"), tmp_path / "second.html").read_text() == first


def test_errors_leave_what_was_there(tmp_path: Path) -> None:
    study = looped_study(contracting(), prompts=1)
    target = tmp_path / "report.html"
    target.write_text("before")
    with pytest.raises(StudyError, match="horizon_drift"):
        write_report(dataclasses.replace(study, dataset=study.dataset.drop_vars("horizon_drift")), target)
    assert target.read_text() == "before"
    with pytest.raises(StorageError):
        write_report(study, target / "inside-a-file" / "report.html")


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="prompts count from 0"):
        ReportSettings(prompts=(-1,))
    with pytest.raises(ConfigError, match="most_tokens"):
        ReportSettings(most_tokens=1)
