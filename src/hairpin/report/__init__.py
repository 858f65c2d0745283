"""Reports: one HTML file that shows a run and needs nothing else, not even a network."""

from hairpin.report.page import Report, environment, write_report

__all__ = ["Report", "environment", "write_report"]
