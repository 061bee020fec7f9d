import copy
import pickle

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
    images,
    make,
    network_and_inputs,
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
    unfolded,
)
from anybit.networks.candidates import Candidates, apply_scheme, weight_candidate
from anybit.networks.layers import codes_of, float_weight, prepare, quantized_layers
from anybit.networks.norms import BATCH_NORMS, is_norm
from anybit.networks.plain import plain_weights
from anybit.networks.wiring import observe
from anybit.scheme import Scheme


def folded_network(cls, inputs=images):
    model = make(cls)
    pairs = foldable(model, observe(model, Batch(inputs(2))))
    folded, promised = fold(model, pairs)
    return model, folded, pairs, promised


def rounded(cls, bits: int) -> tuple[nn.Module, nn.Module, list[str]]:
    """Return (the folded float network, the same rounded to `bits`, the layers that had a batch norm)."""
    model, folded, pairs, _ = folded_network(cls)
    names = [name for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    prepared = prepare(folded, names)
    candidates = Candidates({(name, bits): weight_candidate(prepared.get_submodule(name), bits, "minmax") for name in names})
    return folded, apply_scheme(prepared, Scheme.uniform(names, f"W{bits}"), candidates), list(pairs)


@pytest.mark.parametrize("name", NETWORKS)
def test_folding_keeps_outputs_and_leaves_the_original_unchanged(name):
    model, batch = network_and_inputs(name)
    assert any((norm.weight < 0).any() for norm in model.modules() if isinstance(norm, BATCH_NORMS)) or not foldable(
        model, observe(model, batch)
    )
    before, outputs = snapshot(model), run(model, batch)
    folded, _ = fold(model, foldable(model, observe(model, batch)))
    assert torch.allclose(run(folded, batch), outputs, rtol=1e-4, atol=1e-5)
    assert_untouched(model, before)


def test_all_foldable_batch_norms_are_removed():
    for cls in (Chain, Residual, Depthwise):
        _, folded, _, _ = folded_network(cls)
        assert not any(isinstance(module, BATCH_NORMS) for module in folded.modules())


def test_non_affine_norm_folds():
    model = make(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    model[1].weight = model[1].bias = None
    folded, promised = fold(model, {"0": "1"})
    assert torch.allclose(folded(images(2)), model(images(2)), atol=1e-5)
    assert torch.equal(promised["0"].mean, torch.zeros(4)) and torch.equal(promised["0"].deviation, torch.ones(4))


def test_norm_without_running_statistics_stays():
    model = make(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False, track_running_stats=False)))
    assert foldable(model, observe(model, Batch(images(2)))) == {}


def fold_all(model: nn.Module) -> nn.Module:
    return fold(model, foldable(model, observe(model, Batch(images(2)))))[0]


def test_folding_keeps_outputs_where_two_convolutions_share_a_weight():
    model = make(lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model[2].weight = model[0].weight
    folded = fold_all(plain_weights(model))
    assert torch.allclose(folded(images(2)), model(images(2)), atol=1e-5) and model[2].weight is model[0].weight
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


def test_folding_keeps_outputs_where_two_convolutions_share_a_bias():
    model = make(lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model[2].bias = model[0].bias
    assert torch.allclose(fold_all(model)(images(2)), model(images(2)), atol=1e-5)


def test_folding_keeps_the_activation_inside_a_custom_norm():
    class NormAct(nn.BatchNorm2d):
        def forward(self, x):
            return F.relu(super().forward(x))

    model = make(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), NormAct(4), nn.Conv2d(4, 2, 1)))
    assert torch.allclose(fold_all(model)(images(2)), model(images(2)), atol=1e-5)


def test_folding_keeps_outputs_of_a_padded_subclass():
    model, batch = network_and_inputs("padded")
    assert foldable(model, observe(model, batch)) == {"conv": "bn"}


