"""Convergence: steps, distances to the horizons, cosines and norms, per layer, recurrence and token."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from loopscope.measures.base import Arrays, Frame, Measure, Named, masked_mean
from loopscope.measures.functions import cosine_of_norms, distance, quantiles, residual_norm
from loopscope.measures.horizon import HorizonStates
from loopscope.models.visits import LoopState, Visit

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Quantiles over a prompt's tokens."""

NAMES = (
    "successive_difference",
    "relative_step",
    "cosine_to_previous",
    "distance_to_horizon",
    "relative_distance",
    "cosine_to_horizon",
    "distance_to_second_horizon",
    "relative_distance_second_horizon",
    "cosine_to_second_horizon",
    "residual_norm",
)

TOKEN_NAMES = (
    "successive_difference",
    "relative_step",
    "cosine_to_previous",
    "distance_to_horizon",
    "relative_distance",
    "cosine_to_horizon",
    "relative_distance_second_horizon",
    "residual_norm",
)
"""Also kept token by token, for the last recurrent layer and the loop state."""

_KEPT = [NAMES.index(name) for name in TOKEN_NAMES]


class Convergence(Measure):
    """Compares each state with the one before it at the same site, and with that site's states at the horizons."""

    def __init__(self, frame: Frame, horizon: HorizonStates) -> None:
        self.frame = frame
        self.horizon = horizon
        self._layers = frame.info.recurrent
        # State and norm of the recurrence before, per site; the last site is the loop state.
        self._previous: list[tuple[Tensor, Tensor] | None] = [None] * (self._layers + 1)
        self._last: tuple[Tensor, Tensor]
        shape = (self._layers, frame.recurrences, frame.prompts)
        self._means = np.full((len(NAMES), *shape), np.nan, dtype=np.float64)
        self._quantiles = np.full((len(NAMES), len(LEVELS), *shape), np.nan, dtype=np.float32)
        self._tokens = np.full(
            (len(TOKEN_NAMES), 2, frame.recurrences, frame.prompts, frame.tokens), np.nan, dtype=np.float32
        )

    def start(self, initial_state: Tensor | None) -> None:
        """The loop state before the first recurrence; the first step of the loop state starts there.

        Where it is not known (None) that step is NaN.
        """
        if initial_state is None:
            return
        self._previous[self._layers] = (initial_state, residual_norm(initial_state))

    def visit(self, visit: Visit) -> None:
        if visit.stage != "recurrent":
            return
        values = self._compare(visit.layer, visit.residual)
        place = (visit.layer, visit.recurrence)
        self._means[:, *place] = masked_mean(values, self.frame.mask).double().cpu().numpy()
        found = quantiles(values, self.frame.counts, LEVELS).transpose(0, 1)
        self._quantiles[:, :, *place] = found.float().cpu().numpy()
        if visit.layer == self._layers - 1:
            self._keep_tokens(0, visit.recurrence, values)
            self._last = (visit.residual, values)

    def loop_state(self, loop_state: LoopState) -> None:
        output, values = self._last
        # Most loops carry the last layer's output as it is. Only the first step differs then: it starts at s_0.
        if loop_state.state is not output or loop_state.recurrence == 0:
            values = self._compare(self._layers, loop_state.state)
        self._keep_tokens(1, loop_state.recurrence, values)

    def _compare(self, site: int, state: Tensor) -> Tensor:
        """All of `NAMES` for one state, (name, batch, token)."""
        norm = residual_norm(state)
        previous = self._previous[site]
        self._previous[site] = (state, norm)
        values = [torch.full_like(norm, torch.nan)] * 3
        if previous is not None:
            step = distance(state, previous[0])
            values = [step, step / norm, cosine_of_norms(state, norm, *previous)]
        for place in (0, 1):
            reference = self.horizon.layer(place, site)
            reference_norm = self.horizon.norm(place, site)
            away = distance(state, reference)
            turned = cosine_of_norms(state, norm, reference, reference_norm)
            values += [away, away / reference_norm, turned]
        return torch.stack([*values, norm])

    def _keep_tokens(self, site: int, recurrence: int, values: Tensor) -> None:
        kept = values[_KEPT].masked_fill(~self.frame.mask, torch.nan)
        self._tokens[:, site, recurrence] = kept.float().cpu().numpy()

    def finish(self) -> Arrays:
        arrays = Arrays()
        dims = ("layer", "recurrence", "prompt")
        for index, name in enumerate(NAMES):
            arrays.per_prompt[name] = Named(dims, self._means[index])
            arrays.per_prompt[f"{name}_quantile"] = Named(("quantile", *dims), self._quantiles[index])
        for index, name in enumerate(TOKEN_NAMES):
            arrays.per_prompt[f"token_{name}"] = Named(("site", "recurrence", "prompt", "token"), self._tokens[index])
        norm = arrays.per_prompt["residual_norm"].values
        with np.errstate(invalid="ignore", divide="ignore"):  # no growth is defined from a state of zeros or infinity
            arrays.per_prompt["norm_growth"] = Named(dims, norm / norm[:, :1])
        return arrays
