"""Memory of calibrate runs against `--memory`: EfficientNet-lite0 at four budgets and at the minimum, and ResNet-20, which needs less than
the minimum. One JSON entry per run.

    python -m benchmarks.reliability.memory --images FOLDER --results RESULTS
    python -m benchmarks.reliability.memory --images cifar10.npz --weights resnet20_cifar10.safetensors --results RESULTS

Each budget runs in its own process; a thread reads the anonymous resident memory (not backed by files) every 10 ms. An entry holds the
budget, the bytes spilled to disk, and the peak of each stage above the memory after the network has been loaded and folded and the inputs
have been loaded. Besides activations, a run holds weights: the folded and prepared copies, and one for each candidate bit-width.
"""

import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import anybit
from anybit.data.samples import draw
from anybit.environment import StageClock
from anybit.networks.capture import MemoryBudget
from anybit.progress import listening
from anybit.roads.memory import LEAST
from anybit.sources.inputs import load_data
from anybit.sources.models import load_model
from anybit.sources.preprocessing import Preprocessing
from benchmarks.studies.cifar10 import NETWORK, PREPROCESSING
from benchmarks.studies.study import ROOT, Entries, parser

BUDGETS = {"2 GiB": 2**31, "1 GiB": 2**30, "512 MiB": 2**29, "256 MiB": 2**28}
COMMON = {
    "samples": 64, "batch_size": 8, "step_batch": 8, "parallel": True, "candidate_steps": 3, "steps": 6,
    "weight_bits": (4,), "activation_bits": (8,),
}  # fmt: skip

STEPS = {"candidates": "sequential AdaQuant", "sequential AdaQuant": "batch-norm tuning", "batch-norm tuning": "bias tuning"}
"""The step that follows each step of polishing."""


class Watch(threading.Thread):
    """Peaks of anonymous resident bytes by stage."""

    def __init__(self):
        super().__init__(daemon=True)
        self.stage, self.peaks, self.base = "start", {}, 0

    def run(self) -> None:
        while True:
            self.peaks[self.stage] = max(self.peaks.get(self.stage, 0), anonymous())
            time.sleep(0.01)


def anonymous() -> int:
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


RESNET20 = {"samples": 512, "pipeline": "light", "weight_bits": (2, 4, 8), "activation_bits": (8,)}
"""Settings of the second network: the default batch size and number of samples."""


def child(images: str, weights: str | None, memory: int) -> dict[str, Any]:
    """Run once in this process: ResNet-20 if `weights` are given, else EfficientNet-lite0."""
    torch.set_num_threads(1)
    watch, spilled = Watch(), []
    timed, allocate = StageClock.stage, MemoryBudget.allocate

    def stage(self, name: str):
        if name == "float outputs":
            watch.base = anonymous()
        watch.stage = name
        return timed(self, name)

    def counted(self, shape, dtype):
        before, tensor = self.spilled, allocate(self, shape, dtype)
        spilled.append(self.spilled - before)
        return tensor

    def on_event(event: str, fields: Mapping[str, Any]) -> None:
        if event == "step":
            watch.stage = STEPS.get(fields["step"], watch.stage)

    StageClock.stage, MemoryBudget.allocate = stage, counted
    if weights is None:
        network, settings = load_model(str(ROOT / "examples/efficientnet_lite0.py") + ":network"), COMMON
        preprocessing = Preprocessing((0.498039,) * 3, (0.501961,) * 3, 224, None, "bicubic")
    else:
        network, settings, preprocessing = load_model(NETWORK, weights), RESNET20, PREPROCESSING
    inputs = draw(load_data(images, preprocessing), settings["samples"], 0)
    watch.start()
    try:
        with listening(events=on_event):
            result = anybit.calibrate(network, inputs, None, memory=memory, cache=False, **settings)
    except anybit.AnybitError as error:
        return {"memory": memory, "refused": str(error)}
    size = sum(tensor.numel() * 4 for tensor in network.state_dict().values())
    peaks = {name: peak - watch.base for name, peak in watch.peaks.items() if name not in ("start", "observe and fold")}
    row = {"memory": memory, "base": watch.base, "weights": size, "peak": max(peaks.values()), "stages": peaks, "spilled": sum(spilled)}
    return row | {"loss": result.report["ladder"][-1]["loss"], "settings": result.report["settings"]}


def main() -> None:
    """Run every budget."""
    options = parser(__doc__)
    options.add_argument("--images", required=True)
    options.add_argument("--child", type=int, help="run one budget in this process and print its JSON")
    options.add_argument("--weights", help="weights of ResNet-20, which then runs instead; --images is its CIFAR-10 file")
    arguments = options.parse_args()
    if arguments.child is not None:
        print(json.dumps(child(arguments.images, arguments.weights, arguments.child)))
        return
    results = Entries(arguments, "memory")

    def run(memory: int) -> dict[str, Any]:
        with tempfile.TemporaryFile("w+") as out:
            command = [sys.executable, "-m", "benchmarks.reliability.memory", "--images", arguments.images, "--child", str(memory)]
            command += ["--weights", arguments.weights] if arguments.weights else []
            subprocess.run(command, stdout=out, check=True)
            out.seek(0)
            return json.loads(out.read().splitlines()[-1])

    if arguments.weights:
        results.measured("ResNet-20, the least", lambda: run(LEAST))
        return
    for name, memory in BUDGETS.items():
        results.measured(name, lambda memory=memory: run(memory))
    refused = run(LEAST - 1)["refused"]
    least = int(re.search(r"at least memory=(\d+)", refused)[1])
    results.measured("the least", lambda: run(least) | {"refused_below": refused})


if __name__ == "__main__":
    main()
