import copy

import pytest
import torch
from networks import (
    Attention,
    Chain,
    Residual,
    assert_untouched,
    calibration_of,
    make,
    network_and_inputs,
    pictures,
    snapshot,
    zero_channel,
)
from torch import nn

from anybit.data.batches import Batch, predict
from anybit.data.samples import Calibration
from anybit.data.tasks import TASKS, distance, outputs_of
from anybit.methods.adaquant import AdaQuantSettings, DroppedInput, LearnedWeight, UnitData, mix, parallel, reconstruct, sequential
from anybit.methods.bias_tuning import BiasTuningSettings, _add_gradients, tune_biases
from anybit.networks.candidates import Candidates, apply_scheme
from anybit.networks.capture import MemoryBudget, capture
from anybit.networks.layers import codes_of, quantized_layers, scheme_of, weight_rows
from anybit.networks.observed import ObservedNetwork, observe_network
from anybit.numerics.quantizers import UniformQuantizer
from anybit.roads.settings import CalibrateSettings
from anybit.roads.steps import free_weights, range_candidates
from anybit.scheme import Precision, Scheme

STEPS = AdaQuantSettings(steps=100, batch_size=16)


def setup(
    model: nn.Module, precision: str, name: str = "residual", unit: str = "block"
) -> tuple[ObservedNetwork, Calibration, nn.Module, dict]:
    """(the network, its inputs, the rounded canonical model, AdaQuant's free weights)."""
    wanted = Precision.parse(precision)
    settings = CalibrateSettings(weight_bits=(wanted.weight_bits,), activation_bits=(wanted.activation_bits,), unit=unit)
    calibration = calibration_of(name, fitting=32, held_out=16)
    network = observe_network(model, calibration.fitting[0], settings.options)
    candidates = range_candidates(network, calibration, settings)
    scheme = network.uniform(wanted.weight_bits, wanted.activation_bits)
    return network, calibration, apply_scheme(network.prepared, scheme, candidates), free_weights(network, candidates, scheme)


def fitted(
    model: nn.Module, precision: str, settings: AdaQuantSettings = STEPS, **more
) -> tuple[ObservedNetwork, nn.Module, nn.Module, dict]:
    """(network, rounded model, reconstructed model, errors of each unit) of sequential AdaQuant."""
    network, calibration, start, starts = setup(model, precision, **more)
    changed = copy.deepcopy(start)
    errors = sequential(changed, network.folded, network.units, starts, network.wiring, calibration, settings, 2**30)
    return network, start, changed, errors


@pytest.mark.parametrize("unit", ["layer", "block"])
@pytest.mark.parametrize("precision", ["W2A4", "W4A8", "W3"])
def test_no_units_held_out_error_rises(precision, unit):
    network, _, _, errors = fitted(make(Residual), precision, unit=unit)
    assert set(errors) == {found.name for found in network.units}
    assert all(error["after"] <= error["before"] for error in errors.values())
    assert sum(error["after"] for error in errors.values()) < 0.9 * sum(error["before"] for error in errors.values())


def test_a_unit_that_nothing_improves_stays_bitwise_as_it_was():
    _, start, changed, errors = fitted(make(Residual), "W4A4", AdaQuantSettings(steps=4, weight_rate=50.0, scale_rate=3.0))
    kept = [name for name, error in errors.items() if error["steps"] == 0]
    assert kept
    for name in kept:
        state = changed.get_submodule(name).state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in start.get_submodule(name).state_dict().items())
        assert errors[name]["after"] == errors[name]["before"]


def test_eight_bits_have_next_to_nothing_to_gain():
    _, start, changed, _ = fitted(make(Residual), "W8A8")
    inputs = [Batch(pictures(16, 9))]
    before, after = outputs_of(start, inputs), outputs_of(changed, inputs)
    assert float((after - before).square().sum()) < 1e-3 * float(before.square().sum())


