"""Affine quantization on tensors, and its gradients.

The one definition that all code uses:

    codes = clamp(round(x / scale) + zero_point, quant_min, quant_max)        round half to even
    x~    = (codes - zero_point) * scale

Weights are signed two's complement, -2^(b-1) .. 2^(b-1) - 1, symmetric (zero point 0), with one scale per output channel.
Activations are unsigned, 0 .. 2^b - 1, with an integer zero point and one scale per tensor.
The quotient is a division, not a multiplication by the reciprocal, as in integer runtimes.

Codes are integers held in the input's floating-point type, so that the same functions run under autograd.
"""

import torch
from torch import Tensor

Limit = int | Tensor
"""A lowest or highest code; a 0-d tensor if it changes from call to call."""


def quant_limits(bits: int, signed: bool) -> tuple[int, int]:
    """Return (quant_min, quant_max): two's complement if `signed`, else 0 .. 2^bits - 1."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: Limit, quant_max: Limit) -> Tensor:
    """Return the codes of `x`; `scale` and `zero_point` broadcast against it."""
    codes = torch.round(x / scale) + zero_point
    return codes.clamp(quant_min, quant_max)  # type: ignore[arg-type]  # the stubs accept two numbers or two tensors, not a union of both


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the values that `codes` represent."""
    return (codes - zero_point) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: Limit, quant_max: Limit) -> Tensor:
    """Quantize and dequantize `x`, with straight-through gradients to x and learned-step gradients to scale and zero point.

    Shapes: `scale` and `zero_point` broadcast against `x`; their gradients are summed back to their own shapes.
    Gradients (Esser et al., "Learned Step Size Quantization", ICLR 2020, eq. 3; the zero point after Bhalgat et al., "LSQ+", 2020):

        d x~ / d x           1 inside the range, 0 where clamped
        d x~ / d scale       codes - zero_point - x / scale inside, codes - zero_point where clamped
        d x~ / d zero_point  0 inside, -scale where clamped

    Deviation: LSQ's gradient scale is left to the caller, whose step sizes are relative to each tensor's scale.
    """
    if not torch.is_grad_enabled():  # no backward: one temporary tensor instead of three
        # torch's stubs accept only numbers or only tensors, but clamp_ takes either for each end
        codes = (x / scale).round_().add_(zero_point).clamp_(quant_min, quant_max)  # type: ignore[arg-type]
        return codes.sub_(zero_point).mul_(scale)
    return _FakeQuantize.apply(x, scale, zero_point, quant_min, quant_max)


class _FakeQuantize(torch.autograd.Function):
    """One fused forward and backward: a third of the memory traffic of the composed form, which the tests compare it with."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: Limit, quant_max: Limit) -> Tensor:
        steps = x / scale
        codes = steps.round().add_(zero_point)
        clamped = codes.clamp(quant_min, quant_max)  # type: ignore[arg-type]  # as in `quantize`
        if any(ctx.needs_input_grad):
            inside = (clamped == codes).to(x.dtype)  # as numbers, since products are several times faster than torch.where
            offset = clamped - zero_point
            needs_scale = ctx.needs_input_grad[1]
            # For d x~ / d scale: the rounding residual inside the range, the clamped offset outside.
            slope = torch.addcmul(offset, steps, inside, value=-1) if needs_scale else None
            ctx.save_for_backward(inside, slope, scale, zero_point)
            return offset.mul_(scale)
        return clamped.sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx, grad: Tensor):
        inside, slope, scale, zero_point = ctx.saved_tensors
        to_x = grad * inside if ctx.needs_input_grad[0] else None
        to_scale = (grad * slope).sum_to_size(scale.shape) if ctx.needs_input_grad[1] else None
        to_zero = None
        if ctx.needs_input_grad[2]:
            to_zero = (grad * (1 - inside) * -scale).sum_to_size(zero_point.shape)
        return to_x, to_scale, to_zero, None, None
