"""AdaRound: learn for each weight whether it is rounded down or up.

    W~ = s clip(floor(W / s) + h(V), quant_min, quant_max)                h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)
    argmin over V      || W X - W~ X ||^2  +  lambda sum over weights of  1 - |2 h(V) - 1|^beta
    final codes:       floor(W / s), plus 1 where h(V) >= 0.5             zeta = 1.1, gamma = -0.1

V, [channels, fan-in], starts where h(V) is the fraction W / s - floor(W / s), so that the initial weight is the float one. A high beta
leaves all but nearly decided weights free; as beta falls, the penalty decides one after the other.

Source: Nagel, Amjad, van Baalen, Louizos, Blankevoort, "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020,
eq. 21 to 25; beta falls from 20 to 2 along a cosine after a warm-up of a fifth of the steps, and lambda is 0.01, as in its authors'
toolkit. Deviations; more are in the loop (`loops.reconstruction`):

  * The squared error is relative to the target's power, but lambda is not adapted to that.
  * Adam's rate is ten times the toolkit's, 0.1, for hundreds of steps instead of 10,000, and decays to zero.
  * Whole blocks are reconstructed if there are any; input scales and biases are trained too, but not the weights' scales.
  * The sequential form starts at the float weights, whatever the parallel form's result.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from anybit.numerics.quantizers import UniformQuantizer

ZETA, GAMMA = 1.1, -0.1


class AdaRound(nn.Module):
    """floor(W / s) + h(V), times s: soft in training mode, decided in evaluation mode.

    rate       Adam's learning rate of V
    strength   lambda
    warmup     share of the steps without the penalty
    beta       exponent of the penalty after the warm-up, and at the end
    """

    floor: Tensor
    scale: Tensor
    resumes = False  # a float weight may go to either neighbour, but a code has none

    def __init__(
        self,
        start: Tensor,
        quantizer: UniformQuantizer,
        rate: float = 1e-1,
        strength: float = 1e-2,
        warmup: float = 0.2,
        beta: tuple[float, float] = (20.0, 2.0),
    ):
        super().__init__()
        self.bits, self.limits = quantizer.bits, quantizer.limits
        self.rate, self.strength, self.warmup, self.beta = rate, strength, warmup, beta
        self.register_buffer("floor", start.floor())
        self.register_buffer("scale", quantizer.scale.clone())
        self.v = nn.Parameter(torch.logit((start - self.floor - GAMMA) / (ZETA - GAMMA)))

    def up(self) -> Tensor:
        """Return h(V), 0 to 1."""
        return (torch.sigmoid(self.v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the soft weight in training mode, the rounded one in evaluation mode."""
        up = self.up() if self.training else (self.up() >= 0.5).to(self.floor.dtype)
        return (self.floor + up).clamp(*self.limits) * self.scale

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return V with its rate."""
        return [{"params": [self.v], "lr": self.rate}]

    def penalty(self, progress: float) -> Tensor | None:
        """Return lambda times the sum of 1 - |2 h(V) - 1|^beta, with beta falling along a cosine after the warm-up."""
        if progress < self.warmup:
            return None
        start, end = self.beta
        beta = end + (start - end) * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup))) / 2
        return self.strength * (1 - (2 * self.up() - 1).abs().pow(beta)).sum()

    def freeze(self, rows: Tensor) -> tuple[Tensor, UniformQuantizer]:
        """Return the rounded weight and its quantizer."""
        return self.eval()(rows), UniformQuantizer(self.bits, True, self.scale)
