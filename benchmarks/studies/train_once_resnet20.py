"""ResNet-20 on CIFAR-10 with the train-once road. One JSON entry per run; finished entries are skipped, interrupted runs resume.

    python -m benchmarks.studies.train_once_resnet20 STUDY --data cifar10.npz --weights resnet20_cifar10.safetensors [--epochs 8]
                                                           [--images N] [--batch-size 256] [--device cuda]

    widths       a supernet of 2, 3, 4, 6 and 8 bits by each label rule, and its 8-bit file against float weights; a network trained for
                 each bit-width alone, with as many epochs in total; calibrate at each bit-width; the float network by the same recipe
    choices      supernets by each label rule, and that of the adaptive label (half) with one thing changed: a batch norm for each
                 bit-width, a step size per layer, trained zero points, other middle subnets
    search       Monte-Carlo table, uniform draws and integer program on one supernet, with 150 evaluations each; time for a second budget
    compose      subnets polished by calibrate
    cost         one LRH step against three steps of quantization-aware training
    full         200 epochs as published; needs a GPU

The default of 8 epochs from trained weights takes hours on two cores; `--images 12800` trains on a quarter of the images and writes to
a separate JSON file; `choices --images 6400 --batch-size 64 --epochs 4 --bn-images 1024 --test-once` takes 15
minutes per run. Drops are relative to the float network trained by the same recipe.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import anybit
from anybit.data.batches import Batch
from anybit.methods.lsq import LSQ
from anybit.methods.multiquant import MultiQuant
from anybit.methods.settings import LSQSettings
from anybit.networks.layers import float_weight, quantized_layers
from anybit.roads.grow import make_trainee, observe_trainable, watched_batches
from anybit.roads.settings import GrowSettings
from anybit.scheme import FLOAT, Precision, Scheme
from anybit.supernets.prepared import held_out_split, make_multiquant, observe_supernet
from anybit.supernets.settings import SupernetSettings
from anybit.supernets.supernet import Supernet, scores, uniform_schemes, width_scores
from benchmarks.studies.cifar10 import ResNet20, training_parser
from benchmarks.studies.study import ROOT, narrated

BITS = (2, 3, 4, 6, 8)
KEEP = {"conv1": Precision(8, 8), "linear": Precision(8, 8)}
RECIPE = {"augment": "flip,crop4", "compile": True}
LABELS = {
    "adaptive label, half": {"label": "adaptive", "label_weight": 0.5},
    "adaptive label, pure": {"label": "adaptive", "label_weight": 1.0},
    "teacher": {"label": "teacher", "label_weight": 0.5},
    "one-hot": {"label": "one-hot"},
}


class TrainingOnce(ResNet20):
    """The study of the train-once road."""

    def __init__(self, arguments: argparse.Namespace):
        super().__init__(arguments, "train_once_resnet20")
        self.names = [n for n, layer in self.network().named_modules() if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))]

    def folder(self, key: str) -> Path:
        return self.arguments.runs / f"{key.replace(' ', '_').replace(',', '')}{self.part}"

    def trained(self, key: str, **settings: Any) -> dict[str, Any]:
        """Call anybit.train and test at every bit-width; the folder is kept for the search."""
        options = self.arguments
        defaults = {"bits": BITS, "keep": KEEP, "epochs": options.epochs, "held_out": options.held_out, "bn_images": options.bn_images}
        defaults |= {"half": self.half, "batch_size": options.batch_size, **RECIPE}
        settings = defaults | settings
        checkpoint = self.checkpoint(key)
        with narrated(key):
            supernet = anybit.train(
                self.network(),
                self.train,
                test=None if options.test_once else self.test,
                checkpoint=checkpoint,
                device=options.device,
                **settings,
            )
        supernet.save(self.folder(key), overwrite=True)
        checkpoint.unlink(missing_ok=True)
        report = supernet.report
        if options.test_once:
            report["test"] = width_scores(supernet, None, list(self.test.batches(250)), None)
        fields = ("test", "float_store", "float_test", "epochs", "settings", "subnets", "bn_images", "stages")
        size = (self.folder(key) / "supernet.safetensors").stat().st_size
        return {name: report[name] for name in fields if name in report} | {"competition": self.competition(supernet), "bytes": size}

    def competition(self, supernet: Supernet) -> dict[str, Any]:
        """Measure, as the paper does, the norm of each bit-width's gradient on the shared weights under one-hot labels, and the
        variance of the confidence (the softmax of the correct class), on 1,024 training images."""
        batches = list(watched_batches(self.train, 1))[:4]
        rows = {}
        for name, scheme in uniform_schemes(supernet).items():
            supernet.switch(scheme)
            supernet.model.zero_grad()
            confidence = []
            for batch in batches:
                outputs = supernet.model(batch.inputs)
                (torch.nn.functional.cross_entropy(outputs, batch.labels) / len(batches)).backward()
                confidence.append(outputs.detach().softmax(-1).gather(1, batch.labels[:, None])[:, 0])
            shared = [float_weight(layer).grad for layer in quantized_layers(supernet.model).values()]
            sure = torch.cat(confidence)
            rows[name] = {
                "gradient_norm": float(torch.cat([grad.flatten() for grad in shared]).norm()),
                "confidence": float(sure.mean()),
                "confidence_variance": float(sure.var()),
            }
        supernet.model.zero_grad()
        return rows


def widths(study: TrainingOnce) -> None:
    for name, settings in LABELS.items():
        for seed in range(study.seeds):
            key = f"{name} seed {seed}"
            study.measured(key, lambda key=key, settings=settings, seed=seed: study.trained(key, seed=seed, **settings))
    # A step of the supernet runs three networks: these runs have as many epochs in total, divided among the bit-widths.
    share = round(3 * study.arguments.epochs / len(BITS))
    for bits in BITS:
        key = f"alone {bits} bits"
        study.measured(key, lambda key=key, bits=bits: alone(study, key, Precision(bits, bits), share))
        study.measured(f"calibrate {bits} bits", lambda bits=bits: calibrated(study, bits))
    study.measured("float", lambda: alone(study, "float", FLOAT, study.arguments.epochs))


def alone(study: TrainingOnce, key: str, precision: Precision, epochs: int) -> dict[str, Any]:
    """Train a network for one bit-width (or in float) with learned step sizes, on the samples of the supernets."""
    scheme = Scheme.uniform(study.names, precision)
    if precision != FLOAT:
        scheme = scheme.replace(KEEP)
    fitting, _ = held_out_split(study.train, SupernetSettings(held_out=study.arguments.held_out))
    with narrated(key):
        result = anybit.grow(
            study.network(), fitting, scheme=scheme, test=study.test, epochs=epochs, device=study.arguments.device,
            checkpoint=study.checkpoint(key), half=study.half, batch_size=study.arguments.batch_size, **RECIPE,
        )  # fmt: skip
    study.checkpoint(key).unlink(missing_ok=True)
    return study.row(result) | {"epochs": result.report["epochs"]}


def calibrated(study: TrainingOnce, bits: int) -> dict[str, Any]:
    """Calibrate at one bit-width, on 1,024 training images."""
    result = anybit.calibrate(
        study.network(), study.train, None, weight_bits=(bits,), activation_bits=(bits,), keep=KEEP, mirror=True, cache=False
    )
    return study.row(result)


def choices(study: TrainingOnce) -> None:
    changed: dict[str, dict[str, Any]] = {
        "a batch norm for each bit-width": {"batch_norm": "switch", "compile": False},
        "a step for each layer": {"per_channel": False},
        "trained offsets": {"offset_rate": 1e-3},
        "middle progressive": {"middle": "progressive"},
        "middle worst": {"middle": "worst"},
        "middle best": {"middle": "best"},
        "no middle": {"sandwich": "HL"},
        "slower steps for low bits": {"step_rates": {2: 0.1, 3: 0.3}},
    }
    base = LABELS["adaptive label, half"]
    for seed in range(study.seeds):
        for name, settings in (LABELS | {name: base | change for name, change in changed.items()}).items():
            key = f"{name} seed {seed}"
            study.measured(key, lambda key=key, settings=settings, seed=seed: study.trained(key, seed=seed, **settings))


def search(study: TrainingOnce) -> None:
    run = study.folder(study.arguments.supernet)
    for seed in range(study.seeds):
        for strategy in ("monte-carlo", "uniform", "integer-program"):
            key = f"{strategy} seed {seed}"
            study.measured(key, lambda strategy=strategy, seed=seed: searched(study, run, strategy, seed))


def searched(study: TrainingOnce, run: Path, strategy: str, seed: int) -> dict[str, Any]:
    """Search once, and score the front on the whole test set."""
    cache = study.arguments.checkpoints / f"evaluations_{run.name}_{seed}"
    common = {
        "images": study.arguments.search_images,
        "bn_images": study.arguments.search_bn_images,
        "cache": cache,
        "device": study.arguments.device,
        "model": study.network(),
    }
    settings = {"strategy": strategy, "seed": seed, "evaluations": study.arguments.evaluations}
    result = anybit.search(run, study.train, ["3bit"], **settings, **common)
    start = time.perf_counter()
    anybit.search(run, study.train, ["3.5bit"], **settings, **common)
    second = time.perf_counter() - start
    test = list(study.test.batches(500))
    front = [{**row, "test": scores(result.supernet, Scheme.parse(row["scheme"]), None, test)} for row in result.report["front"]]
    return result.report | {"front": front, "second_seconds": second}


def compose(study: TrainingOnce) -> None:
    """Compare uniform subnets from the file, unchanged and polished."""
    supernet = anybit.load_supernet(study.folder(study.arguments.supernet), model=study.network())
    for bits in (2, 3, 4):
        study.measured(f"{bits} bits", lambda bits=bits: polished(study, supernet, bits))


def polished(study: TrainingOnce, supernet: Supernet, bits: int) -> dict[str, Any]:
    """Score the subnet unchanged, and after sequential AdaQuant, batch-norm and bias tuning towards the shared weights' outputs."""
    plain = anybit.extract(supernet, scheme=supernet.uniform(bits), test=study.test)
    settings = {"data": study.train, "test": study.test, "mirror": True, "cache": False}
    polish = anybit.extract(supernet, scheme=supernet.uniform(bits), polish=True, **settings)
    return {"extracted": plain.report["test"], "polished": polish.report["test"], "ladder": polish.report["ladder"]}


