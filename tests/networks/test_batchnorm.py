import pytest
import torch
import torch.nn.functional as F
from networks import (
    NETWORKS,
    Chain,
    Depthwise,
    Residual,
    Signal,
    Upsampling,
    assert_untouched,
    calibration_of,
    make,
    network_and_inputs,
    pictures,
    run,
    snapshot,
)
from torch import nn

from anybit.data.batches import Batch
from anybit.data.tasks import outputs_of
from anybit.errors import InvalidSetting
from anybit.methods.batchnorm_tuning import join, match_layers, tune
from anybit.networks.batchnorm import (
    ChannelStatistics,
    channel_statistics,
    flip_negative,
    fold,
    fold_checked,
    foldable,
    reestimate,
    twin_statistics,
)
from anybit.networks.candidates import Candidates, apply_scheme, weight_candidate
from anybit.networks.layers import codes_of, float_weight, prepare, quantized_layers
from anybit.networks.wiring import BATCH_NORMS, observe
from anybit.scheme import Scheme


def folded_network(cls, inputs=pictures):
    model = make(cls)
    pairs = foldable(model, observe(model, Batch(inputs(2))))
    folded, promised = fold(model, pairs)
    return model, folded, pairs, promised


def rounded(cls, bits: int) -> tuple[nn.Module, nn.Module, list[str]]:
    """(the folded float network, the same rounded to `bits`, the layers that had a batch norm)."""
    model, folded, pairs, _ = folded_network(cls)
    names = [name for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    prepared = prepare(folded, names)
    candidates = Candidates({(name, bits): weight_candidate(prepared.get_submodule(name), bits, "minmax") for name in names})
    return folded, apply_scheme(prepared, Scheme.uniform(names, f"W{bits}"), candidates), list(pairs)


@pytest.mark.parametrize("name", NETWORKS)
def test_folding_keeps_outputs_and_the_original(name):
    model, batch = network_and_inputs(name)
    assert any((norm.weight < 0).any() for norm in model.modules() if isinstance(norm, BATCH_NORMS)) or not foldable(
        model, observe(model, batch)
    )
    before, outputs = snapshot(model), run(model, batch)
    folded, _ = fold(model, foldable(model, observe(model, batch)))
    assert torch.allclose(run(folded, batch), outputs, rtol=1e-4, atol=1e-5)
    assert_untouched(model, before)


def test_no_batch_norm_is_left_where_all_can_be_folded():
    for cls in (Chain, Residual, Depthwise):
        _, folded, _, _ = folded_network(cls)
        assert not any(isinstance(module, BATCH_NORMS) for module in folded.modules())


def test_a_norm_without_gamma_and_beta_folds():
    model = make(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    model[1].weight = model[1].bias = None
    folded, promised = fold(model, {"0": "1"})
    assert torch.allclose(folded(pictures(2)), model(pictures(2)), atol=1e-5)
    assert torch.equal(promised["0"].mean, torch.zeros(4)) and torch.equal(promised["0"].deviation, torch.ones(4))


def test_a_norm_without_running_statistics_is_left_alone():
    model = make(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False, track_running_stats=False)))
    assert foldable(model, observe(model, Batch(pictures(2)))) == {}


def fold_all(model: nn.Module) -> nn.Module:
    return fold(model, foldable(model, observe(model, Batch(pictures(2)))))[0]


def test_folding_keeps_outputs_where_two_convolutions_share_a_weight():
    model = make(lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model[2].weight = model[0].weight
    assert torch.allclose(fold_all(model)(pictures(2)), model(pictures(2)), atol=1e-5)


def test_folding_keeps_outputs_where_two_convolutions_share_a_bias():
    model = make(lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model[2].bias = model[0].bias
    assert torch.allclose(fold_all(model)(pictures(2)), model(pictures(2)), atol=1e-5)


def test_folding_keeps_the_activation_inside_a_norm_of_the_users_own():
    class NormAct(nn.BatchNorm2d):
        def forward(self, x):
            return F.relu(super().forward(x))

    model = make(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), NormAct(4), nn.Conv2d(4, 2, 1)))
    assert torch.allclose(fold_all(model)(pictures(2)), model(pictures(2)), atol=1e-5)


def test_folding_keeps_outputs_of_a_padded_subclass():
    model, batch = network_and_inputs("padded")
    assert foldable(model, observe(model, batch)) == {"conv": "bn"}


