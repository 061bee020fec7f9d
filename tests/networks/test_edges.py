"""Edges rounded as the network runs, and their ranges."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, network_and_inputs
from torch import nn

from anybit.data.batches import Batch, call, tensors_in
from anybit.networks.canonical import Canonical
from anybit.networks.edges import edge_grid, finished, observe_edge_ranges, with_edges
from anybit.networks.layers import emptied, quantized_layers
from anybit.networks.observed import observe_network, rounded_to_nearest
from anybit.networks.rounding import edge_grids, round_edges, rounded_values
from anybit.networks.wiring import observe
from anybit.numerics.affine import fake_quantize
from anybit.roads.settings import CalibrateSettings


def canonical(name: str, bits: int = 8) -> tuple[Canonical, Batch]:
    model, batch = network_and_inputs(name)
    network = observe_network(model.eval(), batch, CalibrateSettings((8,), (bits,)).options)
    return finished(Canonical(rounded_to_nearest(network, [batch], network.largest), network.norms), network.wiring, [batch]), batch


def outputs(model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    with torch.no_grad():
        return tensors_in(call(model.eval(), batch.inputs))


class Forms(nn.Module):
    """A sum and an activation, each in the requested form."""

    def __init__(self, form):
        super().__init__()
        self.a, self.b, self.form = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), form

    def forward(self, x):
        return self.form(self.a(x), self.b(x))


def summed_in_place(a, b):
    a += b
    return a.relu_() * 2


def summed_and_forgotten(a, b):
    a.add_(b)
    F.relu_(a)
    return a * 2


FORMS = {
    "functions": lambda a, b: F.relu(a + b) * 2,
    "in place": summed_in_place,
    "in place, its result not taken": summed_and_forgotten,
    "in place, by a setting": lambda a, b: F.relu(a + b, inplace=True) * 2,
    "a module": lambda a, b: nn.ReLU(inplace=True)(torch.add(a, b)) * 2,
}


@pytest.mark.parametrize("form", FORMS)
def test_edge_is_rounded_in_every_form(form):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    model = Forms(FORMS["functions"]).eval()
    with torch.no_grad():
        total = fake_quantize(model.a(x) + model.b(x), torch.tensor(0.5), torch.tensor(128.0), 0, 255)
        expected = fake_quantize(F.relu(total), torch.tensor(0.7), torch.tensor(0.0), 0, 255) * 2
        model.form = FORMS[form]
        names = [name for name in observe(model, Batch(x)).edges() if "relu" in name]
        assert len(names) == 1
        assert torch.equal(round_edges(model, {"add": (0.5, 128), names[0]: (0.7, 0)})(x), expected)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_pass_through_a_rounded_edge(form):
    torch.manual_seed(0)
    model = Forms(FORMS[form])
    names = observe(model, Batch(torch.randn(2, 3, 4, 4))).edges()
    round_edges(model, dict.fromkeys(names, (0.01, 128)))
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.a.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_edge_is_on_its_grid_where_it_is_read(name):
    ready, batch = canonical(name)
    for edge, tensor in rounded_values(ready.model, batch).items():
        scale, zero_point = edge_grids(ready.model)[edge]
        codes = tensor / scale + zero_point
        assert (codes - codes.round()).abs().max() < 1e-3 and codes.min() > -0.5 and codes.max() < 255.5
        assert edge_grid(*ready.edges[edge]) == (scale, zero_point)


@pytest.mark.parametrize("name", NETWORKS)
def test_8_bit_layer_reads_edge_codes_unchanged(name):
    ready, batch = canonical(name)
    edges = {id(layer): name for name, layer in quantized_layers(ready.model).items()}
    grids = set(edge_grids(ready.model).values())
    apart = {}

    def keep(module, args, kwargs):
        operands = tensors_in((args, kwargs))
        quantizer = module.input_quantizer
        for index, grid in enumerate(zip(quantizer.scale.view(-1).tolist(), quantizer.zero_point.view(-1).tolist(), strict=True)):
            if grid in grids:
                again = quantizer(operands[index], index if quantizer.scale.dim() else None)
                apart[edges[id(module)]] = float((again - operands[index]).abs().max())

    for layer in quantized_layers(ready.model).values():
        if layer.input_quantizer is not None:
            layer.register_forward_pre_hook(keep, with_kwargs=True)
    outputs(ready.model, batch)
    assert all(distance == 0 for distance in apart.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_rounding_edges_can_be_undone(name):
    ready, batch = canonical(name)
    model = ready.model
    expected, grids = outputs(model, batch), edge_grids(model)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))  # as in multiprocessing; anybit writes no pickle files
    for other in (copy.deepcopy(model), again):
        assert edge_grids(other) == grids and all(map(torch.equal, outputs(other, batch), expected))
    plain = round_edges(copy.deepcopy(model), {})
    assert list(plain.state_dict()) == list(model.state_dict()) and not edge_grids(plain)
    assert not edge_grids(emptied(model)) and type(emptied(model)) is type(network_and_inputs(name)[0])
    again = round_edges(plain, grids)
    assert all(map(torch.equal, outputs(again, batch), expected))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in again.modules())


@pytest.mark.parametrize("name", ["residual", "two inputs"] if "two inputs" in NETWORKS else ["residual"])
def test_observing_ignores_edge_rounding(name):
    ready, batch = canonical(name)
    rounded, plain = {}, {}
    observe(ready.model, batch, lambda name, tensor: rounded.setdefault(name, tensor.clone()))
    observe(round_edges(copy.deepcopy(ready.model), {}), batch, lambda name, tensor: plain.setdefault(name, tensor.clone()))
    assert list(rounded) == list(plain) and all(torch.equal(rounded[name], plain[name]) for name in plain)


def test_error_in_the_forward_leaves_no_hooks():
    model = round_edges(Forms(lambda a, b: a @ b[:1, :, :3, :2]), {"a": (0.5, 0)})
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3, 4, 4))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_searched_range_has_less_error_than_the_full_one():
    """One outlier: the full range would leave few codes for the other values."""
    torch.manual_seed(0)
    x = torch.randn(64, 3, 8, 8)
    x[0, 0, 0, 0] = 200.0
    model = Forms(FORMS["functions"]).eval()
    wiring = observe(model, Batch(x[:2]))
    whole = observe_edge_ranges(model, wiring, [Batch(x)])
    searched = observe_edge_ranges(model, wiring, [Batch(x)], searched=["input/0"])
    assert whole["input/0"] == (float(x.min()), 200.0) and searched | {"input/0": whole["input/0"]} == whole

    def error(ends):
        scale, zero_point = edge_grid(*ends["input/0"])
        return float((fake_quantize(x, torch.tensor(scale), torch.tensor(float(zero_point)), 0, 255) - x).square().sum())

    assert error(searched) <= error(whole)


def test_layers_of_fewer_bits_keep_their_own_ranges():
    ready, batch = canonical("residual", bits=4)
    grids = set(edge_grids(ready.model).values())
    own = {(float(layer.input_quantizer.scale), int(layer.input_quantizer.zero_point)) for layer in quantized_layers(ready.model).values()}
    assert grids and not grids & own
    before = copy.deepcopy(ready.model.state_dict())
    model, _ = network_and_inputs("residual")
    network = observe_network(model.eval(), batch, CalibrateSettings((8,), (4,)).options)
    with_edges(ready.model, network.wiring, ready.edges)
    assert all(torch.equal(before[key], tensor) for key, tensor in ready.model.state_dict().items())