@pytest.mark.parametrize("name", ["chain", "upsampling", "signal", "depthwise"])
def test_statistics_cover_the_whole_output(name):
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
def test_tuning_restores_the_float_statistics_of_each_layer(cls, bits):
    folded, model, names = rounded(cls, bits)
    batches = [Batch(images(16, seed)) for seed in (1, 2)]
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
def test_tuning_leaves_integer_codes_unchanged(method, bits):
    folded, model, names = rounded(Residual, bits)
    codes = {name: codes_of(layer).clone() for name, layer in quantized_layers(model).items()}
    scales = {name: layer.weight_quantizer.scale.clone() for name, layer in quantized_layers(model).items()}
    targets = channel_statistics(folded, names, [Batch(images(16))])
    if method == "tune":
        tune(model, targets, [Batch(images(16))])
    else:
        match_layers(folded, [model], targets, [Batch(images(16))])
    for name, layer in quantized_layers(model).items():
        assert torch.equal(codes_of(layer), codes[name])
        assert (layer.weight_quantizer.scale > 0).all()
    assert any(not torch.equal(quantized_layers(model)[name].weight_quantizer.scale, scales[name]) for name in names)


def test_matching_the_float_network_to_itself_changes_almost_nothing():
    _, folded, pairs, _ = folded_network(Residual)
    model = prepare(folded, list(pairs))
    batches = [Batch(images(16))]
    gains = tune(model, channel_statistics(folded, pairs, batches), batches)
    assert all(gain == pytest.approx(1, abs=1e-4) for gain in gains.values())
    assert torch.allclose(model(images(4, 5)), folded(images(4, 5)), atol=1e-4)


def test_independently_matched_layers_have_float_statistics_on_float_inputs():
    folded, model, names = rounded(Chain, 3)
    batches = [Batch(images(16))]
    targets = channel_statistics(folded, names, batches)
    match_layers(folded, [model], targets, batches)
    after = twin_statistics(folded, {name: [model.get_submodule(name)] for name in names}, batches)
    for name in names:
        assert torch.allclose(after[name][0].mean, targets[name].mean, atol=1e-4)


def test_a_constant_channel_keeps_its_gain_and_stays_finite():
    folded, model, names = rounded(NETWORKS["zero channel"][0], 4)
    batches = [Batch(images(16))]
    scale = model.conv1.weight_quantizer.scale.clone()
    tune(model, channel_statistics(folded, names, batches), batches)
    assert torch.equal(model.conv1.weight_quantizer.scale[0], scale[0])
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_prior_shrinks_the_correction():
    folded, model, names = rounded(Chain, 2)
    batches = [Batch(images(16))]
    targets = channel_statistics(folded, names, batches)

    def moved(prior: float) -> float:
        _, tuned, _ = rounded(Chain, 2)
        tune(tuned, targets, batches, prior)
        return float((float_weight(tuned.conv1) - float_weight(model.conv1)).detach().abs().sum())

    assert moved(0.9) < moved(0.5) < moved(0.0)


@pytest.mark.parametrize("prior", [-0.1, 1.0, float("nan")])
def test_rejects_prior_outside_0_to_1(prior):
    with pytest.raises(InvalidSetting, match="prior_weight"):
        tune(make(Chain), {"conv1": ChannelStatistics(torch.zeros(8), torch.ones(8))}, [Batch(images(2))], prior)


def test_tuning_removes_its_hooks():
    folded, model, names = rounded(Chain, 4)
    tune(model, channel_statistics(folded, names, [Batch(images(4))]), [Batch(images(4))])
    assert not any(module._forward_hooks for network in (folded, model) for module in network.modules())


def test_joined_batches_hold_all_samples_in_order():
    parts = [Batch({"a": torch.ones(2, 3), "b": torch.zeros(2)}), Batch({"a": torch.zeros(1, 3), "b": torch.ones(1)})]
    joined = join(parts).inputs
    assert torch.equal(joined["a"], torch.tensor([[1.0] * 3, [1.0] * 3, [0.0] * 3])) and torch.equal(joined["b"], torch.tensor([0.0, 0, 1]))


class Rectifying(nn.Conv2d):
    """A convolution with an activation in its forward: not affine in its weight."""

    def forward(self, x):
        return torch.relu(super().forward(x))


