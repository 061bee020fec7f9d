"""The integer arithmetic of an exported graph: the reference that a runtime's output is compared with, bit for bit.

The graph is read as its Q/DQ nodes say, and an operator between quantizers is computed on their codes as an integer kernel does:

    convolution, linear   sum of (code - zero point) * weight code, exact, plus the int32 bias; times  sx sw / sy  in float32; rounded
    sum of two            A rA + (B rB + fixed) in float32,  rA = sA / sy,  fixed = zy - fma(rA, zA, rB zB); rounded
    average pool          the sum of (code - zero point), times  sx / (sy n)  in float32; rounded
    concatenation         each part's codes taken to the output's grid
    maximum, reshape, ... on the codes

Rounding is half to even. Everything else is computed in float32 by the reference implementation of its operator, and said to be so.
Sums are exact: float32 where no partial sum can leave 24 bits, float64 else.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from anybit.errors import UnsupportedModel
from anybit.onnx.floats import IR_VERSION, OPSET
from anybit.onnx.values import maker, name_of, numbers

f32 = np.float32

Operator = Callable[[list[Any], Mapping[str, Any]], Any]
"""operator(inputs, settings) -> its result; None where it has no form of its own here."""

ARITHMETIC = {"Conv", "Gemm", "MatMul", "Add", "Mul", "GlobalAveragePool", "AveragePool"}
"""Operators whose float form a runtime may compute in another order."""


@dataclass(frozen=True)
class Codes:
    """Integers with the grid that they are on; `axis` of the scale's dimension where it has one, `block` numbers of which share a scale."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int = 1
    block: int = 0

    def offsets(self) -> Tensor:
        """Return codes - zero point, int32."""
        return self.codes.int() - self._along(self.zero_point.int())

    def values(self) -> Tensor:
        """Return the float32 numbers that they stand for."""
        return self.offsets().float() * self._along(self.scale)

    def _along(self, numbers: Tensor) -> Tensor:
        if numbers.dim() == 0:
            return numbers
        if self.block:  # a number for each block of so many along the axis, and for each place on the others
            return numbers.repeat_interleave(self.block, self.axis) if numbers.dim() > 1 else numbers
        return numbers.reshape([-1 if axis == self.axis % self.codes.dim() else 1 for axis in range(self.codes.dim())])


@dataclass(frozen=True)
class Pending:
    """The sum of an integer operator, until a quantizer takes it to its grid.

    values  what it is in float, where no quantizer follows;   exactly  whether a runtime computes that from the exact sum, too
    """

    rounded: Callable[[Tensor, Tensor], Tensor]
    values: Callable[[], Tensor]
    exactly: bool = False


@dataclass
class Interpretation:
    """values     name -> float tensors and codes of the graph, as a runtime gives them
    apart      name of a value that a runtime gave -> how far it is from what the interpreter makes of what that runtime gave before
    constants  name -> what depends on no input, unpacked weights among them
    in_float   names of the nodes that were computed in float, though not on constants
    floats     names of the values that come from such a node, with no quantizer since
    rounded    names of the codes that such values were rounded to
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    in_float: list[str] = field(default_factory=list)
    floats: set[str] = field(default_factory=set)
    rounded: set[str] = field(default_factory=set)
    apart: dict[str, "Apart"] = field(default_factory=dict)


@dataclass(frozen=True)
class Apart:
    """Of a value's `size` numbers `count` differ, by at most `largest`."""

    count: int
    size: int
    largest: float

    @classmethod
    def between(cls, ours: Tensor, theirs: Tensor) -> "Apart":
        distance = (ours.double() - theirs.double()).abs()
        return cls(int((distance > 0).sum()), distance.numel(), float(distance.max()) if distance.numel() else 0.0)


