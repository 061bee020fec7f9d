"""Read the JSON in benchmarks/results and write its numbers as Markdown; shared by all tables."""

import base64
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NOT_RUN = "Not run."


def entries(name: str) -> dict[str, Any]:
    """Read the entries of one results file; empty if the study has not been run."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text())["entries"] if file.is_file() else {}


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Write a Markdown table; without rows, a note that the study has not been run."""
    columns, rows = list(columns), list(rows)
    if not rows:
        return NOT_RUN
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def spread(values: list[float]) -> str:
    """Write mean and range: "91.52 (91.40 to 91.61)"."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "not run"
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def hits(right: str, count: int = 10_000) -> np.ndarray:
    """Unpack which of the first `count` test images a run predicted correctly: 1 or 0 each."""
    return np.unpackbits(np.frombuffer(base64.b64decode(right), np.uint8)).astype(float)[:count]


def paired_interval(a: str, b: str, count: int = 10_000) -> str:
    """Write the mean difference of two runs on the first `count` test images, in points, with its 95 % interval."""
    difference = 100 * (hits(a, count) - hits(b, count))
    half = 1.96 * difference.std() / math.sqrt(len(difference))
    return f"{difference.mean():+.2f} ({difference.mean() - half:+.2f} to {difference.mean() + half:+.2f})"
