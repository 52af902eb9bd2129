"""Eigenvalues of models that are only watched: the same as of the same weights run natively, or a clear refusal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import loopscope
from foreign_models import PATHS, VOCAB, WIDTH, Block, ForeignLoop, assert_untouched
from loopscope import leading_eigenvalues
from loopscope.analysis.job import SilentProgress
from loopscope.dynamics.eigenvalues.result import EigenvalueSettings
from loopscope.errors import ConfigError
from loopscope.models.hooks.hooked import HookedSubject

IDS = [[3, 1, 4, 1, 5], [9, 2]]
EXACT = EigenvalueSettings(recurrences=5, products=12, search=0)


def test_the_eigenvalues_are_those_of_the_model_written_out() -> None:
    """Of the derivative of the loop's body, written out here with torch alone."""
    model = ForeignLoop().double().eval()
    hooked = loopscope.hook(model, **PATHS)
    found = leading_eigenvalues(hooked, IDS, settings=EXACT)
    for row, ids in enumerate(IDS):
        with torch.no_grad():
            encoded = model.embedding(torch.tensor([ids]))
            for block in model.enter.children():
                encoded = block(encoded)

        def body(entered: Tensor, encoded: Tensor = encoded) -> Tensor:
            for block in model.cycle.children():
                entered = block(entered)
            return entered + encoded

        entered = encoded + encoded
        with torch.no_grad():
            for _ in range(5):
                entered = body(entered)
        np.testing.assert_allclose(found.point[row, : len(ids)], entered[0].numpy(), rtol=1e-9)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            whole = torch.autograd.functional.jacobian(body, entered)[0, :, :, 0]
        for token in range(len(ids)):
            wanted = torch.linalg.eigvals(whole[token, :, token]).abs().sort(descending=True).values
            np.testing.assert_allclose(np.abs(found.eigenvalues[row, token]), wanted.numpy(), atol=1e-7)
            np.testing.assert_allclose(found.radius[row, token], wanted[0].item(), atol=1e-7)


class Loop(nn.Module):
    """`loops` times two layers from the embeddings, with a hidden state beside that is no layer's business."""

    def __init__(
        self,
        *,
        hidden: bool = False,
        timed: float = 0.0,
        restarts: bool = False,
        late: bool = False,
        causal: bool = True,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
            self.body = nn.ModuleList([Block(causal=causal) for _ in range(2)])
        self.loops, self.hidden, self.timed, self.restarts, self.late = 4, hidden, timed, restarts, late

    def forward(self, tokens: Tensor) -> Tensor:
        state = embedded = self.embedding(tokens)
        beside = torch.zeros_like(state)
        for turn in range(self.loops):
            if self.hidden:
                beside = beside + 0.5 * state
            state = state + beside + self.timed * turn * embedded
            if self.late and turn > 4:
                state = state + embedded
            if self.restarts:
                beside, state = state, embedded
            for layer in self.body.children():
                state = layer(state)
            if self.restarts:
                state = state + beside / 2
        logits: Tensor = self.head(state)
        return logits


def hooked(**options: Any) -> HookedSubject:
    return loopscope.hook(Loop(**options).double().eval(), recurrent="body", set_recurrences="loops")


def test_what_is_no_function_of_its_first_layers_input_is_refused() -> None:
    assert np.isfinite(leading_eigenvalues(hooked(), IDS[:1], settings=EXACT).eigenvalues).all()
    for options in ({"hidden": True}, {"timed": 1.0}, {"timed": 1e-4}, {"restarts": True}):
        subject = hooked(**options)
        reason = "every recurrence begins with the same input" if "restarts" in options else "each is a map of its own"
        with pytest.raises(ConfigError, match=f"No eigenvalues can be taken of Loop: .*{reason}"):
            leading_eigenvalues(subject, IDS[:1], settings=EXACT)
        assert any(sentence.startswith("Eigenvalues, and what a fixed point") for sentence in subject.unobservable)
        assert_untouched(subject.model)


def test_a_study_leaves_them_out_with_the_reason() -> None:
    said: list[str] = []

    class Notes(SilentProgress):
        def note(self, message: str) -> None:
            said.append(message)

    settings: dict[str, Any] = {"recurrences": 4, "horizon": 4, "hooked_eigenvalues": True}
    study = loopscope.analyze(hooked(timed=1.0), IDS, **settings, progress=Notes())
    assert "predicted_rate" not in study.dataset
    assert any("each is a map of its own" in message for message in said)
    assert "each is a map of its own" in study.manifest["left_out"]["predicted_rate"]
    limits = loopscope.quick_answers(study)[-1]
    assert "the loop itself" in limits.verdict
    assert any("each is a map of its own" in limit for limit in limits.limits)


def test_a_recurrence_that_leaves_the_first_ones_alone_is_found_where_the_run_stands() -> None:
    """The model's own four recurrences are one map and the sixth is another, which the prompt's run alone shows."""
    subject = hooked(late=True)
    assert subject.no_one_map is None
    with pytest.raises(ConfigError, match="entered again with it where the run stands"):
        leading_eigenvalues(subject, IDS[:1], settings=EXACT)


def test_a_model_that_looks_ahead_is_refused() -> None:
    with pytest.raises(ConfigError, match="not causal, so that its tokens have no eigenvalues of their own"):
        leading_eigenvalues(hooked(causal=False), IDS[:1], settings=EXACT)


def test_half_precision_is_refused() -> None:
    subject = loopscope.hook(ForeignLoop().bfloat16().eval(), **PATHS)
    with pytest.raises(ConfigError, match="in bfloat16, whose rounding hides derivatives; load it in float32"):
        leading_eigenvalues(subject, IDS, settings=EXACT)


def test_a_model_with_its_own_number_of_recurrences_is_taken_after_those() -> None:
    free = hooked()
    fixed = loopscope.hook(Loop().double().eval(), recurrent="body")
    found = leading_eigenvalues(fixed, IDS[:1], settings=EXACT)
    assert found.recurrences == 3
    wanted = leading_eigenvalues(free, IDS[:1], settings=EXACT, recurrences=3)
    np.testing.assert_array_equal(found.eigenvalues, wanted.eigenvalues)
    short = Loop().double().eval()
    short.loops = 2
    with pytest.raises(ConfigError, match="runs 2 recurrences, and eigenvalues need 3 to see that"):
        leading_eigenvalues(loopscope.hook(short, recurrent="body"), IDS[:1], settings=EXACT)
