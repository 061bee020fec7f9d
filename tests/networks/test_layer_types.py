"""Properties of every layer type: rows, multiply-accumulates, output channels, and surgery without changes."""

import copy
import pickle

import pytest
import torch
from torch import nn

from anybit.data.batches import Batch
from anybit.errors import SchemeMismatch
from anybit.networks.batchnorm import channel_sums
from anybit.networks.capture import input_samples
from anybit.networks.cost import CostModel, macs_per_sample
from anybit.networks.layer_types import COVERED, LAYER_TYPES, type_of
from anybit.networks.layers import QuantizedLayer, emptied, fill, from_rows, prepare, quantized_layers, weight_rows
from anybit.networks.matmul import Matmul
from anybit.networks.observed import check_kinds, unobserved_network
from anybit.networks.options import LayerOptions, layer_choices
from anybit.networks.recurrent import RecurrentWeight
from anybit.networks.wiring import observe
from anybit.numerics.quantizers import UniformQuantizer
from anybit.scheme import Precision, Scheme

SIDES = (5, 4, 3)
OPTIONS = LayerOptions((4, 8), (8, None))


def convolution(cls, dimensions, **settings):
    return cls(4, 6, 2, **settings), torch.randn(3, 4, *SIDES[:dimensions])


EXAMPLES = {  # class -> instances, each with three samples of input
    nn.Conv1d: [convolution(nn.Conv1d, 1), convolution(nn.Conv1d, 1, groups=2, stride=2)],
    nn.Conv2d: [convolution(nn.Conv2d, 2), convolution(nn.Conv2d, 2, groups=2, bias=False)],
    nn.Conv3d: [convolution(nn.Conv3d, 3)],
    nn.ConvTranspose1d: [convolution(nn.ConvTranspose1d, 1), convolution(nn.ConvTranspose1d, 1, groups=2, stride=2)],
    nn.ConvTranspose2d: [convolution(nn.ConvTranspose2d, 2, groups=2)],
    nn.ConvTranspose3d: [convolution(nn.ConvTranspose3d, 3)],
    nn.Linear: [(nn.Linear(4, 6), torch.randn(3, 4)), (nn.Linear(4, 6), torch.randn(3, 5, 4))],
    RecurrentWeight: [(RecurrentWeight(torch.randn(8, 4)), torch.randn(3, 5, 4))],
    nn.Embedding: [(nn.Embedding(9, 4), torch.randint(9, (3, 5)))],
    Matmul: [(Matmul(), (torch.randn(3, 2, 4), torch.randn(3, 4, 5))), (Matmul(True), (torch.randn(3, 2, 4), torch.randn(3, 5, 4)))],
}
ALL = [pytest.param(layer, inputs, id=f"{cls.__name__}-{n}") for cls in COVERED for n, (layer, inputs) in enumerate(EXAMPLES[cls])]


