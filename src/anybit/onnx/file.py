"""The exported file: created from a canonical model, written atomically, read strictly, and loaded by the runtime."""

import copy
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor, nn

from anybit.data.batches import Batch, in_evaluation_mode
from anybit.errors import InvalidFile, InvalidInput, InvalidSetting, UnsupportedModel
from anybit.files.cache import Cache
from anybit.files.strict import in_words, json_text, parse_json, validated
from anybit.files.whole import whole_file
from anybit.networks.canonical import Canonical
from anybit.networks.edges import observe_edge_ranges, with_edges
from anybit.networks.integers import rounded_edges
from anybit.networks.layers import Pruned, emptied, float_weight, quantized_layers
from anybit.networks.rounding import edge_grids
from anybit.networks.wiring import observe
from anybit.numerics.quantizers import frozen
from anybit.onnx.floats import OPSET, edge_names, float_graph, input_tensors, probe_of
from anybit.onnx.plan import Plan, make_plan
from anybit.onnx.storage import stored_bytes
from anybit.onnx.values import name_of
from anybit.onnx.writer import TWO_BIT_VERSIONS, write_graph

EXACT_SUMS = ("session.x64quantprecision", "1")
"""Session setting with which x86 processors without VNNI sum 8-bit products exactly.

Without it they add two products in 16 bits, which saturates if both weights and inputs have 8 bits. With VNNI sums are exact, and the
setting is left out, because it may disable a runtime's fastest kernels."""


def x86_flags() -> str | None:
    """Return the features of an x86 processor as Linux lists them; None on others."""
    try:
        return Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0]
    except (OSError, IndexError):
        return None


def asks_for_exact_sums() -> bool:
    """Return whether sessions here use the setting: on every processor that is not known to have VNNI."""
    return "vnni" not in (x86_flags() or "")


FUNCTIONS = "anybit.functions"
"""Key of the file's metadata: how functions of one tensor are computed, "float" or "tables"."""

LINEARS = "anybit.linears"
"""Whether linears with float inputs run on "packed" or "unpacked" weights."""

MEASURED = "anybit.measured"
"""Ranges of rounded edges that the run lacks, measured on the export's inputs: name -> [low, high], as JSON."""

PROBE = 4
"""Number of inputs on which tensors of the graph are identified."""


@dataclass(frozen=True)
class Exported:
    """integer   the graph that is written;   floating  the same network in float32;   plan  the writer's plan
    model     the canonical model with the edges rounded that the file rounds, its simulation
    edges     rounded edge -> value of the integer graph with its codes;   inputs  layer -> values with its operands' codes
    length    the only length of texts that the graphs take, to which the network's forward fixes them; None: any
    """

    integer: ir.Model
    floating: ir.Model
    plan: Plan
    model: nn.Module
    edges: Mapping[str, str]
    inputs: Mapping[str, Sequence[str]]
    length: int | None = None


def exported(
    canonical: Canonical,
    example: Batch,
    metadata: Mapping[str, str] | None = None,
    tables: bool = False,
    weight_only: bool = False,
    measured: Mapping[str, tuple[float, float]] | None = None,
    cache: Cache = Cache(),
) -> Exported:
    """Export the canonical model as graphs; `example` is a batch of real inputs, of which a few are run.

    tables  write SiLU, GELU and other functions of one tensor as tables of 256 codes: exact, and slower than computing them in float
    weight_only  keep the weights of linears with float inputs packed at run time
    measured     ranges of rounded edges that the run lacks, as an earlier export measured them
    cache        stores PyTorch's exported graph for this network, whatever its weights
    """
    model = in_evaluation_mode(canonical.model.cpu())
    plain, layers = in_evaluation_mode(emptied(model)), quantized_layers(model)
    probe = probe_of(example, PROBE)
    rounded = [name for name, layer in layers.items() if layer.weight_quantizer is not None or layer.input_quantizer is not None]
    floating, values = float_graph(plain, example, probe, layers, rounded, cache)
    shown: list[tuple[str, np.ndarray]] = []

    def show(name: str, tensor: Tensor) -> None:
        if tensor.is_floating_point():
            shown.append((name, tensor.detach().float().numpy().copy()))

    wiring = observe(plain, probe, show)
    ranges = {**(measured or {}), **canonical.edges}
    if tables or not edge_grids(model):  # also for a run that rounded none
        edges = rounded_edges(wiring, layers, canonical.scheme, tables)
        if missing := set(edges.names) - set(ranges):
            measured = {name: ends for name, ends in observe_edge_ranges(plain, wiring, [example], PROBE).items() if name in missing}
            ranges |= measured
        model = with_edges(copy.deepcopy(model), wiring, ranges, tables)
    order = [*floating.graph.inputs, *(value for node in floating.graph for value in node.outputs)]
    names = edge_names({name_of(value): values[name_of(value)] for value in order if name_of(value) in values}, shown, edge_grids(model))
    plan = make_plan(model, floating, names, tables)
    metadata = {**(metadata or {}), FUNCTIONS: "tables" if tables else "float", LINEARS: "packed" if weight_only else "unpacked"}
    metadata[MEASURED] = json_text(dict(measured or {}))
    written = write_graph(model, floating, plan, metadata, weight_only)
    return Exported(written.graph, floating, plan, model, written.edges, written.inputs, text_length(floating, example))


def text_length(graph: ir.Model, example: Batch) -> int | None:
    """Return the length of padded texts if the graph takes no other; None if it takes any, or no texts."""
    length = None if example.mask is None else example.mask.shape[1]
    pairs = zip(graph.graph.inputs, input_tensors(example), strict=True)
    sizes = [value.shape[1] for value, tensor in pairs if value.shape is not None and tensor.dim() > 1 and tensor.shape[1] == length]
    return length if any(isinstance(size, int) for size in sizes) else None


