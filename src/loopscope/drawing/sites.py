"""Where visits stand: their stage, layer and recurrence, and the recurrences that are worth a line of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import xarray

__all__ = ["Site", "powers_of_two", "sites_of", "stage_name", "stage_starts"]


@dataclass(frozen=True)
class Site:
    """Where a visit stands."""

    stage: str
    layer: int
    recurrence: int
    """From 0; 0 in prelude and coda."""

    @property
    def label(self) -> str:
        suffix = f"@{self.recurrence}" if self.stage == "recurrent" else ""
        return f"{self.stage}.{self.layer}{suffix}"


def sites_of(dataset: xarray.Dataset) -> list[Site]:
    """The visits of the dimension `depth`, in order."""
    columns = (dataset[f"depth_{name}"].values for name in ("stage", "layer", "recurrence"))
    return [Site(str(stage), int(layer), int(recurrence)) for stage, layer, recurrence in zip(*columns, strict=True)]


def stage_name(label: str) -> str:
    """Of a visit's label: `prelude`, the recurrence counted from 1, or `coda`."""
    stage, _, place = label.partition(".")
    _, at, recurrence = place.partition("@")
    return str(int(recurrence) + 1) if at else stage


def stage_starts(labels: Sequence[str]) -> list[int]:
    """Of visits in order: where a stage or a recurrence begins."""
    names = [stage_name(label) for label in labels]
    return [index for index, name in enumerate(names) if index == 0 or name != names[index - 1]]


def powers_of_two(total: int) -> list[int]:
    """1, 2, 4 and so on up to a number, and that number."""
    powers = [2**exponent for exponent in range(total.bit_length()) if 2**exponent <= total]
    return powers if powers[-1] == total else [*powers, total]
