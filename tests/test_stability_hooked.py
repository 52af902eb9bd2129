"""Eigenvalues of models that are only watched: the same as of the same weights run natively, or a clear refusal."""

from __future__ import annotations

from typing import Any, cast

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


@pytest.mark.parametrize("options", [{"eager": True}, {"random_state": True}, {"in_place": True}], ids=str)
def test_however_it_is_written_a_model_has_the_same_eigenvalues(options: dict[str, bool]) -> None:
    plain, other = (loopscope.hook(ForeignLoop(**each).double().eval(), **PATHS) for each in ({}, options))
    state = leading_eigenvalues(plain, IDS, settings=EXACT).point
    found, wanted = (
        leading_eigenvalues(subject, IDS, state=torch.from_numpy(state), settings=EXACT) for subject in (other, plain)
    )
    assert found.derivative == ("differences" if "in_place" in options else "exact")
    np.testing.assert_allclose(found.radius, wanted.radius, rtol=1e-6)
    np.testing.assert_allclose(found.relative_step, wanted.relative_step, rtol=1e-9)
    assert_untouched(other.model)


def test_long_prompts_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    hooked = loopscope.hook(ForeignLoop().double().eval(), **PATHS)
    whole = leading_eigenvalues(hooked, IDS, settings=EXACT)
    monkeypatch.setattr("loopscope.dynamics.eigenvalues.hooked._COPIED_TOKENS", 6)
    parts = leading_eigenvalues(hooked, IDS, settings=EXACT)
    np.testing.assert_allclose(np.abs(parts.eigenvalues), np.abs(whole.eigenvalues), atol=1e-8)


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


def test_a_recurrence_that_leaves_the_first_ones_alone_is_found_where_the_run_stands() -> None:
    """The model's own four recurrences are one map and the sixth is another, which the prompt's run alone shows."""
    subject = hooked(late=True)
    assert subject.no_one_map is None
    with pytest.raises(ConfigError, match="entered again with it where the run stands"):
        leading_eigenvalues(subject, IDS[:1], settings=EXACT)


class Halves(nn.Module):
    """x <- 0.25 x + 0.5 x + c, where the second part may go through a call whose backward pass is opaque."""

    def __init__(self, *, opaque: bool = False) -> None:
        super().__init__()
        self.opaque = opaque
        self.push = nn.Parameter(torch.linspace(-1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        half: Tensor = cast(Any, _Opaque).apply(x) if self.opaque else 0.5 * x
        return 0.25 * x + half + self.push


class _Opaque(torch.autograd.Function):
    """As a fused kernel: both passes are right, and torch sees into neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * np.float32(0.5))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.from_numpy(gradient.detach().numpy() * np.float32(0.5))


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 0.1 * gradient


class Unseen(nn.Module):
    """A loop of `Halves` whose gradients are not those of what it computes."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.loops = way, 4
        self.embedding, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.body = nn.ModuleList([Halves(opaque=way == "opaque backward")])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for _ in range(self.loops):
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.way != "no_grad"):
                x = self.body[0](x)
            if self.way == "detached":
                x = x.detach()
            if self.way == "half detached":
                x = x.detach() / 2 + x / 2
            if self.way == "scaled":
                x = cast(Any, _Scaled).apply(x)
            if self.way == "numpy":
                x = torch.from_numpy(x.detach().numpy().copy())
        logits: Tensor = self.head(x)
        return logits


@pytest.mark.parametrize("way", ["seen", "no_grad", "detached", "half detached", "scaled", "numpy", "opaque backward"])
def test_a_derivative_that_does_not_see_all_of_the_map_is_not_believed(way: str) -> None:
    subject = loopscope.hook(Unseen(way), recurrent="body", set_recurrences="loops")
    found = leading_eigenvalues(subject, IDS, settings=EXACT, recurrences=20)
    assert found.derivative == ("exact" if way == "seen" else "differences")
    there = found.mask[..., None]
    np.testing.assert_allclose(np.where(there, found.eigenvalues[..., :1], 0.75), 0.75, atol=1e-4)


class Bent(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.up, self.activation, self.down = nn.Linear(64, 128), activation, nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        bent: Tensor = x / 2 + self.down(self.activation(self.up(x)))
        return bent


class Coarse(Unseen):
    """A part of the loop rounds more coarsely than the dtype of its states, as a norm in float32 or autocast do."""

    part = torch.float32

    def __init__(self, way: str = "seen") -> None:
        super().__init__(way)
        self.body = nn.ModuleList([_Coarse(self)])


class _Coarse(Halves):
    def __init__(self, model: Coarse) -> None:
        super().__init__()
        self.dtype = [model]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(0.1 * x + (0.9 * x.to(self.dtype[0].part)).to(x.dtype))


@pytest.mark.parametrize("way", ["seen", "no_grad"])
def test_a_part_in_float32_of_a_model_in_float64_is_no_derivative_of_noise(way: str) -> None:
    subject = loopscope.hook(Coarse(way).double(), recurrent="body", set_recurrences="loops")
    found = leading_eigenvalues(subject, IDS, settings=EXACT, recurrences=20)
    assert found.derivative == ("exact" if way == "seen" else "differences")
    leading, errors = found.eigenvalues[..., 0][found.mask], found.errors[..., 0][found.mask]
    assert (abs(leading - 0.75) <= errors).all()
    assert (errors >= 1e-6).all()


def test_a_part_in_half_precision_has_no_derivative() -> None:
    model = Coarse()
    model.part = torch.bfloat16
    subject = loopscope.hook(model, recurrent="body", set_recurrences="loops")
    with pytest.raises(ConfigError, match="a part of it runs in half precision although its states are float32"):
        leading_eigenvalues(subject, IDS, settings=EXACT, recurrences=20)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Hardtanh()], ids=["ReLU", "Hardtanh"])
def test_kinks_do_not_make_a_product_doubtful(activation: nn.Module) -> None:
    class Kinked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.loops, self.embedding, self.head = 4, nn.Embedding(VOCAB, 64), nn.Linear(64, VOCAB)
            self.body = nn.ModuleList([Bent(activation)])

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            for _ in range(self.loops):
                x = self.body[0](x)
            logits: Tensor = self.head(x)
            return logits

    subject = loopscope.hook(Kinked(), recurrent="body", set_recurrences="loops")
    assert leading_eigenvalues(subject, IDS, settings=EXACT).derivative == "exact"


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
