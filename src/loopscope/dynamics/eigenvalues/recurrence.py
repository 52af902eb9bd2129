"""A subject near the state at which its recurrence is linearised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from loopscope._util.shapes import States, TokenMask
from loopscope.dynamics.eigenvalues.krylov import Products
from loopscope.dynamics.eigenvalues.search import TokenMap

StateSite = Literal["loop state", "block input"]
"""Where the state is taken: as one recurrence hands it on, or as the first recurrent layer receives it. The two maps
are the same layers begun at different places, so their Jacobians at the fixed point have the same eigenvalues."""

Derivative = Literal["exact", "differences"]

_DROWNED = 1e3
"""A step of less than that many roundings of the state points where rounding does."""


@dataclass(frozen=True)
class TokenBlock:
    """Some of a batch's tokens with the derivative of their recurrence."""

    tokens: TokenMask
    """Which they are, in the order of the batch."""
    products: Products
    derivative: Derivative


@runtime_checkable
class LinearisedRecurrence(Protocol):
    """What eigenvalues need of a subject that has run some prompts to the horizon."""

    state: States
    """Where the run stands, in the arithmetic of the derivatives."""
    last_step: States
    """Where each token's state last went before rounding drowned its steps; zero where nothing is known."""
    recurrences: int
    """How many were run before the state."""
    site: StateSite

    by_token: bool
    """Whether `token_map` computes less for fewer tokens of a prompt."""

    def apply(self, state: States) -> States:
        """One recurrence of all prompts, without gradients."""

    def token_map(self) -> TokenMap:
        """One recurrence of some tokens, without gradients."""

    def linearised(self, state: States, tokens: TokenMask) -> Iterator[TokenBlock]:
        """The recurrence's derivative at these states, in blocks that hold each of those tokens once. Some of a block's
        tokens are one block again."""


class LastStep:
    """Keeps each token's last step that is above rounding.

    The steps of a half-precision model are taken in float32: their own rounding would come on top of that of states.
    """

    def __init__(self, state: States, rounds_in: torch.dtype) -> None:
        self._before = at_least_float32(state)
        self._level = _DROWNED * torch.finfo(rounds_in).eps
        self.steps: Tensor = torch.zeros_like(self._before)

    def follow(self, state: States) -> tuple[Tensor, Tensor]:
        """The state one recurrence later; (batch, token) each, how long the step to it is, and its norm."""
        state = at_least_float32(state)
        step = state - self._before
        length, size = (torch.linalg.vector_norm(each, dim=-1) for each in (step, state))
        self.steps = torch.where((length > self._level * size)[..., None], step, self.steps)
        self._before = state
        return length, size


def at_least_float32(state: Tensor) -> Tensor:
    """The same in float32, unless it is in float64."""
    return state if state.dtype == torch.float64 else state.float()
