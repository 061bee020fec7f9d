"""Compare two runs of any workflow, from their files alone: no network is built, no reference followed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anybit.calls import public
from anybit.runs.names import SUPERNET_JSON
from anybit.runs.report import read_report
from anybit.runs.scheme_file import SchemeFile, read_scheme
from anybit.supernets.folder import read_supernet_file

KEYS = ("name", "step", "epoch")
"""Keys that identify the rows of a report's lists."""


@public
def diff(run: str | Path, run2: str | Path) -> dict[str, Any]:
    """Compare two runs of any workflow.

    "differences" holds, by section and key of the runs' files, [value of the first, value of the second]; None means absent. "same" says
    whether there are none, ignoring times and memory; "same_weights", whether the packed weights are equal. Units are sorted by falling
    change of error. Layers are compared by name. Raises InvalidFile if a folder is not a run.
    """
    first, second = _facts(Path(run)), _facts(Path(run2))
    same_weights = first.pop("sha256") == second.pop("sha256")
    differences = _differences(first, second) or {}
    if "units" in differences:
        differences["units"] = dict(sorted(differences["units"].items(), key=lambda unit: -_change(unit[1])))
    shared = len(first["shapes"].keys() & second["shapes"].keys())
    return {
        "runs": [str(run), str(run2)],
        "same": same_weights and not differences,
        "same_weights": same_weights,
        "shared_layers": shared,
        "differences": differences,
    }


def _facts(folder: Path) -> dict[str, Any]:
    """Return section -> facts of a run: its settings and results, without times and memory, which differ between equal runs."""
    file = read_supernet_file(folder) if (folder / SUPERNET_JSON).is_file() else read_scheme(folder)
    report = read_report(folder)
    identity = {key: report.pop(key, None) for key in ("road", "budget", "stages", "latency", "layers", "version", "sha256", "digest")}
    first = {key: report.pop(key, None) for key in ("settings", "environment")}
    report.pop("preprocessing", None)  # which is among the references
    return {
        "run": {"road": identity["road"] or "calibrate", "budget": identity["budget"]},
        **first,
        "references": {"model": file.model, "data": file.data, "preprocessing": file.preprocessing, "task": file.task},
        "shapes": {name: f"{layer.rows} x {layer.columns}" for name, layer in file.layers.items()},
        "bits": file.scheme.to_json() if isinstance(file, SchemeFile) else {},
        **{key: report.pop(key, None) for key in ("result", "ladder", "float_test", "test", "units")},
        **report,
        "sha256": file.sha256,
    }


def _differences(first: Any, second: Any) -> Any:
    """Return the differing keys of two objects or lists of rows; for anything else [first, second], or nothing if they are equal."""
    first, second = _by_name(first), _by_name(second)
    if first == second:
        return []
    if not isinstance(first, Mapping | None) or not isinstance(second, Mapping | None):
        return [first, second]
    first, second = first or {}, second or {}
    differences = {key: _differences(first.get(key), second.get(key)) for key in dict.fromkeys([*first, *second])}
    return {key: different for key, different in differences.items() if different}


def _by_name(value: Any) -> Any:
    """Turn a list of rows into an object, keyed by each row's name or else its number."""
    if not isinstance(value, list) or not value or not all(isinstance(row, Mapping) for row in value):
        return value
    names = [str(next((row[key] for key in KEYS if key in row), index)) for index, row in enumerate(value)]
    return dict(zip(names if len(set(names)) == len(names) else map(str, range(len(names))), value, strict=True))


def _change(unit: Mapping[str, Any]) -> float:
    """Return how far a unit's error moved, relative to the larger of the two; infinity if one run lacks it."""
    after = unit.get("after", [0.0, 0.0])
    if not all(isinstance(error, float) for error in after):
        return float("inf")
    return abs(after[0] - after[1]) / max(*after, 1e-30)
