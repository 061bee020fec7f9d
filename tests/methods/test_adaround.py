"""AdaRound's soft and final codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit.methods.adaround import AdaRound
from anybit.numerics.quantizers import UniformQuantizer

few = settings(max_examples=40, deadline=None)


def learned(bits: int = 3, seed: int = 0, **rates) -> tuple[AdaRound, UniformQuantizer, torch.Tensor]:
    """(learned rounding, the quantizer it starts from, the float weight, partly outside the range of the codes)."""
    rows = torch.randn(5, 20, generator=torch.Generator().manual_seed(seed))
    quantizer = UniformQuantizer(bits, True, rows.abs().amax(1, keepdim=True) / 2 ** (bits - 1) * 0.8)
    return AdaRound(rows / quantizer.scale, quantizer, **rates), quantizer, rows


@pytest.mark.parametrize("bits", range(2, 9))
def test_starts_at_the_float_weight_when_soft_and_the_nearest_code_when_hard(bits):
    weight, quantizer, rows = learned(bits)
    low, high = (limit * quantizer.scale for limit in quantizer.limits)
    assert torch.allclose(weight.train()(rows), torch.minimum(torch.maximum(rows, low), high), atol=1e-5)
    assert torch.allclose(weight.eval()(rows), quantizer(rows), atol=1e-6)


@given(st.integers(0, 1000), st.integers(2, 8))
@few
def test_final_code_is_floor_or_ceiling_whatever_was_learned(seed, bits):
    weight, quantizer, rows = learned(bits, seed)
    with torch.no_grad():
        weight.v.copy_(torch.randn(weight.v.shape, generator=torch.Generator().manual_seed(seed)) * 5)
    values, frozen = weight.freeze(rows)
    assert torch.equal(frozen(values), values) and torch.equal(frozen.scale, quantizer.scale)
    below = (rows / quantizer.scale).floor()
    codes = frozen.codes(values)
    assert ((codes == below.clamp(*quantizer.limits)) | (codes == (below + 1).clamp(*quantizer.limits))).all()


def test_soft_codes_stay_between_floor_and_ceiling():
    weight, _, _ = learned()
    with torch.no_grad():
        weight.v.copy_(torch.linspace(-9, 9, weight.v.numel()).view_as(weight.v))
    up = weight.up().detach()
    assert float(up.min()) == 0 and float(up.max()) == 1 and (up.flatten().diff() >= 0).all()  # zeta and gamma reach both ends


def test_penalty_is_zero_during_warm_up_and_when_all_is_decided():
    weight, _, _ = learned()
    assert weight.penalty(0.19) is None and weight.penalty(0.2).item() > 0
    with torch.no_grad():
        weight.v.copy_(torch.where(weight.v > 0, 9.0, -9.0))
    assert weight.penalty(1.0).item() == 0


@pytest.mark.parametrize(("progress", "beta"), [(0.2, 20.0), (0.6, 11.0), (1.0, 2.0)])
def test_penalty_equals_that_of_the_paper(progress, beta):
    weight, _, _ = learned(strength=0.01)
    up = torch.sigmoid(weight.v.double()) * 1.2 - 0.1
    expected = (0.01 * (1 - (2 * up.clamp(0, 1) - 1).abs() ** beta)).sum()
    assert weight.penalty(progress).item() == pytest.approx(expected.item(), rel=1e-4)


def test_penalty_alone_rounds_every_weight_to_nearest():
    weight, quantizer, rows = learned(bits=8)
    optimizer = torch.optim.Adam(weight.parameter_groups())
    steps = 300
    for step in range(1, steps + 1):
        penalty = weight.penalty(step / steps)
        if penalty is not None:
            optimizer.zero_grad()
            penalty.backward()
            optimizer.step()
    inside = rows / quantizer.scale
    clear = (inside - inside.floor() - 0.5).abs() > 0.05
    assert torch.equal(weight.eval()(rows)[clear], quantizer(rows)[clear])
    soft = (weight.train()(rows) - weight.eval()(rows)).detach()
    assert float((soft / quantizer.scale).abs()[clear].max()) < 0.2
