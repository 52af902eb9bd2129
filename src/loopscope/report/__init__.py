"""The report: one self-contained HTML file, drawn from a study and its answers, from a comparison of studies, from
verdicts on trajectories, or from experiments."""

from loopscope.report.settings import ReportSettings
from loopscope.report.write import write_behaviour_report, write_comparison, write_experiments, write_report

__all__ = ["ReportSettings", "write_behaviour_report", "write_comparison", "write_experiments", "write_report"]
