"""ResNet-20 on CIFAR-10: the calibrate road measured. One JSON entry a run; a finished entry is not run again.

    python benchmarks/resnet20.py STUDY --data cifar10.npz --weights resnet20_cifar10.safetensors

    uniform     W4A8, W4A4, W3A3, W2A4, W2A2, first and last layer at 8 bits, three seeds; those below 4 bits also with long settings
    ladder      what each step buys at each of these, one seed
    mixed       4, 3 and 2.5 weight bits on average, everything in the budget: A8, and searched activation bits; three seeds
    small-sets  W4A4 from 8 to 1,024 images, three draws: ranges only, AdaQuant layer-wise and block-wise
    scatter     predicted against measured loss at 3 bits: integer program, 20 random schemes that fit, uniform
    speed       W4A8 and W4A4 with short settings, to be compared in time with a peer (see peers/)

Images are training images without labels; the test set is touched by the report alone.
"""

import argparse
import base64
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import anybit
from anybit import roads, stages
from anybit.batches import Samples, draw
from anybit.evaluation import correct, outputs_of
from anybit.references import Preprocessing, load_data, load_model
from anybit.reporting import StageClock, environment
from anybit.scheme import Budget, Precision, Scheme

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENDS = {"conv1": Precision(8, 8), "linear": Precision(8, 8)}
PRECISIONS = ((4, 8), (4, 4), (3, 3), (2, 4), (2, 2))
FULL = {"mirror": True, "steps": 300}
"""The end of the ladder: the settings of every headline number from 4 bits on."""
LONG = {"mirror": True, "steps": 1000, "drop": 0.5}
"""Below 4 bits more steps help, where dropping keeps them from learning the images by heart."""

RUNGS: dict[str, dict[str, Any]] = {
    "ranges only": {"pipeline": "light", "bn_tuning": False},
    "light": {"pipeline": "light"},
    "AdaQuant, parallel": {"parallel": True, "sequential": False, "bn_tuning": False, "bias_tuning": False, "candidate_steps": 300},
    "AdaQuant, sequential": {"unit": "layer", "bn_tuning": False, "bias_tuning": False, "steps": 300},
    "block-wise": {"bn_tuning": False, "bias_tuning": False, "steps": 300},
    "block-wise with dropping": {"drop": 0.5, "bn_tuning": False, "bias_tuning": False, "steps": 300},
    "block-wise + mirror images": {"bn_tuning": False, "bias_tuning": False, **FULL},
    "+ BN tuning": {"bias_tuning": False, **FULL},
    "+ bias tuning": FULL,
}


class Study:
    """The network, the data, and the file that keeps what was measured."""

    def __init__(self, arguments: argparse.Namespace):
        preprocessing = Preprocessing(MEAN, STD)
        self.weights = arguments.weights
        self.train = load_data(arguments.data, preprocessing)
        self.train = Samples(self.train.dataset, labelled=True)
        self.test = load_data(f"{arguments.data}#test", preprocessing)
        self.file = arguments.results / f"resnet20_{arguments.study.replace('-', '_')}.json"
        self.entries: dict[str, Any] = json.loads(self.file.read_text())["entries"] if self.file.is_file() else {}
        self.seeds = arguments.seeds
        self.only = arguments.only

    def network(self) -> torch.nn.Module:
        return load_model(str(Path(__file__).parent.parent / "examples/resnet20_cifar10.py") + ":network", self.weights)

    def measured(self, key: str, run: Callable[[], dict[str, Any]]) -> None:
        """Run and keep one entry, unless it is there or not asked for."""
        if key in self.entries or (self.only and self.only not in key):
            return
        start = time.perf_counter()
        self.entries[key] = run() | {"total_seconds": time.perf_counter() - start}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps({"environment": environment(), "entries": self.entries}, indent=1) + "\n")
        print(key, {k: v for k, v in self.entries[key].items() if k in ("top1", "seconds", "bytes", "weight_bits")}, flush=True)

    def calibrated(self, budget: Any = None, **settings: Any) -> list[dict[str, Any]]:
        """calibrate, tested: one row a budget."""
        results = anybit.calibrate(self.network(), self.train, budget, **settings)
        return [self.row(result) for result in (results if isinstance(results, list) else [results])]

    def row(self, result: roads.Result) -> dict[str, Any]:
        right = correct(outputs_of(result.model, self.test.batches(250)), self.labels()).numpy()
        report = result.report
        return {
            "budget": report["budget"],
            "top1": 100 * float(right.mean()),
            "right": base64.b64encode(np.packbits(right).tobytes()).decode(),
            "seconds": sum(s["seconds"] for s in report["stages"] if s["stage"] != "edge ranges"),
            **report["result"],
            "ladder": report["ladder"],
            "chosen": next((row["name"] for row in report["schemes"] if row["chosen"]), None),
            "schemes": [{k: v for k, v in row.items() if k != "scheme"} for row in report["schemes"]],
            "layers": {name: layer["precision"] for name, layer in report["layers"].items()},
            "units": report["units"],
            "stages": report["stages"],
            "settings": report["settings"],
        }

    def labels(self) -> torch.Tensor:
        return torch.cat([batch.labels for batch in self.test.batches(1000)])