def test_the_canonical_form_is_kept():
    _, start, changed, _ = fitted(make(Residual), "W3A4")
    assert scheme_of(changed) == scheme_of(start)
    for layer in quantized_layers(changed).values():
        assert type(layer.weight_quantizer) is UniformQuantizer and type(layer.input_quantizer) is UniformQuantizer
        assert torch.equal(weight_rows(layer, layer.weight), codes_of(layer).float() * layer.weight_quantizer.scale)
        assert torch.equal(weight_rows(layer, layer.weight), weight_rows(layer, layer._parameters["weight"]))
    assert list(changed.state_dict()) == list(start.state_dict())


def test_one_seed_gives_one_result_and_another_another():
    states = [fitted(make(Residual), "W2A4", AdaQuantSettings(steps=6, seed=seed))[2].state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    assert any(not torch.equal(tensor, states[2][key]) for key, tensor in states[0].items())


def test_the_random_state_is_left_as_it_was():
    state = torch.get_rng_state()
    fitted(make(Chain), "W4A4", AdaQuantSettings(steps=3))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_float_network_is_left_as_it_was():
    network, calibration, start, starts = setup(make(Residual), "W4A4")
    before = [snapshot(model) for model in (network.float_model, network.folded, network.prepared)]
    sequential(start, network.folded, network.units, starts, network.wiring, calibration, AdaQuantSettings(steps=3), 2**30)
    for model, was in zip((network.float_model, network.folded, network.prepared), before, strict=True):
        assert_untouched(model, was)


def test_an_all_zero_channel_stays_finite():
    _, _, changed, errors = fitted(zero_channel(make(Chain)), "W2A4", name="chain")
    assert all(torch.isfinite(tensor).all() for tensor in changed.state_dict().values())
    assert all(error["after"] <= error["before"] < float("inf") for error in errors.values())


@pytest.mark.parametrize("memory", [0, 10_000])
def test_spilling_to_disk_changes_nothing(memory):
    network, calibration, start, starts = setup(make(Residual), "W3A4")
    models = []
    for limit in (memory, 2**30):
        models.append(copy.deepcopy(start))
        sequential(models[-1], network.folded, network.units, starts, network.wiring, calibration, AdaQuantSettings(steps=5), limit)
    twin = models[1].state_dict()
    assert all(torch.equal(tensor, twin[key]) for key, tensor in models[0].state_dict().items())


def test_what_is_carried_from_unit_to_unit_is_what_would_be_captured(monkeypatch):
    network, calibration, start, starts = setup(make(Chain), "W3A4", "chain", "layer")
    models, errors = [copy.deepcopy(start), copy.deepcopy(start)], []
    assert any(network.wiring.feeds(a.name, b.name) for a, b in zip(network.units, network.units[1:], strict=False))
    for model in models:
        settings = AdaQuantSettings(steps=5)
        errors.append(sequential(model, network.folded, network.units, starts, network.wiring, calibration, settings, 2**30))
        monkeypatch.setattr(type(network.wiring), "feeds", lambda *names: False)
    for name in errors[0]:
        assert errors[0][name] == pytest.approx(errors[1][name], rel=1e-3, abs=1e-7)
    assert torch.allclose(*(outputs_of(model, calibration.held_out) for model in models), atol=1e-3)


def test_parallel_units_do_not_depend_on_each_other():
    network, calibration, start, starts = setup(make(Residual), "W3", unit="layer")
    together, alone = copy.deepcopy(start), copy.deepcopy(start)
    settings, rest = AdaQuantSettings(steps=5), (network.wiring, calibration)
    parallel({3: together}, network.folded, network.units, {3: starts}, *rest, settings, 2**30)
    errors = parallel({3: alone}, network.folded, network.units[2:3], {3: starts}, *rest, settings, 2**30)
    (name,) = errors
    for layer, moved in quantized_layers(alone).items():
        other = quantized_layers(together if layer == name else start)[layer]
        assert torch.equal(codes_of(moved), codes_of(other)) and torch.equal(moved.weight_quantizer.scale, other.weight_quantizer.scale)


def test_every_variant_is_reconstructed_as_if_alone():
    network, calibration, start, starts = setup(make(Chain), "W3", name="chain", unit="layer")
    _, _, coarse, coarse_starts = setup(make(Chain), "W2", name="chain", unit="layer")
    alone = copy.deepcopy(start)
    rest = (network.wiring, calibration, AdaQuantSettings(steps=5), 2**30)
    both = parallel({2: coarse, 3: start}, network.folded, network.units, {2: coarse_starts, 3: starts}, *rest)
    single = parallel({3: alone}, network.folded, network.units, {3: starts}, *rest)
    assert {name: errors[3] for name, errors in both.items()} == {name: errors[3] for name, errors in single.items()}


def test_a_block_that_reads_weights_itself_is_reconstructed():
    _, _, changed, errors = fitted(make(Attention), "W3A8", AdaQuantSettings(steps=5), name="attention")
    assert set(errors) == {"inner", "fc"} and all(torch.isfinite(tensor).all() for tensor in changed.state_dict().values())


def unit_data(model: nn.Module, name: str, inputs: torch.Tensor) -> UnitData:
    return UnitData(capture(model, name, [Batch(inputs)], len(inputs), MemoryBudget(2**30), outputs=True), None, len(inputs))


def test_errors_are_taken_after_the_activation():
    """What a ReLU cuts off is no error: a unit whose outputs are all negative has none."""
    network, _, model, starts = setup(make(Chain), "W2A2", name="chain", unit="layer")
    data = [unit_data(network.folded, "conv1", pictures(8, seed)) for seed in (1, 2)]
    dead = lambda output: torch.relu(output - 1e6)  # noqa: E731
    errors = reconstruct(model.conv1, {"": starts["conv1"]}, *data, dead, AdaQuantSettings(steps=2))
    assert errors["before"] == errors["after"] == 0


def test_dropped_activations_are_dropped_in_training_only():
    learned = DroppedInput(UniformQuantizer(2, False, torch.tensor(1.0), torch.tensor(1.0)), drop=0.5)
    x = torch.rand(4000) * 0.4 + 0.05
    learned.eval()
    assert torch.equal(learned(x), torch.zeros(4000))
    learned.train()
    with torch.random.fork_rng(devices=[]):
        share = float((learned(x) == x).float().mean())
    assert share == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("drop", [0.0, 0.25, 1.0])
def test_a_mix_takes_each_element_from_one_of_the_two(drop):
    x, quantized = torch.randn(31, 101), torch.randn(31, 101)
    mixed = mix(x, quantized, drop)
    assert ((mixed == x) | (mixed == quantized)).all()
    assert float((mixed == x).float().mean()) == pytest.approx(drop, abs=0.04)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_learned_weight_starts_at_the_quantizers_codes(bits):
    rows = torch.randn(5, 20)
    quantizer = UniformQuantizer(bits, True, rows.abs().amax(1, keepdim=True) / 2 ** (bits - 1))
    learned = LearnedWeight(rows / quantizer.scale, quantizer)
    assert torch.allclose(learned(rows), quantizer(rows), rtol=1e-5)
    assert torch.allclose(learned.freeze().scale, quantizer.scale, rtol=1e-5)


def biased_case() -> tuple[ObservedNetwork, Calibration, nn.Module, list, torch.Tensor]:
    network, calibration, model, _ = setup(make(Residual), "W3A8")
    references = [outputs_of(network.folded, [batch]) for batch in calibration.fitting]
    return network, calibration, model, references, outputs_of(network.folded, calibration.held_out)


@pytest.mark.parametrize("scales", [True, False])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_bias_tuning_changes_no_code_and_never_raises_the_held_out_error(task, scales):
    _, calibration, model, references, held_out = biased_case()
    start = copy.deepcopy(model)
    settings = BiasTuningSettings(epochs=4, rate=1e-2, scales=scales)
    result = tune_biases(model, calibration.fitting, references, calibration.held_out, held_out, task, settings)
    assert result["after"] < result["before"] and result["epochs"] > 0
    assert distance(outputs_of(model, calibration.held_out), held_out, task) == pytest.approx(result["after"], rel=1e-3)
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, start.state_dict()[key])}
    assert any(key.endswith("scale") for key in moved) == scales and any(key.endswith("bias") for key in moved)
    assert scales or all(key.endswith("bias") for key in moved)
    assert scheme_of(model) == scheme_of(start)
    for name, layer in quantized_layers(model).items():
        assert type(layer.weight_quantizer) is UniformQuantizer and type(layer.input_quantizer) is UniformQuantizer
        assert torch.equal(codes_of(layer), codes_of(start.get_submodule(name)))
        assert torch.equal(layer.input_quantizer.zero_point, start.get_submodule(name).input_quantizer.zero_point)


