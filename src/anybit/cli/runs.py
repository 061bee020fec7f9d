"""The verbs of finished runs: report, diff, explain; and of the cache."""

from pathlib import Path

from anybit.budget import SIZE
from anybit.cli.work import Outcome
from anybit.settings import option


def report(
    runs: list[Path] = option(..., "Run folders, of any roads; one that holds several runs counts as each of them.", positional=True),
    *,
    output: Path = option(..., "The HTML file to write."),
    overwrite: bool = option(False, "Replace the file.", switch=True),
):
    """Several runs side by side on one page that asks nothing of the network."""
    from anybit.reports.page import report

    file = report(*runs, output=output, overwrite=overwrite)
    return Outcome(str(file), lambda details: print(file))


def diff(
    run: Path = option(..., "A run folder, of any road.", positional=True),
    run2: Path = option(..., "Another.", positional=True),
):
    """What differs between two runs: settings, versions, references, bits, size, errors, accuracy, and whether the weights are the same."""
    from anybit.reports.comparison import diff
    from anybit.reports.terminal import print_difference

    found = diff(run, run2)
    return Outcome(found, lambda details: print_difference(found))


def explain(
    run: Path = option(..., "A run folder.", positional=True),
    layer: str = option(..., "One of its layers.", positional=True),
):
    """Why a layer has its bits: what each precision would lose and cost, the shadow price, one step more or less, reconstruction errors."""
    from anybit.reports.explanation import explain
    from anybit.reports.terminal import print_explanation

    found = explain(run, layer)
    return Outcome(found, lambda details: print_explanation(found))


def cache(
    *,
    trim: int | None = option(None, "Remove the least recently used results until so much is left: 500MB, 0B.", least=0, text=SIZE),
    check: bool = option(False, "Read every result; name and remove the damaged ones.", switch=True),
):
    """Results that were kept to be taken up again: where they are, how much they take; --trim makes room."""
    from anybit.files.cache import LIMIT, entries, remove_damaged, results_folder, trim_cache
    from anybit.reports.terminal import print_cache

    folder = results_folder()
    removed = 0 if trim is None else trim_cache(folder, trim)
    damaged = remove_damaged(folder) if check else {}
    kept = entries(folder)
    found = {
        "folder": str(folder), "results": len(kept), "bytes": sum(entry.bytes for entry in kept), "limit": LIMIT,
        "removed_bytes": removed, "damaged": {str(path): reason for path, reason in damaged.items()},
    }  # fmt: skip
    return Outcome(found, lambda details: print_cache(found))
