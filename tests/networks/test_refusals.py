"""Unusual networks: random ones composed of every part that real ones have, and one small network for each past error."""

import dataclasses
import threading
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import Chain, Tokens, assert_untouched, images, make, matrices, numbers, snapshot, tokens
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import anybit
from anybit.data.batches import Batch, call, evaluating, map_tensors, predict, tensors_in
from anybit.data.samples import Samples
from anybit.data.tasks import outputs_of
from anybit.errors import AnybitError, InvalidInput, UnsupportedModel
from anybit.networks.batchnorm import fold, fold_checked, foldable
from anybit.networks.layer_types import COVERED
from anybit.networks.layers import coverage, prepare, quantized_layers, unwrapped
from anybit.networks.plain import plain_weights
from anybit.networks.rewrites import rewritten
from anybit.networks.wiring import observe
from anybit.progress import listening
from anybit.sources.models import adapted_network, load_model

WIDTH = 8
TINY = {"samples": 24, "batch_size": 8, "weight_bits": (4, 8), "activation_bits": (8,), "alternatives": 1, "steps": 3, "candidate_steps": 2}

# ---- the parts, each on [N, WIDTH, H, W] ----------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
    "biased": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
    "grouped": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH, bias=False),
    "dilated": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=2, dilation=2, padding_mode="replicate"),
    "transposed": lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 3, padding=1, groups=2),
    "pointwise": lambda: nn.Conv2d(WIDTH, WIDTH, 1),
}
NORMS = {
    "none": nn.Identity,
    "batch norm": lambda: nn.BatchNorm2d(WIDTH),
    "not affine": lambda: nn.BatchNorm2d(WIDTH, affine=False),
    "without statistics": lambda: nn.BatchNorm2d(WIDTH, track_running_stats=False),
    "group norm": lambda: nn.GroupNorm(2, WIDTH),
}
ACTIVATIONS = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "silu in place": lambda: nn.SiLU(inplace=True),
    "leaky": lambda: nn.LeakyReLU(0.1),
    "gelu": nn.GELU,
}


class Layered(nn.Module):
    def __init__(self, convolution: str, norm: str, activation: str):
        super().__init__()
        self.conv, self.norm, self.act = CONVOLUTIONS[convolution](), NORMS[norm](), ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Joined(Layered):
    """Layers whose output is joined with their input: summed, summed in place, multiplied, or concatenated and mixed."""

    def __init__(self, mode: str, *parts: str):
        super().__init__(*parts)
        self.mode, self.mix = mode, nn.Conv2d(2 * WIDTH, WIDTH, 1) if mode == "cat" else None

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.mode == "in place":
            out = out + 0.0
            out += x
            return out
        return self.mix(torch.cat([out, x], 1)) if self.mode == "cat" else x + out if self.mode == "add" else out * torch.sigmoid(x)


class Aliased(Layered):
    """Modules with two names, called by the second."""

    def __init__(self, *parts: str):
        super().__init__(*parts)
        self.features = nn.Sequential(self.conv, self.norm, self.act)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


class Chosen(Layered):
    """Control flow on a buffer, on the shape, on a Python attribute."""

    def __init__(self, *parts: str):
        super().__init__(*parts)
        self.register_buffer("on", torch.tensor(True))
        self.register_buffer("nothing", None)
        self.other = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.on or x.shape[1] != WIDTH or self.nothing is not None:
            return self.other(x)
        return super().forward(x)


class Peeked(Layered):
    """Another reader than the norm reads, or overwrites, the convolution's output."""

    def __init__(self, mode: str, *parts: str):
        super().__init__(*parts)
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.mode == "compared":
            return self.act(self.norm(y)) * (y > 0.1)
        if self.mode == "written":
            y[:, 0] = 0.5
            return self.act(self.norm(y))
        if self.mode == "spectrum":
            return self.act(self.norm(y)) + torch.fft.rfft(y).abs().mean((1, 2, 3), keepdim=True)
        return self.act(self.norm(y)) + self.conv.weight.mean()


class Counting(Layered):
    """Updates state in buffers that no output depends on."""

    def __init__(self, *parts: str):
        super().__init__(*parts)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("last", None)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.count += 1
        self.mean.mul_(0.9).add_(0.1 * y.detach().mean((0, 2, 3)))
        self.last = y.detach().mean()
        return y


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2).transpose(1, 2)
        return x + self.attention(rows, rows, rows, need_weights=False)[0].transpose(1, 2).reshape(x.shape)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cell(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).reshape(x.shape)


class ByChannel(nn.Module):
    """A linear layer over the last dimension of channels-last data."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return F.relu(self.inner(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class SharedBias(Layered):
    def __init__(self):
        super().__init__("biased", "none", "relu")
        self.second = nn.Conv2d(WIDTH, WIDTH, 1)
        self.second.bias = self.conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(super().forward(x))


class Twice(Layered):
    def __init__(self):
        super().__init__("plain", "none", "relu")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class Tied(Layered):
    def __init__(self):
        super().__init__("plain", "none", "relu")
        self.second = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.second.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(super().forward(x))


class Remembering(Counting):
    """Updates state that its outputs depend on."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.mean[:, None, None]


