"""MSQ: bits that are pulled, bits that are dropped, the budget, and the contents of a checkpoint."""

import copy
import functools
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Depthwise, Residual, Tokens, images, make

import anybit
from anybit.allocation.choice import fits_budget
from anybit.budget import Budget, bits_above
from anybit.data.batches import Batch, call
from anybit.errors import InfeasibleBudget, InvalidFile, InvalidSetting
from anybit.methods.msq import MSQ, ShrinkingWeight
from anybit.networks import batchnorm
from anybit.networks.layers import codes_of, quantized_layers, weight_rows
from anybit.numerics.affine import quant_limits
from anybit.numerics.quantizers import UniformQuantizer
from anybit.progress import listening
from anybit.roads.grow import frozen, make_trainee, observe_trainable
from anybit.roads.settings import GrowSettings
from anybit.scheme import Precision

few = settings(max_examples=20, deadline=None)
NETWORKS = {
    Residual: lambda: images(8),
    Depthwise: lambda: images(8),
    Tokens: lambda: torch.randint(0, 20, (8, 7), generator=torch.Generator().manual_seed(0)),
}


def shrinking_of(cls, budget=None, **settings_):
    """A network ready for training, with float activations, its observation and its inputs."""
    x = NETWORKS[cls]()
    options = GrowSettings.of(activation_bits=None, **settings_)
    network = observe_trainable(make(cls), Batch(x[:2]), options, None, "msq")
    return make_trainee(network, [Batch(x)], budget and Budget.parse(budget), options, "msq"), network, x


@functools.cache
def start_of(budget):
    """The same for a residual network, created once; tests copy it."""
    return shrinking_of(Residual, budget)


def step(trainee, x):
    """Compute the gradients of one training step."""
    for parameter in trainee.model.parameters():
        parameter.grad = None
    (call(trainee.model, x).square().mean() + trainee.penalty()).backward()


def random_rows(seed=0, channels=3, columns=16):
    return torch.randn(channels, columns, generator=torch.Generator().manual_seed(seed))


# The last bit


@pytest.mark.parametrize("bits", range(3, 9))
def test_last_bits_are_distances_to_the_nearest_code_of_one_bit_less(bits):
    rows, slot = random_rows(), ShrinkingWeight(random_rows(), bits)
    scale = slot.log_scale.exp().detach()
    low, high = quant_limits(bits - 1, signed=True)
    coarse = 2 * scale[:, :, None] * torch.arange(low, high + 1)  # [channels, 1, codes]
    nearest = (rows[:, :, None] - coarse).abs().min(2).values
    assert torch.allclose(slot.last_bits(rows).abs() * scale * 2 ** (bits - 1), nearest, atol=1e-6)


def test_pull_is_zero_on_even_codes_and_moves_every_other_weight_towards_one():
    slot = ShrinkingWeight(random_rows(), 4)
    scale = slot.log_scale.exp().detach()
    even = scale * torch.tensor([-8.0, -2.0, 0.0, 4.0, 6.0])
    assert not slot.last_bits(even).any()
    rows = (even + 0.3 * scale).requires_grad_()
    slot.last_bits(rows).abs().sum().backward()
    assert torch.allclose(rows.grad, (1 / (scale * 8)).expand_as(rows)) and slot.log_scale.grad is None


def test_penalty_is_the_pull_of_layers_that_may_lose_bits():
    trainee, _, _ = shrinking_of(Residual, "3bit", keep={"fc": Precision(4, None)}, pull=0.5)
    expected = sum(slot.last_bits(trainee.rows(name)).abs().sum() for name, slot in trainee.slots.items() if name != "fc")
    assert "fc" not in trainee.shrinking and trainee.penalty().item() == pytest.approx(0.5 * expected.item(), rel=1e-5)
    trainee.before_step(1.0)
    assert trainee.penalty() == 0
    for none in (shrinking_of(Residual, "3bit", pull=0.0), shrinking_of(Residual, None)):
        assert none[0].penalty() == 0


# Which bits


