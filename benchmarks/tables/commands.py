"""The section of docs/results.md on the time of commands before and after a change."""

from collections.abc import Mapping
from typing import Any

from benchmarks.tables.shared import entries, table


def commands_section() -> str:
    """Write a row per network and command: seconds in both trees, their ratio within rounds, and the counts."""
    rows = [
        [
            network,
            command,
            *(f"{row['cpu'][side]['min']:.2f} s ({row['wall'][side]['min']:.2f} s)" for side in ("before", "after")),
            ratio(row["cpu"]["ratio"]),
            ratio(row["wall"]["ratio"]),
            *(changed(row["counts"], kind) for kind in ("exporter", "passes", "copies")),
        ]
        for network, run in entries("command_costs").items()
        for command, row in run["commands"].items()
    ]
    columns = [
        "network",
        "command",
        "before: minimum processor time (wall time)",
        "after",
        "after / before, processor: median (range)",
        "wall",
    ]
    return table([*columns, "exporter calls", "forward passes", "network copies"], rows)


def ratio(of: Mapping[str, float]) -> str:
    """Write "0.42 (0.40 to 0.45)"."""
    return f"{of['median']:.2f} ({of['low']:.2f} to {of['high']:.2f})"


def changed(counts: Mapping[str, Mapping[str, Any]], kind: str) -> str:
    """Write "36 to 1", or one number if nothing has changed."""
    before, after = (counts[side][kind] for side in ("before", "after"))
    return f"{before}" if before == after else f"{before} to {after}"


SECTIONS = {"COMMANDS": commands_section}
