"""The report: one static page about a run, to look at the pairs, the curves and the counts."""

from vpo_ray.report.build import build_report

__all__ = ["build_report"]
