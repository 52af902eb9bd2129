"""What the commands take, and what they do with it. Heavy imports are inside: a help text must not wait for torch."""

from __future__ import annotations

import io
import signal
import sys
from contextlib import redirect_stderr
from dataclasses import dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal, Protocol, cast

import tyro

from loopscope._util.ranges import Processes, check_ranges
from loopscope.analysis.settings import AnalyzeSettings, Preset
from loopscope.answers.comparison.settings import CompareSettings
from loopscope.cli.behaviour import Calibrate, JudgeTrajectories
from loopscope.cli.control import ControlTokens
from loopscope.cli.experiment import ExperimentCommand
from loopscope.cli.rates import CountRates
from loopscope.errors import ConfigError
from loopscope.models.inspection.facts import RunSize


@dataclass(frozen=True, kw_only=True)
class _AnalyzeSettings(AnalyzeSettings):
    """The same settings, of which one flag may be given several times rather than the last one winning."""

    intervene: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    ignore_config: tyro.conf.UseAppendAction[tuple[str, ...]] = ()


@dataclass(frozen=True)
class Analyze:
    """Run prompts through a model and measure how each layer's state settles.

    Writes a study to --out: arrays (study.nc), manifest.json, tokens.jsonl and report.html. A run that was
    interrupted is resumed when the same command is given again.
    """

    model: tyro.conf.Positional[str]
    """A shipped model such as demo:injected, a checkpoint folder, or a model of the Hugging Face hub such as
    organisation/model."""
    out: Path
    """Folder for the study."""
    settings: Annotated[_AnalyzeSettings, tyro.conf.arg(name="")]
    preset: Preset = "standard"
    """What is measured unless options say otherwise. quick: convergence, readout, and verdicts of the last layer;
    1.7 times a bare run to twice the horizon on the shipped models. standard: 3.1 times where tokens settle, 4.0 where
    they do not. full: larger attention maps too, neurons of large models and eigenvalues of hooked ones; 3.3 and 4.3
    times, and more where these come in. An option wins; --skip leaves out more."""
    report: bool = True
    """Also write report.html."""

    def with_preset(self, arguments: list[str]) -> Analyze:
        """With the settings of the preset but for those that the arguments give."""
        flags = {argument.partition("=")[0].replace("_", "-").replace("--no-", "--") for argument in arguments}
        given = [field.name for field in fields(self.settings) if f"--{field.name.replace('_', '-')}" in flags]
        changes = {name: getattr(self.settings, name) for name in given}
        return replace(self, settings=cast(_AnalyzeSettings, _AnalyzeSettings.preset(self.preset, **changes)))

    def run(self) -> None:
        from loopscope._util.estimate import Phase
        from loopscope._util.progress import ProgressBar
        from loopscope.analysis.analyzing import analyze
        from loopscope.answers.quick import quick_answers
        from loopscope.cli.console import REPORT_SECONDS, say, say_answers
        from loopscope.report.page.write import write_report

        last = (Phase("report", 1, seconds=REPORT_SECONDS),) if self.report else ()
        with ProgressBar("loading", last=last) as progress:
            study = analyze(self.model, out=self.out, settings=self.settings, progress=progress)
            answers = quick_answers(study)
            report = write_report(study, self.out / "report.html", answers=answers) if self.report else None
        say_answers(answers)
        say(f"study  {self.out}" if report is None else f"report  {report}")


@dataclass(frozen=True)
class Report:
    """Draw the HTML report of a study."""

    study: tyro.conf.Positional[Path]
    """The --out folder of an analysis."""
    out: Path | None = None
    """Where to write it; report.html in the study's folder unless given."""

    def run(self) -> None:
        from loopscope.cli.console import say
        from loopscope.report.page.write import write_report
        from loopscope.study import Study

        study = Study.load(self.study)
        say(f"report  {write_report(study, self.out or self.study / 'report.html')}")


@dataclass(frozen=True)
class Compare:
    """Compare studies, looped or feed-forward, on relative depth: are their stages of inference alike?

    Several models, or one model on several data sets. Writes a comparison to --out: arrays (comparison.nc),
    comparison.json and report.html.
    """

    studies: tyro.conf.Positional[tuple[Path, ...]]
    """The --out folders of two or more analyses."""
    out: Path
    """Folder for the comparison; a name that ends in .html gets the report alone."""
    settings: Annotated[CompareSettings, tyro.conf.arg(name="")]
    reference: str | None = None
    """Folder, or name, of the study that the others are compared with; the first feed-forward one unless given, or
    else the first."""

    def run(self) -> None:
        from loopscope.answers.comparison.comparing import compare
        from loopscope.answers.comparison.findings import comparison_answers
        from loopscope.cli.console import say, say_answers
        from loopscope.report.page.write import write_comparison

        comparison = compare(self.studies, reference=self.reference, settings=self.settings)
        alone = self.out.suffix.lower() in (".html", ".htm")
        if not alone:
            comparison = comparison.save(self.out)
        path = write_comparison(comparison, self.out if alone else self.out / "report.html")
        say_answers(comparison_answers(comparison))
        say(f"report  {path}")


