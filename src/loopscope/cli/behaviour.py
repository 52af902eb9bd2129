"""The commands that judge trajectories, and the methods that judge them. Heavy imports are inside, as in `commands`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from loopscope._util.ranges import Count, Processes, Range, Seed, check_ranges
from loopscope._util.table import Table
from loopscope.models.inspection.facts import Dtype

if TYPE_CHECKING:
    from loopscope.answers.rates import KindShare
    from loopscope.dynamics.trajectories.calibration import Calibration
    from loopscope.dynamics.verdicts import JudgedFiles

_Method = Literal["displacement", "cosine"]


@dataclass(frozen=True, kw_only=True)
class JudgeTrajectories:
    """Judge trajectories captured by any tool: what does each token's state tend to?

    Takes .npy, .npz and .safetensors files of arrays (recurrence, width) or (token, recurrence, width). Writes
    verdicts.jsonl, manifest.json and report.html to --out.
    """

    states: tyro.conf.Positional[tuple[Path, ...]]
    """Files of states."""
    dtype: Dtype
    """The dtype that the model ran in, whatever dtype the files have: it decides how much motion is rounding."""
    out: Path
    """Folder for the verdicts."""
    method: _Method = "displacement"
    """displacement judges the shape of the motion; cosine, after the paper, the cosine to the last state."""
    array: str | None = None
    """The array to take from files with several; default: all of them."""
    first_recurrence: Annotated[int, Range(1)] = 1
    """Number of recurrences after which the first state was taken: more than 1 if the beginning was cut off."""
    twins: tuple[Path, ...] = ()
    """Files with the same array of other runs, which tell how large the noise is: from initial states that differ by
    one rounding, best, or from any others."""
    set: tuple[str, ...] = ()
    """Change a setting of the method, as NAME=VALUE, such as floor_factor=50. See docs/behaviour.md."""
    check_order: bool = True
    """Refuse arrays whose recurrences seem to run along another axis."""
    report: bool = True
    """Also write report.html."""

    def __post_init__(self) -> None:
        check_ranges(self, "--")

    def run(self) -> None:
        from loopscope._util.progress import ProgressBar
        from loopscope.cli.console import say_path
        from loopscope.dynamics.trajectories.files import judge_files
        from loopscope.dynamics.trajectories.settings import parse_settings
        from loopscope.dynamics.verdicts import check_folder
        from loopscope.report.page.write import write_behaviour_report

        settings = parse_settings(self.method, self.set)
        check_folder(self.out)
        with ProgressBar("tokens") as progress:
            judged = judge_files(
                self.states,
                self.dtype,
                self.method,
                settings=settings,
                array=self.array,
                first_recurrence=self.first_recurrence,
                check_order=self.check_order,
                twins=self.twins,
                progress=partial(progress.step, "tokens"),
            )
        judged.save(self.out)
        _say_kinds(judged)
        if self.report:
            say_path("report", write_behaviour_report(judged, self.out / "report.html"))
        else:
            say_path("verdicts", self.out / "verdicts.jsonl")


@dataclass(frozen=True, kw_only=True)
class Calibrate:
    """Try the methods on trajectories with known truth, and show what each method gets right."""

    count: Count = 1300
    """Number of trajectories, spread evenly over the cases."""
    dtype: tuple[Dtype, ...] = ("float32", "bfloat16")
    """Dtypes whose noise the trajectories carry."""
    method: tuple[_Method, ...] = ("displacement", "cosine")
    """Methods to try."""
    seed: Seed = 0
    """The same seed makes the same trajectories."""
    threads: Processes | None = None
    """CPU threads; default: torch's choice."""
    json: bool = False
    """Print JSON, for programs."""

    def __post_init__(self) -> None:
        check_ranges(self, "--")

    def run(self) -> None:
        import json

        import torch

        from loopscope._util.estimate import Phase
        from loopscope._util.progress import ProgressBar
        from loopscope.cli.console import say_table
        from loopscope.dynamics.trajectories.calibration import calibrate

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        tables = []
        with ProgressBar("trajectories") as progress:
            progress.start([Phase("trajectories", self.count * len(self.dtype))])
            for dtype in self.dtype:
                tables += calibrate(
                    self.count,
                    dtype=dtype,
                    methods=self.method,
                    seed=self.seed,
                    progress=partial(progress.step, "trajectories"),
                )
        if self.json:
            print(json.dumps([table.to_dict() for table in tables], indent=2))
            return
        for table in tables:
            say_table(_calibration_table(table), total=True)


def _calibration_table(calibration: Calibration) -> Table:
    rows = []
    for name, score in [*calibration.cases.items(), ("all", calibration.total)]:
        wrongly = "" if name == "all" else ", ".join(f"{kind} {count}" for kind, count in score.wrongly.most_common())
        rows.append((name, str(score.right), str(score.right + score.wrong), str(score.undecidable), wrongly))
    return Table(
        columns=("case", "right", "of", "undecidable", "taken for"),
        rows=rows,
        title=f"{calibration.method}, {calibration.dtype}: {calibration.total.share:.2%} right, false orbits and "
        f"sliders {calibration.false_alarms} of {calibration.fixed_points} fixed points",
    )


def _say_kinds(judged: JudgedFiles) -> None:
    import numpy as np
    from rich.console import Console
    from rich.markup import escape

    from loopscope.answers.rates import token_shares
    from loopscope.cli.console import say_table
    from loopscope.dynamics.verdicts import KINDS

    console = Console(highlight=False)
    codes = np.array([KINDS.index(each.verdict.kind) for each in judged.trajectories])
    if len(codes) <= _SHOWN:
        for each in judged.trajectories:
            console.print(f"[bold]{escape(each.label)}[/bold]  {each.verdict.kind}")
            console.print(f"  {escape(each.verdict.reason)}", style="dim")
        return
    rows = [
        (str(share.kind), str(share.count), f"{share.share:.2%}", _interval(share))
        for share in token_shares(codes)
        if share.count
    ]
    say_table(Table(columns=("kind", "tokens", "share", "95 % interval"), rows=rows))


_SHOWN = 12
"""Trajectories that are named one by one; more are counted."""


def _interval(share: KindShare) -> str:
    low, high = share.interval
    return f"{low:.2%} to {high:.2%}"
