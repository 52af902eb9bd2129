"""Quick answers: plain sentences with their evidence, drawn from a study and nothing else."""

from loopscope.answers.answer import Answer, Outcome
from loopscope.answers.criterion import Criterion
from loopscope.answers.exit_rules import ExitTables, exit_tables
from loopscope.answers.quick import quick_answers
from loopscope.answers.stopping import Readouts, constant_table, exit_costs, exit_table, spread_thresholds, stop_times

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
