"""Write docs/results.md from the JSON in benchmarks/results: every number in the docs comes from here.

python benchmarks/tables.py
"""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from tables_export import SECTIONS as EXPORT_SECTIONS
from tables_grow import SECTIONS as GROW_SECTIONS
from tables_text import SECTIONS as TEXT_SECTIONS
from tables_train_once import SECTIONS as TRAIN_ONCE_SECTIONS
from written import RESULTS, ROOT, entries, paired_interval, spread, table

PRECISIONS = ("W4A8", "W4A4", "W3A3", "W2A4", "W2A2")
AIMS = {"W4A8": 91.7, "W4A4": 91.4, "W3A3": 90.3, "W2A4": 89.8, "W2A2": 86.5}


VARIANTS = {
    "": "300 steps, mirror images",
    "long": "1,000 steps, mirror images, dropping 0.5",
    "1000 steps": "1,000 steps, mirror images",
    "parallel first": "300 steps, mirror images, parallel AdaQuant before",
}


def uniform_runs(precision: str, variant: str = "") -> list[dict[str, Any]]:
    """A run a seed."""
    runs = {key.rpartition("seed")[0] or key: [] for key in entries("resnet20_uniform")}
    for key, run in entries("resnet20_uniform").items():
        runs[key.rpartition("seed")[0] or key].append(run)
    return next((found for key, found in runs.items() if key.split() == [precision, *variant.split()]), [])


def uniform_section() -> str:
    rows = []
    for precision in PRECISIONS:
        for variant, words in VARIANTS.items():
            if found := uniform_runs(precision, variant):
                seconds = statistics.mean(run["seconds"] for run in found)
                accuracy = spread([run["top1"] for run in found])
                rows.append([precision, words, accuracy, str(len(found)), f"{AIMS[precision]}", f"{seconds:.0f} s"])
    return table(["precision", "settings", "top-1, mean (range)", "seeds", "aim", "time"], rows)


def ladder_section() -> str:
    runs = entries("resnet20_ladder")
    present = [p for p in PRECISIONS if any(key.startswith(f"{p} ") for key in runs)]
    rungs = list(dict.fromkeys(key.partition(" ")[2] for key in runs if key.split(" ")[0] in present))
    rows = []
    for rung in rungs:
        cells = []
        for precision in present:
            run = runs.get(f"{precision} {rung}")
            cells.append(f"{run['top1']:.2f} ({run['seconds']:.0f} s)" if run else "")
        rows.append([rung, *cells])
    return table(["step", *present], rows)


def mixed_runs() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(budget, activations) -> a run a seed."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, run in entries("resnet20_mixed").items():
        for row in run.get("rows", []):
            runs.setdefault((row["budget"], key.split(" ")[0]), []).append(row)
    return runs


def mixed_section() -> str:
    runs = entries("resnet20_mixed")
    rows = []
    for (budget, label), found in mixed_runs().items():
        rows.append(
            [
                budget,
                label,
                spread([row["top1"] for row in found]),
                f"{found[0]['bytes'] / 1000:.1f} kB",
                f"{found[0]['bops'] / 1e9:.2f} G",
                ", ".join(sorted({row["chosen"].split()[0] for row in found})),
            ]
        )
    text = table(["budget", "activations", "top-1, mean (range)", "size", "BOPs", "chosen"], rows)
    pairs = []
    for key, run in runs.items():
        if not key.startswith("uniform"):
            continue
        _, precision, _, seed = key.split(" ")
        budget = {"W4A8": ("4bit", "A8"), "W3A8": ("3bit", "A8"), "W4A4": ("4bit,bops=650M", "searched")}[precision]
        for row in runs.get(f"{budget[1]} seed {seed}", {}).get("rows", []):
            if row["budget"] == budget[0]:
                pairs.append(
                    [
                        f"{budget[0]}, {budget[1]}",
                        precision,
                        seed,
                        f"{row['top1']:.2f}",
                        f"{run['top1']:.2f}",
                        paired_interval(row["right"], run["right"]),
                    ]
                )
    if pairs:
        text += "\n\n" + table(["mixed", "uniform", "seed", "mixed top-1", "uniform top-1", "difference (paired 95 %)"], sorted(pairs))
    return text


def small_section() -> str:
    runs = entries("resnet20_small_sets")
    names = list(dict.fromkeys(key.split(", ")[2] for key in runs))
    counts = sorted({int(key.split(" ")[0]) for key in runs})
    rows = []
    for count in counts:
        cells = []
        for name in names:
            found = [run for key, run in runs.items() if key.startswith(f"{count} images") and key.endswith(name)]
            cells.append(spread([run["top1"] for run in found]))
            units = [unit for run in found for unit in run["units"].values() if unit.get("fitted_after")]
            if name != "ranges only":
                errors = [statistics.median(unit[key] for unit in units) for key in ("fitted_after", "after")] if units else []
                cells.append(" / ".join(f"{error:.4f}" for error in errors))
        rows.append([str(count), *cells])
    columns = ["images"]
    for name in names:
        columns += [name] if name == "ranges only" else [name, "its median unit's error: fitted / held out"]
    return table(columns, rows)