def cost(study: TrainingOnce) -> None:
    """Time LRH steps and triples of quantization-aware steps alternately, so that other load affects both equally."""
    batch = next(study.train.on(study.arguments.device).batches(256))
    plain, settings = [Batch(batch.inputs)], SupernetSettings.of(bits=BITS, keep=KEEP, label="adaptive")
    device = study.arguments.device
    network = observe_supernet(study.network().to(device), Batch(batch.inputs[:2]), settings)
    method = make_multiquant(network, plain, settings, 10)
    settings = GrowSettings.of(activation_bits=4)
    fixed = Scheme.uniform(study.names, Precision(4, 4))
    single = make_trainee(observe_trainable(study.network().to(device), plain[0], settings, fixed, "lsq"), plain, None, settings, "lsq")
    assert isinstance(method, MultiQuant) and isinstance(single, LSQ) and LSQSettings() == settings.lsq

    def step(trainee: Any, optimizer: torch.optim.Optimizer, repeats: int) -> float:
        trainee.model.train()
        start = time.perf_counter()
        for _ in range(repeats):
            optimizer.zero_grad(set_to_none=True)
            for _ in trainee.passes():
                outputs = trainee.model(batch.inputs)
                trainee.loss(outputs, batch, torch.nn.functional.cross_entropy(outputs, batch.labels)).backward()
            optimizer.step()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - start

    optimizers = [torch.optim.Adam(one.parameter_groups()) for one in (method, single)]
    seconds: list[tuple[float, float]] = []
    for round_ in range(study.arguments.rounds):
        method.before_step(round_ / study.arguments.rounds)
        seconds.append((step(method, optimizers[0], 1), step(single, optimizers[1], 3)))
    ratios = np.array(seconds)[:, 0] / np.array(seconds)[:, 1]
    study.measured("one step", lambda: {"seconds": seconds, "times_three_steps": float(np.median(ratios))})


