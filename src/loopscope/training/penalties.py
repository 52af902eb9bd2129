"""Terms of the loss that make the loop settle."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from loopscope._shapes import States, TokenIds
from loopscope.model import LoopedTransformer, Sequence
from loopscope.stability.frozen import mix_with_others_frozen
from loopscope.stability.products import transposed_products
from loopscope.training.config import PenaltyConfig
from loopscope.visits import LoopState, Observer

__all__ = ["LastStates", "penalty"]


class LastStates(Observer):
    """Keeps the last two states of a loop, with their gradients."""

    def __init__(self) -> None:
        self.before: States | None = None
        self.last: States | None = None

    def loop_state(self, loop_state: LoopState) -> None:
        self.before, self.last = self.last, loop_state.state


def penalty(
    model: LoopedTransformer, input_ids: TokenIds, states: LastStates, config: PenaltyConfig, seed: int
) -> Tensor:
    """The weighted sum of what the configuration asks for, a scalar with a gradient; `seed` is that of the direction
    in which the derivative is followed."""
    total = torch.zeros((), device=model.device)
    # After a single recurrence there is a step too, but from the initial state, which need not be near.
    if config.last_step and states.before is not None and states.last is not None:
        total = total + config.last_step * _last_step(states.before, states.last)
    if config.eigenvalue and states.last is not None:
        factors = stretching(model, model.encode(input_ids), states.last, config.eigenvalue_products, seed)
        total = total + config.eigenvalue * (factors - config.eigenvalue_target).relu().square().mean()
    return total


def _last_step(before: States, last: States) -> Tensor:
    return ((last - before).square().sum(-1) / last.square().sum(-1)).mean()


def stretching(model: LoopedTransformer, sequence: Sequence, state: States, products: int, seed: int) -> Tensor:
    """By how much the last of some power iterations stretches each token's vector, (batch, token), with gradients to
    the weights.

    The derivative is that of one recurrence by the token's own state alone, at the state as it is: no gradient flows
    through where it stands, nor through the iterations before the last. It converges to the spectral radius of the
    token's Jacobian where one real eigenvalue leads.
    """
    point = state.detach().requires_grad_()
    still = dataclasses.replace(sequence, context=dataclasses.replace(sequence.context, mix=mix_with_others_frozen))
    image = model.recur(point, still, 0)
    pulled, cotangent = transposed_products(image, point)
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(point.shape, generator=generator).to(point)
    tiny = torch.finfo(point.dtype).tiny
    for remaining in reversed(range(products)):
        vectors = vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp(min=tiny)
        (vectors,) = torch.autograd.grad(pulled, cotangent, vectors, retain_graph=True, create_graph=remaining == 0)
    factors: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return factors
