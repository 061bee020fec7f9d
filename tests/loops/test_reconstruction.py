"""The reconstruction loop with every rounding: its effects, and the state that it leaves unchanged."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from networks import Attention, Chain, Residual, assert_untouched, images, make, numbers, snapshot, zero_channel
from rounded import Rounded, rounded
from torch import nn

from anybit.data.batches import Batch
from anybit.data.samples import Calibration
from anybit.data.tasks import outputs_of
from anybit.loops.closed_form import float_patches
from anybit.loops.reconstruction import DroppedInput, ReconstructionSettings, parallel, reconstruct, sequential
from anybit.loops.units import UnitData, capture_sides, identity, mix
from anybit.methods.adaquant import AdaQuant
from anybit.methods.table import ROUNDINGS, rounding_named
from anybit.networks.capture import MemoryBudget, capture
from anybit.networks.layers import codes_of, quantized_layers, scheme_of, weight_rows
from anybit.numerics.quantizers import UniformQuantizer
from anybit.scheme import Precision

FEW = ReconstructionSettings(AdaQuant, steps=5)
every_rounding = pytest.mark.parametrize("rounding", [rounding_named(name) for name in ROUNDINGS], ids=ROUNDINGS)


class Reckless(AdaQuant):
    """A rounding with steps so large that nothing improves."""

    def __init__(self, start, quantizer):
        super().__init__(start, quantizer, weight_rate=50.0, scale_rate=3.0)


def fit(case: Rounded, settings: ReconstructionSettings = FEW, model: nn.Module | None = None) -> dict[str, dict[str, float]]:
    """Reconstruct the rounded model, or `model`, in place, sequentially; return each unit's errors."""
    network = case.network
    return sequential(model or case.model, network.folded, network.units, case.starts, network.wiring, case.calibration, settings)


def fitted(
    model: nn.Module, precision: str, settings: ReconstructionSettings = FEW, **more
) -> tuple[Rounded, nn.Module, dict[str, dict[str, float]]]:
    """Return (the rounded case, a reconstructed copy of its model, each unit's errors)."""
    case = rounded(model, precision, **more)
    changed = copy.deepcopy(case.model)
    return case, changed, fit(case, settings, changed)


@every_rounding
@pytest.mark.parametrize("unit", ["layer", "block"])
@pytest.mark.parametrize("precision", ["W2A4", "W4A8", "W3"])
def test_held_out_error_of_no_unit_rises(precision, unit, rounding):
    steps = 100 if rounding is AdaQuant else 200  # other roundings decide at the end what AdaQuant rounds from the first step
    # Network 1: in network 0 a block at 3 bits has a tenth to gain, so that the last bits of a processor's sums decide.
    case, _, errors = fitted(make(Residual, 1), precision, ReconstructionSettings(rounding, steps=steps, batch_size=16), unit=unit)
    assert set(errors) == {unit.name for unit in case.network.units}
    assert all(error["after"] <= error["before"] for error in errors.values())
    assert sum(error["after"] for error in errors.values()) < 0.85 * sum(error["before"] for error in errors.values())


def test_unit_without_improvement_stays_bitwise_unchanged():
    case, changed, errors = fitted(make(Residual), "W4A4", ReconstructionSettings(Reckless, steps=4))
    not_improved = [name for name, error in errors.items() if error["steps"] == 0]
    assert not_improved
    for name in not_improved:
        state = changed.get_submodule(name).state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in case.model.get_submodule(name).state_dict().items())
        assert errors[name]["after"] == errors[name]["before"]


@every_rounding
def test_eight_bits_hardly_change_the_outputs(rounding):
    case, changed, _ = fitted(make(Residual), "W8A8", ReconstructionSettings(rounding, steps=100, batch_size=16))
    inputs = [Batch(images(16, 9))]
    before, after = outputs_of(case.model, inputs), outputs_of(changed, inputs)
    assert float((after - before).square().sum()) < 1e-3 * float(before.square().sum())


