"""Plan which tensors of the float graph become which integers: the canonical model's quantizers and rounded edges, mapped to the graph.

    a rounded edge             chosen by `networks.integers`; its value in the graph is identified by its numbers
    an integer layer's input   its own quantizer if it is not an edge
    moving numbers             (reshape, transpose, maximum pool, slice) keeps the codes of the input
    a clamp                    (ReLU, ReLU6) bounds the codes of its output
    a function of one tensor   (SiLU, GELU, hard-swish, x + 1) is computed in float between quantizers, or is a table from codes to codes,
                               which is exact and slower

Nothing else is rounded, so that the file computes what the simulation does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx_ir as ir
from torch import nn

from anybit.networks.edges import edge_grid
from anybit.networks.integers import computes_on_integers
from anybit.networks.layers import quantized_layers, scheme_of
from anybit.networks.rounding import edge_grids
from anybit.numerics.quantizers import frozen
from anybit.onnx.floats import BIAS, LAYER
from anybit.onnx.operators import layer_operator
from anybit.onnx.values import constant, name_of, numbers, operand

MOVES = {
    "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "MaxPool", "Identity", "Slice", "Pad", "Split", "Gather", "Expand",
    "DepthToSpace", "SpaceToDepth",
}  # fmt: skip
CLAMPS = {"Relu", "Clip"}
JOINT = {"Add", "Mul", "Concat", "GlobalAveragePool", "AveragePool"}
"""Operators besides layers with integer kernels in runtimes (`on_integers` selects among them)."""
ELEMENTWISE = {
    "Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Exp", "Log", "Abs", "Neg", "Min", "Max", "Reciprocal", "Floor", "Ceil", "Round", "Erf",
    "Sigmoid", "Tanh", "Gelu", "HardSwish", "HardSigmoid", "LeakyRelu", "Elu", "Selu", "Celu", "Mish", "Softplus", "Softsign",
    "Relu", "Clip",
}  # fmt: skip


@dataclass(frozen=True)
class Affine:
    """codes = clamp(round(x / scale) + zero_point, 0, highest), held in uint8."""

    scale: float
    zero_point: int
    highest: int = 255

    @classmethod
    def of_range(cls, low: float, high: float) -> "Affine":
        """Return the 8-bit quantizer for an edge's range."""
        return cls(*edge_grid(low, high))

    def code(self, value: float) -> int:
        """Return the code of one number."""
        return int(np.clip(np.rint(np.float32(value) / np.float32(self.scale)) + self.zero_point, 0, self.highest))


@dataclass
class Plan:
    """The writer's plan for each value and node, by name.

    integer    layers that compute on integers
    inputs     layer -> the quantizer of its input, or of both operands of a matmul (for all layers that have one, integer or not)
    edges      value -> its quantizer; values that share codes share it
    clamped    value -> (producer's value, lowest, highest) of a clamp that its quantizer absorbs
    tables     value -> the value of which it is a function
    names      value -> the rounded edge that it represents
    """

    integer: set[str] = field(default_factory=set)
    inputs: dict[str, tuple[Affine, ...]] = field(default_factory=dict)
    edges: dict[str, Affine] = field(default_factory=dict)
    clamped: dict[str, tuple[str, float, float]] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


def make_plan(
    model: nn.Module,
    graph: ir.Model,
    names: Mapping[str, str],
    tables: bool = False,
) -> Plan:
    """Plan `graph`, the float graph of canonical `model`.

    names    value -> the edge that it represents, among those that the model rounds
    tables   whether functions of one value become tables
    """
    return _Planner(model, graph, names, tables).plan