def full(study: TrainingOnce) -> None:
    """Run the published length: 200 epochs, 2, 4, 6 and 8 bits."""
    for name in ("adaptive label, half", "teacher", "one-hot"):
        key = f"{name}, 200 epochs"
        study.measured(key, lambda key=key, name=name: study.trained(key, bits=(2, 4, 6, 8), epochs=200, held_out=0.02, **LABELS[name]))


STUDIES = {"widths": widths, "choices": choices, "search": search, "compose": compose, "cost": cost, "full": full}


def main() -> None:
    """Run one study."""
    options = training_parser(__doc__, STUDIES, seeds=1, epochs=8)
    options.set_defaults(runs=ROOT / "runs" / "train_once")
    options.add_argument("--supernet", default="one-hot seed 0", help="the entry of `widths` that is searched")
    options.add_argument("--evaluations", type=int, default=150)
    options.add_argument("--held-out", type=float, default=0.1, help="share of the images that is held out for the search")
    options.add_argument("--bn-images", type=int, default=4096)
    options.add_argument("--search-images", type=int, default=2500, help="held-out images that each subnet is measured on")
    options.add_argument("--search-bn-images", type=int, help="images for each subnet's batch-norm statistics; default: --bn-images")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    STUDIES[arguments.study](TrainingOnce(arguments))


if __name__ == "__main__":
    main()
