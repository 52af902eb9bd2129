"""What patching found: how much of the clean run's answer each state brings back, saved as arrays and a record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from loopscope._util.files import check_no_other, write_atomically
from loopscope._util.netcdf import netcdf, read_arrays
from loopscope._util.reading import read_json
from loopscope._util.wording import plural, significant
from loopscope.answers.answer import Answer, Outcome
from loopscope.errors import StudyError

PATCHING_FILE = "patching.json"
ARRAYS = "patching.nc"
_HALF = 0.5
"""A state that brings back that much of the difference is one that the answer goes through."""


@dataclass(frozen=True, eq=False)
class Patching:
    """Of each cell, the corrupted run with one state of the clean run in it.

    `dataset` has, over (pair, part, visit, position): `metric`, the difference of the logits of answer and wrong answer
    (or the log-probability of the answer, nats) at the last token of the patched run; `metric_clean` and
    `metric_corrupted` (pair) of the two runs as they are; and `recovery`, `(metric - metric_corrupted) /
    (metric_clean - metric_corrupted)`: 0 where the state changes nothing, 1 where it brings the whole answer back. It
    is NaN where the two runs differ by no more than rounding, and where a pair has no such token. Positions count from
    the end, -1 being the last token; 0 stands for all of them at once.
    """

    dataset: xr.Dataset
    manifest: Mapping[str, Any]
    """Model, settings, pairs, and how many recurrences were run."""
    folder: Path | None = None
    """Where it was loaded from or saved to."""

    @property
    def mean_recovery(self) -> NDArray[np.float64]:
        """Over the pairs that have the cell, (part, visit, position); NaN where none has."""
        values = self.dataset["recovery"].transpose("pair", "part", "visit", "position").values
        there = np.isfinite(values)
        total, count = np.where(there, values, 0.0).sum(0), there.sum(0)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def sentences(self) -> list[str]:
        """What was found, in the order of what it depends on."""
        data = self.dataset
        metric = "difference of two logits" if self.manifest["metric"] == "logit_difference" else "log-probability"
        clean, corrupted = data["metric_clean"].values, data["metric_corrupted"].values
        usable = np.isfinite(data["recovery"].values).any((1, 2, 3))
        said = [
            f"{plural(data.sizes['pair'], 'pair')}: the {metric} of the answer is {significant(float(clean.mean()))} "
            f"after the clean prompt and {significant(float(corrupted.mean()))} after the corrupted one (means)."
        ]
        if not usable.all():
            said.append(
                f"In {plural(int((~usable).sum()), 'pair')} the two runs differ by no more than rounding, so that "
                "nothing can be recovered; they are left out."
            )
        wrong_way = int((usable & (clean <= corrupted)).sum())
        if wrong_way:
            said.append(
                f"In {plural(wrong_way, 'pair')} the model prefers the answer after the corrupted prompt: what is "
                "recovered there is that preference turned round, and no knowledge of the answer."
            )
        recovery = self.mean_recovery
        if not np.isfinite(recovery).any():
            return [*said, "No cell has a recovery, so that it cannot be told where the answer is made."]
        for place, part in enumerate(data["part"].values.tolist()):
            said.append(self._best(part, recovery[place], data["recovery"].values[:, place]))
        return said

    def _best(self, part: str, recovery: NDArray[np.float64], pairs: NDArray[np.float64]) -> str:
        visit, position = np.unravel_index(int(np.nanargmax(recovery)), recovery.shape)
        cells, half = int(np.isfinite(recovery).sum()), int((recovery >= _HALF).sum())
        where = int(self.dataset["position"].values[position])
        place = "all positions" if where == 0 else f"position {where}"
        at = f"{self.dataset['visit'].values[visit]}, {place}"
        best = float(recovery[visit, position])
        each = pairs[:, visit, position]
        each = each[np.isfinite(each)]
        spread = f", from {each.min():.2f} to {each.max():.2f} over pairs" if each.size > 1 else ""
        through = (
            f"{half:,} of {cells:,} cells bring back half" if half else f"none of {cells:,} cells brings back half"
        )
        return f"{part_name(part)}: the most is recovered at {at} ({best:.2f}{spread}); {through}."

    @classmethod
    def load(cls, folder: str | Path) -> Patching:
        """Read what `save` wrote. Raises `StudyError` for a folder that holds none, or damaged files."""
        folder = Path(folder)
        for name in (PATCHING_FILE, ARRAYS):
            if not (folder / name).is_file():
                raise StudyError(f"{folder} holds no patching (it has no {name}); give the --out folder of `patch`.")
        try:
            found = cls(read_arrays(folder / ARRAYS), read_json(folder / PATCHING_FILE), folder)
            found.sentences()  # which raises for arrays and records that are none
            return found
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise StudyError(f"The patching in {folder} is damaged ({error}); patch again.") from None

    def save(self, folder: str | Path) -> Patching:
        """Write arrays and record, each file whole or not at all; what was there is replaced.

        Raises `StudyError` for the folder of another result, whose report would be replaced too, and `StorageError`.
        """
        folder = Path(folder)
        check_no_other(folder, PATCHING_FILE)
        write_atomically(folder / ARRAYS, netcdf(self.dataset))
        text = json.dumps({**self.manifest, "sentences": self.sentences()}, indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder / PATCHING_FILE, text.encode())
        return Patching(self.dataset, self.manifest, folder)


def part_name(part: str) -> str:
    """As a sentence begins."""
    return "MLP" if part == "mlp" else part.capitalize()


def patching_answer(found: Patching) -> Answer:
    """Whether single states carry the answer, for the page."""
    said, recovery = found.sentences(), found.mean_recovery
    best = float(np.nanmax(recovery)) if np.isfinite(recovery).any() else float("nan")
    outcome, verdict = Outcome.CANNOT_TELL, "the two runs do not differ"
    if np.isfinite(best):
        carried = best >= _HALF
        outcome = Outcome.YES if carried else Outcome.NO
        verdict = "one brings back half or more" if carried else "none brings back half"
    limits = [
        "Two places bring an answer back whatever the model does with it: the tokens that differ, after the first "
        "layers, and the last token after the last layer. What lies between them says where it is made.",
        "What is put in may bring an answer back along a path that the clean run does not take; and what brings "
        "nothing back by itself may still be needed beside something else.",
        "The best of many cells is better by chance too, the more so the fewer pairs there are.",
    ]
    return Answer(
        key="patching",
        question="Is there a state that the answer goes through?",
        outcome=outcome,
        verdict=verdict,
        sentence=" ".join(said),
        evidence={
            "pairs": float(found.dataset.sizes["pair"]),
            "cells": float(np.isfinite(recovery).sum()),
            "largest_mean_recovery": best,
            "recurrences_run": float(found.manifest["recurrences_run"]),
        },
        figure="patching",
        limits=limits,
    )
