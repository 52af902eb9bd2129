"""Attention maps that a study keeps: those of whole captured maps within the error stated, and no more than allowed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import loopscope
from foreign_models import PATHS, Block, ForeignLoop
from loopscope import AnalyzeSettings
from loopscope._util.map_codes import decode_maps
from loopscope.analysis.job import SilentProgress
from loopscope.analysis.settings import Part
from loopscope.errors import ConfigError
from loopscope.measures.maps import encode_maps, map_recurrences, map_tokens
from loopscope.models.hooks.hooked import HookedSubject
from loopscope.models.native.subject import NativeSubject
from loopscope.models.subject import Subject
from loopscope.models.visits import MapAttention, QueryKeyAttention
from random_model import random_model
from small_models import FEED_FORWARD, PROMPTS, relaxation, subject

Skipped = tuple[Part, ...]
SKIP: Skipped = ("path-independence", "noise-floor", "twin", "neurons", "readout", "stages", "behaviour", "stability")


class Notes(SilentProgress):
    """A progress that remembers what was noted."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


@given(st.floats(0, 1, width=32))
def test_a_probability_comes_back_within_the_error_that_is_stated(probability: float) -> None:
    code = encode_maps(torch.tensor([probability])).numpy()
    found = float(decode_maps(code)[0])
    assert abs(found - probability) <= math.sqrt(probability) / 254 + 4e-6
    assert abs(found - probability) <= 0.004


def test_certainty_impossibility_and_nothing_have_codes_of_their_own() -> None:
    codes = encode_maps(torch.tensor([0.0, 1.0, 1.0 + 1e-6, math.nan])).numpy()
    assert codes.tolist() == [0, 254, 254, 255]
    np.testing.assert_array_equal(decode_maps(codes), np.array([0, 1, 1, math.nan], dtype=np.float32))


@pytest.mark.parametrize("added", [None, (3, 1, 5, 5), (1, 2, 1, 5)])
def test_one_prompt_of_a_view_has_its_maps(added: tuple[int, ...] | None) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.arange(5) < torch.tensor([[5], [2], [4]])
    view = QueryKeyAttention(
        draw(3, 2, 5, 4), draw(3, 1, 5, 4), 0.7, mask, window=3, added=None if added is None else draw(*added)
    )
    whole = view.probabilities()
    for row in range(3):
        for one in (view.prompt(row), MapAttention(whole, mask).prompt(row)):
            torch.testing.assert_close(one.probabilities(), whole[row : row + 1], rtol=1e-12, atol=1e-12)


def assert_maps_are_those_captured(subject: Subject, prompts: list[list[int]], **changes: Any) -> None:
    """In batches of three, of which two are padded; with prompts longer than what is kept."""
    mapped, tokens, kept, recurrences = (0, 2, 3, 4), 6, (2, 3, 5), 5
    study = loopscope.analyze(
        subject,
        prompts,
        recurrences=recurrences,
        horizon=4,
        batch_size=3,
        map_prompts=mapped,
        map_tokens=tokens,
        map_recurrences=kept,
        skip=SKIP,
        **changes,
    )
    maps = study.dataset["attention_map"]
    looped = subject.info.is_looped
    trace = loopscope.capture(subject, prompts, recurrences=recurrences if looped else None, attention=True)
    visits = [visit for visit in trace.visits if visit[0] != "recurrent" or visit[2] in kept]
    columns = (maps[f"map_{name}"].values.tolist() for name in ("stage", "layer", "recurrence"))
    assert list(zip(*columns, strict=True)) == visits
    assert maps["mapped_prompt"].values.tolist() == list(mapped)
    assert maps.dtype == np.uint8
    assert maps.shape[2:] == (subject.info.heads, tokens, tokens)
    for index, prompt in enumerate(mapped):
        count = min(tokens, len(prompts[prompt]))
        for place, visit in enumerate(visits):
            found = decode_maps(maps.values[index, place])
            whole = trace.attention(*visit)[prompt, :, :count, :count].double().numpy()
            away = np.abs(found[:, :count, :count] - whole)
            assert (away <= np.sqrt(whole) / 254 + 5e-6).all()
            assert np.isnan(found[:, count:]).all()
            assert np.isnan(found[:, :, count:]).all()


@pytest.mark.parametrize("method", ["keep", "second-pass"])
def test_native_maps_are_those_captured_whole(method: str) -> None:
    model = NativeSubject(random_model(sliding_window=4, full_attention_layers=(1,), vocab_size=48))
    assert_maps_are_those_captured(model, PROMPTS, horizon_method=method)


def test_maps_of_a_feed_forward_model_are_those_captured_whole() -> None:
    assert_maps_are_those_captured(subject(FEED_FORWARD), PROMPTS)


@pytest.mark.parametrize("options", [{}, {"eager": True}, {"causal": False}, {"eager": True, "causal": False}])
def test_hooked_maps_are_those_captured_whole(options: dict[str, bool]) -> None:
    """From queries and keys, and from maps that the model made itself; where a token sees what follows, too."""
    prompts = [[token % 20 for token in prompt] for prompt in PROMPTS]
    # Without a causal mask the padding of a batch is seen by the model, and a prompt's maps are the batch's.
    if "causal" in options:
        prompts = [[*prompt, *[1] * 8][:8] for prompt in prompts]
    assert_maps_are_those_captured(loopscope.hook(ForeignLoop(**options).eval(), **PATHS), prompts)


