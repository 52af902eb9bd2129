"""Finding a fixed point where the recurrences alone do not go to it, or not fast enough."""

from __future__ import annotations

from collections.abc import Callable

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
_TRIED, _HOPELESS = 12, 0.3
"""After so many evaluations a prompt whose middle token still moves by more than this share of its norm is given up."""
_PATIENCE, _NEARER = 60, 0.7
"""A prompt is given up whose smallest steps, that of its middle token and the largest of its tokens, are both above
that share of what they were so many evaluations before. Of 104 random prompts whose fixed point 200 evaluations find,
both rules together give up 7, and others after 32 evaluations on average."""
_RIDGE = 1e-12
"""Relative size of what keeps the least squares solvable where the earlier states lie in one line."""

Recurrence = Callable[[States, Bool[Tensor, " batch"]], States]
"""Of the states of all prompts: those prompts one recurrence later."""


def relative_step(state: States, following: States, size: Float[Tensor, "batch token"] | None = None) -> Tensor:
    """`|F(x) - x| / |x|` of each token, (batch, token), or relative to another size."""
    size = torch.linalg.vector_norm(state, dim=-1) if size is None else size
    step: Tensor = torch.linalg.vector_norm(following - state, dim=-1) / size
    return step


@torch.no_grad()
def find_fixed_point(
    recurrence: Recurrence, state: States, mask: TokenMask, *, settled: float, evaluations: int
) -> tuple[States, Bool[Tensor, " batch"]]:
    """States with `|F(x) - x| <= settled |state|` at every token, and for which prompts they were found.

    Anderson's mixing (1965; Walker and Ni 2011) of each token's states by itself. It solves `F(x) = x` rather than
    following F, so that it reaches fixed points that repel, as that within an orbit. Prompts for which none is found
    in that many evaluations of F, that run away, or that come no nearer (see `_PATIENCE`), keep their state. Steps are
    relative to the state given and not to where the search has gone.
    """
    kept, found = state.clone(), torch.zeros(len(state), dtype=torch.bool, device=state.device)
    open_ = torch.ones_like(found)
    begin, size, real = state, torch.linalg.vector_norm(state, dim=-1), mask
    mixing, history = _Mixing(state), _History()
    for _ in range(evaluations):
        following = recurrence(kept.index_put((open_,), state), open_)[open_]
        near = (relative_step(begin, state) <= _REACH).logical_or(~real).all(-1)
        steps = relative_step(state, following, size)
        rests = (steps <= settled).logical_or(~real).all(-1) & near
        goes_on = near & ~rests & history.hopeful(steps, real)
        places = open_.nonzero()[:, 0]
        kept[places[rests]], found[places[rests]] = state[rests], True
        if not bool(goes_on.any()):
            break
        state = mixing.guess(state, following - state)
        if not bool(goes_on.all()):
            open_ = torch.zeros_like(open_).index_put((places[goes_on],), torch.tensor(True, device=open_.device))
            begin, size, real, state = (each[goes_on] for each in (begin, size, real, state))
            mixing.keep(goes_on)
            history.keep(goes_on)
    return kept, found


class _History:
    """By how much the prompts' steps have shrunk."""

    def __init__(self) -> None:
        self._smallest: list[Float[Tensor, "batch 2"]] = []

    def hopeful(self, steps: Float[Tensor, "batch token"], mask: TokenMask) -> Bool[Tensor, " batch"]:
        """Whether a prompt may still come to a fixed point."""
        middle = steps.masked_fill(~mask, torch.nan).nanmedian(-1).values
        now = torch.stack((middle, steps.masked_fill(~mask, 0.0).amax(-1)), dim=-1)
        self._smallest.append(torch.minimum(now, self._smallest[-1]) if self._smallest else now)
        count, smallest = len(self._smallest), self._smallest[-1]
        hopeful = torch.ones_like(smallest[:, 0], dtype=torch.bool)
        if count > _TRIED:
            hopeful = smallest[:, 0] <= _HOPELESS
        if count > _PATIENCE:
            hopeful = hopeful & (smallest <= _NEARER * self._smallest[-1 - _PATIENCE]).any(-1)
        return hopeful

    def keep(self, some: Bool[Tensor, " batch"]) -> None:
        self._smallest = [each[some] for each in self._smallest]


class _Mixing:
    """The differences of each token's last states, and of their steps."""

    def __init__(self, state: States) -> None:
        shape = (*state.shape[:2], _MEMORY, state.shape[2])
        self._moved, self._turned = state.new_zeros(shape), state.new_zeros(shape)
        self._last: tuple[States, States] | None = None
        self._count = 0

    def keep(self, some: Bool[Tensor, " batch"]) -> None:
        self._moved, self._turned = self._moved[some], self._turned[some]
        assert self._last is not None
        self._last = self._last[0][some], self._last[1][some]

    def guess(self, state: States, step: States) -> States:
        """The combination of the last states whose steps, taken as linear, cancel best, moved along what is left."""
        if self._last is None:
            self._last = state, step
            return state + _DAMPING * step
        slot = self._count % _MEMORY
        self._moved[:, :, slot], self._turned[:, :, slot] = state - self._last[0], step - self._last[1]
        self._last, self._count = (state, step), self._count + 1
        known = min(self._count, _MEMORY)
        moved, turned = self._moved[:, :, :known], self._turned[:, :, :known]
        normal = (turned @ turned.mT).double()
        # Tokens that have arrived differ by nothing.
        ridge = _RIDGE * normal.diagonal(dim1=-2, dim2=-1).sum(-1) + torch.finfo(torch.float64).tiny
        normal = normal + ridge[..., None, None] * torch.eye(known, dtype=normal.dtype, device=normal.device)
        # Not `solve`, which would end the search of every prompt for one whose states have overflown.
        weights, _ = torch.linalg.solve_ex(normal, (turned @ step[..., None]).double())
        taken = weights.to(step.dtype).mT
        guess: Tensor = state + _DAMPING * step - (taken @ moved + _DAMPING * (taken @ turned))[..., 0, :]
        return guess
