"""The headline numbers of the README."""

from typing import Any

from benchmarks.tables.calibrate import FLOAT_TOP1, mixed_runs
from benchmarks.tables.shared import entries, spread, table
from benchmarks.tables.zoo import LIBRARIES, of_library, share, went_through

RESNET, LITE0, MINILM = "ResNet-20, CIFAR-10", "EfficientNet-lite0, ImageNet-like", "MiniLM-L6, SST-2"


def readme_section() -> str:
    """Write two rows per network, the second at a loss of accuracy, and a line on the networks that work."""
    rows = []
    for budget in ("4bit", "2.5bit"):
        if runs := mixed_runs().get((budget, "A8")):
            rows.append([RESNET, mixed(budget), f"{FLOAT_TOP1}", spread([run["top1"] for run in runs]), size(runs[0], "kB")])
    for name, words in (("mixed 4bit A8", mixed("4bit")), ("W4A4 advanced", "W4A4, first and last layer W8A8")):
        if run := entries("efficientnet_lite0").get(name):
            rows.append([LITE0, words, f"{run['float_test']['top1']:.1f}", f"{run['test']['top1']:.1f}", size(run["result"], "MB")])
    for name, words in (("3bit", mixed("3bit")), ("W4A4", "W4A4")):
        if run := (entries("minilm_uniform") | entries("minilm_mixed")).get(name):
            rows.append([MINILM, words, f"{run['float']['top1']:.1f}", f"{run['top1']:.1f}", size(run, "MB")])
    headline = table(["network, data", "precision", "float32 top-1, %", "top-1, %", "file size (% of float32)"], rows)
    return f"{headline}\n\n{networks_line()}"


def networks_line() -> str:
    """Write how many public networks pass all steps."""
    shares = [f"{name} {share(networks, went_through)}" for name in LIBRARIES if (networks := of_library(name).values())]
    words = "Public networks that work, from `inspect` to a verified ONNX file, of those run so far"
    return f"{words}: {', '.join(shares)}; [the list](docs/networks.md)."


def mixed(budget: str) -> str:
    return f"mixed, {budget.removesuffix('bit')} bits per weight, 8-bit activations"


def size(run: dict[str, Any], unit: str) -> str:
    """Write "141 kB (12.8 %)"."""
    number = f"{run['bytes'] / 1000:.0f}" if unit == "kB" else f"{run['bytes'] / 1e6:.1f}"
    return f"{number} {unit} ({run['percent']:.1f} %)"
