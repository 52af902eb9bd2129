"""From studies, comparisons, experiments and evaluations to files: every figure that can be drawn, and figures.json
with their captions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from loopscope._util.files import write_atomically
from loopscope._util.hub import require
from loopscope._util.wording import plural, visible
from loopscope.answers.comparison.comparing import compare
from loopscope.answers.comparison.result import COMPARISON_FILE, Comparison
from loopscope.answers.patching import PATCHING_FILE, Patching
from loopscope.errors import ConfigError, StudyError
from loopscope.evaluation.result import CURVE, Evaluation
from loopscope.experiments.cells import GRID_FILE
from loopscope.experiments.load import Experiment, load_experiment
from loopscope.report.figures.accuracy import accuracy_left_out, accuracy_plots
from loopscope.report.figures.comparison import COMPARED
from loopscope.report.figures.convergence import CONVERGENCE
from loopscope.report.figures.eigenvalues import STABILITY
from loopscope.report.figures.experiments import experiment_sections
from loopscope.report.figures.heads import HEADS
from loopscope.report.figures.maps import MAPS
from loopscope.report.figures.patching import patching_plot
from loopscope.report.figures.plot import FigureType, Plot, S
from loopscope.report.figures.predictions import PREDICTIONS
from loopscope.report.figures.readout import READOUT
from loopscope.report.figures.similarity import SIMILARITY
from loopscope.report.figures.stages import STAGES
from loopscope.report.figures.tokens import TOKENS
from loopscope.report.figures.trajectories import TRAJECTORIES
from loopscope.report.figures.verdicts import VERDICTS
from loopscope.report.settings import ReportSettings
from loopscope.study import Study, StudyView, view_study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from loopscope.report.figures.in_matplotlib import Format, Width

CAPTIONS = "figures.json"

Source = Study | Comparison | Patching | Experiment | Evaluation | str | Path

STUDY_FIGURES: tuple[FigureType[StudyView], ...] = (
    *CONVERGENCE,
    *SIMILARITY,
    *HEADS,
    *MAPS,
    *STAGES,
    *TRAJECTORIES,
    *READOUT,
    *PREDICTIONS,
    TOKENS,
    *VERDICTS,
    *STABILITY,
)
COMPARISON_FIGURES = COMPARED

_Loaded = Study | Comparison | Patching | Experiment | Evaluation

_PATCHING = "patching"
_LONGEST = 80
"""Characters of a name from outside."""


@dataclass(frozen=True, kw_only=True)
class FigureSet:
    """The figures of one study or comparison, written to one folder."""

    folder: Path
    files: Mapping[str, tuple[Path, ...]]
    """By the name of the figure, one per format."""
    left_out: Mapping[str, str]
    """Figures that could not be drawn, and why."""


def figure_names() -> list[str]:
    """The names of all types of figures, but for those of experiments and evaluations, which depend on what was run."""
    return [*_names(STUDY_FIGURES), *_names(COMPARISON_FIGURES), _PATCHING]


def draw_figure(source: Source, name: str, width: Width = "auto", settings: ReportSettings | None = None) -> Figure:
    """One figure of a study, a comparison, an experiment, an evaluation or the folder of one, as a matplotlib figure to
    adjust by hand; `file_of` gives the content of its file.

    Raises `ConfigError` for an unknown name or width, `StudyError` where the figure cannot be drawn from the source.
    """
    renderer, loaded = _renderer(), _load(source)
    _check_names([name], [loaded])
    plan = _plan(loaded, Path(), {name}, settings or ReportSettings(), alone=True)
    if name not in plan.drawings:
        raise StudyError(f"The figure {name} cannot be drawn: {plan.left_out[name]}.")
    plot = plan.drawings[name]()
    figure: Figure = renderer.draw(plot, width)
    return figure


def file_of(figure: Figure, format: Format) -> bytes:
    """A figure as the content of a file, the same bytes for the same figure: without date, with fonts embedded.

    Raises `ConfigError` for an unknown format.
    """
    content: bytes = _renderer().file_of(figure, format)
    return content


def write_figures(
    sources: Source | Sequence[Source],
    out: str | Path,
    *,
    formats: Sequence[Format] = ("pdf",),
    width: Width = "auto",
    only: Sequence[str] = (),
    settings: ReportSettings | None = None,
) -> list[FigureSet]:
    """Draw every figure that the sources can support, or those that `only` names, and write them to `out`.

    A source is a study, a comparison, a patching, an experiment, an evaluation, or the folder of one. Of several, each
    gets a folder of its own inside `out`, and what puts studies side by side lies in `out` itself. Beside the figures,
    `figures.json` holds their captions, what they were drawn from, and what was left out for which reason. `width` is
    `single` or `double` (the columns of a paper), inches, or what each figure needs; `settings` are those of a report.
    Files that exist are replaced, each whole or not at all; the same study gives the same bytes.

    Raises `ConfigError` for an unknown name, format or width, `StudyError` for a folder that cannot be used and where
    nothing could be drawn at all, `StorageError` if a file cannot be written.
    """
    _check(formats, width)
    given = [sources] if isinstance(sources, Source) else list(sources)
    if not given:
        raise StudyError(
            "There is nothing to draw; give the folder of a study, a comparison, an experiment or an evaluation."
        )
    loaded = [_load(source) for source in given]
    _check_names(only, loaded)
    plans = _plans(loaded, Path(out), set(only), settings or ReportSettings())
    if not any(plan.drawings for plan in plans):
        reasons = sorted({f"{name}: {reason}" for plan in plans for name, reason in plan.left_out.items()})
        raise StudyError(f"None of the figures can be drawn ({'; '.join(reasons) or 'none of them has data'}).")
    asked = [plan for plan in plans if plan.drawings or plan.left_out]
    return [_write(plan, tuple(dict.fromkeys(formats)), width) for plan in asked]


def study_subject(view: StudyView) -> str:
    """For a caption: model, dtype, prompts and horizon, and what is unusual about them."""
    model, source = view.manifest["model"], view.manifest.get("prompts", {}).get("source")
    facts = [f"Model {visible(str(model['name']), _LONGEST)}, {view.layout}"]
    if view.looped:
        facts.append(f"injection {view.injection}")
    facts.append(f"run in {view.dtype}")
    named = f" from {visible(str(source), _LONGEST)}" if source else ""
    sentences = [
        f"{', '.join(facts)}.",
        f"{plural(view.prompts, 'prompt')}{named}, {plural(view.tokens, 'token')}.",
    ]
    if view.looped:
        trained = "an unknown number" if view.trained is None else plural(view.trained, "recurrence")
        sentences.append(
            f"{plural(view.recurrences, 'recurrence')} measured, horizon H = {view.horizon}; trained with {trained}."
        )
    if view.interventions:
        sentences.append(f"The model was changed while it ran: {', '.join(view.interventions)}.")
    if view.diverged:
        sentences.append(
            "All prompts diverged; what is drawn is finite."
            if view.diverged == view.prompts
            else f"{plural(view.diverged, 'prompt')} of {view.prompts} diverged and left out."
        )
    return " ".join(sentences)


def comparison_subject(comparison: Comparison) -> str:
    """For a caption: the studies, and which of them is the reference."""
    studies = [
        _compared(label, study, reference=label == comparison.reference) for label, study in comparison.studies.items()
    ]
    return f"Medians over prompts. Studies: {'; '.join(studies)}."


def _compared(label: str, study: Mapping[str, Any], *, reference: bool) -> str:
    layout, prompts = study["layout"], study["prompts"]
    shape = f"({layout['prelude']}, {layout['recurrent']} ⊗ R, {layout['coda']})"
    facts = [shape if study["recurrences"] else f"{sum(layout.values())} layers, feed-forward"]
    if study["judged_at"]:
        facts.append(f"judged at recurrence {study['judged_at']} of {study['recurrences']}")
    facts.append(f"run in {study['dtype']}")
    nouns = {"count": "prompt", "tokens": "token"}
    facts += [plural(int(prompts[name]), noun) for name, noun in nouns.items() if prompts.get(name) is not None]
    if study["diverged_prompts"]:
        facts.append(f"{plural(study['diverged_prompts'], 'diverged prompt')} left out")
    return f"{visible(label, _LONGEST)}{' (reference)' if reference else ''}: {', '.join(facts)}"


def _renderer() -> ModuleType:
    """`in_matplotlib`, which needs an extra. Raises `MissingDependencyError` without it."""
    require("matplotlib", "Drawing paper figures", extra="figures")
    return import_module("loopscope.report.figures.in_matplotlib")


def _names(types: Sequence[FigureType[S]]) -> list[str]:
    return [each.name for each in types]


def _check_names(only: Sequence[str], sources: Sequence[_Loaded]) -> None:
    others = [each for each in sources if isinstance(each, Experiment | Evaluation)]
    known = [*figure_names(), *(name for each in others for name in _own_figures(each))]
    known += [name for each in others if isinstance(each, Evaluation) for name in accuracy_left_out(each)]
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ConfigError(f"There is no figure {unknown[0]!r}; there are {', '.join(known)}.")


def _check(formats: Sequence[Format], width: Width) -> None:
    renderer = _renderer()
    strange = [name for name in formats if name not in renderer.FORMATS]
    if strange or not formats:
        found = repr(strange[0]) if strange else "none"
        raise ConfigError(f"The format of a figure must be one of {', '.join(renderer.FORMATS)}, got {found}.")
    renderer.inches(width, 1)


def _load(source: Source) -> _Loaded:
    if isinstance(source, _Loaded):
        return source
    folder = Path(source)
    if (folder / GRID_FILE).is_file():
        return load_experiment(folder)
    if (folder / CURVE).is_file():
        return Evaluation.load(folder)
    if (folder / PATCHING_FILE).is_file():
        return Patching.load(folder)
    return Comparison.load(folder) if (folder / COMPARISON_FILE).is_file() else Study.load(folder)


def _own_figures(source: Experiment | Evaluation) -> dict[str, Plot]:
    """Of what was run or asked, which decides what there is to draw."""
    if isinstance(source, Evaluation):
        return accuracy_plots(source)
    figures = [figure for section in experiment_sections(source) for figure in section.figures]
    return {figure.anchor: figure for figure in figures if isinstance(figure, Plot) and figure.has_data}


def _folder_names(sources: Sequence[_Loaded]) -> list[str]:
    """A name for each, of its folder or model, with characters that every file system takes; repeats are numbered."""
    names: list[str] = []
    for source in sources:
        called = "comparison"
        if isinstance(source, Study | Patching):
            called = str(source.manifest["model"]["name"])
        called = source.model if isinstance(source, Evaluation) else called
        folder = None if isinstance(source, Evaluation) else source.folder
        whole = folder.resolve().name if folder is not None else called
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", whole).strip(".-")[:60] or "study"
        taken = {name.casefold() for name in names}
        repeats = (f"{plain}-{number}" for number in range(2, len(sources) + 2))
        names.append(plain if plain.casefold() not in taken else next(n for n in repeats if n.casefold() not in taken))
    return names


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What goes into one folder."""

    folder: Path
    drawn_from: Mapping[str, Any]
    subject: str
    drawings: Mapping[str, Callable[[], Plot]]
    left_out: Mapping[str, str]