def test_layer_with_non_affine_forward_keeps_its_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Rectifying(4, 4, 3), nn.BatchNorm2d(4)).eval()
    for norm in (model[1], model[3]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    batch = Batch(torch.randn(2, 3, 8, 8))
    folded = fold_checked(model, foldable(model, observe(model, batch)), batch, outputs_of(model, [batch]))
    assert folded.norms == {"0": "1"}
    assert torch.allclose(folded.model(batch.inputs), model(batch.inputs), atol=1e-5)


class Clamping(nn.Conv2d):
    """A convolution that clamps far beyond the values of the first inputs."""

    def forward(self, x):
        return super().forward(x).clamp(-50, 50)


class Padded(nn.Conv2d):
    """A convolution with its own forward, affine in weight and bias."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


class Inner(nn.Conv2d):
    """A clamp inside a convolution's _conv_forward."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight, bias).clamp(-50, 50)


class Hooked(nn.Conv2d):
    """A clamp in a hook."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_forward_hook(lambda layer, args, output: output.clamp(-50, 50))


@pytest.mark.parametrize(("kind", "folds"), [(Clamping, False), (Inner, False), (Hooked, False), (Padded, True)])
def test_clamp_beyond_the_first_inputs_prevents_folding(kind, folds):
    torch.manual_seed(0)
    model = nn.Sequential(kind(3, 4, 3), nn.BatchNorm2d(4)).eval()
    model[1].running_mean.normal_()
    model[1].weight.data.uniform_(-2, 2)
    batch, far = Batch(torch.randn(2, 3, 8, 8)), 300 * torch.randn(2, 3, 8, 8)
    folded = fold_checked(model, foldable(model, observe(model, batch)), batch, outputs_of(model, [batch]))
    assert folded.norms == ({"0": "1"} if folds else {})
    assert torch.allclose(folded.model(far), model(far), rtol=1e-4, atol=1e-3)


def test_reestimated_statistics_are_independent_of_batching():
    x = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    means = []
    for sizes in ([9], [3, 3, 3], [8, 1]):
        model = make(Residual)
        reestimate(model, [Batch(part) for part in x.split(sizes)])
        means.append(model.bn.running_mean)
        assert model.bn.momentum == 0.1 and not model.training
    assert torch.allclose(means[0], means[1], atol=1e-5) and torch.allclose(means[0], means[2], atol=1e-5)


@pytest.mark.parametrize("cls", [Residual, Depthwise, Upsampling, Signal])
def test_flipping_makes_gammas_positive_and_keeps_outputs(cls):
    model, x = make(cls), (torch.randn(4, 2, 8) if cls is Signal else images(4))
    pairs = foldable(model, observe(model, Batch(x)))
    before = model(x)
    flip_negative(model, pairs)
    assert all((model.get_submodule(norm).weight >= 0).all() for norm in pairs.values())
    assert torch.allclose(model(x), before, atol=1e-5)


class NormAct(nn.BatchNorm2d):
    """A batch norm with dropout and an activation, as in timm, with the normalization written out."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Dropout(0.5), nn.PReLU(channels)

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(self.drop(x))


class GatedNorm(nn.BatchNorm2d):
    def forward(self, x):
        x = super().forward(x)
        return x * torch.sigmoid(x)


class FrozenNorm(nn.Module):
    """A frozen batch norm as in detectors: four buffers, and products instead of batch_norm."""

    def __init__(self, channels):
        super().__init__()
        for key in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(key, torch.ones(channels))

    def forward(self, x):
        gamma, beta, mean, variance = (
            tensor.reshape(1, -1, 1, 1) for tensor in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = gamma * (variance + 1e-5).rsqrt()
        return x * scale + (beta - mean * scale)


class FrozenNormAct(FrozenNorm):
    def forward(self, x):
        return F.hardswish(super().forward(x), inplace=True)


def with_norm(norm_class) -> nn.Module:
    """Two convolutions with a norm of random statistics between them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm_class(8), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        for tensor in (model[1].weight, model[1].bias, model[1].running_mean):
            tensor.normal_()
        model[1].running_var.uniform_(0.5, 2)
    return model.eval()


NORMS_THAT_FOLD = [nn.SyncBatchNorm, NormAct, GatedNorm, FrozenNorm, FrozenNormAct]


@pytest.mark.parametrize("norm_class", NORMS_THAT_FOLD)
def test_norm_folds_whatever_its_forward_does_afterwards(norm_class):
    model, batch = with_norm(norm_class), Batch(images(4))
    outputs, before = run(model, batch), snapshot(model)
    folded = fold_checked(model, foldable(model, observe(model, batch)), batch, outputs)
    assert folded.norms == {"0": "1"} and not any(map(is_norm, folded.model.modules()))
    assert torch.allclose(run(folded.model, batch), outputs, atol=1e-5)
    assert not any("running" in key for key in folded.model.state_dict())  # nothing of it is stored
    again = pickle.loads(pickle.dumps(copy.deepcopy(folded.model)))  # as in multiprocessing; anybit writes no pickle files
    assert torch.equal(run(again, batch), run(folded.model, batch))
    assert_untouched(model, before)


def test_activation_in_a_folded_norm_belongs_to_the_layer_before_it():
    model, batch = with_norm(FrozenNormAct), Batch(images(2))
    wiring = fold_checked(model, {"0": "1"}, batch, run(model, batch)).wiring
    x = torch.randn(8)
    assert torch.equal(wiring.activation_after("0")(x), F.hardswish(x))


class ActNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(F.relu(x))


class OfItsBatch(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + x.mean((2, 3), keepdim=True)


@pytest.mark.parametrize("norm_class", [ActNorm, OfItsBatch])
def test_norm_that_reads_more_than_normalized_values_stays_with_a_reason(norm_class):
    model, batch = with_norm(norm_class), Batch(images(2))
    wiring = observe(model, batch)
    assert foldable(model, wiring) == {}
    assert f"forward of {norm_class.__name__}" in unfolded(model, wiring, {})["1"]


class Preactivated(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_norm, self.first, self.second = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.of_sum, self.twice, self.of_branch, self.alone = (nn.BatchNorm2d(4) for _ in range(4))
        self.alone.running_mean = self.alone.running_var = None
        self.third = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.first(self.input_norm(x))
        y = self.second(F.relu(self.of_sum(x + 1)))
        return self.alone(self.third(self.twice(self.twice(self.of_branch(y)) + y)))


def test_every_unfolded_norm_has_a_reason():
    model, batch = make(Preactivated), Batch(images(2))
    wiring = observe(model, batch)
    pairs = foldable(model, wiring)
    reasons = unfolded(model, wiring, pairs)
    expected = {
        "input_norm": "the network's input", "of_sum": "the output of add", "twice": "2 times", "of_branch": "read elsewhere",
        "alone": "no running statistics",
    }  # fmt: skip
    assert pairs == {} and set(reasons) == set(expected)
    assert all(words in reasons[name] for name, words in expected.items())


class Tokens(nn.Module):
    """Linears whose batch norms are over channels after reshapes; one norm is over tokens, one over half of the channels."""

    def __init__(self):
        super().__init__()
        self.flat, self.turned, self.of_tokens, self.halved = (nn.Linear(6, 6) for _ in range(4))
        self.flat_norm, self.turned_norm, self.half_norm = nn.BatchNorm1d(6), nn.BatchNorm1d(6), nn.BatchNorm1d(3)
        self.tokens_norm = nn.BatchNorm1d(6)

    def forward(self, x):
        x = self.flat(x)
        x = self.flat_norm(x.flatten(0, 1)).reshape_as(x)
        x = self.turned_norm(self.turned(x).transpose(1, 2)).transpose(1, 2)
        x = self.tokens_norm(self.of_tokens(x))
        first, second = self.halved(x).transpose(1, 2).chunk(2, 1)
        return torch.cat([self.half_norm(first), second], 1)


def test_norm_folds_through_reshapes_that_preserve_channels():
    model, batch = make(Tokens), Batch(torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(0)))
    wiring = observe(model, batch)
    pairs = foldable(model, wiring)
    assert pairs == {"flat": "flat_norm", "turned": "turned_norm"}
    assert torch.allclose(run(fold(model, pairs)[0], batch), run(model, batch), atol=1e-5)
    assert all("channels" in reason for reason in unfolded(model, wiring, pairs).values())
