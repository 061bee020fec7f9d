"""UniformQuantizer: codes, values and forward agree."""

import copy

import pytest
import torch

from anybit.errors import InvalidSetting
from anybit.numerics.quantizers import UniformQuantizer

WEIGHTS = {"bits": 3, "signed": True, "scale": torch.tensor([[0.3], [0.07]])}
ACTIVATIONS = {"bits": 4, "signed": False, "scale": torch.tensor(0.11), "zero_point": torch.tensor(5.0)}
both = pytest.mark.parametrize("settings", [WEIGHTS, ACTIVATIONS], ids=["weights", "activations"])


def inputs(dtype=torch.float32):
    return torch.linspace(-2, 2, 2 * 41).view(2, 41).to(dtype)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_forward_gives_the_values_of_the_codes_in_the_dtype_of_the_input(settings, dtype):
    quantizer, x = UniformQuantizer(**settings), inputs(dtype)
    codes = quantizer.codes(x)
    assert codes.dtype == dtype and quantizer(x).dtype == dtype
    assert torch.equal(quantizer.values(codes).to(dtype), quantizer(x))


@both
def test_codes_span_the_limits_of_the_bits(settings):
    quantizer = UniformQuantizer(**settings)
    codes = quantizer.codes(10 * inputs())
    assert (int(codes.min()), int(codes.max())) == quantizer.limits == ((-4, 3) if settings["signed"] else (0, 15))


@both
def test_state_dict_round_trips(settings):
    quantizer, x = UniformQuantizer(**settings), inputs()
    other = UniformQuantizer(settings["bits"], settings["signed"], torch.ones_like(settings["scale"]))
    assert not torch.equal(other(x), quantizer(x))
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(x), quantizer(x))


@both
def test_the_quantizer_owns_its_tensors(settings):
    scale = settings["scale"].clone()
    quantizer = UniformQuantizer(**{**settings, "scale": scale})
    before = quantizer(inputs())
    scale.mul_(2)
    assert torch.equal(quantizer(inputs()), before)


@both
def test_has_no_parameters_and_passes_gradients_within_range(settings):
    quantizer, x = UniformQuantizer(**settings), inputs().requires_grad_()
    quantizer(x).sum().backward()
    low, high = quantizer.limits
    unclamped = torch.round(x / quantizer.scale) + quantizer.zero_point
    assert torch.equal(x.grad, ((unclamped >= low) & (unclamped <= high)).float())
    assert not list(quantizer.parameters())


@both
def test_copy_computes_the_same(settings):
    quantizer = UniformQuantizer(**settings)
    assert torch.equal(copy.deepcopy(quantizer)(inputs()), quantizer(inputs()))


@pytest.mark.parametrize("bits", [1, 9, 4.0])
def test_rejects_bits_outside_2_to_8(bits):
    with pytest.raises(InvalidSetting, match=r"is outside 2\.\.8"):
        UniformQuantizer(bits, True, torch.ones(()))
