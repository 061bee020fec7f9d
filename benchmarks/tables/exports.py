"""The sections of docs/results.md on exported files."""

from collections.abc import Mapping
from typing import Any

from benchmarks.tables.shared import NOT_RUN, entries, table

NAMES = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "mobilenet_v2": "MobileNetV2",
    "bert_base": "BERT-base encoder, 128 tokens",
    "resnet20": "ResNet-20, 32 x 32",
}


def faster(run: Mapping[str, Any], runtime: str = "onnxruntime") -> str:
    """Write "3.31 (3.28 to 3.35)"."""
    if runtime not in run:
        return ""
    speed = run[runtime]["faster"]
    return f"{speed['ratio']:.2f} ({speed['low']:.2f} to {speed['high']:.2f})"


def over(run: Mapping[str, Any]) -> str:
    return f"{100 * (run['bytes'] / run['ideal_bytes'] - 1):.1f} %"


def shapes_section() -> str:
    rows = []
    for key, run in entries("export_shapes").items():
        name, _, scheme = key.partition(" ")
        scheme = "random W2..8 A4..8" if scheme.startswith("random") else scheme
        exact = "yes" if run["bitwise"] else "" if run["in_float"] else "no"
        size, kernels = f"{run['float_bytes'] / run['bytes']:.2f}x", f"{run['kernels']} of {len(run['layers'])}"
        rows.append([NAMES[name], scheme, faster(run), faster(run, "openvino"), size, over(run), kernels, exact])
    columns = [
        "shape",
        "scheme",
        "speedup over float32 (quartiles)",
        "speedup in OpenVINO",
        "smaller",
        "size above bits",
        "on integers",
        "bit for bit",
    ]
    columns, rows = _filled(columns, rows)
    return table(columns, rows)


def _filled(columns: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Drop the columns that are empty in every row."""
    filled = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    return [columns[index] for index in filled], [[row[index] for index in filled] for row in rows]


def linears_section() -> str:
    rows = [
        [
            key,
            faster(run),
            f"{run['float_bytes'] / run['bytes']:.2f}x",
            over(run),
            f"{100 * run['largest_difference_of_largest_output']:.2f} %",
        ]
        for key, run in entries("export_linears").items()
    ]
    columns = [
        "weights",
        "speedup over float32 (quartiles)",
        "smaller",
        "size above bits",
        "largest difference, relative to the largest output",
    ]
    return table(columns, rows)


def exact_section() -> str:
    runs = entries("export_exact")
    if not runs:
        return NOT_RUN
    exact = [key for key, run in runs.items() if run["bitwise"]]
    networks = {key.rpartition(" seed")[0] for key in runs}
    text = f"{len(exact)} of {len(runs)} random mixed schemes of {len(networks)} small networks are equal bit for bit, on 64 inputs each."
    other = [f"{key}: {run['largest_difference']:.3g}" for key, run in runs.items() if not run["bitwise"]]
    return text + (f" The others differ by: {'; '.join(other)}." if other else "")


def accuracy_section() -> str:
    rows = []
    for network, name in (("ResNet-20, CIFAR-10", "export_resnet20"), ("EfficientNet-lite0, ImageNet-like", "export_lite0")):
        for key, run in entries(name).items():
            half = 1.96 * run["standard_error"]
            apart = f"{run['difference']:+.2f} ({run['difference'] - half:+.2f} to {run['difference'] + half:+.2f})"
            exact = "yes" if run["bitwise"] else "no"
            accuracies = [f"{run[kind]:.2f}" for kind in ("simulated", "exported")]
            rows.append([network, key, *accuracies, apart, f"{run['agreement']:.2f} %", f"{run['bytes'] / 1000:.1f} kB", over(run), exact])
    columns = ["network", "scheme", "simulated", "exported", "difference (95 %)", "same class", "file", "size above bits", "bit for bit"]
    return table(columns, rows)


def saturation_section() -> str:
    rows = []
    for key, run in entries("export_saturation").items():
        name, _, scheme = key.partition(" ")
        sessions = [run["as it is"], run["exact sums"]]
        speeds = [f"{one['faster']['ratio']:.2f}" for one in sessions]
        plain, exact = ("bit for bit" if one["bitwise"] else f"{100 * one['apart']:.2g} % apart" for one in sessions)
        rows.append([NAMES.get(name, f"small network, {name}"), scheme, str(run["saturating"]), plain, exact, *speeds])
    columns = [
        "network",
        "scheme",
        "layers named",
        "default session",
        "with exact sums",
        "speedup over float32, default session",
        "with exact sums",
    ]
    return table(columns, rows)


def latency_section() -> str:
    """Write a row per network and share of float layers: predicted and measured time over float32's, minimum and maximum over schemes."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for key, run in entries("export_latency").items():
        name, _, scheme = key.partition(" ")
        groups.setdefault((NAMES[name], scheme.partition(",")[0]), []).append(run)

    def ends(runs: list[Mapping[str, Any]], quantity: str, digits: int = 2) -> str:
        numbers = sorted(run[quantity] for run in runs)
        least, most = (f"{number:.{digits}f}" for number in (numbers[0], numbers[-1]))
        return least if len(runs) == 1 else f"{least} to {most}"

    rows = [
        [
            name,
            share,
            str(len(runs)),
            *(ends(runs, quantity) for quantity in ("predicted_of_float", "measured_of_float", "predicted_by_measured")),
        ]
        for (name, share), runs in groups.items()
    ]
    columns = ["shape", "layers", "schemes", "predicted time / float32", "measured", "predicted / measured"]
    return table(columns, rows)


SECTIONS = {
    "EXPORTLATENCY": latency_section,
    "EXPORTSHAPES": shapes_section,
    "EXPORTLINEARS": linears_section,
    "EXPORTEXACT": exact_section,
    "EXPORTACCURACY": accuracy_section,
    "EXPORTSATURATION": saturation_section,
}
