"""The sections of docs/results.md on the calibrate road."""

import json
import statistics
from typing import Any

from scipy.stats import spearmanr

from benchmarks.tables.shared import NOT_RUN, RESULTS, entries, paired_interval, spread, table

PRECISIONS = ("W4A8", "W4A4", "W3A3", "W2A4", "W2A2")
FLOAT_TOP1 = 91.73
"""The float ResNet-20's accuracy on the test set of CIFAR-10, in percent."""

TARGETS = {"W4A8": 91.7, "W4A4": 91.4, "W3A3": 90.3, "W2A4": 89.8, "W2A2": 86.5}


VARIANTS = {
    "": "300 steps, mirrored images",
    "long": "1,000 steps, mirrored images, `drop` 0.5",
    "1000 steps": "1,000 steps, mirrored images",
    "parallel first": "300 steps, mirrored images, after parallel AdaQuant",
}


def uniform_runs(precision: str, variant: str = "") -> list[dict[str, Any]]:
    """Return one run per seed."""
    runs = {key.rpartition("seed")[0] or key: [] for key in entries("resnet20_uniform")}
    for key, run in entries("resnet20_uniform").items():
        runs[key.rpartition("seed")[0] or key].append(run)
    return next((matching for key, matching in runs.items() if key.split() == [precision, *variant.split()]), [])


def uniform_section() -> str:
    rows = []
    for precision in PRECISIONS:
        for variant, words in VARIANTS.items():
            if matching := uniform_runs(precision, variant):
                seconds = statistics.mean(run["seconds"] for run in matching)
                accuracy = spread([run["top1"] for run in matching])
                rows.append([precision, words, accuracy, str(len(matching)), f"{TARGETS[precision]}", f"{seconds:.0f} s"])
    return table(["precision", "settings", "top-1, mean (range)", "seeds", "target", "time"], rows)


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


def solver_section() -> str:
    """Compare the solver with rounding to nearest in one run: accuracy, and the ratio of processor times."""
    runs = entries("resnet20_solver")
    rows = []
    for key in dict.fromkeys(key.rpartition(" ")[0] for key in runs):
        without, with_solver = runs.get(f"{key} none"), runs.get(f"{key} gptq")
        if without and with_solver:
            ratio = with_solver["processor_seconds"] / without["processor_seconds"]
            difference = paired_interval(with_solver["right"], without["right"])
            rows.append([*key.split(" "), f"{without['top1']:.2f}", f"{with_solver['top1']:.2f}", difference, f"{ratio:.2f}"])
    heads = ["precision", "pipeline", "no solver", "gptq", "difference (paired 95 %)", "processor time, ratio"]
    return table(heads, rows) if rows else NOT_RUN


def roundings_section() -> str:
    """Compare each rounding with AdaQuant: accuracy, and the ratio of processor times."""
    runs = entries("resnet20_roundings")
    rows = []
    for key, run in runs.items():
        precision, name = key.split(" ")
        adaquant = runs[f"{precision} adaquant"]
        difference = "" if run is adaquant else paired_interval(run["right"], adaquant["right"])
        ratio = run["processor_seconds"] / adaquant["processor_seconds"]
        rows.append([precision, name, f"{run['top1']:.2f}", difference, f"{ratio:.2f}"])
    heads = ["precision", "rounding", "top-1", "against AdaQuant (paired 95 %)", "processor time, ratio"]
    return table(heads, rows) if rows else NOT_RUN


def sensitivities_section() -> str:
    """Measured and predicted sensitivity: accuracy for each budget, and the ratio of the stage's times."""
    runs = entries("resnet20_sensitivities")
    rows = []
    for solver in ("none", "gptq"):
        measured = _seeds(runs, solver, "measured")
        for name in ("measured", "hawq"):
            seeds = _seeds(runs, solver, name)
            if len(seeds) == len(measured) and seeds:
                ratio = sum(map(_sensitivity_seconds, seeds)) / sum(map(_sensitivity_seconds, measured))
                accuracies = [spread([one["rows"][at]["top1"] for one in seeds]) for at in range(2)]
                losses = [f"{statistics.mean(_loss(one['rows'][at]) for one in seeds):.4f}" for at in range(2)]
                rows.append([solver, name, accuracies[0], losses[0], accuracies[1], losses[1], f"{ratio:.1f}"])
    heads = ["solver", "sensitivity", "3 bits: top-1", "held-out loss", "2.5 bits: top-1", "held-out loss", "time of the stage, ratio"]
    return table(heads, rows) if rows else NOT_RUN


def _seeds(runs: dict[str, Any], solver: str, name: str) -> list[dict[str, Any]]:
    return [run for key, run in runs.items() if key.startswith(f"solver {solver} {name} ")]


def _loss(row: dict[str, Any]) -> float:
    """The held-out loss of the scheme that was chosen, before polishing."""
    return next(step["loss"] for step in row["ladder"] if step["step"] == "candidates")


def _sensitivity_seconds(run: dict[str, Any]) -> float:
    return next(stage["seconds"] for stage in run["rows"][0]["stages"] if stage["stage"] == "sensitivity")


def mixed_runs() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return (budget, activations) -> one run per seed."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, run in entries("resnet20_mixed").items():
        for row in run.get("rows", []):
            runs.setdefault((row["budget"], key.split(" ")[0]), []).append(row)
    return runs


