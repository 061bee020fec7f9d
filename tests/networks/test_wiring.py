import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, CalledTwice, Chain, Residual, assert_untouched, images, make, network_and_inputs, numbers, snapshot
from torch import nn

import anybit
from anybit.data.batches import Batch
from anybit.errors import InvalidInput, InvalidSetting, UnsupportedModel
from anybit.networks.batchnorm import fold, foldable
from anybit.networks.layer_types import COVERED
from anybit.networks.norms import BATCH_NORMS
from anybit.networks.wiring import BATCH_NORM, LAYER, observe

IMAGES = Batch(images(2))
VALUES = numbers(64) * 8


class Forms(nn.Module):
    """One residual step with batch norm, activation and sum in the requested form."""

    def __init__(self, activate, add):
        super().__init__()
        self.conv1, self.bn, self.conv2, self.fc = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.Linear(3, 2)
        self.act = activate if isinstance(activate, nn.Module) else nn.Identity()
        self.activate, self.add = activate, add

    def forward(self, x):
        hidden = self.activate(self.bn(self.conv1(x)))
        return self.fc(F.relu(self.add(self.conv2(hidden), hidden)).mean((2, 3)))


def sum_in_place(a, b):
    a += b
    return a


SUMS = {
    "operator": lambda a, b: a + b,
    "in place": sum_in_place,
    "torch.add": torch.add,
    "method in place": lambda a, b: a.add_(b),
}
RELUS = {
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "functional": F.relu,
    "functional in place": lambda x: F.relu(x, inplace=True),
    "torch": torch.relu,
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
    "clamp": lambda x: x.clamp(min=0),
}
RELU6S = {
    "module": nn.ReLU6(),
    "module in place": nn.ReLU6(inplace=True),
    "functional": F.relu6,
    "functional in place": lambda x: F.relu6(x, inplace=True),
    "hardtanh": lambda x: F.hardtanh(x, 0.0, 6.0),
    "hardtanh module": nn.Hardtanh(0.0, 6.0),
    "clamp": lambda x: torch.clamp(x, 0, 6),
    "clamp in place": lambda x: x.clamp_(0, 6),
}


def activation_of(activate, module="conv1"):
    return observe(make(lambda: Forms(activate, SUMS["operator"])), IMAGES).activation_after(module)


@pytest.mark.parametrize("form", RELUS)
def test_detects_relu_in_every_form(form):
    assert torch.equal(activation_of(RELUS[form])(VALUES), F.relu(VALUES))


@pytest.mark.parametrize("form", RELU6S)
def test_relu6_is_not_taken_for_relu(form):
    assert torch.equal(activation_of(RELU6S[form])(VALUES), F.relu6(VALUES))


@pytest.mark.parametrize(
    "function",
    [F.silu, F.hardswish, F.hardsigmoid, torch.sigmoid, torch.tanh, F.mish, nn.LeakyReLU(0.3), nn.ELU(0.5), nn.GELU("tanh")],
    ids=lambda function: getattr(function, "__name__", str(function)),  # an address would change the test's name in every run
)
def test_observed_activation_computes_the_same(function):
    observed = activation_of(function)
    assert torch.equal(observed(VALUES), function(VALUES))


def test_observed_activation_leaves_its_input_unchanged():
    values = VALUES.clone()
    activation_of(RELUS["functional in place"])(values)
    assert torch.equal(values, VALUES)


@pytest.mark.parametrize("form", SUMS)
def test_relu_after_a_residual_sum_is_not_of_the_convolution(form):
    wiring = observe(make(lambda: Forms(F.relu, SUMS[form])), IMAGES)
    assert wiring.activation_after("conv2") is None
    assert [operation.kind for operation in wiring.joins()] == ["add"]


def test_functional_in_place_and_module_forms_give_the_same_wiring():
    def image(activate, add):
        wiring = observe(make(lambda: Forms(activate, add)), IMAGES)
        return [(op.kind, op.inputs, op.outputs, op.shape) for op in wiring.operations]

    relus = {name: relu for name, relu in RELUS.items() if name != "clamp"}
    images_seen = [image(relu, add) for relu in relus.values() for add in SUMS.values()]
    assert all(seen == images_seen[0] for seen in images_seen)


def test_detects_the_batch_norm_after_each_layer():
    wiring = observe(make(Residual), IMAGES)
    observed = {name: wiring.batch_norm_after(name) for name in wiring.layer_names()}
    assert observed == {
        "conv": "bn", "block1.conv1": "block1.bn1", "block1.conv2": "block1.bn2", "block2.conv1": "block2.bn1",
        "block2.conv2": "block2.bn2", "block2.shortcut.0": "block2.shortcut.1", "fc": None,
    }  # fmt: skip


