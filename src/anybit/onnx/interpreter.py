"""The integer arithmetic of an exported graph: the reference with which a runtime's output is compared bit for bit.

The graph is read through its Q/DQ nodes, and an operator between quantizers is computed on their codes as by an integer kernel:

    convolution, linear   sum of (code - zero point) * weight code, exact, plus the int32 bias; times  sx sw / sy  in float32; rounded
    sum of two            A rA + (B rB + fixed) in float32,  rA = sA / sy,  fixed = zy - fma(rA, zA, rB zB); rounded
    average pool          the sum of (code - zero point), times  sx / (sy n)  in float32; rounded
    concatenation         each part's codes converted to the output's grid
    maximum, reshape, ... on the codes

Rounding is half to even. Everything else is computed in float32 by the runtime's kernel for that operator alone, on this reference's
earlier results, and is marked as such: `floats.check_graph` compares those kernels with the network.
Sums are exact: in float32 if no partial sum can exceed 24 bits, also separately for the upper and the lower bits, else in float64.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from anybit.errors import UnsupportedModel
from anybit.onnx.unoptimized import run_node
from anybit.onnx.values import maker, name_of, numbers

f32 = np.float32

Operator = Callable[[list[Any], Mapping[str, Any]], Any]
"""operator(inputs, settings) -> its result; None if it has no implementation here."""

ARITHMETIC = {"Add", "Mul", "GlobalAveragePool"}
"""Operators with a float implementation here, which a runtime may compute in another order."""


@dataclass(frozen=True)
class Codes:
    """Integers and their grid; `axis` is the scale's dimension if it has one, of which `block` numbers share a scale."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int = 1
    block: int = 0

    def offsets(self) -> Tensor:
        """Return codes - zero point, int32."""
        return self.codes.int() - self._along(self.zero_point.int())

    def values(self) -> Tensor:
        """Return the float32 numbers that the codes represent."""
        return self.offsets().float() * self._along(self.scale)

    def _along(self, numbers: Tensor) -> Tensor:
        if numbers.dim() == 0:
            return numbers
        if self.block:  # one number per block along the axis, and per place on the others
            return numbers.repeat_interleave(self.block, self.axis) if numbers.dim() > 1 else numbers
        return numbers.reshape([-1 if axis == self.axis % self.codes.dim() else 1 for axis in range(self.codes.dim())])


@dataclass(frozen=True)
class Pending:
    """The sum of an integer operator before a quantizer rounds it to its grid.

    values  the float result if no quantizer follows;   exactly  whether a runtime also computes that from the exact sum
    """

    rounded: Callable[[Tensor, Tensor], Tensor]
    values: Callable[[], Tensor]
    exactly: bool = False


@dataclass
class Interpretation:
    """values     name -> float tensors and codes of the graph, as in a runtime
    apart      name of a runtime's value -> its difference from the interpreter's result on the runtime's own earlier values
    constants  name -> values that depend on no input, including unpacked weights
    in_float   names of the nodes that were computed in float, though not on constants
    floats     names of the values that such a node computed, without a quantizer since
    rounded    names of the codes to which such values were rounded
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    in_float: list[str] = field(default_factory=list)
    floats: set[str] = field(default_factory=set)
    rounded: set[str] = field(default_factory=set)
    apart: dict[str, "Apart"] = field(default_factory=dict)


@dataclass(frozen=True)
class Apart:
    """`count` of a value's `size` numbers differ, by at most `largest`."""

    count: int
    size: int
    largest: float

    @classmethod
    def between(cls, ours: Tensor, theirs: Tensor) -> "Apart":
        distance = (ours.double() - theirs.double()).abs()
        return cls(int((distance > 0).sum()), distance.numel(), float(distance.max()) if distance.numel() else 0.0)


