"""Measure exported files: size against bits, latency against float32 in the same runtime, and whether its outputs equal the integer
reference's.

    python -m benchmarks.studies.export_networks STUDY [--data cifar10.npz --weights resnet20_cifar10.safetensors]
                                                       [--images FOLDER --test FOLDER]

    shapes     ResNet-18, ResNet-50, MobileNetV2 and BERT-base shapes with random weights: uniform and random mixed schemes
    linears    three 4,096 x 4,096 linear layers with packed weights, one row at a time
    exact      small networks of every operator at random mixed schemes: whether outputs are equal bit for bit, else the difference
    resnet20   CIFAR-10: accuracy of the exported file and of the simulation, at W8A8, W4A8, W4A4 and a mixed scheme
    lite0      EfficientNet-lite0: the same, on images
    saturation outputs and times of sessions with and without exact sums, at 8 and 7 bits: relevant on x86 without VNNI
    latency    predicted (by the table of `anybit profile`) and measured latencies of random schemes of float and integer layers

Latencies are measured on one thread, alternating with float32; run nothing else meanwhile.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

import anybit
from anybit.data.batches import Batch
from anybit.data.tasks import outputs_of
from anybit.exports.verbs import measured
from anybit.networks.canonical import Canonical
from anybit.networks.edges import finished
from anybit.networks.observed import observe_network, rounded_to_nearest
from anybit.networks.options import LayerOptions
from anybit.onnx.file import exported, ideal_bytes, load, save
from anybit.onnx.file import outputs as onnx_file_outputs
from anybit.onnx.file import session as onnx_file_session
from anybit.onnx.floats import input_tensors
from anybit.onnx.interpreter import interpret
from anybit.onnx.latency import latency_of, measure_latency
from anybit.onnx.timing import faster, in_turns
from anybit.onnx.verification import lacks_vnni, saturating, verify_file
from anybit.scheme import FLOAT, Precision, Scheme
from anybit.sources.inputs import load_data
from anybit.sources.models import load_model
from anybit.sources.preprocessing import Preprocessing
from benchmarks.studies import cifar10, efficientnet_lite0, shapes
from benchmarks.studies.study import Entries, parser
from tests import exported as networks  # the same networks and the same rounding to nearest


def same(graphs: Any, batch: Batch) -> dict[str, Any]:
    """Return whether the runtime's outputs equal the interpreter's bit for bit, and how far they differ."""
    reference = interpret(graphs.integer, feeds_of(graphs, batch))
    outputs = onnx_file_outputs(onnx_file_session(graphs.integer), [batch])
    pairs = [(array, reference.values[v.name].numpy()) for array, v in zip(outputs, graphs.integer.graph.outputs, strict=True)]
    return {
        "bitwise": all(np.array_equal(a, b) for a, b in pairs),
        "largest_difference": max(float(np.abs(a - b).max()) for a, b in pairs),
        "in_float": reference.in_float,
    }


def feeds_of(graphs: Any, batch: Batch) -> dict[str, Any]:
    """Return the inputs by their names in the file."""
    return dict(zip([value.name for value in graphs.integer.graph.inputs], input_tensors(batch), strict=True))


def kernels(graphs: Any, model: torch.nn.Module, batch: Batch) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        save(graphs.integer, path)
        verdict = verify_file(path, load(path), graphs, model, batch)
    return {"kernels": len(verdict.kernels), "failures": len(verdict.failures)}


SHAPES = {
    "resnet18": (3, 224, 224),
    "mobilenet_v2": (3, 224, 224),
    "resnet50": (3, 224, 224),
    "bert_base": (128, 768),
    "resnet20": (3, 32, 32),
}
"""name -> shape of a sample"""


def network_of(name: str) -> torch.nn.Module:
    if name != "resnet20":
        return getattr(shapes, name)()
    torch.manual_seed(0)
    return load_model(cifar10.NETWORK).eval()


def measure_shapes(arguments: argparse.Namespace, results: Entries) -> None:
    for name in SHAPES:
        schemes: dict[str, Precision | None] = {f"W{w}A{a}": Precision(w, a) for w, a in ((8, 8), (4, 8), (3, 8), (2, 8), (4, 4))}
        if name not in ("resnet18", "mobilenet_v2"):
            schemes = {key: schemes[key] for key in ("W8A8", "W4A8")}
        if name == "bert_base":  # its GELU is the only such function among the shapes
            schemes["W8A8 tables"] = Precision(8, 8)
        seeds = range(arguments.seeds) if name in ("resnet18", "mobilenet_v2") else range(arguments.seeds - 1, arguments.seeds)
        schemes |= {f"random {seed}": None for seed in seeds}
        for key, precision in schemes.items():
            results.measured(f"{name} {key}", partial(shape_at, name, key, precision, arguments.rounds))


def shape_at(name: str, key: str, precision: Precision | None, rounds: int) -> dict[str, Any]:
    """Measure one shape as a file: size, speed and exactness, at one precision or at one drawn for each layer."""
    shape, draw = SHAPES[name], random.Random(key)
    batch = networks.inputs(shape, 2)
    canonical = networks.canonical_of(network_of(name), batch, lambda layer: precision or networks.random_precision(draw))
    graphs = exported(canonical, batch, tables=key.endswith("tables"))
    entry = file_measured(graphs, networks.inputs(shape, 1, seed=5), rounds)
    entry |= {"ideal_bytes": ideal_bytes(canonical), "layers": {n: str(p) for n, p in canonical.scheme.items()}}
    return entry | same(graphs, networks.inputs(shape, 2, seed=6)) | kernels(graphs, canonical.model, batch)


def file_measured(graphs: Any, inputs: Batch, rounds: int) -> dict[str, Any]:
    """Measure size and speed; leave out the environment, which is recorded once for all entries."""
    return {key: value for key, value in measured(graphs.floating, graphs.integer, inputs, rounds).items() if key != "environment"}


def measure_linears(arguments: argparse.Namespace, results: Entries) -> None:
    for bits in (2, 3, 4, 8):
        results.measured(f"W{bits}", partial(linears_at, bits, arguments.rounds))


def linears_at(bits: int, rounds: int) -> dict[str, Any]:
    """Measure packed weights, where supported, with float inputs, one row at a time."""
    batch = networks.inputs((4096,), 4)
    canonical = networks.canonical_of(shapes.linears_4096(), batch, lambda layer: Precision(bits, None))
    graphs = exported(canonical, batch, weight_only=True)
    entry = file_measured(graphs, networks.inputs((4096,), 1, seed=5), rounds)
    outputs = torch.from_numpy(onnx_file_outputs(onnx_file_session(graphs.integer), [batch])[0])
    simulated = outputs_of(canonical.model, [batch])
    apart = float((outputs - simulated).abs().max() / simulated.abs().max())
    return entry | {"ideal_bytes": ideal_bytes(canonical), "largest_difference_of_largest_output": apart}


def measure_exact(arguments: argparse.Namespace, results: Entries) -> None:
    for name in networks.EXACT:
        for seed in range(max(3, arguments.seeds)):
            results.measured(f"{name} seed {seed}", partial(exact_at, name, seed))


def exact_at(name: str, seed: int) -> dict[str, Any]:
    """Compare the file of a small network at a random scheme with the integer reference."""
    network, shape = networks.EXACT[name]
    torch.manual_seed(seed)
    draw, batch = random.Random(seed), networks.inputs(shape)
    canonical = networks.canonical_of(network(), batch, lambda layer: networks.random_precision(draw))
    return same(exported(canonical, batch, tables=True), networks.inputs(shape, 64, seed=9))


def accuracy(canonical: Any, test: Any, batch_size: int) -> dict[str, Any]:
    """Measure the accuracy of the exported file and of the simulation on the whole test set."""
    start = time.perf_counter()
    batches = list(test.batches(batch_size))
    labels = torch.cat([batch.labels for batch in batches])
    graphs = exported(canonical, batches[0])
    simulated = outputs_of(canonical.model, batches).argmax(1)
    classes = torch.from_numpy(onnx_file_outputs(onnx_file_session(graphs.integer), batches)[0]).argmax(1)
    right = (simulated == labels).float(), (classes == labels).float()
    apart = (right[1] - right[0]) * 100
    return {
        **same(graphs, Batch(batches[0].inputs[:16])),
        **kernels(graphs, canonical.model, batches[0]),
        "simulated": 100 * float(right[0].mean()),
        "exported": 100 * float(right[1].mean()),
        "images": len(labels),
        "difference": float(apart.mean()),
        "standard_error": float(apart.std() / len(apart) ** 0.5),
        "agreement": 100 * float((simulated == classes).float().mean()),
        "bytes": len(ir.to_proto(graphs.integer).SerializeToString()),
        "ideal_bytes": ideal_bytes(canonical),
        "layers": {name: str(precision) for name, precision in canonical.scheme.items()},
        "seconds": time.perf_counter() - start,
    }


SCHEMES = {
    "W8A8": {"weight_bits": (8,), "activation_bits": (8,)},
    "W4A8": {"weight_bits": (4,), "activation_bits": (8,)},
    "W4A4": {"weight_bits": (4,), "activation_bits": (4,)},
    "mixed 4bit": {"weight_bits": (2, 3, 4, 6, 8), "activation_bits": (4, 6, 8), "budget": "4bit"},
}
LIGHT_MIXED = {"mixed 4bit, light": SCHEMES["mixed 4bit"] | {"pipeline": "light"}}
"""For a larger network, whose candidates take an hour to reconstruct; a file computes in the same way without that."""


def measure_resnet20(arguments: argparse.Namespace, results: Entries) -> None:
    train, test = (load_data(data, cifar10.PREPROCESSING) for data in (arguments.data, f"{arguments.data}#test"))

    def run(settings: dict[str, Any]) -> dict[str, Any]:
        network = load_model(cifar10.NETWORK, arguments.weights)
        return accuracy(anybit.calibrate(network, train, samples=1024, **settings).canonical, test, 250)

    for key, settings in SCHEMES.items():
        results.measured(key, partial(run, settings))


def measure_lite0(arguments: argparse.Namespace, results: Entries) -> None:
    preprocessing = Preprocessing((0.498039,) * 3, (0.501961,) * 3, 224, None, "bicubic")
    images, test = (load_data(data, preprocessing) for data in (arguments.images, arguments.test))
    quick = {"samples": 192, "batch_size": 32, "candidate_steps": 10, "steps": 25}

    def run(settings: dict[str, Any]) -> dict[str, Any]:
        network = load_model(efficientnet_lite0.NETWORK)
        return accuracy(anybit.calibrate(network, images, **quick, **settings).canonical, test, 32)

    for key, settings in (SCHEMES | LIGHT_MIXED).items():
        results.measured(key, partial(run, settings))


def measure_saturation(arguments: argparse.Namespace, results: Entries) -> None:
    small = {name: networks.EXACT[name] for name in ("relu", "mixed", "asymmetric")}
    large = {name: (partial(network_of, name), SHAPES[name]) for name in ("resnet18", "mobilenet_v2")}
    for name, (network, shape) in (small | large).items():
        for precision in (Precision(8, 8), Precision(7, 8), Precision(8, 7), Precision(4, 8)):
            results.measured(f"{name} {precision}", partial(saturation_at, network, shape, precision, arguments.rounds))


def saturation_at(network: Callable[[], torch.nn.Module], shape: Any, precision: Precision, rounds: int) -> dict[str, Any]:
    """Compare the same file, in a session with exact sums and in one without, with the integer interpreter and with float32."""
    torch.manual_seed(0)
    canonical = networks.canonical_of(network(), networks.inputs(shape, 2), lambda layer: precision)
    graphs = exported(canonical, networks.inputs(shape, 2), tables=True)
    batch, one = networks.inputs(shape, 2, seed=9), networks.inputs(shape, 1, seed=5)
    reference = interpret(graphs.integer, feeds_of(graphs, batch))
    expected = [reference.values[value.name].numpy() for value in graphs.integer.graph.outputs]
    sessions = {"exact sums": onnx_file_session(graphs.integer), "float32": onnx_file_session(graphs.floating)}
    sessions["as it is"] = onnx_file_session(graphs.integer, exact=False)
    times = in_turns({kind: partial(onnx_file_outputs, session, [one]) for kind, session in sessions.items()}, rounds)
    entry: dict[str, Any] = {"saturating": len(saturating(canonical.model, graphs.plan)), "vnni": not lacks_vnni()}
    for kind in ("as it is", "exact sums"):
        pairs = list(zip(expected, onnx_file_outputs(sessions[kind], [batch]), strict=True))
        apart = max(float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in pairs)
        bitwise = all(np.array_equal(a, b) for a, b in pairs)
        entry[kind] = {"bitwise": bitwise, "apart": apart, "faster": faster(times, kind, "float32")}
    return entry


def measure_latencies(arguments: argparse.Namespace, results: Entries) -> None:
    """Measure a table per shape, and schemes with none, a tenth, a third and two thirds of the layers in float."""
    for name in ("resnet18", "mobilenet_v2", "resnet20", "bert_base"):
        shares = {"8 bits": 0.0}
        shares |= {f"{share:.0%} float, seed {seed}": share for share in (0.1, 0.33, 0.67) for seed in range(max(4, arguments.seeds))}
        shape = cache(partial(table_of, name, arguments.rounds))  # measured only if an entry is missing
        for key, share in shares.items():
            results.measured(f"{name} {key}", lambda key=f"{name} {key}", share=share, shape=shape: latency_at(shape(), key, share))


@dataclass(frozen=True)
class Shape:
    """A network, its inputs, its latency table, and the float32 time measured with it."""

    network: Any
    batch: Batch
    table: Any
    float_seconds: float
    rounds: int


def table_of(name: str, rounds: int) -> Shape:
    torch.manual_seed(0)
    batch = networks.inputs(SHAPES[name], 2)
    network = observe_network(network_of(name), batch, LayerOptions((8,), (8, None)))
    table, metadata = measure_latency(network, batch, rounds)
    return Shape(network, batch, table, metadata["measured"]["float32"], rounds)


def latency_at(shape: Shape, key: str, share: float) -> dict[str, Any]:
    """Predict and measure the latency of a scheme with this share of float layers, drawn by the key."""
    network, batch = shape.network, shape.batch
    chosen = set(random.Random(key).sample(network.names, round(share * len(network.names))))
    scheme = Scheme({layer: FLOAT if layer in chosen else Precision(8, 8) for layer in network.names})
    model = rounded_to_nearest(network, [batch], scheme)
    times = latency_of(finished(Canonical(model, network.norms), network.wiring, [batch]), batch, shape.rounds)
    predicted, seen = shape.table.total(scheme) / shape.float_seconds, times["exported"] / times["float32"]
    entry = {"predicted_of_float": predicted, "measured_of_float": seen, "predicted_by_measured": predicted / seen}
    return entry | {"float_layers": sorted(chosen), "layers": len(network.names)}


STUDIES = {
    "saturation": measure_saturation,
    "latency": measure_latencies,
    "shapes": measure_shapes,
    "linears": measure_linears,
    "exact": measure_exact,
    "resnet20": measure_resnet20,
    "lite0": measure_lite0,
}


def main() -> None:
    """Run one study."""
    options = parser(__doc__, STUDIES)
    for name in ("--data", "--weights", "--images", "--test"):
        options.add_argument(name)
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--rounds", type=int, default=20)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    STUDIES[arguments.study](arguments, Entries(arguments, f"export_{arguments.study}", "onnxruntime"))


if __name__ == "__main__":
    main()
