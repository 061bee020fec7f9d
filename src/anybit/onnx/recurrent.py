"""ONNX's recurrent operators, whose weights combine all directions of a layer, with gates in their own order."""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from anybit.onnx.values import constant, name_of

GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
"""Operator -> the gates of a weight in PyTorch's order, as the operator has them."""
WEIGHTS = (1, 2)
"""Indices of the inputs that are weights, [directions, gates x hidden, inputs]."""


def fold_weights(graph: ir.Model, values: Mapping[str, np.ndarray]) -> None:
    """Replace each weight that the exporter's graph computes from constants by its value, taken from a run."""
    for node in graph.graph:
        for index in WEIGHTS if node.op_type in GATES else ():
            value = node.inputs[index]
            if value is not None and constant(value) is None and _is_constant(value):
                array = values[name_of(value)]
                tensor = ir.tensor(array, name=f"{node.name}.{index}")
                folded = ir.Value(name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
                graph.graph.register_initializer(folded)
                node.replace_input_with(index, folded)


def _is_constant(value: ir.Value) -> bool:
    """Return whether a value depends on none of the graph's inputs."""
    ahead, seen = [value], set()
    while ahead:
        value = ahead.pop()
        source = value.producer()
        if source is None and constant(value) is None:
            return False
        seen.add(id(value))
        ahead += [one for one in source.inputs if one is not None and id(one) not in seen] if source is not None else []
    return True


def matrices(graph: ir.Model, weights: Mapping[str, np.ndarray]) -> Iterator[tuple[ir.Node, int, list[str]]]:
    """Yield (node, input, the layers of that input's weights, one per direction) for each input made of `weights`."""
    for node in graph.graph:
        for index in WEIGHTS if node.op_type in GATES else ():
            held = constant(node.inputs[index])
            names = [] if held is None else [_layer_of(direction, node.op_type, weights) for direction in held]
            if names and None not in names:
                yield node, index, [name for name in names if name is not None]


def _layer_of(direction: np.ndarray, kind: str, weights: Mapping[str, np.ndarray]) -> str | None:
    for name, weight in weights.items():
        if weight.shape == direction.shape and np.array_equal(_ordered(weight, kind), direction):
            return name
    return None


def _ordered(weight: np.ndarray, kind: str) -> np.ndarray:
    """Return a PyTorch weight with its gates in the operator's order."""
    gates = GATES[kind]
    return weight.reshape(len(gates), -1, weight.shape[1])[list(gates)].reshape(weight.shape)
