"""The integer reference computes the same as the runtime: every operator and setting, on floats and on codes."""

import math

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from anybit.onnx.file import session
from anybit.onnx.floats import IR_VERSION, OPSET
from anybit.onnx.interpreter import _OPERATORS, _exact, interpret
from anybit.onnx.verification import lacks_exact_kernels

exactly = pytest.mark.skipif(lacks_exact_kernels() is not None, reason=f"bitwise equality: {lacks_exact_kernels()}")

EXACT = {"Conv", "Gemm", "MatMul", "Add", "Mul", "Concat", "GlobalAveragePool", "MaxPool"}
"""Operators that runtimes compute on codes as integers, and the reference bit for bit."""
MOVES = {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Pad", "Gather", "Expand", "Identity"}


class Built:
    """A one-operator graph drawn by `draw`, and its inputs; quantizers surround the operator if `on_codes`."""

    def __init__(self, draw):
        self.draw, self.random = draw, np.random.default_rng(draw(st.integers(0, 2**16)))
        self.inputs, self.constants, self.nodes, self.feeds = [], [], [], {}
        self.on_codes = False

    def pick(self, *choices):
        return self.draw(st.sampled_from(choices))

    def count(self, least, most):
        return self.draw(st.integers(least, most))

    def counts(self, least, most, size):
        return self.draw(st.lists(st.integers(least, most), min_size=size, max_size=size))

    def shape(self, least=1, most=4, smallest=1):
        return self.draw(st.lists(st.integers(smallest, 4), min_size=least, max_size=most))

    def x(self, shape):
        """An operand that depends on the input."""
        name = f"x{len(self.inputs)}"
        self.feeds[name] = self.random.normal(0, 3, shape).astype(np.float32)
        self.inputs.append(ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT)))
        return self.dequantized(self.quantized(self.inputs[-1])) if self.on_codes else self.inputs[-1]

    def constant(self, array, kind=None):
        tensor = ir.tensor(np.asarray(array, kind), name=f"c{len(self.constants)}")
        self.constants.append(ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor))
        return self.constants[-1]

    def integers(self, array):
        return self.constant(array, np.int64)

    def node(self, kind, inputs, settings):
        node = ir.node(kind, inputs, settings, name=f"{kind.lower()}.{len(self.nodes)}")
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def quantized(self, value):
        grid = [self.constant(self.random.uniform(0.01, 0.1), np.float32), self.constant(self.random.integers(0, 256), np.uint8)]
        return self.node("QuantizeLinear", [value, *grid], {})

    def dequantized(self, codes):
        return self.node("DequantizeLinear", [codes, *self.nodes[-1].inputs[1:]], {})

    def weight(self, shape, axis):
        """A layer's weight; in an integer layer codes, with an int32 bias added after it."""
        if not self.on_codes:
            return [self.constant(self.random.normal(size=shape), np.float32), *self.bias(shape[axis])]
        size, unit = shape[axis], self.nodes[-1].inputs[1]
        scale, zeros = self.constant(self.random.uniform(0.01, 0.1, size), np.float32), self.constant(np.zeros(size), np.int8)
        codes = self.constant(self.random.integers(-128, 128, shape), np.int8)
        weight = self.node("DequantizeLinear", [codes, scale, zeros], {"axis": axis})
        bias = self.constant(self.random.integers(-500, 500, size), np.int32)
        units = self.constant(scale.const_value.numpy() * unit.const_value.numpy(), np.float32)
        return [weight, self.node("DequantizeLinear", [bias, units, self.constant(np.zeros(size), np.int32)], {"axis": 0})]

    def bias(self, size):
        return [self.constant(self.random.normal(size=size), np.float32)] if self.pick(False, True) else []

    def model(self, outputs):
        graph = ir.Graph(self.inputs, outputs, nodes=self.nodes, initializers=self.constants, opset_imports={"": OPSET}, name="one")
        return ir.Model(graph, ir_version=IR_VERSION)