@every_rounding
def test_result_is_canonical_and_errors_are_measured_on_it(rounding):
    case, changed, errors = fitted(make(Residual), "W3A4", ReconstructionSettings(rounding, steps=50, batch_size=16))
    assert scheme_of(changed) == scheme_of(case.model)
    for layer in quantized_layers(changed).values():
        assert type(layer.weight_quantizer) is UniformQuantizer and type(layer.input_quantizer) is UniformQuantizer
        assert torch.equal(weight_rows(layer, layer.weight), codes_of(layer).float() * layer.weight_quantizer.scale)
        assert torch.equal(weight_rows(layer, layer.weight), weight_rows(layer, layer._parameters["weight"]))
    assert list(changed.state_dict()) == list(case.model.state_dict())
    repeated = fit(case, replace(FEW, rounding=Reckless), copy.deepcopy(changed))  # the error before any change
    for name, error in errors.items():
        assert repeated[name]["before"] == pytest.approx(error["after"], rel=1e-3)


@every_rounding
def test_result_depends_on_the_seed(rounding):
    states = [fitted(make(Residual), "W2A4", ReconstructionSettings(rounding, steps=6, seed=seed))[1].state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    assert any(not torch.equal(tensor, states[2][key]) for key, tensor in states[0].items())


@every_rounding
def test_global_random_state_is_restored(rounding):
    state = torch.get_rng_state()
    fitted(make(Chain), "W4A4", replace(FEW, rounding=rounding))
    assert torch.equal(torch.get_rng_state(), state)


@every_rounding
def test_float_network_is_unchanged(rounding):
    case = rounded(make(Residual), "W4A4")
    models = (case.network.float_model, case.network.folded, case.network.prepared)
    before = [snapshot(model) for model in models]
    fit(case, replace(FEW, rounding=rounding))
    for model, was in zip(models, before, strict=True):
        assert_untouched(model, was)


@every_rounding
def test_all_zero_channel_stays_finite(rounding):
    _, changed, errors = fitted(zero_channel(make(Chain)), "W2A4", replace(FEW, rounding=rounding, steps=100), name="chain")
    assert all(torch.isfinite(tensor).all() for tensor in changed.state_dict().values())
    assert all(error["after"] <= error["before"] < float("inf") for error in errors.values())


class Scaled(nn.Module):
    """Adds `share` of a convolution's output to its input."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, share=1.0):
        return x + share * torch.relu(self.conv(x))


class Deepening(nn.Module):
    """Blocks that the network calls with a number besides their input, a different one for each."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Scaled() for _ in range(3))

    def forward(self, x):
        for depth, block in enumerate(self.blocks, 1):
            x = block(x, share=1 / depth)
        return x.mean((2, 3))


@pytest.mark.parametrize("memory", [0, 10_000])
def test_spilling_to_disk_changes_no_result(memory):
    one, other = (fitted(make(Residual), "W3A4", replace(FEW, memory=limit))[1].state_dict() for limit in (memory, 2**30))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.parametrize(("network", "unit"), [(Chain, "layer"), (Deepening, "block")], ids=["chain", "numbers as arguments"])
def test_carried_inputs_equal_captured_ones(network, unit, monkeypatch):
    case = rounded(make(network), "W3A4", unit=unit)
    models, errors = [copy.deepcopy(case.model), copy.deepcopy(case.model)], []
    assert any(case.network.wiring.feeds(a.name, b.name) for a, b in pairwise(case.network.units))
    for model in models:
        errors.append(fit(case, FEW, model))
        monkeypatch.setattr(type(case.network.wiring), "feeds", lambda *names: False)
    for name in errors[0]:
        assert errors[0][name] == pytest.approx(errors[1][name], rel=1e-3, abs=1e-7)
    assert torch.allclose(*(outputs_of(model, case.calibration.held_out) for model in models), atol=1e-3)


def test_gathering_patches_stops_after_the_last_layer_read():
    case, computed = rounded(make(Deepening), "W3A4"), []
    network, unit = case.network, case.network.units[0]
    fitting, _ = capture_sides(None, network.folded, unit, case.calibration, MemoryBudget(2**30), 8)
    module = network.folded.get_submodule(unit.name)
    module.conv.register_forward_hook(lambda *call: computed.append(1))
    drawn = float_patches({"conv": module.conv}, module, fitting, 0, 2**30)
    assert len(drawn["conv"]) == len(list(fitting.parts())) > len(computed) == 1  # the first pass shows which layer is the last


@every_rounding
def test_parallel_units_are_independent(rounding):
    case = rounded(make(Residual), "W3", unit="layer")
    network, together, alone = case.network, copy.deepcopy(case.model), copy.deepcopy(case.model)
    settings, rest = replace(FEW, rounding=rounding), (network.wiring, case.calibration)
    parallel({3: together}, network.folded, network.units, {3: case.starts}, *rest, settings)
    errors = parallel({3: alone}, network.folded, network.units[2:3], {3: case.starts}, *rest, settings)
    (name,) = errors
    for layer, moved in quantized_layers(alone).items():
        other = quantized_layers(together if layer == name else case.model)[layer]
        assert torch.equal(codes_of(moved), codes_of(other)) and torch.equal(moved.weight_quantizer.scale, other.weight_quantizer.scale)


def test_variants_are_reconstructed_independently():
    case, coarse = (rounded(make(Chain), bits, name="chain", unit="layer") for bits in ("W3", "W2"))
    network, alone, rest = case.network, copy.deepcopy(case.model), (case.network.wiring, case.calibration, FEW)
    variants, starts = {2: coarse.model, 3: case.model}, {2: coarse.starts, 3: case.starts}
    both = parallel(variants, network.folded, network.units, starts, *rest)
    single = parallel({3: alone}, network.folded, network.units, {3: case.starts}, *rest)
    assert {name: errors[3] for name, errors in both.items()} == {name: errors[3] for name, errors in single.items()}


@every_rounding
def test_attention_layers_are_reconstructed(rounding):
    _, changed, errors = fitted(make(Attention), "W3A8", replace(FEW, rounding=rounding), name="attention")
    assert set(errors) == {"inner", "attention.in_proj", "attention.out_proj", "fc"} and all(
        torch.isfinite(tensor).all() for tensor in changed.state_dict().values()
    )


@every_rounding
def test_reconstructs_scheme_with_float_and_pruned_layers(rounding):
    case = rounded(make(Chain), "W3A8", "chain", keep={"conv1": Precision(), "conv2": Precision(0)})
    scheme = scheme_of(case.model)
    errors = fit(case, replace(FEW, rounding=rounding))
    assert scheme_of(case.model) == scheme and set(errors) == {"fc"}  # the others have nothing to fit


def unit_data(model: nn.Module, name: str, inputs: torch.Tensor) -> UnitData:
    return UnitData(capture(model, name, [Batch(inputs)], len(inputs), MemoryBudget(2**30), outputs=True), None, len(inputs))


def test_errors_are_measured_after_the_activation():
    """Values that a ReLU cuts off are no error: a unit whose outputs are all negative has none."""
    case = rounded(make(Chain), "W2A2", name="chain", unit="layer")
    data = [unit_data(case.network.folded, "conv1", images(8, seed)) for seed in (1, 2)]
    dead = lambda output: torch.relu(output - 1e6)  # noqa: E731
    errors = reconstruct(case.model.conv1, {"": case.starts["conv1"]}, *data, dead, FEW)
    assert errors["before"] == errors["after"] == 0


def test_penalty_receives_progress_and_is_minimized():
    received = []

    class Pulled(AdaQuant):
        """A weight with a penalty that pulls it to zero."""

        def penalty(self, progress):
            received.append(progress)
            return 1e3 * self.in_steps.square().mean()

    case = rounded(make(Chain), "W8", name="chain", unit="layer")
    data = [unit_data(case.network.folded, "conv1", images(8, seed)) for seed in (1, 2)]
    layer, weights = case.model.conv1, []
    monitor = ReconstructionSettings(Pulled, steps=4)
    hook = layer.register_forward_pre_hook(lambda layer, args: weights.append(float(layer.weight.detach().square().sum())))
    reconstruct(layer, {"": case.starts["conv1"]}, *data, identity, monitor)
    hook.remove()
    assert received == [0.25, 0.5, 0.75, 1.0]
    assert min(weights) < weights[0]


def test_activations_are_dropped_only_in_training():
    learned = DroppedInput(UniformQuantizer(2, False, torch.tensor(1.0), torch.tensor(1.0)), drop=0.5)
    x = torch.rand(4000) * 0.4 + 0.05
    learned.eval()
    assert torch.equal(learned(x), torch.zeros(4000))
    learned.train()
    with torch.random.fork_rng(devices=[]):
        share = float((learned(x) == x).float().mean())
    assert share == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("drop", [0.0, 0.25, 1.0])
def test_mix_takes_each_element_from_one_of_the_two(drop):
    x, quantized = torch.randn(31, 101), torch.randn(31, 101)
    mixed = mix(x, quantized, drop)
    assert ((mixed == x) | (mixed == quantized)).all()
    assert float((mixed == x).float().mean()) == pytest.approx(drop, abs=0.04)


class Pyramid(nn.Module):
    """A head that runs on two sizes of images, as in detectors, with an activation after each call."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, 2, 1)
        self.head = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x):
        large = torch.relu(self.stem(x))
        small = torch.relu(self.down(large))
        return torch.cat([torch.relu(self.head(level)).flatten(2) for level in (large, small)], 2)


@every_rounding
@pytest.mark.parametrize("form", ["sequential", "parallel"])
def test_repeated_layer_is_fitted_to_all_its_calls(form, rounding):
    case = rounded(make(Pyramid), "W2A4")
    network, settings = case.network, ReconstructionSettings(rounding, steps=100, batch_size=16)
    changed = copy.deepcopy(case.model)
    if form == "sequential":
        errors = fit(case, settings, changed)["head"]
    else:
        starts = {2: case.starts}
        errors = parallel({2: changed}, network.folded, network.units, starts, network.wiring, case.calibration, settings)["head"][2]

    def error(model: nn.Module) -> float:
        """Compute the head's error over both calls, by definition."""
        wrong = power = 0.0
        for batch in case.calibration.held_out:
            with torch.no_grad():
                large = torch.relu(network.folded.stem(batch.inputs))
                inputs = [large, torch.relu(network.folded.down(large))]
                for x in inputs:
                    target = torch.relu(network.folded.head(x))
                    wrong += float((torch.relu(model.head(x)) - target).square().sum())
                    power += float(target.square().sum())
        return wrong / power

    assert errors["after"] < errors["before"]
    if form == "parallel":
        assert error(changed) == pytest.approx(errors["after"], rel=1e-3) and error(case.model) == pytest.approx(errors["before"], rel=1e-3)


class Positions(nn.Module):
    """A layer that reads data in one call, and in another the same positions for any batch."""

    def __init__(self):
        super().__init__()
        self.key, self.positions = nn.Linear(6, 6), nn.Parameter(torch.randn(7, 6))

    def forward(self, x):
        return self.key(x) @ self.key(self.positions).T


def test_call_without_data_is_fitted_as_one_sample():
    batches = [
        Batch(numbers(count, 5, 6, seed=count).cumsum(2)) for count in (70, 140, 90)
    ]  # as many positions as samples in a batch, or not
    case = rounded(make(Positions), "W2A8", calibration=Calibration(batches[:2], batches[2:]))
    fitting = capture_sides(None, case.network.folded, case.network.units[0], case.calibration, MemoryBudget(2**20), 32)[0]
    data, constant = fitting.calls
    assert (data.count, constant.count) == (210, 1) and torch.equal(constant.arguments(torch.tensor([0]))[0][0], case.model.positions)
    errors = fit(case, ReconstructionSettings(AdaQuant, steps=60, batch_size=16))
    assert errors["key"]["after"] < errors["key"]["before"]


@every_rounding
@pytest.mark.parametrize("factor", [2.0**-100, 2.0**70, 2.0**100])
def test_a_network_in_other_units_is_reconstructed_alike(factor, rounding):
    """The squares of such values exceed float32."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False)).eval(), numbers(48, 8)
    settings = ReconstructionSettings(rounding, steps=20, batch_size=16)
    halves = [Calibration([Batch(x[:32] * unit)], [Batch(x[32:] * unit)]) for unit in (1.0, factor)]
    (_, plain, expected), (_, scaled, errors) = (fitted(model, "W3A8", settings, calibration=half, unit="layer") for half in halves)
    assert all(error == pytest.approx(expected[name], rel=0.01) for name, error in errors.items())
    assert torch.allclose(scaled(x * factor) / factor, plain(x), atol=0.05)