def scatter_section() -> str:
    runs = entries("resnet20_scatter")
    if not runs:
        return "Not run."
    rows = next(iter(runs.values()))["rows"]
    rank = spearmanr([row["predicted"] for row in rows], [row["measured"] for row in rows]).statistic
    kinds = {"integer program": "allocated", "random schemes": "random", "uniform": "uniform"}
    lines = []
    for label, prefix in kinds.items():
        found = [row for row in rows if row["name"].startswith(prefix)]
        if found:
            best = min(found, key=lambda row: row["measured"])
            lines.append(
                [
                    label,
                    str(len(found)),
                    f"{best['weight_bits']:.2f}",
                    f"{best['predicted']:.4f}",
                    f"{best['measured']:.4f}",
                    f"{statistics.median(row['measured'] for row in found):.4f}",
                ]
            )
    text = table(["schemes", "how many", "bits of the best", "its predicted loss", "its measured loss", "median measured loss"], lines)
    write_scatter(rows, ROOT / "docs" / "allocation.svg")
    picture = "![Predicted against measured loss](allocation.svg)"
    return f"{text}\n\n{picture}\n\nRank correlation of predicted and measured loss over all {len(rows)}: {rank:.2f}."


def write_scatter(rows: list[dict[str, Any]], path: Path) -> None:
    """Predicted against measured loss, both axes logarithmic, as a small SVG picture."""
    width, height, margin = 560, 420, 56
    values = [math.log10(max(row[axis], 1e-6)) for row in rows for axis in ("predicted", "measured")]
    low, high = math.floor(2 * min(values)) / 2, math.ceil(2 * max(values)) / 2

    def place(row: dict[str, Any]) -> tuple[float, float]:
        x, y = (math.log10(max(row[axis], 1e-6)) for axis in ("predicted", "measured"))
        across, up = (x - low) / (high - low), (y - low) / (high - low)
        return margin + across * (width - 2 * margin), height - margin - up * (height - 2 * margin)

    marks = {"allocated": ("circle", "#1b6ca8"), "random": ("cross", "#888888"), "uniform": ("square", "#c1440e")}
    shapes = []
    for row in rows:
        x, y = place(row)
        kind, color = marks[row["name"].split()[0]]
        title = f"<title>{row['name']}: predicted {row['predicted']:.4f}, measured {row['measured']:.4f}</title>"
        shape = {
            "circle": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{color}">{title}</circle>',
            "square": f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" fill="{color}">{title}</rect>',
            "cross": f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8" stroke="{color}" stroke-width="2">{title}</path>',
        }[kind]
        shapes.append(shape)
    ticks = []
    for tick in np.arange(low, high + 0.1, 0.5):
        x, y = place({"predicted": 10**tick, "measured": 10**tick})
        ticks.append(f'<text x="{x:.0f}" y="{height - margin + 18}" text-anchor="middle">{10**tick:.2g}</text>')
        ticks.append(f'<text x="{margin - 8}" y="{y + 4:.0f}" text-anchor="end">{10**tick:.2g}</text>')
    start, end = margin, width - margin
    frame = f'<path d="M{start} {height - margin}L{end} {margin}" stroke="#bbbbbb" stroke-dasharray="4"/>'
    frame += f'<path d="M{start} {margin}V{height - margin}H{end}" fill="none" stroke="#444444"/>'
    legend = "".join(
        f'<text x="{margin + 14}" y="{margin + 16 * index}" fill="{color}">{kind}: {name}</text>'
        for index, (name, (kind, color)) in enumerate(marks.items())
    )
    labels = f'<text x="{width / 2}" y="{height - 12}" text-anchor="middle">predicted loss</text>'
    labels += f'<text transform="translate(14 {height / 2}) rotate(-90)" text-anchor="middle">measured loss (held-out)</text>'
    body = "\n".join(['<rect width="100%" height="100%" fill="white"/>', frame, *ticks, labels, legend, *shapes])
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n{body}\n</svg>\n')


def speed_section() -> str:
    runs = entries("resnet20_speed")
    peers = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("peer_brevitas_*.json"))]
    rows = []
    for precision in ("W4A8", "W4A4"):
        w, a = int(precision[1]), int(precision[3])
        found = [peer for peer in peers if (peer["weight_bits"], peer["activation_bits"]) == (w, a)]
        if not found:
            continue
        peer_seconds = statistics.mean(peer["seconds"] for peer in found)
        rows.append([precision, f"Brevitas {found[0]['recipe']}", spread([peer["top1"] for peer in found]), f"{peer_seconds:.0f} s", "1"])
        for name in dict.fromkeys(key.split(" ", 1)[1].rsplit(" seed", 1)[0] for key in runs if key.startswith(precision)):
            ours = [run for key, run in runs.items() if key.startswith(f"{precision} {name}")]
            seconds = statistics.mean(run["seconds"] for run in ours)
            rows.append(
                [precision, f"anybit {name}", spread([run["top1"] for run in ours]), f"{seconds:.0f} s", f"{peer_seconds / seconds:.1f}"]
            )
    return table(["precision", "tool", "top-1, mean (range)", "time", "times faster"], rows) if rows else "Not run."


