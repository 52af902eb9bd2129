"""Local stability: for each token, how its loop state moves from recurrence to recurrence, and the eigenvalues of the
recurrence where it stands after twice the horizon."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from loopscope.dynamics.eigenvalues.hooked import linearise_hooked
from loopscope.dynamics.eigenvalues.leading import eigenvalues_near
from loopscope.dynamics.eigenvalues.native import NativeRecurrence
from loopscope.dynamics.eigenvalues.recurrence import LastStep
from loopscope.dynamics.eigenvalues.result import EigenvalueSettings, Stability
from loopscope.dynamics.observed_rate import RateReason, observed_rate
from loopscope.dynamics.prediction import PREDICTED_KINDS, Kind, StabilityCriterion, damping_needed
from loopscope.measures.base import Arrays, Frame, Named
from loopscope.models.hooks.hooked import HookedSubject
from loopscope.models.interventions.kinds import FreezeInjection, Intervention, ReplaceToken
from loopscope.models.native.subject import NativeRun, NativeSubject
from loopscope.models.subject import Batch, Run, Subject
from loopscope.models.visits import LoopState, Observer

KEPT_PAIRS = 16
"""Eigenvalues of a token that a study keeps, of the 40 that are computed. Those that lead under some damping are five
or fewer in the demo models and in random ones, and the rest are the largest."""

RATE_REASONS = tuple(RateReason)
"""In the order in which a study numbers them."""

EIGENVALUE_NAMES = (
    "eigenvalue_real",
    "eigenvalue_imag",
    "eigenvalue_residual",
    "eigenvalue_error",
    "eigenvalue_exact",
    "point_step",
    "point_moved",
    "point_searched",
    "predicted_rate",
    "predicted_rate_error",
    "predicted_kind",
    "predicted_period",
    "stability_margin",
    "damping_needed",
)
RATE_NAMES = ("observed_rate", "observed_rate_uncertainty", "observed_rate_reason")
"""What a study has without eigenvalues too."""

_DIMS = {1: ("prompt",), 2: ("prompt", "token"), 3: ("pair", "prompt", "token")}

_ETAS = np.linspace(1 / 64, 1, 64)
"""Dampings under which an eigenvalue may lead. Between two of them no other corner of the hull gains more than 1e-3."""

_BASIS_BYTES = 2**28
"""Of basis vectors at a time, so that a study takes little more memory for its eigenvalues than for its passes."""


def study_eigenvalues(horizon: int, products: int, search: int, seed: int) -> EigenvalueSettings:
    """How a study takes eigenvalues: after twice the horizon, as far as it runs."""
    return EigenvalueSettings(
        recurrences=2 * horizon, products=products, search=search, seed=seed, basis_bytes=_BASIS_BYTES
    )


def replaced_at(interventions: tuple[Intervention, ...], recurrence: int) -> ReplaceToken | None:
    """The intervention that makes this recurrence unlike all others, so that it has no eigenvalues that matter."""
    return next(
        (each for each in interventions if isinstance(each, ReplaceToken) and each.recurrence == recurrence), None
    )


def study_criterion(horizon: int) -> StabilityCriterion:
    """What an eigenvalue means for states that were judged by that horizon."""
    return StabilityCriterion(horizon=horizon)


def eigenvalue_products(subject: Subject, batch: Batch, settings: EigenvalueSettings) -> int:
    """How often `TokenStability.take` announces a product: once for each group of prompts, if the model is native."""
    if not isinstance(subject, NativeSubject):
        return 0
    return len(_groups(subject, batch, settings)) * min(settings.products, subject.info.width)


class TokenStability(Observer):
    """Follows the loop state to twice the horizon, where `take` takes the eigenvalues. Without that, a study has the
    observed rates alone."""

    def __init__(
        self, subject: Subject, batch: Batch, frame: Frame, horizon: int, settings: EigenvalueSettings | None
    ) -> None:
        self.frame = frame
        self._subject, self._batch = subject, batch.to(subject.device)
        self._horizon, self._settings = horizon, settings
        self._dtype = getattr(torch, frame.info.dtype)
        self._last_step: LastStep | None = None
        self._lengths: list[Tensor] = []
        self._sizes: list[Tensor] = []
        self._found: Stability | None = None

    def start(self, initial_state: Tensor | None) -> None:
        """The loop state before the first recurrence, if it is known."""
        if initial_state is not None:
            self._last_step = LastStep(initial_state, self._dtype)

    def loop_state(self, loop_state: LoopState) -> None:
        if loop_state.recurrence >= 2 * self._horizon:
            return
        if self._last_step is None:
            self._last_step = LastStep(loop_state.state, self._dtype)
            return
        length, size = self._last_step.follow(loop_state.state)
        self._lengths.append(length)
        self._sizes.append(size)

    def take(self, run: Run, tick: Callable[[], None]) -> None:
        """The eigenvalues where the run stands, which is at twice the horizon. `tick` is called after each product of
        a native model."""
        settings = self._settings
        assert settings is not None
        if isinstance(self._subject, HookedSubject):
            near = linearise_hooked(self._subject, self._batch, recurrences=settings.recurrences, seed=settings.seed)
            self._found = eigenvalues_near(near, self._batch, settings)
            return
        assert isinstance(self._subject, NativeSubject)
        assert isinstance(run, NativeRun)
        self._found = Stability.joined(list(self._parts(self._subject, run, settings, tick)))

    def _parts(
        self, subject: NativeSubject, run: NativeRun, settings: EigenvalueSettings, tick: Callable[[], None]
    ) -> Iterator[Stability]:
        assert self._last_step is not None
        groups = _groups(subject, self._batch, settings)
        for group in groups:
            batch = Batch(self._batch.input_ids[group], self._batch.mask[group])
            standing = run
            if len(groups) > 1:
                # A run of these prompts alone: the derivative keeps all that the layers compute on them.
                standing = subject.start(batch, recurrences=0, seed=settings.seed, initial_state=run.state[group])
            last_step = self._last_step.steps[group]
            near = NativeRecurrence(standing, batch.mask, settings.recurrences, last_step=last_step)
            yield eigenvalues_near(near, batch, settings, tick)

    def finish(self) -> Arrays:
        found = self._observed()
        if self._found is not None:
            found |= _of_eigenvalues(self._found, study_criterion(self._horizon))
        return Arrays({name: Named(_DIMS[values.ndim], values) for name, values in found.items()})

    def _observed(self) -> dict[str, np.ndarray]:
        mask = self.frame.mask.cpu().numpy()
        lengths, sizes = (
            torch.stack(each, dim=-1)[self.frame.mask].double().cpu().numpy() for each in (self._lengths, self._sizes)
        )
        rates = observed_rate(lengths, sizes=sizes, dtype=self.frame.info.dtype)
        rate, uncertainty = np.full((2, *mask.shape), np.nan)
        rate[mask], uncertainty[mask] = rates.rate, rates.uncertainty
        reason = np.full(mask.shape, -1, dtype=np.int8)
        reason[mask] = [RATE_REASONS.index(RateReason(each)) for each in rates.reason.tolist()]
        return dict(zip(RATE_NAMES, (rate, uncertainty, reason), strict=True))


def _of_eigenvalues(found: Stability, criterion: StabilityCriterion) -> dict[str, np.ndarray]:
    prediction = found.predict(criterion)
    kinds = np.full(found.mask.shape, -1, dtype=np.int8)
    for place, kind in enumerate(PREDICTED_KINDS):
        kinds[found.mask & (prediction.kind == kind)] = place
    kept = kept_pairs(found.eigenvalues)

    def of_pairs(values: np.ndarray) -> np.ndarray:
        return np.moveaxis(np.take_along_axis(values, kept, -1), -1, 0).copy()

    needed: np.ndarray = np.minimum.accumulate(damping_needed(found.eigenvalues), axis=1)
    eigenvalues = of_pairs(found.eigenvalues)
    return {
        "eigenvalue_real": eigenvalues.real.copy(),
        "eigenvalue_imag": eigenvalues.imag.copy(),
        "eigenvalue_residual": of_pairs(found.residuals).astype(np.float32),
        "eigenvalue_error": of_pairs(found.errors).astype(np.float32),
        "eigenvalue_exact": np.full(len(kinds), found.derivative == "exact", dtype=np.int8),
        "point_step": found.relative_step,
        "point_moved": found.moved,
        "point_searched": found.searched.astype(np.int8),
        "predicted_rate": prediction.rate,
        "predicted_rate_error": prediction.error,
        "predicted_kind": kinds,
        "predicted_period": prediction.period,
        # Of the token and those before it, like the rate: it settles with the slowest of them.
        "stability_margin": 1 - prediction.rate,
        "damping_needed": np.where(prediction.kind == Kind.FAR, np.nan, needed),
    }


def kept_pairs(eigenvalues: np.ndarray) -> np.ndarray:
    """Places of those that are kept of each token, (prompt, token, pair): those that lead under some damping, then the
    largest, in the order in which they stand."""
    count = min(KEPT_PAIRS, eigenvalues.shape[-1])
    moduli = np.nan_to_num(np.abs(eigenvalues), nan=-np.inf)
    leads = np.zeros(eigenvalues.shape, dtype=bool)
    for eta in _ETAS:
        moved = np.nan_to_num(np.abs(1 - eta + eta * eigenvalues), nan=-np.inf)
        np.put_along_axis(leads, moved.argmax(-1)[..., None], True, axis=-1)
    order = np.lexsort((-moduli, ~leads), axis=-1)
    return np.sort(order[..., :count], axis=-1)


def _groups(subject: NativeSubject, batch: Batch, settings: EigenvalueSettings) -> list[slice]:
    """Prompts that are taken at once. A frozen input is remembered by the run of all of them, which only they have."""
    prompts, tokens = batch.input_ids.shape
    rows = settings.rows_at_once(tokens, subject.info.width)
    if any(isinstance(each, FreezeInjection) for each in subject.interventions):
        rows = prompts
    return [slice(begin, begin + rows) for begin in range(0, prompts, rows)]
