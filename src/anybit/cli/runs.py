"""The verbs of finished runs: report, diff, explain; and of the cache."""

from pathlib import Path

import anybit
from anybit.budget import SIZE
from anybit.cli.work import Outcome
from anybit.runs.folder import check_folder, check_one
from anybit.settings import argument, option


def check_folders(runs: list[Path]) -> None:
    """Raise InvalidFile where one of them is no folder of a run."""
    for run in runs:
        check_folder(run)


def report(
    runs: list[Path] = argument(
        "Run folders, of any roads; one that holds several runs counts as each of them.",
        ready=check_folders,
    ),
    *,
    output: Path = argument("The HTML file to write.", positional=False), overwrite: bool = option(False, "Replace the file.", switch=True),
) -> Outcome:  # fmt: skip
    """Put several runs side by side on one page.

    anybit report runs/mine runs/smaller --output runs.html
    anybit report runs/* --output runs.html --overwrite
    """
    file = anybit.report(*runs, output=output, overwrite=overwrite)
    return Outcome(str(file), lambda details: print(file))


def diff(
    run: Path = argument("A run folder, of any road.", ready=check_one), run2: Path = argument("Another.", ready=check_one)
) -> Outcome:
    """Say what differs between two runs: settings, bits, size, errors, accuracy.

    anybit diff runs/mine runs/smaller
    anybit diff runs/mine runs/smaller --json
    """
    return Outcome(anybit.diff(run, run2), "print_difference")


def explain(run: Path = argument("A run folder.", ready=check_one), layer: str = argument("One of its layers.")) -> Outcome:
    """Say why a layer has its bits: what each precision would lose and cost.

    anybit explain runs/mine layer1.0.conv2
    anybit explain runs/mine layer1.0.conv2 --json
    """
    return Outcome(anybit.explain(run, layer), "print_explanation")


def cache(
    *,
    trim: int | None = option(
        None, "Remove the results used longest ago until so much is left: 500MB, 0B.", least=0, most=2**60, text=SIZE
    ),
    check: bool = option(False, "Read every result; name and remove the damaged ones.", switch=True),
) -> Outcome:
    """Show the results that were kept so that a killed run continues; make room.

    anybit cache --check
    anybit cache --trim 1GB
    """
    from anybit.files.cache import tidied

    return Outcome(tidied(trim, check), "print_cache")
