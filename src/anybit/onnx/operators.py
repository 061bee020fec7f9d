"""The ONNX operators of layers, and the properties of each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerOperator:
    """transposed  whether an integer weight is stored [fan-in, channels]
    integer     whether runtimes have an integer kernel for it
    lookup      whether it only looks up rows of the weight, which is then its first input
    """

    transposed: bool = False
    integer: bool = True
    lookup: bool = False

    @property
    def weight_input(self) -> int:
        """Return the index of the weight among the inputs."""
        return 0 if self.lookup else 1


LAYER_OPERATORS = {
    "Conv": LayerOperator(),
    "ConvTranspose": LayerOperator(integer=False),
    "Gemm": LayerOperator(transposed=True),
    "MatMul": LayerOperator(transposed=True),
    "Gather": LayerOperator(integer=False, lookup=True),
}
NO_LAYER = LayerOperator(integer=False)


def layer_operator(kind: str) -> LayerOperator:
    """Return the properties of an operator; one that no layer becomes has no integer kernel."""
    return LAYER_OPERATORS.get(kind, NO_LAYER)
