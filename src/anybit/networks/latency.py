"""Measured latency of layers, and the table that stores it."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from anybit.scheme import Precision


@dataclass(frozen=True)
class OperationFlow:
    """One observed operation: its layer, if it is one, the numbers of the values that it reads and creates, and the size of each created
    value for one sample."""

    layer: str | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    numbers: int


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one forward pass of one sample, measured on one machine with one runtime.

    layers    name -> {"float32": seconds, "int8": seconds}; bits below 8 run as int8
    rest      the same for everything outside of layers
    boundary  seconds for each number converted between float and integers
    steps     the network's operations, in order; with the float layers they determine which numbers are converted
    fixed     layers that compute in float at every choice;   products  layers without weights
    """

    layers: Mapping[str, Mapping[str, float]]
    rest: Mapping[str, float]
    boundary: float
    steps: Sequence[OperationFlow] = ()
    fixed: Sequence[str] = ()
    products: Sequence[str] = ()

    def kernel(self, name: str, precision: Precision) -> str:
        """Return the layer's kernel, "int8" or "float32"."""
        return kernel_class(precision, name in self.products)

    def layer(self, name: str, precision: Precision) -> float:
        """Return the layer's seconds; a float layer's include both its boundaries, as if its neighbours computed on integers."""
        kernel = self.kernel(name, precision)
        return self.layers[name][kernel] + (self.boundary * self.crossing([name]) if kernel == "float32" else 0.0)

    def total(self, scheme: Mapping[str, Precision]) -> float:
        """Return the predicted seconds. Adjacent float layers share no boundary."""
        floats = [name for name, precision in scheme.items() if self.kernel(name, precision) == "float32"]
        if len(floats) == len(scheme):
            return self.rest["float32"] + sum(self.layers[name]["float32"] for name in scheme)
        kernels = sum(self.layers[name][self.kernel(name, precision)] for name, precision in scheme.items())
        return self.rest["int8"] + kernels + self.boundary * self.crossing(floats)

    def crossing(self, floats: Iterable[str]) -> int:
        """Count the numbers of one sample that are converted between float and integers because these layers are float."""
        return max(0, self._crossing({*floats, *self.fixed}) - self._crossing(set(self.fixed)))

    def _crossing(self, floats: Set[str]) -> int:
        """Count all conversions. Inputs are free; functions of one input stay on its side; a join is integer if any operand is."""
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
    """Return "int8" if input and weights (a product has none) are quantized to any bits, else "float32"."""
    return "int8" if precision.activation_bits is not None and (product or precision.weight_bits is not None) else "float32"
