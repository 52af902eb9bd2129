"""One transformer layer, with its norms where the architecture puts them, and the injection that bounds the state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from loopscope._util.shapes import States
from loopscope.models.architecture import Activation, Architecture, NormPlacement
from loopscope.models.native.attention import Attention, AttentionContext, LayerOutput, RMSNorm, Through
from loopscope.models.native.interventions import UNCHANGED, BranchScale
from loopscope.models.visits import QueryKeyAttention

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu-tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "halved-relu2": lambda x: functional.relu(x).square() * 0.5,
}


class BoundedInjection(nn.Module):
    """`sigmoid(a) * s + W e` of `[s ; e]`, (..., 2 width) to (..., width).

    Every factor on the state lies between 0 and 1. So with layers whose branches read normed states, each of which adds
    at most some C, the norm of the state stays below (|W e| + C) / (1 - max sigmoid(a)). That bounds the state; it does
    not make the whole recurrence a contraction, which its eigenvalues decide.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.decay = nn.Parameter(torch.zeros(width))
        self.weight = nn.Parameter(torch.zeros(width, width))

    @property
    def factors(self) -> Tensor:
        """On the state, (width,)."""
        return torch.sigmoid(self.decay)

    def forward(self, both: Tensor) -> Tensor:
        state, encoded = both.split(self.width, dim=-1)
        mixed: Tensor = self.factors * state + functional.linear(encoded, self.weight)
        return mixed


class DiagonalInjection(nn.Module):
    """`exp(-d exp(a)) * s + d * W e` of `[s ; e]`, with `d = softplus(b)`, (..., 2 width) to (..., width) (Parcae).

    A linear system that forgets, in steps of learned length: every factor on the state lies between 0 and 1.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.rate_log = nn.Parameter(torch.zeros(width))
        self.step_bias = nn.Parameter(torch.zeros(width))
        self.weight = nn.Parameter(torch.zeros(width, width))

    @property
    def factors(self) -> Tensor:
        """On the state, (width,)."""
        return torch.exp(-functional.softplus(self.step_bias) * torch.exp(self.rate_log))

    def forward(self, both: Tensor) -> Tensor:
        state, encoded = both.split(self.width, dim=-1)
        mixed: Tensor = state * self.factors + functional.softplus(self.step_bias) * (encoded @ self.weight.T)
        return mixed


# Which of n1 (into attention), n2 (after it), n3 (into the MLP), n4 (after it) exist.
_NORMS: dict[NormPlacement, tuple[int, ...]] = {
    "pre": (1, 3),
    "residual": (1, 2, 3, 4),
    "branch-in-out": (1, 2, 3, 4),
    "branch-out": (2, 4),
}


class MLP(nn.Module):
    """`down(act(gate x) * up x)`, or `down(act(up x))` where it is plain."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        width, hidden = architecture.width, architecture.mlp_width
        self.gate = nn.Linear(width, hidden, bias=False) if architecture.mlp == "gated" else None
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.activation = _ACTIVATIONS[architecture.activation]

    def forward(self, x: States) -> States:
        hidden = self.activation(self.up(x)) if self.gate is None else self.activation(self.gate(x)) * self.up(x)
        output: Tensor = self.down(hidden)
        return output


class Layer(nn.Module):
    """Attention, then MLP, each added to the residual stream."""

    def __init__(self, architecture: Architecture, place: int) -> None:
        """`place` counts over prelude, recurrent and coda."""
        super().__init__()
        self.brought_from: Mapping[str, Tensor] | None = None
        """Its weights by name, where it has them only while it runs; they are read, or copied, when they are asked for.
        """
        self.device: torch.device | None = None
        """Where it runs, if that is not where its weights are."""
        self.on_residual = architecture.norm_placement == "residual"
        self.attention = Attention(architecture, place)
        self.mlp = MLP(architecture)
        present = _NORMS[architecture.norm_placement]

        def norm(number: int) -> nn.Module:
            return RMSNorm(architecture.width, architecture.norm_eps) if number in present else nn.Identity()

        self.norm_1, self.norm_2, self.norm_3, self.norm_4 = norm(1), norm(2), norm(3), norm(4)

    def weight(self, name: str) -> Tensor:
        """One of its parameters, wherever it lies."""
        return self.get_parameter(name) if self.brought_from is None else self.brought_from[name]

    def visit(
        self,
        x: States,
        context: AttentionContext,
        scale: BranchScale = UNCHANGED,
        through: Through | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> tuple[States, QueryKeyAttention]:
        """`forward` where this layer runs: state and context are moved there, and weights are brought there, in
        another `dtype` if one is given. What comes out stays there."""
        device = self.device or self.mlp.down.weight.device
        arguments = (x.to(device), context.on(device), scale, through)
        if self.brought_from is None and dtype is None:
            answer: tuple[States, QueryKeyAttention] = self(*arguments)
            return answer
        weights = dict(self.named_parameters() if self.brought_from is None else self.brought_from.items())
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
        brought: tuple[States, QueryKeyAttention] = functional_call(self, weights, arguments)
        return brought

    def forward(
        self,
        x: States,
        context: AttentionContext,
        scale: BranchScale = UNCHANGED,
        through: Through | None = None,
    ) -> tuple[States, QueryKeyAttention]:
        branch, view = self.attention(self.norm_1(x), context, through)
        x = self._add("attention", x, branch, self.norm_2, scale.attention, through)
        x = self._add("mlp", x, self.mlp(self.norm_3(x)), self.norm_4, scale.mlp, through)
        return x if through is None else through("residual", x), view

    def _add(
        self, part: LayerOutput, x: Tensor, branch: Tensor, norm: nn.Module, factor: float, through: Through | None
    ) -> Tensor:
        """A factor is on what is added: a norm between the branch and the residual stream would undo it."""
        added: Tensor = _scaled(branch if self.on_residual else norm(branch), factor)
        if through is not None:
            added = through(part, added)
        summed: Tensor = norm(x + added) if self.on_residual else x + added
        return summed


def _scaled(branch: Tensor, factor: float) -> Tensor:
    if factor == 1.0:
        return branch
    # Not by multiplication: what is taken out may be infinite.
    return torch.zeros_like(branch) if factor == 0.0 else branch * factor
