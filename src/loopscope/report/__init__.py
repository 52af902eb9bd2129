"""The report: one self-contained HTML file, drawn from a study and its answers, or from a comparison of studies."""

from loopscope.report.settings import ReportSettings
from loopscope.report.write import write_comparison, write_report

__all__ = ["ReportSettings", "write_comparison", "write_report"]