@given(st.integers(0, 1000), st.sampled_from([2.0, 2.317, 3.0, 4.5, 6.0]))
@few
def test_the_end_meets_the_budget_and_no_dropped_bit_would_have_fitted(seed, bits):
    trainee, network, _ = copy.deepcopy(start_of(f"{bits}bit"))
    generator = torch.Generator().manual_seed(seed)
    for progress in (0.2, 0.35, 1.0):  # what earlier rounds left to the last
        for squares in trainee.squared_gradients.values():
            squares.copy_(torch.rand(squares.shape, generator=generator))
        trainee.steps = 1
        trainee.before_step(progress)
    scheme = trainee.scheme()
    assert fits_budget(network.costs, scheme, trainee.budget)
    for name, precision in scheme.items():  # the knapsack leaves no room that it could use
        if precision.weight_bits < 6:
            more = {**scheme, name: Precision(precision.weight_bits + 1, None)}
            assert bits_above(trainee.budget, network.costs, more) > 0


def test_dropped_bits_cost_least_of_all_schemes_within_the_budget():
    trainee, network, x = shrinking_of(Residual, "3.1bit", start_bits=4)
    step(trainee, x)
    trainee.before_step(0.3)
    step(trainee, x)
    trainee.see_gradients()
    losses = trainee.losses(network.choices)
    trainee.before_step(1.0)
    names = list(network.choices)
    schemes = [dict(zip(names, options, strict=True)) for options in itertools.product(*network.choices.values())]
    fitting = [one for one in schemes if bits_above(trainee.budget, network.costs, one) <= 0]
    totals = [sum(losses[name, precision] for name, precision in one.items()) for one in (trainee.scheme(), *fitting)]
    assert totals[0] <= min(totals[1:]) * (1 + 1e-3)


def test_bits_stay_where_the_loss_is_sensitive_to_them():
    trainee, _, _ = shrinking_of(Residual, "3bit")
    for name, squares in trainee.squared_gradients.items():
        squares.fill_(1e6 if name == "block1.conv1" else 1.0)
    trainee.before_step(1.0)
    bits = {name: precision.weight_bits for name, precision in trainee.scheme().items()}
    assert bits["block1.conv1"] == 6 and min(bits.values()) == 2  # from which it follows that a layer may lose several at once


def test_limits_fall_from_the_start_to_the_budget_in_rounds():
    trainee, network, x = shrinking_of(Residual, "3bit", dropping=0.5, drops=4)
    seen = []
    for progress in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.9, 1.0):
        step(trainee, x)
        restarted = trainee.before_step(progress)
        seen.append((network.costs.weight_bits(trainee.scheme()), len(restarted)))
    bits = [one for one, _ in seen]
    assert bits[0] == 6 and sorted(bits, reverse=True) == bits and bits[5] == bits[-1] <= 3
    for round_, at in enumerate((2, 3, 4, 5), 1):  # 0.125 is passed at 0.2, and so on
        assert bits[at] <= 6 - 3 * round_ / 4 + (1e-9 if at == 5 else 3 / 4)
    assert all((count > 0) == (after < before) for (before, _), (after, count) in itertools.pairwise(seen))


def test_budgets_of_bytes_and_several_limits_are_met():
    for budget in ("1500B", "4bit,1800B", "18%"):
        trainee, network, x = shrinking_of(Residual, budget)
        trainee.before_step(1.0)
        canonical = frozen(trainee, network, [Batch(x)])
        assert all(cost.total(network.costs, canonical.scheme) <= limit for cost, limit in trainee.budget.costs())


@pytest.mark.parametrize(
    ("budget", "error", "words"),
    [
        ("1bit", InfeasibleBudget, "2bit"),
        ("7bit", InvalidSetting, "start_bits"),
        ("bops=1M", InvalidSetting, "bits or bytes"),
    ],
)
def test_unreachable_budget_error_names_the_remedy(budget, error, words):
    labelled = (images(16), torch.zeros(16, dtype=torch.long))
    with pytest.raises(error, match=words):
        anybit.grow(make(Residual), labelled, budget, method="msq", epochs=1, batch_size=8)