class AtRandom(Layered):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, training=True)


class BySize(Layered):
    """Its convolution runs once per pair of inputs."""

    def __init__(self):
        super().__init__("plain", "none", "relu")

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(BySize, self).forward(part) for part in x.split(2)])


class Computed(Layered):
    def __init__(self):
        super().__init__("plain", "batch norm", "relu")
        parametrizations.weight_norm(self.conv)


class Half(Layered):
    def __init__(self):
        super().__init__("plain", "none", "relu")
        self.conv.half()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x.half()).float())


def parts() -> st.SearchStrategy:
    """(convolution, norm, activation)."""
    return st.tuples(*(st.sampled_from(sorted(kinds)) for kinds in (CONVOLUTIONS, NORMS, ACTIVATIONS)))


HANDLED = st.one_of(
    parts().map(lambda p: (Layered, p)),
    st.tuples(st.sampled_from(["add", "in place", "mul", "cat"]), parts()).map(lambda drawn: (Joined, (drawn[0], *drawn[1]))),
    parts().map(lambda p: (Aliased, p)),
    parts().map(lambda p: (Chosen, p)),
    st.tuples(st.sampled_from(["compared", "written", "spectrum", "weighed"]), parts()).map(lambda drawn: (Peeked, (drawn[0], *drawn[1]))),
    parts().map(lambda p: (Counting, p)),
    st.sampled_from([(Attending, ()), (Recurrent, ()), (ByChannel, ()), (SharedBias, ()), (Tied, ()), (Twice, ())]),
)
REFUSED = st.one_of(
    st.sampled_from([(BySize, ()), (Half, ())]),
    parts().map(lambda p: (Remembering, p)),
    parts().map(lambda p: (AtRandom, p)),
)


# ---- networks of them -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Answer:
    logits: Tensor
    inner: Any = None


FRONTS = {
    "image": lambda count: numbers(count, 3, 6, 6),
    "channels last": lambda count: numbers(count, 3, 6, 6).contiguous(memory_format=torch.channels_last),
    "tokens": tokens,
    "named": lambda count: {"x": numbers(count, 3, 6, 6), "vector": numbers(count, 4)},
    "several": lambda count: (numbers(count, 3, 6, 6), numbers(count, 4)),
    "whole numbers": lambda count: torch.randint(9, (count, 3, 6, 6), generator=torch.Generator().manual_seed(1)),
}
OUTPUTS = {
    "tensor": lambda y, x: y,
    "tuple": lambda y, x: (y, x),
    "dict": lambda y, x: {"nothing": None, "logits": y, "features": x},
    "dataclass": lambda y, x: Answer(y, Answer(x, [x.mean()])),
}


class Composed(nn.Module):
    """A stem, parts and a head, as drawn by hypothesis."""

    def __init__(self, front: str, blocks: list[tuple[type, tuple]], output: str):
        super().__init__()
        self.front, self.output = front, output
        self.stem = nn.Embedding(20, WIDTH) if front == "tokens" else nn.Conv2d(3, WIDTH, 1)
        self.side = nn.Linear(4, WIDTH) if front in ("named", "several") else None
        self.blocks = nn.ModuleList([cls(*arguments) for cls, arguments in blocks])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, vector: Tensor | None = None) -> Any:
        x = self.stem(x if self.front == "tokens" else x.to(self.head.weight.dtype) / 4)
        if self.front == "tokens":
            x = x.transpose(1, 2).unflatten(2, (3, 2))
        if vector is not None:
            x = x + self.side(vector)[:, :, None, None]
        for block in self.blocks:
            x = block(x)
        return OUTPUTS[self.output](self.head(x.mean((2, 3))), x)


def composed(blocks: st.SearchStrategy) -> st.SearchStrategy:
    """(makes the network, its inputs)."""
    return st.tuples(st.sampled_from(sorted(FRONTS)), blocks, st.sampled_from(sorted(OUTPUTS)), st.integers(0, 3))


def network_of(drawn) -> nn.Module:
    front, blocks, output, seed = drawn
    return make(lambda: Composed(front, blocks, output), seed)


def inputs_of(drawn, count: int) -> Any:
    return FRONTS[drawn[0]](count)


def data_of(drawn, count: int) -> Samples:
    """The inputs, one sample at a time."""
    inputs = inputs_of(drawn, count)
    return Samples([map_tensors(inputs, lambda tensor, index=index: tensor[index]) for index in range(count)], labelled=False)


@torch.no_grad()
def all_outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with evaluating(model):
        return tensors_in(call(model, inputs))


