"""From studies to a comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from loopscope.answers.comparison.curves import MEASURES, StageCurves, correlated, relative_depth, stage_curves
from loopscope.answers.comparison.null import (
    NULL_LEVELS,
    NULLS,
    curve_similarity,
    drift,
    level_difference,
    own_similarity,
    prompt_interval,
    surrogates,
)
from loopscope.answers.comparison.result import Comparison
from loopscope.answers.comparison.settings import CompareSettings
from loopscope.answers.comparison.subjects import (
    choose_reference,
    distinct_labels,
    facts_of,
    kind_of,
    refuse_repeats,
    same_model,
    same_prompts,
)
from loopscope.answers.stages import repetition
from loopscope.errors import last_resort
from loopscope.study import Study, trusted

SPANS = ("block", "pass")
"""What of a pass is put on 0 to 100 %: the recurrent block alone, or prelude, block and coda together."""

_Arrays = dict[str, NDArray[np.float64]]


@last_resort("comparing studies")
def compare(
    studies: Sequence[Study | str | Path],
    *,
    reference: str | Path | None = None,
    settings: CompareSettings | None = None,
) -> Comparison:
    """Put studies, looped or feed-forward, on relative depth and measure how alike their stages of inference are.

    `studies` are loaded ones or their folders. `reference` is the label, model or folder of the one that the others are
    compared with: the first feed-forward one unless given, else the first. Another model is compared with the
    reference's whole pass (of a looped reference, at the recurrences it was trained for); the same model, on other
    prompts or with other settings, recurrence by recurrence.

    Raises `StudyError` for fewer than two studies, one that is given twice, is not finished, or has no stage measures,
    and for a reference that is none of them.
    """
    settings = settings or CompareSettings()
    loaded = [study if isinstance(study, Study) else Study.load(study) for study in studies]
    refuse_repeats(loaded)
    with trusted(loaded):
        return _compared(loaded, reference, settings)


def _compared(loaded: Sequence[Study], reference: str | Path | None, settings: CompareSettings) -> Comparison:
    labels = distinct_labels(loaded)
    curves = [stage_curves(study, label) for study, label in zip(loaded, labels, strict=True)]
    chosen = choose_reference(labels, loaded, reference)
    entries = []
    for index, (study, own) in enumerate(zip(loaded, curves, strict=True)):
        alike = same_model(study, loaded[chosen])
        entry = {"curve": own.values, "depth_percent": relative_depth(own.values.shape[2])} | _own(own)
        if index != chosen:
            together = same_prompts(study, loaded[chosen])
            entry |= _against(own, curves[chosen], settings, by_recurrence=alike, together=together)
        entries.append(entry)
    manifest = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "kind": kind_of(loaded),
        "reference": labels[chosen],
        "settings": dataclasses.asdict(settings),
        "studies": [
            facts_of(study, label, own, loaded[chosen])
            for study, label, own in zip(loaded, labels, curves, strict=True)
        ],
        "versions": {name: version(name) for name in ("loopscope", "numpy", "xarray")},
    }
    return Comparison(_dataset(labels, curves, entries), manifest)


def _own(curves: StageCurves) -> _Arrays:
    """How a looped model's passes differ from each other."""
    if not curves.looped:
        return {}
    return {
        # Without the first, which starts from another kind of state than all that follow.
        "repetition": np.array([repetition(rows[1:]) for rows in curves.block]),
        "own_similarity": own_similarity(curves),
        "drift": drift(curves),
    }