def test_bias_tuning_that_finds_nothing_better_keeps_the_start():
    _, calibration, model, references, held_out = biased_case()
    start = copy.deepcopy(model).state_dict()
    wrong = [torch.randn_like(reference) * 100 for reference in references]
    result = tune_biases(
        model, calibration.fitting, wrong, calibration.held_out, held_out, "classification", BiasTuningSettings(epochs=4, rate=1.0)
    )
    assert result["epochs"] == 0 and result["after"] == result["before"]
    assert all(torch.equal(tensor, start[key]) for key, tensor in model.state_dict().items())


def test_biases_of_a_frozen_network_are_tuned_too():
    """Deployed networks often have requires_grad off everywhere."""
    model = make(Attention).requires_grad_(False)
    network, calibration, start, _ = setup(model, "W3A8", name="attention")
    references = [outputs_of(network.folded, [batch]) for batch in calibration.fitting]
    held_out = outputs_of(network.folded, calibration.held_out)
    settings = BiasTuningSettings(epochs=3, rate=1e-2)
    result = tune_biases(start, calibration.fitting, references, calibration.held_out, held_out, "classification", settings)
    assert result["after"] < result["before"]


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_trained_loss_is_the_measured_distance(task):
    outputs, reference = torch.randn(9, 5), torch.randn(9, 5)
    assert float(TASKS[task].distance.loss(outputs, reference)) == pytest.approx(distance(outputs, reference, task), rel=1e-5)


def test_a_scheme_with_float_and_pruned_layers_is_reconstructed():
    settings = CalibrateSettings(weight_bits=(3,), activation_bits=(8,), keep={"conv1": Precision(), "conv2": Precision(0)})
    calibration = calibration_of("chain")
    network = observe_network(make(Chain), calibration.fitting[0], settings.options)
    candidates: Candidates = range_candidates(network, calibration, settings)
    scheme = Scheme({name: options[0] for name, options in network.choices.items()})
    model = apply_scheme(network.prepared, scheme, candidates)
    starts = free_weights(network, candidates, scheme)
    errors = sequential(model, network.folded, network.units, starts, network.wiring, calibration, AdaQuantSettings(steps=3), 2**30)
    assert scheme_of(model) == scheme and set(errors) == {"fc"}  # nothing to fit in the others


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("part", [1, 3, 7, 8])
def test_gradients_of_a_batch_in_parts_are_those_of_the_whole(task, part):
    model, batch = network_and_inputs("residual", 7)
    reference = torch.randn(*predict(model, batch).shape, generator=torch.Generator().manual_seed(0))
    found = []
    for size in (None, part):
        model.zero_grad()
        _add_gradients(model.double(), Batch(batch.inputs.double()), reference.double(), task, size)
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-12)
