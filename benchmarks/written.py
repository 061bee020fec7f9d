"""What the tables share: entries of the JSON in benchmarks/results, and how their numbers are written."""

import base64
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def entries(name: str) -> dict[str, Any]:
    """Entries of one results file; empty where it has not been run."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text())["entries"] if file.is_file() else {}


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    columns = list(columns)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def spread(values: list[float]) -> str:
    """ "91.52 (91.40 to 91.61)" """
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "not run"
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def paired_interval(a: str, b: str) -> str:
    """Mean difference in points of two runs on the same test images, with its 95 % interval."""
    right = [np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8)).astype(float)[:10_000] for text in (a, b)]
    difference = 100 * (right[0] - right[1])
    half = 1.96 * difference.std() / math.sqrt(len(difference))
    return f"{difference.mean():+.2f} ({difference.mean() - half:+.2f} to {difference.mean() + half:+.2f})"
