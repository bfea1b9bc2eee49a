"""A report on finished runs: one HTML page, and its charts as PNG files."""

from autoflip_flwr.compare.report.page import write_report

__all__ = ["write_report"]
