"""Measured latency of layers, and the file that keeps it."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from anybit.scheme import Precision


@dataclass(frozen=True)
class OperationFlow:
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
    steps: Sequence[OperationFlow] = ()
    fixed: Sequence[str] = ()
    products: Sequence[str] = ()

    def kernel(self, name: str, precision: Precision) -> str:
        """Return the layer's kernel: "int8" or "float32"."""
        return kernel_class(precision, name in self.products)

    def layer(self, name: str, precision: Precision) -> float:
        """Return the layer's seconds; of a float one with both its boundaries, as if its neighbours computed on integers."""
        kernel = self.kernel(name, precision)
        return self.layers[name][kernel] + (self.boundary * self.crossing([name]) if kernel == "float32" else 0.0)

    def total(self, scheme: Mapping[str, Precision]) -> float:
        """Predicted seconds. Adjacent float layers share no boundary."""
        floats = [name for name, precision in scheme.items() if self.kernel(name, precision) == "float32"]
        if len(floats) == len(scheme):
            return self.rest["float32"] + sum(self.layers[name]["float32"] for name in scheme)
        kernels = sum(self.layers[name][self.kernel(name, precision)] for name, precision in scheme.items())
        return self.rest["int8"] + kernels + self.boundary * self.crossing(floats)

    def crossing(self, floats: Iterable[str]) -> int:
        """Numbers of one sample that cross between float and integers where these layers are float, beyond those that do in any case."""
        return max(0, self._crossing({*floats, *self.fixed}) - self._crossing(set(self.fixed)))

    def _crossing(self, floats: Set[str]) -> int:
        """Inputs cross free; one-input functions stay on their input's side; a join is integer if any operand is."""
        kinds: dict[int, str] = {}
        crossed: set[int] = set()
        numbers = {value: step.numbers for step in self.steps for value in step.outputs}
        kind: str | None
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
    """Return what a layer runs as: "int8" where input and weights (a product has none) are quantized, whatever the bits, else "float32"."""
    return "int8" if precision.activation_bits is not None and (product or precision.weight_bits is not None) else "float32"
