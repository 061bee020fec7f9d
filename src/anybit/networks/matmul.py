"""The product of two activations as a layer, so that each operand can have a quantizer; attention computes two of them.

`huggingface` and `rewrites` insert them where a network multiplies two activations. Your own network can call one in place of `@`.
"""

import torch
from torch import Tensor, nn


class Matmul(nn.Module):
    """`left @ right`, or `left @ right.mT` with `transposed`: [..., n, k] and [..., k, m] ([..., m, k] transposed) -> [..., n, m].

    Tokens are the last dimension but one of both operands, so use `transposed` for queries and keys.
    """

    weight = None  # other layers have one

    def __init__(self, transposed: bool = False):
        super().__init__()
        self.transposed = transposed

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ (right.mT if self.transposed else right)

    def extra_repr(self) -> str:
        return "left @ right.mT" if self.transposed else "left @ right"


def attend(
    products: tuple[Matmul, Matmul],
    operands: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
    grouped: bool = False,
) -> Tensor:
    """Compute scaled_dot_product_attention of (query, key, value) [..., heads, T, d] with two Matmuls: of scores and of their mixture."""
    query, key, value = operands
    if grouped:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = products[0](query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    return products[1](nn.functional.dropout(scores.softmax(-1), dropout), value)
