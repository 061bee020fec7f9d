"""Latency of every layer in float and on integers, on this machine: the basis of latency budgets.

    1. The network is exported twice, in float32 and with every layer on integers, and the runtime's profiler measures each kernel. The
       times of kernels are scaled to add up to the latency without the profiler.
    2. A third export has every second layer in float. Its time above the sum of its parts is the cost of its boundaries, shared among the
       numbers that cross them. Which numbers cross in other schemes follows from the wiring.

Bits only determine the kernel: 2 to 8 bits all run as int8.
"""

import hashlib
import json
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Field

from anybit.data.batches import Batch
from anybit.environment import own_folder, processor
from anybit.errors import AnybitError, InvalidFile
from anybit.files.cache import Cache
from anybit.files.strict import read_sealed, sealed, validated, write_json
from anybit.files.whole import whole_file
from anybit.networks.canonical import Canonical
from anybit.networks.edges import finished
from anybit.networks.latency import LatencyTable, OperationFlow, kernel_class
from anybit.networks.observed import ObservedNetwork, rounded_to_nearest
from anybit.networks.wiring import LAYER as LAYER_KIND
from anybit.onnx.file import asks_for_exact_sums, exported, session
from anybit.onnx.floats import LAYER, input_tensors, probe_of
from anybit.onnx.operators import LAYER_OPERATORS
from anybit.onnx.timing import in_turns
from anybit.onnx.values import as_written, makers, name_of
from anybit.scheme import FLOAT, Precision, Scheme


def measure_latency(
    network: ObservedNetwork, batch: Batch, rounds: int = 20, threads: int = 1, cache: Cache = Cache()
) -> tuple[LatencyTable, dict[str, Any]]:
    """Return (the table, the measured and predicted latency of whole networks) for one sample per pass; `cache` stores the graph."""
    on_integers = _on_integers(network)
    whole = {name: options[0] if options else network.choices[name][0] for name, options in on_integers.items()}
    free = [name for name, options in on_integers.items() if options]
    striped = {name: FLOAT if name in free[1::2] else precision for name, precision in whole.items()}
    graphs: dict[str, ir.Model] = {}
    for kind, precisions in (("int8", whole), ("alternating", striped)):
        model = rounded_to_nearest(network, [batch], Scheme(precisions))
        canonical = finished(Canonical(model, network.norms), network.wiring, [batch])
        file = exported(canonical, batch, cache=cache)
        graphs[kind], graphs["float32"] = file.integer, file.floating
    one = probe_of(batch, 1)
    runners = {kind: _runner(graph, one, threads) for kind, graph in graphs.items()}
    seconds = {kind: float(np.median(times)) for kind, times in in_turns(runners, rounds).items()}
    parts = {kind: _kernels(graphs[kind], one, seconds[kind], threads) for kind in ("float32", "int8")}
    layers = {name: {kind: parts[kind][0].get(name, 0.0) for kind in parts} for name in network.names}
    rest = {kind: rest for kind, (_, rest) in parts.items()}
    fixed = [name for name in network.names if name not in free]
    table = LatencyTable(layers, rest, 0.0, _steps(network), fixed, _products(network))
    apart, crossing = seconds["alternating"] - table.total(Scheme(striped)), table.crossing(free[1::2])
    table = replace(table, boundary=max(0.0, apart / crossing) if crossing else 0.0)
    return table, {"measured": seconds, "predicted_int8": table.total(Scheme(whole)), "threads": threads, "rounds": rounds}


def latency_of(canonical: Canonical, batch: Batch, rounds: int = 20, threads: int = 1) -> dict[str, float]:
    """Measure the seconds of a finished network's exported file and its float32 file, alternating."""
    file = exported(canonical, batch)
    one = probe_of(batch, 1)
    runners = {"exported": _runner(file.integer, one, threads), "float32": _runner(file.floating, one, threads)}
    return {kind: float(np.median(times)) for kind, times in in_turns(runners, rounds).items()}


def _runner(graph: ir.Model, batch: Batch, threads: int):
    running = session(graph, threads)
    feeds = {value.name: tensor.numpy() for value, tensor in zip(running.get_inputs(), input_tensors(batch), strict=True)}
    return lambda: running.run(None, feeds)


def _on_integers(network: ObservedNetwork) -> dict[str, list[Precision]]:
    """Return layer -> its choices that run on integers."""
    products = _products(network)
    return {name: [p for p in options if kernel_class(p, name in products) == "int8"] for name, options in network.choices.items()}


def _products(network: ObservedNetwork) -> list[str]:
    return [name for name, size in network.costs.layers.items() if size.operands == 2]


