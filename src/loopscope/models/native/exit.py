"""Where a model with an exit gate stops, token by token (Ouro; Zhu et al., arXiv 2510.25741)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from loopscope._util.shapes import States, TokenValues


def exit_distribution(gates: Sequence[TokenValues]) -> Tensor:
    """Probability to stop after each recurrence, (batch, token, recurrence), from the gates before their sigmoid.

    `p_t = lambda_t prod_{u < t} (1 - lambda_u)` with `lambda = sigmoid(gate)`; the last recurrence takes all that is
    left.
    """
    survival = torch.ones_like(gates[0])
    shares = []
    for gate in gates[:-1]:
        stop = gate.sigmoid()
        shares.append(survival * stop)
        survival = survival * (1 - stop)
    return torch.stack([*shares, survival], dim=-1)


def exit_cumulated(distribution: Tensor) -> Tensor:
    """Probability to have stopped, (batch, token, recurrence), as it is compared with a threshold: summed up in float64
    and rounded to the gate's dtype. Near a threshold of 1 the last bit decides where a token stops.
    """
    return distribution.cumsum(-1, dtype=torch.float64).to(distribution.dtype)


def exit_step(distribution: Tensor, threshold: float) -> Tensor:
    """The number of recurrences after which the cumulated probability first reaches the threshold, (batch, token).

    All of them where it never does.
    """
    reached = exit_cumulated(distribution) >= threshold
    return torch.where(reached.any(-1), reached.int().argmax(-1) + 1, distribution.shape[-1])


class ExitRule:
    """Keeps, for each token, the state with which the model answers, while recurrences go by.

    Of the states seen so far only one per token is kept, so memory does not grow with the number of recurrences.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._kept: Tensor | None = None
        self._survival: Tensor
        self._cumulated: Tensor
        self._stopped: Tensor

    def after(self, state: States, gate: TokenValues) -> None:
        """A recurrence ended with this state and this gate (before its sigmoid)."""
        if self._kept is None:
            self._kept = torch.zeros_like(state)
            self._survival = torch.ones_like(gate)
            self._cumulated = torch.zeros_like(gate, dtype=torch.float64)
            self._stopped = torch.zeros_like(gate, dtype=torch.bool)
        stop = gate.sigmoid()
        self._cumulated = self._cumulated + self._survival * stop
        self._survival = self._survival * (1 - stop)
        # Summed up and rounded as in exit_cumulated.
        now = (self._cumulated.to(gate.dtype) >= self._threshold) & ~self._stopped
        self._kept = torch.where(now[..., None], state, self._kept)
        self._stopped = self._stopped | now

    def of(self, rows: Int64[Tensor, " row"]) -> ExitRule:
        """The same for those prompts of the batch, which may be named again."""
        some = ExitRule(self._threshold)
        if self._kept is not None:
            some._kept, some._survival = self._kept[rows], self._survival[rows]
            some._cumulated, some._stopped = self._cumulated[rows], self._stopped[rows]
        return some

    def answer(self, state: States) -> States:
        """Each token's state where it stopped; `state`, the last one, for those that have not."""
        if self._kept is None:
            return state
        return torch.where(self._stopped[..., None], self._kept, state)
