"""The network, the data and the arguments of the studies of ResNet-20 on CIFAR-10."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import anybit
from anybit.data.samples import Samples, draw
from anybit.data.tasks import correct, outputs_of
from anybit.loops.training import emulates_bfloat16
from anybit.sources.inputs import load_data
from anybit.sources.models import load_model
from anybit.sources.preprocessing import Preprocessing
from benchmarks.studies.study import ROOT, Entries, packed_hits, parser

NETWORK = f"{ROOT / 'examples/resnet20_cifar10.py'}:network"
PREPROCESSING = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class ResNet20(Entries):
    """CIFAR-10, the trained network, and the results file; finished entries are skipped."""

    def __init__(self, arguments: argparse.Namespace, prefix: str):
        images = getattr(arguments, "images", None)
        self.part = f"_{images}" if images else ""  # for runs on a subset of the images
        super().__init__(arguments, f"{prefix}_{arguments.study.replace('-', '_')}{self.part}")
        self.train = Samples(load_data(arguments.data, PREPROCESSING).dataset, labelled=True)
        if images:
            self.train = draw(self.train, images, 0)
        self.test = load_data(f"{arguments.data}#test", PREPROCESSING)
        if few := getattr(arguments, "test_images", None):
            self.test = self.test.subset(range(few))

    @property
    def seeds(self) -> int:
        return self.arguments.seeds

    @property
    def half(self) -> bool:
        """Return whether training in bfloat16 is faster on this device; entries record it in their settings."""
        return not emulates_bfloat16(torch.device(self.arguments.device))

    def checkpoint(self, key: str) -> Path:
        return self.arguments.checkpoints / f"{key.replace(' ', '_')}{self.part}.safetensors"

    def network(self) -> torch.nn.Module:
        return load_model(NETWORK, self.arguments.weights)

    def labels(self) -> torch.Tensor:
        return torch.cat([batch.labels for batch in self.test.batches(1000)])

    def row(self, result: anybit.Result) -> dict[str, Any]:
        """Score the result on the whole test set, per image for paired intervals; add its costs."""
        right = correct(outputs_of(result.model, self.test.batches(250)), self.labels()).numpy()
        report = result.report
        return {
            "budget": report["budget"],
            "top1": 100 * float(right.mean()),
            "right": packed_hits(right),
            "seconds": sum(s["seconds"] for s in report["stages"] if s["stage"] != "edge ranges"),
            **report["result"],
            "layers": {name: layer["precision"] for name, layer in report["layers"].items()},
            "stages": report["stages"],
            "settings": report["settings"],
        }


def cifar10_parser(description: str | None, studies: Iterable[str], seeds: int) -> argparse.ArgumentParser:
    """Create the arguments of every study of ResNet-20."""
    options = parser(description, studies)
    options.add_argument("--data", required=True)
    options.add_argument("--weights", required=True)
    options.add_argument("--seeds", type=int, default=seeds)
    options.add_argument("--threads", type=int, default=1)
    return options


def training_parser(description: str | None, studies: Iterable[str], seeds: int, epochs: int) -> argparse.ArgumentParser:
    """Create the arguments of the studies of roads that train."""
    options = cifar10_parser(description, studies, seeds)
    options.add_argument("--checkpoints", type=Path, default=ROOT / "runs" / "checkpoints")
    options.add_argument("--runs", type=Path, help="keep the run folders here")
    options.add_argument("--epochs", type=int, default=epochs)
    options.add_argument("--batch-size", type=int, default=256)
    options.add_argument("--images", type=int, help="train on this many of the images, drawn once")
    options.add_argument("--test-images", type=int, help="score on this many test images, the first ones")
    options.add_argument("--test-once", action="store_true", help="test only after the last epoch (`choices` of grow needs every epoch)")
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("--device", default="cpu")
    return options
