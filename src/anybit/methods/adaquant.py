"""AdaQuant: a rounding of freely trained weights.

    argmin over V, weight scale, input scale, bias      || W X - Q(W + V) Q(X) ||^2

V is free and continuous, so a weight may move by more than one level (AdaRound only chooses up or down).

Source: Hubara, Nahshan, Hanani, Banner, Soudry, "Accurate Post Training Quantization With Small Calibration Sets", ICML 2021, eq. 2 and
section 3.1. Deviations, each justified by the benchmarks; more are in the loop (`loops.reconstruction`):

  * The weight is trained in units of its own step, v = (W + V) / scale, and the scale as a logarithm, so that one learning rate fits every
    layer and bit-width (the paper's absolute 1e-5 cannot move a 2-bit weight).
  * Whole blocks are reconstructed if there are any; the error is measured after the activation that follows.
"""

from typing import Any

import torch
from torch import Tensor, nn

from anybit.numerics.affine import fake_quantize
from anybit.numerics.quantizers import UniformQuantizer


class AdaQuant(nn.Module):
    """Q(W + V) with v = (W + V) / scale, [channels, fan-in], and log(scale), [channels, 1], free.

    weight_rate, scale_rate   Adam's learning rates: of v, in steps, and of log(scale)
    """

    resumes = True  # a weight at its code stays until its gradient moves it

    def __init__(self, start: Tensor, quantizer: UniformQuantizer, weight_rate: float = 1e-2, scale_rate: float = 1e-3):
        super().__init__()
        self.bits, self.limits = quantizer.bits, quantizer.limits
        self.weight_rate, self.scale_rate = weight_rate, scale_rate
        self.in_steps = nn.Parameter(start.clone())
        self.log_scale = nn.Parameter(quantizer.scale.log())

    def forward(self, rows: Tensor) -> Tensor:
        """Return the rounded weight, with straight-through gradients."""
        one, zero = torch.ones((), dtype=rows.dtype), torch.zeros((), dtype=rows.dtype)
        return fake_quantize(self.in_steps, one, zero, *self.limits) * self.log_scale.exp()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the free weight and the scale, each with its rate."""
        return [{"params": [self.in_steps], "lr": self.weight_rate}, {"params": [self.log_scale], "lr": self.scale_rate}]

    def penalty(self, progress: float) -> None:
        """Add nothing: the weight is rounded from the first step on."""

    def freeze(self, rows: Tensor) -> tuple[Tensor, UniformQuantizer]:
        """Return the rounded weight and its quantizer."""
        return self(rows), UniformQuantizer(self.bits, True, self.log_scale.exp())