def check_supported_network(drawn, folder) -> None:
    model, inputs = plain_weights(network_of(drawn)), inputs_of(drawn, 4)
    batch = Batch(inputs)
    expected = all_outputs(network_of(drawn), inputs)

    wiring = observe(model, batch)
    covered, uncovered = coverage(model, wiring)
    assert matrices(model) == set(covered) | set(uncovered) and not set(covered) & set(uncovered)
    assert all(isinstance(model.get_submodule(layer), COVERED) for layer in covered)

    prepared = prepare(model, covered)
    assert set(quantized_layers(prepared)) == set(covered)
    assert all(map(torch.equal, all_outputs(prepared, inputs), expected))

    pairs = foldable(model, wiring)
    wide = map_tensors(inputs, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    exact = all_outputs(plain_weights(network_of(drawn)).double(), wide)
    norms = fold_checked(model, pairs, batch, outputs_of(model, [batch])).norms
    for one, other in zip(all_outputs(fold(plain_weights(network_of(drawn)).double(), norms)[0], wide), exact, strict=True):
        assert (one - other).abs().max() <= 2**-52 * 2**20 * exact[-1].abs().max().clamp_min(1)  # a million rounding errors

    model = network_of(drawn)
    before = snapshot(model)
    result = anybit.calibrate(model, data_of(drawn, 24), "6bit", pipeline="light", **TINY)
    assert_untouched(model, before)
    covered, uncovered = coverage(new := rewritten(plain_weights(model), batch), observe(new, batch))
    assert set(result.scheme) == set(covered) and dict(result.report["uncovered"]) == uncovered
    loaded = anybit.load(result.save(folder / "run", overwrite=True), model=network_of(drawn))
    assert loaded.scheme == result.scheme
    assert [(key, tensor.dtype) for key, tensor in loaded.state_dict().items()] == [
        (key, tensor.dtype) for key, tensor in result.model.state_dict().items()
    ]
    assert all(map(torch.equal, loaded.state_dict().values(), result.model.state_dict().values()))
    assert all(map(torch.equal, all_outputs(loaded, inputs), all_outputs(result.model, inputs)))


def check_rejected_network(drawn, place: int) -> None:
    model = network_of(drawn)
    before = snapshot(model)
    with pytest.raises(UnsupportedModel, match=f"blocks.{place}[./]"):
        anybit.calibrate(model, data_of(drawn, 24), "6bit", **TINY)
    assert_untouched(model, before)


QUICKLY = settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
FEW = st.lists(HANDLED, min_size=1, max_size=3)
handled = given(drawn=composed(FEW))
refused = given(drawn=composed(FEW), strange=REFUSED, place=st.integers(0, 2))


@QUICKLY
@handled
def test_network_of_any_parts_is_prepared_folded_covered_saved_and_loaded(drawn, tmp_path_factory):
    check_supported_network(drawn, tmp_path_factory.mktemp("drawn"))


@QUICKLY
@refused
def test_unsupported_part_is_rejected_by_its_name(drawn, strange, place):
    front, blocks, output, seed = drawn
    place = min(place, len(blocks))
    check_rejected_network((front, [*blocks[:place], strange, *blocks[place:]], output, seed), place)


@pytest.mark.slow
@LONG
@handled
def test_many_networks_of_any_parts_are_handled(drawn, tmp_path_factory):
    check_supported_network(drawn, tmp_path_factory.mktemp("drawn"))


@pytest.mark.slow
@LONG
@refused
def test_many_networks_with_an_unsupported_part_are_rejected(drawn, strange, place):
    front, blocks, output, seed = drawn
    place = min(place, len(blocks))
    check_rejected_network((front, [*blocks[:place], strange, *blocks[place:]], output, seed), place)


# ---- one thing at a time --------------------------------------------------------------------------------------------------------


class Plain(Chain):
    """A Chain whose parts the tests below change or read in other ways."""

    def body(self, x: Tensor) -> Tensor:
        return self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))).mean((2, 3))

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.body(x))


def plain(**changes: nn.Module) -> nn.Module:
    model = make(Plain)
    for name, module in changes.items():
        setattr(model, name, module)
    return model


def with_forward(forward) -> nn.Module:
    """A Plain network whose forward is `forward(self, x)`."""
    return make(type("Own", (Plain,), {"forward": forward}))


def calibrated(model: nn.Module, data: Any = None, **changes: Any):
    budget = None if "keep" in changes else "6bit"  # layers kept float may be most of the network
    return anybit.calibrate(model, images(24) if data is None else data, budget, **{"pipeline": "light", **TINY, **changes})


def rejected_by_calibrate(model: nn.Module, *parts: str, data: Any = None, error: type = UnsupportedModel, **changes: Any) -> None:
    """Check that every pipeline rejects the network, in a message that contains all `parts`, and leaves it unchanged."""
    for pipeline in ("light", "advanced"):
        with pytest.raises(error) as caught:
            calibrated(model, data, pipeline=pipeline, **changes)
        assert all(part in str(caught.value) for part in parts), caught.value


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "data parallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_network_keeps_original_names_and_identical_bytes(wrapper, tmp_path):
    wrapped = WRAPPERS[wrapper](make(Chain))
    result, twin = calibrated(wrapped), calibrated(make(Chain))
    assert list(result.scheme) == ["conv1", "conv2", "fc"]
    files = [(one.save(tmp_path / name) / "model.safetensors").read_bytes() for name, one in (("a", result), ("b", twin))]
    assert files[0] == files[1]
    assert torch.equal(anybit.load(tmp_path / "a", model=wrapped)(images(4)), result.model(images(4)))


