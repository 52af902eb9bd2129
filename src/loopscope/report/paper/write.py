"""From studies and comparisons to files: every figure that can be drawn, and figures.json with their captions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from loopscope._util.files import write_atomically
from loopscope.answers.comparison.comparing import compare
from loopscope.answers.comparison.result import COMPARISON_MANIFEST, Comparison
from loopscope.errors import ConfigError, StudyError
from loopscope.report.paper.captions import comparison_subject, study_subject
from loopscope.report.paper.kinds import FigureType, S
from loopscope.report.paper.of_comparison import COMPARISON_FIGURES
from loopscope.report.paper.of_study import STUDY_FIGURES
from loopscope.report.paper.style import FORMATS, Format, Width, file_of, inches
from loopscope.study import Study, read_study

CAPTIONS = "figures.json"

Source = Study | Comparison | str | Path


@dataclass(frozen=True, kw_only=True)
class FigureSet:
    """The figures of one study or comparison, written to one folder."""

    folder: Path
    files: Mapping[str, tuple[Path, ...]]
    """By the name of the figure, one per format."""
    left_out: Mapping[str, str]
    """Figures that could not be drawn, and why."""


def figure_names() -> list[str]:
    """The names of all types of figures."""
    return [*_names(STUDY_FIGURES), *_names(COMPARISON_FIGURES)]


def write_figures(
    sources: Source | Sequence[Source],
    out: str | Path,
    *,
    formats: Sequence[Format] = ("pdf",),
    width: Width = "auto",
    only: Sequence[str] = (),
) -> list[FigureSet]:
    """Draw every figure that the sources can support, or those that `only` names, and write them to `out`.

    A source is a study, a comparison, or the folder of one. Of several, each gets a folder of its own inside `out`, and
    what puts studies side by side lies in `out` itself. Beside the figures, `figures.json` holds their captions, what
    they were drawn from, and what was left out for which reason. `width` is `single` or `double` (the columns of a
    paper), inches, or what each figure needs. Files that exist are replaced, each whole or not at all; the same study
    gives the same bytes.

    Raises `ConfigError` for a name, a format or a width that there is not, `StudyError` for a folder that cannot be
    used and where nothing could be drawn at all, `StorageError` if a file cannot be written.
    """
    _check(formats, width, only)
    given = [sources] if isinstance(sources, Study | Comparison | str | Path) else list(sources)
    if not given:
        raise StudyError("There is nothing to draw; give the folder of a study or of a comparison.")
    plans = _plans([_load(source) for source in given], Path(out), set(only))
    if not any(plan.drawings for plan in plans):
        reasons = sorted({f"{name}: {reason}" for plan in plans for name, reason in plan.left_out.items()})
        raise StudyError(f"None of the figures can be drawn ({'; '.join(reasons)}).")
    asked = [plan for plan in plans if plan.drawings or plan.left_out]
    return [_write(plan, tuple(dict.fromkeys(formats)), width) for plan in asked]


def _names(kinds: Sequence[FigureType[S]]) -> list[str]:
    return [kind.name for kind in kinds]


def _check(formats: Sequence[Format], width: Width, only: Sequence[str]) -> None:
    unknown = [name for name in only if name not in figure_names()]
    if unknown:
        raise ConfigError(f"There is no figure {unknown[0]!r}; there are {', '.join(figure_names())}.")
    strange = [name for name in formats if name not in FORMATS]
    if strange or not formats:
        found = repr(strange[0]) if strange else "none"
        raise ConfigError(f"The format of a figure must be one of {', '.join(FORMATS)}, got {found}.")
    inches(width, 1)


def _load(source: Source) -> Study | Comparison:
    if isinstance(source, Study | Comparison):
        return source
    folder = Path(source)
    return Comparison.load(folder) if (folder / COMPARISON_MANIFEST).is_file() else Study.load(folder)


def _folder_names(sources: Sequence[Study | Comparison]) -> list[str]:
    """A name for each, of its folder or model, with characters that every file system takes; repeats are numbered."""
    names: list[str] = []
    for source in sources:
        whole = source.folder.resolve().name if source.folder is not None else _called(source)
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", whole).strip(".-")[:60] or "study"
        taken = {name.casefold() for name in names}
        repeats = (f"{plain}-{number}" for number in range(2, len(sources) + 2))
        names.append(plain if plain.casefold() not in taken else next(n for n in repeats if n.casefold() not in taken))
    return names


def _called(source: Study | Comparison) -> str:
    return str(source.manifest["model"]["name"]) if isinstance(source, Study) else "comparison"


@dataclass(frozen=True, kw_only=True)
class _Drawing:
    """A figure that can be drawn."""

    draw: Callable[[Width], Figure]
    caption: str
    variables: tuple[str, ...]
    paper: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What goes into one folder."""

    folder: Path
    drawn_from: Mapping[str, Any]
    drawings: Mapping[str, _Drawing]
    left_out: Mapping[str, str]


