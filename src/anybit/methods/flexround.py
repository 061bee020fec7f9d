"""FlexRound: learn for each weight a divisor that is applied before rounding.

    W~ = s1 clip(round(W / (s1 S2 s3)), quant_min, quant_max)
    argmin over s1, S2, s3      || W X - W~ X ||^2

s1 is the scale of the codes, [channels, 1]; S2, [channels, fan-in], and s3, [channels, 1], are factors of 1 at the start, so that the
initial weight is the float one rounded to nearest. A weight may move by several levels. Since the weight is
divided, the gradient to its factor is proportional to it: large weights move far, small ones little, and a weight of zero stays.

Source: Lee, Kim, Kwon, Lee, "FlexRound: Learnable Rounding based on Element-wise Division for Post-Training Quantization", ICML 2023
(arXiv 2306.00317), section 3. Deviations; more are in the loop (`loops.reconstruction`):

  * There is one scale of codes per channel (published: mostly one per tensor), so that s3 differs from it only in the divisor.
  * Convolutions have no factor s4 of each input channel: a rounding sees rows of weights, not kernels, and S2 includes it.
  * Factors are trained as logarithms, which keeps them positive; their rates are our own, for hundreds of steps (the
    published ones are unknown).
  * The sequential form starts at the float weights, whatever the parallel form's result: no division moves a code of zero.
"""

from typing import Any

import torch
from torch import Tensor, nn

from anybit.numerics.affine import fake_quantize
from anybit.numerics.quantizers import UniformQuantizer


class FlexRound(nn.Module):
    """s1 round(W / (s1 S2 s3)), with the logarithms of s1, S2 and s3 free.

    factor_rate, scale_rate   Adam's learning rates: of log S2 and log s3, and of log s1
    """

    weight: Tensor
    resumes = False

    def __init__(self, start: Tensor, quantizer: UniformQuantizer, factor_rate: float = 3e-3, scale_rate: float = 1e-3):
        super().__init__()
        self.bits, self.limits = quantizer.bits, quantizer.limits
        self.factor_rate, self.scale_rate = factor_rate, scale_rate
        self.register_buffer("weight", start * quantizer.scale)
        self.log_scale = nn.Parameter(quantizer.scale.log())
        self.log_factors = nn.Parameter(torch.zeros_like(start))
        self.log_row_factors = nn.Parameter(torch.zeros_like(quantizer.scale))

    def forward(self, rows: Tensor) -> Tensor:
        """Return the rounded weight, with straight-through gradients."""
        scale = self.log_scale.exp()
        divided = self.weight / (scale * (self.log_factors + self.log_row_factors).exp())
        one, zero = torch.ones((), dtype=rows.dtype, device=rows.device), torch.zeros((), dtype=rows.dtype, device=rows.device)
        return fake_quantize(divided, one, zero, *self.limits) * scale

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the factors and the scale, each with its rate."""
        factors = [self.log_factors, self.log_row_factors]
        return [{"params": factors, "lr": self.factor_rate}, {"params": [self.log_scale], "lr": self.scale_rate}]

    def penalty(self, progress: float) -> None:
        """Add nothing: the weight is rounded from the first step on."""

    def freeze(self, rows: Tensor) -> tuple[Tensor, UniformQuantizer]:
        """Return the rounded weight and its quantizer."""
        return self(rows), UniformQuantizer(self.bits, True, self.log_scale.exp())
