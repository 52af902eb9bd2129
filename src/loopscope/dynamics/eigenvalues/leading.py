"""Leading eigenvalues of one recurrence, token by token, near a state that a run has reached."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from loopscope._util.shapes import States, TokenIds, TokenMask
from loopscope.dynamics.eigenvalues.krylov import KrylovSpace, TokenVectors, ritz_values
from loopscope.dynamics.eigenvalues.normality import largest_singular_value, non_normality
from loopscope.dynamics.eigenvalues.recurrence import Derivative, LinearisedRecurrence, TokenBlock
from loopscope.dynamics.eigenvalues.result import EigenvalueSettings, Stability
from loopscope.dynamics.eigenvalues.search import find_fixed_point, relative_step
from loopscope.models.native.interventions import initial_noise
from loopscope.models.subject import Batch

SEARCH_STEPS = 20
"""As which the search for a fixed point is reported: it takes none to 200 recurrences, 30 on average where it finds
it, and a product takes more than one."""
_STRIDE = 8
"""Products between two looks at the eigenvalues, which cost about one."""
_FEWER = 0.8
"""Share of the tokens whose products are made, below which the rest is linearised anew for about four products."""


def eigenvalues_near(
    near: LinearisedRecurrence,
    batch: Batch,
    settings: EigenvalueSettings,
    on_step: Callable[[], None] = lambda: None,
) -> Stability:
    """What `leading_eigenvalues` finds, for prompts that have been run already, all at once. `on_step` is called
    `SEARCH_STEPS` times after the search, and as often as products are allowed."""
    start_state = near.state
    mask = batch.mask.to(start_state.device)
    following = near.apply(start_state)
    moves = (relative_step(start_state, following) > settings.settled).logical_and(mask).any(-1)
    state, searched = start_state, torch.zeros_like(moves)
    if settings.search and bool(moves.any()):
        state, searched = find_fixed_point(
            near.token_map(),
            start_state,
            mask & moves[:, None],
            settled=settings.settled,
            evaluations=settings.search,
            whole=not near.by_token,
        )
        following = near.apply(state)
    for _ in range(SEARCH_STEPS):
        on_step()
    found = _Found(mask, min(settings.products, state.shape[-1]))
    step = relative_step(state, following)
    # A token stands no nearer to a fixed point than those before it.
    far = step.masked_fill(~mask, 0.0).cummax(-1).values > settings.far
    # What has grown beyond the numbers of its dtype has no neighbourhood to speak of.
    there = taken_tokens(mask, settings.every) & step.isfinite()
    start, spare = _first_vectors(near.last_step, batch.input_ids, mask, settings)
    derivatives: set[Derivative] = set()
    blocks = iter(near.linearised(state, there)) if bool(there.any()) else iter(())
    while (derivative := _solve_next(blocks, near, state, (start, spare), far, settings, on_step, found)) is not None:
        derivatives.add(derivative)
    return Stability(
        **{name: whole.numpy() for name, whole in found.arrays.items()},
        relative_step=_numbers(step, mask),
        moved=_numbers(relative_step(start_state, state), mask),
        searched=searched.cpu().numpy(),
        mask=mask.cpu().numpy(),
        point=state.cpu().numpy(),
        recurrences=near.recurrences,
        site=near.site,
        derivative="differences" if "differences" in derivatives else "exact",
        dtype=str(state.dtype).removeprefix("torch."),
        settings=settings,
    )


class _Found:
    """Arrays of `Stability`, NaN for tokens of which nothing is known yet."""

    def __init__(self, mask: TokenMask, products: int) -> None:
        self._shape, self.products = mask.shape, products
        self.arrays: dict[str, Tensor] = {}
        none = torch.zeros(0, products, dtype=torch.complex128)
        self.put(
            torch.zeros_like(mask),
            eigenvalues=none,
            residuals=none.real,
            errors=none.real,
            products_made=none.real[:, 0],
            **non_normality(torch.zeros(0, products + 1, products, dtype=torch.float64), none, none.real[:, 0]),
        )

    def put(self, tokens: TokenMask, **values: Tensor) -> None:
        """(token, ...) each, of those tokens; with fewer pairs than there may be, the first ones."""
        for name, each in values.items():
            if name not in self.arrays:
                # Of an eigenvalue both parts are NaN, not the real one alone.
                nothing = complex(math.nan, math.nan) if each.is_complex() else math.nan
                shape = (*self._shape, self.products) if each.ndim == 2 else self._shape
                self.arrays[name] = torch.full(shape, nothing, dtype=each.dtype)
            pairs = (slice(each.shape[1]),) if each.ndim == 2 else ()
            self.arrays[name][(tokens.cpu(), *pairs)] = each


def taken_tokens(mask: TokenMask, every: int) -> TokenMask:
    """Of the tokens of each prompt every n-th, or the last."""
    from_end = mask.flip(-1).cumsum(-1).flip(-1) - 1
    return mask & (from_end % every == 0 if every else from_end == 0)


def _solve_next(
    blocks: Iterator[TokenBlock],
    near: LinearisedRecurrence,
    state: States,
    first: tuple[States, States],
    far: TokenMask,
    settings: EigenvalueSettings,
    on_step: Callable[[], None],
    found: _Found,
) -> Derivative | None:
    """Let the space of every token of the next block grow until its leading eigenvalue is known; None where there is no
    other block. Nobody else holds the block, so that what is recorded for it goes before the next one is made.

    What is found of a token does not depend on which others there are. Those that are left are linearised anew where
    they are clearly fewer: the products of all would cost more.
    """
    try:
        block = next(blocks)
    except StopIteration:
        return None
    start, spare = (each[block.tokens] for each in first)
    space = KrylovSpace(start, spare, found.products)
    left, made_of, singular = block.tokens, block.tokens, None

    def product(vectors: TokenVectors) -> TokenVectors:
        on_step()
        among = left[made_of]
        if bool(among.all()):
            return block.products(vectors)
        whole = vectors.new_zeros(len(among), vectors.shape[-1])
        return block.products(whole.index_put((among,), vectors))[among]

    while bool(left.any()):
        space.grow(product, min(space.columns + _STRIDE if space.columns else settings.least, found.products))
        ritz = ritz_values(space.coefficients, block.products.accuracy)
        if singular is None:
            singular = largest_singular_value(block.products, space)
        open_ = ~(ritz.known(settings.tolerance) | far[left].cpu())
        if space.columns == found.products:
            open_.fill_(False)
        values, of_done = ritz.values[~open_], torch.zeros_like(left).index_put((left,), ~open_.to(left.device))
        found.put(
            of_done,
            eigenvalues=values,
            residuals=ritz.residuals[~open_],
            errors=ritz.errors[~open_],
            products_made=torch.full((len(values),), float(space.columns), dtype=torch.float64),
            **non_normality(space.coefficients[~open_], values, singular[~open_]),
        )
        space, singular, left = space.of(open_), singular[open_], left & ~of_done
        if 0 < int(left.sum()) <= _FEWER * int(made_of.sum()):
            del block
            (block,) = near.linearised(state, left)
            made_of = left
    for _ in range(found.products - space.columns):
        on_step()
    return block.derivative


def _first_vectors(
    last_step: States, input_ids: TokenIds, mask: TokenMask, settings: EigenvalueSettings
) -> tuple[States, States]:
    """Where each token's Krylov space begins, and directions for one that closes early."""
    noise, spare = (
        initial_noise(input_ids, mask, last_step.shape[-1], std=1.0, seed=_stream(settings.seed, name)).to(last_step)
        for name in ("start", "spare")
    )
    size = torch.linalg.vector_norm(last_step, dim=-1, keepdim=True)
    direction = torch.where(size > 0, last_step / size, 0.0)
    return direction + settings.random_share * functional.normalize(noise, dim=-1), spare


def _stream(seed: int, name: str) -> int:
    """A seed for other numbers than those of the initial state."""
    return int.from_bytes(hashlib.sha256(f"{seed}:eigenvalues:{name}".encode()).digest()[:8], "little")


def _numbers(values: Tensor, mask: TokenMask) -> np.ndarray:
    """float64, NaN at padding."""
    numbers: np.ndarray = values.double().masked_fill(~mask, torch.nan).cpu().numpy()
    return numbers
