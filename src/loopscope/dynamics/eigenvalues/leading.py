"""Leading eigenvalues of one recurrence, token by token."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from loopscope._util.shapes import States, TokenIds, TokenMask
from loopscope.dynamics.eigenvalues.hooked import linearise_hooked
from loopscope.dynamics.eigenvalues.krylov import Products, TokenVectors, arnoldi, ritz_values
from loopscope.dynamics.eigenvalues.native import linearise_native
from loopscope.dynamics.eigenvalues.recurrence import Derivative, LinearisedRecurrence
from loopscope.dynamics.eigenvalues.result import EigenvalueSettings, Stability
from loopscope.dynamics.eigenvalues.search import find_fixed_point, relative_step
from loopscope.errors import ConfigError, NonFiniteError
from loopscope.models.hooks.hooked import HookedSubject
from loopscope.models.interventions.kinds import Intervention
from loopscope.models.interventions.parsing import check_recurrences, parse_interventions
from loopscope.models.loading import as_subject, load
from loopscope.models.native.interventions import initial_noise
from loopscope.models.native.subject import NativeSubject
from loopscope.models.native.subject import intervene as intervened
from loopscope.models.subject import Batch, Subject, SubjectInfo
from loopscope.models.trace import InputIds, as_batch


def leading_eigenvalues(
    model: str | Path | nn.Module | Subject,
    input_ids: InputIds | Batch,
    *,
    state: Tensor | None = None,
    attention_mask: Tensor | None = None,
    intervene: str | Sequence[str | Intervention] = (),
    settings: EigenvalueSettings | None = None,
    **changes: Any,
) -> Stability:
    """Eigenvalues of `J_i = d F(x)_i / d x_i` for every token i, with F one recurrence and x its fixed point.

    In a causal model the Jacobian of F over a prompt is block lower triangular, so its eigenvalues are those of its
    diagonal blocks J_i. No J_i is formed: Arnoldi's method needs products with it, and one product serves all tokens.

    **Arguments**

    - `model`, `input_ids`, `attention_mask`, `intervene`: as for `loopscope.capture`. F is the recurrence after so many
      as the settings say, under the interventions that act there: with `damp=0.5` it is the damped one.
    - `state`: x, (batch, token, width), instead of the state after so many recurrences. For a hooked model, what the
      first recurrent layer receives.
    - `settings`, `changes`: `EigenvalueSettings`, and fields of it to change, e.g. `recurrences=64, products=20`.

    Where the state still moves, a fixed point is searched from there, which may be one that repels. The result says how
    far the point moves in a recurrence, and each eigenvalue has its residual. Prompts whose state overflows get NaN.

    Cost: the recurrences, and about 1.5 of them for each product. A hooked model needs as many copies of a prompt as it
    has tokens. Raises `ConfigError` for a model without a loop or whose recurrence cannot be entered, and for a state
    of another shape; `NonFiniteError` for a state with NaN or infinity.
    """
    settings = dataclasses.replace(settings or EigenvalueSettings(), **changes)
    subject = load(model) if isinstance(model, str | Path) else as_subject(model)
    subject = intervened(subject, intervene)
    _check_looped(subject.info)
    batch = input_ids if isinstance(input_ids, Batch) else as_batch(input_ids, attention_mask, subject.info)
    check_recurrences(parse_interventions(subject.info.interventions), settings.recurrences + 1)
    if state is not None:
        _check_state(state, (*batch.input_ids.shape, subject.info.width))
    rows = settings.rows_at_once(batch.input_ids.shape[1], subject.info.width)
    groups = [slice(begin, begin + rows) for begin in range(0, len(batch.input_ids), rows)]
    found = []
    for group in groups:
        prompts = Batch(batch.input_ids[group], batch.mask[group])
        given = None if state is None else state[group]
        found.append(eigenvalues_near(_linearise(subject, prompts, settings, given), prompts, settings))
    return Stability.joined(found)


def eigenvalues_near(
    near: LinearisedRecurrence,
    batch: Batch,
    settings: EigenvalueSettings,
    on_product: Callable[[], None] = lambda: None,
) -> Stability:
    """The same for prompts that have been run already, all at once. `on_product` is called after each product."""
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
    values = torch.full(shape, torch.nan, dtype=torch.complex128)
    residuals, errors = (torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(2))
    start, spare = _first_vectors(near.last_step, batch.input_ids, mask, settings)
    derivatives: set[Derivative] = set()
    for block in near.linearised(state):
        coefficients = arnoldi(
            _announced(block.products, on_product), start[block.tokens], spare[block.tokens], products
        )
        ritz = ritz_values(coefficients, block.products.accuracy)
        tokens = block.tokens.cpu()
        values[tokens], residuals[tokens], errors[tokens] = ritz.values, ritz.residuals, ritz.errors
        derivatives.add(block.derivative)
    return Stability(
        eigenvalues=values.numpy(),
        residuals=residuals.numpy(),
        errors=errors.numpy(),
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


def _linearise(
    subject: Subject, batch: Batch, settings: EigenvalueSettings, state: States | None
) -> LinearisedRecurrence:
    if isinstance(subject, NativeSubject):
        return linearise_native(subject, batch, recurrences=settings.recurrences, seed=settings.seed, state=state)
    if isinstance(subject, HookedSubject):
        return linearise_hooked(subject, batch, recurrences=settings.recurrences, seed=settings.seed, state=state)
    raise ConfigError(
        f"{subject.info.name} is of the type {type(subject).__name__}, of which loopscope knows no derivative; take a "
        "native model, or hook its module."
    )


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


def _check_looped(info: SubjectInfo) -> None:
    if not info.is_looped:
        raise ConfigError(
            f"{info.name} has no recurrent layers, so that no recurrence has eigenvalues; take a looped model."
        )


def _check_state(state: Tensor, shape: tuple[int, ...]) -> None:
    if state.shape != shape:
        raise ConfigError(f"state has shape {tuple(state.shape)}; these tokens and this model need {shape}.")
    if not bool(torch.isfinite(state).all()):
        raise NonFiniteError("state holds NaN or infinity; give a finite state.")