def _plans(sources: Sequence[Study | Comparison], out: Path, only: set[str]) -> list[_Plan]:
    """A folder for each source, or `out` for the only one, and `out` for several studies side by side."""
    alone = len(sources) == 1
    folders = [out] if alone else [out / name for name in _folder_names(sources)]
    plans = [_plan(source, folder, only, alone=alone) for source, folder in zip(sources, folders, strict=True)]
    studies = [source for source in sources if isinstance(source, Study)]
    if len(studies) > 1:
        plans.append(_plan_side_by_side(studies, out, only))
    return plans


def _plan(source: Study | Comparison, folder: Path, only: set[str], *, alone: bool) -> _Plan:
    if isinstance(source, Comparison):
        about = {"kind": "comparison", "studies": source.labels, "reference": source.reference}
        drawings, left_out = _drawings(COMPARISON_FIGURES, source, comparison_subject(source), only)
        elsewhere, needed = _names(STUDY_FIGURES), "it is drawn from a study; give the folder of one"
    else:
        readings, model = read_study(source), source.manifest["model"]
        about = {
            "kind": "study",
            "model": model["name"],
            "weights_sha256": model.get("weights_sha256"),
            "prompts_sha256": source.manifest.get("prompts", {}).get("sha256"),
        }
        drawings, left_out = _drawings(STUDY_FIGURES, readings, study_subject(readings), only)
        elsewhere, needed = _names(COMPARISON_FIGURES), "it puts studies side by side; give several, or a comparison"
    if alone:
        left_out |= {name: needed for name in elsewhere if name in only}
    return _Plan(folder=folder, drawn_from=about, drawings=drawings, left_out=left_out)


def _plan_side_by_side(studies: Sequence[Study], folder: Path, only: set[str]) -> _Plan:
    """Of studies that can be compared; where they cannot, the reason stands for every figure."""
    try:
        return _plan(compare(studies), folder, only, alone=False)
    except StudyError as error:
        left_out = {name: str(error) for name in _names(COMPARISON_FIGURES) if not only or name in only}
        return _Plan(folder=folder, drawn_from={"kind": "comparison"}, drawings={}, left_out=left_out)


def _drawings(
    kinds: Sequence[FigureType[S]], source: S, subject: str, only: set[str]
) -> tuple[dict[str, _Drawing], dict[str, str]]:
    """What can be drawn of the figures asked for, and why the rest cannot, by name."""
    drawings, left_out = {}, {}
    for kind in kinds:
        if only and kind.name not in only:
            continue
        if reason := kind.absent(source):
            left_out[kind.name] = reason
        else:
            drawings[kind.name] = _Drawing(
                draw=partial(kind.draw, source),
                caption=f"{kind.words(source)} {subject}",
                variables=kind.variables,
                paper=kind.paper,
            )
    return drawings, left_out


def _write(plan: _Plan, formats: tuple[Format, ...], width: Width) -> FigureSet:
    files = {}
    for name, drawing in plan.drawings.items():
        figure = drawing.draw(width)
        files[name] = tuple(plan.folder / f"{name}.{format}" for format in formats)
        for path, format in zip(files[name], formats, strict=True):
            write_atomically(path, file_of(figure, format))
    content = {
        "drawn_from": plan.drawn_from,
        "drawn_with": {name: version(name) for name in ("loopscope", "matplotlib")},
        "paper": "arXiv 2604.11791",
        "figures": [
            {
                "name": name,
                "files": [path.name for path in files[name]],
                "caption": drawing.caption,
                "variables": list(drawing.variables),
                "paper_figures": list(drawing.paper),
            }
            for name, drawing in plan.drawings.items()
        ],
        "left_out": [{"name": name, "reason": reason} for name, reason in plan.left_out.items()],
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(plan.folder / CAPTIONS, text.encode())
    return FigureSet(folder=plan.folder, files=files, left_out=dict(plan.left_out))
