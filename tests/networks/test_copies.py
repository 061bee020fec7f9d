"""Copies are independent: functions that close over the network are rebound to the copy; what cannot be copied is rejected by name."""

import copy
import functools
import types
import weakref
from typing import Any

import pytest
import torch
from networks import Chain, assert_untouched, images, make, snapshot
from torch import Tensor, nn

import anybit
from anybit.data.batches import Batch, predict
from anybit.errors import UnsupportedModel
from anybit.networks.copies import checked_copy, copied
from anybit.networks.layers import prepare, quantized_layers
from anybit.numerics.quantizers import UniformQuantizer

LIGHT: dict[str, Any] = {"pipeline": "light", "weight_bits": (8,), "activation_bits": (8,), "cache": False}


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stem(x).mean((2, 3)))

    def stem(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class Hooked(Layers):
    """A hook writes to a dictionary that the forward reads."""

    def __init__(self):
        super().__init__()
        self.seen = seen = {}

        def keep(name):
            def hook(module, args, output):
                seen[name] = output

            return hook

        self.bn.register_forward_hook(keep("features"))

    def forward(self, x: Tensor) -> Tensor:
        self.stem(x)
        return self.fc(self.seen["features"].mean((2, 3)))


def with_lambda() -> nn.Module:
    model = Layers()
    model.stem = lambda x: torch.relu(model.bn(model.conv(x)))
    return model


def with_default() -> nn.Module:
    model = Layers()
    model.stem = lambda x, conv=model.conv, *, bn=model.bn: torch.relu(bn(conv(x)))
    return model


def with_partial() -> nn.Module:
    model = Layers()
    model.stem = functools.partial(lambda x, negative: nn.functional.leaky_relu(model.bn(model.conv(x)), negative), negative=0.1)
    return model


def with_nested() -> nn.Module:
    model = Layers()

    def convolved(x):
        return model.conv(x)

    def normalized(x):
        return model.bn(convolved(x))

    model.parts = [("first", {"of all": normalized})]
    model.stem = lambda x: torch.relu(model.parts[0][1]["of all"](x))
    return model


def with_forward() -> nn.Module:
    model = Layers()
    old = model.forward
    model.forward = lambda x: old(x * 0.5)
    return model


def with_method() -> nn.Module:
    model = Layers()
    old = model.forward

    def halved(self, x):
        return old(x) + self.fc.bias

    model.forward = types.MethodType(halved, model)
    return model


def with_layers_forward() -> nn.Module:
    """Replace one layer's forward, as code that wraps a layer does."""
    model = Layers()
    old = model.conv.forward
    model.conv.forward = lambda x: old(x) * 2
    return model


def with_weak_reference() -> nn.Module:
    model = Layers()
    model.conv.owner = weakref.ref(model)
    model.conv.register_forward_hook(lambda conv, args, output: output + conv.owner().fc.bias.sum())
    return model


GLOBAL: dict[str, nn.Module] = {}


def with_global() -> nn.Module:
    """Its forward is a function at the top of a script, which closes over nothing."""
    model = Layers()
    code = "old = model.forward\nmodel.forward = lambda x: old(x) - model.fc.bias"
    exec(code, {"model": model})
    return model


BOUND = [
    Hooked, with_lambda, with_default, with_partial, with_nested, with_forward, with_method, with_layers_forward, with_weak_reference,
    with_global,
]  # fmt: skip


@pytest.mark.parametrize("cls", BOUND, ids=lambda cls: cls.__name__)
def test_copy_of_a_copy_uses_its_own_weights(cls):
    model, x = make(cls), images(6)
    expected = predict(model, Batch(x))
    twin = copy.deepcopy(checked_copy(model, Batch(x[:2])))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(predict(twin, Batch(x)), expected)
    with torch.no_grad():
        twin.fc.bias += 1
    assert not torch.equal(predict(twin, Batch(x)), expected)


@pytest.mark.parametrize("cls", BOUND, ids=lambda cls: cls.__name__)
def test_such_networks_are_fully_quantized_and_unchanged(cls):
    model, x = make(cls), images(24)
    before = snapshot(model)
    result = anybit.calibrate(model, x, **LIGHT)
    assert_untouched(model, before)
    assert set(result.scheme) == {"conv", "fc"} and not result.report["uncovered"]
    assert ("bn" in anybit.inspect(model, x, export=False)["unfolded"]) == (cls in (Hooked, with_layers_forward, with_weak_reference))
    with torch.no_grad():
        expected, quantized = (predict(one, Batch(x)) for one in (model, result.model))
        assert (quantized - expected).square().mean() < 1e-2 * expected.square().mean()
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(predict(result.model, Batch(x)), quantized)


def test_replaced_forward_of_a_layer_reads_quantized_inputs():
    layer = prepare(nn.Sequential(make(with_layers_forward).conv), ["0"])
    quantizer = UniformQuantizer(4, False, torch.tensor(0.5), torch.tensor(8.0))
    x = images(2)
    with torch.no_grad():
        expected = layer(quantizer(x))
        quantized_layers(layer)["0"].input_quantizer = quantizer
        assert torch.equal(layer(x), expected) and not torch.equal(expected, layer[0].float()(x * 0))


def test_function_that_reaches_no_module_is_not_copied():
    model, scale = Layers(), [2.0]
    model.scale = lambda x: x * scale[0]
    assert copied(model).scale is model.scale


class ByGlobal(Layers):
    def stem(self, x: Tensor) -> Tensor:
        return torch.relu(GLOBAL["network"].conv(x))


def of_a_class_in_a_function() -> nn.Module:
    """The forward, which no copy changes, reads the dictionary that the original's hook writes to."""
    seen: dict[str, Tensor] = {}

    class Local(Layers):
        def forward(self, x):
            self.stem(x)
            return self.fc(seen["features"].mean((2, 3)))

    model = make(Local)
    model.seen = seen
    model.bn.register_forward_hook(lambda module, args, output: seen.update(features=output))
    return model


def test_dictionary_that_a_class_closes_over_is_shared_by_copies():
    model, x = of_a_class_in_a_function(), images(24)
    result = anybit.calibrate(model, x, **LIGHT)
    one, other = (predict(result.model, Batch(some)) for some in (x[:4], x[4:8]))
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("work", [anybit.inspect, lambda *arguments: anybit.calibrate(*arguments, **LIGHT)], ids=["inspect", "calibrate"])
def test_rejects_function_that_reaches_the_original_through_a_global(work):
    model = GLOBAL["network"] = make(ByGlobal)
    before = snapshot(model)
    with pytest.raises(UnsupportedModel, match=r"calls conv of the network itself.*through `self` in a method"):
        work(model, images(24))
    assert_untouched(model, before)


def test_weights_are_restored_bitwise_after_a_failing_pass():
    class Failing(Layers):
        def forward(self, x):
            if torch.isnan(GLOBAL["network"].conv.weight).any():
                raise RuntimeError("away")
            return super().forward(x)

    model = GLOBAL["network"] = make(Failing)
    before, places = snapshot(model), [tensor.data_ptr() for tensor in model.parameters()]
    with pytest.raises(UnsupportedModel):
        checked_copy(model, Batch(images(2)))
    assert_untouched(model, before)
    assert [tensor.data_ptr() for tensor in model.parameters()] == places


def test_forward_that_overwrites_its_input_gets_a_copy():
    class Centred(Chain):
        def forward(self, x):
            return super().forward(x.sub_(1).mul_(2))

    x = images(24)
    before = x.clone()
    result = anybit.calibrate(make(Centred), x, **LIGHT)
    assert torch.equal(x, before)
    expected = predict(make(Centred), Batch(x))
    assert torch.equal(x, before)
    assert (predict(result.model, Batch(x)) - expected).square().mean() < 1e-2 * expected.square().mean()


class Squeezed(nn.Module):
    """Squeezes a batch of one, so the linear layer reads the rest as a single sample."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3), keepdim=True).squeeze())


class SqueezedAway(Squeezed):
    """One value per sample; for a single sample, a number without dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))[:, :1].squeeze()


