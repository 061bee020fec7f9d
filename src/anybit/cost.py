"""What a layer costs at a precision: bits, bytes of the file, BOPs.

`scheme.py` states what each quantity counts. Everything here is exact: `file_size` of a scheme is the size that `checkpoint` writes.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import nn

from anybit.layers import QuantizedLayer, float_weight, weight_rows
from anybit.matmul import Matmul
from anybit.packing import PACKED_METADATA, StoredLayer, TensorSpec, file_bytes, layout, packed_bytes
from anybit.scheme import FLOAT_BITS, Precision, Scheme
from anybit.wiring import Wiring

STORED_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16",
}  # fmt: skip


@dataclass(frozen=True)
class LayerSize:
    """Weight as rows x columns, multiply-accumulates of one sample, and how many activations it reads (two of a matmul)."""

    rows: int
    columns: int
    macs: int
    operands: int = 1

    @property
    def weights(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Step:
    """One observed operation: the layer that it is, if it is one, the values that it reads and makes, by number, and how many numbers of
    one sample each of those it makes has."""

    layer: str | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    numbers: int


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one forward pass of one sample, measured on one machine with one runtime.

    layers    name -> {"float32": seconds, "int8": seconds}; bits below 8 run as int8
    rest      the same of everything that is no layer
    boundary  seconds for each number that goes from float to integers or back
    steps     the network's operations, in order: which numbers do that follows from which layers are float
    fixed     layers that compute in float whatever is chosen;   products  layers without weights
    """

    layers: Mapping[str, Mapping[str, float]]
    rest: Mapping[str, float]
    boundary: float
    steps: Sequence[Step] = ()
    fixed: Sequence[str] = ()
    products: Sequence[str] = ()

    def kernel(self, name: str, precision: Precision) -> str:
        """What the layer runs as."""
        return kernel_class(precision, name in self.products)

    def layer(self, name: str, precision: Precision) -> float:
        """The layer's seconds; of a float one with both its boundaries, as if its neighbours computed on integers."""
        kernel = self.kernel(name, precision)
        return self.layers[name][kernel] + (self.boundary * self.crossing([name]) if kernel == "float32" else 0.0)

    def total(self, scheme: Mapping[str, Precision]) -> float:
        """Predicted seconds. Float layers that feed each other share no boundary."""
        floats = [name for name, precision in scheme.items() if self.kernel(name, precision) == "float32"]
        if len(floats) == len(scheme):
            return self.rest["float32"] + sum(self.layers[name]["float32"] for name in scheme)
        kernels = sum(self.layers[name][self.kernel(name, precision)] for name, precision in scheme.items())
        return self.rest["int8"] + kernels + self.boundary * self.crossing(floats)

    def crossing(self, floats: Iterable[str]) -> int:
        """Numbers of one sample that cross between float and integers where these layers are float, beyond those that do in any case."""
        return max(0, self._crossing({*floats, *self.fixed}) - self._crossing(set(self.fixed)))

    def _crossing(self, floats: Set[str]) -> int:
        """What is given is float and crosses for nothing; a function of one value stays where that is; a join is on integers where one of
        its values is."""
        kinds: dict[int, str] = {}
        crossed: set[int] = set()
        numbers = {value: step.numbers for step in self.steps for value in step.outputs}
        for step in self.steps:
            read = {kinds[value] for value in step.inputs if value in kinds}
            if step.layer is not None:
                kind = "float32" if step.layer in floats else "int8"
            else:
                kind = "int8" if "int8" in read else "float32" if read else None
            crossed |= {value for value in step.inputs if kinds.get(value, kind) != kind}
            kinds |= dict.fromkeys(step.outputs, kind) if kind else {}
        return sum(numbers[value] for value in crossed)


def kernel_class(precision: Precision, product: bool = False) -> str:
    """What a layer runs as: "int8" where input and weights (a product has none) are quantized, whatever the bits, else "float32"."""
    return "int8" if precision.activation_bits is not None and (product or precision.weight_bits is not None) else "float32"


