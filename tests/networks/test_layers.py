import pickle

import pytest
import torch
import torch.nn.functional as F
from networks import (
    NETWORKS,
    Depthwise,
    Padded,
    PaddedConv2d,
    Residual,
    assert_untouched,
    images,
    make,
    matrices,
    network_and_inputs,
    numbers,
    run,
    snapshot,
)
from torch import nn

from anybit.data.batches import Batch
from anybit.errors import UnsupportedModel
from anybit.networks.layer_types import COVERED
from anybit.networks.layers import (
    codes_of,
    coverage,
    emptied,
    fill,
    float_weight,
    from_rows,
    prepare,
    quantized_layers,
    weight_rows,
)
from anybit.networks.wiring import observe
from anybit.numerics.quantizers import UniformQuantizer
from anybit.numerics.ranges import weight_scale

LAYERS = {
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), (4, 9)),
    "Conv2d": (lambda: nn.Conv2d(3, 5, 3), (3, 8, 8)),
    "Conv2d grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (6, 8, 8)),
    "Conv2d depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (6, 8, 8)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 4, 4, 4)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (4, 9)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 5, 2, stride=2), (3, 5, 5)),
    "ConvTranspose2d grouped": (lambda: nn.ConvTranspose2d(6, 9, 2, groups=3), (6, 5, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 2, 2, groups=2), (4, 3, 3, 3)),
    "Linear": (lambda: nn.Linear(7, 5), (7,)),
    "Embedding": (lambda: nn.Embedding(9, 4), None),
    "own forward": (lambda: PaddedConv2d(3, 4, 2), (3, 6, 6)),
}


def layer_of(kind: str) -> nn.Module:
    return make(lambda: nn.Sequential(LAYERS[kind][0]()))


def input_of(kind: str) -> torch.Tensor:
    shape = LAYERS[kind][1]
    return torch.arange(9)[None] if shape is None else numbers(2, *shape)


def quantizer_of(layer: nn.Module, bits: int) -> UniformQuantizer:
    return UniformQuantizer(bits, True, weight_scale(weight_rows(layer, float_weight(layer).detach()), bits))


@pytest.mark.parametrize("name", NETWORKS)
def test_prepare_keeps_outputs_bitwise_and_every_key(name):
    model, batch = network_and_inputs(name)
    before, outputs = snapshot(model), run(model, batch)
    names, _ = coverage(model, observe(model, batch))
    prepared = prepare(model, names)
    assert list(quantized_layers(prepared)) and set(quantized_layers(prepared)) == set(names)
    assert torch.equal(run(prepared, batch), outputs)
    assert list(prepared.state_dict()) == list(model.state_dict())
    assert_untouched(model, before)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_prepared_model_loads_the_float_checkpoint(name):
    model, batch = network_and_inputs(name)
    prepared = prepare(make(NETWORKS[name][0], seed=7), coverage(model, observe(model, batch))[0])
    prepared.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(run(prepared, batch), run(model, batch))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_module_with_a_matrix_is_covered_or_reported(name):
    model, batch = network_and_inputs(name)
    covered, uncovered = coverage(model, observe(model, batch))
    assert matrices(model) == set(covered) | set(uncovered)
    assert not set(covered) & set(uncovered)
    assert all(isinstance(model.get_submodule(layer), COVERED) for layer in covered)


class Positions(nn.Module):
    """A class token and positions, which are parameters of the network itself, beside a layer."""

    def __init__(self):
        super().__init__()
        self.token, self.places = nn.Parameter(torch.ones(1, 1, 4)), nn.Parameter(torch.zeros(1, 6, 4))
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places).mean(1)


def test_parameters_outside_layers_are_reported_with_their_share():
    model = nn.Sequential(Positions()).eval()
    covered, uncovered = coverage(model, observe(model, Batch(torch.randn(2, 5, 4))))
    assert covered == ["0.fc"] and set(uncovered) == {"0.token", "0.places"}
    assert "a parameter of Positions" in uncovered["0.token"] and f"{100 * 4 / 53:.2g} % of all" in uncovered["0.token"]
    names = coverage(model[0])[1]
    assert set(names) == {"token", "places"} and "a parameter of the network itself" in names["places"]