@pytest.mark.parametrize("cls", [Squeezed, SqueezedAway])
def test_left_over_sample_joins_the_previous_batch(cls):
    result = anybit.calibrate(make(cls), images(17), batch_size=4, held_out=0.5, **LIGHT)
    assert set(result.scheme) == {"conv", "fc"}


def test_rejects_squeezed_batch_of_one_with_a_remedy():
    for settings in ({"batch_size": 1}, {"held_out": 0.01}):
        with pytest.raises(UnsupportedModel, match=r"flatten\(1\)"):
            anybit.calibrate(make(Squeezed), images(8), **{**LIGHT, **settings})


def test_scalar_output_is_the_row_of_one_sample():
    x = images(8)
    whole, single = (anybit.calibrate(make(SqueezedAway), x, batch_size=size, **LIGHT) for size in (8, 1))
    assert whole.about["task"] == single.about["task"] == "regression"
    assert single.report["schemes"][0]["measured"] == pytest.approx(whole.report["schemes"][0]["measured"], rel=0.2)


class Forgetful(Chain):
    """A network whose own `train` returns nothing, so that `eval()` gives None."""

    def train(self, mode=True):
        super().train(mode)


def test_network_whose_train_returns_nothing_is_calibrated_saved_loaded_and_exported(tmp_path):
    model, x = make(Chain), images(32)
    model.__class__ = Forgetful
    result = anybit.calibrate(model, x, "4bit", pipeline="light", cache=False)
    assert torch.equal(anybit.load(result.save(tmp_path / "run"), model=model)(x), result.model(x))
    assert result.export(tmp_path / "run.onnx", x) and anybit.evaluate(model, (x, model(x).argmax(1)))["top1"] == 100