@torch.no_grad()
def interpret(model: ir.Model, inputs: Mapping[str, Tensor], runtime: Mapping[str, Tensor] | None = None) -> Interpretation:
    """Run the graph on `inputs`. Raises UnsupportedModel naming an operator without an implementation.

    `runtime` holds values that a runtime computed. Each is compared with the interpreter's and then replaces it, so that every operator is
    judged separately: a difference shows where it arises, and nowhere later.
    """
    done, runtime = Interpretation(), runtime or {}
    held: dict[str, Any] = dict(inputs)
    constants: set[str] = set()
    for name, value in model.graph.initializers.items():
        held[name] = _tensor(numbers(value))
        constants.add(name)
    versions = model.graph.opset_imports[""], model.ir_version
    for node in model.graph:
        operands = [None if value is None else held[name_of(value)] for value in node.inputs]
        if node.op_type != "QuantizeLinear":
            summed = [place for value in node.inputs if (place := _summed_in_float(value, held))]
            done.in_float += summed
            done.floats.update(name_of(value) for value in node.outputs if summed)
        fixed = all(value is None or name_of(value) in constants for value in node.inputs)
        if fixed:
            constants.update(name_of(value) for value in node.outputs)
        results, arithmetic = _computed(node, operands, versions)
        if arithmetic and not fixed:
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


def _computed(node: ir.Node, operands: list[Any], versions: tuple[int, int]) -> tuple[list[Any], bool]:
    """Return the node's results, and whether it computed them by float arithmetic."""
    settings = {name: attribute.value for name, attribute in node.attributes.items()}
    operator = _OPERATORS.get(node.op_type) if len(node.outputs) == 1 else None
    result = None if operator is None else operator(operands, settings)
    if result is not None:
        return [result], node.op_type in ARITHMETIC and isinstance(result, Tensor)
    results = _in_float(node, [None if value is None else _plain(value) for value in operands], versions)
    return results, any(one.is_floating_point() for one in results)


def _summed_in_float(value: ir.Value | None, held: Mapping[str, Any]) -> str | None:
    """Return the name of the node behind a sum or a pool that no quantizer reads: a runtime adds it up in float, in its own order."""
    pending = None if value is None else held.get(name_of(value))
    return name_of(maker(value)) if isinstance(pending, Pending) and not pending.exactly else None


def _tensor(array: np.ndarray) -> Tensor:
    """Return an initializer as a tensor; two- and four-bit integers as int8."""
    narrow = array.dtype.name in ("int2", "int4")
    return torch.from_numpy(np.array(array.astype(np.int8) if narrow else array))


def _plain(value: Any) -> Tensor:
    """Return the float32 numbers of codes or of a pending sum; other tensors unchanged."""
    if isinstance(value, (Codes, Pending)):
        return value.values()
    return value


def _in_float(node: ir.Node, inputs: list[Tensor | None], versions: tuple[int, int]) -> list[Tensor]:
    """Run one operator with the runtime's own kernel."""
    try:
        arrays = run_node(node, [None if tensor is None else tensor.contiguous().numpy() for tensor in inputs], versions)
    except Exception as error:  # of many kinds
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModel(f"{node.name}: operator {node.op_type} cannot be interpreted: {reason}") from error
    return [torch.from_numpy(array) for array in arrays]


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
    """Compute function(x, weight), linear in x, on integers, exactly: in float32 if every partial sum of x, or of its upper and lower bits
    separately, fits into 24 bits."""

    def fits(numbers: Tensor) -> bool:
        largest = fan_in * int(numbers.abs().max()) * int(weight.abs().max()) if numbers.numel() and weight.numel() else 0
        return largest < 2**24

    def computed(numbers: Tensor, kind: torch.dtype) -> Tensor:
        return function(numbers.to(kind), weight.to(kind)).to(torch.int64)

    if fits(x):
        return computed(x, torch.float32)
    upper, lower = x >> 4, x & 15
    if fits(upper) and fits(lower):
        return 16 * computed(upper, torch.float32) + computed(lower, torch.float32)
    return computed(x, torch.float64)


def _scaled(total: Tensor, inputs: list[Any], channel: int) -> Pending:
    """Scale the int32 sum of a layer (bias included) by sx sw for each channel."""
    scale = inputs[0].scale * inputs[1].scale
    along = scale.reshape([-1 if axis == channel % total.dim() else 1 for axis in range(total.dim())]) if scale.dim() else scale
    return Pending(lambda sy, zy: _rounded(total.float() * (along / sy), zy), lambda: total.float() * along, True)


