"""`loopscope.leading_eigenvalues`: a model and prompts in, the eigenvalues of its recurrence out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loopscope._util.shapes import States
from loopscope.dynamics.eigenvalues.hooked import linearise_hooked
from loopscope.dynamics.eigenvalues.leading import eigenvalues_near
from loopscope.dynamics.eigenvalues.native import linearise_native, recorded_bytes
from loopscope.dynamics.eigenvalues.recurrence import LinearisedRecurrence
from loopscope.dynamics.eigenvalues.result import EigenvalueSettings, Stability
from loopscope.errors import ConfigError
from loopscope.models.hooks.hooked import HookedSubject
from loopscope.models.inspection.facts import Sizes
from loopscope.models.interventions.kinds import Intervention
from loopscope.models.interventions.parsing import check_recurrences, parse_interventions
from loopscope.models.loading import subject_of
from loopscope.models.native.subject import NativeSubject
from loopscope.models.native.subject import intervene as intervened
from loopscope.models.subject import Batch, InputIds, Subject, batch_for, check_state


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

    - `model`, `input_ids`, `attention_mask`, `intervene`: as for `loopscope.capture`. F is the recurrence after
      that many as the settings say, under the interventions that act there: with `damp=0.5` it is the damped one.
    - `state`: x, (batch, token, width), instead of the state after that many recurrences. For a hooked model, what the
      first recurrent layer receives.
    - `settings`, `changes`: `EigenvalueSettings`, and fields of it to change, e.g. `recurrences=64, products=20`.

    Where the state still moves, a fixed point is searched from there, which may be one that repels. The result says how
    far the point moves in a recurrence, and each eigenvalue has its residual. Prompts whose state overflows get NaN.

    Cost: the recurrences, and about one of them for each product. A hooked model needs as many copies of a prompt as it
    has tokens. Raises `ConfigError` for a model without a loop or whose recurrence cannot be entered, and for a state
    of another shape; `NonFiniteError` for a state with NaN or infinity.
    """
    settings = dataclasses.replace(settings or EigenvalueSettings(), **changes)
    subject = intervened(subject_of(model), intervene)
    if not subject.info.is_looped:
        raise ConfigError(
            f"{subject.info.name} has no recurrent layers, so that no recurrence has eigenvalues; take a looped model."
        )
    batch = input_ids if isinstance(input_ids, Batch) else batch_for(subject, input_ids, attention_mask)
    check_recurrences(parse_interventions(subject.info.interventions), settings.recurrences + 1)
    if state is not None:
        check_state(state, (*batch.input_ids.shape, subject.info.width), "state")
    return eigenvalues_near(_linearise(subject, batch, settings, state), batch, settings)


def _linearise(
    subject: Subject, batch: Batch, settings: EigenvalueSettings, state: States | None
) -> LinearisedRecurrence:
    if isinstance(subject, NativeSubject):
        sizes, tokens = Sizes.of(subject.model.architecture), batch.input_ids.shape[1]
        bytes_of_one = recorded_bytes(sizes, tokens, settings.products, subject.model.dtype.itemsize)
        return linearise_native(
            subject,
            batch,
            recurrences=settings.recurrences,
            seed=settings.seed,
            state=state,
            at_once=settings.at_once(bytes_of_one),
        )
    if isinstance(subject, HookedSubject):
        return linearise_hooked(subject, batch, recurrences=settings.recurrences, seed=settings.seed, state=state)
    raise ConfigError(
        f"{subject.info.name} is of the type {type(subject).__name__}, of which loopscope knows no derivative; take a "
        "native model, or hook its module."
    )
