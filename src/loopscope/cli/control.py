"""The command that damps what does not settle. Heavy imports are inside, as in `commands`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from loopscope.cli.parsing import options


@dataclass(frozen=True, kw_only=True)
class ControlTokens:
    """Damp what does not settle: rerun prompts with tokens that orbit, slide or diverge, as their eigenvalues call for.

    Writes the study of the damped loop to --out, with report.html and control.json: the step, what was predicted, and
    the verdicts before and after.
    """

    study: tyro.conf.Positional[Path]
    """The --out folder of an analysis."""
    out: Path
    """Folder for the study of the damped loop."""
    model: str | None = None
    """The model, if the name in the study does not find it; its weights must be the same."""
    eta: float | None = None
    """Step of the damped loop, above 0 and up to 1, instead of the one that the eigenvalues call for."""
    radius: float = 0.95
    """Largest modulus that the damped eigenvalues may have: the rate at which the slowest token then settles."""
    horizon: int | None = None
    """Horizon of the damped run, which needs more recurrences with a small step; default: that of the study."""
    report: bool = True
    """Also write report.html."""

    def run(self) -> None:
        from loopscope._util.estimate import Phase
        from loopscope._util.progress import ProgressBar
        from loopscope.cli.console import REPORT_SECONDS, say, say_path
        from loopscope.experiments.damping import CONTROL, control
        from loopscope.report.page.write import write_report

        last = (Phase("report", 1, seconds=REPORT_SECONDS),) if self.report else ()
        with ProgressBar("loading", last=last) as progress:
            found = control(self.study, **options(self, "study", "report"), progress=progress)
            report = write_report(found.after, self.out / "report.html") if self.report else None
        for sentence in found.sentences():
            say(sentence)
        say_path(*("control", self.out / CONTROL) if report is None else ("report", report))
