"""Names, constants and producers of a graph's values, which onnx_ir allows to be missing but the exporter's graphs have."""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir


def as_written(name: str, ours: Collection[str]) -> str:
    """Return which of our names a node of the runtime's graph has: the runtime appends "_token_" and a number, which ours may contain,
    too."""
    parts = name.split("_token_")
    cut = ["_token_".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((one for one in cut if one in ours), cut[-1])


def name_of(item: ir.Value | ir.Node | None) -> str:
    """Return the name of a value or node, which every one in a graph has."""
    assert item is not None and item.name is not None, "values and nodes of a graph have names"
    return item.name


def operand(node: ir.Node, index: int) -> ir.Value:
    """Return an input that the node's operator requires."""
    value = node.inputs[index]
    assert value is not None, f"{node.op_type} {node.name} requires input {index}"
    return value


def maker(value: ir.Value | None) -> ir.Node | None:
    """Return the node that computes the value; None for an input, an initializer or an omitted operand."""
    return None if value is None else value.producer()


def makers(node: ir.Node) -> list[ir.Node]:
    """Return the nodes that compute the node's operands."""
    return [source for value in node.inputs if (source := maker(value)) is not None]


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Return an initializer's numbers; None for a value that depends on the input."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def numbers(value: ir.Value | None) -> np.ndarray:
    """Return the numbers of an initializer."""
    array = constant(value)
    assert array is not None, f"{name_of(value)} is an initializer"
    return array
