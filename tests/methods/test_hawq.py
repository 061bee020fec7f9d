"""HAWQ-V2: traces of known Hessians, and predictions beside measured sensitivities."""

import pytest
import torch
from networks import Attention, CalledTwice, Residual, images, make, numbers
from scipy.stats import spearmanr
from torch import nn

import anybit
from anybit.data.batches import Batch
from anybit.data.tasks import outputs_of
from anybit.errors import InvalidSetting, UnsupportedModel
from anybit.methods.hawq import Watched, hessian_traces
from anybit.networks.batchnorm import reestimate
from anybit.networks.layers import prepare, quantized_layers


def watched(model: nn.Module) -> tuple[nn.Module, dict[str, Watched]]:
    """Return a prepared copy of the network, and the `Watched` in its layers."""
    prepared = prepare(model, [name for name, module in model.named_modules() if isinstance(module, nn.Linear)])
    slots = {name: Watched({}) for name in quantized_layers(prepared)}
    for name, slot in slots.items():
        prepared.get_submodule(name).input_quantizer = slot
    return prepared, slots


def test_traces_of_a_linear_network_are_those_of_its_known_hessian(monkeypatch):
    monkeypatch.setattr("anybit.methods.hawq.PRODUCTS", 512)
    model = make(lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)))
    batches = [Batch(numbers(24, 6, seed=seed)) for seed in range(3)]
    reference = outputs_of(model, batches)
    prepared, slots = watched(model)
    traces, sizes = hessian_traces(prepared, slots, batches, reference, "regression")

    (first, second), energy = model, float(reference.square().sum())
    x = torch.cat([batch.inputs for batch in batches])
    with torch.no_grad():
        hidden = first(x)
        # |outputs - reference|^2 / energy is quadratic: with J the Jacobian of the outputs, its Hessian is 2 J^T J / energy
        expected = {
            ("0", "weight"): 2 / energy * x.square().sum() * second.weight.square().sum(),
            ("1", "weight"): 2 / energy * hidden.square().sum() * 4,
            ("0", "inputs"): 2 / energy * len(x) * (second.weight @ first.weight).square().sum(),
            ("1", "inputs"): 2 / energy * len(x) * second.weight.square().sum(),
        }
    assert {key: float(value) for key, value in expected.items()} == pytest.approx(traces, rel=0.06)
    assert sizes == {("0", "weight"): 30, ("1", "weight"): 20, ("0", "inputs"): 72 * 6, ("1", "inputs"): 72 * 5}


def test_prediction_ranks_layers_and_bits_like_the_measurement():
    model, x = make(Residual), images(96)
    reestimate(model, [Batch(x)])
    tables = [
        anybit.calibrate(model, x, "3bit", pipeline="light", solver="none", bn_tuning=False, sensitivity=one).report["table"]["layers"]
        for one in ("measured", "hawq")
    ]
    for bits in ("W2A8 W3A8 W4A8", "W8A4 W8A6 W8A8"):
        measured, predicted = ([row[text]["loss"] for row in table.values() for text in bits.split()] for table in tables)
        assert spearmanr(measured, predicted).statistic > 0.8
        assert min(predicted) >= 0


@pytest.mark.parametrize(("network", "shape"), [(Attention, (32, 5, 4)), (CalledTwice, (32, 4))])
def test_layers_that_run_twice_and_attention_have_traces(network, shape):
    result = anybit.calibrate(make(network), numbers(*shape), "4bit", pipeline="light", sensitivity="hawq")
    rows = result.report["table"]["layers"].values()
    assert rows and all(cell["loss"] > 0 for row in rows for cell in row.values())


class Detached(nn.Module):
    """A network whose first layer receives no gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.second(self.first(x).detach().relu())


class Once(torch.autograd.Function):
    """The identity, with a first derivative and no second."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient.clone()


class OnceDifferentiable(Detached):
    def forward(self, x):
        return self.second(Once.apply(self.first(x)).relu())


@pytest.mark.parametrize(("network", "words"), [(Detached, "layer first"), (OnceDifferentiable, "differentiated twice")])
def test_networks_without_second_derivatives_are_refused_with_a_remedy_that_works(network, words):
    x = numbers(32, 6)
    with pytest.raises(UnsupportedModel, match=words) as refusal:
        anybit.calibrate(network(), x, "4bit", pipeline="light", sensitivity="hawq")
    assert "sensitivity='measured'" in str(refusal.value)
    assert anybit.calibrate(network(), x, "4bit", pipeline="light", sensitivity="measured").scheme


@pytest.mark.parametrize("setting", [{"pairs": True}, {"sensitivity_base": "W8A8"}])
def test_settings_of_measurements_are_refused_beside_it(setting):
    with pytest.raises(InvalidSetting, match=next(iter(setting))):
        anybit.calibrate(make(Residual), images(32), "4bit", sensitivity="hawq", **setting)
