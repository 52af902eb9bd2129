"""Loops as people publish them are hooked in a line or two, and keep the contract."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import loopscope
from loopscope.errors import ConfigError
from loopscope.models.contract.check import check_subject
from loopscope.models.hooks.hooked import HookedSubject
from loopscope.models.subject import Batch
from public_loops import VOCAB, Hierarchical, InContext, MixtureOfRecursions, TinyRecursive, Universal, Wrapped

POINTS, VALUES = torch.linspace(-1, 1, 3 * VOCAB).reshape(VOCAB, 3), torch.linspace(-1, 1, VOCAB)


def solved(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The board's logits, of puzzle 0."""
    batch = {"inputs": ids, "puzzle_identifiers": torch.zeros(len(ids), dtype=torch.int64)}
    logits: Tensor = model(model.initial_carry(batch), batch)[1]["logits"]
    return logits


def predicted(model: Any, ids: Tensor, mask: Tensor, **loops: int) -> Tensor:
    """How near each value is to what the model predicts of pairs of a point and a value."""
    values: Tensor = model(POINTS[ids[:, ::2]], VALUES[ids[:, 1::2]], **loops)
    return -((values - VALUES) ** 2)


def n_loops(model: nn.Module, recurrences: int) -> dict[str, int]:
    return {"n_loops": recurrences}


def hooked(name: str) -> HookedSubject:
    torch.manual_seed(0)
    match name:
        case "tiny recursive":
            return loopscope.hook(TinyRecursive(), forward=solved, probe=9, tokens_before=2)
        case "hierarchical":
            return loopscope.hook(Hierarchical(), forward=solved, probe=[1, 2, 3] * 3, tokens_before=1)
        case "universal":
            return loopscope.hook(Universal())
        case "x-transformers":
            return loopscope.hook(Wrapped())
        case "mixture of recursions":
            return loopscope.hook(MixtureOfRecursions())
        case _:
            return loopscope.hook(
                InContext(), recurrent="backbone", set_recurrences=n_loops, forward=predicted, probe=12
            )


LOOPS = {
    "tiny recursive": ((0, 6, 0), 3),
    "hierarchical": ((0, 8, 0), 2),
    "universal": ((0, 1, 0), 4),
    "x-transformers": ((0, 1, 0), 3),
    "mixture of recursions": ((0, 1, 0), 3),
    "in context": ((0, 2, 0), 5),
}


@pytest.mark.parametrize("name", LOOPS)
def test_it_is_hooked_and_keeps_the_contract(name: str) -> None:
    subject, (layout, recurrences) = hooked(name), LOOPS[name]
    info = subject.info
    assert ((info.prelude, info.recurrent, info.coda), info.trained_recurrences) == (layout, recurrences)
    assert subject.settable
    assert subject.branches is None
    pairs = [[1, 2, 3, 4], [5, 6], [7, 8, 9, 10, 11, 0]] if name == "in context" else None
    check_subject(subject, pairs)


@pytest.mark.parametrize("name", LOOPS)
def test_its_states_are_those_of_plain_hooks(name: str) -> None:
    subject = hooked(name)
    ids = torch.arange(12 if name == "in context" else 9)[None]
    seen: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda module, args, output: seen.append(output))
        for module in subject.layout.modules
    ]
    expected = subject.bare_logits(Batch.of(ids.tolist()), recurrences=LOOPS[name][1])
    for handle in handles:
        handle.remove()
    trace = loopscope.capture(subject, ids)
    assert torch.equal(trace.logits, expected)
    before = {"tiny recursive": 2, "hierarchical": 1}.get(name, 0)
    states = [trace.residual(*site) for site in trace.visits]
    assert all(torch.equal(got, plain[:, before:]) for got, plain in zip(states, seen, strict=True))


def test_boards_are_of_one_size() -> None:
    subject = hooked("tiny recursive")
    assert subject.info.only_tokens == 9
    said = " ".join(subject.unobservable)
    assert "Tokens before the text: the states of the 2 that the model puts there" in said
    assert "Other lengths: the model failed on fewer and on more than 9 tokens" in said
    assert "has other queries or keys than the prompt's tokens" in said
    assert "Padding" not in said
    for run in (loopscope.capture, loopscope.analyze):
        with pytest.raises(ConfigError, match="runs on prompts of 9 tokens only; one has 4"):
            run(subject, [[1, 2, 3, 4]])
    study = loopscope.analyze(subject, [[1, 2, 3] * 3, [4, 5, 6] * 3], recurrences=3, horizon=6)
    assert study.manifest["model"]["only_tokens"] == 9
    assert study.dataset.sizes["token"] == 9


def test_what_a_board_needs_is_said() -> None:
    with pytest.raises(ConfigError, match=r"give loopscope\.hook the tokens it takes, or how many, as probe="):
        loopscope.hook(TinyRecursive(), forward=solved, tokens_before=2)
    with pytest.raises(ConfigError, match=r"9 times with states of \(1, 11, 16\), for \(1, 9\) tokens; .*_before=2"):
        loopscope.hook(TinyRecursive(), forward=solved, probe=9)
    for wrong in (0, [], [[1], [2]], [1.5], torch.ones(2, 3)):
        with pytest.raises(ConfigError, match="probe must be a number of tokens, or the ids of one prompt"):
            loopscope.hook(Universal(), probe=wrong)  # type: ignore[arg-type]


class Leak(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * x + self.linear(x))


class Registers(nn.Module):
    """Learned tokens before the text, which does not look at them."""

    def __init__(self, registers: int) -> None:
        super().__init__()
        self.loops, self.registers = 4, nn.Parameter(torch.randn(registers, 8))
        self.embedding, self.body, self.head = nn.Embedding(9, 8), Leak(), nn.Linear(8, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.cat((self.registers.expand(len(tokens), -1, -1), self.embedding(tokens)), 1)
        for _ in range(self.loops):
            x = self.body(x)
        logits: Tensor = self.head(x[:, len(self.registers) :])
        return logits


def test_tokens_before_the_text_change_nothing_of_a_text_that_does_not_look_at_them() -> None:
    torch.manual_seed(0)
    plain, more = Registers(0).eval(), Registers(3).eval()
    more.load_state_dict(plain.state_dict() | {"registers": more.registers})
    subjects = loopscope.hook(plain), loopscope.hook(more, tokens_before=3)
    traces = [loopscope.capture(subject, [[1, 2, 3, 4], [5, 6]], recurrences=6) for subject in subjects]
    assert torch.equal(traces[0].logits, traces[1].logits)
    for recurrence in range(1, 7):
        assert torch.equal(traces[0].loop_state(recurrence), traces[1].loop_state(recurrence))
        assert torch.equal(traces[0].injected(recurrence), traces[1].injected(recurrence))
    values = [loopscope.leading_eigenvalues(subject, [[1, 2, 3, 4]]).eigenvalues for subject in subjects]
    np.testing.assert_allclose(values[0][..., 0], values[1][..., 0], rtol=1e-4)
