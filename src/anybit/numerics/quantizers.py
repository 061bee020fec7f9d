"""The canonical quantizer, into which every method's own is frozen, and the learned input range that methods share."""

import torch
from torch import Tensor, nn

from anybit.numerics.affine import dequantize, fake_quantize, quant_limits, quantize
from anybit.numerics.bits import check_bits


class UniformQuantizer(nn.Module):
    """Affine fake quantization with fixed bits, scale and zero point (`numerics` states the formula).

    bits        2..8
    signed      True for weights (two's complement), False for activations
    scale       [channels, 1] for a weight's rows, 0-d for an activation, [2] for the two operands of a matmul; positive and finite
    zero_point  0-d or [2] integer; 0 for weights
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
        """Return (quant_min, quant_max)."""
        return quant_limits(self.bits, self.signed)

    def codes(self, x: Tensor, operand: int | None = None) -> Tensor:
        """Return the codes of `x`, as integers in its floating-point type."""
        scale, zero_point = of_operand(self.scale, operand), of_operand(self.zero_point, operand)
        return quantize(x, scale.to(x.dtype), zero_point.to(x.dtype), *self.limits)

    def values(self, codes: Tensor) -> Tensor:
        """Return the values that the codes represent."""
        return dequantize(codes, self.scale.to(codes.dtype), self.zero_point.to(codes.dtype))

    def forward(self, x: Tensor, operand: int | None = None) -> Tensor:
        scale, zero_point = of_operand(self.scale, operand), of_operand(self.zero_point, operand)
        return fake_quantize(x, scale.to(x.dtype), zero_point.to(x.dtype), *self.limits)

    def extra_repr(self) -> str:
        return f"{self.bits} bits, {'signed' if self.signed else 'unsigned'}, {self.scale.numel()} scale(s)"


def frozen(quantizer: nn.Module | Tensor | None) -> UniformQuantizer:
    """Return the canonical quantizer in a slot. Asserts that the slot holds one."""
    assert isinstance(quantizer, UniformQuantizer), f"a {type(quantizer).__name__} in place of the canonical quantizer"
    return quantizer


def of_operand(numbers: Tensor, operand: int | None) -> Tensor:
    """Return the element of one operand of a matmul; the tensor itself for a layer, which has one input."""
    return numbers if operand is None else numbers[operand]


class LearnedInput(nn.Module):
    """A trained range: the logarithm of the scale is free, the zero point fixed (learned step size, see `numerics.affine`)."""

    zero_point: Tensor

    def __init__(self, quantizer: UniformQuantizer):
        super().__init__()
        self.bits, self.limits = quantizer.bits, quantizer.limits
        self.log_scale = nn.Parameter(quantizer.scale.log())
        self.register_buffer("zero_point", quantizer.zero_point)

    def forward(self, x: Tensor, operand: int | None = None) -> Tensor:
        scale, zero_point = of_operand(self.log_scale, operand).exp(), of_operand(self.zero_point, operand)
        return fake_quantize(x, scale, zero_point, *self.limits)

    def freeze(self) -> UniformQuantizer:
        return UniformQuantizer(self.bits, False, self.log_scale.exp(), self.zero_point)
