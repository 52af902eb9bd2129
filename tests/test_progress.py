"""The estimate of time, and what commands say of it, by a clock that is set by hand."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import dataclass
from inspect import signature

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from loopscope import AnalyzeSettings, analyze
from loopscope._util.estimate import Estimate, Phase
from loopscope._util.progress import ProgressBar
from loopscope._util.wording import duration
from loopscope.analysis.job import SilentProgress, shown
from loopscope.errors import ConfigError

COSTS = st.floats(0.01, 20)


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal:
    """A bar whose console is a string."""

    def __init__(self, *, is_terminal: bool = False, last: tuple[Phase, ...] = ()) -> None:
        self.clock, self.text = Clock(), io.StringIO()
        console = Console(file=self.text, force_terminal=is_terminal, width=200)
        self.bar = ProgressBar("loading", console, last=last, clock=self.clock)

    def after(self, seconds: float, phase: str, count: int = 1, figures: str = "") -> None:
        self.clock.now += seconds
        self.bar.step(phase, count, figures)

    @property
    def lines(self) -> list[str]:
        return self.text.getvalue().splitlines()


@given(sizes=st.lists(st.integers(1, 40), min_size=2, max_size=12), costs=st.tuples(COSTS, COSTS, COSTS), end=COSTS)
def test_once_a_batch_is_done_the_time_is_known(
    sizes: list[int], costs: tuple[float, float, float], end: float
) -> None:
    """Batches of any sizes whose phases cost what they cost, and an end whose time was expected rightly."""
    names, clock = ("passes", "eigenvalues", "verdicts"), Clock()
    phases = [Phase(name, 3 * sum(sizes)) for name in names]
    estimate = Estimate([*phases, Phase("writing", 1, seconds=end)], clock)
    whole = sum(3 * size * cost for size in sizes for cost in costs) + end
    for batch, size in enumerate(sizes):
        for name, cost in zip(names, costs, strict=True):
            for _ in range(3):
                clock.now += size * cost
                estimate.step(name, size)
        left = estimate.left
        assert left is not None
        assert estimate.elapsed + left == pytest.approx(whole)
        assert estimate.share == pytest.approx(min(0.99, estimate.elapsed / whole)), batch
    clock.now += end / 2
    assert estimate.left == pytest.approx(end / 2)
    assert estimate.share < 1
    clock.now += end / 2
    estimate.step("writing")
    assert estimate.left == 0
    assert estimate.share == 1


def test_what_is_not_known_yet_is_not_said() -> None:
    clock = Clock()
    estimate = Estimate([Phase("passes", 10), Phase("report", 1, seconds=5)], clock, started=clock.now - 7)
    clock.now += 2
    assert estimate.left is None
    assert estimate.share == 0
    estimate.step("passes", 2)
    assert estimate.left == pytest.approx(8 * 1.0 + 5)
    assert estimate.share == pytest.approx(9 / (9 + 13))  # loading too


def test_work_of_an_earlier_run_counts_but_took_no_time_of_this_one() -> None:
    clock = Clock()
    estimate = Estimate([Phase("cells", 10, done=6)], clock)
    clock.now += 3
    estimate.step("cells")
    assert estimate.left == pytest.approx(9)
    assert estimate.share == pytest.approx(0.7)


def test_an_end_that_takes_longer_than_expected_is_not_told_as_over() -> None:
    clock = Clock()
    estimate = Estimate([Phase("passes", 1), Phase("report", 1, seconds=1)], clock)
    clock.now += 1
    estimate.step("passes")
    clock.now += 500
    assert estimate.left == 0
    assert estimate.share < 1


def test_without_a_terminal_a_line_is_said_every_half_minute() -> None:
    terminal = Terminal()
    terminal.bar.start([Phase("passes", 100), Phase("verdicts", 10, seconds=1)])
    for _ in range(100):
        terminal.after(1, "passes")
    assert terminal.lines == [
        "passes, 27%, 30 s of about 2 min",
        "passes, 55%, 60 s of about 2 min",
        "passes, 82%, 90 s of about 2 min",
    ]


def test_while_nothing_is_reported_lines_are_said_nevertheless() -> None:
    terminal = Terminal()
    terminal.clock.now += 31
    terminal.bar.refresh()
    terminal.bar.refresh()
    assert terminal.lines == ["loading, 31 s"]


def test_a_short_job_says_nothing() -> None:
    terminal = Terminal()
    with terminal.bar:
        terminal.bar.start([Phase("passes", 2)])
        terminal.after(10, "passes")
        terminal.bar.first_batch(2**30)
        terminal.after(10, "passes")
    assert terminal.lines == []


def test_after_the_first_batch_time_and_memory_are_told() -> None:
    terminal = Terminal(last=(Phase("report", 1, seconds=2),))
    terminal.clock.now += 8  # of loading
    terminal.bar.start([Phase("passes", 10), Phase("verdicts", 10, seconds=1)])
    terminal.after(6, "passes")
    terminal.after(14, "verdicts")
    terminal.bar.first_batch(1500 * 2**20)
    assert terminal.lines == ["Expected after the first batch: 4 min in all, 1,500 MiB of memory at the most so far."]
    assert duration(8 + 10 * 20 + 2) == "4 min"


def test_a_bar_in_a_terminal_shows_phase_share_and_figures() -> None:
    terminal = Terminal(is_terminal=True)
    with terminal.bar:
        terminal.bar.start([Phase("training", 4, done=1)])
        terminal.after(60, "training", figures="loss [1.5]")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.text.getvalue())
    assert "training 2 of 4, 60 s of about 3 min  loss [1.5]" in shown


def test_steps_of_a_job_without_a_known_end_are_counted() -> None:
    terminal = Terminal()
    for _ in range(3):
        terminal.after(15, "tokens", 500)
    assert terminal.lines == ["tokens 1,000, 30 s"]


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (5940, "99 min"), (7800, "2 h 10 min")]
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_who_calls_from_python_has_a_bar_in_a_terminal_or_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a name that is no setting is answered with the nearest one, before anything is loaded."""
    known = signature(analyze).parameters
    assert known["recurrences"].default == AnalyzeSettings().recurrences
    assert {"prompts", "out", "progress", "skip"} <= known.keys()
    with pytest.raises(ConfigError, match="no option 'recurrence'; did you mean recurrences"):
        analyze("demo:injected", "a text", recurrence=4)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    for progress, bar in ((None, False), (False, False), (True, True)):
        with shown(progress) as told:
            assert isinstance(told, ProgressBar) == bar
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    with shown(None) as told:
        told.start([Phase("passes", 4)])
        told.step("passes", 2)
    assert "passes 2 of 4" in stream.getvalue()
    given = SilentProgress()
    with shown(given) as told:
        assert told is given
