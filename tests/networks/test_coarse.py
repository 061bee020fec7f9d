"""Inputs far from zero, or in different units, are reported with a remedy that works; ordinary inputs are not."""

import re

import pytest
import torch
from networks import Residual, images, make, numbers
from torch import nn

import anybit
from anybit.data.batches import Batch
from anybit.networks.coarse import coarse_layers
from anybit.networks.wiring import observe

MEANS, DEVIATIONS = torch.tensor([290.0, 2005.0, 101325.0, 0.5]), torch.tensor([5.0, 3.0, 500.0, 0.3])


def sensors(count: int) -> torch.Tensor:
    """Temperature in kelvin, years, pressure in pascal, and a number between 0 and 1."""
    return MEANS + DEVIATIONS * numbers(count, 4)


def folded() -> nn.Module:
    """A network for normalized inputs, with the normalization folded into its first layer."""
    network = make(lambda: nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)))
    with torch.no_grad():
        network[0].weight.div_(DEVIATIONS)
        network[0].bias.sub_(network[0].weight @ MEANS)
    return network.double().float()


def errors_of(network: nn.Module, inputs: torch.Tensor, bits: int = 8) -> dict[str, float]:
    batch = Batch(inputs)
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)]
    return coarse_layers(network, observe(network, batch), dict.fromkeys(names, bits), batch)


@pytest.mark.parametrize("bits", [4, 8])
def test_ordinary_inputs_are_not_reported(bits):
    assert errors_of(make(Residual), images(16), bits) == {}
    assert errors_of(make(Residual), 255 * torch.rand(16, 3, 8, 8), bits) == {}
    assert errors_of(folded(), sensors(64))["0"] > 1  # worse than a constant


def test_reported_error_is_that_of_the_layer():
    network, inputs = folded(), sensors(256)
    step = inputs.max() / 255
    rounded = (inputs / step).round() * step
    with torch.no_grad():
        apart, whole = network[0](rounded) - network[0](inputs), network[0](inputs)
    measured = float(apart.square().sum() / (whole - whole.mean(0)).square().sum())
    assert measured / 2 < errors_of(network, inputs)["0"] < 2 * measured


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d])
def test_channels_of_a_convolution_are_the_second_dimension_of_its_input(layer, groups):
    size = (5,) if layer is nn.Conv1d else (5, 5)
    network = nn.Sequential(layer(4, 6, 3, groups=groups))
    far = MEANS.view(4, *(1,) * len(size)) + numbers(16, 4, *size) * DEVIATIONS.view(4, *(1,) * len(size))
    assert errors_of(network, far).keys() == {"0"} and errors_of(network, numbers(16, 4, *size)) == {}


def test_reshaped_input_counts_as_network_input_and_computed_does_not():
    network = folded()
    reshaped = nn.Sequential(nn.Flatten(), *network)
    assert errors_of(reshaped, sensors(32).view(32, 2, 2)).keys() == {"1"}
    assert errors_of(nn.Sequential(nn.ReLU(), *network), sensors(32)) == {}


def test_calibrate_names_the_layer_and_a_working_remedy(caplog):
    network, inputs = folded(), sensors(128)
    settings = {"samples": 128, "weight_bits": (8,), "activation_bits": (8,), "pipeline": "light", "solver": "none"}
    result = anybit.calibrate(network, inputs, None, **settings)
    (note,) = result.report["notes"]
    layer, keep = re.search(r"^(\S+) reads inputs that lie far from zero.*--keep='(\S+)'$", note).groups()
    assert layer == "0" and keep == "0=float"
    cured = anybit.calibrate(network, inputs, None, keep={"0": "float"}, **settings)
    assert "notes" not in cured.report
    with torch.no_grad():
        expected = network(inputs)
        errors = [float((one.model(inputs) - expected).square().mean() / expected.var()) for one in (result, cured)]
    assert errors[0] > 0.5 and errors[1] < 0.01
