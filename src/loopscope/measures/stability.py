"""Local stability: for each token, how its loop state moves from recurrence to recurrence, and the eigenvalues of the
recurrence where it stands after twice the horizon."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from loopscope.dynamics.eigenvalues.hooked import linearise_hooked
from loopscope.dynamics.eigenvalues.leading import SEARCH_STEPS, eigenvalues_near, taken_tokens
from loopscope.dynamics.eigenvalues.native import NativeRecurrence, recorded_bytes
from loopscope.dynamics.eigenvalues.recurrence import LastStep
from loopscope.dynamics.eigenvalues.result import EigenvalueSettings, Stability
from loopscope.dynamics.eigenvalues.search import LEAST_WINDOW, WINDOWS
from loopscope.dynamics.observed_rate import RateReason, observed_rate
from loopscope.dynamics.prediction import PREDICTED_KINDS, PredictedKind, StabilityCriterion, damping_needed
from loopscope.measures.base import BatchInfo, Measure, Needs, Plan, RunEnd, Variable, variable
from loopscope.measures.memory import Memory
from loopscope.models.hooks.hooked import HookedSubject
from loopscope.models.interventions.kinds import Intervention, ReplaceToken
from loopscope.models.native.subject import NativeRun, NativeSubject
from loopscope.models.visits import LoopState

KEPT_PAIRS = 16
"""Eigenvalues of a token that a study keeps, of the 40 that are computed. Those that lead under some damping are five
or fewer in the demo models and in random ones, and the rest are the largest."""

RATE_REASONS = tuple(RateReason)
"""In the order in which a study numbers them."""

_PAIR, _TOKEN = "pair prompt token", "prompt token"
_EIGENVALUES: dict[str, tuple[str, ...]] = {
    "eigenvalue_real": (
        _PAIR,
        "real parts of the leading eigenvalues of one recurrence, as a map of the token's own loop state at the point",
    ),
    "eigenvalue_imag": (_PAIR, "imaginary parts of the leading eigenvalues"),
    "eigenvalue_residual": (_PAIR, "|J x - λ x| for the Ritz vector x of length one"),
    "eigenvalue_error": (_PAIR, "estimated distance to an eigenvalue"),
    "eigenvalue_products": (
        _TOKEN,
        "products with the Jacobian from which the eigenvalues were found; NaN for a token whose eigenvalues "
        "were not to be taken",
    ),
    "eigenvalue_exact": ("prompt", "1 if products use automatic differentiation, 0 if they use differences", "code"),
    "point_step": (_TOKEN, "|F(x) - x| / |x| at the point: 0 at a fixed point"),
    "point_moved": (_TOKEN, "distance between the point and where the run stood, over the norm"),
    "point_searched": ("prompt", "1 if a search found the point, 0 if the run stood there", "code"),
    "predicted_rate": (
        _TOKEN,
        "largest eigenvalue modulus of the token and those before it; NaN if the eigenvalues of one of these "
        "were not to be taken",
        "per recurrence",
    ),
    "predicted_rate_error": (_TOKEN, "estimated error of predicted_rate", "per recurrence"),
    "predicted_kind": (
        _TOKEN,
        "what the eigenvalue of predicted_rate predicts, as a position in the manifest's stability.kinds; -1 "
        "beyond the prompt's end, and for a token whose eigenvalues were not to be taken",
        "code",
    ),
    "predicted_period": (_TOKEN, "recurrences for one turn of that eigenvalue; NaN for a positive one", "recurrences"),
    "stability_margin": (_TOKEN, "1 - predicted_rate; negative where stability is lost"),
    "damping_needed": (
        _TOKEN,
        "largest step η that brings the moduli of the damped eigenvalues of the token and those before it to at "
        "most 1; NaN if none does, and where there is no fixed point",
    ),
    "singular_value": (
        _TOKEN,
        "largest singular value of the derivative with respect to the token's own state, estimated from below: the "
        "most by which one recurrence enlarges a disturbance",
    ),
    "krylov_singular_value": (_TOKEN, "singular_value on the space in which the eigenvalues were found"),
    "krylov_departure": (
        _TOKEN,
        "Henrici's number in that space: 0 for a normal matrix, near 1 where eigenvalues say little about its size",
    ),
    "noise_gain": (
        _TOKEN,
        "root mean square motion about the fixed point that rounding in each recurrence sustains, over one "
        "rounding, in that space; NaN where the spectral radius is 1 or more",
    ),
    "transient_growth": (
        _TOKEN,
        "largest factor, estimated from below, by which a disturbance of the token's own state grows in 1, 2, 4, ... "
        "recurrences, fewer than the products",
    ),
}
NORMALITY_NAMES = ("singular_value", "krylov_singular_value", "krylov_departure", "noise_gain", "transient_growth")
EIGENVALUE_NAMES = tuple(_EIGENVALUES)
_RATES: dict[str, tuple[str, ...]] = {
    "observed_rate": (
        _TOKEN,
        "factor from one step length of the loop state to the next, fitted on the way to 2H",
        "per recurrence",
    ),
    "observed_rate_uncertainty": (
        _TOKEN,
        "four times the difference between the halves of the fit, or the contribution of a factor of t² if that "
        "is more",
        "per recurrence",
    ),
    "observed_rate_reason": (
        _TOKEN,
        "why there is a rate or none, as a position in the manifest's stability.reasons",
        "code",
    ),
    "remaining_path": (
        _TOKEN,
        "summed length of the loop state's steps from the last measured recurrence to H, never less than the "
        "distance; nothing if the last measured recurrence lies beyond H",
        "residual stream",
    ),
}
RATE_NAMES = tuple(_RATES)
"""What a study has without eigenvalues too."""
_FLAGS = {
    "predicted_kind": tuple(str(kind) for kind in PREDICTED_KINDS),
    "observed_rate_reason": tuple(str(reason) for reason in RATE_REASONS),
    "eigenvalue_exact": ("differences", "automatic differentiation"),
    "point_searched": ("the run stood there", "a search found it"),
}

_ETAS = np.linspace(1 / 64, 1, 64)
"""Dampings under which an eigenvalue may lead. Between two of them no other corner of the hull gains more than 1e-3."""

_BLOCK_BYTES = 2**28
"""Of basis vectors and recorded derivatives at a time, so that eigenvalues take little more memory than the passes do.
"""


def study_eigenvalues(horizon: int, products: int, every: int, search: int, seed: int) -> EigenvalueSettings:
    """How a study takes eigenvalues: after twice the horizon, as far as it runs."""
    return EigenvalueSettings(
        recurrences=2 * horizon,
        products=products,
        every=every,
        search=search,
        seed=seed,
        block_bytes=_BLOCK_BYTES,
    )


def replaced_at(interventions: tuple[Intervention, ...], recurrence: int) -> ReplaceToken | None:
    """The intervention that makes this recurrence unlike all others, so that it has no eigenvalues that matter."""
    return next(
        (each for each in interventions if isinstance(each, ReplaceToken) and each.recurrence == recurrence), None
    )


def study_criterion(horizon: int) -> StabilityCriterion:
    """What an eigenvalue means for states that were judged by that horizon."""
    return StabilityCriterion(horizon=horizon)


class TokenStability(Measure):
    """Follows the loop state to twice the horizon, where it takes the eigenvalues. Without them, a study has the
    observed rates alone."""

    part = "stability"
    variables: ClassVar[dict[str, Variable]] = {
        name: variable(*about, flags=_FLAGS.get(name, ())) for name, about in (_EIGENVALUES | _RATES).items()
    }
    needs = Needs(loop=True, long_run=True)

    def __init__(self, batch: BatchInfo) -> None:
        super().__init__(batch)
        self._horizon, self._settings = batch.plan.horizon, batch.plan.eigenvalues
        self._dtype = getattr(torch, batch.info.dtype)
        self._last_step: LastStep | None = None
        # Of the steps and of the states that they lead to. In one piece: hundreds of small ones among what passes would
        # keep the memory around them from going back to the system.
        wide = torch.promote_types(self._dtype, torch.float32)
        self._lengths, self._sizes = (batch.unknown(2 * self._horizon, *batch.mask.shape, dtype=wide) for _ in range(2))
        self._steps = 0
        self._found: Stability | None = None

    @classmethod
    def lacks(cls, name: str, plan: Plan) -> str:
        return plan.no_eigenvalues if name in _EIGENVALUES else super().lacks(name, plan)

    @classmethod
    def memory(cls, batch: BatchInfo) -> Memory:
        (_, wide), tokens, settings = batch.bytes, int(batch.counts.sum()), batch.plan.eigenvalues
        lengths = 2 * 2 * batch.plan.horizon * batch.mask.numel() * max(4, batch.itemsize)
        ended = 0
        if settings is not None:
            # Of the search, the last ten states and steps of the tokens that it moves, with their combination.
            searched, products = 30 * wide, 0
            if isinstance(batch.subject, NativeSubject):
                sizes = batch.sizes
                searched = int(searched * min(1, max(1 / WINDOWS, LEAST_WINDOW / batch.tokens)))
                searched += 2 * sizes.recurrent * sizes.key_width * tokens * max(4, batch.itemsize)
                taken, one = _taken(batch, settings), _recorded(batch, settings)
                products = -(-taken // settings.blocks(taken, one)) * one
            ended = 8 * wide + max(searched * bool(settings.search), products)
        return Memory(kept=2 * wide + lengths, ended=ended, result=4 * lengths)

    @classmethod
    def steps(cls, batch: BatchInfo) -> int:
        """A search, and products of a native model, once for each block of tokens."""
        settings = batch.plan.eigenvalues
        if settings is None or not isinstance(batch.subject, NativeSubject):
            return 0
        blocks = settings.blocks(_taken(batch, settings), _recorded(batch, settings))
        return SEARCH_STEPS + blocks * min(settings.products, batch.info.width)

    def start(self, initial_state: Tensor | None) -> None:
        if initial_state is not None:
            self._last_step = LastStep(initial_state, self._dtype)

    def loop_state(self, loop_state: LoopState) -> None:
        if loop_state.recurrence > self.batch.end:
            return
        if self._last_step is None:
            self._last_step = LastStep(loop_state.state, self._dtype)
            return
        self._lengths[self._steps], self._sizes[self._steps] = self._last_step.follow(loop_state.state)
        self._steps += 1

    def ended(self, end: RunEnd) -> None:
        settings, subject = self._settings, self.batch.subject
        if settings is None:
            return
        settings = replace(settings, recurrences=self.batch.end)
        if isinstance(subject, HookedSubject):
            hooked = linearise_hooked(subject, self.batch.batch, recurrences=settings.recurrences, seed=settings.seed)
            self._found = eigenvalues_near(hooked, self.batch.batch, settings)
            return
        assert isinstance(subject, NativeSubject)
        assert isinstance(end.run, NativeRun)
        assert self._last_step is not None
        near = NativeRecurrence(
            end.run,
            self.batch.mask,
            settings.recurrences,
            last_step=self._last_step.steps,
            at_once=settings.at_once(_recorded(self.batch, settings)),
        )
        self._found = eigenvalues_near(near, self.batch.batch, settings, end.tick)

    def result(self) -> xr.Dataset:
        found = self._observed()
        if self._found is not None:
            found |= _of_eigenvalues(self._found, study_criterion(self._horizon))
        return self.dataset(found)

    def _observed(self) -> dict[str, np.ndarray]:
        mask = self.batch.mask.cpu().numpy()
        lengths, sizes = (
            each[: self._steps, self.batch.mask].T.double().cpu().numpy() for each in (self._lengths, self._sizes)
        )
        rates = observed_rate(lengths, sizes=sizes, dtype=self.batch.info.dtype)
        rate, uncertainty = np.full((2, *mask.shape), np.nan)
        rate[mask], uncertainty[mask] = rates.rate, rates.uncertainty
        reason = np.full(mask.shape, -1, dtype=np.int8)
        reason[mask] = [RATE_REASONS.index(RateReason(each)) for each in rates.reason.tolist()]
        path = np.full(mask.shape, np.nan)
        if self.batch.recurrences <= self._horizon:
            # Counted from the end backwards: where the initial state is not known, there is no step into the first.
            end = self.batch.end
            to_horizon = lengths[:, self.batch.recurrences - end : self._horizon - end]
            path[mask] = to_horizon.sum(-1)
        return dict(zip(RATE_NAMES, (rate, uncertainty, reason, path), strict=True))


def _of_eigenvalues(found: Stability, criterion: StabilityCriterion) -> dict[str, np.ndarray]:
    prediction = found.predict(criterion)
    kinds = np.full(found.mask.shape, -1, dtype=np.int8)
    taken = found.mask & (~np.isnan(found.products_made) | np.isnan(found.relative_step))
    for place, kind in enumerate(PREDICTED_KINDS):
        kinds[taken & (prediction.kind == kind)] = place
    kept = kept_pairs(found.eigenvalues)

    def of_pairs(values: np.ndarray) -> np.ndarray:
        return np.moveaxis(np.take_along_axis(values, kept, -1), -1, 0).copy()

    needed: np.ndarray = np.minimum.accumulate(damping_needed(found.eigenvalues), axis=1)
    unknown = (prediction.kind == PredictedKind.FAR) | np.isnan(prediction.rate)
    eigenvalues = of_pairs(found.eigenvalues)
    return {
        "eigenvalue_real": eigenvalues.real.copy(),
        "eigenvalue_imag": eigenvalues.imag.copy(),
        "eigenvalue_residual": of_pairs(found.residuals).astype(np.float32),
        "eigenvalue_error": of_pairs(found.errors).astype(np.float32),
        "eigenvalue_products": found.products_made,
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
        "damping_needed": np.where(unknown, np.nan, needed),
        **{name: getattr(found, name) for name in NORMALITY_NAMES},
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


def _taken(batch: BatchInfo, settings: EigenvalueSettings) -> int:
    """Tokens whose eigenvalues are found."""
    return int(taken_tokens(batch.mask, settings.every).sum())


def _recorded(batch: BatchInfo, settings: EigenvalueSettings) -> int:
    """Bytes that a token takes while its eigenvalues are found."""
    itemsize = batch.itemsize
    return recorded_bytes(batch.sizes, batch.tokens, settings.products, itemsize)