def fixed(weight_bits: int, activation_bits: int) -> dict[str, Any]:
    """One precision everywhere but in the first and the last layer."""
    return {"weight_bits": (weight_bits,), "activation_bits": (activation_bits,), "keep": ENDS}


def uniform(study: Study) -> None:
    for seed in range(study.seeds):
        for w, a in PRECISIONS:
            study.measured(f"W{w}A{a} seed {seed}", lambda w=w, a=a, seed=seed: study.calibrated(**fixed(w, a), seed=seed, **FULL)[0])
    for seed in range(study.seeds):
        for w, a in PRECISIONS[2:]:
            study.measured(f"W{w}A{a} long seed {seed}", lambda w=w, a=a, seed=seed: study.calibrated(**fixed(w, a), seed=seed, **LONG)[0])
    for w, a in ((3, 3), (2, 2)):  # what else was tried, one seed each
        for name, more in {"parallel first": {"parallel": True}, "1000 steps": {"steps": 1000}}.items():
            settings = {**fixed(w, a), **FULL, **more}
            study.measured(f"W{w}A{a} {name}", lambda settings=settings: study.calibrated(**settings)[0])


def ladder(study: Study) -> None:
    study.measured("float", lambda: {"top1": anybit.evaluate(study.network(), study.test)["top1"]})
    for w, a in PRECISIONS:
        for name, settings in RUNGS.items():
            study.measured(f"W{w}A{a} {name}", lambda w=w, a=a, settings=settings: study.calibrated(**fixed(w, a), **settings)[0])


def mixed(study: Study) -> None:
    budgets = ["4bit", "3bit", "2.5bit"]
    searched = ["4bit,bops=650M", "3bit,bops=490M"]
    for seed in range(study.seeds):
        for label, wanted, activation_bits in (("A8", budgets, (8,)), ("searched", searched, (3, 4, 6, 8))):
            study.measured(
                f"{label} seed {seed}",
                lambda seed=seed, wanted=wanted, bits=activation_bits: {
                    "rows": study.calibrated(wanted, activation_bits=bits, seed=seed, **FULL)
                },
            )
        for w, a in ((4, 8), (3, 8), (4, 4)):  # of equal size, nothing kept at 8 bits
            settings = {"weight_bits": (w,), "activation_bits": (a,), "seed": seed, **FULL}
            study.measured(f"uniform W{w}A{a} seed {seed}", lambda settings=settings: study.calibrated(**settings)[0])


def small_sets(study: Study) -> None:
    rungs = {
        "ranges only": RUNGS["ranges only"],
        "AdaQuant layer-wise": {"unit": "layer", "bn_tuning": False, "bias_tuning": False, "steps": 200},
        "AdaQuant block-wise": {"bn_tuning": False, "bias_tuning": False, "steps": 200},
    }
    for count in (8, 32, 128, 512, 1024):
        for seed in range(study.seeds):
            for name, settings in rungs.items():
                study.measured(
                    f"{count} images, draw {seed}, {name}",
                    lambda count=count, seed=seed, settings=settings: study.calibrated(**fixed(4, 4), samples=count, seed=seed, **settings)[
                        0
                    ],
                )


def random_schemes(network: stages.Network, bits: float, count: int) -> Iterator[Scheme]:
    """Schemes of random weight bits at A8 whose mean is within 0.1 below `bits`."""
    generator = random.Random(0)
    while count:
        tilt = generator.uniform(0.2, 3)
        scheme = Scheme(
            {n: Precision(generator.choices((2, 3, 4, 6, 8), [tilt**-b for b in (2, 3, 4, 6, 8)])[0], 8) for n in network.names}
        )
        if bits - 0.1 <= network.costs.weight_bits(scheme) <= bits:
            count -= 1
            yield scheme


def scatter(study: Study) -> None:
    def run() -> dict[str, Any]:
        settings = stages.CalibrateSettings(activation_bits=(8,), alternatives=10)
        clock = StageClock()
        bench = roads.prepare_bench(study.network(), draw(study.train, 1024, 0), settings, [], clock)
        choice = stages.choose_scheme(bench.network, bench.table, Budget.parse("3bit"), settings, bench.judge)
        rows = [{k: v for k, v in row.items() if k != "scheme"} for row in choice.measured]
        for index, scheme in enumerate(random_schemes(bench.network, 3, 20)):
            row = stages.measured_row(bench.network, bench.table, f"random {index}", scheme, bench.judge)
            rows.append({k: v for k, v in row.items() if k != "scheme"})
        return {"rows": rows, "stages": clock.stages}

    study.measured("3bit A8", run)


def speed(study: Study) -> None:
    for w, a in ((4, 8), (4, 4)):
        for name, settings in {"light": {"pipeline": "light"}, "40 steps": {"steps": 40, "bn_tuning": False, "bias_tuning": False}}.items():
            for seed in range(study.seeds):
                study.measured(
                    f"W{w}A{a} {name} seed {seed}",
                    lambda w=w, a=a, settings=settings, seed=seed: study.calibrated(**fixed(w, a), seed=seed, **settings)[0],
                )


STUDIES = {"uniform": uniform, "ladder": ladder, "mixed": mixed, "small-sets": small_sets, "scatter": scatter, "speed": speed}


def main() -> None:
    """Run one study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", help="run the entries whose key contains this")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    STUDIES[arguments.study](Study(arguments))


if __name__ == "__main__":
    main()
