"""The result of an analysis: named arrays, the manifest, and the tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from loopscope._util.cards import cards
from loopscope._util.files import write_atomically
from loopscope._util.frames import study_frames
from loopscope._util.netcdf import netcdf, read_arrays
from loopscope._util.old_counts import COUNTS_FROM, arrays_from_one, manifest_from_one
from loopscope._util.ranges import check_type
from loopscope._util.reading import parse_json, read_json, read_text, sha256_of
from loopscope._util.sites import STAGES, Site, Stage
from loopscope._util.study_shape import check_files, check_manifest, check_tokens
from loopscope._util.wording import layout_text, plural
from loopscope.errors import StudyError, last_resort, one_line

MANIFEST = "manifest.json"
ARRAYS = "study.nc"
TOKENS = "tokens.jsonl"

_FILES, _OWN = "files", "checksum"
"""Entries of the manifest: the SHA-256 of each other file, and of the manifest without this entry."""
_MOST_TOKENS = 2**32
"""Bytes of the tokens' file."""

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


_COSINES = {
    "cosine_distance_to_previous": "cosine_to_previous",
    "cosine_distance_to_horizon": "cosine_to_horizon",
    "cosine_distance_to_second_horizon": "cosine_to_second_horizon",
    "path_cosine_distance": "path_cosine",
}
"""What older studies have instead of the distance of a cosine from 1. In float32 it says nothing below 1e-7."""


@dataclass(frozen=True, eq=False, repr=False)
class Study:
    """Everything that report, figures and comparisons read. The variables are listed in docs/study.md."""

    dataset: xr.Dataset
    manifest: Mapping[str, Any]
    tokens: Sequence[Mapping[str, Any]]
    """One entry a prompt, the fields of a `TokenizedPrompt`: id, text, token_ids, token_strings and so on."""
    folder: Path | None = None
    """Where it was loaded from or saved to."""

    @classmethod
    @last_resort("reading a study")
    def load(cls, folder: str | Path) -> Study:
        """Read a finished study.

        Raises `StudyError` for a folder that holds none, an unfinished one, or damaged files.
        """
        check_type("folder", folder, Path)
        folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest.get("kind") == "verdicts":
            raise StudyError(
                f"{folder} holds verdicts on trajectories and no study; give the --out folder of a `loopscope analyze` "
                "run."
            )
        if manifest.get("status") != "complete":
            raise StudyError(
                f"The study in {folder} is not finished; run the same `loopscope analyze` command to finish it."
            )
        for name in (ARRAYS, TOKENS):
            if not (folder / name).is_file():
                raise StudyError(f"{folder} lacks {name}; run the analysis again into a new folder.")
        try:
            check_manifest(manifest)
            check_files(folder, manifest)
            dataset = read_arrays(folder / ARRAYS)
            # At line feeds alone: a prompt may hold other line ends, which JSON leaves as they are.
            lines = read_text(folder / TOKENS, _MOST_TOKENS).split("\n")
            tokens = [parse_json(line) for line in lines if line]
            check_tokens(tokens, dataset)
            if COUNTS_FROM not in manifest:
                dataset, manifest = arrays_from_one(dataset), manifest_from_one(manifest)
        except (OSError, ValueError) as error:
            raise StudyError(
                f"The study in {folder} is damaged ({one_line(error)}); run the analysis again into a new folder."
            ) from None
        return cls(dataset, manifest, tokens, folder)

    def to_pandas(self) -> dict[str, Any]:
        """Tidy frames of pandas by name: `prompts`, `tokens`, `readouts`, `visits` and `heads`, whose columns are the
        variables of docs/study.md; those of which the study has nothing are absent."""
        return study_frames(self.dataset, self.tokens)

    def metrics(self) -> dict[str, float]:
        """A flat dictionary of finite numbers, such as `loss/loss_at_last_readout` and `tokens/orbit`, for trackers.

        Raises `StudyError` if the study lacks a variable that the answers need.
        """
        # By its name, since answers read studies, and studies do not know of answers.
        return cast(dict[str, float], import_module("loopscope.answers.quick").study_metrics(self))

    def save(self, folder: str | Path) -> Study:
        """Write the study, each file whole or not at all, the manifest last. Raises `StorageError`."""
        folder = Path(folder)
        write_atomically(folder / TOKENS, tokens_file(self.tokens))
        write_atomically(folder / ARRAYS, netcdf(self.dataset))
        files = {name: sha256_of(folder / name) for name in (ARRAYS, TOKENS)}
        manifest = write_manifest(folder, {**self.manifest, _FILES: files})
        return Study(self.dataset, manifest, self.tokens, folder)

    @property
    def plot(self) -> Any:
        """The figures of the study as methods: `study.plot.distance()`; see `report.figures.in_python.StudyPlots`."""
        return import_module("loopscope.report.figures.in_python").StudyPlots(self)

    def __repr__(self) -> str:
        return f"<Study of {self._described()}>"

    def _repr_html_(self) -> str:
        """The cards of the report, as a notebook shows them."""
        # By its name, since answers read studies, and studies do not know of answers.
        answers = import_module("loopscope.answers.quick").quick_answers(self)
        return cards(self._described(), [answer._repr_html_() for answer in answers])

    def _described(self) -> str:
        model, sizes = self.manifest["model"], self.dataset.sizes
        facts = [layout_text(*(int(model["layout"][name]) for name in STAGES))]
        facts += [plural(int(sizes[name]), name) for name in ("recurrence", "prompt") if name in sizes]
        place = "" if self.folder is None else f", in {self.folder}"
        return f"{model['name']}: {', '.join(facts)}, {plural(len(self.dataset.data_vars), 'variable')}{place}"