@torch.no_grad()
def interpret(model: ir.Model, inputs: Mapping[str, Tensor], runtime: Mapping[str, Tensor] | None = None) -> Interpretation:
    """Run the graph on `inputs`; raises UnsupportedModel naming the operator that has no implementation.

    `runtime` holds values that a runtime gave. Each is compared with the interpreter's, and then taken over in its place, so that every
    operator is judged by itself: a difference shows where it arises, and nowhere after.
    """
    done, runtime = Interpretation(), runtime or {}
    held: dict[str, Any] = dict(inputs)
    constants: set[str] = set()
    for name, value in model.graph.initializers.items():
        held[name] = _tensor(numbers(value))
        constants.add(name)
    for node in model.graph:
        operands = [None if value is None else held[name_of(value)] for value in node.inputs]
        if node.op_type != "QuantizeLinear":
            summed = [place for value in node.inputs if (place := _summed_in_float(value, held))]
            done.in_float += summed
            done.floats.update(name_of(value) for value in node.outputs if summed)
        fixed = all(value is None or name_of(value) in constants for value in node.inputs)
        if fixed:
            constants.update(name_of(value) for value in node.outputs)
        settings = {name: attribute.value for name, attribute in node.attributes.items()}
        operator = _OPERATORS.get(node.op_type)
        results = [] if operator is None else [operator(operands, settings)]
        if not results or results[0] is None:
            results = _in_float(node, [None if value is None else _plain(value) for value in operands])
            arithmetic = not fixed and any(result.is_floating_point() for result in results)
        else:
            arithmetic = not fixed and node.op_type in ARITHMETIC and isinstance(results[0], Tensor)
        if arithmetic:
            done.in_float.append(name_of(node))
            done.floats.update(name_of(value) for value in node.outputs)
        inexact = any(value is not None and name_of(value) in done.floats for value in node.inputs)
        for value, result in zip(node.outputs, results, strict=False):
            if inexact:
                (done.rounded if node.op_type == "QuantizeLinear" else done.floats).add(name_of(value))
            if name_of(value) in runtime:
                done.apart[name_of(value)] = Apart.between(_plain(result), runtime[name_of(value)])
                result = runtime[name_of(value)]
            held[name_of(value)] = result
    for value in model.graph.outputs:
        if place := _summed_in_float(value, held):
            done.in_float.append(place)
            done.floats.add(name_of(value))
    done.values = {name: _plain(value) for name, value in held.items() if name not in constants}
    done.constants = {name: _plain(held[name]) for name in constants}
    return done


def _summed_in_float(value: ir.Value | None, held: Mapping[str, Any]) -> str | None:
    """Name the node behind a sum or a pool that no quantizer takes up: a runtime adds it up in float, in an order of its own."""
    pending = None if value is None else held.get(name_of(value))
    return name_of(maker(value)) if isinstance(pending, Pending) and not pending.exactly else None


def _tensor(array: np.ndarray) -> Tensor:
    """Return an initializer as a tensor; two- and four-bit integers as int8."""
    narrow = array.dtype.name in ("int2", "int4")
    return torch.from_numpy(np.array(array.astype(np.int8) if narrow else array))


def _plain(value: Any) -> Tensor:
    """Return the float32 numbers of codes or of a pending sum; a tensor as it is."""
    if isinstance(value, (Codes, Pending)):
        return value.values()
    return value


def _in_float(node: ir.Node, inputs: list[Tensor | None]) -> list[Tensor]:
    """Run one operator by its reference implementation: a graph of it alone, whose inputs have types and shapes."""
    from onnx import TensorProto, helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    operands = zip(node.inputs, inputs, strict=True)
    arrays = {name_of(value): tensor.numpy() for value, tensor in operands if value is not None and tensor is not None}
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in arrays.items()}
    takes = [helper.make_tensor_value_info(name, kinds[name], array.shape) for name, array in arrays.items() if array.size > 1]
    fixed = [numpy_helper.from_array(array, name) for name, array in arrays.items() if array.size <= 1]
    makes = [helper.make_tensor_value_info(name_of(value), TensorProto.FLOAT, None) for value in node.outputs]
    graph = helper.make_graph([ir.to_proto(node)], "one", takes, makes, fixed)
    try:
        alone = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        feeds = {info.name: arrays[info.name] for info in takes}
        return [torch.from_numpy(np.asarray(array)) for array in ReferenceEvaluator(alone).run(None, feeds)]
    except Exception as error:  # the reference has gaps of many kinds
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModel(f"{node.name}: operator {node.op_type} cannot be interpreted: {reason}") from error


