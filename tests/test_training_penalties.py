"""Penalties on the loop, damped and bounded loops: against the eigenvalues that the analysis finds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loopscope.dynamics.eigenvalues.of_model import leading_eigenvalues
from loopscope.errors import ConfigError
from loopscope.experiments.training.config import PenaltyConfig
from loopscope.experiments.training.data import scored
from loopscope.experiments.training.step import LastStates, penalty, stretching
from loopscope.models.architecture import Architecture
from loopscope.models.native.subject import NativeSubject
from loopscope.models.native.transformer import LoopedTransformer
from loopscope.models.subject import Batch

SMALL: dict[str, Any] = {
    "vocab_size": 23, "width": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "mlp_width": 32, "prelude": 1,
    "recurrent": 2, "coda": 0, "recurrences": 4, "injection": "linear", "state_init": "normal",
}  # fmt: skip


def model(**changes: Any) -> LoopedTransformer:
    return LoopedTransformer(Architecture.from_dict({**SMALL, **changes})).initialize(0, 0.15)


def ids(rows: int = 2, tokens: int = 5) -> Tensor:
    return torch.randint(0, 23, (rows, tokens), generator=torch.Generator().manual_seed(1))


def states_of(subject: LoopedTransformer, recurrences: int = 4) -> LastStates:
    states = LastStates()
    subject(ids(), recurrences=recurrences, observers=(states,))
    return states


def test_the_stretching_is_that_of_the_leading_eigenvalue() -> None:
    """After many products, where a real eigenvalue leads; where a pair does, its modulus on average over products."""
    subject = model().double()
    states = states_of(subject, 60)
    assert states.last is not None
    counts = range(150, 166)
    factors = torch.stack(
        [stretching(subject, subject.encode(ids()), states.last, count, seed=0).detach() for count in counts]
    )
    found = leading_eigenvalues(
        NativeSubject(subject.requires_grad_(False)),
        [row.tolist() for row in ids()],
        state=states.last.detach(),
        recurrences=60,
        products=32,
        search=0,
    )
    moduli = np.abs(found.eigenvalues[..., 0])
    assert factors.log().mean(0).exp().numpy() == pytest.approx(moduli, rel=0.02)


@pytest.mark.parametrize("name", ["last_step", "eigenvalue"])
def test_a_penalty_has_the_gradient_of_what_it_penalises(name: str) -> None:
    """Along its gradient the penalty grows as fast as its finite difference says."""
    subject = model().double()
    weights: dict[str, Any] = {name: 1.0}
    config = PenaltyConfig(**weights, eigenvalue_target=0.0)

    def value() -> Tensor:
        states = states_of(subject)
        # The eigenvalue's point is a constant of its penalty, so it has to be one here.
        if name == "eigenvalue":
            states.last = fixed
        return penalty(subject, ids(), states, config, seed=0)

    fixed = states_of(subject).last
    assert fixed is not None
    fixed = fixed.detach()
    parameters = list(subject.recurrent.parameters())
    gradients = torch.autograd.grad(value(), parameters)
    size = 1e-5
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for each, gradient in zip(parameters, gradients, strict=True):
                each.add_(gradient, alpha=sign * size)
        ends.append(float(value().detach()))
        with torch.no_grad():
            for each, gradient in zip(parameters, gradients, strict=True):
                each.sub_(gradient, alpha=sign * size)
    slope = sum(float(gradient.square().sum()) for gradient in gradients)
    # Power iteration turns with the weights too, which its penalty does not differentiate.
    assert (ends[0] - ends[1]) / (2 * size) == pytest.approx(slope, rel=1e-3 if name == "last_step" else 0.3)


def test_descending_a_penalty_lowers_it() -> None:
    for config in (PenaltyConfig(last_step=1.0), PenaltyConfig(eigenvalue=1.0, eigenvalue_target=0.2)):
        subject = model()
        optimizer = torch.optim.Adam(subject.recurrent.parameters(), lr=3e-3)
        values = []
        for _ in range(20):
            value = penalty(subject, ids(), states_of(subject), config, seed=0)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(float(value.detach()))
        assert values[-1] < 0.5 * values[0]


def test_a_damped_model_is_the_undamped_one_under_damping() -> None:
    damped, plain = model(eta=0.25), model()
    batch = Batch.of([row.tolist() for row in ids()])
    runs = [
        NativeSubject(damped.requires_grad_(False)).start(batch, recurrences=6),
        NativeSubject(plain.requires_grad_(False)).intervened("damp=0.25").start(batch, recurrences=6),
    ]
    for _ in range(6):
        for run in runs:
            run.advance()
        assert torch.equal(runs[0].state, runs[1].state)


def test_the_bounded_injection_bounds_the_state() -> None:
    """By the bound that its docstring gives; an added prompt has none."""
    subject = model(injection="bounded", state_init="embeddings")
    assert subject.architecture.parameters == sum(each.numel() for each in subject.parameters())
    norms = {}
    for name, each in (("bounded", subject), ("add", model(injection="add", state_init="embeddings"))):
        states = LastStates()
        with torch.no_grad():
            each(ids(), recurrences=200, observers=(states,))
        assert states.last is not None
        norms[name] = float(states.last.norm(dim=-1).max())
    assert norms["bounded"] < 0.2 * norms["add"]


@pytest.mark.parametrize(("eta", "wrong"), [(0.0, "a positive finite number"), (1.5, "at most 1")])
def test_a_step_outside_its_range_is_refused(eta: float, wrong: str) -> None:
    with pytest.raises(ConfigError, match=f"eta must be {wrong}, got {eta}"):
        model(eta=eta)
    with pytest.raises(ConfigError, match="no loop"):
        model(recurrent=0, injection="none", state_init="embeddings", recurrences=1, eta=0.5)


def test_only_what_stands_behind_the_mark_is_scored() -> None:
    mark, end = 9, 0
    tokens = np.array([[1, 2, 9, 3, 4, 0, 5, 9, 6, 0, 7], [4, 0, 1, 9, 9, 2, 3, 0, 1, 2, 3]])
    assert scored(tokens, mark, end).astype(int).tolist() == [
        [0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0],
    ]
    assert scored(tokens, None, end).all()


def test_penalties_of_nothing_are_nothing() -> None:
    assert float(penalty(model(), ids(), LastStates(), PenaltyConfig(last_step=1.0), seed=0)) == 0
