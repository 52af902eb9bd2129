"""The report: one self-contained HTML file, drawn from a study and its answers."""

from loopscope.report.settings import ReportSettings
from loopscope.report.write import write_report

__all__ = ["ReportSettings", "write_report"]