@dataclass(frozen=True)
class CostModel:
    """Costs of every scheme of one prepared model.

    layers       name -> LayerSize, in the scheme's order
    leftover     float32 numbers of the state dict that are no covered weight (biases, norms, uncovered layers)
    others       entries of another type, stored under their own keys
    edges        number of stored edge ranges
    float_bytes  of the float32 weights' file
    latency      measured on this machine, where it was
    """

    layers: Mapping[str, LayerSize]
    leftover: int
    others: Mapping[str, TensorSpec]
    edges: int
    float_bytes: int
    latency: LatencyTable | None = None

    @classmethod
    def of(cls, prepared: nn.Module, names: list[str], wiring: Wiring | None, edges: int, float_model: nn.Module) -> "CostModel":
        """Measure `prepared`, whose layers `names` have slots; `wiring` gives the shapes, `float_model` the size to compare with.

        Without a wiring nothing is known of multiply-accumulates: they count 0.
        """
        layers = {}
        for name in names:
            layer = prepared.get_submodule(name)
            rows = weight_rows(layer, float_weight(layer))
            macs = macs_per_sample(layer, name, wiring) if wiring else 0
            layers[name] = LayerSize(rows.shape[0], rows.shape[1], macs, operands_of(layer))
        float32 = [name for name in names if float_weight(prepared.get_submodule(name)).dtype == torch.float32]
        leftover, others = leftovers(prepared, float32)  # a weight of another type is kept, under its own key
        numbers = sum(tensor.numel() for tensor in leftover.values())
        float_state = {key: TensorSpec(STORED_TYPES[t.dtype], tuple(t.shape)) for key, t in float_model.state_dict().items()}
        return cls(layers, numbers, {key: spec_of(t) for key, t in others.items()}, edges, file_bytes(float_state))

    def weight_bits(self, scheme: Scheme) -> float:
        """Mean stored bits of a weight."""
        total = sum(self.layers[name].weights for name in scheme)
        return sum(self.layers[name].weights * precision.stored_weight_bits for name, precision in scheme.items()) / total

    def bops(self, scheme: Scheme) -> int:
        """Bit operations of one sample."""
        return sum(self.layer_bops(name, precision) for name, precision in scheme.items())

    def layer_bops(self, name: str, precision: Precision) -> int:
        """Multiply-accumulates times weight bits times activation bits; of a matmul, times the bits of either operand."""
        size, activation_bits = self.layers[name], precision.activation_bits or FLOAT_BITS
        return size.macs * (activation_bits if size.operands == 2 else precision.stored_weight_bits) * activation_bits

    def layer_bytes(self, name: str, precision: Precision) -> int:
        """Bytes that the layer's weight and quantizers add to the file, its share of the header aside."""
        size = self.layers[name]
        inputs = 5 * size.operands if precision.activation_bits else 0
        if precision.weight_bits is None:
            return size.weights * 4 + inputs
        return packed_bytes(size.weights, precision.weight_bits) + (4 * size.rows if precision.weight_bits else 0) + inputs

    def file_size(self, scheme: Scheme) -> int:
        """Exact bytes of model.safetensors."""
        stored = [
            StoredLayer(size.rows, size.columns, precision.weight_bits, size.operands * bool(precision.activation_bits))
            for name, precision in scheme.items()
            for size in [self.layers[name]]
        ]
        kept_float = sum(
            self.layers[name].weights
            for name, precision in scheme.items()
            if precision.weight_bits is None and f"{name}.weight" not in self.others
        )
        return file_bytes(layout(stored, self.edges, self.leftover + kept_float, self.others), PACKED_METADATA)

    def overhead(self, scheme: Scheme) -> int:
        """Bytes of the file that no choice of bits changes, a few bytes of header aside."""
        return self.file_size(scheme) - sum(self.layer_bytes(name, precision) for name, precision in scheme.items())

    def summary(self, scheme: Scheme) -> dict:
        """All quantities of one scheme, for a report."""
        size = self.file_size(scheme)
        return {
            "weight_bits": self.weight_bits(scheme),
            "bytes": size,
            "percent": 100 * size / self.float_bytes,
            "bops": self.bops(scheme),
        } | ({"latency": self.latency.total(scheme)} if self.latency else {})


def macs_per_sample(layer: nn.Module, name: str, wiring: Wiring) -> int:
    """Multiply-accumulates of one sample, from the observed shapes; none for an embedding."""
    operation = wiring.operation(name)
    if isinstance(layer, nn.Embedding):
        return 0
    weights = float_weight(layer).numel()
    if isinstance(layer, Matmul):
        return _product(operation.shape) * wiring.input_shapes[name][-1] // wiring.batch_size
    if isinstance(layer, nn.Linear):
        return weights * _product(operation.shape[:-1]) // wiring.batch_size
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return weights * _product(wiring.input_shapes[name][2:])
    return weights * _product(operation.shape[2:])


def operands_of(layer: nn.Module) -> int:
    """How many activations a layer reads."""
    return 2 if isinstance(layer, Matmul) else 1


def _product(numbers) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """Stored type and shape of a tensor."""
    return TensorSpec(STORED_TYPES[tensor.dtype], tuple(tensor.shape))


def leftovers(prepared: nn.Module, names: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The state dict without the weights of layers `names` and without quantizers: (float32 entries, all others), in its order."""
    coded = {id(prepared.get_submodule(name)) for name in names}
    places = [(name, module) for name, module in prepared.named_modules(remove_duplicate=False) if isinstance(module, QuantizedLayer)]
    skipped = {f"{name}.weight" for name, module in places if id(module) in coded}  # under every name that the network has for it
    quantizers = tuple(f"{name}.{slot}_quantizer." for name, _ in places for slot in ("weight", "input"))
    float32, others = {}, {}
    for key, tensor in prepared.state_dict().items():
        if key not in skipped and not key.startswith(quantizers):
            (float32 if tensor.dtype == torch.float32 else others)[key] = tensor
    return float32, others
