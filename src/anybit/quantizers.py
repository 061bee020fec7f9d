"""The canonical quantizer, which every method's own becomes when it is frozen, and the learned input range that methods share."""

import torch
from torch import Tensor, nn

from anybit.numerics import dequantize, fake_quantize, quant_limits, quantize
from anybit.scheme import check_bits


class UniformQuantizer(nn.Module):
    """Affine fake quantization with fixed bits, scale and zero point (`numerics` states the formula).

    bits        2..8
    signed      True for weights (two's complement), False for activations
    scale       [channels, 1] for a weight's rows, 0-d for an activation; positive and finite
    zero_point  0-d integer; 0 for weights
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int, signed: bool, scale: Tensor, zero_point: Tensor | None = None):
        super().__init__()
        self.bits, self.signed = check_bits(bits), signed
        self.register_buffer("scale", scale.detach().clone().float())
        self.register_buffer("zero_point", torch.zeros(()) if zero_point is None else zero_point.detach().clone().float())

    @property
    def limits(self) -> tuple[int, int]:
        """(quant_min, quant_max)."""
        return quant_limits(self.bits, self.signed)

    def codes(self, x: Tensor) -> Tensor:
        """Integers, in x's floating-point type."""
        return quantize(x, self.scale.to(x.dtype), self.zero_point.to(x.dtype), *self.limits)

    def values(self, codes: Tensor) -> Tensor:
        """What the codes stand for."""
        return dequantize(codes, self.scale.to(codes.dtype), self.zero_point.to(codes.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.scale.to(x.dtype), self.zero_point.to(x.dtype), *self.limits)

    def extra_repr(self) -> str:
        return f"{self.bits} bits, {'signed' if self.signed else 'unsigned'}, {self.scale.numel()} scale(s)"


class LearnedInput(nn.Module):
    """A range that is trained: the logarithm of the scale is free, the zero point fixed (learned step size, see `numerics`)."""

    zero_point: Tensor

    def __init__(self, quantizer: UniformQuantizer):
        super().__init__()
        self.bits, self.limits = quantizer.bits, quantizer.limits
        self.log_scale = nn.Parameter(quantizer.scale.log())
        self.register_buffer("zero_point", quantizer.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.log_scale.exp(), self.zero_point, *self.limits)

    def freeze(self) -> UniformQuantizer:
        return UniformQuantizer(self.bits, False, self.log_scale.exp(), self.zero_point)
