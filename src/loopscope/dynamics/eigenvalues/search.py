"""Finding a fixed point where the recurrences alone do not go to it, or not fast enough."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopscope._util.shapes import States, TokenMask

_MEMORY = 10
"""Earlier states that a guess is made from. More find a fixed point in no fewer steps on random models, and fewer take
half as many again."""
_DAMPING = 0.5
"""Share of the mapped state in a guess. With 1, guesses near a fixed point that repels overshoot."""
_REACH = 10.0
"""A fixed point that is farther away than this many lengths of the state is none that the run has to do with. So far
out a state that only creeps moves by less than it is rounded."""
_RIDGE = 1e-12
"""Relative size of what keeps the least squares solvable where the earlier states lie in one line."""


def relative_step(state: States, following: States, size: Float[Tensor, "batch token"] | None = None) -> Tensor:
    """`|F(x) - x| / |x|` of each token, (batch, token), or relative to another size."""
    size = torch.linalg.vector_norm(state, dim=-1) if size is None else size
    step: Tensor = torch.linalg.vector_norm(following - state, dim=-1) / size
    return step


@torch.no_grad()
def find_fixed_point(
    recurrence: Callable[[States], States], state: States, mask: TokenMask, *, settled: float, evaluations: int
) -> tuple[States, Bool[Tensor, " batch"]]:
    """States with `|F(x) - x| <= settled |state|` at every token, and for which prompts they were found.

    Anderson's mixing (1965; Walker and Ni 2011) of each token's states by itself. It solves `F(x) = x` rather than
    following F, so that it reaches fixed points that repel, as that within an orbit. Prompts for which none is found
    in that many evaluations of F, or that run away, keep their state. Steps are relative to the state given and not to
    where the search has gone.
    """
    begin, kept, size = state, state.clone(), torch.linalg.vector_norm(state, dim=-1)
    found, lost = (torch.zeros(len(state), dtype=torch.bool, device=state.device) for _ in range(2))
    states: list[States] = []
    steps: list[States] = []
    for _ in range(evaluations):
        following = recurrence(state)
        near = (relative_step(begin, state) <= _REACH).logical_or(~mask).all(-1)
        rests = (relative_step(state, following, size) <= settled).logical_or(~mask).all(-1)
        lost = lost | (~near & ~found)
        now = rests & ~found & ~lost
        kept[now] = state[now]
        found = found | now
        if bool((found | lost).all()):
            break
        states, steps = [*states[-_MEMORY:], state], [*steps[-_MEMORY:], following - state]
        state = _guess(states, steps)
    return kept, found


def _guess(states: list[States], steps: list[States]) -> States:
    """The combination of the last states whose steps, taken as linear, cancel best, moved along what is left."""
    state, step = states[-1], steps[-1]
    if len(states) == 1:
        return state + _DAMPING * step
    moved, turned = (
        torch.stack([later - earlier for earlier, later in pairwise(each)], dim=-1) for each in (states, steps)
    )
    normal = (turned.mT @ turned).double()
    # Tokens that have arrived differ by nothing.
    ridge = _RIDGE * normal.diagonal(dim1=-2, dim2=-1).sum(-1) + torch.finfo(torch.float64).tiny
    normal = normal + ridge[..., None, None] * torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    # Not `solve`, which would end the search of every prompt for one whose states have overflown.
    weights, _ = torch.linalg.solve_ex(normal, (turned.mT @ step[..., None]).double())
    weights = weights.to(step.dtype)
    guess: Tensor = state + _DAMPING * step - ((moved + _DAMPING * turned) @ weights)[..., 0]
    return guess
