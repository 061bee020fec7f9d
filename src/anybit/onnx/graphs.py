"""The exporter's graphs, stored without weights: one call of torch's exporter for a network and its shapes, whatever its weights and bits.

A graph is stored before it is optimized, since the optimizer's result depends on weights (it folds small ones, drops biases of zeros,
merges equal ones). Weights are inserted by name, and the graph is then optimized as by the exporter itself, which takes hundredths of a
second where an export takes seconds. A stored graph therefore gives the same bytes as a new one.
"""

import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from anybit.errors import InvalidFile
from anybit.files.cache import Cache, Entry
from anybit.onnx.values import name_of, operand

NAME = "exported graph"
RECENT, LARGEST = 32, 10 * 10**6
"""Most graphs held in memory, the least recently used dropped first, and the largest size of one in bytes."""

_recent: OrderedDict[str, Entry] = OrderedDict()


def cached_graph(key: str | None, export: Callable[[], ir.Model], state: Mapping[str, Tensor], cache: Cache) -> ir.Model:
    """Return the optimized graph with the weights of `state`.

    key      digest of all that the graph depends on; None stores nothing
    export   returns the graph before it is optimized
    """

    def make() -> Entry:
        return _recent[key] if key is not None and key in _recent else _without_weights(export(), state)

    def read(entry: Entry) -> ir.Model:
        model = _with_weights(entry, state)
        if key is not None:
            _remember(key, entry)
        return model

    model = (Cache() if key is None else cache.keyed(key))(NAME, make, read)
    _write_out_norms(model.graph)
    program = torch.onnx.ONNXProgram(model, None)
    with quiet():
        program.optimize()
    return program.model


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's and its optimizer's warnings, which are about themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _write_out_norms(graph: ir.Graph) -> None:
    """Replace each batch norm by a product and a sum: the optimizer would merge it into the layer before it, whose weight has codes."""
    for node in list(graph):
        tensors = [value.const_value for value in node.inputs[1:] if value is not None and value.const_value is not None]
        shape = operand(node, 0).shape if node.op_type == "BatchNormalization" else None
        if shape is None or len(tensors) != 4:
            continue
        gamma, beta, mean, variance = (tensor.numpy().astype(np.float64).reshape(-1, *[1] * (len(shape) - 2)) for tensor in tensors)
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        gain = gamma / np.sqrt(variance + epsilon)
        factor, summand = (ir.node("Constant", [], {"value": ir.tensor(array.astype(np.float32))}) for array in (gain, beta - mean * gain))
        product = ir.node("Mul", [node.inputs[0], factor.outputs[0]])
        total = ir.node("Add", [product.outputs[0], summand.outputs[0]])
        for added, of in ((product, operand(node, 0)), (total, node.outputs[0])):
            added.metadata_props.update(node.metadata_props)
            added.outputs[0].shape, added.outputs[0].type = of.shape, of.type
        total.outputs[0].name = name_of(node.outputs[0])
        ir.convenience.replace_nodes_and_values(graph, node, [node], [factor, summand, product, total], node.outputs[:1], total.outputs)


def forget_graph(key: str | None, cache: Cache) -> None:
    """Remove the graph stored under `key`."""
    if key is not None:
        _recent.pop(key, None)
        cache.keyed(key).forget(NAME)


def _remember(key: str, entry: Entry) -> None:
    if entry.tensors["graph"].numel() <= LARGEST:
        _recent[key] = entry
        _recent.move_to_end(key)
    while len(_recent) > RECENT:
        _recent.popitem(last=False)


def _without_weights(model: ir.Model, state: Mapping[str, Tensor]) -> Entry:
    """Serialize the graph with weights as inputs after the network's own; other initializers stay as they are."""
    graph = model.graph
    record = {"inputs": len(graph.inputs), "initializers": list(graph.initializers), "names": _next_name(graph)}
    for name in [name for name in graph.initializers if name in state]:
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
    content = np.frombuffer(ir.to_proto(model).SerializeToString(), np.uint8)
    return Entry(record, {"graph": torch.from_numpy(content.copy())})


def _with_weights(entry: Entry, state: Mapping[str, Tensor]) -> ir.Model:
    """Insert the weights of `state` into the graph. Raises InvalidFile, KeyError or TypeError if they do not fit."""
    try:
        model = ir.from_proto(onnx.ModelProto.FromString(entry.tensors["graph"].numpy().tobytes()))
    except DecodeError as error:
        raise InvalidFile(f"no graph: {error}") from error
    graph, count = model.graph, entry.record["inputs"]
    weights = {value.name: value for value in graph.inputs[count:]}
    for name, value in weights.items():
        tensor = torch.view_as_real(state[name]) if state[name].is_complex() else state[name]
        if list(value.shape) != list(tensor.shape):
            raise InvalidFile(f"{name} has the shape {list(value.shape)} in it, and {list(tensor.shape)} in the network")
        value.const_value = ir.tensor(tensor.detach(), name=name)
    values = {**graph.initializers, **weights}
    inputs = graph.inputs[:count]
    graph.inputs.clear()
    graph.inputs.extend(inputs)
    graph.initializers.clear()
    for name in entry.record["initializers"]:
        graph.initializers[name] = values[name]
    _reserve_names(graph, entry.record["names"])
    return model


def _next_name(graph: ir.Graph) -> int:
    """Return the number in the name of the graph's next value."""
    node = ir.node("Identity", [])
    graph.append(node)
    graph.remove(node)
    return int(name_of(node.outputs[0]).removeprefix("val_"))


def _reserve_names(graph: ir.Graph, count: int) -> None:
    """Let the graph number its next values as the exported one would, which also counts removed values."""
    node = ir.Node("", "Identity", [], num_outputs=count)
    for index, value in enumerate(node.outputs):
        value.name = f"val_{index}"
    graph.append(node)
    graph.remove(node)
