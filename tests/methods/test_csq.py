"""Gates, planes, the budget, and invariance under freezing."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Depthwise, NoBatchNorm, Residual, Tokens, Upsampling, images, make

import anybit
from anybit.budget import Budget
from anybit.data.batches import Batch, call
from anybit.errors import InfeasibleBudget, InvalidSetting
from anybit.methods.csq import CSQ, GatedWeight, _GatedSum, _likeliest, gate, slope
from anybit.methods.settings import CSQSettings
from anybit.networks import batchnorm
from anybit.networks.layers import codes_of, quantized_layers, weight_rows
from anybit.numerics.quantizers import UniformQuantizer
from anybit.numerics.ranges import weight_scale
from anybit.roads.grow import frozen, make_trainee, observe_trainable
from anybit.roads.settings import GrowSettings
from anybit.scheme import Precision

few = settings(max_examples=40, deadline=None)
NETWORKS = {
    Residual: lambda: images(16),
    Depthwise: lambda: images(16),
    Upsampling: lambda: images(16),
    NoBatchNorm: lambda: images(16),
    Tokens: lambda: torch.randint(0, 20, (16, 7), generator=torch.Generator().manual_seed(0)),
}


def random_weight(seed=0, planes=4, per_channel=False, **kinds) -> GatedWeight:
    """Create gates with random logits, for two channels of nine weights."""
    generator = torch.Generator().manual_seed(seed)
    weight = GatedWeight(torch.randn(2, 9, generator=generator), planes, per_channel, **kinds)
    with torch.no_grad():
        for logits in (weight.positive, weight.negative, weight.planes):
            logits.copy_(torch.randn(logits.shape, generator=generator))
    return weight


def growth_of(cls, budget=None, **settings_):
    """A network ready for training, with float activations, and its observation."""
    x = NETWORKS[cls]()
    options = GrowSettings.of(activation_bits=None, **settings_)
    network = observe_trainable(make(cls), Batch(x[:2]), options, None, "csq")
    return make_trainee(network, [Batch(x)], budget and Budget.parse(budget), options, "csq"), network, x


# The gate


def test_hardened_gate_is_a_step():
    logits = torch.tensor([-2.0, -0.01, 0.01, 3.0])
    soft = gate(logits, torch.tensor(1e4), "soft")
    assert torch.allclose(soft, gate(logits, torch.tensor(1.0), "hard"))
    assert gate(torch.zeros(1), torch.tensor(1.0), "hard") == 1  # a gate is open where m >= 0


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", ["soft", "straight-through"])
def test_fused_sum_has_the_values_and_gradients_of_the_equation(kind, per_channel):
    weight = random_weight()
    temperature = torch.tensor(1.0 if kind == "straight-through" else 2.5)
    seed = torch.randn(2, 9, generator=torch.Generator().manual_seed(1))

    def plain(positive, negative, place, step):
        def f(m):
            soft = torch.sigmoid(temperature * m)
            return soft if kind == "soft" else soft + ((m >= 0).float() - soft).detach()

        return ((f(positive) - f(negative)) * place[:, None, None]).sum(0) * step

    results = []
    for function in (plain, lambda p, n, v, s: _GatedSum.apply(p, n, v, s, temperature, kind, range(len(v)))):
        parts = (weight.positive, weight.negative, weight.place_values, torch.tensor([[0.5], [2.0]])[: 2 if per_channel else 1])
        inputs = [t.detach().clone().requires_grad_() for t in parts]
        output = function(*inputs)
        output.backward(seed)
        results.append([output.detach(), *(t.grad for t in inputs)])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_removed_planes_contribute_nothing():
    weight = random_weight()
    place, closed = weight.place_values, weight.place_values * torch.tensor([0.0, 1.0, 1.0, 0.0])
    logits, others = (weight.positive, weight.negative), (torch.ones(1, 1), torch.tensor(2.5), "soft")
    of_all, of_some = _GatedSum.apply(*logits, closed, *others, range(4)), _GatedSum.apply(*logits, place, *others, (1, 2))
    assert torch.equal(of_all, of_some)
    gradients = [torch.autograd.grad(total.sum(), logits) for total in (of_all, of_some)]
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("decided", [-3.0, 3.0])
def test_saturated_gates_have_zero_gradient(decided):
    assert slope(torch.full((1,), decided), torch.tensor(20.0), "soft") == 0  # not a denormal number, which slows the optimizer down


def test_decided_gate_gets_no_gradient():
    weight = random_weight()
    weight.harden()
    weight.fix(range(4))
    weight(torch.zeros(2, 9)).sum().backward()
    assert weight.positive.grad is None and weight.planes.grad is None and weight.log_scale.grad is not None


def test_backward_saves_only_the_logits():
    weight = random_weight(planes=7)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        weight(torch.zeros(2, 9))
    large = {tensor.data_ptr() for tensor in saved if tensor.numel() >= 2 * 9}
    assert large <= {weight.positive.data_ptr(), weight.negative.data_ptr()}


# The start


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("planes", range(1, 8))
def test_initial_weight_is_the_trained_one_and_hardens_to_the_nearest_code(planes, per_channel):
    rows = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    step = weight_scale(rows if per_channel else rows.reshape(1, -1), planes + 1, symmetric=True)
    largest = 2**planes - 1
    clamped = (rows / step).clamp(-largest, largest)
    weight = GatedWeight(rows, planes, per_channel)
    assert torch.allclose(weight(rows), clamped * step, atol=1e-5)
    weight.fix(range(planes))
    weight.harden()
    assert torch.allclose(weight(rows), clamped.round() * step, atol=1e-5)


@given(st.floats(1.0, 1e4), st.integers(0, 100))
@few
def test_hardening_alone_keeps_a_weight_between_its_two_codes(temperature, seed):
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
    weight = GatedWeight(rows, 3, False)
    weight.temperature.fill_(temperature)
    weight.plane_temperature.fill_(1e6)
    step = weight_scale(rows.reshape(1, -1), 4, symmetric=True)
    codes = (rows / step).clamp(-7, 7)
    moved = weight(rows) / step
    assert ((moved >= codes.floor() - 1e-4) & (moved <= codes.ceil() + 1e-4)).all()


@pytest.mark.parametrize("planes", range(1, 8))
def test_only_one_gate_is_undecided_between_adjacent_codes(planes):
    rows = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    weight = GatedWeight(rows, planes, False)
    codes = rows / weight_scale(rows.reshape(1, -1), planes + 1, symmetric=True)
    undecided = torch.cat([weight.positive, weight.negative]).abs() < 0.999 * weight.logit
    between = (codes.abs() < 2**planes - 1) & ((codes - codes.round()).abs() > 1e-3)
    assert (undecided.sum(0)[between] == 1).all() and between.float().mean() > 0.5
    assert not undecided[[b for b in range(2 * planes) if b % planes]].any()  # only gates of the lowest plane


@pytest.mark.parametrize("lost", range(1, 7))
def test_removing_low_planes_rounds_to_the_remaining_ones(lost):
    rows = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    weight = GatedWeight(rows, 7, True)
    step, coarse = weight_scale(rows, 8, symmetric=True), 2**lost
    weight.fix(range(lost, 7))
    weight.harden()
    largest = 127 // coarse
    assert torch.allclose(weight(rows) / step, (rows / step / coarse).round().clamp(-largest, largest) * coarse, atol=1e-3)


@pytest.mark.parametrize("cls", NETWORKS)
def test_initial_outputs_equal_the_float_ones_within_eight_bits(cls):
    growth, network, x = growth_of(cls, per_channel=True)
    float_outputs = call(network.float_model, x)
    outputs = call(growth.model.eval(), x)
    assert (outputs - float_outputs).abs().max() < 0.05 * float_outputs.abs().max()
    assert set(growth.gated) == set(network.names)  # every covered layer has gates: first, last, shortcut, depthwise, embedding


# Precision


def test_bits_are_the_fewest_that_hold_the_codes():
    for live in itertools.chain.from_iterable(itertools.combinations(range(4), n) for n in range(5)):
        weight = random_weight()
        weight.fix(live)
        weight.harden()
        values, quantizer = weight.freeze(weight.positive[0])
        if not live:
            assert weight.bits() == 0 and quantizer is None and not values.any()
            continue
        codes = quantizer.codes(values)
        assert quantizer.bits == weight.bits() == max(live) - min(live) + 2
        assert codes.abs().max() <= 2 ** (weight.bits() - 1) - 1
        assert torch.equal(quantizer.values(codes), values)


@given(st.integers(0, 10_000), st.integers(1, 7), st.booleans())
@few
def test_freezing_a_hard_weight_changes_only_float_rounding(seed, planes, per_channel):
    weight = random_weight(seed, planes, per_channel)
    weight.fix([b for b in range(planes) if b % 2 == seed % 2] or [0])
    weight.harden()
    values, quantizer = weight.freeze(weight.positive[0])
    assert torch.allclose(weight(values), values, rtol=1e-6, atol=0)
    assert torch.equal(quantizer(values), values)


@pytest.mark.parametrize("cls", NETWORKS)
def test_freezing_a_network_changes_outputs_only_by_float_rounding(cls):
    growth, network, x = growth_of(cls, "3bit")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in growth.gated.values():
            for logits in (weight.positive, weight.negative, weight.planes):
                logits.add_(torch.randn(logits.shape, generator=generator))
    growth.before_step(1.0)
    batchnorm.reestimate(growth.model, [Batch(x)])
    hard = call(growth.model.eval(), x).detach()
    canonical = frozen(growth, network, [Batch(x)])
    assert torch.allclose(call(canonical.model, x), hard, rtol=1e-4, atol=1e-4 * float(hard.abs().max()))
    for layer in quantized_layers(canonical.model).values():
        assert type(layer.weight_quantizer) is UniformQuantizer and (layer.weight_quantizer.scale > 0).all()
        assert torch.equal(weight_rows(layer, layer.weight), codes_of(layer).float() * layer.weight_quantizer.scale)
    assert canonical.scheme == growth.scheme()


def test_layer_without_planes_is_pruned_and_stores_no_codes(tmp_path):
    growth, network, x = growth_of(Residual, "2bit", prune=True)
    with torch.no_grad():
        growth.gated["block1.conv1"].planes.fill_(-1)
    growth.before_step(1.0)
    canonical = frozen(growth, network, [Batch(x)])
    assert canonical.scheme["block1.conv1"] == Precision(0, None)
    assert network.costs.weight_bits(canonical.scheme) <= 2
    assert torch.isfinite(call(canonical.model, x)).all()


# The budget


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=6))
@few
def test_most_likely_planes_equal_brute_force(logits):
    for bits, (value, planes) in _likeliest(logits):
        if not bits:
            continue
        span = bits - 1
        options = [
            chosen
            for chosen in itertools.chain.from_iterable(itertools.combinations(range(len(logits)), n) for n in range(1, span + 1))
            if chosen[-1] - chosen[0] + 1 == span
        ]
        assert value == pytest.approx(max(sum(logits[b] for b in chosen) for chosen in options))
        assert planes[-1] - planes[0] + 1 == span


@given(st.integers(0, 1000), st.floats(2.0, 8.0))
@few
def test_fixing_planes_never_exceeds_the_budget(seed, bits):
    growth, network, _ = growth_of(Residual, f"{bits:.3f}bit")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in growth.gated.values():
            weight.planes.copy_(torch.randn(weight.planes.shape, generator=generator))
    growth.fix_planes()
    assert network.costs.weight_bits(growth.scheme()) <= float(f"{bits:.3f}") + 1e-9


def test_planes_within_budget_keep_their_signs():
    growth, _, _ = growth_of(Residual, "8bit", phase="continue")
    with torch.no_grad():
        for weight in growth.gated.values():
            weight.planes[:3] = -1  # the three lowest are closed
    before = {name: weight.kept_planes() for name, weight in growth.gated.items()}
    growth.fix_planes()
    assert {name: weight.kept_planes() for name, weight in growth.gated.items()} == before


def test_the_penalty_closes_planes_above_the_budget_and_opens_them_below():
    for budget, sign in (("3bit", 1), ("8bit", -1)):
        growth, _, _ = growth_of(Residual, budget, ramp=0.0, anchor=False)
        if sign < 0:
            for weight in growth.gated.values():
                weight.planes.data[:4] = -1
        growth.penalty().backward()
        assert all((sign * weight.planes.grad > 0).all() for weight in growth.gated.values())


@pytest.mark.parametrize("weighting", [0.0, 0.5, 1.0])
def test_penalty_weights_are_a_power_of_the_budget_weights(weighting):
    growth, network, _ = growth_of(Residual, "3bit", ramp=0.0, weighting=weighting)
    growth.penalty().backward()
    weights = {name: network.costs.layers[name].weights for name in growth.gated}
    gradients = {name: float(weight.planes.grad[0]) for name, weight in growth.gated.items()}
    for name in weights:
        assert gradients[name] / gradients["fc"] == pytest.approx((weights[name] / weights["fc"]) ** weighting, rel=1e-4)


def test_penalty_budget_falls_to_the_requested_one():
    growth, _, _ = growth_of(Residual, "3bit", fix=0.5, ramp=0.8)
    distances = []
    for progress in (0.0, 0.1, 0.2, 0.3, 0.4, 0.45):
        growth.searched = progress / 0.5
        distances.append(growth.penalty().item() / growth.settings.strength)
    assert distances[0] == 0 and sorted(distances) == distances and distances[4] == pytest.approx(distances[5])
    at_once, _, _ = growth_of(Residual, "3bit", ramp=0.0)
    assert distances[5] == pytest.approx(at_once.penalty().item() / at_once.settings.strength)


def test_highest_plane_is_anchored_unless_pruning_is_allowed():
    for prune in (False, True):
        growth, _, x = growth_of(Residual, "3bit", ramp=0.0, prune=prune)
        (call(growth.model, x).square().mean() + growth.penalty()).backward()
        for weight in growth.gated.values():
            assert bool(weight.planes.grad[-1] == 0) == (not prune) and (weight.planes.grad[:-1] != 0).all()


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=6))
@few
def test_anchored_planes_include_the_highest(logits):
    for bits, (_, planes) in _likeliest(logits, True):
        assert not bits or planes[-1] == len(logits) - 1


def test_counted_bytes_equal_the_file_size():
    growth, network, x = growth_of(Residual, "1500B")
    growth.before_step(1.0)
    assert network.costs.file_size(frozen(growth, network, [Batch(x)]).scheme) <= 1500


@pytest.mark.parametrize(
    ("budget", "error", "words"),
    [
        ("1bit", InfeasibleBudget, "2bit"),
        ("10%", InfeasibleBudget, "more than the budget"),
        ("9bit", InvalidSetting, "8"),
        ("bops=1M", InvalidSetting, "bits or bytes"),
    ],
)
def test_unreachable_budget_error_names_the_minimum_or_maximum(budget, error, words):
    with pytest.raises(error, match=words):
        anybit.grow(make(Residual), (images(16), torch.zeros(16, dtype=torch.long)), budget, epochs=1, batch_size=8)


def test_second_phase_starts_from_current_weights_in_the_range_of_remaining_planes():
    growth, _, _ = growth_of(Residual, "3bit")
    growth.before_step(0.1)
    weights = {name: layer.weight.detach().flatten(1) for name, layer in growth.layers.items()}
    growth.before_step(growth.settings.fix)
    for name, layer in growth.layers.items():
        bits = growth.scheme()[name].weight_bits
        step, largest = weight_scale(weights[name].reshape(1, -1), bits, symmetric=True), 2 ** (bits - 1) - 1
        assert torch.allclose(layer.weight.flatten(1), (weights[name] / step).clamp(-largest, largest) * step, atol=1e-5)


# Settings


def test_two_phases_rewind_the_temperature_as_in_the_paper():
    growth, _, _ = growth_of(Residual, "3bit", phase="rewind", final_temperature=100.0, fix=0.5, harden=1.0)
    weight = next(iter(growth.gated.values()))
    seen = []
    for progress in (0.0, 0.49, 0.5, 0.99):
        growth.before_step(progress)
        seen.append(float(weight.temperature))
    assert seen[0] == 1 and seen[1] > 80 and seen[2] == 1 and seen[3] > 80


def test_pruned_planes_of_hard_gates_stay_closed():
    growth, _, _ = growth_of(Residual, "3bit", plane_gates="straight-through")
    weight = next(iter(growth.gated.values()))
    weight.planes.data[0] = -0.5
    growth.end_of_epoch()
    weight(torch.zeros_like(weight.positive[0])).sum().backward()
    assert 0 not in weight.kept_planes() and weight.planes.grad[0] == 0 and torch.isfinite(weight.planes.grad).all()


@pytest.mark.parametrize(
    "bad", [{"planes": 0}, {"logit": 11.0}, {"planes": 8}, {"fix": 0.0}, {"fix": 0.9, "harden": 0.5}, {"weight_gates": "firm"}]
)
def test_rejects_invalid_settings(bad):
    with pytest.raises(InvalidSetting):
        CSQSettings(**bad)


def test_decisions_are_restored():
    growth, _, _ = growth_of(Residual, "3bit")
    with torch.no_grad():
        growth.gated["fc"].planes[2] = -1
    growth.before_step(1.0)
    other, _, _ = growth_of(Residual, "3bit")
    other.restore(copy.deepcopy(growth.decisions()))
    other.model.load_state_dict(growth.model.state_dict())
    assert isinstance(other, CSQ) and other.scheme() == growth.scheme() and other.hard
    for name, weight in growth.gated.items():
        assert torch.equal(weight.freeze(weight.positive[0])[0], other.gated[name].freeze(weight.positive[0])[0])
