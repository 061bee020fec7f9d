"""One set of weights at every bit-width: the training step, its labels, and the draw of the middle network."""

import random

import pytest
import torch
import torch.nn.functional as F
from networks import Depthwise, NoBatchNorm, Residual, Tokens, images, make

from anybit.data.batches import Batch, call
from anybit.errors import InvalidSetting, SchemeMismatch
from anybit.methods.multiquant import MultiQuant, SwitchableInput, SwitchableWeight, bits_of
from anybit.methods.settings import MultiQuantSettings
from anybit.networks.layers import float_weight, quantized_layers
from anybit.numerics.affine import fake_quantize, quant_limits
from anybit.scheme import Precision, Scheme
from anybit.supernets.prepared import make_multiquant, observe_supernet
from anybit.supernets.settings import SupernetSettings

INPUTS = {
    Residual: lambda: images(16),
    Depthwise: lambda: images(16),
    NoBatchNorm: lambda: images(16),
    Tokens: lambda: torch.randint(0, 20, (16, 7), generator=torch.Generator().manual_seed(0)),
}


def multiquant(cls=Residual, bits=(2, 4, 8), **settings) -> tuple[MultiQuant, Batch]:
    x = INPUTS[cls]()
    with torch.no_grad():
        labels = make(cls)(x).argmax(1)
    chosen = SupernetSettings.of(bits=bits, **settings)
    network = observe_supernet(make(cls), Batch(x[:2]), chosen)
    return make_multiquant(network, [Batch(x)], chosen, 5), Batch(x, labels)


def summed_gradients(method: MultiQuant, batch: Batch) -> None:
    for _ in method.passes():
        outputs = call(method.model, batch.inputs)
        method.loss(outputs, batch, F.cross_entropy(outputs, batch.labels)).backward()


# The quantizers


def test_switched_weight_is_rounded_with_the_step_of_its_bits():
    rows = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    scales = {2: torch.full((3, 1), 0.7), 5: torch.full((3, 1), 0.1)}
    slot = SwitchableWeight(scales)
    for bits, scale in scales.items():
        slot.switch(bits)
        assert torch.equal(slot(rows), fake_quantize(rows, scale, torch.zeros(()), *quant_limits(bits, True)))
        frozen = slot.freeze(3)
        assert frozen.bits == bits and torch.equal(frozen(rows), slot(rows))


def test_step_size_is_trained_only_by_networks_of_its_bits():
    slot = SwitchableWeight({2: torch.full((3, 1), 0.7), 5: torch.full((3, 1), 0.1)})
    slot.switch(5)
    slot(torch.randn(3, 10)).square().sum().backward()
    assert slot.change.grad[0].abs().sum() == 0 and (slot.change.grad[1] != 0).all()


def test_trained_zero_point_is_an_integer_within_range():
    slot = SwitchableInput({4: (torch.tensor(0.1), torch.tensor(3.0))}, train_offsets=True)
    slot(torch.randn(100)).square().sum().backward()
    assert slot.offsets.grad is not None
    for value in (-0.3, 0.5, 1.7):
        slot.offsets.data.fill_(value)
        zero = float(slot.zero_point().detach())
        assert zero == round(zero) and 0 <= zero <= 15
        assert torch.equal(slot.freeze()(torch.linspace(-1, 1, 50)), slot(torch.linspace(-1, 1, 50)))


# Switching


@pytest.mark.parametrize("cls", INPUTS)
def test_switched_network_equals_its_frozen_form(cls):
    import copy

    method, batch = multiquant(cls)
    generator = random.Random(0)
    method.model.eval()
    for scheme in (method.highest, method.lowest, method.drawn(generator), method.drawn(generator)):
        method.switch(scheme)
        frozen = copy.deepcopy(method.model)
        method.freeze(frozen)
        assert torch.equal(call(frozen, batch.inputs), call(method.model, batch.inputs))
        layers = quantized_layers(frozen)
        assert all(layers[name].weight_quantizer.bits == p.weight_bits for name, p in scheme.items())


def test_switching_changes_only_the_named_layers():
    method, _ = multiquant()
    method.switch(Scheme({"fc": Precision(2, 4)}))
    assert method.scheme == method.highest.replace({"fc": Precision(2, 4)})


