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
    """Several runs side by side on one page that asks nothing of the network."""
    file = anybit.report(*runs, output=output, overwrite=overwrite)
    return Outcome(str(file), lambda details: print(file))


def diff(
    run: Path = argument("A run folder, of any road.", ready=check_one), run2: Path = argument("Another.", ready=check_one)
) -> Outcome:
    """Compare two runs: settings, versions, references, bits, size, errors, accuracy, and whether the weights are the same."""
    return Outcome(anybit.diff(run, run2), "print_difference")


def explain(run: Path = argument("A run folder.", ready=check_one), layer: str = argument("One of its layers.")) -> Outcome:
    """Why a layer has its bits: what each precision would lose and cost, the shadow price, one step more or less, reconstruction errors."""
    return Outcome(anybit.explain(run, layer), "print_explanation")


def cache(
    *,
    trim: int | None = option(None, "Remove the least recently used results until so much is left: 500MB, 0B.", least=0, text=SIZE),
    check: bool = option(False, "Read every result; name and remove the damaged ones.", switch=True),
) -> Outcome:
    """Results that were kept to be taken up again: where they are, how much they take; --trim makes room."""
    from anybit.files.cache import tidied

    return Outcome(tidied(trim, check), "print_cache")