def _steps(network: ObservedNetwork) -> tuple[OperationFlow, ...]:
    batch = network.wiring.batch_size
    return tuple(
        OperationFlow(op.name if op.kind == LAYER_KIND else None, op.inputs, op.outputs, int(np.prod(op.shape)) // batch)
        for op in network.wiring.operations
    )


def _kernels(graph: ir.Model, batch: Batch, seconds: float, threads: int, runs: int = 20) -> tuple[dict[str, float], float]:
    """Return (seconds of each layer, of the rest), which add up to `seconds`."""
    with tempfile.TemporaryDirectory() as folder:
        running = session(graph, threads, profile=Path(folder) / "profile")
        feeds = {value.name: tensor.numpy() for value, tensor in zip(running.get_inputs(), input_tensors(batch), strict=True)}
        for _ in range(runs):
            running.run(None, feeds)
        try:
            events = json.loads(Path(running.end_profiling()).read_text())
        except (OSError, ValueError) as error:  # the runtime does not report a full disk
            raise AnybitError(f"{folder} has no room for the runtime's profile. Make room, or set TMPDIR to another folder.") from error
    times = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["name"].removesuffix("_kernel_time")].append(event["dur"])
    medians = {name: float(np.median(durations)) for name, durations in times.items()}
    scale = seconds / max(sum(medians.values()), 1e-12)
    owners = _owners(graph, list(medians))
    layers: dict[str, float] = defaultdict(float)
    rest = 0.0
    for name, duration in medians.items():
        if owners.get(name) is None:
            rest += duration * scale
        else:
            layers[owners[name]] += duration * scale
    return dict(layers), rest


def _owners(graph: ir.Model, kernels: Sequence[str]) -> dict[str, str]:
    """Return kernel -> its layer. Kernels are named after their node or, if fused, after the value that they compute."""
    named = {name_of(node): node.metadata_props.get(LAYER, name_of(node)) for node in graph.graph if _is_layer(node)}
    taken = {as_written(kernel, named) for kernel in kernels} & set(named)
    owners = {kernel: named[ours] for kernel in kernels if (ours := as_written(kernel, named)) in named}
    sources = {value.name: node for node in graph.graph for value in node.outputs}
    for kernel in kernels:
        node = sources.get(kernel.removesuffix("_nchwc"))
        if kernel in owners or node is None or not kernel.endswith("_nchwc"):
            continue
        ahead: list[ir.Node] = [node]
        seen: set[str | None] = set()
        while ahead:  # a fused kernel is named after the last of its operators
            node = ahead.pop(0)
            if _is_layer(node):
                if name_of(node) not in taken:
                    taken.add(name_of(node))
                    owners[kernel] = named[name_of(node)]
                    break
                continue
            if node.name not in seen and len(seen) < 6:
                seen.add(node.name)
                ahead += makers(node)
    return owners


def _is_layer(node: ir.Node) -> bool:
    return node.op_type in LAYER_OPERATORS and not LAYER_OPERATORS[node.op_type].lookup and bool(node.name)


# The cache


class Seconds(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    float32: float = Field(ge=0)
    int8: float = Field(ge=0)


class FlowRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    layer: str | None
    inputs: list[int]
    outputs: list[int]
    numbers: int = Field(ge=0)


class LatencyFile(BaseModel):
    """A stored table. Strict: a wrong type, a missing or an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)
    version: Literal[2]
    of: str
    layers: dict[str, Seconds]
    rest: Seconds
    boundary: float = Field(ge=0)
    steps: list[FlowRecord]
    fixed: list[str]
    products: list[str]
    about: dict[str, Any]
    digest: str


def _table_file(network: ObservedNetwork, threads: int) -> Path | None:
    """Return the table's file for a network of this shape, on this machine and runtime; None if the user has no home."""
    import onnxruntime

    operations = [[op.name, op.kind, list(op.shape[1:])] for op in network.wiring.operations]
    weights = [[name, size.rows, size.columns] for name, size in network.costs.layers.items()]
    floats = [name for name, options in _on_integers(network).items() if not options]
    description = json.dumps([3, operations, weights, floats, processor(), asks_for_exact_sums(), onnxruntime.__version__, threads])
    home = own_folder("XDG_CACHE_HOME", ".cache")
    return home and home / "latency" / f"{hashlib.sha256(description.encode()).hexdigest()[:32]}.json"


def save_table(network: ObservedNetwork, table: LatencyTable, provenance: Mapping[str, Any], threads: int = 1) -> None:
    """Write the table to the file that `load_table` reads."""
    place = _table_file(network, threads)
    if place is None:
        warnings.warn("The table is not stored: you have no home folder, and XDG_CACHE_HOME is not set.", stacklevel=2)
        return
    with whole_file(place, "Make room, or set XDG_CACHE_HOME to another folder.") as draft:
        write_json(draft, sealed({"version": 2, "of": place.stem, **asdict(table), "about": dict(provenance)}))


def load_table(network: ObservedNetwork, threads: int = 1) -> tuple[LatencyTable, dict[str, Any]] | None:
    """Load (the table, its provenance) that `save_table` wrote for the same network, machine and runtime; None if there is none."""
    place = _table_file(network, threads)
    if place is None or not place.is_file():
        return None
    try:
        record = validated(LatencyFile, read_sealed(place, 2, ""), str(place))
        if record.of != place.stem or not set(record.layers) == set(network.names):
            raise InvalidFile(f"{place} is of another network, machine or runtime.")
    except InvalidFile as error:
        raise InvalidFile(f"{error} Measure again: `anybit profile --overwrite`.") from error
    layers = {name: row.model_dump() for name, row in record.layers.items()}
    steps = [OperationFlow(step.layer, tuple(step.inputs), tuple(step.outputs), step.numbers) for step in record.steps]
    return LatencyTable(layers, record.rest.model_dump(), record.boundary, steps, record.fixed, record.products), record.about
