"""What the commands take, and what they do with it. Heavy imports are inside: a help text must not wait for torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from loopscope.settings import AnalyzeSettings

__all__ = ["parse_and_run"]


@dataclass(frozen=True)
class Analyze:
    """Run prompts through a model and measure how each layer's state settles.

    Writes a study to --out: arrays (study.nc), manifest.json, tokens.jsonl and report.html. A run that was interrupted goes
    on when the same command is given again.
    """

    model: tyro.conf.Positional[str]
    """A shipped model such as demo:injected, or a checkpoint folder."""
    out: Path
    """Folder for the study."""
    settings: Annotated[AnalyzeSettings, tyro.conf.arg(name="")]
    report: bool = True
    """Also write report.html."""

    def run(self) -> None:
        from loopscope.analysis import analyze
        from loopscope.answers import quick_answers
        from loopscope.cli.console import RichProgress, say, say_answers
        from loopscope.report import write_report

        with RichProgress("recurrences") as progress:
            study = analyze(self.model, out=self.out, settings=self.settings, progress=progress)
        say_answers(quick_answers(study))
        if self.report:
            say(f"report  {write_report(study, self.out / 'report.html')}")
        else:
            say(f"study  {self.out}")


@dataclass(frozen=True)
class Report:
    """Draw the HTML report of a study."""

    study: tyro.conf.Positional[Path]
    """The --out folder of an analysis."""
    out: Path | None = None
    """Where to write it; report.html in the study's folder unless given."""

    def run(self) -> None:
        from loopscope.cli.console import say
        from loopscope.report import write_report
        from loopscope.study import Study

        study = Study.load(self.study)
        say(f"report  {write_report(study, self.out or self.study / 'report.html')}")


@dataclass(frozen=True)
class Models:
    """List the shipped models."""

    def run(self) -> None:
        from loopscope.cli.console import say_models

        say_models()


Command = (
    Annotated[Analyze, tyro.conf.subcommand("analyze")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Models, tyro.conf.subcommand("models")]
)


def parse_and_run(arguments: list[str]) -> None:
    """Parse a command line and run its command."""
    command: Analyze | Report | Models = tyro.cli(
        Command,  # type: ignore[arg-type]
        prog="loopscope",
        description="An instrument for looking inside looped language models.",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    command.run()
