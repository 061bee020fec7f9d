"""Exported files measured: size against the bits, latency against float32 in the same runtime, equality with the integer reference.

    python benchmarks/export_networks.py STUDY [--data cifar10.npz --weights resnet20_cifar10.safetensors] [--images FOLDER --test FOLDER]

    shapes     ResNet-18, ResNet-50, MobileNetV2 and BERT-base shapes with random weights: uniform and random mixed schemes
    linears    three 4,096 x 4,096 linears with packed weights, one row at a time
    exact      small networks of every operator at random mixed schemes: bit for bit or not, and by how much
    resnet20   CIFAR-10: accuracy of the exported file beside the simulation's, at W8A8, W4A8, W4A4 and a mixed scheme
    lite0      EfficientNet-lite0: the same, on pictures
    saturation what sessions with and without exact sums compute and take, at 8 and 7 bits: of interest on x86 without VNNI
    latency    what the table of `anybit profile` predicts for random schemes of float and integer layers, beside what their files take

Latencies are of one thread, in turns with float32; let nothing else run meanwhile.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

import anybit
from anybit.data.batches import Batch
from anybit.data.tasks import outputs_of
from anybit.environment import environment
from anybit.exports.verbs import measured
from anybit.networks.canonical import Canonical
from anybit.networks.edges import observe_edge_ranges
from anybit.networks.observed import observe_network, rounded_to_nearest
from anybit.onnx.file import exported, ideal_bytes, load, outputs, save, session
from anybit.onnx.floats import input_tensors
from anybit.onnx.interpreter import interpret
from anybit.onnx.latency import latency_of, measure_latency
from anybit.onnx.timing import faster, in_turns
from anybit.onnx.verification import lacks_vnni, saturating, verify_file
from anybit.roads.settings import CalibrateSettings
from anybit.scheme import FLOAT, Precision, Scheme

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import exported as networks  # noqa: E402  (tests/exported.py: the same networks and the same rounding to nearest)
import shapes  # noqa: E402


class Results:
    """One JSON entry a measurement; a finished one is not made again."""

    def __init__(self, folder: Path, study: str):
        self.file = folder / f"export_{study}.json"

    @property
    def entries(self) -> dict[str, Any]:
        return json.loads(self.file.read_text())["entries"] if self.file.is_file() else {}

    def add(self, key: str, entry: dict[str, Any]) -> None:
        entry.pop("environment", None)
        about = {"environment": environment() | {"onnxruntime": onnxruntime.__version__}, "entries": self.entries | {key: entry}}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(about, indent=1) + "\n")
        print(key, {name: value for name, value in entry.items() if name != "layers"}, flush=True)


def same(made: Any, batch: Batch) -> dict[str, Any]:
    """Whether the runtime's outputs are the interpreter's, bit for bit."""
    feeds = dict(zip([value.name for value in made.integer.graph.inputs], input_tensors(batch), strict=True))
    reference = interpret(made.integer, feeds)
    given = outputs(session(made.integer), [batch])
    pairs = [(array, reference.values[v.name].numpy()) for array, v in zip(given, made.integer.graph.outputs, strict=True)]
    return {
        "bitwise": all(np.array_equal(a, b) for a, b in pairs),
        "largest_difference": max(float(np.abs(a - b).max()) for a, b in pairs),
        "in_float": reference.in_float,
    }


def kernels(made: Any, model: torch.nn.Module, batch: Batch) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        save(made.integer, path)
        verdict = verify_file(path, load(path), made, model, batch)
    return {"kernels": len(verdict.kernels), "failures": len(verdict.failures)}


SHAPES = {
    "resnet18": (3, 224, 224),
    "mobilenet_v2": (3, 224, 224),
    "resnet50": (3, 224, 224),
    "bert_base": (128, 768),
    "resnet20": (3, 32, 32),
}
"""name -> shape of an input"""


def network_of(name: str) -> torch.nn.Module:
    if name != "resnet20":
        return getattr(shapes, name)()
    from anybit.sources.models import load_model

    torch.manual_seed(0)
    return load_model(str(ROOT / "examples/resnet20_cifar10.py") + ":network").eval()


def measure_shapes(arguments: argparse.Namespace, results: Results) -> None:
    for name, shape in SHAPES.items():
        schemes = {f"W{w}A{a}": Precision(w, a) for w, a in ((8, 8), (4, 8), (3, 8), (2, 8), (4, 4))}
        schemes |= {"W8A8 tables": Precision(8, 8)} if name == "bert_base" else {}  # its GELU is the one function among the shapes
        keys = [*schemes, *(f"random {seed}" for seed in range(arguments.seeds))]
        for key in (
            keys if name in ("resnet18", "mobilenet_v2") else [*keys[:2], *(key for key in keys if key.endswith("tables")), keys[-1]]
        ):
            if f"{name} {key}" in results.entries or (arguments.only and arguments.only not in f"{name} {key}"):
                continue
            draw = random.Random(key)
            batch = networks.inputs(shape, 2)
            wanted = (lambda layer, p=schemes[key]: p) if key in schemes else (lambda layer, d=draw: networks.random_precision(d))
            canonical = networks.canonical_of(network_of(name), batch, wanted)
            made = exported(canonical, batch, tables=key.endswith("tables"))
            entry = measured(made.floating, made.integer, networks.inputs(shape, 1, seed=5), arguments.rounds)
            entry |= {"ideal_bytes": ideal_bytes(canonical), "layers": {n: str(p) for n, p in canonical.scheme.items()}}
            entry |= same(made, networks.inputs(shape, 2, seed=6)) | kernels(made, canonical.model, batch)
            results.add(f"{name} {key}", entry)


def measure_linears(arguments: argparse.Namespace, results: Results) -> None:
    """Weight-only: packed weights where they are read, one row at a time."""
    for bits in (2, 3, 4, 8):
        if f"W{bits}" not in results.entries:
            batch = networks.inputs((4096,), 4)
            canonical = networks.canonical_of(shapes.linears_4096(), batch, lambda layer, bits=bits: Precision(bits, None))
            made = exported(canonical, batch, weight_only=True)
            entry = measured(made.floating, made.integer, networks.inputs((4096,), 1, seed=5), arguments.rounds)
            given = torch.from_numpy(outputs(session(made.integer), [batch])[0])
            simulated = outputs_of(canonical.model, [batch])
            apart = float((given - simulated).abs().max() / simulated.abs().max())
            results.add(f"W{bits}", entry | {"ideal_bytes": ideal_bytes(canonical), "largest_difference_of_largest_output": apart})


def measure_exact(arguments: argparse.Namespace, results: Results) -> None:
    for name, (network, shape) in networks.EXACT.items():
        for seed in range(max(3, arguments.seeds)):
            key = f"{name} seed {seed}"
            if key not in results.entries:
                torch.manual_seed(seed)
                draw = random.Random(seed)
                batch = networks.inputs(shape)
                canonical = networks.canonical_of(network(), batch, lambda layer, d=draw: networks.random_precision(d))
                results.add(key, same(exported(canonical, batch, tables=True), networks.inputs(shape, 64, seed=9)))


def measure_accuracy(results: Results, key: str, canonical: Any, test: Any, batch_size: int) -> None:
    """The exported file on the whole test set beside the simulation."""
    start = time.perf_counter()
    batches = list(test.batches(batch_size))
    labels = torch.cat([batch.labels for batch in batches])
    made = exported(canonical, batches[0])
    simulated = outputs_of(canonical.model, batches).argmax(1)
    given = torch.from_numpy(outputs(session(made.integer), batches)[0]).argmax(1)
    right = (simulated == labels).float(), (given == labels).float()
    apart = (right[1] - right[0]) * 100
    results.add(
        key,
        same(made, Batch(batches[0].inputs[:16]))
        | kernels(made, canonical.model, batches[0])
        | {
            "simulated": 100 * float(right[0].mean()), "exported": 100 * float(right[1].mean()), "images": len(labels),
            "difference": float(apart.mean()), "standard_error": float(apart.std() / len(apart) ** 0.5),
            "agreement": 100 * float((simulated == given).float().mean()),
            "bytes": len(ir.to_proto(made.integer).SerializeToString()), "ideal_bytes": ideal_bytes(canonical),
            "layers": {name: str(precision) for name, precision in canonical.scheme.items()}, "seconds": time.perf_counter() - start,
        },
    )  # fmt: skip


SCHEMES = {
    "W8A8": {"weight_bits": (8,), "activation_bits": (8,)},
    "W4A8": {"weight_bits": (4,), "activation_bits": (8,)},
    "W4A4": {"weight_bits": (4,), "activation_bits": (4,)},
    "mixed 4bit": {"weight_bits": (2, 3, 4, 6, 8), "activation_bits": (4, 6, 8), "budget": "4bit"},
}
LIGHT_MIXED = {"mixed 4bit, light": SCHEMES["mixed 4bit"] | {"pipeline": "light"}}
"""Beside it for a larger network, whose candidates take an hour to reconstruct: what a file computes does not depend on that."""


def measure_resnet20(arguments: argparse.Namespace, results: Results) -> None:
    from study import PREPROCESSING

    from anybit.sources.inputs import load_data
    from anybit.sources.models import load_model

    train, test = load_data(arguments.data, PREPROCESSING), load_data(f"{arguments.data}#test", PREPROCESSING)
    for key, settings in SCHEMES.items():
        if key not in results.entries and not (arguments.only and arguments.only not in key):
            network = load_model(str(ROOT / "examples/resnet20_cifar10.py") + ":network", arguments.weights)
            result = anybit.calibrate(network, train, samples=1024, **settings)
            measure_accuracy(results, key, result.canonical, test, 250)


def measure_lite0(arguments: argparse.Namespace, results: Results) -> None:
    from anybit.sources.inputs import load_data
    from anybit.sources.models import load_model
    from anybit.sources.preprocessing import Preprocessing

    preprocessing = Preprocessing((0.498039,) * 3, (0.501961,) * 3, 224, None, "bicubic")
    images, test = load_data(arguments.images, preprocessing), load_data(arguments.test, preprocessing)
    for key, settings in (SCHEMES | LIGHT_MIXED).items():
        if key not in results.entries and not (arguments.only and arguments.only not in key):
            network = load_model(str(ROOT / "examples/efficientnet_lite0.py") + ":network")
            quick = {"samples": 192, "batch_size": 32, "candidate_steps": 10, "steps": 25}
            result = anybit.calibrate(network, images, **quick, **settings)
            measure_accuracy(results, key, result.canonical, test, 32)


def measure_saturation(arguments: argparse.Namespace, results: Results) -> None:
    """The same file in a session that asks for exact sums and in one that does not, beside the integer interpreter and float32."""
    small = {name: networks.EXACT[name] for name in ("relu", "mixed", "asymmetric")}
    large = {name: (lambda name=name: network_of(name), SHAPES[name]) for name in ("resnet18", "mobilenet_v2")}
    for name, (network, shape) in (small | large).items():
        for scheme in (Precision(8, 8), Precision(7, 8), Precision(8, 7), Precision(4, 8)):
            key = f"{name} {scheme}"
            if key in results.entries or (arguments.only and arguments.only not in key):
                continue
            torch.manual_seed(0)
            canonical = networks.canonical_of(network(), networks.inputs(shape, 2), lambda layer, scheme=scheme: scheme)
            made = exported(canonical, networks.inputs(shape, 2), tables=True)
            batch = networks.inputs(shape, 2, seed=9)
            feeds = dict(zip([value.name for value in made.integer.graph.inputs], input_tensors(batch), strict=True))
            reference = interpret(made.integer, feeds)
            expected = [reference.values[value.name].numpy() for value in made.integer.graph.outputs]
            sessions = {"exact sums": session(made.integer), "float32": session(made.floating)}
            sessions["as it is"] = session(made.integer, exact=False)
            entry: dict[str, Any] = {"saturating": len(saturating(canonical.model, made.plan)), "vnni": not lacks_vnni()}
            for how in ("as it is", "exact sums"):
                pairs = list(zip(expected, outputs(sessions[how], [batch]), strict=True))
                apart = max(float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in pairs)
                entry[how] = {"bitwise": all(np.array_equal(a, b) for a, b in pairs), "apart": apart}
            one = networks.inputs(shape, 1, seed=5)
            times = in_turns({how: lambda run=run, one=one: outputs(run, [one]) for how, run in sessions.items()}, arguments.rounds)
            for how in ("as it is", "exact sums"):
                entry[how]["faster"] = faster(times, how, "float32")
            results.add(key, entry)


def measure_latencies(arguments: argparse.Namespace, results: Results) -> None:
    """A table for each shape; schemes of which a tenth, a third, or two thirds of the layers are float, and each in float alone."""
    for name in ("resnet18", "mobilenet_v2", "resnet20", "bert_base"):
        shares = {f"{share:.0%} float, seed {seed}": share for share in (0.1, 0.33, 0.67) for seed in range(max(4, arguments.seeds))}
        missing = [key for key in ["8 bits", *shares] if f"{name} {key}" not in results.entries]
        if not missing or (arguments.only and arguments.only not in name):
            continue
        torch.manual_seed(0)
        batch = networks.inputs(SHAPES[name], 2)
        network = observe_network(network_of(name), batch, CalibrateSettings((8,), (8, None)).options)
        table, about = measure_latency(network, batch, arguments.rounds)
        for key in missing:
            draw = random.Random(f"{name} {key}")
            chosen = set(draw.sample(network.names, round(shares.get(key, 0) * len(network.names))))
            scheme = Scheme({layer: FLOAT if layer in chosen else Precision(8, 8) for layer in network.names})
            model = rounded_to_nearest(network, [batch], scheme)
            found = latency_of(
                Canonical(model, network.norms, observe_edge_ranges(model, network.wiring, [batch])), batch, arguments.rounds
            )
            predicted = table.total(scheme) / about["measured"]["float32"]
            measured = found["exported"] / found["float32"]
            entry = {"predicted_of_float": predicted, "measured_of_float": measured, "predicted_by_measured": predicted / measured}
            results.add(f"{name} {key}", entry | {"float_layers": sorted(chosen), "layers": len(network.names)})


STUDIES = {
    "saturation": measure_saturation,
    "latency": measure_latencies,
    "shapes": measure_shapes,
    "linears": measure_linears,
    "exact": measure_exact,
    "resnet20": measure_resnet20,
    "lite0": measure_lite0,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    for name in ("--data", "--weights", "--images", "--test", "--only"):
        parser.add_argument(name)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    STUDIES[arguments.study](arguments, Results(arguments.results, arguments.study))