# Quantizers


def _quantize(inputs: list[Any], settings: Mapping[str, Any]) -> Tensor:
    source, scale, zero_point = inputs
    if isinstance(source, Pending):
        return source.rounded(scale, zero_point)
    return _rounded(_plain(source) / scale, zero_point)


def _rounded(steps: Tensor, zero_point: Tensor) -> Tensor:
    """Round numbers in units of their scale to uint8 codes."""
    return (steps.round() + zero_point.float()).clamp(0, 255).to(torch.uint8)


def _dequantize(inputs: list[Any], settings: Mapping[str, Any]) -> Codes:
    codes, scale, *rest = inputs
    return Codes(
        codes,
        scale,
        rest[0] if rest else torch.zeros_like(scale, dtype=torch.int32),
        settings.get("axis", 1),
        settings.get("block_size", 0),
    )


# Layers


def _exact(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, fan_in: int) -> Tensor:
    """Compute function(x, weight) on integers, exactly: in float32 if every partial sum fits its 24 bits."""
    largest = fan_in * int(x.abs().max()) * int(weight.abs().max()) if x.numel() and weight.numel() else 0
    kind = torch.float32 if largest < 2**24 else torch.float64
    return function(x.to(kind), weight.to(kind)).to(torch.int64)


def _scaled(total: Tensor, inputs: list[Any], channel: int) -> Pending:
    """Scale the int32 sum of a layer (bias included) by sx sw for each channel."""
    scale = inputs[0].scale * inputs[1].scale
    along = scale.reshape([-1 if axis == channel % total.dim() else 1 for axis in range(total.dim())]) if scale.dim() else scale
    return Pending(lambda sy, zy: _rounded(total.float() * (along / sy), zy), lambda: total.float() * along, True)


def _convolution(inputs: list[Any], settings: Mapping[str, Any]) -> Any:
    if not all(isinstance(value, Codes) for value in inputs if value is not None):
        return _float_convolution(inputs, settings)
    x, weight = inputs[:2]
    spatial, group = weight.codes.dim() - 2, settings.get("group", 1)
    pads = settings.get("pads", [0] * 2 * spatial)
    padding = [pads[axis + end * spatial] for axis in reversed(range(spatial)) for end in (0, 1)]
    function = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    total = _exact(
        lambda a, b: function(F.pad(a, padding), b, None, settings.get("strides", 1), 0, settings.get("dilations", 1), group),
        x.offsets(), weight.offsets(), weight.codes[0].numel(),
    )  # fmt: skip
    if len(inputs) > 2:
        total = total + inputs[2].codes.reshape(-1, *[1] * spatial)
    return _scaled(total, inputs, 1)


def _float_convolution(inputs: list[Any], settings: Mapping[str, Any]) -> Tensor | None:
    x, weight = _plain(inputs[0]), _plain(inputs[1])
    bias = _plain(inputs[2]) if len(inputs) > 2 and inputs[2] is not None else None
    spatial = weight.dim() - 2
    pads = settings.get("pads", [0] * 2 * spatial)
    padding = [pads[axis + end * spatial] for axis in reversed(range(spatial)) for end in (0, 1)]
    function = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    strides, dilations = settings.get("strides", 1), settings.get("dilations", 1)
    return function(F.pad(x, padding), weight, bias, strides, 0, dilations, settings.get("group", 1))


def _linear(inputs: list[Any], settings: Mapping[str, Any]) -> Any:
    if not all(isinstance(value, Codes) for value in inputs):
        return None
    x, weight = inputs[:2]
    total = _exact(torch.matmul, x.offsets(), weight.offsets(), weight.codes.shape[-2])
    if len(inputs) > 2:
        total = total + inputs[2].codes
    return _scaled(total, inputs, -1)


