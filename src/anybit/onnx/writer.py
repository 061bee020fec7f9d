"""The float graph and its plan -> an ONNX graph in which every integer operator lies between quantizers that runtimes fuse with it.

    x --QuantizeLinear--> uint8 [--Clip--> fewer bits, ReLU, ReLU6] --DequantizeLinear--> Conv, Gemm, Add, ... --QuantizeLinear--> ...

Weights are int8 codes, unpacked from `storage`, with a scale for each output channel and explicit zero points. Biases are int32 in units of
input scale times weight scale. Operators that only move numbers work on the codes themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from anybit.networks.edges import LARGEST_BIAS
from anybit.networks.layer_types import type_of
from anybit.networks.layers import Pruned, codes_of, float_weight, from_rows, quantized_layers, weight_rows
from anybit.networks.recurrent import RecurrentWeight
from anybit.networks.wiring import module_of_call
from anybit.numerics.quantizers import frozen
from anybit.onnx.floats import BIAS, IR_VERSION, LAYER, OPSET
from anybit.onnx.operators import layer_operator
from anybit.onnx.plan import CLAMPS, JOINT, MOVES, Affine, Plan, on_integers
from anybit.onnx.recurrent import GATES, matrices
from anybit.onnx.storage import stored
from anybit.onnx.unoptimized import run_unoptimized
from anybit.onnx.values import maker, name_of, numbers, operand

TWO_BIT_VERSIONS = (25, 13)
"""Operator set and file format that support two-bit integers, used only when needed."""


@dataclass(frozen=True)
class Written:
    """The integer graph, and the names of its values that hold the simulation's codes: of each edge, and of each operand of a layer."""

    graph: ir.Model
    edges: Mapping[str, str]
    inputs: Mapping[str, Sequence[str]]


def write_graph(model: nn.Module, graph: ir.Model, plan: Plan, metadata: Mapping[str, str], weight_only: bool = False) -> Written:
    """Write the integer graph of canonical `model`, given its float graph and plan; `metadata` is stored in the file.

    weight_only  keep the weights of linears with float inputs packed at run time: a batch of one is limited by reading them
    """
    writer = _Writer(model, graph, plan, weight_only)
    written = writer.model(metadata)
    edges = {edge: name_of(writer.codes[name]) for name, edge in plan.names.items() if name in writer.codes}
    return Written(written, edges, {layer: [name_of(codes) for codes in read] for layer, read in writer.read.items()})


