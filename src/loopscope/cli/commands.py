"""What the commands take, and what they do with it. Heavy imports are inside: a help text must not wait for torch."""

from __future__ import annotations

import gc
import re
import signal
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import tyro

import loopscope
from loopscope._util.ranges import Processes, check_ranges
from loopscope.analysis.settings import (
    AnalyzeSettings,
    MachineSettings,
    MeasureSettings,
    Preset,
    PromptSettings,
    RunSettings,
)
from loopscope.answers.comparison.settings import CompareSettings
from loopscope.cli.behaviour import Calibrate, JudgeTrajectories
from loopscope.cli.control import ControlTokens
from loopscope.cli.evaluate import Evaluate
from loopscope.cli.experiment import EXPERIMENTS, GridCommand
from loopscope.cli.generate import ExitRules, Generate
from loopscope.cli.parsing import Commands, parse
from loopscope.cli.patching import PatchStates
from loopscope.cli.rates import CountRates
from loopscope.errors import ConfigError
from loopscope.models.inspection.facts import RunSize


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """How the answers of a study are shown."""

    verbose: bool = False
    """Show each answer in sentences with its numbers, instead of one line."""
    json: bool = False
    """Print JSON, for programs."""
    open: bool = False
    """Open the report in a browser."""


@dataclass(frozen=True, kw_only=True)
class Analyze(_Shown):
    """Run prompts through a model and measure how each layer's state settles.

    Writes a study to --out: arrays (study.nc), manifest.json, tokens.jsonl and report.html. To resume an interrupted
    run, give the same command again with its --out.
    """

    model: tyro.conf.Positional[str]
    """A shipped model such as demo:injected, a checkpoint folder, or a model of the Hugging Face hub such as
    organisation/model."""
    prompt: PromptSettings
    run_: Annotated[RunSettings, tyro.conf.arg(name="run")]
    machine: MachineSettings
    measure: MeasureSettings
    out: Path | None = None
    """Folder for the study; default: runs/MODEL-TIME."""
    preset: Preset = "standard"
    """What is measured unless options say otherwise. quick: convergence, readout, and verdicts of the last layer; costs
    1.8 times a bare run to twice the horizon on the shipped models. standard: 3.2 times. full: also larger attention
    maps, supports of attention, neurons of large models and eigenvalues of hooked ones; 4 times, and more with neurons
    and hooked eigenvalues. Options override the preset; --skip leaves out more."""
    report: bool = True
    """Also write report.html."""
    given: tyro.conf.Suppress[tuple[str, ...]] = ()
    """The command line, to tell an option that was given from its default."""

    @property
    def settings(self) -> AnalyzeSettings:
        """Those of the preset, overridden by the command line."""
        parts = (self.prompt, self.run_, self.machine, self.measure)
        flags = {argument.partition("=")[0].replace("_", "-").replace("--no-", "--") for argument in self.given}
        options = {name: value for part in parts for name, value in vars(part).items()}
        changes = {name: value for name, value in options.items() if f"--{name.replace('_', '-')}" in flags}
        return AnalyzeSettings.preset(self.preset, **changes)

    def run(self) -> None:
        # What is imported stays, and looking for garbage in it took a sixth of a short analysis.
        gc.disable()
        from loopscope._util.estimate import Phase
        from loopscope._util.progress import ProgressBar
        from loopscope.analysis.analyzing import analyze
        from loopscope.answers.quick import quick_answers
        from loopscope.cli.answered import say_study
        from loopscope.cli.console import REPORT_SECONDS
        from loopscope.report.page.write import write_report

        gc.freeze()
        gc.enable()
        settings = self.settings
        name = re.sub(r"[^\w.]+", "-", Path(self.model).name)
        out = self.out or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        last = (Phase("report", 1, seconds=REPORT_SECONDS),) if self.report else ()
        try:
            with ProgressBar("loading", last=last) as progress:
                study = analyze(self.model, out=out, settings=settings, progress=progress)
                answers = quick_answers(study)
                report = write_report(study, out / "report.html", answers=answers) if self.report else None
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the same command with --out {out} resumes it") from None
        say_study(answers, out, report, verbose=self.verbose, json=self.json, open=self.open)


@dataclass(frozen=True, kw_only=True)
class Show(_Shown):
    """Show the answers of a study."""

    study: tyro.conf.Positional[Path]
    """The --out folder of an analysis."""

    def run(self) -> None:
        from loopscope.answers.quick import quick_answers
        from loopscope.cli.answered import say_study
        from loopscope.study import Study

        answers, report = quick_answers(Study.load(self.study)), self.study / "report.html"
        there = report if report.is_file() else None
        say_study(answers, self.study, there, verbose=self.verbose, json=self.json, open=self.open)


