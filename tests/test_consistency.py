"""No two sentences about one study may be false together: over the stories of the suite, and over any claims."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

import loopscope
from loopscope.answers.answer import Answer, Claim, Outcome
from loopscope.answers.consistency import EXCLUDES, consistent, contradictions
from loopscope.answers.quick import quick_answers
from loopscope.answers.rates import driver_shares, prompt_shares, token_shares
from loopscope.dynamics.verdicts import KINDS, Kind
from loopscope.study import Study
from staged_study import SHAPE, staged_study
from synthetic_study import (
    LAYERS,
    circling,
    contracting,
    feed_forward_study,
    growing,
    looped_study,
    orbiting,
    overflowing,
    sliding,
    with_behaviour,
)

MOVES = r"all: (slider|orbit|bounded|diverging)"
FALSE_TOGETHER = (
    (("fixed_point", r"^Yes|^As far as .* rounding"), ("behaviour", MOVES)),
    (("fixed_point", r"^Yes|^As far as .* rounding"), ("points", r"no points|not settled yet")),
    (("fixed_point", r"^(No|Not|Cannot tell|Only in direction)\b"), ("arrival", r"^After \d+")),
    (("fixed_point", r"^(No|Not|Cannot tell)\b"), ("trained_depth", r"^Yes")),
    (
        ("fixed_point", r"^(No|Not|Cannot tell)\b(?!.*of \d+ cannot)"),
        ("points", r"^(One per layer|The same one)(?!.*Only)"),
    ),
    (("fixed_point", r"^No\b"), ("behaviour", r"^all settle")),
    (("fixed_point", r"But only \d.* settle individually"), ("behaviour", r"^all settle$")),
    (("behaviour", r"^all settle$"), ("stability", r"^no$")),
    (("behaviour", MOVES), ("stability", r"^yes, all")),
)
"""Patterns of verdict or sentence, by the key of the question."""


class _Slide(nn.Module):
    def __init__(self, way: torch.Tensor) -> None:
        super().__init__()
        self.way = nn.Buffer(way)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return state + self.way


class SlowSlider(nn.Module):
    """Its state moves on by 5e-5 of its norm in every recurrence, always the same way."""

    def __init__(self, width: int = 64, speed: float = 5e-5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head, self.loops = nn.Embedding(50, width), nn.Linear(width, 50), 4
        self.body = nn.ModuleList([_Slide(speed * width**0.5 * nn.functional.normalize(torch.randn(width), dim=0))])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        state = self.embedding(tokens)
        for _ in range(self.loops):
            for layer in self.body:
                state = layer(state)
        return torch.as_tensor(self.head(state))


@functools.cache
def slow_slider() -> Study:
    hooked = loopscope.hook(SlowSlider(), recurrent="body", set_recurrences="loops")
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8]]
    skip = ("readout", "heads", "maps", "stages", "cycle-similarity")
    return loopscope.analyze(
        hooked, prompts, recurrences=16, horizon=128, exit_recurrences=0, track=(), skip=skip, judged_layers="last"
    )


FATES = {
    "contracting": contracting(),
    "slow": contracting(0.96),
    "hovering": contracting(noise=0.02),
    "growing": growing,
    "orbiting": orbiting,
    "overflowing": overflowing,
    "sliding": sliding(),
    "hidden slide": sliding(1e-5, rate=0.75),
    "logarithmic": sliding(1e-3, slowing=True),
    "circling": circling(),
}


NAMES = tuple(FATES)


@functools.cache
def _all() -> Study:
    return looped_study(list(FATES.values()), prompts=len(FATES), trained=20)


def of_prompts(*names: str) -> Study:
    """A study of prompts with these fates."""
    rows = [NAMES.index(name) for name in names]
    return Study(_all().dataset.isel(prompt=rows), _all().manifest, [_all().tokens[row] for row in rows])


def judged(study: Study, *kinds: Kind) -> Study:
    """With these verdicts, prompt by prompt in turn."""
    codes = np.zeros((LAYERS, study.dataset.sizes["prompt"], study.dataset.sizes["token"]), dtype=np.int8)
    for prompt in range(codes.shape[1]):
        codes[:, prompt] = KINDS.index(kinds[prompt % len(kinds)])
    return with_behaviour(study, codes)


STUDIES: dict[str, Callable[[], Study]] = {
    "slow slider": slow_slider,
    "feed-forward": feed_forward_study,
    "staged": lambda: staged_study(np.tile(SHAPE, (4, 1)), (2, 4, 2), trained=4),
    "all": _all,
    **{name: functools.partial(of_prompts, name) for name in NAMES},
    "verdicts of all kinds": lambda: with_behaviour(_all()),
}


def false_together(answers: list[Answer]) -> list[tuple[str, str]]:
    texts = {answer.key: (answer.verdict, answer.sentence) for answer in answers}

    def says(key: str, pattern: str) -> bool:
        return any(re.search(pattern, text) for text in texts.get(key, ()))

    return [
        (" ".join(texts[one[0]]), " ".join(texts[other[0]]))
        for one, other in FALSE_TOGETHER
        if says(*one) and says(*other)
    ]


@pytest.mark.parametrize("name", STUDIES)
def test_no_two_sentences_about_a_study_are_false_together(name: str) -> None:
    answers = quick_answers(STUDIES[name]())
    assert false_together(answers) == []
    assert contradictions(answers) == []


@settings(max_examples=12)
@given(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(Kind)), min_size=1, max_size=5), st.booleans())
def test_nor_about_any_mixture_of_prompts_and_verdicts(prompts: list[tuple[str, Kind]], verdicts: bool) -> None:
    study = of_prompts(*(name for name, _ in prompts))
    answers = quick_answers(judged(study, *(kind for _, kind in prompts)) if verdicts else study)
    assert false_together(answers) == []
    assert contradictions(answers) == []


def by_key(study: Study) -> dict[str, Answer]:
    return {answer.key: answer for answer in quick_answers(study)}


def test_a_loop_that_slides_on_is_never_told_to_stop() -> None:
    study = slow_slider()
    assert study.dataset["horizon_drift"].max() < 0.01
    found = {answer.key: answer for answer in quick_answers(study)}
    assert found["fixed_point"].outcome is Outcome.NO
    assert found["behaviour"].verdict == "all: slider"


def test_what_only_the_verdicts_see_is_not_told_and_both_are_named() -> None:
    study = of_prompts(*["hidden slide"] * 4)
    assert {answer.key: answer for answer in quick_answers(study)}["fixed_point"].outcome is Outcome.YES
    found = {answer.key: answer for answer in quick_answers(judged(study, Kind.SLIDER))}
    assert found["fixed_point"].outcome is Outcome.CANNOT_TELL
    assert "the horizons say one thing and the verdicts of the tokens the opposite" in found["fixed_point"].sentence
    assert "In 4 prompts the horizons say “fixed point”" in found["fixed_point"].limits[-1]
    assert found["points"].outcome is found["trained_depth"].outcome is Outcome.CANNOT_TELL
    assert found["behaviour"].verdict == "all: slider"


def test_small_motion_is_settled_by_verdicts() -> None:
    study = of_prompts("circling")
    assert {answer.key: answer for answer in quick_answers(study)}["fixed_point"].outcome is Outcome.CANNOT_TELL
    found = {answer.key: answer for answer in quick_answers(judged(study, Kind.AT_FLOOR))}
    assert found["fixed_point"].outcome is Outcome.YES


def test_what_the_horizons_leave_open_moves_where_most_tokens_are_seen_to() -> None:
    assert by_key(of_prompts("circling"))["fixed_point"].outcome is Outcome.CANNOT_TELL
    assert by_key(judged(of_prompts("circling"), Kind.ORBIT))["fixed_point"].outcome is Outcome.NO


def test_a_few_tokens_that_are_seen_to_orbit_are_not_taken_for_rounding() -> None:
    study = of_prompts("circling")
    left_open = by_key(study)
    assert "a longer horizon may decide no better" in left_open["limits"].sentence
    assert "undecided prompts" in left_open["limits"].verdict
    codes = np.full((LAYERS, study.dataset.sizes["prompt"], study.dataset.sizes["token"]), KINDS.index(Kind.AT_FLOOR))
    codes[..., 0] = KINDS.index(Kind.ORBIT)
    found = by_key(with_behaviour(study, codes.astype(np.int8)))
    assert found["fixed_point"].verdict == "not every token"
    assert re.search(r" settle and \d+ keeps? moving \(orbit\)\.", found["fixed_point"].sentence)
    assert "undecided" not in found["limits"].verdict
    study = of_prompts("contracting", "contracting", "circling")
    codes = np.repeat(codes, 3, axis=1)
    codes[:, :2] = KINDS.index(Kind.FIXED_POINT)
    found = by_key(with_behaviour(study, codes.astype(np.int8)))
    assert re.search(r"1 of 3 prompts is undecided .* In 1 of these, 9 of 10 tokens", found["fixed_point"].sentence)


def test_steps_as_long_as_rounding_are_no_rest_where_rounding_is_loud() -> None:
    study = looped_study(contracting(noise=0.1), prompts=2, floor=0.1, dtype="bfloat16")
    data, tokens = study.dataset, study.dataset.sizes["token"]
    assert by_key(study)["fixed_point"].verdict == "to within rounding"
    floor = data["noise_floor"].expand_dims(token=tokens).transpose("layer", "prompt", "token")
    still = floor.isel(layer=0, drop=True)
    twin = data.assign(twin_floor=floor * 0 + 0.1, twin_growth=still * 0, twin_growth_error=still * 0 + 1)
    found = by_key(Study(twin, study.manifest, study.tokens))["fixed_point"]
    assert found.outcome is Outcome.CANNOT_TELL


def test_a_token_that_is_seen_to_turn_has_not_settled_wherever_it_is_at_the_horizons() -> None:
    study = of_prompts(*["contracting"] * 4)
    codes = np.full((LAYERS, 4, study.dataset.sizes["token"]), KINDS.index(Kind.FIXED_POINT), dtype=np.int8)
    codes[:, :, -1] = KINDS.index(Kind.ORBIT)
    found = by_key(with_behaviour(study, codes))["fixed_point"]
    assert found.verdict == "on average, not every token"
    assert "But only 90" in found.sentence


def test_shorter_steps_of_a_state_that_has_left_all_it_was_are_no_approach() -> None:
    study = of_prompts("slow")
    drift = study.dataset["horizon_drift"]
    gone = Study(study.dataset.assign(horizon_drift=drift * 0 + 1.4), study.manifest, study.tokens)
    first, second = (by_key(each)["fixed_point"] for each in (study, gone))
    assert first.outcome is Outcome.NOT_YET
    assert second.outcome is Outcome.CANNOT_TELL
    assert "may lengthen again" in second.sentence


KEYS = ("fixed_point", "behaviour", "stability", "points", "arrival", "trained_depth")


@given(st.lists(st.sampled_from(Claim), min_size=len(KEYS), max_size=len(KEYS)))
def test_whatever_is_claimed_nothing_that_excludes_it_is_left(claims: list[Claim]) -> None:
    answers = [
        Answer(
            key=key, question=f"{key}?", outcome=Outcome.YES, verdict="yes", sentence=f"It is {claim}.", claims=[claim]
        )
        for key, claim in zip(KEYS, claims, strict=True)
    ]
    found = consistent(answers)
    assert contradictions(found) == []
    for before, after in zip(answers, found, strict=True):
        if before is not after:
            assert after.outcome is Outcome.CANNOT_TELL
            assert before.sentence in after.sentence
    if not contradictions(answers):
        assert found == answers


def test_claims_that_fall_are_among_those_that_exclude_each_other() -> None:
    assert all(set(fall) <= set(pair) for pair, fall in EXCLUDES.items())


@given(arrays(np.int64, st.tuples(st.integers(2, 6), st.integers(1, 9)), elements=st.integers(-1, len(KINDS) - 1)))
def test_bracket_and_interval_hold_the_share_whatever_the_undecided_are(codes: np.ndarray) -> None:
    for shares in (token_shares(codes), prompt_shares(codes), driver_shares(codes, codes * 0)):
        for share in shares:
            if not share.total:
                continue
            low, high = share.interval
            least, most = share.bracket
            assert low <= least + 1e-12
            assert least <= most <= high + 1e-12
            if share.decided:
                assert least <= share.share <= 1
