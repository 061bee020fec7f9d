"""report.json and search.json: written with digests, read strictly."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anybit.errors import InvalidFile
from anybit.files.strict import check_sealed, read_sealed, sealed, sha256_of, validated, write_json
from anybit.runs.folder import FORMAT_VERSION
from anybit.runs.names import MODEL, REPORT, SEARCH
from anybit.runs.names import SUPERNET as SUPERNET
from anybit.runs.records import Record, SearchFile, record_of

TIMES = ("stages", "latency", "budgets")
"""Fields that the report's digest does not cover: durations differ between runs. (Of several budgets each has its own.)"""


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write report.json, bound to the tensors in the folder."""
    tensors = _tensors_in(folder)
    record = {**report} if tensors is None else {**report, "sha256": sha256_of(tensors)}
    if "budgets" in record:
        record["budgets"] = {name: sealed(one, TIMES) for name, one in record["budgets"].items()}
    write_json(folder / REPORT, sealed(record, TIMES))


def read_report(folder: Path) -> dict[str, Any]:
    """Read report.json strictly: unchanged, and for the tensors in the folder."""
    path, again = folder / REPORT, "Run again."
    report = read_sealed(path, FORMAT_VERSION, again, TIMES)
    several = validated(dict[str, dict[str, Any]], report.get("budgets", {}), f"{path}: budgets")
    for name, one in several.items():
        check_sealed(one, f"{path}: {name}", again, TIMES)
        record_of(one, f"{path}: {name}")
    if not several:
        record_of(report, str(path))
    tensors = _tensors_in(folder)
    if "sha256" in report and (tensors is None or sha256_of(tensors) != report["sha256"]):
        raise InvalidFile(f"{path} was not measured on {'the tensors' if tensors is None else tensors.name} in {folder}. {again}")
    return report


def _tensors_in(folder: Path) -> Path | None:
    return next((folder / name for name in (MODEL, SUPERNET) if (folder / name).is_file()), None)


def read_record(folder: Path) -> Record:
    """Read the report of one run folder, for a search with all its evaluations."""
    record = record_of(read_report(folder), str(folder / REPORT))
    if not (record.result or record.search or record.subnets):
        raise InvalidFile(f"{folder / REPORT} is not the report of a run: it has neither a result nor subnets.")
    whole = record.search is not None and (folder / SEARCH).is_file()
    return record.model_copy(update={"search": read_search(folder)}) if whole else record


def read_search(folder: Path) -> SearchFile:
    """Read search.json strictly, and check that it belongs to the supernet beside it."""
    path, again = folder / SEARCH, "Search again."
    search = validated(SearchFile, read_sealed(path, FORMAT_VERSION, again), str(path))
    if search.sha256 != sha256_of(folder / SUPERNET):
        raise InvalidFile(f"{path} does not belong to the {SUPERNET} beside it. {again}")
    return search
