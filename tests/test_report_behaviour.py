"""What a reader sees of verdicts: the section of a study's report, the quick answer, and the report on trajectories."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loopscope.answers.answer import Answer, Outcome
from loopscope.answers.quick import quick_answers
from loopscope.dynamics.verdicts import KINDS, JudgedFiles, JudgedTrajectory, Kind, Verdict
from loopscope.report.figures.look import KIND_LOOKS
from loopscope.report.page.write import write_behaviour_report
from loopscope.report.settings import ReportSettings
from loopscope.study import Study
from report_page import Page, decoded, page_of, unpacked
from synthetic_study import LAYERS, contracting, feed_forward_study, looped_study, with_behaviour

HOSTILE = '<script>hacked = 1</script><img src="x" onerror="hacked = 2">"&'


@pytest.fixture(scope="module")
def study() -> Study:
    """With all kinds, of two prompts whose text is hostile."""
    study = looped_study(contracting(), prompts=2)
    tokens = [{**entry, "text": HOSTILE, "token_strings": [HOSTILE] * 10} for entry in study.tokens]
    return with_behaviour(dataclasses.replace(study, tokens=tokens))


@pytest.fixture(scope="module")
def page(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(study, tmp_path_factory.mktemp("report"))


def panel_of(page: Page) -> dict[str, Any]:
    """What the page gives the script of the tokens, each group's tokens unpacked."""
    found: dict[str, Any] = next(json.loads(text) for each, text in page.scripts if each.get("id") == "token-panel")
    for group in found["groups"]:
        group["tokens"] = json.loads(unpacked(group["tokens"]))
    return found


def answer_of(study: Study) -> Answer:
    return next(answer for answer in quick_answers(study) if answer.key == "behaviour")


# ---- the section ----


def test_a_study_with_all_kinds_has_every_figure(page: Page) -> None:
    shown = {
        "behaviour-shares",
        "behaviour-layers",
        "behaviour-roles",
        "behaviour-co-occurrence",
        "behaviour-tokens",
        "sensitivity-displacement",
        "sensitivity-cosine",
        "extreme-orbit",
        "extreme-slider",
        "behaviour-cosine",
        "extreme-layer-0",
    }
    assert shown <= page.ids("figure") | page.ids("div")
    sections = [attributes["id"] for tag, attributes in page.elements if tag == "section" and "id" in attributes]
    assert sections.index("behaviour") == sections.index("settling") + 1


def test_no_two_kinds_look_alike() -> None:
    assert set(KIND_LOOKS) == set(KINDS)
    for part in ("colour", "letter"):
        assert len({getattr(look, part) for look in KIND_LOOKS.values()}) == len(KINDS)


def test_both_methods_stand_side_by_side_with_their_intervals(page: Page, study: Study) -> None:
    traces = page.figures["behaviour-shares"]["data"]
    assert [trace["name"] for trace in traces if trace.get("name")] == [
        "tokens, displacement",
        "tokens, cosine",
        "prompts, displacement",
        "prompts, cosine",
    ]
    fixed = int((study.dataset["verdict"].values[-1] == 0).sum())
    unknown = int((study.dataset["verdict"].values[-1] == KINDS.index(Kind.UNKNOWN)).sum())
    words = f"tokens, displacement, fixed point: {fixed} of {20 - unknown}, {unknown} more may be"
    (point,) = [trace for trace in traces if trace.get("hovertemplate", "").startswith(words)]
    assert decoded(point["x"]) == pytest.approx([fixed / (20 - unknown)])
    assert not point["marker"]["symbol"].endswith("-open")
    # The cosine method takes tokens at the floor for fixed points: there is none at the floor, drawn as a bound.
    words = f"tokens, cosine, at floor: 0 of {20 - unknown}"
    floor = next(trace for trace in traces if words in trace.get("hovertemplate", ""))
    assert floor["marker"]["symbol"] == "triangle-left-open"
    assert decoded(floor["x"])[0] > unknown / 20  # the undecided ones may all be


def test_rates_of_one_in_thousands_are_on_the_axis(tmp_path: Path) -> None:
    codes = np.zeros((LAYERS, 40, 100), dtype=np.int8)
    codes[-1, 7, 3] = KINDS.index(Kind.SLIDER)
    study = with_behaviour(looped_study(contracting(), prompts=40, tokens=100), codes)
    plot = page_of(study, tmp_path).figures["behaviour-shares"]
    assert plot["layout"]["xaxis"]["type"] == "log"
    assert plot["layout"]["xaxis"]["range"][0] < np.log10(1 / 4000)
    assert any("1 of 4,000, 0.025 %" in trace.get("hovertemplate", "") for trace in plot["data"])
    answer = answer_of(study)
    assert "1 (0.025 %) slides on without a limit" in answer.sentence
    assert answer.outcome is Outcome.PARTLY


