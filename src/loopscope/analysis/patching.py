"""Patching: states of one prompt's run put into another's, cell by cell of a grid, and what that does to the answer.

Meng et al., arXiv 2202.05262 (causal tracing); Wang et al., arXiv 2211.00593 (patching of heads). In a loop every visit
of a layer is a place of its own.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn

from loopscope._util.sites import Site, Stage
from loopscope._util.wording import listed
from loopscope.answers.patching import Patching
from loopscope.errors import ConfigError, NonFiniteError, last_resort
from loopscope.models.interventions.kinds import Intervention, StartFrom
from loopscope.models.interventions.parsing import check_recurrences
from loopscope.models.loading import subject_of
from loopscope.models.native.attention import LayerOutput
from loopscope.models.native.interventions import Parts
from loopscope.models.native.subject import NativeRun, NativeSubject
from loopscope.models.native.subject import intervene as intervened
from loopscope.models.subject import Batch, Subject, recurrences_of
from loopscope.prompts.pairs import PromptPair, read_pairs

_ROUNDINGS = 64.0
"""Of the largest logit: a difference between the clean and the corrupted run that is below is none."""
_BATCH = 32
"""Cells that are run at once. On a processor more is no faster; a GPU takes more."""


@dataclass(frozen=True)
class Change:
    """A place in a run whose values are those of another run."""

    site: Site
    part: LayerOutput
    position: int | None
    """From 0; None for all."""
    head: int | None = None


@dataclass
class Recorded:
    """Keeps parts of layers while a run of one prompt passes."""

    wanted: frozenset[LayerOutput]
    values: dict[tuple[Site, LayerOutput], Tensor] = field(default_factory=dict)

    def __call__(self, site: Site, part: LayerOutput, values: Tensor) -> Tensor:
        if part in self.wanted:
            self.values[site, part] = values[0]
        return values


class Patches:
    """Puts recorded values into the rows of a batch: into row n at the places of `changes[n]`."""

    def __init__(self, recorded: Recorded, changes: Sequence[Sequence[Change]]) -> None:
        self._values = recorded.values
        self._at: dict[tuple[Site, LayerOutput], list[tuple[int, Change]]] = defaultdict(list)
        for row, group in enumerate(changes):
            for change in group:
                self._at[change.site, change.part].append((row, change))

    def __call__(self, site: Site, part: LayerOutput, values: Tensor) -> Tensor:
        if (site, part) not in self._at:
            return values
        values, source = values.clone(), self._values[site, part].to(values)
        for row, change in self._at[site, part]:
            head = () if change.head is None else (change.head,)
            place = slice(None) if change.position is None else change.position
            values[row, *head, place] = source[*head, place]
        return values


@last_resort("patching")
def patch(
    model: str | Path | nn.Module | Subject,
    pairs: str | Path | Sequence[Mapping[str, Any]],
    *,
    recurrences: int | None = None,
    parts: Sequence[LayerOutput] = ("residual",),
    visits: Sequence[str] = ("*",),
    positions: Literal["each", "all"] | Sequence[int] = "each",
    batch_size: int = _BATCH,
    seed: int = 0,
    intervene: str | Sequence[str | Intervention] = (),
) -> Patching:
    """Put states of each clean prompt's run into the run of its corrupted prompt, and see what of the answer is back.

    **Arguments**

    - `model`: as for `loopscope.capture`; one that loopscope computes itself.
    - `pairs`: a JSONL file, or a list of mappings: `clean`, `corrupted` (texts or token ids, of as many tokens),
      `answer` and, for the difference of two logits rather than a log-probability, `wrong` (of one token each).
    - `recurrences`: how often the loop runs; the trained number unless given.
    - `parts`: `residual` (what a layer puts out), `attention`, `mlp` (what each adds to the residual stream, after the
      norm that may follow it), `head` (what each head has mixed, before the output projection, one at a time).
    - `visits`: patterns of the labels of visits, such as `recurrent.2@*`; all visits unless given.
    - `positions`: `each` token by itself, `all` at once, or some of them, from 0 or, negative, from the end.
    - `batch_size`: how many cells are run at once.
    - `intervene`: both runs are under these interventions.

    Both prompts start from the same initial state, that of the clean one, where a model draws it at random. Every cell
    is run from the recurrence that it changes, so that what lies before is run once for all.

    Raises `PromptError` for pairs that do not fit (see `read_pairs`), `ConfigError` for a model that is only watched, a
    visit or position that there is none of, and `NonFiniteError` for a run that overflows.
    """
    subject = intervened(subject_of(model), intervene)
    if not isinstance(subject, NativeSubject):
        raise ConfigError(
            f"{subject.info.name} computes by itself and is only watched, so that no state can be put into its run; "
            "take a model of a family that loopscope reads natively."
        )
    count = recurrences_of(subject.info, recurrences)
    check_recurrences(subject.interventions, count)
    wanted = list(dict.fromkeys(parts))
    if not wanted or not set(wanted) <= set(get_args(LayerOutput)):
        raise ConfigError(
            f"parts must be some of {listed(list(get_args(LayerOutput)))}, got {', '.join(parts) or 'none'}."
        )
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")
    numbers = range(1, count + 1)  # as visits count recurrences
    every = subject.info.sites(numbers)
    sites = [site for site in every if any(fnmatchcase(site.label, pattern) for pattern in visits)]
    if not sites:
        raise ConfigError(
            f"No visit is called {', '.join(visits)}; those of {subject.info.name} go from {every[0].label} to "
            f"{every[-1].label}."
        )
    found = read_pairs(pairs, subject.tokenizer, subject.info.vocab_size)
    longest = max(len(pair.clean) for pair in found)
    if subject.info.max_positions is not None and longest > subject.info.max_positions:
        raise ConfigError(
            f"A prompt has {longest} tokens; {subject.info.name} has {subject.info.max_positions} positions."
        )
    grid = _Grid(subject, numbers, sites, wanted, batch_size, seed)
    done = [grid.run(pair, _places(pair, positions)) for pair in found]
    return Patching(_dataset(grid, found, done), _manifest(grid, found, positions, done))


def _places(pair: PromptPair, positions: Literal["each", "all"] | Sequence[int]) -> list[int | None]:
    """Positions from 0; None for all at once."""
    tokens = len(pair.clean)
    if positions == "each":
        return list(range(tokens))
    if positions == "all":
        return [None]
    if not positions or not all(isinstance(place, int) for place in positions):
        raise ConfigError(f"positions must be each, all or a list of positions, got {positions!r}.")
    outside = [place for place in positions if not -tokens <= place < tokens]
    if outside:
        raise ConfigError(
            f"There is no position {outside[0]} in the pair {pair.id}, whose prompts have {tokens} tokens, counted "
            "from 0 or, negative, from the end."
        )
    return [*sorted({place % tokens for place in positions})]


@dataclass(frozen=True)
class _Done:
    """Of one pair."""

    clean: float
    corrupted: float
    floor: float
    """Below which a difference of the two is rounding."""
    places: list[int | None]
    metric: Float[Tensor, "part visit place"]
    recurrences: int
    """Recurrences of one prompt that were run."""


_Cell = tuple[tuple[int, int, int], Change]
"""Part, visit and place by their numbers in the grid, and what is changed there."""


@dataclass(frozen=True)
class _Grid:
    """What is patched in every pair."""

    subject: NativeSubject
    numbers: range
    """Of the recurrences, as visits name them."""
    sites: list[Site]
    parts: list[LayerOutput]
    batch_size: int
    seed: int

    @property
    def columns(self) -> list[tuple[str, LayerOutput, int | None]]:
        """Name, part and head of each entry of the dimension `part`."""
        heads = range(self.subject.model.architecture.heads)
        return [
            column
            for part in self.parts
            for column in ([(f"head {n}", part, n) for n in heads] if part == "head" else [(part, part, None)])
        ]

    def run(self, pair: PromptPair, places: list[int | None]) -> _Done:
        """One pair: two runs as they are, and the cells."""
        recorded, count = Recorded(frozenset(self.parts)), len(self.numbers)
        clean = self._start([pair.clean], None, recorded)
        # A state that is drawn is the same in both runs; one that is the prelude's output belongs to its prompt.
        architecture, prelude = self.subject.model.architecture, StartFrom("prelude")
        own = architecture.state_init == "embeddings" or prelude in self.subject.interventions
        initial = None if own else clean.state
        for _ in self.numbers:
            clean.advance()
        logits = clean.answer()[0, -1].double()
        metric = torch.full((len(self.columns), len(self.sites), len(places)), torch.nan, dtype=torch.float64)
        recurrences = 2 * count

        def finish(run: NativeRun, left: int, cells: list[_Cell]) -> int:
            for _ in range(left):
                run.advance()
            for (place, _), row in zip(cells, run.answer()[:, -1].double(), strict=True):
                metric[place] = _metric(row, pair)
            return left * len(cells)

        def forked(cells: list[_Cell]) -> NativeRun:
            rows = torch.zeros(len(cells), dtype=torch.int64, device=self.subject.device)
            return run.fork_rows(rows, Patches(recorded, [[change] for _, change in cells]))

        for cells in self._cells(places, "prelude"):
            patches = Patches(recorded, [[change] for _, change in cells])
            recurrences += finish(self._start([pair.corrupted] * len(cells), initial, patches), count, cells)
        run = self._start([pair.corrupted], initial, None)
        for done, number in enumerate(self.numbers):
            for cells in self._cells(places, "recurrent", number):
                recurrences += finish(forked(cells), count - done, cells)
            run.advance()
        for cells in self._cells(places, "coda"):
            finish(forked(cells), 0, cells)
        plain = run.answer()[0, -1].double()
        if not bool(torch.isfinite(logits).all() and torch.isfinite(plain).all()):
            raise NonFiniteError(f"A run of the pair {pair.id} overflows; run fewer recurrences, or in float32.")
        floor = _ROUNDINGS * torch.finfo(self.subject.model.dtype).eps * float(logits.abs().max())
        return _Done(_metric(logits, pair), _metric(plain, pair), floor, places, metric, recurrences)

    def _start(self, prompts: list[tuple[int, ...]], initial: Tensor | None, parts: Parts | None) -> NativeRun:
        return self.subject.start(
            Batch.of(prompts),
            recurrences=len(self.numbers),
            seed=self.seed,
            initial_state=None if initial is None else initial.expand(len(prompts), -1, -1),
            parts=parts,
        )

    def _cells(self, places: list[int | None], stage: Stage, recurrence: int | None = None) -> Iterator[list[_Cell]]:
        """Those of a stage or of one recurrence, in batches."""
        cells = [
            ((column, visit, place), Change(site, part, position, head))
            for visit, site in enumerate(self.sites)
            if site.stage == stage and recurrence in (None, site.recurrence)
            for column, (_, part, head) in enumerate(self.columns)
            for place, position in enumerate(places)
        ]
        for start in range(0, len(cells), self.batch_size):
            yield cells[start : start + self.batch_size]


def _metric(logits: Float[Tensor, " vocabulary"], pair: PromptPair) -> float:
    if pair.wrong is not None:
        return float(logits[pair.answer] - logits[pair.wrong])
    return float(logits.log_softmax(-1)[pair.answer])


def _dataset(grid: _Grid, pairs: Sequence[PromptPair], done: Sequence[_Done]) -> xr.Dataset:
    """Positions from the end, so that the tokens before the answer stand together whatever a pair's length."""
    ends = [
        [0 if place is None else place - len(pair.clean) for place in one.places]
        for pair, one in zip(pairs, done, strict=True)
    ]
    positions = sorted({end for each in ends for end in each})
    names, labels = [name for name, _, _ in grid.columns], [site.label for site in grid.sites]
    metric = np.full((len(pairs), len(names), len(labels), len(positions)), np.nan)
    for index, (each, one) in enumerate(zip(ends, done, strict=True)):
        metric[index, :, :, [positions.index(end) for end in each]] = one.metric.permute(2, 0, 1).numpy()
    clean, corrupted, floor = (
        np.array([getattr(one, name) for one in done]) for name in ("clean", "corrupted", "floor")
    )
    apart = np.where(np.abs(clean - corrupted) > floor, clean - corrupted, np.nan)
    dims = ("pair", "part", "visit", "position")
    return xr.Dataset(
        {
            "metric": (dims, metric),
            "metric_clean": ("pair", clean),
            "metric_corrupted": ("pair", corrupted),
            "recovery": (dims, (metric - corrupted[:, None, None, None]) / apart[:, None, None, None]),
        },
        coords={"pair": [pair.id for pair in pairs], "part": names, "visit": labels, "position": positions},
    )


def _manifest(
    grid: _Grid,
    pairs: Sequence[PromptPair],
    positions: Literal["each", "all"] | Sequence[int],
    done: Sequence[_Done],
) -> dict[str, Any]:
    return {
        "kind": "patching",
        "model": grid.subject.info.to_dict(),
        "settings": {
            "recurrences": len(grid.numbers),
            "parts": list(grid.parts),
            "positions": positions if isinstance(positions, str) else list(positions),
            "seed": grid.seed,
            "batch_size": grid.batch_size,
        },
        "metric": "log_probability" if pairs[0].wrong is None else "logit_difference",
        "recurrences_run": sum(one.recurrences for one in done),
        "pairs": [dataclasses.asdict(pair) for pair in pairs],
        "versions": {name: version(name) for name in ("loopscope", "torch")},
    }