class NormOf(nn.Module):
    """A convolution and a batch norm, combined by `wire(conv, bn, x)`."""

    def __init__(self, wire):
        super().__init__()
        self.conv, self.bn, self.wire = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), wire

    def forward(self, x):
        return self.wire(self.conv, self.bn, x)


@pytest.mark.parametrize(
    "wire",
    [
        lambda conv, bn, x: bn(conv(conv(x))),  # the layer runs twice
        lambda conv, bn, x: bn(bn(conv(x))),  # the norm runs twice
        lambda conv, bn, x: (lambda y: bn(y) + y)(conv(x)),  # something else reads it
        lambda conv, bn, x: (lambda y: (bn(y), y))(conv(x)),  # the model returns it
        lambda conv, bn, x: bn(F.relu(conv(x))),  # an activation is in between
        lambda conv, bn, x: conv(bn(x)),  # the norm comes before
        lambda conv, bn, x: F.batch_norm(conv(x), bn.running_mean, bn.running_var),  # a function, not a module
    ],
    ids=["layer twice", "norm twice", "second reader", "given out", "relu between", "norm before", "functional"],
)
def test_unfoldable_batch_norm_is_not_paired(wire):
    assert observe(make(lambda: NormOf(wire)), IMAGES).batch_norm_after("conv") is None


def test_blocks_are_the_innermost_joining_modules_and_others_of_their_class():
    model = make(Residual)
    assert observe(model, IMAGES).blocks() == ["block1", "block2"]
    model.block1.forward = lambda x: F.relu(model.block1.bn1(model.block1.conv1(x)))  # the first of its class has no shortcut
    assert observe(model, IMAGES).blocks() == ["block1", "block2"]
    assert observe(make(lambda: nn.Sequential(make(Residual))), IMAGES).blocks() == ["0.block1", "0.block2"]


def test_join_in_the_root_makes_no_block():
    wiring = observe(make(lambda: Forms(F.relu, torch.add)), IMAGES)
    assert wiring.joins() and wiring.blocks() == []


def test_accepts_named_blocks_and_rejects_wrong_ones():
    wiring = observe(make(Residual), IMAGES)
    assert wiring.blocks(["block2"]) == ["block2"]
    with pytest.raises(InvalidSetting, match="block9"):
        wiring.blocks(["block9"])
    with pytest.raises(InvalidSetting, match=r"block2\.shortcut"):
        wiring.blocks(["block2", "block2.shortcut"])


def test_every_layer_is_in_exactly_one_unit():
    wiring = observe(make(Residual), IMAGES)
    for blocks in ([], ["block2"], wiring.blocks()):
        units = wiring.units(wiring.layer_names(), blocks)
        assert Counter(layer for unit in units for layer in unit.layers) == Counter(wiring.layer_names())
        assert set(blocks) <= {unit.name for unit in units}


def test_records_every_reader_of_a_tensor():
    wiring = observe(make(Residual), IMAGES)
    block_input = wiring.operation("block1.conv1").inputs[0]
    assert {op.name for op in wiring.readers(block_input)} == {"block1.conv1", "block1/add"}


def test_counts_calls_of_a_layer():
    assert observe(make(CalledTwice), Batch(numbers(2, 4))).calls["again"] == 2


@pytest.mark.parametrize("name", NETWORKS)
def test_observed_shapes_are_those_of_layer_outputs(name):
    model, batch = network_and_inputs(name)
    shapes = {}
    for layer_name, layer in model.named_modules():
        if isinstance(layer, COVERED + BATCH_NORMS):
            layer.register_forward_hook(lambda module, args, output, key=layer_name: shapes.__setitem__(key, tuple(output.shape)))
    wiring = observe(model, batch)
    assert {op.name: op.shape for op in wiring.operations if op.kind in (LAYER, BATCH_NORM)} == shapes


@pytest.mark.parametrize("name", NETWORKS)
def test_edge_names_are_unique_and_start_with_the_inputs(name):
    model, batch = network_and_inputs(name)
    edges = observe(model, batch).edges()
    assert len(set(edges)) == len(edges) and edges[0] == "input/0"


def test_edge_names_of_a_repeated_layer_are_unique():
    edges = observe(make(CalledTwice), Batch(numbers(2, 4))).edges()
    assert len(set(edges)) == len(edges)


def test_edge_is_after_the_activation():
    model = make(Residual)
    folded, _ = fold(model, foldable(model, observe(model, IMAGES)))
    edges = observe(folded, IMAGES).edges()
    assert "block1/add" not in edges and "conv" not in edges and "fc" in edges