def _plans(sources: Sequence[_Loaded], out: Path, only: set[str], settings: ReportSettings) -> list[_Plan]:
    """A folder for each source, or `out` for the only one, and `out` for several studies side by side."""
    alone = len(sources) == 1
    folders = [out] if alone else [out / name for name in _folder_names(sources)]
    plans = [
        _plan(source, folder, only, settings, alone=alone) for source, folder in zip(sources, folders, strict=True)
    ]
    studies = [source for source in sources if isinstance(source, Study)]
    if len(studies) > 1:
        plans.append(_plan_side_by_side(studies, out, only, settings))
    return plans


def _plan(source: _Loaded, folder: Path, only: set[str], settings: ReportSettings, *, alone: bool) -> _Plan:
    about: dict[str, Any]
    if isinstance(source, Experiment | Evaluation):
        if isinstance(source, Evaluation):
            about = {"kind": "evaluation", "model": source.model, "weights_sha256": source.weights_sha256}
            subject = f"{source.model}, {source.dtype}."
        else:
            models = len(source.cells) + len(source.trained)
            about = {"kind": "experiment", "experiment": source.kind, "models": models}
            subject = f"{plural(models, 'model')} of the experiment {source.kind}."
        found = _own_figures(source)
        asked = [name for name in found if not only or name in only]
        drawings: dict[str, Callable[[], Plot]] = {name: partial(found.__getitem__, name) for name in asked}
        none = accuracy_left_out(source) if isinstance(source, Evaluation) else {}
        left_out = {name: why for name, why in none.items() if not only or name in only}
    elif isinstance(source, Patching):
        model, pairs = source.manifest["model"], len(source.manifest["pairs"])
        about = {"kind": "patching", "model": model["name"], "weights_sha256": model["weights_sha256"]}
        subject = f"Model {visible(str(model['name']), _LONGEST)}, run in {model['dtype']}; {plural(pairs, 'pair')}."
        wanted = not only or _PATCHING in only
        drawings = {_PATCHING: partial(patching_plot, source)} if wanted else {}
        left_out = {}
    elif isinstance(source, Comparison):
        about = {"kind": "comparison", "studies": source.labels, "reference": source.reference}
        subject = comparison_subject(source)
        drawings, left_out = _drawings(COMPARISON_FIGURES, source, only, settings)
    else:
        view, model = view_study(source), source.manifest["model"]
        about = {
            "kind": "study",
            "model": model["name"],
            "weights_sha256": model.get("weights_sha256"),
            "prompts_sha256": source.manifest.get("prompts", {}).get("sha256"),
        }
        subject = study_subject(view)
        drawings, left_out = _drawings(STUDY_FIGURES, view, only, settings)
    if alone:
        elsewhere = {
            **dict.fromkeys(_names(STUDY_FIGURES), "it is drawn from a study; give the folder of one"),
            **dict.fromkeys(_names(COMPARISON_FIGURES), "it puts studies side by side; give several, or a comparison"),
            _PATCHING: "it is drawn from a patching; give the folder of one",
        }
        left_out |= {name: why for name, why in elsewhere.items() if name in only - drawings.keys() - left_out.keys()}
    return _Plan(folder=folder, drawn_from=about, subject=subject, drawings=drawings, left_out=left_out)