def test_the_chosen_settings_are_framed(page: Page) -> None:
    plot = page.figures["sensitivity-displacement"]
    (frame,) = plot["layout"]["shapes"]
    assert (frame["x0"] + frame["x1"], frame["y0"] + frame["y1"]) == (2, 2)  # the middle of 3 x 3
    assert plot["layout"]["yaxis"]["ticktext"] == ["7.5", "30", "120"]


def test_the_tokens_of_the_page_are_those_of_the_study(page: Page, study: Study) -> None:
    panel = panel_of(page)
    data = study.dataset.isel(judged_layer=-1)
    assert [look["name"] for look in panel["looks"]] == list(map(str, KINDS))
    for prompt, group in enumerate(sorted(panel["groups"], key=lambda group: group["tokens"][0]["kind"])):
        rows = np.argsort(data["verdict"].values[:, 0], kind="stable")
        assert [token["kind"] for token in group["tokens"]] == data["verdict"].values[rows[prompt]].tolist()
    for token in panel["groups"][0]["tokens"]:
        assert HOSTILE.startswith(token["label"].rstrip("…"))
        assert np.exp(np.array(token["curve"]) / 1000)[-1] == pytest.approx(
            0.2 if token["kind"] == KINDS.index(Kind.ORBIT) else 0.12, rel=1e-3
        )
    orbit = next(token for token in panel["groups"][0]["tokens"] if token["kind"] == KINDS.index(Kind.ORBIT))
    way = np.array(orbit["path"]) / panel["finest"] * orbit["reach"]
    np.testing.assert_allclose(np.hypot(*way), 0.3, rtol=1e-3)
    assert orbit["line"] == (
        "It is periodic, with 5.5 recurrences a turn, at 30 % of its norm from the centre; it still moves by 20 % of "
        "its norm, 200 times the noise floor."
    )
    facts = dict(orbit["facts"])
    assert facts["period (recurrences)"] == "5.5"
    assert facts["tried with another"] == "window and horizon"


def test_the_page_holds_a_bounded_number_of_prompts(tmp_path: Path) -> None:
    study = with_behaviour(looped_study(contracting(), prompts=12))
    assert len(panel_of(page_of(study, tmp_path))["groups"]) == 4
    asked = page_of(study, tmp_path, ReportSettings(prompts=(7,)))
    assert len(panel_of(asked)["groups"]) == 1
    assert "Prompt 7: Two apples" in asked.words


def test_prompts_with_padding_and_diverged_tokens_are_drawn(tmp_path: Path) -> None:
    study = with_behaviour(looped_study(contracting(), prompts=2))
    data = study.dataset.copy(deep=True)
    data["verdict"][..., 1, 6:] = -1
    data["verdict_cosine"][..., 1, 6:] = -1
    data["tail_path"][..., 0, 3] = np.nan
    data["displacement"][:, 0, 3] = np.nan
    panel = panel_of(page_of(Study(data, study.manifest, study.tokens), tmp_path, ReportSettings(prompts=(0, 1))))
    gone = panel["groups"][0]["tokens"][3]
    assert gone["path"] is None
    assert gone["curve"] is None
    assert panel["groups"][1]["tokens"][7]["kind"] == -1


def test_one_judged_layer_leaves_out_what_compares_layers(tmp_path: Path) -> None:
    study = with_behaviour(looped_study(contracting(), prompts=2))
    last = Study(study.dataset.isel(judged_layer=[-1]), study.manifest, study.tokens)
    figures = page_of(last, tmp_path).ids("figure")
    assert "behaviour-shares" in figures
    assert not {"behaviour-layers", "behaviour-co-occurrence"} & figures


def test_without_verdicts_there_is_no_section_and_the_answer_says_why(tmp_path: Path) -> None:
    study = looped_study(contracting(), prompts=2)
    assert not any("behaviour" in each for each in page_of(study, tmp_path).ids("figure"))
    answer = answer_of(study)
    assert answer.outcome is Outcome.NOT_APPLICABLE
    assert "No token's limit was judged" in answer.sentence


def test_a_feed_forward_model_is_not_asked(tmp_path: Path) -> None:
    study = feed_forward_study(prompts=3)
    assert "behaviour" not in page_of(study, tmp_path).ids("section")
    assert "behaviour" not in {answer.key for answer in quick_answers(study)}


def test_the_panel_says_why_a_token_cannot_be_told(page: Page) -> None:
    panel = panel_of(page)
    tokens = [token for group in panel["groups"] for token in group["tokens"]]
    unknown = [token["line"] for token in tokens if token["kind"] == KINDS.index(Kind.UNKNOWN)]
    assert unknown
    assert all(line.startswith("It wanders: its displacement still grows at long lags") for line in unknown)


# ---- the answer ----