class _Writer:
    """Goes through the float graph once, in order.

    floats  value of the float graph -> the same numbers in the new graph (rounded if it is quantized)
    codes   value -> its uint8 codes if it is quantized
    """

    def __init__(self, model: nn.Module, graph: ir.Model, plan: Plan, weight_only: bool = False):
        self.weight_only, self.versions = weight_only, (OPSET, IR_VERSION)
        self.layers, self.source, self.plan = quantized_layers(model), graph.graph, plan
        self.nodes: list[ir.Node] = []
        self.taken = {name_of(value) for value in self.source.inputs}  # names of values; those of outputs are freed on demand
        self.constants: dict[str, ir.Value] = {}
        self.floats: dict[str, ir.Value] = {}
        self.codes: dict[str, ir.Value] = {}
        self.requantized: dict[tuple[str, Affine], ir.Value] = {}
        self.rows: dict[str, tuple[ir.Value, ir.Value]] = {}  # name of a linear's result -> (the result as a matrix, its shape)
        self.leads: dict[str, ir.Value] = {}  # name of a value -> all its sizes but the last, if only known at run time
        self.unrounded: dict[str, tuple[ir.Value, float, float]] = {}  # result of a float layer -> (float value, bounds of its clamp)
        self.units: dict[str, Affine] = {}  # layer -> the grid of its input
        self.weights: dict[tuple[str, bool], ir.Value] = {}  # (layer, whether transposed) -> its unpacked codes, for all its calls
        self.read: dict[str, list[ir.Value]] = {}  # call of a layer -> codes of each operand
        recurrent = {name: layer.weight.detach().numpy() for name, layer in self.layers.items() if isinstance(layer, RecurrentWeight)}
        self.matrices = {(name_of(node), index): names for node, index, names in matrices(graph, recurrent)}

    def model(self, metadata: Mapping[str, str]) -> ir.Model:
        inputs = []
        for value in self.source.inputs:
            copy = ir.Value(name=value.name, shape=value.shape, type=value.type)
            inputs.append(copy)
            self.floats[name_of(value)] = copy
            if name_of(value) in self.plan.edges:
                self._quantize(name_of(value), copy, self.plan.edges[name_of(value)])
        inner = self._computed_by_tables()
        for node in self.source:
            if name_of(node.outputs[0]) not in inner:
                self._node(node)
        outputs = [self._output(value) for value in self.source.outputs]
        nodes, constants = self._used(outputs)
        integer_graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": self.versions[0]}, name="anybit", initializers=constants)
        result = ir.Model(integer_graph, ir_version=self.versions[1], producer_name="anybit")
        result.metadata_props.update(metadata)
        return result

    def _output(self, value: ir.Value) -> ir.Value:
        """Return the model's output under its own name, which any other value gives up."""
        output = self.floats[name_of(value)]
        if output.producer() is None or name_of(output) != name_of(value):
            output = self.emit("Identity", [output], {}, "")
            for other in (made for node in self.nodes for made in node.outputs if name_of(made) == name_of(value)):
                other.name = self._untaken(name_of(value))
            output.name = name_of(value)
        output.shape, output.type = value.shape, value.type
        return output

    def _used(self, outputs: Sequence[ir.Value]) -> tuple[list[ir.Node], list[ir.Value]]:
        """Return the (nodes, initializers) that the outputs depend on: a runtime would also run the others."""
        needed = {id(value) for value in outputs}
        used = []
        for node in reversed(self.nodes):
            if any(id(value) in needed for value in node.outputs):
                used.append(node)
                needed |= {id(value) for value in node.inputs if value is not None}
        return used[::-1], [value for value in self.constants.values() if id(value) in needed]

    # Building

    def emit(self, kind: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any], name: str) -> ir.Value:
        """Add a node and return its output. Nodes that nothing looks up have no name, since names take bytes."""
        node = ir.node(kind, inputs, dict(attributes), name=name)
        node.outputs[0].name = self._untaken(name or f"v{len(self.nodes)}")
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Return an initializer; the same name returns the same one."""
        if name not in self.constants:
            unique = self._untaken(name)
            tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=unique)
            self.constants[name] = ir.Value(name=unique, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        return self.constants[name]

    def _untaken(self, name: str) -> str:
        """Return `name`, or a similar name if a layer has it."""
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def _scale(self, affine: Affine) -> list[ir.Value]:
        """Return [scale, zero point]; equal ones are shared."""
        return [
            self.constant(f"scale_{affine.scale!r}", np.array(affine.scale, np.float32)),
            self.constant(f"zero_point_{affine.zero_point}", np.array(affine.zero_point, np.uint8)),
        ]

    def _clipped(self, codes: ir.Value, affine: Affine, low: float = -np.inf, high: float = np.inf) -> ir.Value:
        """Clip codes to the quantizer's bits and the codes of two values."""
        lowest = 0 if low == -np.inf else affine.code(low)
        highest = affine.highest if high == np.inf else affine.code(high)
        if (lowest, highest) == (0, 255):
            return codes
        ends = [self.constant(f"code_{end}", np.array(end, np.uint8)) for end in (lowest, highest)]
        return self.emit("Clip", [codes, *ends], {}, "")

    def _quantize(self, name: str, value: ir.Value, affine: Affine, low: float = -np.inf, high: float = np.inf) -> None:
        """Quantize the float graph's value `name`, clamped; its readers get the rounded numbers from now on."""
        maker = value.producer()
        layer = None if maker is None else module_of_call(name_of(maker))
        if layer in self.layers and layer not in self.plan.integer:
            self.unrounded[name] = (value, low, high)
        matrix, shape = self.rows.get(name_of(value)) or (value, None)
        codes = self._clipped(self.emit("QuantizeLinear", [matrix, *self._scale(affine)], {}, f"{name}.quantized"), affine, low, high)
        self._as_codes(name, codes if shape is None else self.emit("Reshape", [codes, shape], {}, ""), affine)

    def _pooled(self, node: ir.Node, affine: Affine) -> None:
        """Round the maximum of a float layer's outputs after pooling: the codes are the same, since rounding and clamping are monotonic.

        The layer's output has its kernel's memory layout, in which a float maximum is fast and a maximum of codes is not. The second Max
        has one operand: ONNX Runtime would otherwise move the quantizer in front of the pool.
        """
        value, low, high = self.unrounded[name_of(node.inputs[0])]
        pooled = self.emit("Max", [self.emit("MaxPool", [value], node.attributes, name_of(node))], {}, "")
        self._quantize(name_of(node.outputs[0]), pooled, affine, low, high)

    def _as_codes(self, name: str, codes: ir.Value, affine: Affine) -> None:
        self.codes[name] = codes
        self.floats[name] = self.emit("DequantizeLinear", [codes, *self._scale(affine)], {}, "")

    # The nodes

    def _node(self, node: ir.Node) -> None:
        output = node.outputs[0]
        affine = self.plan.edges.get(name_of(output))
        layer = node.metadata_props.get(LAYER)
        if layer is not None:
            result = self._layer(node, layer)
            if result is None:
                return
        elif affine is not None and name_of(output) in self.plan.tables:
            return self._as_codes(name_of(output), self._table(node, affine), affine)
        elif node.op_type == "MaxPool" and name_of(node.inputs[0]) in self.unrounded and affine is not None:
            return self._pooled(node, affine)
        elif node.op_type in MOVES and affine is not None and self._shares_codes(node, affine):
            return self._moved(node, affine)
        elif affine is not None and name_of(output) in self.plan.clamped:
            source, low, high = self.plan.clamped[name_of(output)]
            return self._quantize(name_of(output), self.floats[source], affine, low, high)
        else:
            result = self._copied(node)
        self.floats[name_of(output)] = result
        for value in node.outputs:
            if name_of(value) in self.plan.edges:
                self._quantize(name_of(value), self.floats[name_of(value)], self.plan.edges[name_of(value)])

    def _shares_codes(self, node: ir.Node, affine: Affine) -> bool:
        """Return whether the node's input and all its outputs are quantized by `affine`."""
        source = name_of(node.inputs[0])
        return source in self.codes and all(self.plan.edges.get(name_of(value)) == affine for value in (node.inputs[0], *node.outputs))

    def _moved(self, node: ir.Node, affine: Affine) -> None:
        """Add a node that only moves numbers, applied to the codes."""
        rest = list(map(self._operand, node.inputs[1:]))
        fills = "mode" not in node.attributes or node.attributes["mode"].as_string() == "constant"
        if node.op_type == "Pad" and fills:  # zero is a code
            rest[1:] = [self._scale(affine)[1], *rest[2:]]
        moved = ir.node(
            node.op_type,
            [self.codes[name_of(node.inputs[0])], *rest],
            dict(node.attributes),
            name=name_of(node),
            num_outputs=len(node.outputs),
        )
        self.nodes.append(moved)
        for index, (new, old) in enumerate(zip(moved.outputs, node.outputs, strict=True)):
            new.name = self._untaken(f"{name_of(node)}.{index}" if index else name_of(node))
            self._as_codes(name_of(old), new, affine)

    def _operand(self, value: ir.Value | None) -> ir.Value | None:
        """Return the new graph's value for an operand; None for an omitted one."""
        return None if value is None else self._required(value)

    def _required(self, value: ir.Value | None) -> ir.Value:
        """Return the new graph's value for an operand that is present."""
        return self.floats[name_of(value)] if name_of(value) in self.floats else self.constant(name_of(value), numbers(value))

    def _copied(self, node: ir.Node) -> ir.Value:
        """Copy the node, applied to the new graph's values."""
        operands = [
            self._recurrent_weight(node, index) if (name_of(node), index) in self.matrices else self._operand(value)
            for index, value in enumerate(node.inputs)
        ]
        if node.op_type in JOINT and not on_integers(node):
            operands[0] = self._apart(self._required(node.inputs[0]))
        if node.op_type in CLAMPS and (layer := maker(operands[0])) is not None and layer.op_type == "Gemm" and self._is_integer(layer):
            operands[0] = self.emit("Max", operands[:1], {}, "")  # ONNX Runtime would merge the two into one float operator
        attributes = list(node.attributes.values())
        copy = ir.Node(node.domain, node.op_type, operands, attributes, num_outputs=len(node.outputs), name=node.name)
        for new, old in zip(copy.outputs, node.outputs, strict=True):
            new.name, new.shape, new.type = self._untaken(name_of(old)), old.shape, old.type
            self.floats[name_of(old)] = new
        self.nodes.append(copy)
        return copy.outputs[0]

    def _is_integer(self, node: ir.Node) -> bool:
        return module_of_call(name_of(node)) in self.plan.integer

    # Layers

    def _layer(self, node: ir.Node, name: str) -> ir.Value | None:
        """Add a layer; None if its bias is added together with it later."""
        layer, integer = self.layers[name], name in self.plan.integer
        kind = type_of(layer)
        if not kind.has_weights:
            read = [self._input(node, name, index) for index in range(kind.operands)] if integer else map(self._operand, node.inputs)
            return self.emit(node.op_type, list(read), {}, name_of(node))
        if layer.weight_quantizer is None and name not in self.plan.inputs:
            return self._float_layer(node)
        if BIAS in node.metadata_props:
            product = maker(node.inputs[0])
            if integer and product is not None and _row_shape(product) is not None:
                return self._matrix_product(product, name, numbers(node.inputs[1]))
            if not integer:
                return self._copied(node)
            return self.emit("Add", [self._operand(node.inputs[0]), self._integer_bias(name, numbers(node.inputs[1]))], {}, name_of(node))
        if integer and node.op_type == "MatMul" and _row_shape(node) is not None:
            alone = not any(BIAS in use.node.metadata_props for use in node.outputs[0].uses())
            return self._matrix_product(node, name, None) if alone else None
        operands = [self._operand(value) for value in node.inputs]
        first = self._input(node, name) if name in self.plan.inputs else self._required(node.inputs[0])
        operator = layer_operator(node.op_type)
        transposed = operator.transposed
        attributes = {key: value for key, value in node.attributes.items() if key != "transB"}
        operands[0] = first if integer else self._apart(first)
        if layer.weight_quantizer is None:
            return self.emit(node.op_type, operands, node.attributes, name_of(node))
        at = operator.weight_input
        if integer:
            operands[at] = self._integer_weight(name, layer, transposed)
            if len(node.inputs) > 2:
                operands[2] = self._integer_bias(name, numbers(node.inputs[2]))
        else:
            operands[at] = self._float_weight(name, layer, transposed)
        result = self.emit(node.op_type, operands, attributes, name_of(node))
        fused = self.weight_only and node.op_type == "Gemm" and not integer  # including its activation, before it gets its packed weights
        return self.emit("Max", [result], {}, "") if fused else result

    def _float_layer(self, node: ir.Node) -> ir.Value:
        """Add a layer that computes in float, unchanged."""
        operands = [self._operand(value) for value in node.inputs]
        if BIAS not in node.metadata_props:
            operands[0] = self._apart(self._required(node.inputs[0]))
        return self.emit(node.op_type, operands, node.attributes, name_of(node))

    def _apart(self, value: ir.Value) -> ir.Value:
        """Return the same numbers behind an operator that runtimes cannot optimize away.

        ONNX Runtime quantizes the float weights of a layer between quantizers by itself, and computes an operator there on integers
        wherever it can.
        """
        source = value.producer()
        rounded = source is not None and source.op_type == "DequantizeLinear"
        return self.emit("Max", [value], {}, "") if rounded else value

    def _matrix_product(self, node: ir.Node, name: str, bias: np.ndarray | None) -> ir.Value:
        """Add a linear on more than two dimensions as one on a matrix of rows, for which runtimes have a kernel that includes bias and
        rounding."""
        quantized = self._input(node, name)
        dequantize, sizes = maker(quantized), _row_shape(node)
        assert dequantize is not None and sizes is not None, "its input is quantized and its width known"
        source, grid, (inner, width) = operand(dequantize, 0), dequantize.inputs[1:], sizes
        channels = weight_rows(self.layers[name], float_weight(self.layers[name])).shape[0]
        flat = self._constant_of("rows", [-1, width])
        rows = self.emit("DequantizeLinear", [self.emit("Reshape", [source, flat], {}, ""), *grid], {}, "")
        operands = [rows, self._integer_weight(name, self.layers[name], True)]
        product = self.emit("Gemm", operands if bias is None else [*operands, self._integer_bias(name, bias)], {}, name_of(node))
        shape = self._constant_of("shape", [-1, *inner, channels]) if inner is not None else self._shape_like(source, channels)
        whole = self.emit("Reshape", [product, shape], {}, "")
        self.rows[name_of(whole)] = product, shape
        return whole

    def _shape_like(self, source: ir.Value, last: int) -> ir.Value:
        """Add the shape of `source` with another last size, computed at run time: number and length of texts are unknown."""
        if name_of(source) not in self.leads:
            self.leads[name_of(source)] = self.emit("Shape", [source], {"start": 0, "end": -1}, "")
        return self.emit("Concat", [self.leads[name_of(source)], self._constant_of("size", [last])], {"axis": 0}, "")

    def _constant_of(self, kind: str, sizes: Sequence[int]) -> ir.Value:
        return self.constant("_".join([kind, *map(str, sizes)]), np.array([int(size) for size in sizes], np.int64))

    def _input(self, node: ir.Node, name: str, operand: int = 0) -> ir.Value:
        """Return the layer's input (one of them for a matmul), rounded to the grid that it reads."""
        source = name_of(node.inputs[operand])
        affine = self.units[name] = self.plan.inputs[name][operand]
        own = f"{name_of(node)}.{operand}" if operand else name_of(node)
        rounded = self.floats[source] if self.plan.edges.get(source) == affine else self._rounded_again(source, affine, own)
        dequantize = maker(rounded)
        assert dequantize is not None and dequantize.inputs[0] is not None, "a layer's input is rounded"
        self.read.setdefault(name_of(node), []).append(dequantize.inputs[0])
        return rounded

    def _rounded_again(self, source: str, affine: Affine, own: str) -> ir.Value:
        """Return the float graph's value `source` on its reader's own grid, named after `own`."""
        if (source, affine) not in self.requantized:
            maker = self.floats[source].producer()
            after_floats = maker is not None and maker.op_type != "DequantizeLinear"  # verify looks for codes rounded from floats
            # ONNX Runtime would merge two 8-bit quantizers in a row into one, which gives other codes.
            value = self._apart(self.floats[source]) if affine.highest == 255 else self.floats[source]
            codes = self.emit("QuantizeLinear", [value, *self._scale(affine)], {}, f"{own}.rounded" if after_floats else "")
            codes = self._clipped(codes, affine)
            self.requantized[source, affine] = self.emit("DequantizeLinear", [codes, *self._scale(affine)], {}, f"{own}.input")
        return self.requantized[source, affine]

    def _integer_weight(self, name: str, layer: nn.Module, transposed: bool) -> ir.Value:
        codes, scale, bits = weight_numbers(layer)
        if isinstance(layer.bias, torch.Tensor):
            codes, scale = with_room(codes, scale, layer.bias.detach().numpy() / np.float32(self.units[name].scale), bits)
        held = self.weights.get((name, transposed)) or stored(name, _shaped(layer, codes, transposed), bits, self.emit, self.constant)
        self.weights[name, transposed] = held
        # Equal zero points are shared, except for codes that a runtime may make unsigned, with another zero point (`file.EXACT_SUMS`).
        own = codes.numel() and (codes.min() < -64 or codes.max() > 63)
        zeros = self.constant(f"{name}.zeros" if own else f"zeros_int8_{len(scale)}", np.zeros(len(scale), np.int8))
        operands = [held, self.constant(f"{name}.scale", scale), zeros]
        return self.emit("DequantizeLinear", operands, {"axis": 1 if transposed else 0}, "")

    def _float_weight(self, name: str, layer: nn.Module, transposed: bool) -> ir.Value:
        """Return a weight that is computed from codes and scales on loading, once for all calls of the layer."""
        if (name, transposed) not in self.weights:
            self.weights[name, transposed] = self._scaled_weight(name, layer, transposed)
        return self.weights[name, transposed]

    def _scaled_weight(self, name: str, layer: nn.Module, transposed: bool) -> ir.Value:
        """Multiply codes by scale with plain operators, which a runtime folds into a float weight."""
        codes, scale, bits = weight_numbers(layer)
        if self.weight_only and transposed and bits:
            return self._packed_weight(name, layer, _shaped(layer, codes, transposed), scale, bits)
        if layer.weight_group is not None:
            return self._grouped_weight(name, layer, transposed)
        held = stored(name, _shaped(layer, codes, transposed), bits, self.emit, self.constant)
        held = self.emit("Cast", [held], {"to": int(ir.DataType.FLOAT)}, "")
        factors = _shaped(layer, torch.from_numpy(scale)[:, None].expand(codes.shape), transposed)
        for axis in range(factors.ndim):  # one factor along every axis on which all are equal
            first = factors.take([0], axis)
            factors = first if (factors == first).all() else factors
        return self.emit("Mul", [held, self.constant(f"{name}.scale", factors)], {}, "")

    def _grouped_weight(self, name: str, layer: nn.Module, transposed: bool) -> ir.Value:
        """Scale each row of a group with plain operators on the groups, which then become the weight's own rows."""
        codes, scale, bits = weight_numbers(layer)
        held = self.emit("Cast", [stored(name, codes.numpy(), bits, self.emit, self.constant)], {"to": int(ir.DataType.FLOAT)}, "")
        held = self.emit("Mul", [held, self.constant(f"{name}.scale", scale[:, None])], {}, "")
        held = self.emit("Reshape", [held, self._constant_of("shape", list(float_weight(layer).shape))], {}, "")
        return self.emit("Transpose", [held], {"perm": [1, 0]}, "") if transposed else held

    def _recurrent_weight(self, node: ir.Node, index: int) -> ir.Value:
        """Return a weight of a recurrent operator, computed from the codes of the layer for each direction."""
        gates, directions = GATES[node.op_type], []
        order = self.constant(f"gates_{node.op_type}", np.array(gates, np.int64))
        for name in self.matrices[name_of(node), index]:
            rows, columns = float_weight(self.layers[name]).shape
            by_gate = self._constant_of("shape", [len(gates), rows // len(gates), columns])
            gathered = self.emit("Gather", [self.emit("Reshape", [self._own_weight(name), by_gate], {}, ""), order], {"axis": 0}, "")
            directions.append(self.emit("Reshape", [gathered, self._constant_of("shape", [1, rows, columns])], {}, ""))
        return directions[0] if len(directions) == 1 else self.emit("Concat", directions, {"axis": 0}, "")

    def _own_weight(self, name: str) -> ir.Value:
        """Return a layer's weight in float, computed from its codes if it has any."""
        layer = self.layers[name]
        if layer.weight_quantizer is None:
            return self.constant(f"{name}.weight", float_weight(layer).detach().numpy())
        return self._float_weight(name, layer, False)

    def _packed_weight(self, name: str, layer: nn.Module, codes: np.ndarray, scale: np.ndarray, bits: int) -> ir.Value:
        """Store codes [inputs, outputs] in the narrowest type of 2, 4 or 8 bits, dequantized by the kernel of the product."""
        if layer.weight_group is not None:  # [outputs x groups] -> [groups, outputs]
            scale, settings = scale.reshape(codes.shape[1], -1).T.copy(), {"axis": 0, "block_size": layer.weight_group}
        else:
            settings = {"axis": 1}
        kind = next(kind for most, kind in ((2, ml_dtypes.int2), (4, ml_dtypes.int4), (8, np.int8)) if bits <= most)
        if bits <= 2:
            self.versions = TWO_BIT_VERSIONS
        operands = [self.constant(f"{name}.packed", codes.astype(kind)), self.constant(f"{name}.scale", scale)]
        return self.emit("DequantizeLinear", operands, settings, "")

    def _integer_bias(self, name: str, bias: np.ndarray) -> ir.Value:
        """Add int32 codes in units of the input's scale times each channel's, which a runtime multiplies on loading."""
        unit, scale = np.float32(self.units[name].scale), numbers(self.constants[f"{name}.scale"])
        codes = np.rint(bias.astype(np.float64) / (unit * scale)).astype(np.int32)
        units = self.emit("Mul", [self.constants[f"scale_{self.units[name].scale!r}"], self.constants[f"{name}.scale"]], {}, "")
        zeros = self.constant(f"zeros_int32_{len(scale)}", np.zeros(len(scale), np.int32))
        return self.emit("DequantizeLinear", [self.constant(f"{name}.bias_codes", codes), units, zeros], {"axis": 0}, "")

    # Functions of one value

    def _computed_by_tables(self) -> set[str]:
        """Return the values that only tables read."""
        inner: set[str] = set()
        bases = set(self.plan.tables.values())
        for node in reversed(list(self.source)):
            readers = [use.node for use in node.outputs[0].uses()]
            tabled = name_of(node.outputs[0]) in self.plan.tables
            through = [r for r in readers if name_of(r.outputs[0]) in self.plan.tables or name_of(r.outputs[0]) in inner]
            is_output = node.outputs[0].is_graph_output()
            if readers and len(through) == len(readers) and not tabled and name_of(node.outputs[0]) not in bases and not is_output:
                inner.add(name_of(node.outputs[0]))
        return inner

    def _table(self, node: ir.Node, affine: Affine) -> ir.Value:
        """Look up the codes of a function of one value by that value's codes."""
        output, base = node.outputs[0], self.plan.tables[name_of(node.outputs[0])]
        edge = self.plan.edges[base]
        values = (np.arange(256) - edge.zero_point).astype(np.float32) * np.float32(edge.scale)
        results = evaluated(self.source, base, output, values)
        codes = np.clip(np.rint(results / np.float32(affine.scale)) + affine.zero_point, 0, affine.highest).astype(np.uint8)
        index = self.emit("Cast", [self.codes[base]], {"to": int(ir.DataType.INT32)}, "")
        return self.emit("Gather", [self.constant(f"{node.name}.table", codes), index], {"axis": 0}, name_of(node))


def _row_shape(node: ir.Node) -> tuple[list[int] | None, int] | None:
    """Return (dimensions of a linear's input between the batch and the last, None if only known at run time; the last). None if the last is
    not known."""
    shape = operand(node, 0).shape
    if shape is None or len(shape) < 2 or not isinstance(shape[-1], int):
        return None
    inner = [size for size in shape[1:-1] if isinstance(size, int)]
    return inner if len(inner) == len(shape) - 2 else None, shape[-1]


def weight_numbers(layer: nn.Module) -> tuple[torch.Tensor, np.ndarray, int]:
    """Return (codes as rows, int8; a scale per row; bits) of a layer with a weight quantizer; zeros of no bits if it is pruned."""
    if isinstance(layer.weight_quantizer, Pruned):
        rows = weight_rows(layer, float_weight(layer))
        return torch.zeros(rows.shape, dtype=torch.int8), np.ones(len(rows), np.float32), 0
    codes, quantizer = codes_of(layer), frozen(layer.weight_quantizer)
    scale = quantizer.scale.detach().flatten()
    return codes, scale.expand(len(codes)).numpy().astype(np.float32), quantizer.bits  # one scale serves all rows


def with_room(codes: torch.Tensor, scale: np.ndarray, bias: np.ndarray, bits: int) -> tuple[torch.Tensor, np.ndarray]:
    """Coarsen the steps of channels whose bias (in units of the input's scale) would not fit into int32.

    The weights of such a channel are negligible beside its bias: they lose less than the bias's own rounding elsewhere.
    """
    least = np.abs(bias).astype(np.float64) / LARGEST_BIAS
    if not bits:  # any scale works, and a fine one preserves the bias
        return codes, np.where(least > 0, least, 1.0).astype(np.float32)
    tight = torch.from_numpy(scale < least)
    if not tight.any():
        return codes, scale
    wider = np.where(scale < least, least, scale).astype(np.float32)
    smaller = (codes * torch.from_numpy(scale / wider)[:, None]).round().to(torch.int8)
    return torch.where(tight[:, None], smaller, codes), wider


def evaluated(graph: ir.Graph, base: str, output: ir.Value, values: np.ndarray) -> np.ndarray:
    """Compute the nodes between value `base` and `output` on `values`."""
    between: set[str] = set()
    ahead: list[ir.Value | None] = [output]
    while ahead:
        value = ahead.pop()
        source = maker(value)
        if source is not None and name_of(value) != base and name_of(value) not in between:
            between.add(name_of(value))
            ahead.extend(source.inputs)
    nodes = [node for node in graph if name_of(node.outputs[0]) in between]
    start = ir.Value(name=base, shape=ir.Shape([len(values)]), type=ir.TensorType(ir.DataType.FLOAT))
    known: dict[str, ir.Value] = {base: start}
    copies = []
    for node in nodes:
        inputs = []
        for value in node.inputs:
            if value is not None and name_of(value) not in known:
                name, array = name_of(value), numbers(value)
                held = ir.tensor(array, name=name)
                known[name] = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(held.dtype), const_value=held)
            inputs.append(None if value is None else known[name_of(value)])
        copy = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), num_outputs=1, name=node.name)
        known[name_of(node.outputs[0])] = copy.outputs[0]
        copy.outputs[0].name, copy.outputs[0].type = name_of(node.outputs[0]), ir.TensorType(ir.DataType.FLOAT)
        copies.append(copy)
    constants = [value for value in known.values() if value.const_value is not None]
    function = ir.Graph([start], [known[name_of(output)]], nodes=copies, initializers=constants, opset_imports={"": OPSET}, name="function")
    return run_unoptimized(ir.Model(function, ir_version=IR_VERSION), {base: values})[0]


def _shaped(layer: nn.Module, rows: torch.Tensor, transposed: bool) -> np.ndarray:
    """Return rows in the weight's own shape; for a linear, as [inputs, outputs]."""
    shaped = from_rows(layer, rows).numpy()
    return np.ascontiguousarray(shaped.T if transposed else shaped)