def windows(built, spatial):
    """Return (settings of an operator with windows, the sizes of its spatial dimensions)."""
    kernel, padding = built.counts(1, 3, spatial), built.pick("pads", "pads", "even", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")
    pads = {"auto_pad": padding}
    if padding in ("pads", "even"):
        begins = [built.count(0, size // 2) for size in kernel]
        pads = {"pads": begins + (begins if padding == "even" else [built.count(0, size // 2) for size in kernel])}
    strides = [
        built.count(1, size if "SAME" in padding else 3) for size in kernel
    ]  # the runtime computes a negative padding for longer ones
    return {"kernel_shape": kernel, "strides": strides, **pads}, built.counts(5, 8, spatial)


def pooling(kind, built):
    spatial = built.count(1, 3)
    chosen, sizes = windows(built, spatial)
    chosen["ceil_mode"] = built.count(0, 1) if "pads" in chosen else 0
    if kind == "AveragePool":
        chosen["count_include_pad"] = built.count(0, 1)
        x = built.x([2, 3, *sizes])
        wrong = chosen["ceil_mode"] and chosen["count_include_pad"]  # on integers, which the writer prevents
        return [built.node("Max", [x], {}) if wrong else x], chosen
    if kind == "MaxPool" and "SAME" not in chosen.get("auto_pad", ""):
        chosen["dilations"] = built.counts(1, 2, spatial)
    return [built.x([2, 3, *sizes])], chosen


def convolution(kind, built):
    spatial, group, transposed = built.count(1, 2 if built.on_codes else 3), built.pick(1, 2, 4), kind == "ConvTranspose"
    chosen, sizes = windows(built, spatial)
    chosen |= {"group": group}
    if "SAME" not in chosen.get("auto_pad", ""):
        chosen["dilations"] = built.counts(1, 2, spatial)
    if transposed:
        chosen = {**chosen, "auto_pad": "NOTSET"}
        chosen["output_padding"] = [built.count(0, stride - 1) for stride in chosen["strides"]]
        x = built.node("Max", [built.x([2, 4, *sizes])], {})  # as the writer does: the runtime would quantize such weights by itself
        wide = built.count(1, 2)
        weight = built.constant(built.random.normal(size=[4, wide, *chosen["kernel_shape"]]), np.float32)
        return [x, weight, *built.bias(wide * group)], chosen
    return [built.x([2, 4, *sizes]), *built.weight([built.count(1, 2) * group, 4 // group, *chosen["kernel_shape"]], 0)], chosen


def linear(kind, built):
    rows, inner, outer = built.counts(1, 4, 3)
    if kind == "MatMul":
        lead = built.shape(0, 2)
        return [built.x([*lead, rows, inner]), built.weight([inner, outer], 1)[0]], {}
    if built.on_codes:
        return [built.x([rows, inner]), *built.weight([inner, outer], 1)], {}
    turned = built.count(0, 1)
    operands = [built.x([inner, rows] if turned else [rows, inner]), *built.weight([inner, outer], 1)]
    return operands, {"transA": turned, "alpha": built.pick(1.0, 0.5), "beta": built.pick(1.0, 2.0)}


def joining(kind, built):
    shape = built.shape()
    if kind == "Concat":
        axis = built.count(-len(shape), len(shape) - 1)
        sizes = [shape] + [[built.count(1, 3) if i == axis % len(shape) else size for i, size in enumerate(shape)] for _ in range(2)]
        return [built.x(each) for each in sizes[: built.count(1, 3)]], {"axis": axis}
    other = [built.pick(1, size) for size in shape][built.count(0, len(shape)) :]
    operands = [built.x(shape), built.x(other)]
    return operands if built.pick(True, False) else operands[::-1], {}


def reshaping(kind, built):
    shape = built.shape(2)
    if kind == "Flatten":
        return [built.x(shape)], {"axis": built.count(-len(shape), len(shape))}
    if kind == "Transpose":
        return [built.x(shape)], built.pick({}, {"perm": built.draw(st.permutations(range(len(shape))))})
    if kind == "Squeeze":
        shape = [built.pick(1, size) for size in shape]
        axes = [axis - built.pick(0, len(shape)) for axis, size in enumerate(shape) if size == 1 and built.pick(True, False)]
        return [built.x(shape), *([built.integers(axes)] if axes else [])], {}
    if kind == "Unsqueeze":
        total = len(shape) + built.count(1, 2)
        axes = built.draw(st.permutations(range(total)))[: total - len(shape)]
        return [built.x(shape), built.integers([axis - built.pick(0, total) for axis in axes])], {}
    if kind == "Expand":
        narrow = [built.pick(1, size) for size in shape]
        wide = [built.count(1, 3) if size == 1 else built.pick(1, size) for size in narrow]
        return [built.x(narrow), built.integers(built.pick([], [2]) + wide)], {}
    sizes = built.pick([math.prod(shape[:2]), *shape[2:]], [0, *shape[1:]], [1, *shape], shape[::-1])
    return [built.x(shape), built.integers(built.pick(sizes, [*sizes[:-1], -1]))], {}


def taking(kind, built):
    shape = built.shape(smallest=2)
    some = built.draw(st.permutations(range(len(shape))))[: built.count(1, len(shape))]
    axes = built.integers([axis - built.pick(0, len(shape)) for axis in some])
    if kind == "Gather":
        axis = built.count(-len(shape), len(shape) - 1)
        index = built.random.integers(-shape[axis], shape[axis], built.pick((), (1,), (2, 2)))
        return [built.x(shape), built.constant(index, built.pick(np.int32, np.int64))], {"axis": axis}
    if kind == "Slice":
        far = 2**63
        steps = [built.pick(1, 2, -1, -2) for _ in some] if built.pick(True, False) else [1] * len(some)
        ends = [built.pick(1, 2, 9, -1, far - 1) if step > 0 else built.pick(0, 1, -2, -far) for step in steps]
        rest = [built.integers(built.counts(-4, 3, len(some))), built.integers(ends)]
        return [built.x(shape), *rest, axes, *([built.integers(steps)] if set(steps) != {1} else [])], {}
    mode, every = built.pick("constant", "constant", "reflect", "edge", "wrap"), built.pick(True, False)
    pads = built.counts(-1 if mode == "constant" else 0, 1, 2 * len(shape if every else some))
    value = None if mode != "constant" else built.pick(None, built.constant(0, np.float32))
    return [built.x(shape), built.integers(pads), *([value] if every else [value, axes])], {"mode": mode}


def clamping(kind, built):
    ends = [built.pick(None, -1.0, 0.0), built.pick(None, 0.5, 6.0)] if kind == "Clip" else []
    return [built.x(built.shape()), *(None if end is None else built.constant(end, np.float32) for end in ends)], {}


def reducing(kind, built):
    shape = built.shape(3)
    if kind == "GlobalAveragePool":
        return [built.x(shape)], {}
    axes = built.draw(st.permutations(range(-len(shape), 0)))[: built.count(1, len(shape))]
    return [built.x(shape), built.integers(axes)], {"keepdims": built.count(0, 1)}


def resizing(kind, built):
    shape = [1, 4, built.count(2, 5), built.count(2, 5)]
    if kind == "DepthToSpace":
        return [built.x(shape)], {"blocksize": 2, "mode": built.pick("DCR", "CRD")}
    sizes = built.integers([1, 4, built.count(1, 9), built.count(1, 9)])
    mode = built.pick({"mode": "linear"}, {"mode": "nearest", "nearest_mode": built.pick("floor", "round_prefer_floor")}, {"mode": "cubic"})
    place = built.pick("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
    return [built.x(shape), None, None, sizes], mode | {"coordinate_transformation_mode": place}


def choosing(kind, built):
    shape = built.shape()
    return [built.constant(built.random.integers(0, 2, shape), bool), built.x(shape), built.x(shape)], {}


KINDS = {
    "MaxPool": pooling, "AveragePool": pooling, "Conv": convolution, "ConvTranspose": convolution, "Gemm": linear, "MatMul": linear,
    "Add": joining, "Mul": joining, "Sub": joining, "Concat": joining, "Reshape": reshaping, "Flatten": reshaping, "Transpose": reshaping,
    "Squeeze": reshaping, "Unsqueeze": reshaping, "Expand": reshaping, "Gather": taking, "Slice": taking, "Pad": taking, "Clip": clamping,
    "Relu": clamping, "Identity": clamping, "Max": clamping, "Softmax": clamping, "Sigmoid": clamping, "LeakyRelu": clamping,
    "GlobalAveragePool": reducing, "ReduceMean": reducing, "ReduceMax": reducing,
    "ReduceSum": reducing, "Resize": resizing, "DepthToSpace": resizing, "Where": choosing, "Tanh": clamping,
}  # fmt: skip


def test_every_implemented_operator_is_compared():
    assert set(_OPERATORS) - set(KINDS) == {"QuantizeLinear", "DequantizeLinear", "Cast"}


def compared(built, output):
    """Return (the graph's output from the reference, that from the runtime)."""
    model = built.model([output])
    try:
        runtime = session(model).run(None, built.feeds)[0]
    except Exception:  # many kinds, for settings that the runtime rejects
        assume(False)
    ours = interpret(model, {name: torch.from_numpy(array) for name, array in built.feeds.items()}).values[output.name].numpy()
    assert (ours.shape, ours.dtype) == (runtime.shape, runtime.dtype)
    return ours, runtime


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_reference_agrees_with_the_runtime_on_floats(kind, data):
    built = Built(data.draw)
    operands, chosen = KINDS[kind](kind, built)
    output = built.node(kind, operands, chosen)
    output.type = ir.TensorType(ir.DataType.FLOAT)
    assert np.allclose(*compared(built, output), rtol=1e-4, atol=1e-4)


@exactly
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_reference_agrees_with_the_runtime_on_codes(kind, data):
    built = Built(data.draw)
    built.on_codes = True
    operands, chosen = KINDS[kind](kind, built)
    output = built.quantized(built.node(kind, operands, chosen))
    output.type = ir.TensorType(ir.DataType.UINT8)
    reference, runtime = compared(built, output)
    assert np.abs(reference.astype(int) - runtime).max(initial=0) <= (0 if kind in EXACT else 1)


@exactly
@pytest.mark.parametrize("kind", sorted(MOVES | {"MaxPool"}))
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_operators_that_move_codes_equal_the_runtime(kind, data):
    built = Built(data.draw)
    operands, chosen = KINDS[kind](kind, built)
    codes = built.quantized(operands[0])
    zero = [built.nodes[-1].inputs[2]] if kind == "Pad" and chosen["mode"] == "constant" and len(operands) > 2 else operands[2:3]
    output = built.node(kind, [codes, *operands[1:2], *zero, *operands[3:]], chosen)
    output.type = ir.TensorType(ir.DataType.UINT8)
    assert np.array_equal(*compared(built, output))


@pytest.mark.parametrize("width", [8, 600, 9000])
def test_sums_are_exact_at_every_width(width):
    x = torch.randint(-255, 256, (3, width), generator=torch.Generator().manual_seed(0))
    weight = torch.randint(100, 128, (width, 2), generator=torch.Generator().manual_seed(1))
    x[0] = 255
    assert torch.equal(_exact(torch.matmul, x.int(), weight.int(), width), x @ weight)


@pytest.mark.parametrize("pool", ["GlobalAveragePool", "AveragePool<kernel_shape=[4,4]>", "MaxPool<kernel_shape=[4,4]>"])
def test_pool_reads_a_product_of_codes_that_nothing_rounds(pool):
    text = f"""<ir_version: 10, opset_import: ["": 21]> pooled (float[1,2,4,4] x) => (float[1,2,1,1] y)
        <float s = {{0.1}}, uint8 z = {{128}}> {{
        codes = QuantizeLinear(x, s, z)  numbers = DequantizeLinear(codes, s, z)  product = Mul(numbers, numbers)  y = {pool}(product) }}"""
    graph, x = ir.from_proto(onnx.parser.parse_model(text)), torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    (expected,) = session(graph).run(None, {"x": x.numpy()})
    assert np.allclose(interpret(graph, {"x": x}).values["y"].numpy(), expected, rtol=1e-5)