def test_each_dropped_bit_is_reported_and_recorded():
    events = []
    labelled = (images(16), torch.arange(16) % 5)
    with listening(events=lambda event, fields: events.append(fields) if event == "dropped" else None):
        result = anybit.grow(make(Residual), labelled, "3bit", method="msq", epochs=2, batch_size=8, dropping=1.0, drops=3)
    recorded = [one for epoch in result.report["epochs"] for one in epoch["dropped"]]
    bits = dict.fromkeys(result.scheme, 6)
    for fields in events:
        assert all(f"{name} {before} -> {after}" in fields["note"] for name, (before, after) in fields["layers"].items())
        for name, (before, after) in fields["layers"].items():
            assert bits[name] == before and (before > after or fields["progress"] == events[-1]["progress"])
            assert recorded.pop(0) == {"layer": name, "from": before, "to": after, "progress": fields["progress"]}
            bits[name] = after
    assert not recorded and bits == {name: precision.weight_bits for name, precision in result.scheme.items()}
    assert result.report["certificate"]["bound"] <= result.report["certificate"]["value"]


# Training, freezing, checkpoints


@pytest.mark.parametrize("cls", NETWORKS)
def test_freezing_a_network_changes_outputs_only_by_float_rounding(cls):
    trainee, network, x = shrinking_of(cls, "3bit")
    step(trainee, x)
    trainee.before_step(1.0)
    batchnorm.reestimate(trainee.model, [Batch(x)])
    rounded = call(trainee.model.eval(), x).detach()
    canonical = frozen(trainee, network, [Batch(x)])
    assert torch.allclose(call(canonical.model, x), rounded, rtol=1e-4, atol=1e-4 * float(rounded.abs().max()))
    for layer in quantized_layers(canonical.model).values():
        assert type(layer.weight_quantizer) is UniformQuantizer
        assert torch.equal(weight_rows(layer, layer.weight), codes_of(layer).float() * layer.weight_quantizer.scale)
    assert canonical.scheme == trainee.scheme()


def test_trains_one_number_a_weight():
    trainee, network, _ = shrinking_of(Residual, "3bit")
    weights = sum(layer.weights for layer in network.costs.layers.values())
    rows = sum(layer.rows for layer in network.costs.layers.values())
    others = sum(p.numel() for name, p in network.float_model.named_parameters() if p.dim() == 1)
    assert sum(p.numel() for group in trainee.parameter_groups() for p in group["params"]) == weights + rows + others


def test_a_gradient_counts_once():
    trainee, _, x = shrinking_of(Residual, "3bit")
    step(trainee, x)
    trainee.end_of_epoch()
    once = copy.deepcopy(trainee.squared_gradients)
    trainee.before_step(0.01)
    assert trainee.steps == 1 and all(torch.equal(once[name], squares) for name, squares in trainee.squared_gradients.items())
    assert all(squares.any() for squares in once.values())


def test_interrupted_training_ends_with_the_same_bytes(tmp_path, monkeypatch):
    labelled = (images(16), torch.arange(16) % 5)
    run = {"method": "msq", "epochs": 3, "batch_size": 8, "drops": 4, "dropping": 0.8}
    whole = anybit.grow(make(Residual), labelled, "3bit", **run).save(tmp_path / "whole")
    checkpoint = tmp_path / "checkpoint"
    from anybit.loops.checkpoint import save_checkpoint

    def interrupted(*arguments):
        save_checkpoint(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("anybit.loops.training.save_checkpoint", interrupted)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                anybit.grow(make(Residual), labelled, "3bit", checkpoint=checkpoint, **run)
    resumed = anybit.grow(make(Residual), labelled, "3bit", checkpoint=checkpoint, **run)
    assert [one["epoch"] for one in resumed.report["epochs"]] == [1, 2, 3]
    folder = resumed.save(tmp_path / "resumed")
    for name in ("model.safetensors", "scheme.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert resumed.report["epochs"] == json.loads((whole / "report.json").read_text())["epochs"]


@pytest.mark.parametrize("bad", [{"bits": {"fc": 9}}, {"rounds": 99}, {"bits": {}}, {"steps": "many"}])
def test_decisions_of_another_network_are_rejected(bad):
    trainee, _, _ = shrinking_of(Residual, "3bit")
    assert isinstance(trainee, MSQ)
    with pytest.raises(InvalidFile):
        trainee.restore({**trainee.decisions(), **bad})


@pytest.mark.parametrize("bad", [{"start_bits": 9}, {"start_bits": 1}, {"dropping": 0.0}, {"drops": 0}, {"pull": -1.0}])
def test_rejects_invalid_settings(bad):
    with pytest.raises(InvalidSetting):
        GrowSettings.of(**bad)