def _against(
    curves: StageCurves,
    reference: StageCurves,
    settings: CompareSettings,
    *,
    by_recurrence: bool,
    together: bool,
) -> _Arrays:
    """Every pass against the reference, dimensions (span, measure, recurrence), the mean over measures apart;
    `together`: both read the same prompts."""
    shape = (len(SPANS), len(MEASURES) + 1, curves.recurrences)
    value, backwards = (np.full(shape, np.nan) for _ in range(2))
    p_values = np.full((len(NULLS), *shape), np.nan)
    interval = np.full((2, *shape[:2]), np.nan)
    null = np.full((len(NULL_LEVELS), *shape), np.nan)
    difference = np.full((len(SPANS), len(MEASURES), curves.recurrences), np.nan)
    for span, name in enumerate(SPANS):
        own = curves.block if name == "block" else curves.values
        made = surrogates(own.shape[2], settings)
        for recurrence in range(
            min(curves.recurrences, reference.recurrences) if by_recurrence else curves.recurrences
        ):
            at = recurrence if by_recurrence else reference.home
            there = (reference.block if by_recurrence and name == "block" else reference.values)[:, at]
            here = own[:, recurrence]
            likeness = curve_similarity(correlated(here), correlated(there), settings, made)
            value[span, :, recurrence], backwards[span, :, recurrence] = likeness.value, likeness.reversed
            p_values[:, span, :, recurrence], null[:, span, :, recurrence] = likeness.p_values, likeness.null
            difference[span, :, recurrence] = level_difference(here, there, settings.grid)
            if recurrence == curves.home:
                passes = (
                    curves.pass_of_prompts(recurrence, block=name == "block"),
                    reference.pass_of_prompts(at, block=by_recurrence and name == "block"),
                )
                paired = together and passes[0].shape[2] == passes[1].shape[2]
                interval[:, span] = prompt_interval(*passes, settings, paired=paired)
    found = {"similarity": value, "reversed_similarity": backwards, "p_value": p_values.max(axis=0)}
    return {
        **{name: values[:, :-1] for name, values in found.items()},
        **{f"overall_{name}": values[:, -1] for name, values in found.items()},
        "null_p_value": p_values[:, :, :-1],
        "overall_null_p_value": p_values[:, :, -1],
        "similarity_interval": interval[:, :, :-1],
        "overall_similarity_interval": interval[:, :, -1],
        "null_quantile": null[:, :, :-1],
        "overall_null_quantile": null[:, :, -1],
        "level_difference": difference,
    }


_DIMS = {
    "curve": ("measure", "recurrence", "position"),
    "depth_percent": ("position",),
    "repetition": ("measure",),
    "own_similarity": ("measure", "recurrence"),
    "drift": ("measure", "recurrence"),
    **dict.fromkeys(
        ("similarity", "reversed_similarity", "p_value", "level_difference"), ("span", "measure", "recurrence")
    ),
    "null_p_value": ("null", "span", "measure", "recurrence"),
    "null_quantile": ("quantile", "span", "measure", "recurrence"),
    "similarity_interval": ("bound", "span", "measure"),
    **dict.fromkeys(("overall_similarity", "overall_reversed_similarity", "overall_p_value"), ("span", "recurrence")),
    "overall_null_p_value": ("null", "span", "recurrence"),
    "overall_null_quantile": ("quantile", "span", "recurrence"),
    "overall_similarity_interval": ("bound", "span"),
}
"""Every variable, without its dimension of studies."""


def _dataset(labels: Sequence[str], curves: Sequence[StageCurves], entries: Sequence[_Arrays]) -> xr.Dataset:
    """One array per variable; a study that has none of it, or less of it, is filled up with NaN."""
    sizes = {
        "measure": len(MEASURES),
        "span": len(SPANS),
        "quantile": len(NULL_LEVELS),
        "null": len(NULLS),
        "bound": 2,
        "recurrence": max(own.recurrences for own in curves),
        "position": max(own.values.shape[2] for own in curves),
    }
    variables = {}
    for name, dims in _DIMS.items():
        whole = np.full((len(labels), *(sizes[dim] for dim in dims)), np.nan)
        for place, entry in zip(whole, entries, strict=True):
            if name in entry:
                place[tuple(slice(0, length) for length in entry[name].shape)] = entry[name]
        variables[name] = ("study", *dims), whole
    return xr.Dataset(
        variables,
        {
            "study": list(labels),
            "measure": list(MEASURES),
            "span": list(SPANS),
            "quantile": list(NULL_LEVELS),
            "null": list(NULLS),
            "bound": ["low", "high"],
            "recurrence": np.arange(1, sizes["recurrence"] + 1),
        },
    )
