"""The product of two activations as a layer, so that each operand can have a quantizer: what attention computes twice.

`huggingface` puts two of them into every attention layer of a transformers model. A network of one's own is covered by calling one in
place of `@`.
"""

from torch import Tensor, nn


class Matmul(nn.Module):
    """`left @ right`, or `left @ right.mT` with `transposed`: [..., n, k] and [..., k, m] ([..., m, k] transposed) -> [..., n, m].

    Tokens run along the last dimension but one of both operands, so `transposed` is for queries and keys.
    """

    weight = None  # as other layers have one

    def __init__(self, transposed: bool = False):
        super().__init__()
        self.transposed = transposed

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ (right.mT if self.transposed else right)

    def extra_repr(self) -> str:
        return "left @ right.mT" if self.transposed else "left @ right"