@pytest.mark.parametrize("name", ["chain", "upsampling", "signal", "depthwise"])
def test_statistics_are_those_of_the_whole_output(name):
    model, _ = network_and_inputs(name)
    calibration = calibration_of(name)
    layer = observe(model, calibration.fitting[0]).layer_names()[1]
    outputs = []
    hook = model.get_submodule(layer).register_forward_hook(lambda module, args, output: outputs.append(output))
    run(model, join(calibration.fitting))
    hook.remove()
    channels = outputs[0].transpose(0, 1).flatten(1)
    measured = channel_statistics(model, [layer], calibration.fitting)[layer]
    assert torch.allclose(measured.mean, channels.mean(1), atol=1e-5)
    assert torch.allclose(measured.deviation, channels.std(1, unbiased=False), atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("cls", [Chain, Residual, Depthwise])
def test_after_tuning_each_layers_statistics_are_the_float_ones(cls, bits):
    folded, model, names = rounded(cls, bits)
    batches = [Batch(pictures(16, seed)) for seed in (1, 2)]
    targets = channel_statistics(folded, names, batches)
    tune(model, targets, batches)
    after = channel_statistics(model, names, batches)
    for name in names:
        alive = after[name].deviation > 1e-5
        assert alive.sum() > len(alive) // 2
        assert torch.allclose(after[name].mean, targets[name].mean, atol=1e-4), name
        assert torch.allclose(after[name].deviation[alive], targets[name].deviation[alive], rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("method", ["tune", "match"])
def test_tuning_leaves_integer_codes_as_they_are(method, bits):
    folded, model, names = rounded(Residual, bits)
    codes = {name: codes_of(layer).clone() for name, layer in quantized_layers(model).items()}
    scales = {name: layer.weight_quantizer.scale.clone() for name, layer in quantized_layers(model).items()}
    targets = channel_statistics(folded, names, [Batch(pictures(16))])
    if method == "tune":
        tune(model, targets, [Batch(pictures(16))])
    else:
        match_layers(folded, [model], targets, [Batch(pictures(16))])
    for name, layer in quantized_layers(model).items():
        assert torch.equal(codes_of(layer), codes[name])
        assert (layer.weight_quantizer.scale > 0).all()
    assert any(not torch.equal(quantized_layers(model)[name].weight_quantizer.scale, scales[name]) for name in names)


def test_matching_the_float_network_to_itself_changes_almost_nothing():
    _, folded, pairs, _ = folded_network(Residual)
    model = prepare(folded, list(pairs))
    batches = [Batch(pictures(16))]
    gains = tune(model, channel_statistics(folded, pairs, batches), batches)
    assert all(gain == pytest.approx(1, abs=1e-4) for gain in gains.values())
    assert torch.allclose(model(pictures(4, 5)), folded(pictures(4, 5)), atol=1e-4)


def test_layers_matched_alone_have_the_float_statistics_on_float_inputs():
    folded, model, names = rounded(Chain, 3)
    batches = [Batch(pictures(16))]
    targets = channel_statistics(folded, names, batches)
    match_layers(folded, [model], targets, batches)
    after = twin_statistics(folded, {name: [model.get_submodule(name)] for name in names}, batches)
    for name in names:
        assert torch.allclose(after[name][0].mean, targets[name].mean, atol=1e-4)


def test_a_constant_channel_keeps_its_gain_and_stays_finite():
    folded, model, names = rounded(NETWORKS["zero channel"][0], 4)
    batches = [Batch(pictures(16))]
    scale = model.conv1.weight_quantizer.scale.clone()
    tune(model, channel_statistics(folded, names, batches), batches)
    assert torch.equal(model.conv1.weight_quantizer.scale[0], scale[0])
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_the_prior_pulls_the_correction_towards_none():
    folded, model, names = rounded(Chain, 2)
    batches = [Batch(pictures(16))]
    targets = channel_statistics(folded, names, batches)

    def moved(prior: float) -> float:
        _, tuned, _ = rounded(Chain, 2)
        tune(tuned, targets, batches, prior)
        return float((float_weight(tuned.conv1) - float_weight(model.conv1)).detach().abs().sum())

    assert moved(0.9) < moved(0.5) < moved(0.0)


@pytest.mark.parametrize("prior", [-0.1, 1.0, float("nan")])
def test_a_prior_outside_0_to_1_is_refused(prior):
    with pytest.raises(InvalidSetting, match="prior_weight"):
        tune(make(Chain), {"conv1": ChannelStatistics(torch.zeros(8), torch.ones(8))}, [Batch(pictures(2))], prior)


def test_tuning_leaves_no_hook():
    folded, model, names = rounded(Chain, 4)
    tune(model, channel_statistics(folded, names, [Batch(pictures(4))]), [Batch(pictures(4))])
    assert not any(module._forward_hooks for network in (folded, model) for module in network.modules())


def test_joined_batches_are_the_batches():
    parts = [Batch({"a": torch.ones(2, 3), "b": torch.zeros(2)}), Batch({"a": torch.zeros(1, 3), "b": torch.ones(1)})]
    joined = join(parts).inputs
    assert torch.equal(joined["a"], torch.tensor([[1.0] * 3, [1.0] * 3, [0.0] * 3])) and torch.equal(joined["b"], torch.tensor([0.0, 0, 1]))


class Rectifying(nn.Conv2d):
    """A convolution with an activation in its own forward: not affine in its weight."""

    def forward(self, x):
        return torch.relu(super().forward(x))


def test_a_layer_whose_forward_is_not_affine_keeps_its_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Rectifying(4, 4, 3), nn.BatchNorm2d(4)).eval()
    for norm in (model[1], model[3]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    batch = Batch(torch.randn(2, 3, 8, 8))
    folded = fold_checked(model, foldable(model, observe(model, batch)), batch, outputs_of(model, [batch]))
    assert folded.norms == {"0": "1"}
    assert torch.allclose(folded.model(batch.inputs), model(batch.inputs), atol=1e-5)


def test_reestimated_statistics_are_those_of_all_samples_whatever_the_batches():
    x = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    means = []
    for sizes in ([9], [3, 3, 3], [8, 1]):
        model = make(Residual)
        reestimate(model, [Batch(part) for part in x.split(sizes)])
        means.append(model.bn.running_mean)
        assert model.bn.momentum == 0.1 and not model.training
    assert torch.allclose(means[0], means[1], atol=1e-5) and torch.allclose(means[0], means[2], atol=1e-5)


@pytest.mark.parametrize("cls", [Residual, Depthwise, Upsampling, Signal])
def test_flipping_makes_gammas_positive_and_changes_no_output(cls):
    model, x = make(cls), (torch.randn(4, 2, 8) if cls is Signal else pictures(4))
    pairs = foldable(model, observe(model, Batch(x)))
    before = model(x)
    flip_negative(model, pairs)
    assert all((model.get_submodule(norm).weight >= 0).all() for norm in pairs.values())
    assert torch.allclose(model(x), before, atol=1e-5)
