"""The headline numbers of the README."""

from benchmarks.tables.calibrate import PRECISIONS, mixed_runs, uniform_runs
from benchmarks.tables.shared import entries, spread, table


def readme_section() -> str:
    rows = []
    for (budget, label), runs in sorted(mixed_runs().items(), key=lambda item: -item[1][0]["bytes"]):
        if label == "A8":
            size = f"{runs[0]['bytes'] / 1000:.0f} kB ({runs[0]['percent']:.1f} %)"
            rows.append(
                ["ResNet-20, CIFAR-10", f"mixed, `{budget}`, 8-bit activations", "91.73", spread([row["top1"] for row in runs]), size]
            )
    for precision in PRECISIONS:
        if runs := max(uniform_runs(precision, "long"), uniform_runs(precision), key=len):  # of equally many seeds the long ones
            size = f"{runs[0]['bytes'] / 1000:.0f} kB ({runs[0]['percent']:.1f} %)"
            rows.append(["ResNet-20, CIFAR-10", f"{precision}, ends at 8 bits", "91.73", spread([run["top1"] for run in runs]), size])
    for name, run in entries("efficientnet_lite0").items():
        size = f"{run['result']['bytes'] / 1e6:.1f} MB ({run['result']['percent']:.1f} %)"
        rows.append(["EfficientNet-lite0, ImageNet-like", name, f"{run['float_test']['top1']:.1f}", f"{run['test']['top1']:.1f}", size])
    for name, run in {**entries("minilm_uniform"), **entries("minilm_mixed")}.items():
        size = f"{run['bytes'] / 1e6:.1f} MB ({run['percent']:.1f} %)"
        rows.append(["MiniLM-L6, SST-2", name, f"{run['float']['top1']:.1f}", f"{run['top1']:.1f}", size])
    return table(["network", "scheme", "float", "top-1", "file (of float32)"], rows)
