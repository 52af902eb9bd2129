"""The result of a comparison: named arrays and a manifest, which report and answers are drawn from."""

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
from loopscope._util.old_counts import COUNTS_FROM, arrays_from_one, texts_from_one
from loopscope._util.reading import read_json
from loopscope.answers.comparison.cells import ComparedAnswer
from loopscope.answers.comparison.settings import CompareSettings
from loopscope.errors import StudyError

COMPARISON_FILE = "comparison.json"
ARRAYS = "comparison.nc"


@dataclass(frozen=True, eq=False)
class Comparison:
    """Studies on relative depth, and how alike they are. The variables are listed in docs/compare.md."""

    dataset: xr.Dataset
    manifest: Mapping[str, Any]
    folder: Path | None = None
    """Where it was loaded from or saved to."""

    @property
    def labels(self) -> list[str]:
        """The names of the studies, in the order in which they were given."""
        return [str(label) for label in self.dataset["study"].values]

    @property
    def reference(self) -> str:
        """The label of the study that the others are compared with."""
        return str(self.manifest["reference"])

    @property
    def settings(self) -> CompareSettings:
        return CompareSettings(**self.manifest["settings"])

    @property
    def studies(self) -> dict[str, Mapping[str, Any]]:
        """What the manifest says of each study, by label."""
        return {str(entry["label"]): entry for entry in self.manifest["studies"]}

    def cells(self, label: str) -> dict[str, ComparedAnswer]:
        """What a study says to each question, by key; of an older comparison nothing."""
        return {cell["key"]: ComparedAnswer.from_dict(cell) for cell in self.studies[label].get("answers", ())}

    def curve(self, label: str, measure: str, recurrence: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Of one study's pass in a recurrence (from 1): relative depth in percent and the values, both over the
        layers that it has."""
        data = self.dataset.sel(study=label, measure=measure)
        layers = sum(self.studies[label]["layout"].values())
        values = data["curve"].isel(recurrence=recurrence - 1).values[:layers]
        return data["depth_percent"].values[:layers].astype(np.float32), values.astype(np.float32)

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """Read a saved comparison. Raises `StudyError` for a folder that holds none, or damaged files."""
        folder = Path(folder)
        for name in (COMPARISON_FILE, ARRAYS):
            if not (folder / name).is_file():
                raise StudyError(
                    f"{folder} is not a comparison (it has no {name}); give the --out folder of `loopscope compare`."
                )
        try:
            manifest = read_json(folder / COMPARISON_FILE)
            dataset = read_arrays(folder / ARRAYS)
            if COUNTS_FROM not in manifest:
                manifest, dataset = {**texts_from_one(manifest), COUNTS_FROM: 1}, arrays_from_one(dataset)
                # A study may be labelled by its interventions.
                dataset = dataset.assign_coords(study=texts_from_one(dataset["study"].values.tolist()))
            found = cls(dataset, manifest, folder)
            # Which raise for entries that are none.
            _ = found.settings
            _ = [found.cells(label) for label in found.studies]
            if found.labels != list(found.studies) or found.reference not in found.labels:
                raise ValueError(f"{COMPARISON_FILE} and {ARRAYS} name different studies")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StudyError(f"The comparison in {folder} is damaged ({error}); compare the studies again.") from None
        return found

    def save(self, folder: str | Path) -> Comparison:
        """Write arrays and manifest, each file whole or not at all; a comparison that was there is replaced.

        Raises `StudyError` for the folder of another result, whose report would be replaced too, and `StorageError`.
        """
        folder = Path(folder)
        check_no_other(folder, COMPARISON_FILE)
        write_atomically(folder / ARRAYS, netcdf(self.dataset))
        manifest = {**self.manifest, COUNTS_FROM: 1}
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder / COMPARISON_FILE, text.encode())
        return Comparison(self.dataset, manifest, folder)
