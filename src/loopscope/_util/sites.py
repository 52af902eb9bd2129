"""Where a visit stands: its stage, layer and recurrence, as text and in the order of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

Stage = Literal["prelude", "recurrent", "coda"]
STAGES: tuple[Stage, ...] = ("prelude", "recurrent", "coda")


class Site(NamedTuple):
    """The place of one visit. Layers count from 0, recurrences from 1."""

    stage: Stage
    layer: int
    """In its stage."""
    recurrence: int = 0
    """How many are done once this one is; 0 in prelude and coda, which are outside all of them."""

    @property
    def label(self) -> str:
        """`prelude.0`, `recurrent.2@5` (layer 2 in the fifth recurrence), `coda.1`."""
        return f"{self.stage}.{self.layer}" + (f"@{self.recurrence}" if self.stage == "recurrent" else "")


def sites_in_order(prelude: int, recurrent: int, coda: int, recurrences: Iterable[int]) -> list[Site]:
    """Every visit of a run to that many layers of each stage, in order, with the recurrences named."""
    return [
        *(Site("prelude", layer) for layer in range(prelude)),
        *(Site("recurrent", layer, recurrence) for recurrence in recurrences for layer in range(recurrent)),
        *(Site("coda", layer) for layer in range(coda)),
    ]


def stage_name(label: str) -> str:
    """Of a visit's label: `prelude`, the number of the recurrence, or `coda`."""
    stage, _, place = label.partition(".")
    _, at, recurrence = place.partition("@")
    return recurrence if at else stage


def stage_starts(labels: Sequence[str]) -> list[int]:
    """Of visits in order: where a stage or a recurrence begins."""
    names = [stage_name(label) for label in labels]
    return [index for index, name in enumerate(names) if index == 0 or name != names[index - 1]]
