"""Verbs of finished runs and of the cache: report, diff, explain, cache."""

import json
from pathlib import Path

import anybit
from anybit.budget import SIZE
from anybit.calls import BYTES
from anybit.cli.work import Outcome
from anybit.runs.folder import check_folder, check_one
from anybit.runs.names import SCHEME
from anybit.scheme import check_names
from anybit.settings import argument, option


def check_folders(runs: list[Path]) -> None:
    """Raise InvalidFile if one of them is not a run folder."""
    for run in runs:
        check_folder(run)


def report(
    runs: list[Path] = argument(
        "Run folders of any workflow; a folder of several runs counts as all of them.",
        ready=check_folders,
    ),
    *,
    output: Path = argument("The HTML file to write.", positional=False), overwrite: bool = option(False, "Replace the file.", switch=True),
) -> Outcome:  # fmt: skip
    """Compare several runs on one page.

    anybit report runs/mine runs/smaller --output runs.html
    anybit report runs/* --output runs.html --overwrite
    """
    file = anybit.report(*runs, output=output, overwrite=overwrite)
    return Outcome(str(file), lambda details: print(file))


def diff(
    run: Path = argument("A run folder of any workflow.", ready=check_one), run2: Path = argument("Another run folder.", ready=check_one)
) -> Outcome:
    """Compare two runs: settings, bits, size, errors, accuracy.

    anybit diff runs/mine runs/smaller
    anybit diff runs/mine runs/smaller --json
    """
    return Outcome(anybit.diff(run, run2), "print_difference")


def explain(run: Path = argument("A run folder.", ready=check_one), layer: str = argument("A layer of the run.")) -> Outcome:
    """Explain why a layer has its bits: loss and cost of each precision.

    anybit explain runs/mine layer1.0.conv2
    anybit explain runs/mine layer1.0.conv2 --json
    """
    _check_layer(run, layer)
    return Outcome(anybit.explain(run, layer), "print_explanation")


def _check_layer(run: Path, layer: str) -> None:
    """Raise SchemeMismatch for a name that is none of the layers, before PyTorch is imported; a damaged file is refused by who reads it."""
    try:
        layers = json.loads((run / SCHEME).read_bytes())["layers"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if isinstance(layers, dict):
        check_names([layer], layers, str(run))


def cache(
    *,
    trim: int | None = option(None, "Remove the least recently used results down to this size: 500MB, 0B.", least=0, most=BYTES, text=SIZE),
    check: bool = option(False, "Read every result; name and remove damaged ones.", switch=True),
) -> Outcome:
    """Show, shrink or check the results stored for resuming runs.

    anybit cache --check
    anybit cache --trim 1GB
    """
    from anybit.files.cache import cache_summary

    return Outcome(cache_summary(trim, check), "print_cache")
