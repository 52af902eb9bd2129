"""Interventions as text, and whether they fit a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopscope import AnalyzeSettings, capture
from loopscope.errors import ConfigError
from loopscope.models.interventions.kinds import (
    Damp,
    FreezeInjection,
    Intervention,
    Recurrences,
    ReplaceToken,
    ScaleBranch,
    StartFrom,
    StartScaled,
    StartSeed,
)
from loopscope.models.interventions.parsing import parse_intervention, parse_interventions
from small_models import ADDED, FEED_FORWARD, INJECTED, LOOP_NORM, subject
from test_contract import spinner

COUNT = st.integers(0, 10**6)
NUMBERED = st.integers(1, 10**6)
"""Recurrences."""
NUMBER = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def recurrences(draw: st.DrawFn) -> Recurrences:
    first = draw(NUMBERED)
    return Recurrences(first, draw(st.none() | st.integers(first, 10**7)))


@st.composite
def branches(draw: st.DrawFn) -> ScaleBranch:
    stage = draw(st.sampled_from(["prelude", "recurrent", "coda"]))
    span = draw(st.none() | recurrences()) if stage == "recurrent" else None
    branch = draw(st.sampled_from(["mlp", "attention"]))
    return ScaleBranch(branch, stage, draw(st.none() | COUNT), draw(NUMBER), span)  # type: ignore[arg-type]


@st.composite
def replacements(draw: st.DrawFn) -> ReplaceToken:
    token = draw(st.integers(-99, 99))
    other = st.integers(-99, 99).filter(lambda index: index != token)
    return ReplaceToken(token, draw(NUMBERED), draw(st.sampled_from(["zeros", "noise"]) | other))  # type: ignore[arg-type]


ANY = (
    branches()
    | replacements()
    | st.builds(FreezeInjection, NUMBERED)
    | st.builds(Damp, st.floats(0, 1, exclude_min=True))
    | st.builds(StartFrom, st.sampled_from(["zeros", "prelude"]))
    | st.builds(StartSeed, st.integers())
    | st.builds(StartScaled, NUMBER.filter(bool))
)


@given(ANY)
def test_an_intervention_is_read_back_from_its_text(intervention: Intervention) -> None:
    assert parse_intervention(str(intervention)) == intervention


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("mlp:prelude.1=0", ScaleBranch("mlp", "prelude", 1, 0.0)),
        ("attention:recurrent.*@4-=0.5", ScaleBranch("attention", "recurrent", None, 0.5, Recurrences(4, None))),
        ("mlp:recurrent.2@2-5=-1", ScaleBranch("mlp", "recurrent", 2, -1.0, Recurrences(2, 5))),
        ("mlp:recurrent.2@3=1e-3", ScaleBranch("mlp", "recurrent", 2, 0.001, Recurrences(3, 3))),
        ("inject=frozen", FreezeInjection(1)),
        ("inject@3=frozen", FreezeInjection(3)),
        ("damp=.5", Damp(0.5)),
        ("start=zeros", StartFrom("zeros")),
        ("start=seed:7", StartSeed(7)),
        ("start=scale:0.5", StartScaled(0.5)),
        ("token:-1@4=noise", ReplaceToken(-1, 4, "noise")),
        ("token:2@1=token:-3", ReplaceToken(2, 1, -3)),
    ],
)
def test_the_grammar(text: str, meaning: Intervention) -> None:
    assert parse_intervention(text) == meaning


def test_settings_keep_the_canonical_text() -> None:
    settings = AnalyzeSettings(intervene=("damp=0.50", "inject=frozen", "mlp:coda.0=0.0"))
    assert settings.intervene == ("damp=0.5", "inject@1=frozen", "mlp:coda.0=0")
    assert parse_interventions("damp=1") == (Damp(1.0),)  # a single text is no list of characters


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["mpl:prelude.1=0"], "'mpl:prelude.1=0' is no intervention; write one of mlp:STAGE.LAYER"),
        ([""], "'' is no intervention"),
        (["mlp:prelude=0"], r"cannot be read; write mlp:STAGE.LAYER\[@RECURRENCES\]=FACTOR, with STAGE one of prelude"),
        (["mlp:body.1=0"], "STAGE one of prelude, recurrent, coda"),
        (["attention:recurrent.1=much"], "cannot be read; write attention:"),
        (["mlp:recurrent.1@-3=0"], "RECURRENCES like 3, 2-5 or 4-"),
        (["mlp:recurrent.1@5-2=0"], "Recurrences go up from 1.*got 5-2"),
        (["mlp:recurrent.1@0-2=0"], "Recurrences go up from 1.*got 0-2"),
        (["inject@0=frozen"], "Recurrences count from 1, got 0"),
        (["token:1@0=zeros"], "Recurrences count from 1, got 0"),
        (["mlp:prelude.1@3=0"], "The prelude runs once.*leave out @3"),
        (["mlp:prelude.1=nan"], "finite factor, got nan"),
        (["inject@2=0"], r"write inject\[@T\]=frozen"),
        (["damp=0"], "above 0 and up to 1.*got 0"),
        (["damp=nan"], "above 0 and up to 1.*got nan"),
        (["start=ones"], r"write start=zeros\|prelude\|seed:N\|scale:FACTOR"),
        (["start=scale:0"], "start=zeros says that"),
        (["token:1=zeros"], "write token:INDEX@T="),
        (["token:1@2=token:1"], "puts a token's own state in its place"),
        (["damp=0.5", "damp=0.7"], "'damp=0.5' and 'damp=0.7' contradict each other; keep one"),
        (["start=zeros", "start=seed:1"], "contradict"),
        (["inject@1=frozen", "inject@2=frozen"], "contradict"),
        (["token:1@2=zeros", "token:1@2=noise"], "contradict"),
        (["mlp:recurrent.*@3-=0", "mlp:recurrent.1@1-3=2"], "contradict"),
        (["mlp:coda.0=0", "mlp:coda.0=0"], "contradict"),
    ],
)
def test_texts_that_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_interventions(texts)


@pytest.mark.parametrize(
    "texts",
    [
        ["mlp:recurrent.*@3-=0", "mlp:recurrent.1@1-2=2", "attention:recurrent.1=0", "mlp:prelude.1=0"],
        ["token:1@2=zeros", "token:1@3=zeros", "token:2@2=token:1"],
        ["damp=0.5", "start=zeros", "inject=frozen"],
    ],
)
def test_what_does_not_overlap_goes_together(texts: list[str]) -> None:
    assert len(parse_interventions(texts)) == len(texts)


IDS = [[3, 1, 4, 1, 5], [2, 7]]


@pytest.mark.parametrize(
    ("shape", "texts", "message"),
    [
        (INJECTED, ["mlp:recurrent.2=0"], "names layer 2, and the recurrent of small has 2, counted from 0"),
        (LOOP_NORM, ["mlp:prelude.0=0"], "small has no layers there; its layers are in recurrent"),
        (FEED_FORWARD, ["mlp:recurrent.*=0"], "its layers are in prelude and coda"),
        (FEED_FORWARD, ["damp=0.5"], "needs a loop, and small is feed-forward; only mlp: and attention:"),
        (FEED_FORWARD, ["token:0@1=zeros"], "needs a loop"),
        (LOOP_NORM, ["inject=frozen"], "small injects nothing; leave it out"),
        (LOOP_NORM, ["start=zeros"], "would leave no prompt.*use start=scale:FACTOR"),
        (LOOP_NORM, ["start=seed:3"], "draws none but starts from the prelude's output"),
        (ADDED, ["start=prelude"], "changes nothing.*leave it out"),
        (INJECTED, ["mlp:recurrent.0@5=0"], "names recurrence 5, and 4 are run; name an earlier"),
        (INJECTED, ["mlp:recurrent.0@1-5=0"], "names recurrence 5"),
        (INJECTED, ["inject@9=frozen"], "names recurrence 9"),
        (INJECTED, ["token:0@5=zeros"], "names recurrence 5"),
        (INJECTED, ["token:4@1=zeros"], "names token 4, and prompt 1 has 2 tokens"),
        (INJECTED, ["token:0@1=token:-3"], "names token -3, and prompt 1 has 2 tokens"),
        (INJECTED, ["token:1@1=token:-1"], "names the same token twice in prompt 1, which has 2 tokens"),
        (INJECTED, ["token:1@1=zeros", "token:-1@1=noise"], "replace the same token of prompt 1"),
    ],
)
def test_interventions_that_do_not_fit(shape: object, texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        capture(subject(shape), IDS, intervene=texts)  # type: ignore[arg-type]


def test_a_model_that_is_only_watched_takes_none() -> None:
    with pytest.raises(ConfigError, match=r"only watched, so that no intervention can be made; leave them out"):
        capture(spinner(), IDS, intervene=["damp=0.5"])


def test_one_initial_state_and_one_set_of_interventions() -> None:
    model = subject()
    state = capture(model, IDS).initial_state
    with pytest.raises(ConfigError, match="'start=zeros' both say where to start; give one"):
        capture(model, IDS, initial_state=state, intervene=["start=zeros"])
    with pytest.raises(ConfigError, match=r"given with interventions \(damp=0.5\) already"):
        capture(model.intervened("damp=0.5"), IDS, intervene=["start=zeros"])