def test_weights_read_directly_by_attention_are_reported_with_a_reason():
    model, batch = network_and_inputs("attention")
    covered, uncovered = coverage(model, observe(model, batch))
    assert covered == ["inner", "fc"]
    assert set(uncovered) == {"attention.in_proj_weight", "attention.out_proj"}
    assert "did not run" in uncovered["attention.out_proj"]


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_and_weight_round_trip(kind):
    layer = layer_of(kind)[0]
    weight = float_weight(layer)
    rows = weight_rows(layer, weight)
    assert rows.dim() == 2 and rows.numel() == weight.numel()
    assert torch.equal(from_rows(layer, rows), weight)
    again = numbers(*rows.shape)
    assert torch.equal(weight_rows(layer, from_rows(layer, again)), again)


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "Embedding"])
@torch.no_grad()
def test_row_is_one_output_channel(kind):
    model, inputs = layer_of(kind), input_of(kind)
    layer = model[0]
    layer.bias.zero_()
    gain = torch.linspace(0.5, 2.0, len(layer.bias))
    expected = model(inputs) * gain.view(1, -1, *[1] * (inputs.dim() - 2))
    layer.weight.copy_(from_rows(layer, weight_rows(layer, layer.weight) * gain[:, None]))
    assert torch.allclose(model(inputs), expected, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_filled_slot_gives_code_times_scale(kind):
    model = prepare(layer_of(kind), ["0"])
    layer = model[0]
    quantizer = quantizer_of(layer, 3)
    fill(layer, quantizer, None)
    codes = codes_of(layer)
    assert codes.dtype == torch.int8 and codes.min() >= -4 and codes.max() <= 3
    assert torch.equal(weight_rows(layer, layer.weight), codes.float() * quantizer.scale)
    assert torch.equal(layer.weight, float_weight(layer))


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_layer_computes_with_the_weight_in_its_slot(kind):
    model, inputs = layer_of(kind), input_of(kind)
    prepared = prepare(model, ["0"])
    fill(prepared[0], quantizer_of(prepared[0], 2), None)
    model[0].weight.copy_(prepared[0].weight)
    assert torch.equal(prepared(inputs), model(inputs))


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "Embedding"])
@torch.no_grad()
def test_layer_quantizes_its_input_by_its_slot(kind):
    model, inputs = layer_of(kind), input_of(kind)
    prepared = prepare(model, ["0"])
    quantizer = UniformQuantizer(2, False, torch.tensor(0.7), torch.tensor(1.0))
    fill(prepared[0], None, quantizer)
    assert torch.equal(prepared(inputs), model(quantizer(inputs)))
    assert not torch.equal(prepared(inputs), model(inputs))


def test_gradients_reach_the_stored_weight_through_the_slot():
    model = prepare(layer_of("Conv2d"), ["0"])
    fill(model[0], quantizer_of(model[0], 4), None)
    model(input_of("Conv2d")).square().sum().backward()
    assert float_weight(model[0]).grad.abs().sum() > 0


def test_rejects_computed_weight_by_name():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(UnsupportedModel, match="0: the weight is computed"):
        prepare(model, ["0"])


def test_rejects_other_layer_types_and_dtypes_by_name():
    with pytest.raises(UnsupportedModel, match="0 is a LayerNorm"):
        prepare(nn.Sequential(nn.LayerNorm(3)), ["0"])
    with pytest.raises(UnsupportedModel, match=r"0: the weight is torch\.float64"):
        prepare(nn.Sequential(nn.Linear(3, 3)).double(), ["0"])


@pytest.mark.parametrize("kind", ["Conv2d", "Linear", "own forward"])
def test_a_quantized_model_pickles(kind):
    model = prepare(layer_of(kind), ["0"])
    fill(model[0], quantizer_of(model[0], 3), None)
    twin = pickle.loads(pickle.dumps(model))  # as in multiprocessing; anybit writes no pickle files
    assert torch.equal(twin(input_of(kind)), model(input_of(kind)))


def test_layer_can_be_called_by_keyword():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.own = nn.Conv2d(3, 3, 1), PaddedConv2d(3, 3, 2)

        def forward(self, x):
            return F.relu(self.own(x=self.conv(input=x)))

    model, x = make(ByKeyword), numbers(2, 3, 4, 4)
    assert torch.equal(prepare(model, ["conv", "own"])(x), model(x))


@pytest.mark.parametrize("cls", [Residual, Depthwise, Padded])
def test_emptied_network_computes_with_slot_weights_and_can_be_prepared_again(cls):
    model, x = make(cls), images(4)
    names, _ = coverage(model)
    filled = prepare(model, names)
    for layer in quantized_layers(filled).values():
        rows = weight_rows(layer, float_weight(layer).detach())
        fill(layer, UniformQuantizer(3, True, weight_scale(rows, 3)), None)
    plain = emptied(filled)
    assert [type(plain.get_submodule(name)) for name in names] == [type(model.get_submodule(name)) for name in names]
    assert list(plain.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), filled.eval()(x)) and torch.equal(prepare(plain, names).eval()(x), plain(x))
