"""AdaQuant's free weights."""

import pytest
import torch

from anybit.methods.adaquant import AdaQuant
from anybit.numerics.quantizers import UniformQuantizer


def learned(bits: int = 3) -> tuple[AdaQuant, UniformQuantizer, torch.Tensor]:
    """(free weights, the quantizer they start from, the float weight)."""
    rows = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    quantizer = UniformQuantizer(bits, True, rows.abs().amax(1, keepdim=True) / 2 ** (bits - 1))
    return AdaQuant(rows / quantizer.scale, quantizer), quantizer, rows


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_learned_weight_starts_at_the_codes_of_the_quantizer(bits):
    weight, quantizer, rows = learned(bits)
    assert torch.allclose(weight(rows), quantizer(rows), rtol=1e-5)
    values, frozen = weight.freeze(rows)
    assert torch.equal(values, weight(rows)) and torch.allclose(frozen.scale, quantizer.scale, rtol=1e-5)


def test_weight_may_move_by_more_than_one_level():
    weight, _, rows = learned()
    before = weight(rows) / weight.log_scale.exp()
    optimizer = torch.optim.Adam([weight.in_steps], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        weight(rows).sum().backward()
        optimizer.step()
    moved = (before - weight(rows) / weight.log_scale.exp()).detach()
    assert float(moved.max()) > 2.5 and float(moved.min()) >= 0


def test_weight_and_scale_have_separate_learning_rates():
    groups = AdaQuant(torch.zeros(1, 1), UniformQuantizer(2, True, torch.ones(1, 1)), weight_rate=0.5, scale_rate=0.25).parameter_groups()
    assert [group["lr"] for group in groups] == [0.5, 0.25]
