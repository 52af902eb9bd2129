"""Results of experiments over grids of models, as data: cells, what was found in each, and the files they are in.

No torch is needed here, so that reports can read them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Generic, Protocol, TypeVar, runtime_checkable

from loopscope._util.files import ClaimedFolder, write_atomically
from loopscope._util.ranges import Positive, Range, Seed, check_ranges
from loopscope._util.reading import read_json
from loopscope.dynamics.verdicts import Kind
from loopscope.errors import ConfigError, StudyError
from loopscope.experiments.designs import InjectionName, NormName

CELLS = "cells"
GRID_FILE = "grid.json"


class CellOutcome(StrEnum):
    """What the recurrent layers of a cell's model tend to."""

    FIXED_POINT = "fixed point"
    """Each layer has a point of its own."""
    DEGENERATE = "degenerate"
    """All layers share one point, or one direction while the norm grows or the state still turns."""
    DIRECTION = "direction only"
    """Layers keep directions of their own while the norm grows."""
    NONE = "none"
    """The state keeps moving, or overflows."""
    NOT_YET = "not yet"
    """The state still moves after twice the recurrences of the cell, in steps that shrink as those of an approach."""
    CANNOT_TELL = "cannot tell"
    """Prompts disagree, or the steps shrink too little to tell."""

    @property
    def decided(self) -> bool:
        """It speaks for or against an outcome."""
        return self not in (CellOutcome.NOT_YET, CellOutcome.CANNOT_TELL)

    @property
    def settles(self) -> bool:
        """Each layer comes to rest, at a point of its own."""
        return self is CellOutcome.FIXED_POINT


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One randomly initialised model and the prompts it is run on. All else follows from these numbers.

    Raises `ConfigError` for a number outside its range.
    """

    norm: NormName
    injection: InjectionName
    depth: Annotated[int, Range(1, 1000)]
    """Recurrent layers; there is no prelude and no coda."""
    seed: Seed
    std: Positive = 0.02
    """Of every matrix's entries."""
    injection_scale: Annotated[float, Range(0)] = 1.0
    """Factor on the injection: on its matrix, or on what is added."""
    width: Annotated[int, Range(32, 2**14)] = 192
    tokens: Annotated[int, Range(1, 10**4)] = 16
    """Random ones, in each prompt."""
    prompts: Annotated[int, Range(1, 10**4)] = 1
    recurrences: Annotated[int, Range(8, 10**5)] = 128
    """The horizon; twice as many are run."""
    judged: bool = False
    """Also judge what each token tends to."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.width % 32:
            raise ConfigError(f"width must be a multiple of 32, the width of a head, got {self.width}.")

    @property
    def name(self) -> str:
        """Of its file: readable, and another one for any other cell."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.norm}-{self.injection}-d{self.depth}-std{self.std:g}-s{self.seed}-{digest}"


@dataclass(frozen=True, kw_only=True)
class Dynamics:
    """What a model's states do. Medians over prompts, unless they say otherwise; None where no number is finite."""

    outcome: CellOutcome
    settling: str
    """Of most prompts, in the words of the study's first answer."""
    degeneracy: float | None
    """Smallest cosine between the first layer's state at the horizon and another's."""
    drift: float | None
    """Relative distance of the states at the two horizons, of the layer that moves most."""
    norm_growth: float | None
    """Norm at the second horizon over that at the first, of the layer whose grows most."""
    counts: tuple[int, ...]
    """Recurrences at which the curves are given."""
    distance: tuple[float | None, ...]
    """Relative distance to the state at the horizon after each of these, of the layer that is farthest."""
    norm: tuple[float | None, ...]
    """Norm of the last layer's state over that after the first recurrence."""
    radius: float | None
    """Largest predicted rate among the tokens whose fixed point is known."""
    radius_median: float | None
    radius_error: float | None
    """Of the largest one."""
    predicted: dict[str, int]
    """Tokens by what their eigenvalues predict."""
    observed_rate: float | None
    """Median over the tokens that show one."""
    verdicts: dict[str, int] = field(default_factory=dict)
    """Tokens by what they tend to at the last layer, if that was judged."""

    @property
    def judged_tokens(self) -> int:
        return sum(self.verdicts.values())

    @property
    def settled_tokens(self) -> int:
        """Of those."""
        return sum(count for kind, count in self.verdicts.items() if Kind(kind).settles)

    @classmethod
    def fields_of(cls, entry: Mapping[str, Any]) -> dict[str, Any]:
        """These fields of a JSON object, as they were. Raises `KeyError`, `TypeError` or `ValueError` for what has
        none."""
        lists = {name: tuple(entry[name]) for name in ("counts", "distance", "norm")}
        names = [each.name for each in dataclasses.fields(Dynamics)]
        return {**{name: entry[name] for name in names}, **lists, "outcome": CellOutcome(entry["outcome"])}