@dataclass(frozen=True)
class Report:
    """Draw the HTML report of a study."""

    study: tyro.conf.Positional[Path]
    """The --out folder of an analysis."""
    out: Path | None = None
    """File to write; default: report.html in the study's folder."""

    def run(self) -> None:
        from loopscope.cli.console import say_path
        from loopscope.report.page.write import write_report
        from loopscope.study import Study

        say_path("report", write_report(Study.load(self.study), self.out or self.study / "report.html"))


@dataclass(frozen=True)
class Compare:
    """Compare the answers of studies, and ask whether their stages of inference are alike.

    Several models or checkpoints, looped or feed-forward, or one model on several data sets or with several settings.
    Writes a comparison to --out: report.html, the table of answers (answers.csv, answers.tex), arrays (comparison.nc)
    and comparison.json.
    """

    studies: tyro.conf.Positional[tuple[Path, ...]]
    """The --out folders of two or more analyses."""
    out: Path
    """Folder for the comparison; if the name ends in .html, only the report is written there."""
    settings: Annotated[CompareSettings, tyro.conf.arg(name="")]
    reference: str | None = None
    """Folder or name of the study that the others are compared with; default: the first feed-forward one, or else the
    first."""

    def run(self) -> None:
        from loopscope._util.files import write_atomically
        from loopscope.answers.comparison.comparing import compare
        from loopscope.answers.comparison.findings import comparison_answers
        from loopscope.answers.comparison.side_by_side import side_by_side
        from loopscope.cli.console import say_answers, say_path, say_table
        from loopscope.report.page.write import write_comparison

        comparison = compare(self.studies, reference=self.reference, settings=self.settings)
        side = side_by_side(comparison)
        alone = self.out.suffix.lower() in (".html", ".htm")
        if not alone:
            comparison = comparison.save(self.out)
            write_atomically(self.out / "answers.csv", side.to_csv().encode())
            write_atomically(self.out / "answers.tex", side.to_latex().encode())
        path = write_comparison(comparison, self.out if alone else self.out / "report.html")
        say_table(side.table)
        say_answers(comparison_answers(comparison))
        say_path("report", path)


@dataclass(frozen=True)
class Figures:
    """Write paper figures of studies, a comparison, experiments or evaluations, as PDF, SVG or PNG, with captions
    (figures.json).

    Writes every figure that a study supports, and lists those left out with the reason. For several studies, also
    writes the figures that compare them. Needs matplotlib: pip install 'loopscope[figures]'.
    """

    studies: tyro.conf.Positional[tuple[Path, ...]]
    """The --out folders of analyses, of a comparison, a patching, experiments or evaluate."""
    out: Path
    """Folder for the figures; with several studies each gets its own folder inside."""
    format: tuple[Literal["pdf", "svg", "png"], ...] = ("pdf",)
    """One or several formats."""
    width: Literal["auto", "single", "double"] | float = "auto"
    """One column (3.25 inches), two columns (6.75 inches), a number of inches, or what each figure's panels need."""
    only: tuple[str, ...] = ()
    """Names of figures, such as step-by-layer, instead of all; docs/figures.md lists them, and so does the error for an
    unknown name."""

    def run(self) -> None:
        # First, so that a missing matplotlib is said before torch is imported.
        from loopscope.report.figures.write import CAPTIONS, write_figures

        from loopscope.cli.console import say  # isort: skip

        for found in write_figures(self.studies, self.out, formats=self.format, width=self.width, only=self.only):
            for reason in dict.fromkeys(found.left_out.values()):
                names = [name for name, why in found.left_out.items() if why == reason]
                say(f"left out  {', '.join(names)}: {reason}")
            say(f"figures  {len(found.files)}, with their captions in {found.folder / CAPTIONS}")


@dataclass(frozen=True)
class Export:
    """Write the arrays of studies as tables: tokens, readouts, visits, heads, prompts, and one row per study.

    Writes csv, parquet, or a folder that the Hugging Face hub accepts as a data set, with tables, manifests and a card.
    """

    studies: tyro.conf.Positional[tuple[Path, ...]]
    """The --out folders of analyses."""
    out: Path
    """Folder for the tables."""
    to: Literal["csv", "parquet", "hub-folder"] = "parquet"
    """parquet needs pyarrow: pip install 'loopscope[hub]'."""
    licence: str = "unknown"
    """Licence of the data set in the card of a hub-folder: an identifier of the hub such as mit or cc-by-4.0."""

    def run(self) -> None:
        from loopscope.cli.console import say_path
        from loopscope.report.exported import write_export
        from loopscope.study import Study

        studies = [Study.load(folder) for folder in self.studies]
        say_path("export", write_export(studies, self.out, to=self.to, licence=self.licence))


