"""Affine quantization: properties for every tensor, bit-width, scale and zero point."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anybit.errors import InvalidSetting
from anybit.numerics.affine import dequantize, fake_quantize, quant_limits, quantize
from anybit.numerics.bits import check_bits

few = settings(max_examples=60, deadline=None)
bit_widths = st.integers(2, 8)


@st.composite
def problems(draw, dtype=torch.float32):
    """(x [rows, columns], scale [rows, 1], zero point 0-d, quant_min, quant_max); x reaches beyond the range and hits rounding ties."""
    rows, columns, signed = draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.booleans())
    limits = quant_limits(draw(bit_widths), signed)
    zero_point = torch.tensor(float(draw(st.just(0) if signed else st.integers(*limits))), dtype=dtype)
    scale = torch.from_numpy(draw(arrays(np.float32, (rows, 1), elements=st.floats(2.0**-10, 2.0**10, width=32)))).to(dtype)
    halves = st.integers(-600, 600).map(lambda n: n / 2)
    steps = draw(arrays(np.float32, (rows, columns), elements=halves | st.floats(-300, 300, width=32, allow_subnormal=False)))
    return torch.from_numpy(steps).to(dtype) * scale, scale, zero_point, *limits


@few
@given(problems())
def test_fake_quantize_is_idempotent(problem):
    x, *rest = problem
    once = fake_quantize(x, *rest)
    assert torch.equal(fake_quantize(once, *rest), once)


@few
@given(problems())
def test_codes_are_integers_within_the_limits(problem):
    *_, quant_min, quant_max = problem
    codes = quantize(*problem)
    assert torch.equal(codes, codes.round())
    assert quant_min <= codes.min() and codes.max() <= quant_max


@few
@given(bit_widths, st.booleans(), st.floats(2.0**-10, 2.0**10, width=32))
def test_there_are_exactly_two_to_the_bits_values(bits, signed, scale):
    x = torch.linspace(-300, 300, 4001) * scale
    values = fake_quantize(x, torch.tensor(scale), torch.zeros(()), *quant_limits(bits, signed))
    assert len(values.unique()) == 2**bits


@few
@given(problems(torch.float64))
def test_error_is_at_most_half_a_step_inside_the_range(problem):
    x, scale, zero_point, quant_min, quant_max = problem
    low, high = ((torch.tensor(float(end)) - zero_point) * scale for end in (quant_min, quant_max))
    x = torch.minimum(torch.maximum(x, low), high)
    error = (fake_quantize(x, *problem[1:]) - x).abs()
    assert (error <= scale * (0.5 + 1e-9)).all()


@few
@given(problems(torch.float64))
def test_values_outside_the_range_saturate(problem):
    x, scale, zero_point, quant_min, quant_max = problem
    low, high = ((torch.tensor(float(end)) - zero_point) * scale for end in (quant_min, quant_max))
    values = fake_quantize(*problem)
    assert torch.equal(torch.where(x < low, low, values), values)
    assert torch.equal(torch.where(x > high, high, values), values)


@few
@given(problems(), st.integers(-20, 20))
def test_scaling_by_a_power_of_two_commutes(problem, exponent):
    x, scale, *rest = problem
    factor = 2.0**exponent
    assert torch.equal(fake_quantize(x * factor, scale * factor, *rest), fake_quantize(x, scale, *rest) * factor)


@few
@given(problems())
def test_fake_quantize_is_quantize_then_dequantize(problem):
    _, scale, zero_point, *_ = problem
    assert torch.equal(fake_quantize(*problem), dequantize(quantize(*problem), scale, zero_point))


@few
@given(problems())
def test_fake_quantize_is_monotonic(problem):
    x, *rest = problem
    values = fake_quantize(x.sort(dim=1).values, *rest)
    assert (values.diff(dim=1) >= 0).all()


@few
@given(problems())
def test_zero_is_exact(problem):
    x, *rest = problem
    assert (fake_quantize(torch.zeros_like(x), *rest) == 0).all()


@pytest.mark.parametrize("scale", [1.0, 0.25, 8.0])
def test_halves_round_to_even(scale):
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]) * scale
    codes = quantize(x, torch.tensor(scale), torch.zeros(()), -8, 7)
    assert codes.tolist() == [-2, -2, 0, 0, 2, 2]


def test_divides_by_the_scale_instead_of_multiplying_by_its_reciprocal():
    # 4.5 steps of 0.3 in float32: division hits the tie exactly, multiplication by the reciprocal may not.
    scales = torch.linspace(0.01, 0.99, 500)
    x = scales * 4.5
    codes = quantize(x, scales, torch.zeros(()), -8, 7)
    assert torch.equal(codes, torch.round(torch.from_numpy(x.numpy() / scales.numpy())))
    assert not torch.equal(codes, torch.round(x * (1 / scales)))


class _Round(torch.autograd.Function):
    """Round to nearest, with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def composed(x, scale, zero_point, quant_min, quant_max):
    """Compute the same function by autograd: straight-through rounding, then clamp."""
    codes = torch.clamp(_Round.apply(x / scale) + zero_point, quant_min, quant_max)
    return (codes - zero_point) * scale