@dataclass(frozen=True, kw_only=True)
class CellResult(Dynamics):
    """What was found in one cell."""

    cell: Cell
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> CellResult:
        """Raises `KeyError`, `TypeError` or `ValueError` for what is no result."""
        return cls(**{**entry, **cls.fields_of(entry), "cell": Cell(**entry["cell"])})


@runtime_checkable
class GridCell(Hashable, Protocol):
    """What one item of a grid is."""

    @property
    def name(self) -> str:
        """Of its file; another one for any other cell."""


@runtime_checkable
class GridResult(Protocol):
    """What was found in a cell."""

    @property
    def cell(self) -> Any:
        """A `GridCell`."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""


ResultT = TypeVar("ResultT", bound=GridResult)


class GridFolder(ClaimedFolder, Generic[ResultT]):
    """A folder of results, one file a cell, each whole or absent.

    `from_dict` makes a result of what its `to_dict` gave. Raises `StudyError` for a folder that holds something else,
    `FolderBusyError` if another process writes to it.
    """

    def __init__(self, folder: Path, kind: str, from_dict: Callable[[Mapping[str, Any]], ResultT]) -> None:
        super().__init__(folder, GRID_FILE)
        self.kind = kind
        self._from_dict = from_dict

    def check(self) -> None:
        try:
            found = read_json(self.first).get("kind")
        except (OSError, ValueError, AttributeError):
            found = None
        if found != self.kind:
            raise StudyError(f"{self.folder} holds another experiment ({found}); choose another --out.")

    def begin(self) -> None:
        write_atomically(self.first, (json.dumps({"kind": self.kind}) + "\n").encode())

    def read(self, cell: GridCell) -> ResultT | None:
        """None for a cell that is not there, or whose file is damaged."""
        path = self._path(cell)
        if not path.is_file():
            return None
        try:
            found = self._from_dict(read_json(path))
        except (OSError, ValueError, KeyError, TypeError, ConfigError):
            return None
        return found if found.cell == cell else None

    def write(self, result: ResultT) -> None:
        content = json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n"
        write_atomically(self._path(result.cell), content.encode())

    def finish(self, grid: Sequence[GridCell]) -> None:
        """Write down which cells of the grid that was asked for last are there: those of others may lie beside them."""
        names = [cell.name for cell in grid if self._path(cell).is_file()]
        about = {"kind": self.kind, "finished": len(names) == len(grid), "cells": names}
        content = json.dumps(about, indent=1) + "\n"
        write_atomically(self.first, content.encode())

    def _path(self, cell: GridCell) -> Path:
        return self.folder / CELLS / f"{cell.name}.json"


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    """Least and largest of the numbers that are known: `0.65 to 0.998`."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    low, high = f"{min(known):.{digits}f}", f"{max(known):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def by_design(results: Sequence[CellResult], key: Callable[[Cell], Any]) -> Iterator[tuple[Any, list[CellResult]]]:
    """Results in groups of one key, in the order in which keys first occur."""
    for value in dict.fromkeys(key(result.cell) for result in results):
        yield value, [result for result in results if key(result.cell) == value]
