"""ResNet-20 on CIFAR-10 with the grow road. One JSON entry per run; finished entries are skipped, interrupted runs resume.

    python -m benchmarks.studies.grow_resnet20 STUDY --data cifar10.npz --weights resnet20_cifar10.safetensors [--epochs 10]
                                                     [--images N] [--batch-size 256] [--device cuda]

    methods   CSQ, uniform LSQ at equal size, calibrate at equal size, and calibrate's scheme trained with LSQ: 3 bits with A4 and with
              float activations, two seeds; CSQ's scheme trained with LSQ; CSQ at 2 and at 4 bits
    growing   MSQ with and without its pull, CSQ, CSQ's scheme trained with LSQ, and uniform LSQ: 3 bits, float activations
    agreement sensitivity of the layers of grown networks, from the run folders written by `methods --runs`
    choices   the two binary choices: weight gates soft or straight-through, plane gates soft or hard with periodic pruning (BSQ-like)
    borders   the float network's batch-norm statistics re-estimated on 2,048 training images: augmented with black borders, with the mean
              colour, and not augmented
    cost      time and memory of one training step: float, LSQ, MSQ, CSQ with all planes and with two, CSQ in plain autograd
    scratch   a short run from scratch, with the defaults for trained weights and with later decisions
    full      600 epochs from scratch as published, 20 times smaller by the paper's count; needs a GPU

The default of 10 epochs from trained weights takes hours on two cores; `--images 12800` trains on a quarter of the images and writes to
a separate JSON file; `choices` and `scratch` with `--images 3200 --batch-size 64` take 5 to 15 minutes per run, `growing` with
`--images 3200 --epochs 4 --batch-size 64 --test-images 2500` about 3. Accuracies are those of soft and of frozen networks; drops are
relative to the float network trained for as long by the same recipe.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import anybit
from anybit.budget import Budget
from anybit.data.batches import Batch
from anybit.data.tasks import correct, outputs_of
from anybit.loops.settings import TrainSettings
from anybit.loops.training import drawn_batches
from anybit.methods.csq import GatedWeight, gate
from anybit.networks.batchnorm import reestimate
from anybit.networks.layers import emptied
from anybit.roads.grow import make_trainee, observe_trainable
from anybit.roads.settings import GrowSettings
from anybit.scheme import FLOAT, Precision, Scheme
from benchmarks.studies.cifar10 import ResNet20, training_parser
from benchmarks.studies.study import narrated

# On labels alone, at a learning rate of 1e-3, ten epochs end below the trained network that they started from, even in float.
RECIPE = {"augment": "flip,crop4", "compile": True, "distill": 1.0, "rate": 3e-4}

# From scratch, weights have to be learned before they are decided, so planes are fixed later than for trained ones, and gates move faster.
LATE = {"fix": 0.6, "gate_rate": 3e-2}


class Growing(ResNet20):
    """The study of the grow road."""

    def __init__(self, arguments: argparse.Namespace):
        super().__init__(arguments, "grow_resnet20")

    def names(self) -> list[str]:
        return [n for n, layer in self.network().named_modules() if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))]

    def grown(self, key: str, budget: str | None, **settings: Any) -> dict[str, Any]:
        """Call anybit.grow and test; the checkpoint is kept until the run has finished."""
        options = self.arguments
        settings = {"epochs": options.epochs, "batch_size": options.batch_size, "half": self.half, **RECIPE, **settings}
        checkpoint = self.checkpoint(key)
        with narrated(key):
            test = None if options.test_once else self.test
            result = anybit.grow(self.network(), self.train, budget, test=test, checkpoint=checkpoint, device=options.device, **settings)
        if options.runs:
            result.save(options.runs / f"{key.replace(' ', '_')}{self.part}", overwrite=True)
        checkpoint.unlink(missing_ok=True)
        return self.row(result) | {"epochs": result.report["epochs"]}


def methods(study: Growing) -> None:
    def run(key: str, budget: str | None, **settings: Any) -> None:
        study.measured(key, lambda: study.grown(key, budget, **settings))

    for seed in range(study.arguments.seeds):
        run(f"float seed {seed}", None, scheme=Scheme.uniform(study.names(), FLOAT), seed=seed)
        for bits in (4, None):
            inputs = {"activation_bits": bits, "seed": seed}
            label = "A4" if bits else "float activations"
            run(f"CSQ 3bit {label} seed {seed}", "3bit", per_channel=True, **inputs)
            run(f"LSQ W3 {label} seed {seed}", None, scheme=Scheme.uniform(study.names(), Precision(3, bits)), **inputs)
            key = f"calibrate 3bit {label} seed {seed}"
            study.measured(key, lambda bits=bits, seed=seed: calibrated(study, bits, seed))
            if key in study.entries:
                scheme, trained = Scheme.parse(study.entries[key]["layers"]), f"calibrate's scheme trained, {label} seed {seed}"
                uniform = f"LSQ W3 {label} seed {seed}"
                if scheme == Scheme.uniform(study.names(), Precision(3, bits)) and uniform in study.entries:
                    study.measured(trained, lambda uniform=uniform: study.entries[uniform] | {"same_run_as": uniform})
                run(trained, None, scheme=scheme, **inputs)
            grown = study.entries.get(f"CSQ 3bit {label} seed {seed}")
            if grown:
                run(f"CSQ's scheme trained, {label} seed {seed}", None, scheme=Scheme.parse(grown["layers"]), **inputs)
    for budget in ("2bit", "4bit"):
        run(f"CSQ {budget} A4 seed 0", budget, activation_bits=4, per_channel=True)
    run("CSQ 3bit A4, a scale for each layer, seed 0", "3bit", activation_bits=4)


def calibrated(study: Growing, activation_bits: int | None, seed: int) -> dict[str, Any]:
    """Calibrate on 1,024 training images at the same budget."""
    result = anybit.calibrate(study.network(), study.train, "3bit", activation_bits=(activation_bits,), seed=seed, mirror=True, cache=False)
    return study.row(result) | {"table": result.table["table"]}


def growing(study: Growing) -> None:
    """Run the methods that grow a scheme, and the runs that they are compared with; in so few steps, compiling does not pay off."""

    def run(key: str, budget: str | None, **settings: Any) -> None:
        study.measured(key, lambda: study.grown(key, budget, activation_bits=None, compile=False, **settings))

    for seed in range(study.arguments.seeds):
        run(f"float seed {seed}", None, scheme=Scheme.uniform(study.names(), FLOAT), seed=seed)
        run(f"LSQ W3 seed {seed}", None, scheme=Scheme.uniform(study.names(), Precision(3, None)), seed=seed)
        run(f"MSQ 3bit seed {seed}", "3bit", method="msq", seed=seed)
        run(f"MSQ 3bit, no pull, seed {seed}", "3bit", method="msq", pull=0.0, seed=seed)
        run(f"CSQ 3bit seed {seed}", "3bit", method="csq", per_channel=True, seed=seed)
        for method in ("CSQ", "MSQ"):
            grown = study.entries.get(f"{method} 3bit seed {seed}")
            if grown:
                run(f"{method}'s scheme trained with LSQ, seed {seed}", None, scheme=Scheme.parse(grown["layers"]), seed=seed)


def agreement(study: Growing) -> None:
    """Measure the loss of a grown network with one layer at a time at 2 bits, the others as grown; needs the run folders."""
    for folder in sorted(study.arguments.runs.glob("CSQ_?bit_*")):
        study.measured(folder.name, lambda folder=folder: {"table": table_of(study, folder)})


def table_of(study: Growing, folder: Path) -> dict[str, Any]:
    """Measure calibrate's sensitivity table for a run's network, with its current weights."""
    grown = emptied(anybit.load(folder, model=study.network()))
    settings = {"weight_bits": (2, 8), "activation_bits": (None,), "pipeline": "light", "bn_tuning": False}
    return anybit.calibrate(grown, study.train, None, **settings).table["table"]


def choices(study: Growing) -> None:
    for weights in ("soft", "straight-through"):
        for planes in ("soft", "straight-through"):
            key = f"weight gates {weights}, plane gates {planes}"
            # One phase, as published, so that only the two choices have an effect. Planes move fast enough for a short run to close
            # them; at a high temperature, open ones would have no gradient. In so few steps, compiling does not pay off.
            once = {"phase": "continue", "fix": 0.7, "plane_rate": 3e-2, "plane_temperature": 20.0, "compile": False}
            kinds = {"weight_gates": weights, "plane_gates": planes, "activation_bits": None, "per_channel": True, **once}
            study.measured(key, lambda key=key, kinds=kinds: study.grown(key, "3bit", **kinds))


def borders(study: Growing) -> None:
    """Score the network with re-estimated statistics: nothing is trained, so any difference is due to the images."""

    def scored(settings: TrainSettings | None) -> dict[str, float]:
        model = study.network()
        if settings is not None:
            reestimate(model, drawn_batches(study.train, settings, 2048))
        right = correct(outputs_of(model, study.test.batches(250)), study.labels())
        return {"top1": 100 * float(right.double().mean())}

    kinds = {
        "black borders": ("flip,crop4", "black"),
        "borders of the mean colour": ("flip,crop4", "mean"),
        "not augmented": ("none", "black"),
    }
    study.measured("stored statistics", lambda: scored(None))
    for words, (augment, border) in kinds.items():
        study.measured(words, lambda augment=augment, border=border: scored(TrainSettings(augment=augment, border=border)))


class PlainGates(torch.nn.Module):
    """Compute CSQ's weight as the equation is written; autograd then saves every gate of every plane."""

    def __init__(self, fused: GatedWeight):
        super().__init__()
        self.fused = fused

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        f = self.fused
        planes = (gate(f.positive, f.temperature, "soft") - gate(f.negative, f.temperature, "soft")) * f.place_values[:, None, None]
        return (planes * f.plane_gate()[:, None, None]).sum(0) * (f.log_scale.exp() / f.shrinkage())


