"""The sections of docs/networks.md: public networks, each from `inspect` to a file that has run."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from benchmarks.tables.shared import NOT_RUN, entries, table

Entry = Mapping[str, Any]

LIBRARIES = ("torchvision", "timm", "transformers")
PRECISIONS = ("W8A8", "W4A8")
COVERED = 0.95
"""Share of the weights that counts as covered."""
APART = 0.5
"""Decibels by which a file may be below its simulation."""


def of_library(library: str) -> dict[str, Entry]:
    """Return a library's networks by name, without those whose construction (`build`) failed."""
    prefix = f"{library}:"
    return {name.removeprefix(prefix): entry for name, entry in sorted(entries("zoo").items()) if name.startswith(prefix)}


def went_through(entry: Entry) -> bool:
    return not entry["failures"]


def apart(entry: Entry) -> float | None:
    """Return by how many decibels the W8A8 file is below its simulation; None without a file."""
    run = entry.get("W8A8", {})
    return run["simulation_db"] - run["file_db"] if "file_db" in run else None


def slow(entry: Entry) -> bool:
    """Return whether `inspect` takes longer than 20 float passes plus 10 s."""
    return entry["seconds"].get("inspect", 0) > 20 * entry.get("pass_seconds", 0) + 10


def share(networks: Iterable[Entry], holds: Callable[[Entry], bool]) -> str:
    """Write "38 of 40 (95 %)"."""
    answers = [holds(entry) for entry in networks]
    return f"{sum(answers)} of {len(answers)} ({100 * sum(answers) / len(answers):.0f} %)" if answers else "none"


def summary_section() -> str:
    rows = []
    for library in LIBRARIES:
        networks = list(of_library(library).values())
        if not networks:
            continue
        files = [entry for entry in networks if apart(entry) is not None]
        kinds = Counter(failure["kind"] for entry in networks for failure in entry["failures"])
        rows.append([
            library, share(networks, went_through), share(networks, lambda entry: entry.get("covered", 0) >= COVERED),
            share(files, lambda entry: (apart(entry) or 0) <= APART), str(kinds["crash"] + kinds["limit"]),
            str(sum(map(slow, networks))),
        ])  # fmt: skip
    columns = ["library", "all six steps", f"{100 * COVERED:.0f} % of the weights covered", f"file within {APART} dB at W8A8", "crashes"]
    return table([*columns, "slow to inspect"], rows)


def networks_section(library: str) -> str:
    """Write a row per network: coverage, share computed on integers, quality, and the first failure."""
    rows = [row_of(name, entry) for name, entry in of_library(library).items()]
    columns = ["network", "weights covered", "multiply-accumulates on integers", "simulated, dB", "file, dB"]
    return table([*columns, "simulated, dB, W4A8", "file, dB, W4A8", "seconds", "inspect, passes", "first failure"], rows)


def row_of(name: str, entry: Entry) -> list[str]:
    numbers = [
        f"{entry[precision][key]:.1f}" if key in entry.get(precision, {}) else ""
        for precision in PRECISIONS
        for key in ("simulation_db", "file_db")
    ]
    seconds = entry["seconds"]
    passes = f"{seconds['inspect'] / entry['pass_seconds']:.0f}" if "inspect" in seconds and entry.get("pass_seconds") else ""
    return [f"`{name}`", percent(entry, "covered"), percent(entry.get("W8A8", {}), "integer_macs"), *numbers,
            f"{sum(seconds.values()):.0f}", passes, failure_of(entry)]  # fmt: skip


def percent(of: Mapping[str, Any], key: str) -> str:
    return f"{100 * min(of[key], 1):.1f} %" if key in of else ""  # a tied weight was once counted twice


def failure_of(entry: Entry, most: int = 160) -> str:
    """Write the first failure: its step, its kind, the start of its message."""
    if not entry["failures"]:
        return ""
    first = entry["failures"][0]
    message = first["message"] if len(first["message"]) <= most else first["message"][:most].rsplit(" ", 1)[0] + " ..."
    cleaned = message.replace("|", "/").replace("<", "(").replace(">", ")").replace("`", "'")
    return f"{first['step']}: {first['kind']}: {cleaned}"


def uncovered_section() -> str:
    """List the networks with incomplete coverage, and their uncovered parts."""
    rows = []
    for library in LIBRARIES:
        for name, entry in of_library(library).items():
            if entry.get("covered", 1) < COVERED:
                reasons = [
                    f"{', '.join(name or 'the network itself' for name in names)}: {why}" for why, names in entry["uncovered"].items()
                ]
                rows.append([f"`{library}:{name}`", percent(entry, "covered"), "; ".join(reasons).replace("|", "/")[:300]])
    return table(["network", "weights covered", "not covered"], rows) if rows else NOT_RUN


SECTIONS = {
    "ZOO": summary_section,
    "ZOOTORCHVISION": lambda: networks_section("torchvision"),
    "ZOOTIMM": lambda: networks_section("timm"),
    "ZOOTRANSFORMERS": lambda: networks_section("transformers"),
    "ZOOUNCOVERED": uncovered_section,
}
