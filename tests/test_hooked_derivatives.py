"""Derivatives of models that are only watched: the same however a loop is written, and not believed where torch does
not see all that it computes."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import loopscope
from foreign_models import PATHS, VOCAB, WIDTH, ForeignLoop, assert_untouched
from loopscope import leading_eigenvalues
from loopscope.dynamics.eigenvalues.result import EigenvalueSettings
from loopscope.errors import ConfigError

IDS = [[3, 1, 4, 1, 5], [9, 2]]
EXACT = EigenvalueSettings(recurrences=5, products=12, search=0)


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