def ideal_bytes(canonical: Canonical) -> int:
    """Return the bytes of the weights' bits alone: packed codes of quantized layers, 32 bits of float ones."""
    counts = []
    for layer in quantized_layers(canonical.model).values():
        quantizer = layer.weight_quantizer
        bits = 32 if quantizer is None else 0 if isinstance(quantizer, Pruned) else frozen(quantizer).bits
        counts.append((float_weight(layer).numel(), bits))
    return stored_bytes(counts)


def save(model: ir.Model, path: Path) -> None:
    """Write the graph atomically, after the runtime has loaded it."""
    if path.is_dir():
        raise InvalidSetting(f"{path} is a folder. Name a file with --onnx.")
    with whole_file(path, "Make room, or choose another --onnx.") as draft:
        draft.write_bytes(ir.to_proto(model).SerializeToString())
        session(draft)


def load(path: Path) -> ir.Model:
    """Load the graph in `path` and check that anybit wrote it; nothing in it is run."""
    import onnx

    if not path.is_file():
        raise InvalidFile(f"{path} is not there. Write it with `anybit export`.")
    try:
        proto = onnx.load(path, load_external_data=False)
        if any(tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _tensors(proto)):
            raise ValueError("it refers to data in other files, which are not read")
        onnx.checker.check_model(proto)
        model = ir.from_proto(proto)
    except Exception as error:  # protobuf, the checker and the converter raise errors of several kinds
        raise InvalidFile(f"{path} is not a valid ONNX file: {in_words(error)}. Export the run again.") from error
    if model.producer_name != "anybit" or model.graph.opset_imports.get("") not in (OPSET, TWO_BIT_VERSIONS[0]):
        raise InvalidFile(f"{path} was not written by `anybit export`. Export the run again.")
    return model


def _tensors(message: Any) -> Iterator[Any]:
    """Yield every tensor in a protobuf message, at any depth."""
    import onnx
    from google.protobuf.message import Message

    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if isinstance(value, Message) else value:
                yield from _tensors(inner)


def session(
    source: Path | ir.Model, threads: int = 1, optimized: Path | None = None, profile: Path | None = None, exact: bool = True
) -> Any:
    """Open a session of the runtime for a file or a graph.

    exact      with exact sums on every processor
    optimized  file for the graph that the runtime optimized;   profile  prefix of the name of its profile
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if exact and asks_for_exact_sums():
        options.add_session_config_entry(*EXACT_SUMS)
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    content = str(source) if isinstance(source, Path) else ir.to_proto(source).SerializeToString()
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors derive from Exception alone
        first = str(error).splitlines()[0]
        raise UnsupportedModel(
            f"ONNX Runtime {onnxruntime.__version__} does not load the file: {first}. It is written in operator set {OPSET} "
            f"({TWO_BIT_VERSIONS[0]} with packed two-bit linears); a newer runtime may support it."
        ) from error


def measured_in(model: ir.Model) -> dict[str, tuple[float, float]]:
    """Return the ranges that the file's export measured on its inputs. Raises InvalidFile if they are not ranges."""
    where = "The ONNX file's measured ranges"
    ranges = validated(dict[str, list[float]], parse_json(model.metadata_props.get(MEASURED, "{}"), where), where)
    for name, ends in ranges.items():
        if len(ends) != 2 or not ends[0] <= ends[1]:
            raise InvalidFile(f"{where}: {name} has {reprlib.repr(ends)}, not a low and a high end. Export the run again.")
    return {name: (float(low), float(high)) for name, (low, high) in ranges.items()}


def outputs(running: Any, batches: Iterable[Batch], names: Sequence[str] | None = None) -> list[np.ndarray]:
    """Run the session on batches and join its outputs; of one batch they may have any shape. Raises InvalidInput if it rejects one."""
    parts = []
    for batch in batches:
        feeds = _feeds([value.name for value in running.get_inputs()], batch)
        try:
            parts.append(running.run(names, feeds))
        except Exception as error:  # as above
            raise InvalidInput(f"ONNX Runtime rejects the inputs: {' '.join(str(error).split())}") from error
    return [part[0] if len(part) == 1 else np.concatenate(part) for part in zip(*parts, strict=True)]


def check_shapes(model: ir.Model, batches: Iterable[Batch]) -> None:
    """Raise InvalidInput if the file does not take tensors of these sizes."""
    for batch in batches:
        for value, array in zip(model.graph.inputs, _feeds([name_of(value) for value in model.graph.inputs], batch).values(), strict=True):
            sizes = list(value.shape or array.shape)
            if len(sizes) != array.ndim or any(isinstance(size, int) and size != own for size, own in zip(sizes, array.shape, strict=True)):
                raise InvalidInput(
                    f"The file takes {name_of(value)} of the shape [{', '.join(map(str, sizes))}], and a batch of the data has "
                    f"{list(array.shape)}. Give data of the sizes of the export, with every text padded to that length."
                )


def _feeds(names: Sequence[str], batch: Batch) -> dict[str, np.ndarray]:
    """Return the batch's inputs under the file's input names: by name if they have names, else in order."""
    if isinstance(batch.inputs, dict):
        lacking = [name for name in names if name not in batch.inputs]
        if lacking:
            raise InvalidInput(
                f"The file takes an input {lacking[0]!r}; the data has {', '.join(batch.inputs)}. Give data as at the export."
            )
        return {name: batch.inputs[name].numpy() for name in names}
    return {name: tensor.numpy() for name, tensor in zip(names, input_tensors(batch), strict=True)}
