"""Losses and entropies of held-out text, against other ways to the same numbers."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from loopscope.experiments.training.evaluate import bigram_entropy, scores_by_recurrences, unigram_entropy
from loopscope.models.architecture import Architecture
from loopscope.models.native.transformer import LoopedTransformer

BASE = {"vocab_size": 11, "width": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "mlp_width": 24}
LAYOUTS = {
    "injected": Architecture.from_dict(
        {**BASE, "prelude": 1, "recurrent": 1, "coda": 1, "injection": "linear", "state_init": "normal"}
    ),
    "uninjected": Architecture.from_dict(
        {**BASE, "prelude": 0, "recurrent": 2, "coda": 0, "loop_norm": "recurrence", "norm_placement": "branch-in-out"}
    ),
}


def some_windows(number: int, context: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 11, size=(number, context + 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_run_gives_the_loss_of_every_number_of_recurrences(layout: str) -> None:
    model = LoopedTransformer(LAYOUTS[layout]).initialize(0, std=0.3)
    windows = some_windows(5, 12)
    scores = scores_by_recurrences(model, windows, [4, 1, 2], batch_size=2, seed=3)
    assert list(scores) == [1, 2, 4]
    tokens = torch.from_numpy(windows)
    for number, score in scores.items():
        logits = model(tokens[:, :-1], recurrences=number, seed=3)
        expected = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        assert score.loss == pytest.approx(float(expected.detach()), rel=1e-5)
        assert score.accuracy == pytest.approx(float((logits.argmax(-1) == tokens[:, 1:]).float().mean()))


def test_a_feed_forward_model_has_one_loss() -> None:
    model = LoopedTransformer(Architecture.from_dict({**BASE, "prelude": 2, "recurrent": 0, "coda": 0})).initialize(0)
    windows = some_windows(3, 8)
    scores = scores_by_recurrences(model, windows, [1, 8], batch_size=3, seed=0)
    tokens = torch.from_numpy(windows)
    expected = functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert list(scores) == [1]
    assert scores[1].loss == pytest.approx(float(expected.detach()), rel=1e-5)


def test_entropies_of_text_that_is_easily_predicted() -> None:
    alternating = np.tile([[3, 7]], (4, 8))
    assert unigram_entropy(alternating) == pytest.approx(math.log(2), abs=0.01)
    assert bigram_entropy(alternating) == pytest.approx(0, abs=1e-12)
    coin = np.random.default_rng(1).integers(0, 2, size=(100, 101))
    assert bigram_entropy(coin) == pytest.approx(math.log(2), abs=1e-3)


@given(
    rows=st.integers(2, 8).flatmap(
        lambda width: st.lists(st.lists(st.integers(0, 5), min_size=width, max_size=width), min_size=1, max_size=6)
    )
)
def test_entropies_are_the_losses_of_fitted_counts(rows: list[list[int]]) -> None:
    pairs = [pair for row in rows for pair in itertools.pairwise(row)]
    after, before, both = Counter(b for _, b in pairs), Counter(a for a, _ in pairs), Counter(pairs)
    unigram = -sum(math.log(after[b] / len(pairs)) for _, b in pairs) / len(pairs)
    bigram = -sum(math.log(both[a, b] / before[a]) for a, b in pairs) / len(pairs)
    windows = np.array(rows, dtype=np.int64)
    assert unigram_entropy(windows) == pytest.approx(unigram, abs=1e-12)
    assert bigram_entropy(windows) == pytest.approx(bigram, abs=1e-12)
