"""Which tensors are 8-bit edges: one rule for simulation and file."""

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, Odd, network_and_inputs
from torch import nn

from anybit.data.batches import Batch, tensors_in
from anybit.networks.integers import computes_on_integers, rounded_edges
from anybit.networks.layers import emptied, quantized_layers, scheme_of
from anybit.networks.observed import observe_network, rounded_to_nearest
from anybit.networks.wiring import LAYER, Wiring, observe
from anybit.roads.settings import CalibrateSettings
from anybit.scheme import Precision, Scheme


def conv(narrow=4, wide=4):
    return nn.Conv2d(narrow, wide, 3, padding=1)


def canonical(model: nn.Module, batch: Batch, precision: str = "W8A8") -> tuple[Wiring, nn.Module]:
    network = observe_network(model.eval(), batch, CalibrateSettings((8,), (8, None)).options)
    parsed = Precision.parse(precision)
    scheme = Scheme({n: next((p for p in o if p.activation_bits == parsed.activation_bits), o[0]) for n, o in network.choices.items()})
    return network.wiring, rounded_to_nearest(network, [batch], scheme)


def names_of(function, tables=False, shape=(4, 8, 8), **layers) -> set[str]:
    torch.manual_seed(0)
    wiring, model = canonical(Odd(function, **layers), Batch(torch.randn(2, *shape)))
    return set(rounded_edges(wiring, quantized_layers(model), scheme_of(model), tables).names)


@pytest.mark.parametrize(
    ("function", "edges"),
    [
        (lambda s, x: s.b(s.a(x)), {"b"}),
        (lambda s, x: s.b(F.relu(s.a(x))), {"b"}),
        (lambda s, x: s.b(F.silu(s.a(x))), {"a", "b"}),
        (lambda s, x: (lambda h: h + s.b(h))(F.relu(s.a(x))), {"relu", "b"}),
        (lambda s, x: F.relu(s.a(x) + s.b(x)), {"a", "b"}),
        (lambda s, x: s.b(torch.cat([s.a(x)[:, :2], x[:, :2]], 1)), {"input/0", "a", "b"}),
        (lambda s, x: s.b(F.max_pool2d(s.a(x), 2)), {"b"}),
        (lambda s, x: s.b(F.group_norm(s.a(x), 2)), {"a", "b"}),
        (lambda s, x: s.b(s.a(x).softmax(1)), {"a", "b"}),
        (lambda s, x: s.b(s.a(x)).mean((2, 3)), {"b"}),
        (lambda s, x: (h := F.relu(s.a(x)), F.gelu(s.b(h)))[0], {"relu"}),
        (lambda s, x: (s.b(h := s.a(x)), F.gelu(h))[0], {"b"}),
    ],
    ids=[
        "layer",
        "clamp",
        "function",
        "shortcut",
        "sum",
        "concatenation",
        "maximum pool",
        "norm",
        "softmax",
        "mean",
        "dead layer",
        "dead one",
    ],
)
def test_tensor_read_by_several_layers_is_an_edge(function, edges):
    assert names_of(function, a=conv(), b=conv()) == edges


def test_linear_outputs_floats_before_float_readers():
    layers = {"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)}
    assert names_of(lambda s, x: s.b(F.gelu(s.a(x))), shape=(5, 6), **layers) == set()
    assert names_of(lambda s, x: x + s.b(F.layer_norm(s.a(x), (6,))), shape=(5, 6), **layers) == set()


def test_functions_give_edges_only_as_tables():
    layers = {"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)}
    assert names_of(lambda s, x: s.b(F.gelu(s.a(x))), tables=True, shape=(5, 6), **layers) == {"a"}


@pytest.mark.parametrize("name", NETWORKS)
def test_codes_of_a_convolution_are_an_edge_or_of_one_layer(name):
    wiring, model = canonical(*network_and_inputs(name))
    edges, layers = rounded_edges(wiring, quantized_layers(model), scheme_of(model)), quantized_layers(model)
    assert set(edges.names) <= set(wiring.edges())
    for op in wiring.operations:
        if (
            op.kind != LAYER
            or not isinstance(layers.get(op.name), nn.Conv2d)
            or not computes_on_integers(layers[op.name], scheme_of(model)[op.name])
        ):
            continue
        while (reader := wiring.only_reader(op.outputs[0])) is not None and (reader.clamps or reader.moves):
            op = reader if reader.clamps else op
            if reader.moves:
                break
        readers = [] if op.outputs[0] in wiring.output_values else wiring.readers(op.outputs[0])
        assert op.name in edges.names or len(readers) == 1, op.name


@pytest.mark.parametrize("name", NETWORKS)
def test_float_activations_have_no_edges(name):
    wiring, model = canonical(*network_and_inputs(name), "W8")
    assert rounded_edges(wiring, quantized_layers(model), scheme_of(model)).names == ()


@pytest.mark.parametrize("name", NETWORKS)
def test_layer_reads_the_values_of_its_input_edge(name):
    model, batch = network_and_inputs(name)
    wiring, ready = canonical(model, batch)
    edges, plain = rounded_edges(wiring, quantized_layers(ready), scheme_of(ready)), emptied(ready)
    shown, read = {}, {}
    for layer in edges.reads:
        plain.get_submodule(layer).register_forward_pre_hook(
            lambda module, args, kwargs, layer=layer: read.update({layer: tensors_in((args, kwargs))}), with_kwargs=True
        )
    observe(plain, batch, lambda name, tensor: shown.setdefault(name, tensor.detach().clone()))
    for layer, names in edges.reads.items():
        for edge, operand in zip(names, read[layer], strict=False):
            assert edge is None or torch.isin(operand, F.pad(shown[edge].flatten(), (0, 1))).all()
