"""Which tensor of the float graph becomes which integers: the canonical model's quantizers and edge ranges laid onto the graph.

    an integer layer's input   its own quantizer
    a tensor that others read  one edge of 8 bits, where anything but one layer's quantizer reads it; a layer of fewer bits requantizes
                               after it, one of 8 bits reads the edge itself
    what only moves numbers    (reshape, transpose, maximum pool, slice) shares the codes of what it reads
    what only clamps           (ReLU, ReLU6) is a bound on the codes: rounding is monotonic, so clamping before or after it is the same
    a function of one tensor   (SiLU, GELU, hard-swish, x + 1) is computed in float between quantizers, or is a table from codes to codes,
                               which is exact and slower

The model's outputs stay float where the layer before them gives floats without being slower (a linear), and a quantizer never stands
between two operators that both compute in float.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx_ir as ir
from torch import nn

from anybit.networks.layer_types import type_of
from anybit.networks.layers import quantized_layers, scheme_of
from anybit.numerics.quantizers import frozen
from anybit.onnx.floats import BIAS, LAYER
from anybit.onnx.operators import layer_operator
from anybit.onnx.values import constant, maker, makers, name_of, numbers, operand

MOVES = {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "MaxPool", "Identity", "Slice", "Pad"}
CLAMPS = {"Relu", "Clip"}
JOINT = {"Add", "Mul", "Concat", "GlobalAveragePool", "AveragePool"}
"""Operators besides layers that runtimes compute on integers (`on_integers` says which of them)."""
ELEMENTWISE = {
    "Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Exp", "Log", "Abs", "Neg", "Min", "Max", "Reciprocal", "Floor", "Ceil", "Round", "Erf",
    "Sigmoid", "Tanh", "Gelu", "HardSwish", "HardSigmoid", "LeakyRelu", "Elu", "Selu", "Celu", "Mish", "Softplus", "Softsign",
    "Relu", "Clip",
}  # fmt: skip
SMALLEST_SCALE = 1e-30
"""Below it a range is as good as empty, and its quotients leave float32."""


@dataclass(frozen=True)
class Affine:
    """codes = clamp(round(x / scale) + zero_point, 0, highest), held in uint8."""

    scale: float
    zero_point: int
    highest: int = 255

    @classmethod
    def of_range(cls, low: float, high: float) -> "Affine":
        """Return the 8-bit quantizer of a range, 0 included; the scale is a float32."""
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        scale = float(np.float32((high - low) / 255))
        scale = scale if scale > SMALLEST_SCALE else 1.0
        return cls(scale, int(np.clip(np.rint(-low / scale), 0, 255)))

    def code(self, value: float) -> int:
        """Return the code of one number."""
        return int(np.clip(np.rint(np.float32(value) / np.float32(self.scale)) + self.zero_point, 0, self.highest))


@dataclass
class Plan:
    """The writer's plan for each value and node, by name.

    integer    layers that compute on integers
    inputs     layer -> the quantizer of its input, or of both operands of a matmul (all layers that have one, integer or not)
    edges      value -> its quantizer; values that share codes share it
    clamped    value -> (producer's value, lowest, highest) of a clamp that its quantizer absorbs
    tables     value -> the value that it is a function of
    measured   range of every value that no edge of the run is
    """

    integer: set[str] = field(default_factory=set)
    inputs: dict[str, tuple[Affine, ...]] = field(default_factory=dict)
    edges: dict[str, Affine] = field(default_factory=dict)
    clamped: dict[str, tuple[str, float, float]] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    measured: dict[str, tuple[float, float]] = field(default_factory=dict)


def make_plan(
    model: nn.Module,
    graph: ir.Model,
    edges: Mapping[str, tuple[float, float]],
    names: Mapping[str, str],
    measure: Callable[[str], tuple[float, float]],
    tables: bool = False,
) -> Plan:
    """Plan `graph`, the float graph of canonical `model`.

    edges    edge -> its range, of the run;   names  value -> edge
    measure  the range of a value that no edge is
    tables   whether functions of one value become tables
    """
    return _Planner(model, graph, edges, names, measure, tables).plan


class _Planner:
    """The steps of `make_plan`, which share the graph."""

    def __init__(
        self,
        model: nn.Module,
        graph: ir.Model,
        edges: Mapping[str, tuple[float, float]],
        names: Mapping[str, str],
        measure: Callable[[str], tuple[float, float]],
        tables: bool,
    ):
        self.graph, self.ranges, self.names, self.measure = graph.graph, edges, names, measure
        self.plan = Plan()
        self.outputs = {name_of(value) for value in self.graph.outputs}
        self.functions: set[str] = set()  # values that are elementwise functions of one other, clamps alone aside
        self.root: dict[str, str] = {}  # value -> the value that it shares codes with
        self._layers(model)
        self._clamps_and_moves()
        touching = self._touching()
        self._functions(touching, tables)
        self.reaching, self.convolved = self._reaching(), self._convolved()
        self._edges(touching)

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
            has_kernel = layer_operator(node.op_type).integer and modules[layer].weight_group is None
            if slot is not None and has_kernel and (scheme[layer].weight_bits is not None or not type_of(modules[layer]).has_weights):
                self.plan.integer.add(layer)

    def readers(self, value: ir.Value) -> list[ir.Node]:
        return [use.node for use in value.uses()]

    def _clamps_and_moves(self) -> None:
        for node in self.graph:
            if not node.inputs or node.inputs[0] is None:
                continue
            source, output = node.inputs[0], node.outputs[0]
            if _moves(node):
                self.root[name_of(output)] = self.root.get(name_of(source), name_of(source))
            if node.op_type in CLAMPS and (bounds := _bounds(node)) is not None:
                self.plan.clamped[name_of(output)] = (name_of(source), *bounds)

    def _touching(self) -> set[str]:
        """Find the nodes that are connected to an integer layer through others that runtimes compute on integers."""
        reached: set[str] = set()
        ahead = [node for node in self.graph if node.metadata_props.get(LAYER) in self.plan.integer]
        while ahead:
            node = ahead.pop()
            for other in [*makers(node), *(reader for value in node.outputs for reader in self.readers(value))]:
                kind = other.op_type
                passes = kind in MOVES | CLAMPS | ELEMENTWISE or on_integers(other)
                if name_of(other) not in reached and passes and other.metadata_props.get(LAYER) is None:
                    reached.add(name_of(other))
                    ahead.append(other)
        return reached

    def _functions(self, touching: set[str], tables: bool) -> None:
        """Find the values that are elementwise functions of one value, and not clamps of it alone."""
        base: dict[str, str] = {}
        for node in self.graph:
            inputs = [value for value in node.inputs if value is not None]
            dynamic = [value for value in inputs if constant(value) is None]
            if node.op_type not in ELEMENTWISE or name_of(node) not in touching or node.metadata_props.get(LAYER) or not dynamic:
                continue
            output, bases = node.outputs[0], {base.get(name_of(value), name_of(value)) for value in dynamic}
            of_a_function = any(name_of(value) in base for value in dynamic)
            scalars = all(array.size == 1 for array in map(constant, inputs) if array is not None)
            if len(bases) == 1 and scalars and (of_a_function or name_of(output) not in self.plan.clamped):
                base[name_of(output)] = bases.pop()
                self.plan.clamped.pop(name_of(output), None)
        self.functions = set(base)
        self.plan.tables = {} if not tables else {
            name: source for name, source in base.items()
            if name in self.outputs or any(name_of(reader.outputs[0]) not in base for reader in self.readers(self._value(name)))
        }  # fmt: skip

    def _reaching(self) -> set[str]:
        """Find the nodes whose numbers reach an integer layer, a pool or the outputs, through nothing but what runtimes compute on
        integers.

        A sum that only a norm reads is none: on integers it would be rounded for nothing.
        """
        reaching: set[str] = set()
        for node in reversed(list(self.graph)):
            is_output = any(name_of(value) in self.outputs for value in node.outputs)
            if is_output or any(self._takes_codes(reader, reaching) for value in node.outputs for reader in self.readers(value)):
                reaching.add(name_of(node))
        return reaching

    def _convolved(self) -> set[str]:
        """Find the nodes that compute on integers what convolutions made: a linear gives floats without being slower, a convolution does
        not."""
        convolved: set[str] = set()
        for node in self.graph:
            passes = node.op_type in MOVES | CLAMPS or on_integers(node) or name_of(node.outputs[0]) in self.functions
            if (self._is_layer(node) and node.op_type == "Conv") or (
                passes and any(name_of(before) in convolved for before in makers(node))
            ):
                convolved.add(name_of(node))
        return convolved

    def _takes_codes(self, reader: ir.Node, reaching: Collection[str]) -> bool:
        if self._is_layer(reader):
            return True
        passes = reader.op_type in MOVES | CLAMPS or name_of(reader.outputs[0]) in self.functions
        return name_of(reader) in reaching and (passes or (on_integers(reader) and _on_codes(reader)))

    def _value(self, name: str) -> ir.Value:
        return self.values[name]

    @cached_property
    def values(self) -> dict[str, ir.Value]:
        """All that the graph takes and makes."""
        return {name_of(value): value for node in self.graph for value in node.outputs} | {
            name_of(value): value for value in self.graph.inputs
        }

    def _edges(self, touching: set[str]) -> None:
        """Give every group of values that share codes one quantizer, if an integer operator makes or reads it."""
        groups: dict[str, list[str]] = {}
        for value in self.values.values():
            if value.dtype == ir.DataType.FLOAT:
                groups.setdefault(self.root.get(name_of(value), name_of(value)), []).append(name_of(value))
        bases = set(self.plan.tables.values())
        inner = self._inner_to_tables()
        for root, members in groups.items():
            if root in inner or self._only_clamped(root, members) or self._lacks_bias(root):
                continue
            readers = [node for name in members for node in self.readers(self._value(name)) if name_of(node.outputs[0]) not in members]
            layers = [node for node in readers if self._is_layer(node)]
            others = [node for node in readers if not self._is_layer(node)]
            kind = self._kind(root, touching)
            is_needed = layers or bases & set(members) or kind or any(self._joins(node, touching) for node in others)
            is_output = any(name in self.outputs for name in members)
            joined = any(self._joins(node, touching) for node in others)
            if layers and not kind and not joined and not bases & set(members) and len(self._own(members, layers)) + bool(others) > 1:
                continue  # each layer rounds the floats by itself, as simulated
            if not is_needed or (is_output and not readers and kind != "Conv"):
                continue
            self.plan.edges |= dict.fromkeys(members, self._quantizer(root, members, layers, bool(others) or is_output))
        self.plan.tables = {name: base for name, base in self.plan.tables.items() if name in self.plan.edges}

    def _is_layer(self, node: ir.Node) -> bool:
        """Return whether it is an integer layer, and not the sum that adds its bias."""
        return node.metadata_props.get(LAYER) in self.plan.integer and BIAS not in node.metadata_props

    def _inner_to_tables(self) -> set[str]:
        """Return the values that a table computes through, and nothing else reads."""
        inner: set[str] = set()
        for name, base in self.plan.tables.items():
            ahead = [self._value(name)]
            while ahead:
                source = maker(ahead.pop())
                for value in () if source is None else source.inputs:
                    if value is not None and constant(value) is None and name_of(value) != base and name_of(value) not in self.plan.tables:
                        inner.add(name_of(value))
                        ahead.append(value)
        return inner

    def _lacks_bias(self, root: str) -> bool:
        """Return whether a layer's bias is yet to be added."""
        readers = self.readers(self._value(root))
        return len(readers) == 1 and BIAS in readers[0].metadata_props

    def _only_clamped(self, root: str, members: list[str]) -> bool:
        """Return whether a clamp alone reads an operator's result: the clamp's output is then the quantized value."""
        readers = self.readers(self._value(root))
        alone = len(members) == 1 and len(readers) == 1 and root not in self.outputs and self._value(root).producer() is not None
        return alone and name_of(readers[0].outputs[0]) in self.plan.clamped

    def _kind(self, root: str, touching: set[str]) -> str | None:
        """Return the operator that computes the group, if only a quantizer after it lets it compute on integers (a linear needs none).

        It is seen through the clamps that the quantizer absorbs.
        """
        producer = self._value(root).producer()
        while producer is not None and name_of(producer.outputs[0]) in self.plan.clamped:
            producer = maker(producer.inputs[0])
        if producer is None:
            return None
        convolves = self._is_layer(producer) and producer.op_type == "Conv"
        integer = convolves or self._joins(producer, touching) or name_of(producer.outputs[0]) in self.plan.tables
        return producer.op_type if integer else None

    def _joins(self, node: ir.Node, touching: set[str]) -> bool:
        dynamic = [value for value in node.inputs if value is not None and constant(value) is None]
        if name_of(node.outputs[0]) in self.functions or not _on_codes(node) or name_of(node) not in self.reaching & self.convolved:
            return False
        pooling = node.op_type in ("GlobalAveragePool", "AveragePool")
        return name_of(node) in touching and on_integers(node) and (pooling or len(dynamic) == len(node.inputs))

    def _quantizer(self, root: str, members: Collection[str], layers: Iterable[ir.Node], shared: bool) -> Affine:
        own = self._own(members, layers)
        if len(own) == 1 and not shared:
            return own.pop()
        edge = self.names.get(root)
        if edge is not None and edge in self.ranges:
            return Affine.of_range(*self.ranges[edge])
        self.plan.measured[root] = self.measure(root)
        return Affine.of_range(*self.plan.measured[root])

    def _own(self, members: Collection[str], layers: Iterable[ir.Node]) -> set[Affine]:
        """Return the quantizers of the layers that read any of these values."""
        return {
            affine
            for node in layers
            for value, affine in zip(node.inputs, self.plan.inputs[node.metadata_props[LAYER]], strict=False)
            if name_of(value) in members
        }


def on_integers(node: ir.Node) -> bool:
    """Return whether runtimes compute the operator, which is no layer, on integers, and rightly so.

    Of an average pool with `ceil_mode` that counts padding they divide windows beyond the end by the whole kernel.
    """
    counts_beyond = all(key in node.attributes and node.attributes[key].as_int() for key in ("ceil_mode", "count_include_pad"))
    return node.op_type in JOINT and not counts_beyond


def _on_codes(node: ir.Node) -> bool:
    """Return whether a sum, product or the like is to be computed on integers: not the one that masks a softmax, whose huge numbers leave
    no codes for others, and not that of a norm with its factor for each row."""
    sizes = [value.shape[-1] for value in node.inputs if value is not None and value.shape is not None and len(value.shape) == 3]
    factors = node.op_type == "Mul" and len(set(map(str, sizes))) > 1 and 1 in sizes
    return not factors and all(use.node.op_type != "Softmax" for use in node.outputs[0].uses())


def _moves(node: ir.Node) -> bool:
    """Return whether the node's output holds only numbers of its first input (and zero, which every quantizer has)."""
    filled = constant(node.inputs[2]) if node.op_type == "Pad" and len(node.inputs) > 2 else None
    zeros = node.op_type != "Pad" or (all(a.value == "constant" for a in node.attributes.values()) and (filled is None or not filled.any()))
    return node.op_type in MOVES and zeros and operand(node, 0).dtype == ir.DataType.FLOAT and constant(node.inputs[0]) is None


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    """Return (lowest, highest) value that a clamp lets through; None where they are computed."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    ends = []
    for index, default in ((1, -np.inf), (2, np.inf)):
        value = node.inputs[index] if len(node.inputs) > index else None
        if value is not None and constant(value) is None:
            return None
        ends.append(default if value is None else float(numbers(value).reshape(())))
    return ends[0], ends[1]
