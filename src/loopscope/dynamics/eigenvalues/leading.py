"""Leading eigenvalues of one recurrence, token by token, near a state that a run has reached."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from loopscope._util.shapes import States, TokenIds, TokenMask
from loopscope.dynamics.eigenvalues.krylov import Products, TokenVectors, arnoldi, ritz_values
from loopscope.dynamics.eigenvalues.normality import non_normality
from loopscope.dynamics.eigenvalues.recurrence import Derivative, LinearisedRecurrence
from loopscope.dynamics.eigenvalues.result import EigenvalueSettings, Stability
from loopscope.dynamics.eigenvalues.search import find_fixed_point, relative_step
from loopscope.models.native.interventions import initial_noise
from loopscope.models.subject import Batch


def eigenvalues_near(
    near: LinearisedRecurrence,
    batch: Batch,
    settings: EigenvalueSettings,
    on_product: Callable[[], None] = lambda: None,
) -> Stability:
    """What `leading_eigenvalues` finds, for prompts that have been run already, all at once. `on_product` is called
    after each product."""
    start_state = near.state
    mask = batch.mask.to(start_state.device)
    following = near.apply(start_state)
    moves = (relative_step(start_state, following) > settings.settled).logical_and(mask).any(-1)
    state, searched = start_state, torch.zeros_like(moves)
    if settings.search and bool(moves.any()):
        there, found = find_fixed_point(
            near.apply, start_state, mask, settled=settings.settled, evaluations=settings.search
        )
        searched = moves & found
        state = torch.where(searched[:, None, None], there, start_state)
        following = near.apply(state)
    products = min(settings.products, state.shape[-1])
    shape = (*mask.shape, products)
    # Of padding both parts are NaN, not the real one alone.
    values = torch.full(shape, complex(math.nan, math.nan), dtype=torch.complex128)
    residuals, errors = (torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(2))
    normality: dict[str, Tensor] = {}
    start, spare = _first_vectors(near.last_step, batch.input_ids, mask, settings)
    derivatives: set[Derivative] = set()
    for block in near.linearised(state, mask):
        coefficients, basis = arnoldi(
            _announced(block.products, on_product), start[block.tokens], spare[block.tokens], products
        )
        ritz = ritz_values(coefficients, block.products.accuracy)
        tokens = block.tokens.cpu()
        values[tokens], residuals[tokens], errors[tokens] = ritz.values, ritz.residuals, ritz.errors
        for name, found_there in non_normality(coefficients, ritz.values, basis, block.products).items():
            whole = normality.setdefault(name, torch.full(mask.shape, torch.nan, dtype=torch.float64))
            whole[tokens] = found_there
        derivatives.add(block.derivative)
    return Stability(
        eigenvalues=values.numpy(),
        residuals=residuals.numpy(),
        errors=errors.numpy(),
        **{name: whole.numpy() for name, whole in normality.items()},
        relative_step=_numbers(relative_step(state, following), mask),
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


def _announced(products: Products, on_product: Callable[[], None]) -> Callable[[TokenVectors], TokenVectors]:
    def product(vectors: TokenVectors) -> TokenVectors:
        image = products(vectors)
        on_product()
        return image

    return product


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