# What joins and pools


def _sum(inputs: list[Any], settings: Mapping[str, Any]) -> Any:
    a, b = inputs
    if isinstance(a, Codes) and isinstance(b, Codes) and a.scale.dim() == 0 and b.scale.dim() == 0:

        def rounded(sy: Tensor, zy: Tensor) -> Tensor:
            ra, rb = a.scale / sy, b.scale / sy
            za, zb = a.zero_point.double(), b.zero_point.float()
            fixed = (zy.double() - (ra.double() * za + (rb * zb).double()).float().double()).float()
            inner = (b.codes.double() * rb.double() + fixed.double()).float()
            return (a.codes.double() * ra.double() + inner.double()).float().round().clamp(0, 255).to(torch.uint8)

        return Pending(rounded, lambda: a.values() + b.values())
    return _plain(a) + _plain(b)


def _product(inputs: list[Any], settings: Mapping[str, Any]) -> Any:
    a, b = inputs
    if isinstance(a, Codes) and isinstance(b, Codes):
        total = a.offsets() * b.offsets()
        return Pending(lambda sy, zy: _rounded(total.float() * (a.scale * b.scale / sy), zy), lambda: a.values() * b.values())
    return _plain(a) * _plain(b)


def _global_average(inputs: list[Any], settings: Mapping[str, Any]) -> Any:
    (x,) = inputs
    if not isinstance(x, Codes):
        return x.mean(tuple(range(2, x.dim())), keepdim=True)
    axes, count = tuple(range(2, x.codes.dim())), float(f32(x.codes[0, 0].numel()))
    total = x.offsets().sum(axes, keepdim=True)
    return Pending(lambda sy, zy: _rounded(total.float() * (x.scale / (sy * count)), zy), lambda: total.float() * (x.scale / count))


def _average(inputs: list[Any], settings: Mapping[str, Any]) -> Any:
    x, spatial = _plain(inputs[0]), len(settings["kernel_shape"])
    pads = settings.get("pads", [0] * 2 * spatial)
    if settings.get("ceil_mode", 0) or list(pads[:spatial]) != list(pads[spatial:]) or set(settings.get("dilations", [1])) != {1}:
        return None
    function, strides = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[spatial - 1], settings.get("strides", [1] * spatial)
    mean = function(x, settings["kernel_shape"], strides, pads[:spatial], False, bool(settings.get("count_include_pad", 0)))
    return Pending(lambda sy, zy: _rounded(mean / sy, zy), lambda: mean) if isinstance(inputs[0], Codes) else mean


def _concatenation(inputs: list[Any], settings: Mapping[str, Any]) -> Any:
    axis = settings["axis"]
    if not all(isinstance(value, Codes) for value in inputs):
        return torch.cat([_plain(value) for value in inputs], axis)

    def rounded(sy: Tensor, zy: Tensor) -> Tensor:
        return torch.cat([_rounded(source.values() / sy, zy) for source in inputs], axis)

    return Pending(rounded, lambda: torch.cat([source.values() for source in inputs], axis))


def _maximum(inputs: list[Any], settings: Mapping[str, Any]) -> Any:
    (x,) = inputs
    plain = _plain(x)
    kernel, spatial = settings["kernel_shape"], len(settings["kernel_shape"])
    pads, dilations = settings.get("pads", [0] * 2 * spatial), settings.get("dilations", [1] * spatial)
    strides = settings.get("strides", [1] * spatial)
    padding = []
    for axis in reversed(range(spatial)):
        before, after = pads[axis], pads[axis + spatial]
        if settings.get("ceil_mode", 0):  # as much again as lets the last, incomplete window be whole
            length = plain.shape[axis + 2] + before + after - (dilations[axis] * (kernel[axis] - 1) + 1)
            after += -length % strides[axis]
        padding += [before, after]
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[spatial - 1]
    padded = F.pad(plain.float(), padding, value=-torch.inf)
    return function(padded, kernel, strides, 0, dilations).to(plain.dtype)


