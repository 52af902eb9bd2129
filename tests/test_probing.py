"""Probes: labels that were planted are read, and what is not there is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import loopscope
from loopscope.analysis.probing import _ridge
from loopscope.errors import ConfigError
from loopscope.models.native.subject import NativeSubject
from small_models import INJECTED, hooked_native, linear_loop, subject

PROMPTS = [[token % 7, token] for token in range(48)]
"""Each ends in a token of its own."""
HALF = [token % 2 for token in range(48)]


def keeps(embedding: torch.Tensor) -> NativeSubject:
    """A loop whose state is always the token's embedding."""
    one = torch.eye(16)
    model = linear_loop(one, 0 * one, state_init="embeddings")
    model.model.embedding.weight.copy_(embedding)
    return model


def directions(seed: int = 0) -> torch.Tensor:
    """Of 48 tokens, all of one length."""
    drawn = torch.randn(48, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=-1)


def test_a_planted_direction_is_read_and_the_norm_says_nothing() -> None:
    embedding = directions()
    embedding[:, 0] = 2.0 * torch.tensor(HALF) - 1
    embedding[:, 1:] *= embedding[:, :1].abs() / embedding[:, 1:].norm(dim=-1, keepdim=True)
    found = loopscope.probe(keeps(embedding), PROMPTS, [("even", "odd")[each] for each in HALF], recurrences=3)
    assert found.dataset["accuracy"].values == pytest.approx(1.0)
    assert found.classes == ("even", "odd")
    assert found.majority == 0.5
    assert (found.dataset["norm_accuracy"] < 0.8).all()
    assert ((found.dataset["shuffled_accuracy"] > 0.35) & (found.dataset["shuffled_accuracy"] < 0.65)).all()
    assert found.dataset["visit"].values[-1] == "recurrent.1@3"
    assert "no more than chance" not in " ".join(found.sentences())


def test_a_label_that_only_the_norm_carries_is_told_as_such() -> None:
    longer = directions() * (1 + 4 * torch.tensor(HALF))[:, None]
    found = loopscope.probe(keeps(longer), PROMPTS, HALF, recurrences=1)
    assert found.dataset["norm_accuracy"].values == pytest.approx(1.0)
    assert (found.dataset["accuracy"] < 0.8).all()


def test_a_label_that_is_not_there_is_chance() -> None:
    found = loopscope.probe(keeps(directions()), PROMPTS, HALF, recurrences=1)
    assert "no more than chance" in found.sentences()[-1]


def test_which_recurrence_it_is() -> None:
    # A state that never moves says nothing of it; one that grows says it by its norm.
    still = loopscope.probe(keeps(directions()), PROMPTS, "recurrence", recurrences=4)
    assert still.dataset["accuracy"].values == pytest.approx(0.25)
    assert still.dataset["layer"].values.tolist() == [0, 1]
    one = torch.eye(16)
    grows = linear_loop(2 * one, 0 * one, state_init="embeddings")
    grows.model.embedding.weight.copy_(directions())
    found = loopscope.probe(grows, PROMPTS, "recurrence", recurrences=2)
    assert found.dataset["norm_accuracy"].values == pytest.approx(1.0)


def test_watched_models_have_probes_too() -> None:
    native, hooked = hooked_native(INJECTED)
    one, other = (loopscope.probe(each, PROMPTS, HALF, recurrences=2).dataset for each in (native, hooked))
    assert one.equals(other)


@pytest.mark.parametrize(("samples", "width"), [(9, 4), (4, 9)])
def test_the_fit_is_that_of_the_definition(samples: int, width: int) -> None:
    random = np.random.default_rng(0)
    features, targets = random.normal(size=(samples, width)), random.normal(size=(samples, 2))
    penalty = 1e-2 * (features**2).sum() / min(samples, width)
    stacked = np.vstack([features, np.sqrt(penalty) * np.eye(width)])
    known = np.linalg.lstsq(stacked, np.vstack([targets, np.zeros((width, 2))]), rcond=None)[0]
    assert _ridge(features, targets) == pytest.approx(known)


def test_labels_that_do_not_fit_are_refused() -> None:
    model = subject()
    with pytest.raises(ConfigError, match="All 48 labels are 'a', so that there is nothing to tell apart"):
        loopscope.probe(model, PROMPTS, ["a"] * 48)
    with pytest.raises(ConfigError, match="The label 7 has one prompt"):
        loopscope.probe(model, PROMPTS, [7, *HALF[1:]])
    with pytest.raises(ConfigError, match="2 labels and 48 prompts"):
        loopscope.probe(model, PROMPTS, [0, 1])
    with pytest.raises(ConfigError, match="unhashable type: 'list'"):
        loopscope.probe(model, PROMPTS, [[1]] * 48)  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="no token 2"):
        loopscope.probe(model, PROMPTS, HALF, token=2)
    with pytest.raises(ConfigError, match="folds"):
        loopscope.probe(model, PROMPTS, HALF, folds=1)
    with pytest.raises(ConfigError, match="or recurrence"):
        loopscope.probe(model, PROMPTS, "answer")
    with pytest.raises(ConfigError, match="fewer than two recurrences"):
        loopscope.probe(model, PROMPTS, "recurrence", recurrences=1)
