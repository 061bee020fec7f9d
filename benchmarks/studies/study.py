"""The JSON entries and the common arguments of all studies."""

import argparse
import base64
import json
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from anybit.environment import environment
from anybit.progress import listening

ROOT = Path(__file__).parents[2]


class Entries:
    """The JSON file of a study, one entry per run; finished entries are skipped. Its environment includes the versions of `packages`."""

    def __init__(self, arguments: argparse.Namespace, name: str, *packages: str):
        self.arguments = arguments
        self.file = arguments.results / f"{name}.json"
        self.packages = packages

    @property
    def entries(self) -> dict[str, Any]:
        return json.loads(self.file.read_text())["entries"] if self.file.is_file() else {}

    def measured(self, key: str, run: Callable[[], dict[str, Any]], again: bool = False) -> None:
        """Run and store one entry, unless it exists (and `again` is not set) or is not selected."""
        if (key in self.entries and not again) or (self.arguments.only and self.arguments.only not in key):
            return
        start = time.perf_counter()
        entry = run() | {"total_seconds": time.perf_counter() - start}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        contents = {"environment": environment(*self.packages), "entries": self.entries | {key: entry}}
        self.file.write_text(json.dumps(contents, indent=1) + "\n")
        print(key, {k: v for k, v in entry.items() if isinstance(v, (int, float))}, flush=True)


def narrated(key: str) -> AbstractContextManager[None]:
    """Inside the block, print each event's line after the entry's key."""
    return listening(events=lambda _, fields: print(key, fields["note"], flush=True) if "note" in fields else None)


def packed_hits(right: np.ndarray) -> str:
    """Pack which test inputs are predicted correctly, one bit each, for paired intervals."""
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def parser(description: str | None, studies: Iterable[str] = ()) -> argparse.ArgumentParser:
    """Create the common arguments of studies; with `studies`, also a choice among them."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if studies:
        options.add_argument("study", choices=list(studies))
    options.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options.add_argument("--only", help="run only the entries whose key contains this text")
    return options