def test_rows_of_causal_maps_are_whole_although_the_prompt_is_cut() -> None:
    model = subject()
    study = loopscope.analyze(model, PROMPTS[:1], recurrences=2, horizon=2, map_tokens=3, skip=SKIP)
    sums = decode_maps(study.dataset["attention_map"].values).sum(-1)
    np.testing.assert_allclose(sums, 1, atol=3 / 254)


@given(st.integers(1, 5000), st.integers(1, 300_000), st.integers(1, 2**26))
def test_maps_fit_into_the_limit_and_use_it(most: int, maps: int, limit: int) -> None:
    tokens = map_tokens(most, maps, limit)
    assert tokens <= most
    assert maps * tokens**2 <= limit
    assert tokens == most or maps * (tokens + 1) ** 2 > limit


@pytest.mark.parametrize(
    ("trained", "recurrences", "expected"),
    [
        (4, 1, (1,)),
        (6, 3, (1, 2, 3)),
        (6, 16, (1, 2, 3, 4, 6, 8, 16)),
        (8, 100, (1, 2, 3, 4, 8, 16, 32, 64, 100)),
    ],
)
def test_the_first_and_the_last_recurrences_are_kept(trained: int, recurrences: int, expected: tuple[int, ...]) -> None:
    assert map_recurrences(trained, recurrences) == expected


def test_a_study_keeps_no_more_than_the_limit_and_says_so() -> None:
    notes = Notes()
    prompt, recurrences = [token % 48 for token in range(70)], 80
    options: dict[str, Any] = {"recurrences": recurrences, "horizon": 2, "skip": SKIP, "progress": notes}
    options["map_recurrences"] = tuple(range(1, recurrences + 1))
    found = loopscope.analyze(subject(), [prompt], map_limit=1, **options).dataset["attention_map"]
    assert found.sizes["map_visit"] == 2 + 2 * recurrences
    assert 2**20 - 40_000 < found.nbytes <= 2**20
    assert notes.said == [
        "324 attention maps are kept for the first 56 tokens rather than 64; raise --map-limit or give fewer "
        "--map-recurrences to have more."
    ]
    whole = loopscope.analyze(subject(), [prompt], **options).dataset["attention_map"]
    assert whole.sizes["query"] == 64
    np.testing.assert_array_equal(found, whole[..., :56, :56])
    assert len(notes.said) == 1


def test_what_is_not_finite_has_no_map() -> None:
    exploding = relaxation(1e15, dtype=torch.float32)
    study = loopscope.analyze(exploding, PROMPTS[:2], recurrences=8, horizon=2, skip=SKIP)
    assert study.dataset["diverged_at"].values[0] > 0
    maps = study.dataset["attention_map"]
    assert (maps.sel(map_visit="recurrent.0@1") < 255).all()
    assert (maps.sel(map_visit="recurrent.0@8") == 255).all()


class Hidden(Block):
    """Its attention is no softmax that could be told from outside."""

    def attend(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        scores = (query @ key.transpose(-1, -2)).exp().tril()
        mixed: Tensor = self.out(scores / scores.sum(-1, keepdim=True) @ value)
        return mixed


def hooked_with(layer: nn.Module) -> HookedSubject:
    model = ForeignLoop()
    model.cycle[1] = layer
    return loopscope.hook(model.eval(), **PATHS)


def test_a_layer_whose_attention_cannot_be_seen_has_no_maps_and_the_others_have() -> None:
    study = loopscope.analyze(hooked_with(Hidden()), [[3, 1, 4, 1, 5]], recurrences=3, horizon=2, skip=SKIP)
    maps = study.dataset["attention_map"]
    hidden = maps["map_stage"].isin(["recurrent"]) & (maps["map_layer"] == 1)
    assert int(hidden.sum()) == 3
    assert (maps[:, hidden] == 255).all()
    assert (maps[:, ~hidden] < 255).all()


class OneHead(Block):
    def attend(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        query, key, value = (part[:, None] for part in self.qkv(x).chunk(3, dim=-1))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out(mixed[:, 0])
        return out


def test_layers_with_different_numbers_of_heads_have_no_maps_and_it_is_said() -> None:
    notes = Notes()
    study = loopscope.analyze(
        hooked_with(OneHead()), [[3, 1, 4, 1, 5]], recurrences=3, horizon=2, skip=SKIP, progress=notes
    )
    assert "attention_map" not in study.dataset
    assert any("layers have different numbers of heads" in note for note in notes.said)


def test_no_prompt_no_maps() -> None:
    study = loopscope.analyze(subject(), PROMPTS, recurrences=2, horizon=2, skip=SKIP, map_prompts=())
    assert "attention_map" not in study.dataset


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"map_prompts": (5,)}, "--map-prompts 5: there are 5 prompts"),
        ({"map_recurrences": (1, 3)}, "--map-recurrences asks for 3 recurrences, but only 2 are measured"),
    ],
)
def test_what_there_is_not_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loopscope.analyze(subject(), PROMPTS, recurrences=2, horizon=2, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"map_prompts": (-1,)}, "--map-prompts must not be negative, since prompts count from 0, got -1"),
        ({"map_recurrences": (0, 2)}, "--map-recurrences must be at least 1, got 0"),
        ({"map_tokens": 0}, "--map-tokens must be at least 1, got 0"),
        ({"map_limit": 0}, "--map-limit must be at least 1, got 0"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AnalyzeSettings(**changes)