def uniform_8bit_input_runs() -> dict[str, list[dict[str, Any]]]:
    """Return precision -> one run per seed, for the runs with every layer, including first and last, at W3A8 or W4A8."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for key, run in entries("resnet20_mixed").items():
        kind, *words = key.split(" ")
        if kind == "uniform" and words[0].endswith("A8"):
            runs.setdefault(words[0], []).append(run)
    return runs


def mixed_section() -> str:
    runs = entries("resnet20_mixed")
    rows = []
    for (budget, label), matching in mixed_runs().items():
        rows.append(
            [
                budget,
                label,
                spread([row["top1"] for row in matching]),
                f"{matching[0]['bytes'] / 1000:.1f} kB",
                f"{matching[0]['bops'] / 1e9:.2f} G",
                ", ".join(sorted({row["chosen"].split()[0] for row in matching})),
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
            matching = [run for key, run in runs.items() if key.startswith(f"{count} images") and key.endswith(name)]
            cells.append(spread([run["top1"] for run in matching]))
            units = [unit for run in matching for unit in run["units"].values() if unit.get("fitted_after")]
            if name != "ranges only":
                errors = [statistics.median(unit[key] for unit in units) for key in ("fitted_after", "after")] if units else []
                cells.append(" / ".join(f"{error:.4f}" for error in errors))
        rows.append([str(count), *cells])
    columns = ["images"]
    for name in names:
        columns += [name] if name == "ranges only" else [name, "median unit error: fitted / held out"]
    return table(columns, rows)


def scatter_schemes() -> list[dict[str, Any]]:
    """Read the schemes with their predicted and measured loss."""
    return next((run["rows"] for run in entries("resnet20_scatter").values()), [])


def scatter_section() -> str:
    rows = scatter_schemes()
    if not rows:
        return NOT_RUN
    rank = spearmanr([row["predicted"] for row in rows], [row["measured"] for row in rows]).statistic
    kinds = {"integer program": "allocated", "random schemes": "random", "uniform": "uniform"}
    lines = []
    for label, prefix in kinds.items():
        matching = [row for row in rows if row["name"].startswith(prefix)]
        if matching:
            best = min(matching, key=lambda row: row["measured"])
            lines.append(
                [
                    label,
                    str(len(matching)),
                    f"{best['weight_bits']:.2f}",
                    f"{best['predicted']:.4f}",
                    f"{best['measured']:.4f}",
                    f"{statistics.median(row['measured'] for row in matching):.4f}",
                ]
            )
    text = table(["schemes", "count", "bits of the best", "its predicted loss", "its measured loss", "median measured loss"], lines)
    figure = "![Predicted against measured loss](allocation.svg)"
    return f"{text}\n\n{figure}\n\nRank correlation of predicted and measured loss over all {len(rows)}: {rank:.2f}."


def speed_section() -> str:
    runs = entries("resnet20_speed")
    peers = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("peer_brevitas_*.json"))]
    rows = []
    for precision in ("W4A8", "W4A4"):
        w, a = int(precision[1]), int(precision[3])
        matching = [peer for peer in peers if (peer["weight_bits"], peer["activation_bits"]) == (w, a)]
        if not matching:
            continue
        peer_seconds = statistics.mean(peer["seconds"] for peer in matching)
        rows.append(
            [precision, f"Brevitas {matching[0]['recipe']}", spread([peer["top1"] for peer in matching]), f"{peer_seconds:.0f} s", "1"]
        )
        for name in dict.fromkeys(key.split(" ", 1)[1].rsplit(" seed", 1)[0] for key in runs if key.startswith(precision)):
            ours = [run for key, run in runs.items() if key.startswith(f"{precision} {name}")]
            seconds = statistics.mean(run["seconds"] for run in ours)
            rows.append(
                [precision, f"anybit {name}", spread([run["top1"] for run in ours]), f"{seconds:.0f} s", f"{peer_seconds / seconds:.1f}"]
            )
    return table(["precision", "tool", "top-1, mean (range)", "time", "speedup"], rows)


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
    columns = ["run", "top-1 (float 90.7)", "top-5", "size", "bits per weight", "time with tests", "difference from float (paired 95 %)"]
    return table(columns, rows)


def allocation_section() -> str:
    file = RESULTS / "allocation_scale.json"
    if not file.is_file():
        return NOT_RUN
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
    return table(
        ["problem", "anybit: processor time (wall time)", "loss", "gap", "PuLP/CBC: processor time (wall time)", "loss", "status"], rows
    )


def stages_section() -> str:
    runs = entries("resnet20_mixed")
    run = runs.get("A8 seed 0")
    if not run:
        return NOT_RUN
    stages = run["rows"][0]["stages"]
    one_pass = next(stage["seconds"] for stage in stages if stage["stage"] == "float outputs")
    rows = [[s["stage"], f"{s['seconds'] / one_pass:.1f}", f"{s['peak_bytes'] / 1e6:.0f} MB"] for s in stages]
    return table(
        ["stage (mixed, 4 bits, 1,024 images and their mirrored copies)", "float passes over the calibration set", "peak memory"], rows
    )


SECTIONS = {
    "UNIFORM": uniform_section, "LADDER": ladder_section, "SOLVER": solver_section,
    "ROUNDINGS": roundings_section, "SENSITIVITIES": sensitivities_section, "MIXED": mixed_section, "SMALL": small_section,
    "SCATTER": scatter_section,
    "SPEED": speed_section, "EFFICIENTNET": efficientnet_section, "ALLOCATION": allocation_section, "STAGES": stages_section,
}  # fmt: skip