class Alone(nn.Module):
    """A network of one layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *inputs):
        return self.layer(*inputs)


def alone(layer, inputs):
    return Alone(copy.deepcopy(layer)).eval(), Batch(inputs)


def parts(inputs):
    return inputs if isinstance(inputs, tuple) else (inputs,)


def test_every_covered_class_has_one_type_which_subclasses_inherit():
    assert sum(len(layer_type.classes) for layer_type in LAYER_TYPES) == len(set(COVERED)) == len(EXAMPLES)
    for layer_type in LAYER_TYPES:
        for cls in layer_type.classes:
            assert type_of(cls) is layer_type is type_of(type("Own", (cls,), {}))


@pytest.mark.parametrize("layer, inputs", ALL)
def test_rows_round_trip_and_each_row_is_one_output_channel(layer, inputs):
    prepared = prepare(Alone(layer), ["layer"]).layer
    if not type_of(layer).has_weights:
        assert weight_rows(prepared, torch.empty(0, 0)).numel() == 0
        return
    weight = torch.randn_like(layer.weight)
    rows = weight_rows(prepared, weight)
    assert rows.dim() == 2 and torch.equal(from_rows(prepared, rows), weight)
    only = copy.deepcopy(layer)
    if getattr(only, "bias", None) is not None:
        nn.init.zeros_(only.bias)
    for channel in range(len(rows)):
        with torch.no_grad():
            only.weight.copy_(from_rows(prepared, torch.where(torch.arange(len(rows))[:, None] == channel, rows, 0)))
            output = only(*parts(inputs))
        if isinstance(layer, RecurrentWeight):  # which gives its weight
            assert output.count_nonzero(1).nonzero().flatten().tolist() == [channel]
            continue
        if not type_of(layer).sums:  # a row is a word
            assert torch.equal(output.count_nonzero(-1) > 0, inputs == channel)
            continue
        axis = -1 if type_of(layer).channels_last else 1
        touched = output.movedim(axis, 0).flatten(1).count_nonzero(1) > 0
        assert touched.nonzero().flatten().tolist() == [channel]


@pytest.mark.parametrize("layer, inputs", ALL)
def test_multiply_accumulates_equal_the_products_computed(layer, inputs):
    model, batch = alone(layer, inputs)
    for name, parameter in model.layer.named_parameters():
        nn.init.constant_(parameter, float(name == "weight"))
    ones = [torch.ones_like(tensor) if tensor.is_floating_point() else tensor for tensor in parts(inputs)]
    with torch.no_grad():
        done = 0 if isinstance(layer, nn.Embedding) else int(model(*ones).sum()) // 3  # every product is 1: their sum counts them
        done = layer.weight.numel() * 5 if isinstance(layer, RecurrentWeight) else done  # at each of five steps
    assert macs_per_sample(model.layer, "layer", observe(model, batch)) == done


@pytest.mark.parametrize("layer, inputs", ALL)
def test_surgery_keeps_outputs_and_can_be_undone_copied_and_pickled(layer, inputs):
    model, _ = alone(layer, inputs)
    expected = model(*parts(inputs))
    prepared = prepare(model, ["layer"])
    pickled = pickle.loads(pickle.dumps(prepared))  # as in multiprocessing; anybit writes no pickle files
    for one in (prepared, copy.deepcopy(prepared), pickled, emptied(prepared)):
        assert torch.equal(one(*parts(inputs)), expected)
    assert isinstance(prepared.layer, QuantizedLayer) and isinstance(prepared.layer, type(layer))
    assert type(emptied(prepared).layer) is type(layer) and list(prepared.state_dict()) == list(model.state_dict())
    assert type_of(prepared.layer) is type_of(layer)


@pytest.mark.parametrize("layer, inputs", ALL)
def test_channel_sums_are_over_output_channels(layer, inputs):
    output = layer(*parts(inputs)).detach()
    count, sums, squares = channel_sums(layer, output)
    values = output.movedim(-1 if type_of(layer).channels_last else 1, 0).flatten(1).double()
    assert count == values.shape[1]
    assert torch.allclose(sums, values.sum(1), atol=1e-5) and torch.allclose(squares, values.square().sum(1), atol=1e-5)
    gain = torch.arange(1.0, len(values) + 1)
    scaled = output * type_of(layer).per_channel(gain, output)
    assert torch.allclose(channel_sums(layer, scaled)[1], values.sum(1) * gain, atol=1e-4)


@pytest.mark.parametrize("layer, inputs", ALL)
def test_precisions_cover_the_operands_of_the_layer(layer, inputs):
    kind, model = type_of(layer), Alone(layer)
    choices = layer_choices(layer, None, OPTIONS)
    assert len(choices) == (2 if kind.has_weights else 1) * (2 if kind.reads_numbers else 1)
    network = unobserved_network(model, OPTIONS)
    for precision in choices:
        check_kinds(Scheme({"layer": precision}), network)
    if not (kind.has_weights and kind.reads_numbers):
        with pytest.raises(SchemeMismatch, match=f"layer {kind.refusal}: write {choices[0]}|layer {kind.refusal}"):
            check_kinds(Scheme({"layer": Precision(4, 8)}), network)


@pytest.mark.parametrize("layer, inputs", [one for one in ALL if type_of(one.values[0]).reads_numbers])
def test_each_operand_has_its_own_range(layer, inputs):
    model, batch = alone(layer, inputs)
    kind = type_of(layer)
    assert len(input_samples(model, ["layer"], [batch], 64, 0)["layer"]) == kind.operands == len(parts(inputs))
    prepared = prepare(model, ["layer"])
    scale, zero_point = (torch.full((2,), value).squeeze() if kind.operands == 2 else torch.tensor(value) for value in (0.05, 128.0))
    quantizer = UniformQuantizer(8, False, scale, zero_point)
    fill(prepared.layer, None, quantizer)
    rounded = [quantizer(one, index) if kind.operands == 2 else quantizer(one) for index, one in enumerate(parts(inputs))]
    assert torch.equal(prepared(*parts(inputs)), model(*rounded))
    costs = CostModel.of(prepared, ["layer"], observe(prepared, batch), 0, model)
    assert costs.layers["layer"].operands == kind.operands


@pytest.mark.parametrize("layer, inputs", [one for one in ALL if type_of(one.values[0]).grouped])
def test_groups_are_pieces_of_a_row(layer, inputs):
    prepared = prepare(Alone(layer), ["layer"], groups={"layer": 2}).layer
    rows = weight_rows(prepared, layer.weight)
    assert rows.shape == (layer.weight.numel() // 2, 2) and torch.equal(from_rows(prepared, rows), layer.weight)
    assert list(quantized_layers(Alone(layer))) == []
