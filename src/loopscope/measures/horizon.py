"""The states at the horizon and at twice the horizon, which stand in for the fixed points."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from loopscope.measures.base import Arrays, Frame, Measure, Named, masked_mean
from loopscope.measures.functions import cosine, degeneracy, distance, layer_cosine, residual_norm
from loopscope.models.subject import Run
from loopscope.models.visits import AttentionView, LoopState, Visit


def noise_floor(frame: Frame, run: Run) -> Arrays:
    """`sqrt(2)` times the relative rounding error of one recurrence, per layer and prompt, where the run stands.

    Two consecutive states of a settled trajectory carry rounding errors of size sigma, so they differ by about
    sqrt(2) sigma even though nothing moves. It is an estimate. Errors that the loop carries on add to it:
    independent ones at a leading eigenvalue lambda make the step `sigma sqrt(2 / (1 + lambda))`, more for negative
    or non-normal ones. And rounding is deterministic, so that a state can also come to rest below it.
    """
    error = run.rounding_error()
    if error is None:
        floor = torch.full((frame.info.recurrent, frame.prompts), torch.nan)
    else:
        floor = math.sqrt(2) * masked_mean(error.square(), frame.mask).sqrt()
    return Arrays({"noise_floor": Named(("layer", "prompt"), floor.double().cpu().numpy())})


class HorizonStates(Measure):
    """Keeps `X[i]` and the loop state after H and after 2H recurrences, the steps into them, and the attention at H;
    nothing else.

    It also notes when a prompt's state stops being finite.
    """

    def __init__(self, frame: Frame, horizon: int) -> None:
        self.frame = frame
        self.horizons = (horizon, 2 * horizon)
        layers = frame.info.recurrent
        self._states: list[list[Tensor | None]] = [[None] * (layers + 1) for _ in self.horizons]
        self._steps: list[list[Tensor | None]] = [[None] * layers for _ in self.horizons]
        self._attention: list[AttentionView | None] = [None] * layers
        self._norms: dict[tuple[int, int], Tensor] = {}
        self._previous: list[Tensor | None] = [None] * layers
        self.diverged_at = torch.full((frame.prompts,), -1, dtype=torch.int64, device=frame.mask.device)

    def visit(self, visit: Visit) -> None:
        if visit.stage != "recurrent":
            return
        count = visit.recurrence + 1
        if count + 1 in self.horizons:
            self._previous[visit.layer] = visit.residual
        elif count in self.horizons:
            place = self.horizons.index(count)
            previous = self._previous[visit.layer]
            assert previous is not None  # the recurrence before was announced
            norm = residual_norm(visit.residual)
            self._states[place][visit.layer] = visit.residual
            self._steps[place][visit.layer] = distance(visit.residual, previous) / norm
            if place == 0:
                self._attention[visit.layer] = visit.attention
            self._previous[visit.layer] = None

    def loop_state(self, loop_state: LoopState) -> None:
        if loop_state.recurrence + 1 in self.horizons:
            self._states[self.horizons.index(loop_state.recurrence + 1)][-1] = loop_state.state
        total = torch.where(self.frame.mask, residual_norm(loop_state.state), 0.0).sum(-1)
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
        """Norms of `layer(place, layer)`, (batch, token)."""
        key = (place, layer)
        if key not in self._norms:
            self._norms[key] = residual_norm(self.layer(place, layer))
        return self._norms[key]

    def finish(self) -> Arrays:
        layers = range(self.frame.info.recurrent)
        mask = self.frame.mask
        first, second = (torch.stack([self.layer(place, layer) for layer in layers]) for place in (0, 1))
        norms = [residual_norm(first), residual_norm(second)]
        drift = distance(second, first) / norms[1]
        steps = [torch.stack([step for step in steps if step is not None]) for steps in self._steps]
        pairwise = layer_cosine(first)
        loop_drift = distance(self.layer(1, len(layers)), self.layer(0, len(layers)))
        loop_drift = loop_drift / residual_norm(self.layer(1, len(layers)))
        tokens = torch.stack([drift[-1], loop_drift]).masked_fill(~mask, torch.nan)

        def named(dims: str, values: Tensor) -> Named:
            return Named(tuple(dims.split()), values.cpu().numpy())

        return Arrays(
            {
                "horizon_drift": named("layer prompt", masked_mean(drift, mask)),
                "horizon_drift_cosine": named("layer prompt", masked_mean(cosine(second, first), mask)),
                "horizon_norm_growth": named("layer prompt", masked_mean(norms[1] / norms[0], mask)),
                "horizon_relative_step": named(
                    "horizon layer prompt", torch.stack([masked_mean(step, mask) for step in steps])
                ),
                "horizon_residual_norm": named(
                    "horizon layer prompt", torch.stack([masked_mean(norm, mask) for norm in norms])
                ),
                "token_horizon_drift": named("site prompt token", tokens),
                "layer_cosine": named("layer layer_other prompt", masked_mean(pairwise, mask)),
                "degeneracy": named("prompt", masked_mean(degeneracy(first), mask)),
                "diverged_at": Named(("prompt",), self.diverged_at.cpu().numpy().astype(np.int64)),
            }
        )
