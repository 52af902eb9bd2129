"""States may lie in other forms than (batch, token, width), and within what a layer is given and returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import loopscope
from foreign_models import VOCAB, WIDTH, Block
from loopscope.models.contract.check import check_subject

PROMPTS = [[1, 2, 3, 4], [5, 6], [7, 8, 9, 1]]


@dataclasses.dataclass
class Carried:
    name: str
    state: Tensor


Way = tuple[Callable[[Tensor], Any], Callable[[Any, tuple[int, int]], Tensor]]
"""From (batch, token, width), and back, given the first two."""
WAYS: dict[str, Way] = {
    "plain": (lambda x: x, lambda x, _: x),
    "token first": (lambda x: x.transpose(0, 1), lambda x, _: x.transpose(0, 1)),
    "flat": (lambda x: x.flatten(0, 1), lambda x, shape: x.view(*shape, WIDTH)),
    "streams": (lambda x: x.unflatten(2, (2, -1)), lambda x, _: x.flatten(2)),
    "in a tuple": (lambda x: (None, x), lambda x, _: x[1]),
    "in a mapping": (lambda x: {"name": "", "state": x}, lambda x, _: x["state"]),
    "in a dataclass": (lambda x: Carried("", x), lambda x, _: x.state),
}


class Wrapped(nn.Module):
    def __init__(self, way: Way) -> None:
        super().__init__()
        (self.into, self.back), self.block = way, Block()

    def forward(self, x: Any, shape: tuple[int, int]) -> Any:
        return self.into(self.block(self.back(x, shape)))


class Loop(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loops, (self.into, self.back) = 4, WAYS[way]
        self.embedding, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.body = nn.ModuleList([Wrapped(WAYS[way])])

    def forward(self, tokens: Tensor) -> Tensor:
        shape = (tokens.shape[0], tokens.shape[1])
        x = self.into(self.embedding(tokens))
        for _ in range(self.loops):
            x = self.body[0](x, shape)
        logits: Tensor = self.head(self.back(x, shape))
        return logits


@pytest.mark.parametrize("way", [way for way in WAYS if way != "plain"])
def test_states_are_the_same_however_they_lie(way: str) -> None:
    plain, found = loopscope.hook(Loop("plain").eval()), loopscope.hook(Loop(way).eval())
    named = loopscope.hook(Loop(way).eval(), recurrent="body", set_recurrences="loops")
    assert found.branches is None
    assert found.facts == named.facts == plain.facts
    wanted = loopscope.capture(plain, PROMPTS, recurrences=5, attention=True)
    for subject in (found, named):
        trace = loopscope.capture(subject, PROMPTS, recurrences=5, attention=True)
        torch.testing.assert_close(trace.logits, wanted.logits)
        for recurrence in range(1, 6):
            torch.testing.assert_close(trace.injected(recurrence), wanted.injected(recurrence))
            torch.testing.assert_close(trace.loop_state(recurrence), wanted.loop_state(recurrence))
            got, expected = (each.attention("recurrent", 0, recurrence) for each in (trace, wanted))
            torch.testing.assert_close(got, expected)
    exact, eigenvalues = (
        np.abs(loopscope.leading_eigenvalues(each, PROMPTS[:1], recurrences=4).eigenvalues[..., 0])
        for each in (plain, found)
    )
    np.testing.assert_allclose(eigenvalues, exact, rtol=1e-4)


@pytest.mark.parametrize("way", ["token first", "flat"])
def test_other_forms_keep_the_contract(way: str) -> None:
    assert check_subject(loopscope.hook(Loop(way).eval())).passed
