"""Quick answers: plain sentences with their evidence, drawn from a study and nothing else."""

from loopscope.answers.answer import Answer, Criterion, Outcome
from loopscope.answers.exit_rules import (
    ExitTables,
    Readouts,
    constant_table,
    exit_costs,
    exit_table,
    exit_tables,
    spread_thresholds,
    stop_times,
)
from loopscope.answers.quick import quick_answers

__all__ = [
    "Answer",
    "Criterion",
    "ExitTables",
    "Outcome",
    "Readouts",
    "constant_table",
    "exit_costs",
    "exit_table",
    "exit_tables",
    "quick_answers",
    "spread_thresholds",
    "stop_times",
]