def test_wrapped_part_is_unwrapped_in_a_copy():
    model = make(Chain)
    part = model.conv2 = torch.compile(model.conv2, backend="eager")
    assert [name for name, _ in unwrapped(model).named_children()] == [name for name, _ in make(Chain).named_children()]
    assert list(calibrated(model).scheme) == ["conv1", "conv2", "fc"]
    assert model.conv2 is part and type(unwrapped(model).conv2) is nn.Conv2d


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_result_is_independent_of_the_gradient_mode(context, tmp_path):
    with context():
        inside = calibrated(make(Chain), pipeline="advanced").save(tmp_path / "inside")
    outside = calibrated(make(Chain), pipeline="advanced").save(tmp_path / "outside")
    assert (inside / "model.safetensors").read_bytes() == (outside / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["module", "buffer"])
def test_rejects_name_that_no_file_can_hold_before_any_work(kind):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if kind == "module":
        model.add_module("half\ud800", nn.ReLU())
    else:
        model[0].register_buffer("half\ud800", torch.zeros(1))
    with pytest.raises(UnsupportedModel, match=r"half\\ud800' is a name with half of a surrogate pair"):
        anybit.calibrate(model, torch.randn(8, 4), "4bit", pipeline="light")


def test_accepts_parameters_created_in_inference_mode():
    with torch.inference_mode():
        model, data = make(Chain), images(24)
    assert list(calibrated(model, data, pipeline="advanced").scheme) == ["conv1", "conv2", "fc"]


def test_module_with_two_names_is_folded_and_stored_under_both(tmp_path):
    class Listed(Plain):
        def __init__(self):
            super().__init__()
            self.features, self.last = nn.Sequential(self.conv1, self.bn1, self.relu1), self.fc

        def body(self, x):
            return self.relu2(self.bn2(self.conv2(self.features(x)))).mean((2, 3))

    result = calibrated(make(Listed))
    assert result.canonical.folded == {"conv1": "bn1", "conv2": "bn2"}
    assert isinstance(result.model.bn1, nn.Identity) and isinstance(result.model.features[1], nn.Identity)
    size = (result.save(tmp_path / "run") / "model.safetensors").stat().st_size
    assert size == result.report["result"]["bytes"] < make(Chain).conv2.weight.nbytes  # none of its weights is stored as float


READERS = {
    "a comparison": lambda self, y: (y > 0.2).float().mean((2, 3))[:, :5],
    "a number taken out": lambda self, y: 1.0 if y[0, 0, 0, 0].item() > 0 else -1.0,
    "complex numbers": lambda self, y: torch.fft.rfft(y).abs().mean((2, 3))[:, :5],
}


@pytest.mark.parametrize("reader", READERS)
def test_batch_norm_with_a_shared_input_is_not_folded(reader):
    def forward(self, x):
        y = self.conv1(x)
        aside = READERS[reader](self, y)
        return self.fc(self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(y))))).mean((2, 3))) + aside

    model = with_forward(forward)
    assert foldable(model, observe(model, Batch(images(2)))) == {"conv2": "bn2"}


def test_in_place_write_between_layer_and_batch_norm_prevents_folding():
    def forward(self, x):
        y = self.conv1(x)
        y[:, 0] = 0.5
        z = self.conv2(y)
        return self.fc(self.bn2(z).mean((2, 3)))

    wiring = observe(with_forward(forward), Batch(images(2)))
    assert wiring.batch_norm_after("conv1") is None and not wiring.feeds("conv1", "conv2")
    assert wiring.batch_norm_after("conv2") == "bn2"


@pytest.mark.parametrize("share", [1.0, 1e-6])  # even a small change by folding must be detected
def test_only_batch_norm_of_a_shared_weight_stays(share):
    model = with_forward(lambda self, x: Plain.forward(self, x) + share * self.conv1.weight.mean())
    assert calibrated(model).canonical.folded == {"conv2": "bn2"}


def test_reading_the_dtype_of_a_weight_does_not_prevent_folding():
    model = with_forward(lambda self, x: Plain.forward(self, x.to(self.conv1.weight.dtype) * self.conv1.weight.shape[1]))
    assert calibrated(model).canonical.folded == {"conv1": "bn1", "conv2": "bn2"}


def test_batch_norm_whose_parameters_are_read_elsewhere_stays():
    model = with_forward(lambda self, x: Plain.forward(self, x) + self.bn1.running_mean.mean())
    assert calibrated(model).canonical.folded == {"conv2": "bn2"}


class Levels(nn.Module):
    """Two heads on two levels sharing weight and bias, each with its own batch norm."""

    def __init__(self):
        super().__init__()
        self.stem, self.near, self.far = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.far.weight, self.far.bias = self.near.weight, self.near.bias
        self.bn_near, self.bn_far, self.fc = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        near, far = self.bn_near(self.near(x)), self.bn_far(self.far(F.avg_pool2d(x, 2)))
        return self.fc(F.relu(near).mean((2, 3)) + F.relu(far).mean((2, 3)))


