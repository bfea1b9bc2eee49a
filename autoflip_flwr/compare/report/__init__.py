"""A report on finished runs: one HTML page, and its charts as files."""

from autoflip_flwr.compare.report.page import write_report

__all__ = ["write_report"]
