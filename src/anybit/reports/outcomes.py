"""Print results of verbs that need several tables or a special line; without `details`, only the result."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anybit.errors import printable
from anybit.reports.terminal import print_frontier, print_line, print_report, print_search, print_supernet, result_line
from anybit.reports.words import drop_interval


def print_runs(reports: Mapping[Path, Mapping[str, Any]], details: bool = True) -> None:
    """Print finished runs: the report of each, their frontier, and a line per folder."""
    for report in reports.values() if details else ():
        print_report(report)
    if details and len(reports) > 1:
        print_frontier(reports.values())
    last = list(reports)[-1]
    if details and (line := drop_line(reports[last])):
        print_line(line)
    for folder, report in reports.items():
        print_line(f"{folder}: {result_line(report)}")
    if details:  # stdout is for results
        following = f"anybit export {shlex.quote(str(last))} --onnx={shlex.quote(f'{last.name}.onnx')}"
        print(printable(f"Next: {following}, or open {last / 'report.html'}"), file=sys.stderr)


def drop_line(report: Mapping[str, Any]) -> str:
    """Write the drop on the test data, with its 95 % interval; empty if it was not measured on classes."""
    test, before = report.get("test") or {}, report.get("float_test") or {}
    lost = drop_interval(test, before)
    if lost is None:
        return ""
    drop, low, high, count = lost
    interval = f"95 % interval {low:.2f} to {high:.2f}, {count} samples"
    return f"Test top-1: float32 {before['top1']:.2f}, quantized {test['top1']:.2f}, drop {drop:.2f} points ({interval})"


def print_trained(folder: Path, report: Mapping[str, Any], details: bool = True) -> None:
    """Print a trained supernet."""
    if details:
        print_supernet(report)
    print_line(f"{folder}: a supernet of {', '.join(report['subnets'])}")


def print_searched(folder: Path, report: Mapping[str, Any], details: bool = True) -> None:
    """Print a searched supernet."""
    print_search(report, front=details)
    print_line(f"{folder}: {len(report['front'])} schemes on the Pareto front, of {len(report['evaluated'])} evaluated")
