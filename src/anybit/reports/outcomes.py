"""Results of verbs to be read, where several tables or a line of their own belong to them; without `details` the result alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anybit.reports.terminal import print_frontier, print_report, print_search, print_supernet, result_line
from anybit.reports.words import human_bytes


def print_runs(reports: Mapping[Path, Mapping[str, Any]], details: bool = True) -> None:
    """Finished runs: the report of each, their frontier, and a line a folder."""
    for report in reports.values() if details else ():
        print_report(report)
    if details and len(reports) > 1:
        print_frontier(reports.values())
    for folder, report in reports.items():
        print(f"{folder}: {result_line(report)}")


def print_trained(folder: Path, report: Mapping[str, Any], details: bool = True) -> None:
    """A supernet that was trained."""
    if details:
        print_supernet(report)
    print(f"{folder}: a supernet of {', '.join(report['subnets'])}")


def print_searched(folder: Path, report: Mapping[str, Any], details: bool = True) -> None:
    """A supernet that was searched."""
    print_search(report, front=details)
    print(f"{folder}: {len(report['front'])} schemes on the front of {len(report['evaluated'])} evaluated")


def print_file(found: Mapping[str, Any], details: bool = True) -> None:
    """An exported file."""
    over = 100 * (found["bytes"] / found["ideal_bytes"] - 1) if found["ideal_bytes"] else 0
    ideal = human_bytes(found["ideal_bytes"])
    print(f"{found['file']}: {human_bytes(found['bytes'])}, {over:.1f} % above the {ideal} of its weights' bits")
    if details:
        print(f"{found['integer_layers']} of {found['layers']} layers on integers")
    if details and found["measured_edges"]:
        count = len(found["measured_edges"])
        print(f"{count} tensors between operators have no range in the run: it was measured on the inputs of this export.")
