"""Print results of verbs that need several tables or a line of their own; without `details`, only the result."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anybit.reports.terminal import print_frontier, print_report, print_search, print_supernet, result_line


def print_runs(reports: Mapping[Path, Mapping[str, Any]], details: bool = True) -> None:
    """Print finished runs: the report of each, their frontier, and a line per folder."""
    for report in reports.values() if details else ():
        print_report(report)
    if details and len(reports) > 1:
        print_frontier(reports.values())
    for folder, report in reports.items():
        print(f"{folder}: {result_line(report)}")


def print_trained(folder: Path, report: Mapping[str, Any], details: bool = True) -> None:
    """Print a trained supernet."""
    if details:
        print_supernet(report)
    print(f"{folder}: a supernet of {', '.join(report['subnets'])}")


def print_searched(folder: Path, report: Mapping[str, Any], details: bool = True) -> None:
    """Print a searched supernet."""
    print_search(report, front=details)
    print(f"{folder}: {len(report['front'])} schemes on the Pareto front, of {len(report['evaluated'])} evaluated")