def _convolution(inputs: list[Any], settings: Mapping[str, Any]) -> Pending | None:
    if not _all_codes(inputs):
        return None
    x, weight = inputs[:2]
    spatial, group = weight.codes.dim() - 2, settings.get("group", 1)
    strides, dilations = (settings.get(key, [1] * spatial) for key in ("strides", "dilations"))
    padding = _padding(settings, x.codes.shape[2:], weight.codes.shape[2:], strides, dilations)
    function = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    total = _exact(
        lambda a, b: function(F.pad(a, padding), b, None, strides, 0, dilations, group),
        x.offsets(), weight.offsets(), weight.codes[0].numel(),
    )  # fmt: skip
    if len(inputs) > 2:
        total = total + inputs[2].codes.reshape(-1, *[1] * spatial)
    return _scaled(total, inputs, 1)


def _all_codes(inputs: list[Any]) -> bool:
    return all(isinstance(value, Codes) for value in inputs if value is not None)


def _padding(
    settings: Mapping[str, Any], sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[int]:
    """Return the padding of a window operator in the order of `F.pad`: (before, after) of each dimension, the last first."""
    automatic, dimensions = settings.get("auto_pad", "NOTSET"), len(sizes)
    pads = settings.get("pads", [0] * 2 * dimensions) if automatic == "NOTSET" else [0] * 2 * dimensions
    padding: list[int] = []
    for axis in reversed(range(dimensions)):
        before, after = pads[axis], pads[axis + dimensions]
        if automatic.startswith("SAME"):
            reach = dilations[axis] * (kernel[axis] - 1) + 1
            lacking = max((-(-sizes[axis] // strides[axis]) - 1) * strides[axis] + reach - sizes[axis], 0)
            before, after = sorted((lacking // 2, lacking - lacking // 2), reverse=automatic == "SAME_LOWER")
        padding += [before, after]
    return padding


def _linear(inputs: list[Any], settings: Mapping[str, Any]) -> Any:
    if not _all_codes(inputs) or any(settings.get(key, 0) for key in ("transA", "transB")):
        return None
    if settings.get("alpha", 1.0) != 1.0 or settings.get("beta", 1.0) != 1.0:
        return None
    x, weight = inputs[:2]
    total = _exact(torch.matmul, x.offsets(), weight.offsets(), weight.codes.shape[-2])
    if len(inputs) > 2:
        total = total + inputs[2].codes
    return _scaled(total, inputs, -1)


# Joins and pools


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
        # The zero point is added before rounding, since the addition may round a float32 just below a half up to it.
        return Pending(
            lambda sy, zy: _rounded(total.float() * (a.scale * b.scale / sy) + zy, torch.zeros(())), lambda: a.values() * b.values()
        )
    return _plain(a) * _plain(b)


def _global_average(inputs: list[Any], settings: Mapping[str, Any]) -> Any:
    (x,) = inputs
    if not isinstance(x, Codes):
        x = _plain(x)
        return x.mean(tuple(range(2, x.dim())), keepdim=True)
    axes, count = tuple(range(2, x.codes.dim())), float(f32(x.codes[0, 0].numel()))
    total = x.offsets().sum(axes, keepdim=True)
    return Pending(lambda sy, zy: _rounded(total.float() * (x.scale / (sy * count)), zy), lambda: total.float() * (x.scale / count))


def _average(inputs: list[Any], settings: Mapping[str, Any]) -> Pending | None:
    (x,) = inputs
    kernel, spatial = settings["kernel_shape"], len(settings["kernel_shape"])
    pads = settings.get("pads", [0] * 2 * spatial)
    symmetric = settings.get("auto_pad", "NOTSET") == "NOTSET" and pads[:spatial] == pads[spatial:]
    as_torch_has = set(settings.get("dilations", [1])) == {1} and all(2 * pad <= size for pad, size in zip(pads, kernel, strict=False))
    if not isinstance(x, Codes) or not symmetric or not as_torch_has:
        return None
    function, strides = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[spatial - 1], settings.get("strides", [1] * spatial)
    ends = bool(settings.get("ceil_mode", 0)), bool(settings.get("count_include_pad", 0))
    mean = function(x.values(), kernel, strides, pads[:spatial], *ends)
    return Pending(lambda sy, zy: _rounded(mean / sy, zy), lambda: mean)


def _concatenation(inputs: list[Any], settings: Mapping[str, Any]) -> Any:
    axis = settings["axis"]
    if not all(isinstance(value, Codes) for value in inputs):
        return torch.cat([_plain(value) for value in inputs], axis)

    def rounded(sy: Tensor, zy: Tensor) -> Tensor:
        return torch.cat([_rounded(source.values() / sy, zy) for source in inputs], axis)

    return Pending(rounded, lambda: torch.cat([source.values() for source in inputs], axis))


def _maximum(inputs: list[Any], settings: Mapping[str, Any]) -> Tensor:
    plain = _plain(inputs[0])
    kernel, spatial = settings["kernel_shape"], len(settings["kernel_shape"])
    strides, dilations = (settings.get(key, [1] * spatial) for key in ("strides", "dilations"))
    padding = _padding(settings, plain.shape[2:], kernel, strides, dilations)
    if settings.get("ceil_mode", 0):  # extend the end to a whole last window, if that begins before the padding at the end
        for axis in range(spatial):
            place = 2 * (spatial - 1 - axis)
            before, after = padding[place : place + 2]
            length = plain.shape[axis + 2] + before
            rest = -(length + after - (dilations[axis] * (kernel[axis] - 1) + 1)) % strides[axis]
            begins = length + after + rest - (dilations[axis] * (kernel[axis] - 1) + 1)
            padding[place + 1] += rest if begins < length else 0
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[spatial - 1]
    padded = F.pad(plain.float(), padding, value=-torch.inf)
    return function(padded, kernel, strides, 0, dilations).to(plain.dtype)


# Moving numbers


def _moved(function: Callable[[Tensor, list[Any], Mapping[str, Any]], Tensor | None]) -> Operator:
    return lambda inputs, settings: function(_plain(inputs[0]), inputs[1:], settings)


def _reshape(x: Tensor, rest: list[Any], settings: Mapping[str, Any]) -> Tensor:
    shape = [x.shape[axis] if size == 0 and not settings.get("allowzero") else size for axis, size in enumerate(rest[0].tolist())]
    return x.reshape(shape)


def _flatten(x: Tensor, rest: list[Any], settings: Mapping[str, Any]) -> Tensor:
    axis = settings.get("axis", 1)
    axis = axis if axis >= 0 else axis + x.dim()
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _slice(x: Tensor, rest: list[Any], settings: Mapping[str, Any]) -> Tensor | None:
    starts, ends = (tensor.tolist() for tensor in rest[:2])
    axes, steps = [None if tensor is None else tensor.tolist() for tensor in [*rest[2:], None, None][:2]]
    if steps is not None and min(steps, default=1) < 0:  # whose ends differ from Python's
        return None
    index = [slice(None)] * x.dim()
    for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
        index[place if axes is None else axes[place]] = slice(start, end, 1 if steps is None else steps[place])
    return x[tuple(index)].contiguous()


def _pad(x: Tensor, rest: list[Any], settings: Mapping[str, Any]) -> Tensor | None:
    pads, value, axes = [*rest, None, None][:3]
    if settings.get("mode", "constant") != "constant" or axes is not None or bool((pads < 0).any()):
        return None
    begins, ends = np.split(pads.numpy(), 2)
    filled = 0 if value is None else value.item()
    return torch.from_numpy(np.pad(x.numpy(), list(zip(begins, ends, strict=True)), constant_values=filled))


def _clip(x: Tensor, rest: list[Any], settings: Mapping[str, Any]) -> Tensor:
    low, high = (None if value is None else value.item() for value in [*rest, None, None][:2])
    return x if low is None and high is None else x.clamp(low, high)


def _cast(x: Tensor, rest: list[Any], settings: Mapping[str, Any]) -> Tensor | None:
    kind = _NUMPY_TYPES.get(ir.DataType(settings["to"]))
    return None if kind is None else x.to(kind)


def _squeeze(x: Tensor, rest: list[Any], settings: Mapping[str, Any]) -> Tensor:
    return x.squeeze(tuple(rest[0].tolist())) if rest and rest[0] is not None else x.squeeze()


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
    "Flatten": _moved(_flatten),
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