@pytest.mark.parametrize("scheme", [{"fc": Precision(3, 8)}, {"nowhere": Precision(2, 2)}])
def test_rejects_untrained_precision_without_changes(scheme):
    method, _ = multiquant()
    method.switch(method.lowest)
    with pytest.raises(SchemeMismatch, match=next(iter(scheme))):
        method.switch(Scheme(scheme))
    assert method.scheme == method.lowest


def test_each_bit_width_may_have_its_own_batch_norm():
    method, batch = multiquant(batch_norm="switch")
    method.model.train()
    summed_gradients(method, batch)
    stem = method.norms["conv"]
    assert [norm.num_batches_tracked.item() > 0 for norm in (stem.norms[0], stem.norms[-1])] == [True, True]
    assert not torch.equal(stem.norms[0].running_mean, stem.norms[-1].running_mean)


# The step


def test_step_sums_gradients_over_its_networks():
    method, batch = multiquant(NoBatchNorm, label="one-hot", sandwich="HL")
    summed_gradients(method, batch)
    both = {name: p.grad.clone() for name, p in method.model.named_parameters() if p.grad is not None}
    method.model.zero_grad()
    for scheme in (method.highest, method.lowest):
        method.switch(scheme)
        F.cross_entropy(call(method.model, batch.inputs), batch.labels).backward()
    for name, parameter in method.model.named_parameters():
        if name in both:
            assert torch.allclose(both[name], parameter.grad, atol=1e-7), name


@pytest.mark.parametrize("sandwich", ["HRL", "LH", "R", "HRRL"])
def test_sandwich_letters_select_the_networks(sandwich):
    method, _ = multiquant(sandwich=sandwich)
    seen = []
    for _ in method.passes():
        seen.append({method.highest: "H", method.lowest: "L"}.get(method.scheme, "R"))
    assert "".join(seen) == sandwich


def test_draws_depend_only_on_seed_and_progress():
    drawn = []
    for seed, progress in ((0, 0.25), (0, 0.25), (0, 0.5), (1, 0.25)):
        method, _ = multiquant(sandwich="R")
        method.seed = seed
        method.before_step(progress)
        drawn += [method.scheme for _ in method.passes()]
    assert drawn[0] == drawn[1] and drawn[0] != drawn[2] and drawn[0] != drawn[3]


def test_shrinking_goes_from_the_highest_bits_to_all():
    method, _ = multiquant(middle="progressive")
    generator = random.Random(0)
    for progress, share in ((0.0, 1 / 9), (0.25, 5 / 9), (0.6, 1.0)):
        method.before_step(progress)
        seen = {scheme["fc"] for scheme in (method.drawn(generator) for _ in range(300))}
        assert len(seen) == round(9 * share)
        left_out = set(method.choices["fc"]) - seen
        assert all(bits_of(precision)[0] <= min(bits_of(one)[0] for one in seen) for precision in left_out)


@pytest.mark.parametrize("middle", ["worst", "best"])
def test_attentive_sampling_prefers_the_worst_or_best_bits(middle):
    method, _ = multiquant(middle=middle)
    method.losses = {name: {str(p): float(p == method.lowest[name]) for p in options} for name, options in method.choices.items()}
    generator = random.Random(0)

    def lowest_layers(scheme):
        return sum(precision == method.lowest[name] for name, precision in scheme.items())

    attentive = sum(lowest_layers(method.middle(generator)) for _ in range(200))
    plain = sum(lowest_layers(method.drawn(generator)) for _ in range(200))
    assert attentive > 1.5 * plain if middle == "worst" else attentive < 0.7 * plain


# The labels


