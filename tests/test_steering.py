"""Steering: what is added to the loop state, and how long it lasts."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

import loopscope
from loopscope.errors import ConfigError
from small_models import INJECTED, PROMPTS, hooked_native, relaxation, subject

TOWARDS, AWAY = [[1, 2, 3], [4, 5]], [[6, 7, 8, 9], [10]]


def test_a_push_shrinks_as_the_loop_does() -> None:
    found = loopscope.steer(relaxation(0.5), PROMPTS, towards=TOWARDS, away=AWAY, at=[3], recurrences=6, scale=3.0)
    length = 3.0 * float(found.vectors[2].norm())
    expected = torch.tensor([0, 0, *(length * 0.5**left for left in range(4))], dtype=torch.float64)
    assert torch.allclose(found.distance, expected.expand(len(PROMPTS), -1), atol=1e-12)
    # A linear map forgets every direction alike.
    assert torch.allclose(found.random_distance, found.distance, atol=1e-12)
    assert torch.allclose(found.kept, 0.5 ** torch.arange(4.0, dtype=torch.float64).expand(len(PROMPTS), -1))
    assert torch.allclose(found.random_kept, found.kept)


def test_the_vector_is_the_mean_difference_at_the_last_tokens() -> None:
    model = subject(INJECTED, dtype=torch.float64)
    found = loopscope.steer(model, PROMPTS, towards=TOWARDS, away=AWAY, at=[2, 4], recurrences=4)
    first, second = (loopscope.capture(model, each, recurrences=4).loop_state(2) for each in (TOWARDS, AWAY))
    by_hand = ((first[0, 2] - second[0, 3]) + (first[1, 1] - second[1, 0])) / 2
    assert torch.allclose(found.vectors[1], by_hand)
    assert torch.allclose(found.distance[:, 1], by_hand.norm().expand(len(PROMPTS)))
    assert torch.allclose(found.unsteered_logits, model(PROMPTS, recurrences=4))
    assert not torch.allclose(found.logits, found.unsteered_logits)
    assert found.last_push == 4


def test_what_cannot_be_steered_is_refused() -> None:
    model = subject(INJECTED)
    for at in ([5], [], [1.5], 2):
        with pytest.raises(ConfigError, match="a list of recurrences from 1 to 4, got"):
            loopscope.steer(model, PROMPTS, towards=TOWARDS, away=AWAY, at=cast("Any", at))
    with pytest.raises(ConfigError, match="other than 0, got 0"):  # of which nothing could be kept
        loopscope.steer(model, PROMPTS, towards=TOWARDS, away=AWAY, at=[1], scale=0)
    with pytest.raises(ConfigError, match="2 prompts to steer towards and 1 to steer away"):
        loopscope.steer(model, PROMPTS, towards=TOWARDS, away=AWAY[:1], at=[1])
    with pytest.raises(ConfigError, match="no direction"):
        loopscope.steer(model, PROMPTS, towards=TOWARDS, away=TOWARDS, at=[1])
    with pytest.raises(ConfigError, match="only watched"):
        loopscope.steer(hooked_native(INJECTED)[1], PROMPTS, towards=TOWARDS, away=AWAY, at=[1])