@contextmanager
def trusted(studies: Sequence[Study]) -> Iterator[None]:
    """Whoever reads studies relies on what an analysis writes. Of one that has no checksums, it may have been edited:
    what then goes wrong is `StudyError`."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, StopIteration) as error:
        unknown = [study.folder or "in memory" for study in studies if _FILES not in study.manifest]
        if not unknown:
            raise
        raise StudyError(
            f"The study {unknown[0]} has no checksums, as an earlier release wrote it, and cannot be read as it is "
            f"({one_line(error)}); analyse the model again."
        ) from error


def tokens_file(tokens: Sequence[Mapping[str, Any]]) -> bytes:
    """One JSON line a prompt."""
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in tokens).encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a study folder, finished or not. Raises `StudyError` where there is none."""
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        what = "is not a study (it has no manifest.json)" if folder.exists() else "does not exist"
        raise StudyError(f"{folder} {what}; give the --out folder of a `loopscope analyze` run.") from None
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise StudyError(f"{path} is damaged ({error}); run the analysis again into a new folder.") from None
    if not isinstance(manifest, dict):
        raise StudyError(f"{path} does not hold a JSON object; it is not a study's manifest.")
    if manifest.get(_OWN, _digest(manifest)) != _digest(manifest):
        raise StudyError(
            f"{path} was changed since it was written (its checksum is another one), so what it says of the numbers "
            "may be wrong; run the analysis again into a new folder, or put the file back."
        )
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What was written: with how it counts recurrences, and a checksum of itself, by which a change is told from what
    another version wrote."""
    whole = {**manifest, COUNTS_FROM: 1}
    whole[_OWN] = _digest(whole)
    write_atomically(folder / MANIFEST, (json.dumps(whole, indent=2, ensure_ascii=False) + "\n").encode())
    return whole


def _digest(manifest: Mapping[str, Any]) -> str:
    content = {name: value for name, value in manifest.items() if name != _OWN}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyView:
    """A study as answers and figures read it: checked for what they need, with the facts that decide how to read it."""

    study: Study
    dataset: xr.Dataset
    """Every prompt, diverged ones included. A noise floor that was not measured is NaN; other parts that the analysis
    was told to skip are absent."""
    finite: xr.Dataset
    """The prompts that stayed finite."""
    prelude: int
    recurrent: int
    """Layers of the loop; 0 for a feed-forward model."""
    coda: int
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
    _variables: dict[str, xr.DataArray] = field(default_factory=dict, init=False, repr=False)
    """Those that were asked for: to take one out of a data set is slower than most of what is done with it."""
    _medians: dict[tuple[str, float], xr.DataArray] = field(default_factory=dict, init=False, repr=False)

    @property
    def looped(self) -> bool:
        return self.recurrences > 0

    @property
    def second_horizon(self) -> int:
        """Recurrences of the longest run: twice the horizon, unless all prompts were at rest before (`stopped_at`)."""
        if "stopped_at" not in self.dataset:
            return 2 * self.horizon
        stopped = self.dataset["stopped_at"].values
        return int(np.where(stopped < 0, 2 * self.horizon, stopped).max())

    @property
    def prompts(self) -> int:
        return int(self.dataset.sizes["prompt"])

    @property
    def diverged(self) -> int:
        """Prompts with a state that is not finite."""
        return self.prompts - int(self.finite.sizes["prompt"])

    @property
    def tokens(self) -> int:
        """Of all prompts."""
        return int(self.dataset["token_count"].sum())

    @property
    def manifest(self) -> Mapping[str, Any]:
        return self.study.manifest

    @property
    def shown(self) -> xr.Dataset:
        """What is drawn: the finite prompts, or all of them, up to where they diverge, if none stayed finite."""
        return self.finite if self.finite.sizes["prompt"] else self.dataset

    @property
    def layout(self) -> str:
        """(p, k ⊗ R, c), or the number of layers of a feed-forward model."""
        return layout_text(self.prelude, self.recurrent, self.coda)

    def variable(self, name: str) -> xr.DataArray:
        """Of the prompts shown. Raises `StudyError`, which says why, where the study has none of that name."""
        if name not in self.shown:
            raise StudyError(f"{name}, from which this is drawn, is not in the study: {self.why_absent(name)}.")
        if name not in self._variables:
            self._variables[name] = self.shown[name]
        return self._variables[name]

    def why_absent(self, name: str) -> str | None:
        """Why the study has no such variable, or no finite number of it; None if it has."""
        if name in self.shown:
            values = self.shown.variables[name].values
            nothing = values.dtype.kind == "f" and not np.isfinite(values).any()
            return f"{name} is nowhere finite in this study" if nothing else None
        skipped = ", ".join(self.manifest["settings"].get("skip", ()))
        # An older study does not say why it lacks what it lacks.
        otherwise = f"the study has no variable {name}" + (f" (--skip {skipped})" if skipped else "")
        return str(self.manifest.get("left_out", {}).get(name, otherwise))

    def median(self, name: str, level: float = 0.5) -> xr.DataArray:
        """Median over the prompts shown, or another quantile, of what is finite in a variable."""
        if (name, level) not in self._medians:
            self._medians[name, level] = median_over_prompts(self.variable(name), level)
        return self._medians[name, level]

    def strings(self, prompt: int) -> list[str]:
        """The tokens of a prompt, as text."""
        return [str(token) for token in self.study.tokens[prompt]["token_strings"]]


def view_study(study: Study) -> StudyView:
    """Read what answers and figures need.

    Raises `StudyError` that names the variable, or the entry of the manifest, which the study lacks.
    """
    dataset, manifest = study.dataset, study.manifest
    try:
        model = manifest["model"]
        looped = model["kind"] == "looped"
        facts: dict[str, Any] = {
            **{name: int(model["layout"][name]) for name in STAGES},
            "injection": str(model["injection"] or "unknown") if looped else "none",
            "dtype": str(manifest["settings"]["dtype"]),
            "horizon": int(manifest["settings"]["horizon"]) if looped else 0,
            "trained": None if model.get("trained_recurrences") is None else int(model["trained_recurrences"]),
            "head_stable": float(manifest["settings"].get("head_stable", np.nan)),
            "exit_threshold": None if model.get("exit_threshold") is None else float(model["exit_threshold"]),
            "interventions": tuple(manifest["settings"].get("intervene", ())),
        }
    except KeyError as error:
        raise StudyError(
            f"The study's manifest has no entry {error}, so its numbers cannot be read; analyze the model again."
        ) from error
    except (TypeError, ValueError, OverflowError) as error:
        raise StudyError(
            f"An entry of the study's manifest is of the wrong kind ({one_line(error)}); analyze the model again."
        ) from error
    for name in _ALWAYS + (_LOOPED if looped else ()):
        if name not in dataset:
            raise StudyError(f"The study has no variable {name!r}, so it is not complete; run its analysis again.")
    if looped and "noise_floor" not in dataset:
        dataset = dataset.assign(noise_floor=xr.full_like(dataset["horizon_drift"], np.nan))
    if found := _from_cosines(dataset):
        dataset = dataset.assign(found)
    whole = dataset["diverged_at"].values < 0
    return StudyView(
        study=study,
        dataset=dataset,
        # The same arrays where that is all of them: a large study would be there twice.
        finite=dataset if whole.all() else dataset.isel(prompt=np.flatnonzero(whole)),
        recurrences=int(dataset.sizes["recurrence"]) if looped else 0,
        **facts,
    )


def without_paths(dataset: xr.Dataset) -> xr.Dataset:
    """Without what is known of each token at each recurrence, which is most of a large study: for whoever chooses
    prompts, of which arrays are copies."""
    paths = {"recurrence", "token"}
    return dataset.drop_vars([name for name in dataset.data_vars if paths <= set(dataset.variables[name].dims)])


def _from_cosines(dataset: xr.Dataset) -> dict[str, xr.DataArray]:
    """The distances that an older study lacks, from its cosines."""
    found = {}
    for distance, cosine in _COSINES.items():
        if distance in dataset or cosine not in dataset:
            continue
        found[distance] = 1 - dataset[cosine]
        if f"{cosine}_quantile" in dataset:
            quantiles = dataset[f"{cosine}_quantile"]
            # The levels lie evenly about the middle, so that the order alone turns round.
            turned = 1 - quantiles.isel(quantile=slice(None, None, -1))
            found[f"{distance}_quantile"] = turned.assign_coords(quantile=quantiles["quantile"])
    return found


def median_over_prompts(array: xr.DataArray, level: float = 0.5) -> xr.DataArray:
    """Median (or another quantile) of what is finite; NaN where nothing is."""
    return quantile_over(array, level, "prompt")


def quantile_over(array: xr.DataArray, level: float, dim: str) -> xr.DataArray:
    """Quantile, along a dimension, of what is finite; NaN where nothing is."""

    def quantile(values: NDArray[Any], axis: int) -> NDArray[np.floating]:
        values = np.where(np.isfinite(values), values, np.nan)
        levels = np.asarray([level])  # as an array, it makes the result one of doubles
        found = np.asarray(np.quantile(values, levels, axis)[0])
        empty, gaps = np.isnan(values).all(axis), np.isnan(values).any(axis)
        if (some := gaps & ~empty).any():
            # One slice after another, which is slow: only of those that need it.
            found[some] = np.nanquantile(np.moveaxis(values, axis, -1)[some], levels, -1)[0]
        # `nanquantile` of everything would give the dtype of the first slice's result.
        return found.astype(values.dtype) if np.ravel(empty)[0] else found

    return array.reduce(quantile, dim)


def sites_of(dataset: xr.Dataset, dim: str = "depth") -> list[Site]:
    """The visits of the dimension `depth`, or of those whose maps are kept (`map`), in order."""
    columns = (dataset.variables[f"{dim}_{name}"].values for name in Site._fields)
    return [Site(cast(Stage, str(stage)), int(layer), int(place)) for stage, layer, place in zip(*columns, strict=True)]


def powers_of_two(total: int) -> list[int]:
    """1, 2, 4 and so on up to a number, and that number."""
    powers = [2**exponent for exponent in range(total.bit_length()) if 2**exponent <= total]
    return powers if powers[-1] == total else [*powers, total]