def test_adaptive_label_is_the_mean_of_correct_predictions_of_the_last_epoch():
    method, batch = multiquant(NoBatchNorm, sandwich="HL", label="adaptive")
    probabilities, labels = [], []
    for _ in method.passes():
        outputs = call(method.model, batch.inputs)
        method.loss(outputs, batch, F.cross_entropy(outputs, batch.labels))
        right = outputs.argmax(1) == batch.labels
        probabilities.append(outputs.softmax(1)[right])
        labels.append(batch.labels[right])
    assert torch.equal(method.labels, torch.zeros_like(method.labels))  # predictions of this epoch count from the next one on
    method.end_of_epoch()
    probabilities, labels = torch.cat(probabilities), torch.cat(labels)
    for y in range(5):
        expected = probabilities[labels == y].mean(0) if (labels == y).any() else torch.zeros(5)
        assert torch.allclose(method.labels[y], expected, atol=1e-6)


def test_loss_uses_one_hot_labels_until_there_are_adaptive_ones():
    method, batch = multiquant(NoBatchNorm, label="adaptive")
    outputs = call(method.model, batch.inputs)
    task = F.cross_entropy(outputs, batch.labels)
    assert torch.allclose(method.loss(outputs, batch, task), task)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_adaptive_loss_is_the_cross_entropy_to_the_mixed_label(share):
    method, batch = multiquant(NoBatchNorm, label="adaptive", label_weight=share)
    method.labels.copy_(torch.rand(5, 5, generator=torch.Generator().manual_seed(0)))
    method.labels /= method.labels.sum(1, keepdim=True)
    outputs = call(method.model, batch.inputs)
    target = share * method.labels[batch.labels] + (1 - share) * F.one_hot(batch.labels, 5)
    assert torch.allclose(method.loss(outputs, batch, F.cross_entropy(outputs, batch.labels)), F.cross_entropy(outputs, target))


def test_the_wider_network_teaches_the_next():
    method, batch = multiquant(NoBatchNorm, label="teacher", label_weight=1.0)
    losses, outputs = [], []
    for _ in method.passes():
        outputs.append(call(method.model, batch.inputs))
        losses.append(method.loss(outputs[-1], batch, F.cross_entropy(outputs[-1], batch.labels)))
    assert torch.equal(losses[0], F.cross_entropy(outputs[0], batch.labels))
    for index in (1, 2):
        expected = F.kl_div(outputs[index].log_softmax(1), outputs[index - 1].log_softmax(1), log_target=True, reduction="batchmean")
        assert torch.allclose(losses[index], expected)
        teacher = torch.autograd.grad(losses[index], outputs[index - 1], allow_unused=True, retain_graph=True)[0]
        assert teacher is None  # no gradient reaches the teacher


# Settings


@pytest.mark.parametrize(
    "bad",
    [
        {"sandwich": ""}, {"sandwich": "HXL"}, {"label": "hard"}, {"label": "adaptive", "label_weight": 1.5}, {"label_weight": 0.3},
        {"middle": "random"}, {"batch_norm": "none"},
        {"offset_rate": -1.0}, {"rate": 0.0}, {"step_rates": {1: 0.1}}, {"step_rates": {2: 0.0}}, {"bits": (4,)}, {"bits": (2, 2)},
        {"bits": (2, 9)}, {"held_out": 0.0}, {"bn_images": 1}, {"nothing": 1}, {"batch_norm": "switch", "compile": True},
    ],
    ids=str,
)  # fmt: skip
def test_rejects_invalid_settings(bad):
    with pytest.raises(InvalidSetting):
        SupernetSettings.of(**bad)


def test_stored_label_weight_without_effect_is_accepted():
    """It is rejected only in new settings."""
    stored = SupernetSettings(multiquant=MultiQuantSettings(label="one-hot", label_weight=1.0))
    assert SupernetSettings.from_json(stored.to_json()) == stored


@pytest.mark.parametrize("changes", [{"step_rates": {2: 0.1}}, {"per_channel": False}])
def test_step_options_reach_the_slots(changes):
    method, _ = multiquant(NoBatchNorm, **changes)
    layer = quantized_layers(method.model)["fc"]
    slot = layer.weight_quantizer
    assert slot.start.shape[1:] == (1 if "per_channel" in changes else len(float_weight(layer)), 1)
    if "step_rates" in changes:
        slot.change.data.fill_(1.0)
        moved = (slot.scales() / slot.start).log()
        assert torch.allclose(moved[0], torch.tensor(0.1)) and torch.allclose(moved[1:], torch.tensor(1.0))