def efficientnet_section() -> str:
    runs = entries("efficientnet_lite0")
    rows = [
        [
            name,
            f"{run['test']['top1']:.1f}",
            f"{run['test']['top5']:.1f}",
            f"{run['result']['bytes'] / 1e6:.2f} MB",
            f"{run['result']['weight_bits']:.2f}",
            f"{run['total_seconds'] / 60:.0f} min",
            paired_interval(run["right"], run["float_right"]) if "right" in run else "",
        ]
        for name, run in runs.items()
    ]
    columns = ["run", "top-1 (float 90.7)", "top-5", "size", "bits a weight", "time with tests", "less float (paired 95 %)"]
    return table(columns, rows) if rows else "Not run."


def allocation_section() -> str:
    file = RESULTS / "allocation_scale.json"
    if not file.is_file():
        return "Not run."
    rows = [
        [
            str(row["seed"]),
            f"{row['anybit']['processor_seconds']:.1f} s ({row['anybit']['seconds']:.1f} s)",
            f"{row['anybit']['objective']:.6f}",
            f"{row['anybit']['gap']:.1e}",
            f"{row['pulp']['processor_seconds']:.1f} s ({row['pulp']['seconds']:.1f} s)",
            f"{row['pulp']['objective']:.6f}",
            row["pulp"]["status"],
        ]
        for row in json.loads(file.read_text())["rows"]
    ]
    return table(["problem", "anybit: processor (clock)", "loss", "gap", "PuLP/CBC: processor (clock)", "loss", "status"], rows)


def stages_section() -> str:
    runs = entries("resnet20_mixed")
    run = runs.get("A8 seed 0")
    if not run:
        return "Not run."
    stages = run["rows"][0]["stages"]
    one_pass = next(stage["seconds"] for stage in stages if stage["stage"] == "float outputs")
    rows = [[s["stage"], f"{s['seconds'] / one_pass:.1f}", f"{s['peak_bytes'] / 1e6:.0f} MB"] for s in stages]
    return table(
        ["stage (mixed, 4 bits, 1,024 images and their mirror images)", "float passes over the calibration set", "peak memory"], rows
    )


SECTIONS = {
    "UNIFORM": uniform_section, "LADDER": ladder_section, "MIXED": mixed_section, "SMALL": small_section, "SCATTER": scatter_section,
    "SPEED": speed_section, "EFFICIENTNET": efficientnet_section, "ALLOCATION": allocation_section, "STAGES": stages_section,
}  # fmt: skip


def readme_section() -> str:
    """The headline numbers."""
    rows = []
    for (budget, label), found in sorted(mixed_runs().items(), key=lambda item: -item[1][0]["bytes"]):
        if label == "A8":
            size = f"{found[0]['bytes'] / 1000:.0f} kB ({found[0]['percent']:.1f} %)"
            rows.append(
                ["ResNet-20, CIFAR-10", f"mixed, `{budget}`, 8-bit activations", "91.73", spread([row["top1"] for row in found]), size]
            )
    for precision in PRECISIONS:
        if found := max(uniform_runs(precision, "long"), uniform_runs(precision), key=len):  # of equally many seeds the long ones
            size = f"{found[0]['bytes'] / 1000:.0f} kB ({found[0]['percent']:.1f} %)"
            rows.append(["ResNet-20, CIFAR-10", f"{precision}, ends at 8 bits", "91.73", spread([run["top1"] for run in found]), size])
    for name, run in entries("efficientnet_lite0").items():
        size = f"{run['result']['bytes'] / 1e6:.1f} MB ({run['result']['percent']:.1f} %)"
        rows.append(["EfficientNet-lite0, ImageNet-like", name, f"{run['float_test']['top1']:.1f}", f"{run['test']['top1']:.1f}", size])
    for name, run in {**entries("minilm_uniform"), **entries("minilm_mixed")}.items():
        size = f"{run['bytes'] / 1e6:.1f} MB ({run['percent']:.1f} %)"
        rows.append(["MiniLM-L6, SST-2", name, f"{run['float']['top1']:.1f}", f"{run['top1']:.1f}", size])
    return table(["network", "scheme", "float", "top-1", "file (of float32)"], rows)


def main() -> None:
    """Fill the tables into the text of docs/results.in.md and of the README."""
    text = (ROOT / "docs" / "results.in.md").read_text()
    for name, section in {**SECTIONS, **GROW_SECTIONS, **TRAIN_ONCE_SECTIONS, **TEXT_SECTIONS, **EXPORT_SECTIONS}.items():
        text = text.replace(f"<!-- {name} -->", section())
    (ROOT / "docs" / "results.md").write_text(text)
    readme = (ROOT / "README.md").read_text()
    before, rest = readme.split("<!-- results -->")
    (ROOT / "README.md").write_text(
        f"{before}<!-- results -->\n\n{readme_section()}\n\n<!-- /results -->{rest.split('<!-- /results -->')[1]}"
    )


if __name__ == "__main__":
    main()
