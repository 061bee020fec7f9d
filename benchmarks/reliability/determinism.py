"""Differences between calibrate runs of the digits network at several thread counts; nothing else should change a result.

    python examples/digits.py runs/digits
    python -m benchmarks.reliability.determinism --data runs/digits/digits.npz --weights runs/digits/weights.safetensors

Each run is a separate process. Floating-point sums depend on how they are split over threads; the study counts the consequences of their
last digits: codes that differ, layers whose bits differ, and the accuracy on the test set.
"""

import argparse
import itertools
import multiprocessing
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

import anybit
from anybit.files.strict import read_json
from anybit.networks.layers import codes_of, quantized_layers
from anybit.roads.result import save_all
from anybit.sources.models import load_model
from benchmarks.studies.study import ROOT, Entries, parser

NETWORK = f"{ROOT / 'examples/digits.py'}:network"
BUDGETS = ("2.5bit", "3bit")
RUNS = {"one thread": 1, "two threads": 2, "one thread again": 1, "two threads again": 2}
MEASURED = ("stages", "environment", "settings")


def run(arguments: argparse.Namespace, folder: Path, threads: int, pipeline: str) -> None:
    """Calibrate with all budgets and save the results."""
    torch.set_num_threads(threads)
    test = f"{arguments.data}#test"
    settings = {"weights": arguments.weights, "test": test, "samples": 512, "pipeline": pipeline, "cache": False}
    save_all(anybit.calibrate(NETWORK, arguments.data, list(BUDGETS), **settings), folder)


def in_a_subprocess(*arguments: Any) -> None:
    """Call `run` in a fresh process with its own hash seed."""
    process = multiprocessing.get_context("spawn").Process(target=run, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"The run failed with exit status {process.exitcode}.")


def compared(one: Path, other: Path, weights: str) -> dict[str, Any]:
    """Compare two runs of one budget."""
    models = [anybit.load(folder, model=load_model(NETWORK, weights)) for folder in (one, other)]
    layers = [quantized_layers(model) for model in models]
    same_bits = {name for name in layers[0] if models[0].scheme[name] == models[1].scheme[name]}
    total = sum(layers[0][name].weight.numel() for name in same_bits)
    changed = sum(int((codes_of(layers[0][name]) != codes_of(layers[1][name])).sum()) for name in same_bits)
    reports = [read_json(folder / "report.json") for folder in (one, other)]
    return {
        "same_files": all((one / name).read_bytes() == (other / name).read_bytes() for name in ("scheme.json", "model.safetensors")),
        "same_report": _judged(reports[0]) == _judged(reports[1]),
        "layers": len(layers[0]),
        "layers_of_other_bits": sorted(set(layers[0]) - same_bits),
        "codes_compared": total,
        "codes_that_differ": changed,
        "bits": [report["result"]["weight_bits"] for report in reports],
        "bytes": [report["result"]["bytes"] for report in reports],
        "top1": [report["test"]["top1"] for report in reports],
        "float_top1": reports[0]["float_test"]["top1"],
    }


def _judged(report: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key not in MEASURED}


def main() -> None:
    """Run each pipeline at each thread count and compare."""
    options = parser(__doc__)
    options.add_argument("--weights", required=True)
    options.add_argument("--data", required=True)
    arguments = options.parse_args()
    file = Entries(arguments, "determinism")
    for pipeline in ("light", "advanced"):
        with tempfile.TemporaryDirectory() as scratch:
            folders = {name: Path(scratch) / name.replace(" ", "-") for name in RUNS}
            for name, threads in RUNS.items():
                in_a_subprocess(arguments, folders[name], threads, pipeline)
            pairs = [("one thread", "two threads"), ("one thread", "one thread again"), ("two threads", "two threads again")]
            for (one, other), budget in itertools.product(pairs, BUDGETS):
                places = folders[one] / budget, folders[other] / budget, arguments.weights
                file.measured(f"{pipeline} {budget}: {one} / {other}", partial(compared, *places))


if __name__ == "__main__":
    main()
