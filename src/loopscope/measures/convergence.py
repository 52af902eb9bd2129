"""Convergence: steps, distances to the horizons, directions and norms, per layer, recurrence and token."""

from __future__ import annotations

from typing import ClassVar

import torch
import xarray as xr
from torch import Tensor

from loopscope.measures.base import BatchInfo, Measure, Needs, Variable, masked_mean, variable
from loopscope.measures.functions import acceleration, distances, quantiles, residual_norm
from loopscope.measures.memory import Memory
from loopscope.models.visits import LoopState, Visit

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Quantiles over a prompt's tokens."""

_RAW = "residual stream"
_MEANINGS = {
    "successive_difference": ("mean over tokens of ||X[i,t] - X[i,t-1]||", _RAW),
    "relative_step": ("mean over tokens of ||X[i,t] - X[i,t-1]|| / ||X[i,t]||", "1"),
    "cosine_distance_to_previous": ("1 - cosine of X[i,t] and X[i,t-1]", "1"),
    "distance_to_horizon": ("||x - x*||", _RAW),
    "relative_distance": ("||x - x*|| / ||x*||", "1"),
    "cosine_distance_to_horizon": ("1 - cosine of x and x*", "1"),
    "distance_to_second_horizon": ("||x - x**||, with the state x** at 2H", _RAW),
    "relative_distance_second_horizon": ("||x - x**|| / ||x**||", "1"),
    "cosine_distance_to_second_horizon": ("1 - cosine of x and x**", "1"),
    "residual_norm": ("mean token norm", _RAW),
}
NAMES = tuple(_MEANINGS)
_DIMS = "layer recurrence prompt"

TOKEN_NAMES = (
    "successive_difference",
    "relative_step",
    "cosine_distance_to_previous",
    "distance_to_horizon",
    "relative_distance",
    "cosine_distance_to_horizon",
    "relative_distance_second_horizon",
    "residual_norm",
)
"""Also kept token by token, for the last recurrent layer and the loop state."""


class Convergence(Measure):
    """Compares each state with the one before it at the same site, and with that site's states at the horizons, in
    float64."""

    variables: ClassVar[dict[str, Variable]] = {
        **{name: variable(_DIMS, *about) for name, about in _MEANINGS.items()},
        **{
            f"{name}_quantile": variable(f"quantile {_DIMS}", f"quantiles of {name} over the prompt's tokens", units)
            for name, (_, units) in _MEANINGS.items()
        },
        **{
            f"token_{name}": variable(
                "site recurrence prompt token",
                f"{name} of each token, for the last recurrent layer and the loop state",
                _MEANINGS[name][1],
            )
            for name in TOKEN_NAMES
        },
        "token_acceleration": variable(
            "recurrence prompt token",
            "of the loop state s: ||(s_t - s_{t-1}) - (s_{t-1} - s_{t-2})|| / ||s_t||; nothing at recurrence 1",
        ),
        "norm_growth": variable(_DIMS, "residual_norm over its value at recurrence 1"),
    }
    needs = Needs(loop=True, horizon=True)

    def __init__(self, batch: BatchInfo) -> None:
        super().__init__(batch)
        assert batch.horizon is not None
        self.horizon = batch.horizon
        self._layers = batch.info.recurrent
        # State and norm of the recurrence before, per site; the last site is the loop state.
        self._previous: list[tuple[Tensor, Tensor] | None] = [None] * (self._layers + 1)
        self._last: tuple[Tensor, Tensor]
        self._loop_states: list[Tensor | None] = [None, None]
        """The two before, the later one last."""
        shape = (self._layers, batch.recurrences, batch.prompts)
        self._means = batch.unknown(len(NAMES), *shape, dtype=torch.float64)
        self._quantiles = batch.unknown(len(NAMES), len(LEVELS), *shape)
        self._tokens = batch.unknown(len(TOKEN_NAMES), 2, batch.recurrences, batch.prompts, batch.tokens)
        self._acceleration = batch.unknown(batch.recurrences, batch.prompts, batch.tokens)
        # On the device once: lists would be copied there, and waited for, at every visit.
        self._levels = torch.tensor(LEVELS, dtype=torch.float64, device=batch.mask.device)
        self._kept = torch.tensor([NAMES.index(name) for name in TOKEN_NAMES], device=batch.mask.device)

    @classmethod
    def memory(cls, batch: BatchInfo) -> Memory:
        states, wide = batch.bytes
        return Memory(kept=(batch.info.recurrent + 2) * states, visit=8 * wide)

    def start(self, initial_state: Tensor | None) -> None:
        """The first step of the loop state starts there; where it is not known that step is NaN."""
        if initial_state is None:
            return
        self._previous[self._layers] = (initial_state, residual_norm(initial_state.double()))
        self._loop_states[1] = initial_state

    def visit(self, visit: Visit) -> None:
        if visit.stage != "recurrent":
            return
        values = self._compare(visit.layer, visit.residual)
        place = (visit.layer, visit.recurrence - 1)
        self._means[:, *place] = masked_mean(values, self.batch.mask)
        self._quantiles[:, :, *place] = quantiles(values, self.batch.counts, self._levels).transpose(0, 1)
        if visit.layer == self._layers - 1:
            self._keep_tokens(0, visit.recurrence, values)
            self._last = (visit.residual, values)

    def loop_state(self, loop_state: LoopState) -> None:
        output, values = self._last
        # Most loops carry the last layer's output as it is. Only the first step differs then: it starts at s_0.
        if loop_state.state is not output or loop_state.recurrence == 1:
            values = self._compare(self._layers, loop_state.state)
        self._keep_tokens(1, loop_state.recurrence, values)
        earlier, before = self._loop_states
        if earlier is not None and before is not None:
            found = acceleration(loop_state.state, before, earlier)
            self._acceleration[loop_state.recurrence - 1] = found.masked_fill(~self.batch.mask, torch.nan)
        self._loop_states = [before, loop_state.state]

    def _compare(self, site: int, state: Tensor) -> Tensor:
        """All of `NAMES` for one state, (name, batch, token)."""
        wide = state.double()
        norm = residual_norm(wide)
        previous = self._previous[site]
        self._previous[site] = (state, norm)
        values = [torch.full_like(norm, torch.nan)] * 3
        if previous is not None:
            step, turned = distances(wide, norm, *previous)
            values = [step, step / norm, turned]
        for place in (0, 1):
            reference_norm = self.horizon.norm(place, site)
            away, turned = distances(wide, norm, self.horizon.layer(place, site), reference_norm)
            values += [away, away / reference_norm, turned]
        return torch.stack([*values, norm])

    def _keep_tokens(self, site: int, recurrence: int, values: Tensor) -> None:
        kept = values.index_select(0, self._kept)
        self._tokens[:, site, recurrence - 1] = kept.masked_fill(~self.batch.mask, torch.nan)

    def result(self) -> xr.Dataset:
        norm = self._means[NAMES.index("residual_norm")]
        return self.dataset(
            {
                **dict(zip(NAMES, self._means, strict=True)),
                **{f"{name}_quantile": self._quantiles[index] for index, name in enumerate(NAMES)},
                **{f"token_{name}": self._tokens[index] for index, name in enumerate(TOKEN_NAMES)},
                "token_acceleration": self._acceleration,
                "norm_growth": norm / norm[:, :1],  # not finite from a state of zeros or infinity
            }
        )