# What moves numbers


def _moved(function: Callable[[Tensor, list[Any], Mapping[str, Any]], Tensor | None]) -> Operator:
    return lambda inputs, settings: function(_plain(inputs[0]), inputs[1:], settings)


def _reshape(x: Tensor, rest: list[Any], settings: Mapping[str, Any]) -> Tensor:
    shape = [x.shape[axis] if size == 0 and not settings.get("allowzero") else size for axis, size in enumerate(rest[0].tolist())]
    return x.reshape(shape)


def _slice(x: Tensor, rest: list[Any], settings: Mapping[str, Any]) -> Tensor:
    starts, ends, *more = (tensor.tolist() for tensor in rest)
    axes = more[0] if more else range(len(starts))
    steps = more[1] if len(more) > 1 else [1] * len(starts)
    index = [slice(None)] * x.dim()
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[axis] = slice(start, end, step)
    return torch.from_numpy(np.ascontiguousarray(x.numpy()[tuple(index)]))


def _pad(x: Tensor, rest: list[Any], settings: Mapping[str, Any]) -> Tensor | None:
    if settings.get("mode", "constant") != "constant" or len(rest) > 2:
        return None
    begins, ends = np.split(rest[0].numpy(), 2)
    value = 0 if len(rest) < 2 or rest[1] is None else rest[1].item()
    return torch.from_numpy(np.pad(x.numpy(), list(zip(begins, ends, strict=True)), constant_values=value))


def _clip(x: Tensor, rest: list[Any], settings: Mapping[str, Any]) -> Tensor:
    low, high = (None if index >= len(rest) or rest[index] is None else rest[index].item() for index in (0, 1))
    return x.clamp(low, high)


def _cast(x: Tensor, rest: list[Any], settings: Mapping[str, Any]) -> Tensor | None:
    kind = _NUMPY_TYPES.get(ir.DataType(settings["to"]))
    return None if kind is None else x.to(kind)


def _squeeze(x: Tensor, rest: list[Any], settings: Mapping[str, Any]) -> Tensor:
    return x.squeeze(tuple(rest[0].tolist())) if rest else x.squeeze()


def _unsqueeze(x: Tensor, rest: list[Any], settings: Mapping[str, Any]) -> Tensor:
    total = x.dim() + rest[0].numel()
    for axis in sorted(axis % total for axis in rest[0].tolist()):
        x = x.unsqueeze(axis)
    return x


_NUMPY_TYPES = {
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.FLOAT: torch.float32,
}

_OPERATORS: dict[str, Operator] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "Conv": _convolution,
    "Gemm": _linear,
    "MatMul": _linear,
    "Add": _sum,
    "Mul": _product,
    "GlobalAveragePool": _global_average,
    "AveragePool": _average,
    "Concat": _concatenation,
    "MaxPool": _maximum,
    "Reshape": _moved(_reshape),
    "Flatten": _moved(lambda x, rest, settings: x.flatten(settings.get("axis", 1)) if settings.get("axis", 1) else None),
    "Transpose": _moved(lambda x, rest, settings: x.permute(*settings.get("perm", range(x.dim())[::-1])).contiguous()),
    "Slice": _moved(_slice),
    "Pad": _moved(_pad),
    "Clip": _moved(_clip),
    "Identity": lambda inputs, settings: inputs[0],
    "Max": lambda inputs, settings: inputs[0] if len(inputs) == 1 else None,
    "Relu": _moved(lambda x, rest, settings: x.clamp(min=0)),
    "Cast": _moved(_cast),
    "Squeeze": _moved(_squeeze),
    "Unsqueeze": _moved(_unsqueeze),
    "Gather": _moved(lambda x, rest, settings: x[rest[0].long()] if settings.get("axis", 0) == 0 else None),
    "Expand": _moved(lambda x, rest, settings: x.expand(torch.broadcast_shapes(x.shape, rest[0].tolist())).contiguous()),
}
