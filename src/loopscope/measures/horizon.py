"""The states at the horizon and at twice the horizon, which stand in for the fixed points; the noise floor there."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import xarray as xr
from torch import Tensor

from loopscope.measures.base import BatchInfo, Measure, Needs, RunEnd, Variable, masked_mean, variable
from loopscope.measures.functions import cosine, degeneracy, distance, layer_cosine, residual_norm, unrelated_degeneracy
from loopscope.measures.memory import Memory
from loopscope.models.inspection.facts import numbers_in_a_layer
from loopscope.models.visits import AttentionView, LoopState, Visit


class NoiseFloor(Measure):
    """`sqrt(2)` times the relative rounding error of one recurrence, per layer and prompt, where the run stands.

    Two consecutive states of a settled trajectory carry rounding errors of size sigma, so they differ by about
    sqrt(2) sigma even though nothing moves. It is an estimate. Errors that the loop carries on add to it:
    independent ones at a leading eigenvalue lambda make the step `sigma sqrt(2 / (1 + lambda))`, more for negative
    or non-normal ones. And rounding is deterministic, so that a state can also come to rest below it.
    """

    part = "noise-floor"
    variables: ClassVar[dict[str, Variable]] = {
        "noise_floor": variable("layer prompt", "relative step that rounding alone makes (see method)")
    }
    needs = Needs(loop=True, long_run=True)

    @classmethod
    def memory(cls, batch: BatchInfo) -> Memory:
        # Of one layer the weights and what it computes, in float64.
        sizes = batch.sizes
        return Memory(ended=8 * (sizes.layer_parameters + batch.mask.numel() * numbers_in_a_layer(sizes)))

    def ended(self, end: RunEnd) -> None:
        error = end.run.rounding_error()
        if error is None:
            floor = torch.full((self.batch.info.recurrent, self.batch.prompts), torch.nan)
        else:
            floor = math.sqrt(2) * masked_mean(error.square(), self.batch.mask).sqrt()
        self._floor = floor.double().cpu().numpy()

    def result(self) -> xr.Dataset:
        return self.dataset({"noise_floor": self._floor})


class Horizons(Measure):
    """Keeps `X[i]` and the loop state after H and after 2H recurrences, the steps into them, and the attention at H;
    nothing else.

    It also notes when a prompt's state stops being finite.
    """

    variables: ClassVar[dict[str, Variable]] = {
        "horizon_drift": variable("layer prompt", "mean over tokens of ||X[2H] - X[H]|| / ||X[2H]||"),
        "horizon_drift_cosine": variable("layer prompt", "cosine of the states at H and 2H"),
        "horizon_norm_growth": variable("layer prompt", "||X[2H]|| / ||X[H]||"),
        "horizon_relative_step": variable("horizon layer prompt", "relative step into the state at H and at 2H"),
        "horizon_residual_norm": variable("horizon layer prompt", "mean token norm at H and at 2H", "residual stream"),
        "token_horizon_drift": variable("site prompt token", "horizon_drift of one token"),
        "layer_cosine": variable("layer layer_other prompt", "cosine of X*[i] and X*[j]"),
        "degeneracy": variable(
            "prompt",
            "mean over tokens of min over i > 0 of cos(X*[0], X*[i]); near 1 if all layers share one point",
        ),
        "unrelated_degeneracy": variable(
            "prompt",
            "degeneracy with X*[i] of the token half a prompt away: the value for unrelated states of this "
            "model; NaN for a prompt of one token",
        ),
    }
    needs = Needs(loop=True, long_run=True)

    def __init__(self, batch: BatchInfo) -> None:
        super().__init__(batch)
        layers = batch.info.recurrent
        self._states: list[list[Tensor | None]] = [[None] * (layers + 1) for _ in self.horizons]
        self._steps: list[list[Tensor | None]] = [[None] * layers for _ in self.horizons]
        self._attention: list[AttentionView | None] = [None] * layers
        self._norms: dict[tuple[int, int], Tensor] = {}
        self._previous: list[Tensor | None] = [None] * layers
        self.diverged_at = torch.full((batch.prompts,), -1, dtype=torch.int64, device=batch.mask.device)

    @classmethod
    def memory(cls, batch: BatchInfo) -> Memory:
        (states, wide), layers = batch.bytes, batch.info.recurrent
        attention = layers * batch.attention_bytes if batch.info.heads else 0
        # The states before those of the second horizon go one by one as these come.
        one = layers * (2 * states + 3 * wide) // batch.prompts
        return Memory(kept=(2 * layers + 2) * states + attention, until_ended=states, result=one)

    @property
    def horizons(self) -> tuple[int, int]:
        """The second is where the run ends, if that is earlier."""
        return self.batch.plan.horizon, self.batch.end

    def visit(self, visit: Visit) -> None:
        if visit.stage != "recurrent":
            return
        if visit.recurrence + 1 in self.horizons:
            self._previous[visit.layer] = visit.residual
        elif visit.recurrence in self.horizons:
            place = self.horizons.index(visit.recurrence)
            previous = self._previous[visit.layer]
            assert previous is not None  # the recurrence before was announced
            norm = residual_norm(visit.residual)
            self._states[place][visit.layer] = visit.residual
            self._steps[place][visit.layer] = distance(visit.residual, previous) / norm
            if place == 0:
                view = visit.attention
                if view is not None and not self.batch.plan.support_every:
                    view = view.without_values()  # which one measure reads, that has to be asked for
                self._attention[visit.layer] = view
            self._previous[visit.layer] = None

    def loop_state(self, loop_state: LoopState) -> None:
        if loop_state.recurrence in self.horizons:
            self._states[self.horizons.index(loop_state.recurrence)][-1] = loop_state.state
        total = torch.where(self.batch.mask, residual_norm(loop_state.state), 0.0).sum(-1)
        newly = ~torch.isfinite(total) & (self.diverged_at < 0)
        self.diverged_at = torch.where(newly, loop_state.recurrence, self.diverged_at)

    def layer(self, place: int, layer: int) -> Tensor:
        """`X*[layer]` at the first (0) or second (1) horizon, (batch, token, width); `layer` = k is the loop state."""
        state = self._states[place][layer]
        if state is None:
            raise RuntimeError(f"The run did not reach {self.horizons[place]} recurrences.")
        return state

    def attention(self, layer: int) -> AttentionView | None:
        """The attention of a layer at the first horizon; None where it cannot be seen."""
        return self._attention[layer]

    def norm(self, place: int, layer: int) -> Tensor:
        """Norms of `layer(place, layer)`, (batch, token), in float64."""
        key = (place, layer)
        if key not in self._norms:
            self._norms[key] = residual_norm(self.layer(place, layer).double())
        return self._norms[key]

    def result(self) -> xr.Dataset:
        # Prompt by prompt, as the states of all layers side by side would be the most that an analysis takes.
        found = [self._of_prompt(slice(row, row + 1)) for row in range(self.batch.prompts)]
        places = {name: self.variables[name].dims.index("prompt") for name in found[0]}
        return self.dataset({name: torch.cat([each[name] for each in found], at) for name, at in places.items()})

    def _of_prompt(self, row: slice) -> dict[str, Tensor]:
        layers = range(self.batch.info.recurrent)
        mask = self.batch.mask[row]
        first, second = (torch.stack([self.layer(place, layer)[row] for layer in layers]) for place in (0, 1))
        norms = [residual_norm(first), residual_norm(second)]
        drift = distance(second, first) / norms[1]
        steps = [torch.stack([step[row] for step in steps if step is not None]) for steps in self._steps]
        loop, before = (self.layer(place, len(layers))[row] for place in (1, 0))
        loop_drift = distance(loop, before) / residual_norm(loop)
        return {
            "horizon_drift": masked_mean(drift, mask),
            "horizon_drift_cosine": masked_mean(cosine(second, first), mask),
            "horizon_norm_growth": masked_mean(norms[1] / norms[0], mask),
            "horizon_relative_step": torch.stack([masked_mean(step, mask) for step in steps]),
            "horizon_residual_norm": torch.stack([masked_mean(norm, mask) for norm in norms]),
            "token_horizon_drift": torch.stack([drift[-1], loop_drift]).masked_fill(~mask, torch.nan),
            "layer_cosine": masked_mean(layer_cosine(first), mask),
            "degeneracy": masked_mean(degeneracy(first), mask),
            "unrelated_degeneracy": masked_mean(unrelated_degeneracy(first, self.batch.counts[row]), mask),
        }
