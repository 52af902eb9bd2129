"""The report: one self-contained HTML file, drawn from a study and its answers, from a comparison of studies, from
verdicts on trajectories, or from experiments."""

from loopscope.report.page.write import write_behaviour_report, write_comparison, write_experiments, write_report
from loopscope.report.settings import ReportSettings

__all__ = ["ReportSettings", "write_behaviour_report", "write_comparison", "write_experiments", "write_report"]
