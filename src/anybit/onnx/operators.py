"""The ONNX operators of layers, and the properties of each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerOperator:
    """transposed  whether an integer weight is stored [fan-in, channels]
    integer     whether runtimes have a kernel of it on integers
    lookup      whether it looks up rows of the weight, which then comes first of its inputs, and computes nothing
    """

    transposed: bool = False
    integer: bool = True
    lookup: bool = False

    @property
    def weight_input(self) -> int:
        """Which of its inputs the weight is."""
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
    """Look up an operator; of one that no layer becomes, that it has no kernel on integers."""
    return LAYER_OPERATORS.get(kind, NO_LAYER)