class _Planner:
    """The steps of `make_plan`, which share the graph."""

    def __init__(
        self,
        model: nn.Module,
        graph: ir.Model,
        names: Mapping[str, str],
        tables: bool,
    ):
        self.graph, self.grids = graph.graph, {name: Affine(*grid) for name, grid in edge_grids(model).items()}
        self.plan = Plan(names=dict(names))
        self.outputs = {name_of(value) for value in self.graph.outputs}
        self.root: dict[str, str] = {}  # value -> the value that it shares codes with
        self._layers(model)
        self._clamps_and_moves()
        if tables:
            self._tables()
        self._edges()

    def _layers(self, model: nn.Module) -> None:
        modules, scheme = quantized_layers(model), scheme_of(model)
        for node in self.graph:
            layer = node.metadata_props.get(LAYER)
            if layer is None:
                continue
            slot = modules[layer].input_quantizer
            if slot is not None:
                quantizer = frozen(slot)
                grids = zip(quantizer.scale.reshape(-1).tolist(), quantizer.zero_point.reshape(-1).tolist(), strict=True)
                self.plan.inputs[layer] = tuple(Affine(scale, int(zero_point), quantizer.limits[1]) for scale, zero_point in grids)
            if computes_on_integers(modules[layer], scheme[layer]) and layer_operator(node.op_type).integer:
                self.plan.integer.add(layer)

    def readers(self, value: ir.Value) -> list[ir.Node]:
        return [use.node for use in value.uses()]

    def _clamps_and_moves(self) -> None:
        for node in self.graph:
            if not node.inputs or node.inputs[0] is None:
                continue
            source = name_of(node.inputs[0])
            for output in map(name_of, node.outputs) if _moves(node) else ():
                edge = self.plan.names.get(output)
                if edge is None or edge == self.plan.names.get(self.root.get(source, source)):
                    self.root[output] = self.root.get(source, source)
            if node.op_type in CLAMPS and (bounds := _bounds(node)) is not None:
                self.plan.clamped[name_of(node.outputs[0])] = (source, *bounds)

    def _tables(self) -> None:
        """Find the values that are elementwise functions of one value, other than a clamp, and are read as codes."""
        base: dict[str, str] = {}
        for node in self.graph:
            inputs = [value for value in node.inputs if value is not None]
            dynamic = [value for value in inputs if constant(value) is None]
            if node.op_type not in ELEMENTWISE or node.metadata_props.get(LAYER) or not dynamic:
                continue
            output, bases = node.outputs[0], {base.get(name_of(value), name_of(value)) for value in dynamic}
            of_a_function = any(name_of(value) in base for value in dynamic)
            scalars = all(array.size == 1 for array in map(constant, inputs) if array is not None)
            if len(bases) == 1 and scalars and (of_a_function or name_of(output) not in self.plan.clamped):
                base[name_of(output)] = bases.pop()
                self.plan.clamped.pop(name_of(output), None)
        self.plan.tables = {
            name: source for name, source in base.items()
            if name in self.outputs or any(name_of(reader.outputs[0]) not in base for reader in self.readers(self.values[name]))
        }  # fmt: skip

    @cached_property
    def values(self) -> dict[str, ir.Value]:
        """Return all inputs and results of the graph's nodes."""
        return {name_of(value): value for node in self.graph for value in node.outputs} | {
            name_of(value): value for value in self.graph.inputs
        }

    def _edges(self) -> None:
        """Give every group of values with shared codes the quantizer of its edge, or else that of the only layer that reads it."""
        groups: dict[str, list[str]] = {}
        for value in self.values.values():
            if value.dtype == ir.DataType.FLOAT:
                groups.setdefault(self.root.get(name_of(value), name_of(value)), []).append(name_of(value))
        for root, members in groups.items():
            if self._only_clamped(root, members) or self._lacks_bias(root):
                continue
            grid = self.grids.get(self.plan.names.get(root, "")) or self._own(members)
            if grid is not None:
                self.plan.edges |= dict.fromkeys(members, grid)
        self.plan.tables = {
            name: base for name, base in self.plan.tables.items() if name in self.plan.edges and base in self.plan.edges
        }  # fmt: skip

    def _own(self, members: list[str]) -> Affine | None:
        """Return the quantizer of the only layer that reads these values, or None."""
        readers = [node for name in members for node in self.readers(self.values[name]) if name_of(node.outputs[0]) not in members]
        if self.outputs & set(members) or not all(self._is_layer(node) for node in readers if node.op_type != "Shape"):
            return None
        own = [
            affine
            for node in readers
            if self._is_layer(node)
            for value, affine in zip(node.inputs, self.plan.inputs[node.metadata_props[LAYER]], strict=False)
            if name_of(value) in members
        ]
        return own[0] if len(set(own)) == 1 else None

    def _is_layer(self, node: ir.Node) -> bool:
        """Return whether the node is an integer layer, not the sum that adds its bias."""
        return node.metadata_props.get(LAYER) in self.plan.integer and BIAS not in node.metadata_props

    def _lacks_bias(self, root: str) -> bool:
        """Return whether a later node adds the layer's bias."""
        readers = self.readers(self.values[root])
        return len(readers) == 1 and BIAS in readers[0].metadata_props

    def _only_clamped(self, root: str, members: list[str]) -> bool:
        """Return whether a clamp is the only reader of an operator's result: the clamp's output is then the quantized value."""
        readers = self.readers(self.values[root])
        alone = len(members) == 1 and len(readers) == 1 and root not in self.outputs and self.values[root].producer() is not None
        return alone and name_of(readers[0].outputs[0]) in self.plan.clamped


def on_integers(node: ir.Node) -> bool:
    """Return whether runtimes compute the operator, which is not a layer, on integers, and correctly.

    For an average pool with `ceil_mode` that counts padding, they divide windows beyond the end by the whole kernel.
    """
    counts_beyond = all(key in node.attributes and node.attributes[key].as_int() for key in ("ceil_mode", "count_include_pad"))
    return node.op_type in JOINT and not counts_beyond


def _moves(node: ir.Node) -> bool:
    """Return whether the node's output contains only numbers of its first input (and zero, which every quantizer represents)."""
    filled = constant(node.inputs[2]) if node.op_type == "Pad" and len(node.inputs) > 2 else None
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
    zeros = node.op_type != "Pad" or mode != "constant" or filled is None or not filled.any()
    return node.op_type in MOVES and zeros and operand(node, 0).dtype == ir.DataType.FLOAT and constant(node.inputs[0]) is None


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    """Return the bounds (lowest, highest) of a clamp; None if they are computed."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    ends = []
    for index, default in ((1, -np.inf), (2, np.inf)):
        value = node.inputs[index] if len(node.inputs) > index else None
        if value is not None and constant(value) is None:
            return None
        ends.append(default if value is None else float(numbers(value).reshape(())))
    return ends[0], ends[1]
