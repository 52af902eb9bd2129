"""What an earlier release wrote, in which recurrences count from 0, as this one writes it, from 1."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

COUNTS_FROM = "recurrences_count_from"
"""Entry of a manifest: 1. Where it is absent, recurrences count from 0."""

_NUMBERS = ("recurrence", "depth_recurrence", "map_recurrence", "tail", "head_stable_from", "diverged_at")
"""Coordinates and variables that say which recurrence."""
_STAGES = {"depth_recurrence": "depth_stage", "map_recurrence": "map_stage"}
"""Where the visits of these are: in prelude and coda there is no recurrence, and 0 stays."""
_LABELS = ("visit", "visit_other", "map_visit")
_NAMED = re.compile(
    r"(?<!\w)((?:mlp|attention):recurrent\.(?:\*|\d+)@|inject@|token:-?\d+@)(\d+)(-?)(\d*)(?==)", re.ASCII
)
"""The recurrences that the text of an intervention names."""


def arrays_from_one(dataset: xr.Dataset) -> xr.Dataset:
    """Of a study or a comparison. Numbers below 0, and NaN, mean that there is no such recurrence, and stay. Raises
    `ValueError` for arrays that are neither's."""
    found = {}
    for name in (*_NUMBERS, *_LABELS):
        if name not in dataset.variables:
            continue
        variable = dataset.variables[name]
        if name in _LABELS:
            labels = [re.sub(r"(?<=@)\d+", _one_more, str(label)) for label in variable.values.ravel()]
            found[name] = variable.copy(data=np.array(labels, dtype=object).reshape(variable.shape))
            continue
        if variable.dtype.kind not in "iuf":
            raise ValueError(f"{name} holds no numbers")
        counted = variable.values >= 0
        if name in _STAGES:
            if _STAGES[name] not in dataset.variables:
                raise ValueError(f"{_STAGES[name]} is missing")
            counted &= dataset.variables[_STAGES[name]].values == "recurrent"
        found[name] = variable.copy(data=variable.values + counted.astype(variable.dtype))
    coordinates = {name: found.pop(name) for name in list(found) if name in dataset.coords}
    return dataset.assign(found).assign_coords(coordinates)


def manifest_from_one(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Of a study."""
    named = {"model", "settings", "identity", "left_out"} & manifest.keys()
    return {**manifest, **{name: texts_from_one(manifest[name]) for name in named}, COUNTS_FROM: 1}


def texts_from_one(value: Any) -> Any:
    """JSON with the interventions in its texts."""
    if isinstance(value, str):
        return _NAMED.sub(lambda found: f"{found[1]}{_after(found[2])}{found[3]}{_after(found[4])}", value)
    if isinstance(value, Mapping):
        return {name: texts_from_one(each) for name, each in value.items()}
    return [texts_from_one(each) for each in value] if isinstance(value, list) else value


def _after(number: str) -> str:
    return str(int(number) + 1) if number else ""


def _one_more(found: re.Match[str]) -> str:
    return _after(found[0])