@dataclass(frozen=True)
class Figures:
    """Write paper figures of studies, a comparison or experiments, as PDF, SVG or PNG, with captions (figures.json).

    All that a study can support; what is left out is listed with its reason. Of several studies, also the figures that
    put them side by side. Needs matplotlib: pip install 'loopscope[figures]'.
    """

    studies: tyro.conf.Positional[tuple[Path, ...]]
    """The --out folders of analyses, of a comparison, or of experiments."""
    out: Path
    """Folder for the figures; of several studies each gets a folder of its own inside."""
    format: tuple[Literal["pdf", "svg", "png"], ...] = ("pdf",)
    """One or several."""
    width: Literal["auto", "single", "double"] | float = "auto"
    """A column (3.25 inches), two (6.75), inches, or what the panels of each figure need."""
    only: tuple[str, ...] = ()
    """Names of figures, such as step-by-layer, instead of all; docs/figures.md lists them, and so does the answer to an
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
class Train:
    """Train a model from a configuration; the same command resumes a run that was interrupted."""

    config: tyro.conf.Positional[Path]
    """A JSON file: architecture, data, optimiser, recurrences. The shipped models' are in loopscope/demo/configs."""
    out: Path
    """Folder for the checkpoint, the tokenizer and the log."""
    train_data: Path | None = None
    """Training text, instead of the configuration's."""
    test_data: Path | None = None
    """Held-out text, instead of the configuration's."""
    threads: Processes | None = None
    """CPU threads; torch's choice unless given."""
    device: str = "cpu"
    """A torch device."""

    def __post_init__(self) -> None:
        check_ranges(self, "--")

    def run(self) -> None:
        from loopscope.cli.console import say
        from loopscope.experiments.training.config import TrainConfig
        from loopscope.experiments.training.data import DataFiles
        from loopscope.experiments.training.loop import train

        config = TrainConfig.load(self.config)
        data = DataFiles.of(config.data, self.config.parent, train=self.train_data, test=self.test_data)
        result = train(config, self.out, data, threads=self.threads, device=self.device)
        if result.stopped_by is not None:
            signal.raise_signal(result.stopped_by)  # answered as in any other command
        say(f"model  {result.folder}")


@dataclass(frozen=True)
class RunExperiment:
    """Experiments over grids of models: which designs make fixed points."""

    experiment: ExperimentCommand

    def run(self) -> None:
        self.experiment.run()


@dataclass(frozen=True)
class Inspect:
    """Show what models are and what running them takes, without loading them.

    Reads config.json, the tokenizer's files and the headers of the tensors; of a model on the hub nothing else is
    downloaded. Several models are put side by side: layout, norms, injection, initial state, what begins a text.
    """

    models: tyro.conf.Positional[tuple[str, ...]]
    """Shipped models such as demo:injected, checkpoint folders, or models of the Hugging Face hub such as
    organisation/model."""
    run_size: Annotated[RunSize, tyro.conf.arg(name="")]
    revision: str | None = None
    """A branch, tag or commit of the model, if there is one, on the hub."""
    ignore_config: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A field of config.json that loopscope does not know, to be passed over. Again for several."""
    device: str = "auto"
    """A torch device, for --device-map."""
    device_map: str | None = None
    """Say where layers would go on this machine, as analyze has it: auto, or places by layers."""
    json: bool = False
    """Print JSON, for programs: an object, of several models a list of them."""

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
    """List the shipped models, and the families of checkpoints that are read."""

    def run(self) -> None:
        from loopscope.cli.console import say_models

        say_models()


class _Command(Protocol):
    """What the parser makes of a command line."""

    def run(self) -> None: ...


_LONG = 300
"""Characters of an argument."""
_OF_ONE_OPTION = ("Invalid choice", "Value error")
"""What the parser's boxes are headed by that say what is wrong with a value in their first paragraph."""

Command = (
    Annotated[Analyze, tyro.conf.subcommand("analyze")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[JudgeTrajectories, tyro.conf.subcommand("behaviour")]
    | Annotated[CountRates, tyro.conf.subcommand("rates")]
    | Annotated[ControlTokens, tyro.conf.subcommand("control")]
    | Annotated[Calibrate, tyro.conf.subcommand("calibrate")]
    | Annotated[Figures, tyro.conf.subcommand("figures")]
    | Annotated[RunExperiment, tyro.conf.subcommand("experiment")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Models, tyro.conf.subcommand("models")]
)


def parse_and_run(arguments: list[str]) -> None:
    """Parse a command line and run its command. Raises `ConfigError` for what is no text."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{argument!r} is not UTF-8 text; give files other names.") from None
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            command: _Command = tyro.cli(
                Command,
                prog="loopscope",
                description="An instrument for looking inside looped language models.",
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stopped:
        box = said.getvalue()
        lines = [line.strip("│╭╮╰╯─ ") for line in box.splitlines()]
        # The parser repeats an argument in its messages, which are then as long.
        if stopped.code and max(map(len, arguments), default=0) > _LONG:
            raise ConfigError(" ".join(filter(None, lines))) from None
        if stopped.code and lines[0] in _OF_ONE_OPTION:
            # A rule ends it, of hyphens where the terminal has no lines, and there the title has one too.
            paragraphs = groupby(lines[1:], lambda line: line.strip("-") != "")
            problem = (
                " ".join(next(words for some, words in paragraphs if some))
                .rstrip(".")
                .replace(". Expected", ": expected")
            )
            raise ConfigError(f"{problem[:1].upper()}{problem[1:]}; --help says what each option takes.") from None
        sys.stderr.write(box)
        raise
    if isinstance(command, Analyze):
        command = command.with_preset(arguments)
    command.run()