@dataclass(frozen=True)
class Train:
    """Train a model from a configuration; the same command resumes an interrupted run."""

    config: tyro.conf.Positional[Path]
    """A JSON file: architecture, data, optimiser, recurrences. The shipped models' are in loopscope/demo/configs."""
    out: Path
    """Folder for the checkpoint, the tokenizer and the log."""
    train_data: Path | None = None
    """Training text, instead of the configuration's."""
    test_data: Path | None = None
    """Held-out text, instead of the configuration's."""
    threads: Processes | None = None
    """CPU threads; default: torch's choice."""
    device: str = "cpu"
    """A torch device."""

    def __post_init__(self) -> None:
        check_ranges(self, "--")

    def run(self) -> None:
        from loopscope.cli.console import say_path
        from loopscope.experiments.training.config import TrainConfig
        from loopscope.experiments.training.data import DataFiles
        from loopscope.experiments.training.loop import train

        config = TrainConfig.load(self.config)
        data = DataFiles.of(config.data, self.config.parent, train=self.train_data, test=self.test_data)
        result = train(config, self.out, data, threads=self.threads, device=self.device)
        if result.stopped_by is not None:
            signal.raise_signal(result.stopped_by)  # answered as in any other command
        say_path("model", result.folder)


@dataclass(frozen=True)
class Inspect:
    """Show what models are and what it takes to run them, without loading them.

    Reads config.json, the tokenizer's files and the headers of the tensors; nothing else of a model on the hub is
    downloaded. Several models are compared: layout, norms, injection, initial state, the token that begins a text.
    """

    models: tyro.conf.Positional[tuple[str, ...]]
    """Shipped models such as demo:injected, checkpoint folders, or models of the Hugging Face hub such as
    organisation/model."""
    run_size: Annotated[RunSize, tyro.conf.arg(name="")]
    revision: str | None = None
    """Branch, tag or commit of a model on the Hugging Face hub."""
    ignore_config: tuple[str, ...] = ()
    """Ignore a field of config.json that loopscope does not know. Repeat for several."""
    device: str = "auto"
    """A torch device, for --device-map."""
    device_map: str | None = None
    """Show where layers would go on this machine: auto, or places by layers as in analyze."""
    json: bool = False
    """Print JSON, for programs: one object, or a list of objects for several models."""

    def run(self) -> None:
        from loopscope.analysis.memory import foresee
        from loopscope.cli.inspection import say_inspection, say_inspections, say_json
        from loopscope.models.inspection.inspecting import inspect_model

        if not self.models:
            raise ConfigError("No model was given; name one such as demo:injected, or a checkpoint folder.")
        if self.revision is not None and len(self.models) > 1:
            raise ConfigError("--revision is of one model; inspect the models of several revisions one by one.")
        if self.ignore_config and len(self.models) > 1:
            raise ConfigError("--ignore-config is of one model; inspect such models one by one.")
        found = [
            inspect_model(
                model,
                revision=self.revision,
                run=self.run_size,
                ignore_config=self.ignore_config,
                device=self.device,
                device_map=self.device_map,
            )
            for model in self.models
        ]
        if len(found) > 1 and not self.json:
            say_inspections(found)
            return
        foreseen = [foresee(inspection) for inspection in found]
        if self.json:
            say_json(found, foreseen)
        else:
            say_inspection(found[0], foreseen[0])


@dataclass(frozen=True)
class Models:
    """List the shipped models, and the families of checkpoints that loopscope reads."""

    def run(self) -> None:
        from loopscope.cli.console import say_models

        say_models()


COMMANDS: Commands = {
    "analyze": Analyze,
    "show": Show,
    "report": Report,
    "compare": Compare,
    "rates": CountRates,
    "figures": Figures,
    "export": Export,
    "control": ControlTokens,
    "patch": PatchStates,
    "generate": Generate,
    "exits": ExitRules,
    "behaviour": JudgeTrajectories,
    "calibrate": Calibrate,
    "experiment": EXPERIMENTS,
    "train": Train,
    "evaluate": Evaluate,
    "inspect": Inspect,
    "models": Models,
}
_RESUMED = (ControlTokens, Train, GridCommand)
"""What goes on in its --out folder where it was interrupted; so does `Analyze`, which may have chosen it itself."""


def parse_and_run(arguments: list[str]) -> None:
    """Parse a command line and run its command. Raises `ConfigError` for one that cannot be understood."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{argument!r} is not UTF-8 text; give files other names.") from None
    if arguments == ["--version"]:
        print(f"loopscope {loopscope.__version__}")
        return
    command = parse(COMMANDS, arguments)
    if isinstance(command, Analyze):
        command = replace(command, given=tuple(arguments))
    if command is not None:
        try:
            command.run()
        except KeyboardInterrupt as stopped:
            if isinstance(command, _RESUMED) and not str(stopped):
                raise KeyboardInterrupt("the same command resumes it") from None
            raise
