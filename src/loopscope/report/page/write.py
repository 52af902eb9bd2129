"""From a study, a comparison of studies, verdicts on trajectories, or experiments, to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loopscope._util.files import write_over_own
from loopscope.answers.answer import Answer
from loopscope.answers.comparison.result import Comparison
from loopscope.answers.patching import Patching
from loopscope.answers.quick import quick_answers
from loopscope.dynamics.verdicts import JudgedFiles
from loopscope.errors import last_resort
from loopscope.evaluation.result import Evaluation
from loopscope.experiments.load import Experiment
from loopscope.report.page.comparison_page import render_comparison
from loopscope.report.page.evaluation_page import render_evaluation
from loopscope.report.page.experiment_page import render_experiments
from loopscope.report.page.patching_page import render_patching
from loopscope.report.page.study_page import render_page
from loopscope.report.page.verdict_page import render_behaviour
from loopscope.report.settings import ReportSettings
from loopscope.study import Study, trusted


@last_resort("drawing a report")
def write_report(
    study: Study,
    path: str | Path,
    *,
    settings: ReportSettings | None = None,
    answers: Sequence[Answer] | None = None,
) -> Path:
    """Write the report of a study to `path` as one HTML file that needs no network, and return the path.

    `answers` are those of `quick_answers(study, settings.criterion)`, for whoever has asked already. The file is whole
    or not written; a report that was there is replaced. Raises `StudyError` for a study that
    lacks what the answers need, `ConfigError` for a prompt in the settings that it does not have, `StorageError` if
    the file cannot be written.
    """
    settings = settings or ReportSettings()
    with trusted([study]):
        if answers is None:
            answers = quick_answers(study, settings.criterion)
        page = render_page(study, settings, answers)
    return _written(path, page)


def write_comparison(comparison: Comparison, path: str | Path) -> Path:
    """Write the report of a comparison to `path` as one HTML file that needs no network, and return the path.

    The file is whole or not written; a report that was there is replaced. Raises `StorageError` if the file cannot be
    written.
    """
    return _written(path, render_comparison(comparison))


def write_behaviour_report(judged: JudgedFiles, path: str | Path) -> Path:
    """Likewise of judged trajectories."""
    return _written(path, render_behaviour(judged))


def write_patching(found: Patching, path: str | Path) -> Path:
    """Likewise of a patching."""
    return _written(path, render_patching(found))


def write_evaluation(found: Evaluation, path: str | Path) -> Path:
    """Likewise of an evaluation."""
    return _written(path, render_evaluation(found))


def write_experiments(experiments: Sequence[Experiment], path: str | Path) -> Path:
    """Likewise of one or several experiments, on one page."""
    return _written(path, render_experiments(experiments))


def _written(path: str | Path, page: str) -> Path:
    write_over_own(Path(path), page.encode(), begins=len("<!doctype html"))
    return Path(path)