def cost(study: Growing) -> None:
    """Time steps of each kind alternately, so that other load affects all equally; count the bytes that autograd saves for gates."""
    batch = next(study.train.on(study.arguments.device).batches(256))
    kinds: dict[str, torch.nn.Module] = {}
    for name, scheme, method in (
        ("float", FLOAT, "lsq"),
        ("LSQ", Precision(3, None), "lsq"),
        ("MSQ", None, "msq"),
        ("CSQ", None, "csq"),
        ("CSQ, two planes left", None, "csq"),
        ("CSQ, plain", None, "csq"),
    ):
        settings = GrowSettings.of(activation_bits=None)
        fixed = None if scheme is None else Scheme.uniform(study.names(), scheme)
        budget = Budget.parse("3bit") if method == "msq" else None  # MSQ pulls only with a budget
        network = observe_trainable(study.network().to(study.arguments.device), Batch(batch.inputs[:2]), settings, fixed, method)
        trainee = make_trainee(network, [batch], budget, settings, method)
        if name == "CSQ, two planes left":
            for weight in trainee.gated.values():
                weight.fix(range(5, 7))
        saved = saved_bytes(trainee.model, name == "CSQ, plain")
        optimizer = torch.optim.Adam(trainee.parameter_groups())
        kinds[name] = (trainee, optimizer, saved)
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(study.arguments.rounds):
        for name, (trainee, optimizer, _) in kinds.items():
            start = time.perf_counter()
            loss = torch.nn.functional.cross_entropy(trainee.model(batch.inputs), batch.labels)
            (loss + trainee.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if study.arguments.device.startswith("cuda"):
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    weights = sum(parameter.numel() for name, parameter in study.network().named_parameters() if parameter.dim() > 1)
    study.measured(
        "one step",
        lambda: {
            name: {
                "seconds": seconds[name],
                "times_float": float(np.median(np.array(seconds[name]) / np.array(seconds["float"]))),
                "bytes_kept_a_weight": kinds[name][2] / weights,
                "bytes_trained_a_weight": 4 * sum(p.numel() for p in kinds[name][0].model.parameters() if p.requires_grad) / weights,
            }
            for name in kinds
        },
    )


def saved_bytes(model: torch.nn.Module, plain: bool) -> int:
    """Count the bytes that autograd saves to compute weights, without parameters. `plain` uses the equation instead of the fused sum."""
    slots = [(m, m.weight_quantizer) for m in model.modules() if isinstance(getattr(m, "weight_quantizer", None), GatedWeight)]
    if plain:
        for layer, slot in slots:
            layer.weight_quantizer = PlainGates(slot)
    owned = {parameter.data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in owned:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        weights = [layer.weight for layer, _ in slots]
    assert len(weights) == len(slots)
    return sum(saved.values())


def scratch(study: Growing) -> None:
    settings = {"from_scratch": True, "activation_bits": None, "rate": 2e-3, "distill": 0.0, "compile": False}
    for words, late in (("as for trained weights", {}), ("decided late", LATE)):
        key = f"CSQ 4bit from scratch, {words}"
        study.measured(key, lambda key=key, late=late: study.grown(key, "4bit", **settings, **late))


def full(study: Growing) -> None:
    """Run the published length and budget: 32 / 20 = 1.6 bits by the paper's count (no sign, layers unweighted), 2.6 with the sign."""
    settings = {"from_scratch": True, "epochs": 600, "activation_bits": None, "rate": 2e-3, "distill": 0.0, **LATE}
    for budget in ("2.6bit", "3bit"):
        key = f"CSQ {budget} from scratch"
        study.measured(key, lambda key=key, budget=budget: study.grown(key, budget, **settings))


STUDIES = {
    "methods": methods,
    "growing": growing,
    "agreement": agreement,
    "choices": choices,
    "borders": borders,
    "cost": cost,
    "scratch": scratch,
    "full": full,
}


def main() -> None:
    """Run one study."""
    arguments = training_parser(__doc__, STUDIES, seeds=2, epochs=10).parse_args()
    torch.set_num_threads(arguments.threads)
    STUDIES[arguments.study](Growing(arguments))


if __name__ == "__main__":
    main()