@pytest.mark.parametrize(
    ("kinds", "outcome", "verdict"),
    [
        ([Kind.FIXED_POINT], Outcome.YES, "all settle"),
        ([Kind.FIXED_POINT, Kind.AT_FLOOR], Outcome.YES, "all settle"),
        ([Kind.ORBIT], Outcome.NO, "all: orbit"),
        ([Kind.UNKNOWN], Outcome.CANNOT_TELL, "cannot tell"),
        ([Kind.FIXED_POINT, Kind.UNKNOWN], Outcome.PARTLY, "50 % undecided; of the rest all settle"),
        ([Kind.FIXED_POINT, Kind.ORBIT], Outcome.PARTLY, "50 % settle, 50 % orbit"),
    ],
)
def test_the_answer_gives_the_commonest_kind(kinds: list[Kind], outcome: Outcome, verdict: str) -> None:
    codes = np.resize([KINDS.index(kind) for kind in kinds], (LAYERS, 4, 10)).astype(np.int8)
    answer = answer_of(with_behaviour(looped_study(contracting(), prompts=4), codes))
    assert (answer.outcome, answer.verdict) == (outcome, verdict)
    assert answer.figure == "behaviour-shares"
    assert any("1 of 40 verdicts change within a shorter window" in limit for limit in answer.limits)


def test_what_was_not_found_has_an_upper_bound() -> None:
    codes = np.zeros((LAYERS, 4, 10), dtype=np.int8)
    answer = answer_of(with_behaviour(looped_study(contracting(), prompts=4, dtype="bfloat16"), codes))
    assert "No orbit or slider was found; up to 60 % of tokens could still be one (95 %)" in answer.sentence
    assert "0 of 40, 0 % to 60 %" in str(answer.evidence["tokens: orbit"])
    assert any("In bfloat16" in limit for limit in answer.limits)
    codes[:, :3] = KINDS.index(Kind.UNKNOWN)
    answer = answer_of(with_behaviour(looped_study(contracting(), prompts=4), codes))
    assert answer.outcome is Outcome.CANNOT_TELL
    assert "10 of 10 decided tokens (100 %)" in answer.sentence
    assert "30 of 40 tokens are undecided" in answer.sentence
    assert "up to 100 % of tokens could still be one (95 %, counting the undecided ones)" in answer.sentence


# ---- trajectories of other tools ----


def judged(count: int = 5, kind: Kind = Kind.ORBIT, **fields: Any) -> JudgedFiles:
    angle = np.arange(24) * 0.8
    path = tuple(zip((0.3 * np.cos(angle)).tolist(), (0.3 * np.sin(angle)).tolist(), strict=True))
    verdict = Verdict(
        kind=kind,
        reason=HOSTILE,
        method="displacement",
        floor=1e-3,
        level=0.4,
        period=7.85,
        amplitude=0.3,
        displacement=(0.1, 0.2, 0.0),
        **fields,
    )
    return JudgedFiles(
        trajectories=[
            JudgedTrajectory(
                file=f"/some/where/{HOSTILE.replace('/', '')}.npz",
                array="h",
                token=token,
                recurrences=48,
                verdict=verdict,
                path=path if token < 3 else (),
            )
            for token in range(count)
        ],
        manifest={
            "kind": "verdicts",
            "method": "displacement",
            "settings": {"window": 256, "floor_factor": 30.0},
            "dtype": "bfloat16",
            "first_recurrence": 1,
            "sources": [{"file": "/some/where/a.npz", "array": "h", "shape": [count, 48, 8], "sha256": "ab" * 32}],
            "versions": {"loopscope": "0.1.0"},
        },
    )


def test_the_report_on_trajectories_counts_lists_and_draws_them(tmp_path: Path) -> None:
    path = write_behaviour_report(judged(unstable=("window",)), tmp_path / "report.html")
    page = Page(path)
    assert {"behaviour-shares", "behaviour-tokens", "extreme-orbit"} <= page.ids("figure") | page.ids("div")
    assert "5 of 5" in page.words
    assert "All: orbit" in page.words.replace("all: orbit", "All: orbit")
    assert "bfloat16" in page.words
    assert "0.0010 of the norm (median)" in page.words
    assert "a.npz h" in page.words
    assert "/some/where" not in page.words.split("Files", 1)[0]  # names in the page's head, not the owner's folders
    assert "5 of 5 verdicts change within a shorter window." in page.words
    (group,) = panel_of(page)["groups"]
    first, last = group["tokens"][0], group["tokens"][-1]
    assert first["line"] == HOSTILE
    assert len(first["path"][0]) == 24
    assert last["path"] is None
    assert last["curve"][2] is None  # no motion has no place on a logarithmic axis
    scripts = [content for attributes, content in page.scripts if not attributes]
    assert all(HOSTILE not in script for script in scripts)
    assert HOSTILE not in path.read_text()


def test_a_long_list_is_cut_and_says_so(tmp_path: Path) -> None:
    path = write_behaviour_report(judged(count=450), tmp_path / "report.html")
    page = Page(path)
    assert "The first 200 of 450 trajectories" in page.words
    (group,) = panel_of(page)["groups"]
    assert len(group["tokens"]) == 400
    assert group["note"] == "The first 400 of 450 trajectories."


@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind_makes_a_page(kind: Kind, tmp_path: Path) -> None:
    page = Page(write_behaviour_report(judged(count=1, kind=kind), tmp_path / "report.html"))
    assert "behaviour-shares" in page.ids("figure")
