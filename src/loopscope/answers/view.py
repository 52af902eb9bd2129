"""What the questions ask of a study: its numbers, and the few facts that decide how to read them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray

from loopscope.errors import StudyError
from loopscope.study import Study

__all__ = ["StudyView", "view_study"]

_ALWAYS = ("token_count", "diverged_at")
_LOOPED = (
    "relative_step",
    "relative_distance",
    "horizon_drift",
    "horizon_drift_cosine",
    "horizon_norm_growth",
    "horizon_relative_step",
    "horizon_residual_norm",
    "degeneracy",
)


@dataclass(frozen=True, kw_only=True)
class StudyView:
    """A study, checked for what the questions need."""

    dataset: xarray.Dataset
    """Every prompt, diverged ones included. A rounding floor that was not measured is NaN; other parts that the
    analysis was told to skip are absent."""
    finite: xarray.Dataset
    """The prompts that stayed finite."""
    looped: bool
    layers: int
    """Recurrent layers."""
    recurrences: int
    """R: recurrences measured."""
    horizon: int
    """H: recurrences after which the state stands in for the fixed point."""
    trained: int | None
    """Recurrences that the model was trained with, if known."""
    injection: str
    """`unknown` for a model that is seen from outside."""
    head_stable: float
    """Root mean square change of a map's rows below which a head is stable; NaN if heads were not measured."""
    exit_threshold: float | None
    """Cumulated probability at which the model's own exit gate stops a token; None without a gate."""
    dtype: str
    """In which the states were computed."""
    interventions: tuple[str, ...] = ()
    """What the analysis changed in the model's computation."""

    @property
    def prompts(self) -> int:
        return int(self.dataset.sizes["prompt"])

    @property
    def diverged(self) -> int:
        """Prompts with a state that is not finite."""
        return self.prompts - int(self.finite.sizes["prompt"])

    @property
    def tokens(self) -> int:
        return int(self.dataset["token_count"].sum())


def view_study(study: Study) -> StudyView:
    """Read what the answers need.

    Raises `StudyError` that names the variable, or the entry of the manifest, which the study lacks.
    """
    dataset, manifest = study.dataset, study.manifest
    try:
        model = manifest["model"]
        looped = model["kind"] == "looped"
        injection = str(model["injection"] or "unknown") if looped else "none"
        dtype = str(manifest["settings"]["dtype"])
        horizon = int(manifest["settings"]["horizon"]) if looped else 0
    except KeyError as error:
        raise StudyError(
            f"The study's manifest has no entry {error}, so its numbers cannot be read; analyze the model again."
        ) from error
    for name in _ALWAYS + (_LOOPED if looped else ()):
        if name not in dataset:
            raise StudyError(f"The study has no variable {name!r}, so it is not complete; run its analysis again.")
    if looped and "noise_floor" not in dataset:
        dataset = dataset.assign(noise_floor=xarray.full_like(dataset["horizon_drift"], np.nan))
    trained = model.get("trained_recurrences")
    return StudyView(
        dataset=dataset,
        finite=dataset.isel(prompt=np.flatnonzero(dataset["diverged_at"].values < 0)),
        looped=looped,
        layers=int(dataset.sizes["layer"]) if looped else 0,
        recurrences=int(dataset.sizes["recurrence"]) if looped else 0,
        horizon=horizon,
        trained=int(trained) if trained is not None else None,
        injection=injection,
        head_stable=float(manifest["settings"].get("head_stable", np.nan)),
        exit_threshold=None if model.get("exit_threshold") is None else float(model["exit_threshold"]),
        dtype=dtype,
        interventions=tuple(manifest["settings"].get("intervene", ())),
    )
