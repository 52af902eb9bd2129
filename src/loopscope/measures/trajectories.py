"""Trajectories of chosen tokens through the recurrent block, projected on their principal components."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.measures.base import Arrays, Frame, Measure, Named, masked_mean
from loopscope.measures.functions import cosine_of_norms, distance, residual_norm, widen
from loopscope.models.visits import Observer, Visit


class PathIndependence(Measure):
    """Observes the first run; `second` observes the other one, which is advanced one recurrence behind it."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.second: Observer = _Second(self)
        self._first: list[tuple[Tensor, Tensor] | None] = [None] * frame.info.recurrent
        shape = (2, frame.info.recurrent, frame.recurrences, frame.prompts)
        self._values = np.full(shape, np.nan, dtype=np.float64)

    def visit(self, visit: Visit) -> None:
        if visit.stage == "recurrent":
            self._first[visit.layer] = (visit.residual, residual_norm(visit.residual))

    def compare(self, visit: Visit) -> None:
        """The same visit of the second run."""
        first = self._first[visit.layer]
        assert first is not None  # the first run was advanced before
        norm = residual_norm(visit.residual)
        # Relative to the mean of the two norms, so that neither run is the reference.
        size = (first[1] + norm) / 2
        away = masked_mean(distance(visit.residual, first[0]) / size, self.frame.mask)
        turned = masked_mean(cosine_of_norms(visit.residual, norm, *first), self.frame.mask)
        self._values[0, visit.layer, visit.recurrence] = away.double().cpu().numpy()
        self._values[1, visit.layer, visit.recurrence] = turned.double().cpu().numpy()

    def finish(self) -> Arrays:
        dims = ("layer", "recurrence", "prompt")
        return Arrays({"path_distance": Named(dims, self._values[0]), "path_cosine": Named(dims, self._values[1])})


class _Second(Observer):
    def __init__(self, owner: PathIndependence) -> None:
        self._owner = owner

    def visit(self, visit: Visit) -> None:
        if visit.stage == "recurrent":
            self._owner.compare(visit)


def principal_components(
    states: Float[np.ndarray, "state width"], components: int
) -> tuple[Float[np.ndarray, "state component"], Float[np.ndarray, " component"]]:
    """Scores on the leading principal components, and each one's share of the variance.

    From the singular value decomposition of the centred states, in float64. The sign of a component, which is
    arbitrary, is set so that its largest score is positive. Components beyond min(states, width) are NaN.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # states of a diverging model, told apart below
        centred = states.astype(np.float64) - states.mean(axis=0, dtype=np.float64)
    scores = np.full((len(states), components), np.nan)
    share = np.full(components, np.nan)
    if not np.isfinite(centred).all():
        return scores, share
    # torch's, for it keeps to the number of threads that the user asked for.
    directions, sizes, _ = (part.numpy() for part in torch.linalg.svd(torch.from_numpy(centred), full_matrices=False))
    kept = min(components, len(sizes))
    found = directions[:, :kept] * sizes[:kept]
    sign = np.sign(found[np.abs(found).argmax(axis=0), np.arange(kept)])
    scores[:, :kept] = found * np.where(sign == 0, 1.0, sign)
    total = (sizes**2).sum()
    share[:kept] = sizes[:kept] ** 2 / total if total > 0 else np.nan
    return scores, share


class Trajectories(Measure):
    """Keeps the states of a few tokens at every visit of the recurrent block."""

    def __init__(self, frame: Frame, tokens: Sequence[tuple[int, int]], components: int) -> None:
        """`tokens`: (row of the batch, token) pairs."""
        self.frame = frame
        self.components = components
        self._rows = torch.tensor([row for row, _ in tokens], device=frame.mask.device)
        self._tokens = torch.tensor([token for _, token in tokens], device=frame.mask.device)
        layers = frame.info.recurrent
        self._states = np.full((len(tokens), layers, frame.recurrences, frame.info.width), np.nan, dtype=np.float64)

    def visit(self, visit: Visit) -> None:
        if visit.stage == "recurrent":
            chosen: Tensor = widen(visit.residual[self._rows, self._tokens])
            self._states[:, visit.layer, visit.recurrence] = chosen.double().cpu().numpy()

    def finish(self) -> Arrays:
        tracked, layers, recurrences, width = self._states.shape
        scores = np.empty((tracked, layers, recurrences, self.components))
        shares = np.empty((tracked, self.components))
        for index, states in enumerate(self._states):
            found, shares[index] = principal_components(states.reshape(-1, width), self.components)
            scores[index] = found.reshape(layers, recurrences, self.components)
        return Arrays(
            {
                "trajectory": Named(("tracked", "layer", "recurrence", "component"), scores),
                "trajectory_variance": Named(("tracked", "component"), shares),
            }
        )