@pytest.mark.parametrize("name", NETWORKS)
def test_observing_changes_nothing(name):
    model, batch = network_and_inputs(name)
    before = snapshot(model)
    observe(model, batch)
    assert_untouched(model, before)


def test_observing_keeps_the_mode_of_each_module():
    model = make(Chain).train()
    model.bn1.eval()
    before = snapshot(model)
    observe(model, IMAGES)
    assert_untouched(model, before)


def test_observing_leaves_no_hooks_after_an_error():
    model = make(Chain)
    before = snapshot(model)
    with pytest.raises(InvalidInput, match="2, 5, 8, 8"):
        observe(model, Batch(torch.zeros(2, 5, 8, 8)))
    assert_untouched(model, before)


# Errors that a network's own checks raise; NotImplementedError is one of the test's inputs, not missing code.
@pytest.mark.parametrize("error", [AssertionError, KeyError, AttributeError, RuntimeError, NotImplementedError])
def test_any_error_of_the_model_is_reported_as_an_input_error(error):
    class Strict(Chain):
        def forward(self, x):
            raise error("8 x 8 images alone")

    with pytest.raises(InvalidInput, match="8 x 8 images alone"):
        observe(make(Strict), IMAGES)


def test_rejects_model_without_tensor_output():
    class Silent(Chain):
        def forward(self, x):
            return "done"

    with pytest.raises(UnsupportedModel, match="str"):
        observe(make(Silent), IMAGES)


def test_values_are_passed_as_they_are_computed():
    model = make(Chain)
    shown = {}
    observe(model, IMAGES, lambda name, tensor: shown.setdefault(name, tensor.clone()))
    twin = copy.deepcopy(model)
    assert torch.equal(shown["input/0"], IMAGES.inputs)
    assert torch.equal(shown["conv1"], twin.conv1(IMAGES.inputs))
    assert torch.equal(shown["fc"], twin(IMAGES.inputs))


def test_function_named_norm_is_not_a_batch_norm():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(x).norm(dim=1)

    wiring = observe(make(Normed), Batch(numbers(2, 4)))
    assert wiring.batch_norm_after("fc") is None and "fc" in wiring.edges()


@pytest.mark.parametrize("name", NETWORKS)
def test_lookups_agree_with_linear_search(name):
    wiring = observe(*network_and_inputs(name))
    values = {value for op in wiring.operations for value in (*op.inputs, *op.outputs)} | {-1}
    for value in values:
        assert wiring.readers(value) == [op for op in wiring.operations if value in op.inputs]
    for op in wiring.operations:
        assert wiring.operation(op.name) is next(other for other in wiring.operations if other.name == op.name)


class Untracked(torch.autograd.Function):
    """Its computation is invisible to function modes."""

    @staticmethod
    def forward(ctx, x):
        return x * 2


class Places(nn.Module):
    """Layers that read hashed words, positions, and the output of an invisible function."""

    def __init__(self):
        super().__init__()
        self.words, self.places, self.of_words, self.of_places, self.of_unseen, self.of_both = (
            nn.Embedding(7, 4), nn.Embedding(9, 4), *(nn.Linear(4, 4) for _ in range(4)),
        )  # fmt: skip
        self.table = torch.rand(5, 4)
        self.register_buffer("factor", torch.tensor(2.0))

    def forward(self, ids):
        words = self.of_words(self.words((ids * 31 + 1) % 7))
        places = torch.relu(self.of_places(self.places(torch.arange(ids.shape[1])) * self.factor + self.table))
        written = torch.zeros(5, 4)
        written[:] = words[0]
        return words + places + self.of_unseen(Untracked.apply(words)) + self.of_both(written)


def test_constant_layers_are_those_computed_from_parameters_and_sizes_alone():
    wiring = observe(Places().eval(), Batch(torch.randint(90, (3, 5))))
    assert wiring.constant_layers() == {"places", "of_places"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_types_that_do_not_fit_the_network_name_its_parameter_and_the_conversion(dtype):
    half = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8).to(dtype)).eval()
    with pytest.raises(InvalidInput, match=rf"1\.weight is {dtype}, .*model\.float\(\)"):
        anybit.inspect(half, numbers(20, 8))
    with pytest.raises(InvalidInput, match=rf"0\.weight is {dtype}, .*model\.float\(\)"):
        anybit.evaluate(nn.Sequential(nn.Linear(8, 4)).to(dtype), (numbers(20, 8), torch.arange(20) % 4))
