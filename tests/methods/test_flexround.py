"""FlexRound's codes: at the start, after any factors, and the gradients that move them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit.methods.flexround import FlexRound
from anybit.numerics.quantizers import UniformQuantizer

few = settings(max_examples=40, deadline=None)


def learned(bits: int = 3, seed: int = 0) -> tuple[FlexRound, UniformQuantizer, torch.Tensor]:
    """(learned rounding, the quantizer it starts from, the float weight, partly outside the range of the codes)."""
    rows = torch.randn(5, 20, generator=torch.Generator().manual_seed(seed))
    rows[:, 0] = 0
    quantizer = UniformQuantizer(bits, True, rows.abs().amax(1, keepdim=True) / 2 ** (bits - 1) * 0.8)
    return FlexRound(rows / quantizer.scale, quantizer), quantizer, rows


@pytest.mark.parametrize("bits", range(2, 9))
def test_starts_at_the_nearest_code(bits):
    weight, quantizer, rows = learned(bits)
    assert torch.allclose(weight(rows), quantizer(rows), atol=1e-6)


@given(st.integers(0, 1000), st.integers(2, 8))
@few
def test_final_values_are_codes_of_the_divided_weight_whatever_was_learned(seed, bits):
    weight, _, rows = learned(bits, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in weight.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    values, frozen = weight.freeze(rows)
    assert torch.allclose(frozen(values), values, rtol=1e-6, atol=0)
    divided = rows / (frozen.scale * (weight.log_factors + weight.log_row_factors).exp())
    away = ((divided - 0.5).round() + 0.5 - divided).abs() > 1e-3  # from where float32 may round either way
    assert torch.equal(frozen.codes(values)[away], divided.round().clamp(*frozen.limits)[away])
    assert (values[:, 0] == 0).all()


def test_gradient_to_a_factor_is_proportional_to_the_weight():
    weight, quantizer, rows = learned(bits=8)
    weight(rows).sum().backward()
    inside = (rows / quantizer.scale).abs() < 100
    assert torch.allclose(weight.log_factors.grad[inside], -rows[inside], rtol=1e-4, atol=1e-6)
    assert (weight.log_factors.grad[rows / quantizer.scale > 127.5] == 0).all()
