"""What benchmarks share: one JSON entry a run; and those of ResNet-20 the network and the data."""

import argparse
import base64
import json
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import anybit
from anybit.data.samples import Samples, draw
from anybit.data.tasks import correct, outputs_of
from anybit.environment import environment
from anybit.loops.training import emulates_bfloat16
from anybit.progress import listening
from anybit.sources.inputs import load_data
from anybit.sources.models import load_model
from anybit.sources.preprocessing import Preprocessing

ROOT = Path(__file__).parent.parent
PREPROCESSING = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Entries:
    """The JSON file of one study, one entry a run; a finished entry is not run again."""

    def __init__(self, arguments: argparse.Namespace, name: str):
        self.arguments = arguments
        self.file = arguments.results / f"{name}.json"

    @property
    def entries(self) -> dict[str, Any]:
        return json.loads(self.file.read_text())["entries"] if self.file.is_file() else {}

    def measured(self, key: str, run: Callable[[], dict[str, Any]]) -> None:
        """Run and keep one entry, unless it is there or not asked for."""
        if key in self.entries or (self.arguments.only and self.arguments.only not in key):
            return
        start = time.perf_counter()
        entry = run() | {"total_seconds": time.perf_counter() - start}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        about = {"environment": environment(), "entries": self.entries | {key: entry}}
        self.file.write_text(json.dumps(about, indent=1) + "\n")
        print(key, {k: v for k, v in entry.items() if isinstance(v, (int, float))}, flush=True)


class Study(Entries):
    """CIFAR-10, the trained network, and the file that keeps what was measured; a finished entry is not run again."""

    def __init__(self, arguments: argparse.Namespace, prefix: str):
        images = getattr(arguments, "images", None)
        self.part = f"_{images}" if images else ""  # of what is made of a part of the images
        super().__init__(arguments, f"{prefix}_{arguments.study.replace('-', '_')}{self.part}")
        self.train = Samples(load_data(arguments.data, PREPROCESSING).dataset, labelled=True)
        if images:
            self.train = draw(self.train, images, 0)
        self.test = load_data(f"{arguments.data}#test", PREPROCESSING)

    @property
    def seeds(self) -> int:
        return self.arguments.seeds

    @property
    def half(self) -> bool:
        """Whether training in bfloat16 pays here; entries' settings tell."""
        return not emulates_bfloat16(torch.device(self.arguments.device))

    def checkpoint(self, key: str) -> Path:
        return self.arguments.checkpoints / f"{key.replace(' ', '_')}{self.part}.safetensors"

    def network(self) -> torch.nn.Module:
        return load_model(str(ROOT / "examples/resnet20_cifar10.py") + ":network", self.arguments.weights)

    def labels(self) -> torch.Tensor:
        return torch.cat([batch.labels for batch in self.test.batches(1000)])

    def row(self, result: anybit.Result) -> dict[str, Any]:
        """The result on the whole test set, image by image for paired intervals, with what it costs."""
        right = correct(outputs_of(result.model, self.test.batches(250)), self.labels()).numpy()
        report = result.report
        return {
            "budget": report["budget"],
            "top1": 100 * float(right.mean()),
            "right": base64.b64encode(np.packbits(right).tobytes()).decode(),
            "seconds": sum(s["seconds"] for s in report["stages"] if s["stage"] != "edge ranges"),
            **report["result"],
            "layers": {name: layer["precision"] for name, layer in report["layers"].items()},
            "stages": report["stages"],
            "settings": report["settings"],
        }


def narrated(key: str) -> AbstractContextManager[None]:
    """Print each event's line, after the entry's key, inside the block."""
    return listening(events=lambda _, fields: print(key, fields["note"], flush=True) if "note" in fields else None)


def parser(description: str | None, studies: Iterable[str], seeds: int) -> argparse.ArgumentParser:
    """The arguments that every study takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(studies))
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--only", help="run the entries whose key contains this")
    parser.add_argument("--threads", type=int, default=1)
    return parser