def value_and_gradients(function, x, scale, zero_point, limits):
    leaves = [tensor.clone().requires_grad_() for tensor in (x, scale, zero_point)]
    value = function(*leaves, *limits)
    weights = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view(value.shape)  # not all equal, so that wrong sums show
    return value.detach(), torch.autograd.grad((value * weights).sum(), leaves)


@few
@given(problems(torch.float64))
def test_value_and_gradients_are_those_of_the_composed_form(problem):
    *tensors, quant_min, quant_max = problem
    fused, composed_ = (value_and_gradients(f, *tensors, (quant_min, quant_max)) for f in (fake_quantize, composed))
    assert torch.equal(fused[0], composed_[0])
    for ours, expected in zip(fused[1], composed_[1], strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("scale_shape", [(), (1,), (3, 1, 1), (1, 4, 1), (4, 5), (3, 4, 5)])
@pytest.mark.parametrize("zero_shape", [(), (3, 1, 1), (5,)])
def test_gradients_sum_over_broadcast_dimensions(scale_shape, zero_shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) * 4
    scale = torch.rand(scale_shape, generator=generator, dtype=torch.float64) + 0.1
    zero_point = torch.randint(0, 16, zero_shape, generator=generator).double()
    fused, expected = (value_and_gradients(f, x, scale, zero_point, (0, 15))[1] for f in (fake_quantize, composed))
    for ours, other, leaf in zip(fused, expected, (x, scale, zero_point), strict=True):
        assert ours.shape == leaf.shape
        torch.testing.assert_close(ours, other)


@pytest.mark.parametrize("needs_grad", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)])
def test_gradient_is_independent_of_which_others_are_required(needs_grad):
    tensors = (torch.tensor([[-9.0, 0.3, 1.6, 40.0]]), torch.tensor([[0.5]]), torch.tensor(3.0))
    _, every = value_and_gradients(fake_quantize, *tensors, (0, 15))
    leaves = [tensor.clone().requires_grad_(required) for tensor, required in zip(tensors, needs_grad, strict=True)]
    value = fake_quantize(*leaves, 0, 15)
    (value * torch.linspace(-1, 2, 4)).sum().backward()
    for leaf, expected, required in zip(leaves, every, needs_grad, strict=True):
        assert torch.equal(leaf.grad, expected) if required else leaf.grad is None


@pytest.mark.parametrize("with_gradient", [False, True])
def test_arguments_are_unchanged(with_gradient):
    tensors = torch.tensor([[-9.0, 0.3, 40.0]]).requires_grad_(with_gradient), torch.tensor([[0.5]]), torch.tensor(3.0)
    before = [tensor.detach().clone() for tensor in tensors]
    fake_quantize(*tensors, 0, 15)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize("bits", range(2, 9))
def test_limits_span_two_to_the_bits_codes(bits):
    signed_min, signed_max = quant_limits(bits, signed=True)
    assert (signed_min, signed_max - signed_min + 1) == (-(signed_max + 1), 2**bits)
    assert quant_limits(bits, signed=False) == (0, 2**bits - 1)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 32, True, 4.0, "4", None])
def test_rejects_other_bit_widths_by_value(bits):
    with pytest.raises(InvalidSetting, match=rf"knob {bits!r} is outside 2\.\.8\. Choose"):
        check_bits(bits, "knob")


@pytest.mark.parametrize("bits", range(2, 9))
def test_check_bits_returns_accepted_values(bits):
    assert check_bits(bits) == bits