def _plan_side_by_side(studies: Sequence[Study], folder: Path, only: set[str], settings: ReportSettings) -> _Plan:
    """Of studies that can be compared; where they cannot, the reason stands for every figure."""
    try:
        return _plan(compare(studies), folder, only, settings, alone=False)
    except StudyError as error:
        left_out = {name: str(error) for name in _names(COMPARISON_FIGURES) if not only or name in only}
        return _Plan(folder=folder, drawn_from={"kind": "comparison"}, subject="", drawings={}, left_out=left_out)


def _drawings(
    types: Sequence[FigureType[S]], source: S, only: set[str], settings: ReportSettings
) -> tuple[dict[str, Callable[[], Plot]], dict[str, str]]:
    """What can be drawn of the figures asked for, and why the rest cannot, by name."""
    asked = {each.name: each for each in types if not only or each.name in only}
    left_out = {name: reason for name, each in asked.items() if (reason := each.absent(source))}
    drawn = [each for name, each in asked.items() if name not in left_out]
    return {each.name: partial(each.draw, source, settings) for each in drawn}, left_out


def _write(plan: _Plan, formats: tuple[Format, ...], width: Width) -> FigureSet:
    renderer, files, entries = _renderer(), {}, []
    for name, drawn in plan.drawings.items():
        plot = drawn()
        figure = renderer.draw(plot, width)
        files[name] = tuple(plan.folder / f"{name}.{format}" for format in formats)
        for path, format in zip(files[name], formats, strict=True):
            write_atomically(path, renderer.file_of(figure, format))
        entries.append(
            {
                "name": name,
                "files": [path.name for path in files[name]],
                "caption": " ".join(filter(None, [plot.question, plot.reading, *plot.lines, plan.subject])),
                "variables": list(plot.variables),
                "paper_figures": list(plot.paper),
            }
        )
    content = {
        "drawn_from": plan.drawn_from,
        "drawn_with": {name: version(name) for name in ("loopscope", "matplotlib")},
        "paper": "arXiv 2604.11791",
        "figures": entries,
        "left_out": [{"name": name, "reason": reason} for name, reason in plan.left_out.items()],
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(plan.folder / CAPTIONS, text.encode())
    return FigureSet(folder=plan.folder, files=files, left_out=dict(plan.left_out))
