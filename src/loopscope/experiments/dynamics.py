"""What the states of a study do, in the few numbers that grids of models are compared by."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

from loopscope.answers import Criterion
from loopscope.answers.fixed_point import SETTLED, common_settling
from loopscope.answers.settling import Settling
from loopscope.answers.view import view_study
from loopscope.grids import Outcome
from loopscope.spectra import PREDICTED_KINDS, Kind
from loopscope.study import Study
from loopscope.verdicts import KINDS

__all__ = ["dynamics_of"]

_CURVE_POINTS = 24


def dynamics_of(study: Study, criterion: Criterion) -> dict[str, Any]:
    """The fields of `Dynamics`, of a study with eigenvalues and, perhaps, verdicts."""
    view = view_study(study)
    data = study.dataset
    common = common_settling(view, criterion)
    degeneracy = _median(data["degeneracy"].values)
    shown = np.unique(np.geomspace(1, view.recurrences, _CURVE_POINTS).round().astype(int))
    distance = data["relative_distance"].max("layer").transpose("recurrence", "prompt").values
    norms = data["residual_norm"].isel(layer=-1).transpose("recurrence", "prompt").values
    with np.errstate(invalid="ignore", divide="ignore"):
        growth = norms / norms[:1]
    kinds = data["predicted_kind"].values
    told = (kinds >= 0) & ~np.isin(kinds, [PREDICTED_KINDS.index(kind) for kind in (Kind.FAR, Kind.UNRESOLVED)])
    rates, errors = data["predicted_rate"].values[told], data["predicted_rate_error"].values[told]
    verdicts = data["verdict"].isel(judged_layer=-1).values if "verdict" in data else np.empty(0, dtype=int)
    return {
        "outcome": _outcome(common, degeneracy, criterion),
        "settling": "depends on the prompt" if common is None else str(common),
        "degeneracy": degeneracy,
        "drift": _median(data["horizon_drift"].max("layer").values),
        "norm_growth": _median(data["horizon_norm_growth"].max("layer").values),
        "counts": tuple(int(count) for count in shown),
        "distance": tuple(_median(distance[count - 1]) for count in shown),
        "norm": tuple(_median(growth[count - 1]) for count in shown),
        "radius": _number(rates.max()) if rates.size else None,
        "radius_median": _median(rates),
        "radius_error": _number(errors[rates.argmax()]) if rates.size else None,
        "predicted": _counted(kinds, [str(kind) for kind in PREDICTED_KINDS]),
        "observed_rate": _median(data["observed_rate"].values),
        "verdicts": _counted(verdicts, [str(kind) for kind in KINDS]),
    }


def _outcome(common: Settling | None, degeneracy: float | None, criterion: Criterion) -> Outcome:
    if common is None:
        return Outcome.CANNOT_TELL
    shared = degeneracy is not None and degeneracy > criterion.degenerate_cosine
    if shared and common is not Settling.DIVERGED:
        return Outcome.DEGENERATE
    if common in SETTLED:
        return Outcome.FIXED_POINT
    return Outcome.DIRECTION if common is Settling.DIRECTION_ONLY else Outcome.NONE


def _median(values: np.ndarray) -> float | None:
    """Of the finite ones."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else None


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _counted(codes: np.ndarray, names: list[str]) -> dict[str, int]:
    counts = Counter(codes[codes >= 0].ravel().tolist())
    return {name: counts[place] for place, name in enumerate(names) if counts[place]}