class TiedScores(nn.Module):
    """An embedding whose weight is also used in a product by a module that is not a layer."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return x @ self.weight.t()


class TiedHead(Tokens):
    def __init__(self):
        super().__init__()
        self.scores = TiedScores(self.words.weight)

    def forward(self, tokens):
        return self.scores(self.hidden(self.words(tokens))).mean(1)


class TiedLinear(Tokens):
    """The weight of an embedding shared with the output layer, as in language models."""

    def __init__(self):
        super().__init__()
        self.scores = nn.Linear(8, 20, bias=False)
        self.scores.weight = self.words.weight

    def forward(self, tokens):
        return self.scores(self.hidden(self.words(tokens))).mean(1)


@pytest.mark.parametrize("pipeline", ["light", "advanced"])
@pytest.mark.parametrize(
    ("cls", "data", "tied"),
    [(Levels, images, ("near", "far")), (TiedHead, tokens, ("words",)), (TiedLinear, tokens, ("words", "scores"))],
)
def test_layers_that_share_a_weight_get_separate_ones(cls, data, tied, pipeline, tmp_path):
    model = make(cls)
    before = snapshot(model)
    result = calibrated(model, data(24), pipeline=pipeline)  # an optimizer warns of duplicate parameters
    assert_untouched(model, before)
    assert set(tied) <= set(result.scheme) and set(result.canonical.folded.values()) == ({"bn_near", "bn_far"} if cls is Levels else set())
    run = result.save(tmp_path / "run")
    assert torch.equal(predict(anybit.load(run, model=model), Batch(data(4))), predict(result.model, Batch(data(4))))
    anybit.export(run, tmp_path / "net.onnx", model=model, data=data(24))
    assert anybit.verify(run, tmp_path / "net.onnx", model=model, data=data(24))["ok"]


def test_one_of_two_layers_with_a_shared_weight_may_stay_float():
    model = make(Levels)
    result = calibrated(model, images(24), keep={"near": "float"})
    layers = quantized_layers(result.model)
    assert layers["near"].weight_quantizer is None and layers["far"].weight_quantizer is not None
    assert torch.equal(model.near.weight, model.far.weight)


def test_buffers_changed_by_a_pass_are_saved_with_their_original_values(tmp_path):
    model = plain(relu1=Counting("plain", "none", "relu"))
    result = calibrated(model, pipeline="advanced")
    assert result.model.relu1.count == 0 and not result.model.relu1.mean.any() and result.model.relu1.last is None
    assert calibrated(model).model.relu1.count == 0 and model.relu1.count == 0
    anybit.load(result.save(tmp_path / "run"), model=plain(relu1=Counting("plain", "none", "relu")))


@pytest.mark.parametrize("scored", ["test", "several outputs"])
def test_scoring_restores_buffers_changed_by_a_pass(scored, tmp_path):
    model, x = plain(relu1=Counting("plain", "none", "relu")), images(24)
    labelled = (x, model(x).argmax(1)) if scored == "test" else None
    if scored == "several outputs":
        model = make(type("Two", (Plain,), {"forward": lambda self, x: (Plain.forward(self, x), Plain.forward(self, x).square())}))
        model.relu1 = Counting("plain", "none", "relu")
    before = {key: buffer if buffer is None else buffer.clone() for key, buffer in model.relu1._buffers.items()}
    result = calibrated(model, x, test=labelled)
    after = result.model.relu1._buffers
    for key, one in before.items():
        assert after[key] is None if one is None else torch.equal(one, after[key]), key
    result.save(tmp_path / "run")


def test_block_that_adds_and_removes_buffers_is_reconstructed():
    class Block(Counting):
        def forward(self, x):
            return x + super().forward(x)

    parts = ("plain", "batch norm", "relu")
    model = make(lambda: nn.Sequential(nn.Conv2d(3, WIDTH, 1), Block(*parts), nn.ReLU(), Block(*parts), nn.Conv2d(WIDTH, 2, 1)))
    result = calibrated(model, pipeline="advanced", task="regression")
    assert {"1", "3"} <= set(result.report["units"])
    assert all(result.model[place].last is None and result.model[place].count == 0 for place in (1, 3))


def test_rejects_outputs_that_depend_on_earlier_inputs_naming_the_module():
    rejected_by_calibrate(plain(relu1=Remembering("plain", "none", "relu")), "from relu1/add on", "It keeps", "relu1.mean")

    counter, dropout = Counting("plain", "none", "relu"), AtRandom("plain", "none", "relu")
    rejected_by_calibrate(plain(relu1=counter, relu2=dropout), "from relu2/dropout on")  # the counter before it is harmless
    written = Peeked("written", "plain", "batch norm", "relu")
    rejected_by_calibrate(plain(relu1=dropout, relu2=written), "from relu1/dropout on")  # an in-place write hides nothing before it
    hidden = with_forward(lambda self, x: self.fc(self.body(x) + 0 * self.relu1.mean))
    hidden.relu1 = Remembering("plain", "none", "relu")
    rejected_by_calibrate(hidden, "from relu1/add on")  # neither does a product with zero, which differs for other inputs

    def counting(self, x):
        self.seen = getattr(self, "seen", 0) + 1
        return Plain.forward(self, x) + self.seen

    rejected_by_calibrate(with_forward(counting), "other outputs the second time, from")


def test_rejects_network_that_runs_only_once():
    def wearing_out(self, x):
        self.left = getattr(self, "left", 1) - 1
        if self.left < 0:
            raise RuntimeError("nothing left")
        return Plain.forward(self, x)

    rejected_by_calibrate(with_forward(wearing_out), "runs once on an input and not again", "nothing left")


def test_rejects_pass_that_overwrites_a_weight():
    model = make(Tokens)
    model.words.max_norm = 1.0
    rejected_by_calibrate(model, "words.weight", "max_norm=None", data=tokens(24))


COMPUTED = {
    "weight norm": lambda layer: parametrizations.weight_norm(layer),
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer),
    "weight norm of old": lambda layer: nn.utils.weight_norm(layer),
    "spectral norm of old": lambda layer: nn.utils.spectral_norm(layer),
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "a bias": lambda layer: nn.utils.parametrize.register_parametrization(layer, "bias", nn.Tanh()),
}


def with_computed(kind: str) -> nn.Module:
    model = plain()
    COMPUTED[kind](model.conv2)
    model.eval()(images(2))
    return model


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_computed_weight_becomes_plain_on_a_copy(kind, tmp_path):
    model = with_computed(kind)
    before, outputs = snapshot(model), model(images(4))
    copied = adapted_network(model)
    assert set(copied.state_dict()) == set(plain().state_dict()) and torch.allclose(copied.eval()(images(4)), outputs, atol=1e-5)
    assert adapted_network(copied) is copied
    result = calibrated(model)
    assert_untouched(model, before)
    loaded = anybit.load(result.save(tmp_path / "run"), model=model)
    assert torch.equal(loaded(images(4)), result.model(images(4)))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_file_stores_computed_weights(tmp_path, monkeypatch):
    (tmp_path / "made.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))\n"
    )
    monkeypatch.chdir(tmp_path)
    source = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)))
    torch.save(source.state_dict(), "weights.pt")
    model, x = load_model("made.py:net", "weights.pt"), numbers(4, 3)
    assert set(model.state_dict()) == {"0.weight", "0.bias"} and torch.allclose(model(x), source(x))


def test_rejects_weight_computed_by_unknown_code():
    class Halved(nn.Linear):
        weight = property(lambda self: self.small * 2)

        def __init__(self):
            nn.Module.__init__(self)
            self.small, self.bias = nn.Parameter(torch.ones(5, 8)), None

    rejected_by_calibrate(plain(fc=Halved()), "fc", "computed", "layer.weight = nn.Parameter")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_rejects_parameters_without_plain_numbers_by_name():
    rejected_by_calibrate(plain(fc=nn.LazyLinear(5)), "fc.weight", "Run the network once")
    rejected_by_calibrate(plain().to("meta"), "conv1.weight", "meta", "Load the weights")
    rejected_by_calibrate(plain(fc=torch.jit.script(nn.Linear(8, 5))), "fc is TorchScript", "Python module")
    rejected_by_calibrate(plain(fc=torch.jit.script(nn.Linear(8, 5))).double(), "fc is TorchScript")
    for tensor, part in ((torch.eye(3).to_sparse(), "sparse"), (torch.ones(3, dtype=torch.complex64), "persistent=False")):
        model = plain()
        model.register_buffer("table", tensor)
        rejected_by_calibrate(model, "table", part)


def test_state_of_every_dtype_round_trips(tmp_path):
    model = plain()
    for dtype in (torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.float16, torch.bfloat16, torch.bool, torch.float64):
        model.register_buffer(f"of_{str(dtype).rpartition('.')[2]}", torch.ones(3, dtype=dtype))
    model.register_buffer("rotations", torch.ones(3, dtype=torch.complex64), persistent=False)
    result = calibrated(model)
    loaded = anybit.load(result.save(tmp_path / "run"), model=model)
    assert all(torch.equal(tensor, result.model.state_dict()[key]) for key, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rejects_network_of_another_dtype_before_checking_inputs(dtype):
    rejected_by_calibrate(plain().to(dtype), "conv1", str(dtype), "model.float()")
    assert list(calibrated(plain().to(dtype).float()).scheme) == ["conv1", "conv2", "fc"]


def test_half_precision_layer_may_be_kept_float_with_its_batch_norm(tmp_path):
    def forward(self, x):
        y = self.relu1(self.bn1(self.conv1(x.half()))).float()
        return self.fc(self.relu2(self.bn2(self.conv2(y))).mean((2, 3)))

    model = with_forward(forward)
    model.conv1.half(), model.bn1.half()
    result = calibrated(model, keep={"conv1": "float"}, pipeline="advanced")
    assert result.canonical.folded == {"conv2": "bn2"}
    assert torch.equal(anybit.load(result.save(tmp_path / "run"), model=model)(images(4)), result.model(images(4)))


def test_uncopyable_attribute_is_named_with_its_module():
    model = plain()
    model.conv2.lock = threading.Lock()
    rejected_by_calibrate(model, "conv2, a Conv2d, cannot be copied", "lock")


def in_surroundings(surroundings):
    def forward(self, x):
        with surroundings():
            return Plain.forward(self, x)

    return forward


SURROUNDINGS = {
    "autocast": in_surroundings(lambda: torch.autocast("cpu", torch.bfloat16)),
    "gradients": in_surroundings(torch.enable_grad),
    "vmap": lambda self, x: torch.vmap(lambda one: Plain.forward(self, one[None])[0])(x),
}


@pytest.mark.parametrize("kind", SURROUNDINGS)
def test_layer_that_cannot_run_alone_is_named(kind):
    rejected_by_calibrate(with_forward(SURROUNDINGS[kind]), "Layer conv1 runs", kind)
    assert torch.isfinite(with_forward(SURROUNDINGS[kind])(images(2))).all()  # evaluation is unaffected


def test_a_float_network_under_autocast_is_evaluated():
    data = (images(8), torch.arange(8) % 5)
    assert anybit.evaluate(with_forward(SURROUNDINGS["autocast"]), data)["samples"] == 8


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_rejects_forward_without_gradients_only_where_needed(mode):
    model = with_forward(in_surroundings(mode))
    with pytest.raises(UnsupportedModel, match="The forward of Own lets no gradient through"):
        calibrated(model, pipeline="advanced")
    assert list(calibrated(model).scheme) == ["conv1", "conv2", "fc"]


def test_block_without_gradients_is_named():
    class Closed(Joined):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    model = make(lambda: nn.Sequential(nn.Conv2d(3, WIDTH, 1), Closed("add", "plain", "batch norm", "relu"), nn.Conv2d(WIDTH, 2, 1)))
    with pytest.raises(UnsupportedModel, match="Block 1 lets no gradient through"):
        calibrated(model, pipeline="advanced", task="regression")


def sometimes(chooses):
    """The forward calls `fc` again if `chooses(x)`."""
    return lambda self, x: self.fc(self.body(x)) if not chooses(x) else self.fc(self.fc(self.body(x)).repeat(1, 2)[:, :8])


CHOICES = {
    "by size": sometimes(lambda x: len(x) > 2),
    "by value": sometimes(lambda x: bool((x == images(24).max()).any())),
    "not at all": lambda self, x: self.fc(self.body(x)) if len(x) <= 2 else self.body(x)[:, :5],
}


@pytest.mark.parametrize("choice", CHOICES)
def test_rejects_layer_with_data_dependent_calls_unless_kept_float(choice):
    rejected_by_calibrate(with_forward(CHOICES[choice]), "Layer fc runs", "keep={'fc': 'float'}", samples=24, batch_size=24)
    result = calibrated(with_forward(CHOICES[choice]), keep={"fc": "float"}, pipeline="advanced")
    assert str(result.scheme["fc"]) == "float"


def test_rejects_layer_without_tensor_input_unless_kept_float():
    model = with_forward(lambda self, x: self.fc(self.body(x) + self.body(x)[:, :0] @ self.nothing.weight.t()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.nothing = nn.Linear(0, 8)

    def forward(self, x):
        y = self.body(x)
        return self.fc(y + self.nothing(y[:, :0]))

    model.__class__.forward = forward
    rejected_by_calibrate(model, "Layer nothing reads an input of shape", "keep={'nothing': 'float'}")
    assert "nothing" in calibrated(model, keep={"nothing": "float"}, pipeline="advanced").scheme


OUTPUTS_REFUSED = {
    "one number": (lambda self, x: Plain.forward(self, x).mean(), "shape ()"),
    "classes": (lambda self, x: Plain.forward(self, x).argmax(1), "torch.int64"),
    "complex": (lambda self, x: torch.fft.fft(Plain.forward(self, x)), "torch.complex64"),
}


@pytest.mark.parametrize("kind", OUTPUTS_REFUSED)
def test_rejects_output_without_one_row_per_input(kind):
    forward, part = OUTPUTS_REFUSED[kind]
    rejected_by_calibrate(with_forward(forward), part, "Let Own return")


@pytest.mark.parametrize("rows", [5, 2])  # the example has two inputs
def test_outputs_without_one_row_per_input_are_ignored_beside_others(rows):
    def forward(self, x):
        return self.fc.weight[:rows, :3].clone(), Plain.forward(self, x)

    notes = []
    with listening(events=lambda event, fields: notes.append(fields["note"]) if event == "note" else None):
        result = calibrated(with_forward(forward))
    assert result.report["schemes"] and any("not compared" in note for note in notes)


def test_inputs_of_every_dtype_reach_the_network():
    seen = []

    def forward(self, x):
        seen.append(x.dtype)
        return Plain.forward(self, torch.view_as_real(x).mean(-1) if x.is_complex() else x.float())

    for data, taken in (
        (torch.complex(images(24), images(24, 2)), torch.complex64),
        (images(24).to(torch.complex128), torch.complex64),
        (images(24).bfloat16(), torch.float32),
        (images(24).half(), torch.float32),
        (images(24).double(), torch.float32),
        (images(24).long(), torch.int64),
    ):
        seen.clear()
        calibrated(with_forward(forward), data)
        assert set(seen) == {taken}


def test_rejects_infinite_complex_inputs():
    data = torch.complex(images(24), images(24, 2))
    data[3, 0, 0, 0] = complex(0, float("nan"))
    rejected_by_calibrate(with_forward(lambda self, x: Plain.forward(self, x.abs())), "NaN", data=data, error=InvalidInput)


def test_rejects_samples_that_cannot_be_batched():
    data = Samples([Answer(image) for image in images(24)], labelled=False)
    rejected_by_calibrate(plain(), "Answer", "collate_fn", data=data, error=InvalidInput)


@pytest.mark.parametrize("road", ["grow", "train"])
def test_training_roads_reject_with_the_same_names(road):
    settings = {"grow": {"budget": "4bit"}, "train": {"bits": (4, 8), "label": "teacher", "held_out": 0.2}}[road]
    for model, part in (
        (plain().half(), "conv1: the weight is torch.float16"),
        (with_forward(CHOICES["by size"]), "Layer fc runs 2 times"),
        (plain(relu1=Remembering("plain", "none", "relu")), "from relu1/add on"),
    ):
        before = snapshot(model)
        with pytest.raises(AnybitError) as caught:
            getattr(anybit, road)(model, images(24), distill=1.0, epochs=1, batch_size=8, **settings)
        assert part in str(caught.value)
        assert_untouched(model, before)


def test_layers_called_by_keyword_are_quantized_on_all_roads():
    def forward(self, x):
        y = self.relu2(self.bn2(input=self.conv2(input=self.relu1(self.bn1(self.conv1(input=x))))))
        return self.fc(input=y.mean((2, 3)))

    for pipeline in ("light", "advanced"):
        assert calibrated(with_forward(forward), pipeline=pipeline).canonical.folded == {"conv1": "bn1", "conv2": "bn2"}


def test_rejects_network_that_is_one_layer_with_a_working_remedy():
    rejected_by_calibrate(nn.Linear(8, 5), "itself is a Linear", "nn.Sequential", data=numbers(24, 8))
    assert list(calibrated(nn.Sequential(nn.Linear(8, 5)), numbers(24, 8)).scheme) == ["0"]


def test_layer_in_a_plain_list_is_named():
    model = with_forward(lambda self, x: Plain.forward(self, self.hidden[0](x)))
    model.hidden = [nn.Conv2d(3, 3, 1)]
    assert "conv2d" in calibrated(model).report["uncovered"]


def test_rejects_layer_with_several_outputs_unless_kept_float():
    class Pair(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y, y.square()

    model = with_forward(lambda self, x: self.fc(self.body(x))[0])
    model.fc = Pair(8, 5)
    rejected_by_calibrate(model, "Layer fc returns 2 tensors", "keep={'fc': 'float'}")
    calibrated(model, keep={"fc": "float"}, pipeline="advanced")


def test_tunes_sparse_embedding():
    model = make(Tokens)
    model.words.sparse = True
    calibrated(model, tokens(24), pipeline="advanced")
    assert model.words.sparse


class PositionTable(nn.Embedding):
    """Positions, looked up by a shape."""

    def forward(self, shape: torch.Size) -> Tensor:
        return super().forward(torch.arange(shape[1]))


class Placed(Tokens):
    def __init__(self):
        super().__init__()
        self.places = PositionTable(6, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(self.hidden(self.words(tokens) + self.places(tokens.shape)).mean(1))


def test_embedding_called_with_a_shape_is_covered():
    result = calibrated(make(Placed), tokens(24))
    assert "places" in result.scheme and anybit.inspect(make(Placed), tokens(4), export=False)["layers"]["places"]["input"] == []


class KeepsOutput(nn.Module):
    """A network that runs one of its layers in the first pass only."""

    def __init__(self):
        super().__init__()
        self.position, self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 3)
        self.kept = None

    def forward(self, x):
        if self.kept is None:
            self.kept = self.position(torch.ones(1, 8)).detach()
        return self.last(self.first(x + self.kept).relu())


def test_layer_that_runs_in_the_first_pass_only_is_refused_with_a_remedy_that_works():
    model, x = KeepsOutput().eval(), torch.randn(32, 8)
    for verb in (lambda: anybit.inspect(model, x, export=False), lambda: anybit.calibrate(model, x, "4bit", pipeline="light")):
        with pytest.raises(UnsupportedModel, match="Layer position runs in the first forward pass only"):
            verb()
    model(x[:1])
    assert list(anybit.calibrate(model, x, "4bit", pipeline="light").scheme) == ["first", "last"]


def test_other_default_types_are_refused():
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(UnsupportedModel, match=r"torch\.set_default_dtype\(torch\.float32\)"):
            anybit.calibrate(make(Chain), images(16), "4bit")
    finally:
        torch.set_default_dtype(torch.float32)
