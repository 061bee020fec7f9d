"""Bias tuning: only biases change, towards the float outputs."""

import copy

import pytest
import torch
from networks import Attention, Residual, make, network_and_inputs
from rounded import Rounded, rounded

from anybit.data.batches import Batch, predict
from anybit.data.tasks import TASKS, distance, outputs_of
from anybit.methods.bias_tuning import BiasTuningSettings, _add_gradients, tune_biases
from anybit.networks.layers import codes_of, quantized_layers, scheme_of
from anybit.numerics.quantizers import UniformQuantizer


def tune(case: Rounded, settings: BiasTuningSettings, task: str = "classification", references: list | None = None) -> dict[str, float]:
    """Tune the rounded model in place towards the float outputs or `references`."""
    folded, calibration = case.network.folded, case.calibration
    targets = references or [outputs_of(folded, [batch]) for batch in calibration.fitting]
    held_out = outputs_of(folded, calibration.held_out)
    return tune_biases(case.model, calibration.fitting, targets, calibration.held_out, held_out, task, settings)


@pytest.mark.parametrize("scales", [True, False])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_changes_no_code_and_never_raises_the_held_out_error(task, scales):
    case = rounded(make(Residual), "W3A8")
    model, start = case.model, copy.deepcopy(case.model)
    result = tune(case, BiasTuningSettings(epochs=4, rate=1e-2, scales=scales), task)
    assert result["after"] < result["before"] and result["epochs"] > 0
    outputs, reference = (outputs_of(one, case.calibration.held_out) for one in (model, case.network.folded))
    assert distance(outputs, reference, task) == pytest.approx(result["after"], rel=1e-3)
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, start.state_dict()[key])}
    assert any(key.endswith("scale") for key in moved) == scales and any(key.endswith("bias") for key in moved)
    assert scales or all(key.endswith("bias") for key in moved)
    assert scheme_of(model) == scheme_of(start)
    for name, layer in quantized_layers(model).items():
        assert type(layer.weight_quantizer) is UniformQuantizer and type(layer.input_quantizer) is UniformQuantizer
        assert torch.equal(codes_of(layer), codes_of(start.get_submodule(name)))
        assert torch.equal(layer.input_quantizer.zero_point, start.get_submodule(name).input_quantizer.zero_point)


def test_keeps_the_start_without_improvement():
    case = rounded(make(Residual), "W3A8")
    start = copy.deepcopy(case.model).state_dict()
    wrong = [torch.randn_like(outputs_of(case.model, [batch])) * 100 for batch in case.calibration.fitting]
    result = tune(case, BiasTuningSettings(epochs=4, rate=1.0), references=wrong)
    assert result["epochs"] == 0 and result["after"] == result["before"]
    assert all(torch.equal(tensor, start[key]) for key, tensor in case.model.state_dict().items())


def test_tunes_biases_of_a_frozen_network():
    """Deployed networks often have requires_grad=False everywhere."""
    case = rounded(make(Attention).requires_grad_(False), "W3A8", name="attention")
    result = tune(case, BiasTuningSettings(epochs=3, rate=1e-2))
    assert result["after"] < result["before"]


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_trained_loss_equals_the_measured_distance(task):
    outputs, reference = torch.randn(9, 5), torch.randn(9, 5)
    assert float(TASKS[task].distance.loss(outputs, reference)) == pytest.approx(distance(outputs, reference, task), rel=1e-5)


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("part", [1, 3, 7, 8])
def test_gradients_accumulated_in_parts_equal_those_of_the_batch(task, part):
    model, batch = network_and_inputs("residual", 7)
    reference = torch.randn(*predict(model, batch).shape, generator=torch.Generator().manual_seed(0))
    gradients = []
    for size in (None, part):
        model.zero_grad()
        _add_gradients(model.double(), Batch(batch.inputs.double()), reference.double(), task, size)
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-12)
