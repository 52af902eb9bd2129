"""Finding a fixed point where the recurrences alone do not go to it, or not fast enough."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor

from loopscope._util.shapes import States, TokenMask
from loopscope.dynamics.eigenvalues.krylov import TokenVectors

LEAST_WINDOW, WINDOWS = 8, 8
"""A prompt is moved a window at a time: one of so many parts of it, of so many tokens at the least. Those behind wait
for what they look at to stand still: moved all at once, random prompts of 24 tokens need twice as many evaluations of
each."""
_MEMORY = 10
"""Earlier states that a guess is made from. More find a fixed point in no fewer steps on random models, and fewer take
half as many again."""
_DAMPING = 0.5
"""Share of the mapped state in a guess. With 1, guesses near a fixed point that repels overshoot."""
_REACH = 10.0
"""A fixed point that is farther away than this many lengths of the state is none that the run has to do with. So far
out a state that only creeps moves by less than it is rounded."""
_PATIENCE, _NEARER = 100, 0.7
"""A token is given up whose smallest step has not fallen to that share within so many evaluations. With 60, three of
103 random prompts whose fixed point is found have none."""
_FAR, _LESS_PATIENCE = 0.3, 24
"""The same, of a token that moves by more than this share of its norm in each of them."""
_RIDGE = 1e-12
"""Relative size of what keeps the least squares solvable where the earlier states lie in one line."""

TokenMap = Callable[[TokenVectors, TokenMask], TokenVectors]
"""States of some tokens, in the order of the batch, to their states one recurrence later. The others stand where they
were when they were last among those."""


def relative_step(state: States, following: States) -> Tensor:
    """`|F(x) - x| / |x|` of each token, (batch, token)."""
    step: Tensor = torch.linalg.vector_norm(following - state, dim=-1) / torch.linalg.vector_norm(state, dim=-1)
    return step


@torch.no_grad()
def find_fixed_point(
    recurrence: TokenMap, state: States, mask: TokenMask, *, settled: float, evaluations: int, whole: bool = False
) -> tuple[States, Bool[Tensor, " batch"]]:
    """States with `|F(x) - x| <= settled |x|` at every token, and for which prompts they were found.

    `recurrence` is F, `state` where the search begins, and `evaluations` how often each token may be evaluated on
    average over its prompt.

    Anderson's mixing (1965; Walker and Ni 2011) of each token's states by itself. It solves `F(x) = x` rather than
    following F, so that it reaches fixed points that repel, as that within an orbit. In a causal model the fixed point
    of a token is one whatever comes behind it: a prompt's tokens are taken from its first on, a window at a time unless
    they are to be moved as a `whole`, and the first ones stand still as soon as they have settled. Prompts keep their
    state where a token runs away or comes no nearer (see `_PATIENCE`) once all before it stand still, and where it
    takes more evaluations than that. A step has to be small beside the state given too: all are small beside one that
    runs away.
    """
    count, place = mask.sum(-1), mask.cumsum(-1) - 1
    window = count if whole else (count // WINDOWS).clamp(min=LEAST_WINDOW)
    size = torch.linalg.vector_norm(state, dim=-1)
    first, used, tries, open_ = *torch.zeros(3, len(mask), dtype=torch.int64, device=mask.device), count > 0
    smallest = mark = size.new_full(first.shape, torch.inf)
    searched, tokens, mixing = state.clone(), torch.zeros_like(mask), _AndersonMixing(state)
    while bool(open_.any()):
        taken = mask & open_[:, None] & (place >= first[:, None]) & (place < (first + window)[:, None])
        if not torch.equal(taken, tokens):
            mixing.take(tokens, taken)
            tokens = taken
        before = searched[tokens]
        change = recurrence(before, tokens) - before
        guess = mixing.guess(before, change)
        step = size.new_full(mask.shape, torch.inf)
        length, norm = (torch.linalg.vector_norm(each, dim=-1) for each in (change, before))
        step[tokens] = length / size[tokens]
        settles = (place < first[:, None]) | ~mask
        settles[tokens] |= length <= settled * torch.minimum(size[tokens], norm)
        away = torch.linalg.vector_norm(searched - state, dim=-1) / size
        # Of the first token that is not settled: what it sees stands still, so that this is its own step.
        own = step.masked_fill(place != first[:, None], torch.inf).amin(-1)
        smallest = torch.minimum(smallest, own)
        nearer = smallest <= _NEARER * mark
        tries, mark = torch.where(nearer, 0, tries + 1), torch.where(nearer, smallest, mark)
        used = used + tokens.sum(-1)
        hopeless = tries > torch.where(smallest > _FAR, _LESS_PATIENCE, _PATIENCE)
        hopeless |= (used >= evaluations * count) | ~((away <= _REACH) | ~tokens).all(-1)
        ahead = (settles.cumprod(-1).bool() & mask).sum(-1)
        tries, smallest, mark = (
            torch.where(ahead > first, anew, each)
            for anew, each in ((0, tries), (torch.inf, smallest), (torch.inf, mark))
        )
        first = ahead
        open_ = open_ & (first < count) & ~hopeless
        moves = tokens & open_[:, None] & (place >= first[:, None])
        searched[moves] = guess[moves[tokens]]
    found = (first == count) & (count > 0)
    return torch.where(found[:, None, None], searched, state), found


class _AndersonMixing:
    """The differences of each token's last `_MEMORY` states, (token, slot, width), and of their steps."""

    def __init__(self, state: States) -> None:
        self._moved = self._turned = state.new_zeros(0, _MEMORY, state.shape[-1])
        self._state = self._step = state.new_zeros(0, state.shape[-1])
        self._count = 0

    def take(self, tokens: TokenMask, others: TokenMask) -> None:
        """Those others in place of the tokens so far; of the ones that are new nothing is known."""
        stay, again = others[tokens], tokens[others]
        for name in ("_moved", "_turned", "_state", "_step"):
            known: Tensor = getattr(self, name)
            # NaN is what a difference from is not known.
            whole = known.new_full((len(again), *known.shape[1:]), 0.0 if known.ndim == 3 else torch.nan)
            whole[again] = known[stay]
            setattr(self, name, whole)

    def guess(self, state: TokenVectors, step: TokenVectors) -> TokenVectors:
        """The combination of the last states whose steps, taken as linear, cancel best, moved along what is left."""
        slot = self._count % _MEMORY
        self._moved[:, slot], self._turned[:, slot] = (
            (now - before).nan_to_num(0.0, 0.0, 0.0) for now, before in ((state, self._state), (step, self._step))
        )
        self._state, self._step, self._count = state, step, self._count + 1
        normal = (self._turned @ self._turned.mT).double()
        # Tokens that have arrived, or have only just come in, differ by nothing.
        ridge = _RIDGE * normal.diagonal(dim1=-2, dim2=-1).sum(-1) + torch.finfo(torch.float64).tiny
        normal = normal + ridge[..., None, None] * torch.eye(_MEMORY, dtype=normal.dtype, device=normal.device)
        # Not `solve`, which would end the search of every prompt for one whose states have overflown.
        weights, _ = torch.linalg.solve_ex(normal, (self._turned @ step[..., None]).double())
        taken = weights.to(step.dtype).mT
        guess: Tensor = state + _DAMPING * step - (taken @ self._moved + _DAMPING * (taken @ self._turned))[:, 0]
        return guess
