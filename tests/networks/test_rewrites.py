"""Functions on weights and activations, computed by layers: equal outputs, and the same scheme in memory and file."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import Odd, numbers
from torch import Tensor, nn

import anybit
from anybit.data.batches import Batch, call
from anybit.errors import SchemeMismatch, UnsupportedModel
from anybit.networks.layers import coverage, float_weight
from anybit.networks.observed import observe_network
from anybit.networks.rewrites import Rewrite, rewrite_of, rewritten, rewritten_as
from anybit.networks.wiring import observe
from anybit.roads.settings import CalibrateSettings
from anybit.scheme import FLOAT

HEADS, WIDTH = 2, 8


class Parameters(nn.Module):
    """Weights that belong to no layer: a convolution, every form of linear, experts stacked and separate."""

    def __init__(self):
        super().__init__()
        self.conv, self.weight, self.bias = parameter(4, 3, 3, 3), parameter(6, 4), parameter(6)
        self.square, self.scale, self.left = parameter(6, 6), parameter(6), parameter(5, 4)
        self.added, self.other = parameter(6), parameter(6, 6)
        self.experts, self.listed = parameter(3, 6, 6), nn.ParameterList([parameter(6, 2, 3) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.conv, stride=2, padding="valid").flatten(2)  # [N, 4, 9]
        x = F.linear((self.left[:4] @ x).mT, weight=self.weight, bias=self.bias)  # [N, 9, 6]
        x = torch.relu(x @ (self.square * self.scale) + 1)
        x = torch.stack([torch.addmm(self.added, x.flatten(0, 1), self.other.t()).view_as(x), x, -x])  # [experts, N, 9, 6]
        x = torch.einsum("enti,eio->neto", x, self.experts).sum(1)
        return sum(torch.einsum("nti,iab->ntab", x, weight) for weight in self.listed).flatten(2)


class Products(nn.Module):
    """Products of two activations, in attention and other forms."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.bias = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), parameter(HEADS, 6, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        a = (q @ k.transpose(-2, -1) + self.bias).softmax(-1) @ v
        b = F.scaled_dot_product_attention(q, v, k, self.bias, scale=0.3) + F.scaled_dot_product_attention(k, q, v, is_causal=True)
        mask = torch.ones(6, 6, dtype=torch.bool).tril(2)
        b = b + F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], attn_mask=mask, enable_gqa=True)
        c = torch.einsum("bhqk,bhkd->bqhd", torch.einsum("bhqd,bhkd->bhqk", k, v).softmax(-1), q)
        d = torch.baddbmm(x, torch.bmm(x, x.mT), x, beta=0.5)
        return self.out((a + b).transpose(1, 2).flatten(2) + c.flatten(2) + d)


class ReadByItsParent(nn.Module):
    """A layer that never runs: its parent computes with its weight, and with its bias, part of which it sets to zero."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(WIDTH, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.inner.bias.clone()
        bias[2:4].zero_()
        return self.last(torch.relu(F.linear(x, self.inner.weight, bias)))


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), weight / weight.std((1, 2, 3), keepdim=True), self.bias, self.stride)


class Tied(nn.Module):
    """An embedding whose weight is also used in a product."""

    def __init__(self):
        super().__init__()
        self.words, self.hidden = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.hidden(self.words(tokens)) @ self.words.weight.t()


class Attending(nn.Module):
    """PyTorch's attention: self-attention, cross-attention of other widths, and attention that also returns its weights."""

    def __init__(self):
        super().__init__()
        self.itself = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.other = nn.MultiheadAttention(WIDTH, HEADS, kdim=4, vdim=6, batch_first=True)
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.itself(x, x, x, need_weights=False)[0]
        y, shares = self.other(x, x[..., :4], x[..., 2:])
        return self.last(x + y) + shares.mean()


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, activation="gelu", batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(6 * WIDTH, 3))


TOKENS = (6, WIDTH)
NETWORKS = {
    "parameters": (Parameters, (3, 7, 7), 10),
    "products": (Products, TOKENS, 14),
    "read by its parent": (ReadByItsParent, TOKENS, 2),
    "standardized": (lambda: nn.Sequential(Standardized(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), (3, 5, 5), 2),
    "attending": (Attending, TOKENS, 11),
    "transformer": (transformer, TOKENS, 13),
}
"""name -> (makes the network, shape of an input, how many layers are covered then)."""


def case(name: str) -> tuple[nn.Module, Batch]:
    make, shape, _ = NETWORKS[name]
    torch.manual_seed(0)
    return make().eval(), Batch(numbers(16, *shape))


def outputs_of(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return call(model, batch.inputs)


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_compute_the_same_as_functions(name):
    model, batch = case(name)
    before = copy.deepcopy(model.state_dict())
    new = rewritten(model, batch.head(2))
    names, uncovered = coverage(new, observe(new, batch))
    assert len(names) == NETWORKS[name][2]
    assert not [why for why in uncovered.values() if "function" in why or "product" in why or "did not run" in why]
    assert torch.allclose(outputs_of(new, batch), outputs_of(model, batch), atol=1e-5)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert sum(p.numel() for p in new.parameters()) <= sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_rewrite_without_inputs_is_identical(name):
    model, batch = case(name)
    new = rewritten(model, batch.head(2))
    again = rewritten_as(case(name)[0], Rewrite.model_validate_json(rewrite_of(new).model_dump_json()))
    again.load_state_dict(new.state_dict())
    assert torch.equal(outputs_of(again, batch), outputs_of(new, batch))
    assert rewritten(again, batch) is again and rewritten_as(again, rewrite_of(new)) is again


@pytest.mark.parametrize("name", ["parameters", "products", "standardized"])
def test_rewritten_network_is_saved_loaded_exported_and_verified(name, tmp_path):
    model, batch = case(name)
    result = anybit.calibrate(model, batch.inputs, pipeline="light", weight_bits=(4, 8), activation_bits=(8,), cache=False)
    result.save(tmp_path / "run")
    loaded = anybit.load(tmp_path / "run", model=model)
    assert torch.equal(outputs_of(loaded, batch), outputs_of(result.model, batch))
    written = anybit.export(tmp_path / "run", onnx=tmp_path / "a.onnx", model=model, data=batch.inputs, cache=False)
    assert written["integer_layers"] == written["layers"] == NETWORKS[name][2]
    assert anybit.verify(tmp_path / "run", tmp_path / "a.onnx", model=model, data=batch.inputs, cache=False)["ok"]


def test_looked_up_weight_stays_and_the_layer_gets_a_copy():
    model, batch = Tied().eval(), Batch(torch.randint(20, (4, 5)))
    new = rewritten(model, batch)
    assert torch.equal(float_weight(new.get_submodule("words_linear")), model.words.weight) and "words.weight" in new.state_dict()
    assert torch.allclose(outputs_of(new, batch), outputs_of(model, batch), atol=1e-6)


def test_copies_use_their_own_layers():
    model, batch = case("transformer")
    new = rewritten(model, batch)
    other = copy.deepcopy(new)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.zero_()
    assert torch.allclose(outputs_of(other, batch), outputs_of(model, batch), atol=1e-5)


def test_input_dependent_calls_stay_functions():
    class OfAnySize(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.weight, self.query = nn.Linear(WIDTH, 4), parameter(6, 6), parameter(1, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x).mT
            x = F.linear(x, self.weight * len(x)) if len(x) > 1 else x
            return x + (self.query.expand(len(x), 1, WIDTH) @ x.new_ones(len(x), WIDTH, 1))

    model, batch = OfAnySize().eval(), Batch(numbers(4, *TOKENS))
    assert rewritten(model, batch) is model


def test_rejects_forward_that_calls_other_functions_later():
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.other = parameter(3, WIDTH), nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight) if x.mean() < 100 else x[:, :3] @ x[:, :3].mT

    model = rewritten(Choosing().eval(), Batch(numbers(4, WIDTH)))
    with pytest.raises(UnsupportedModel, match="matmul where it called linear"):
        model(1000 + numbers(4, WIDTH))


def test_rejects_rewrite_of_another_network():
    model, batch = case("parameters")
    record = rewrite_of(rewritten(model, batch))
    with pytest.raises(SchemeMismatch):
        rewritten_as(nn.Sequential(nn.Linear(2, 2)), record)


def test_product_of_a_function_is_kept_float_by_its_name():
    network = Odd(lambda s, x: s.a(x) @ s.b(x).mT, a=nn.Linear(6, 4), b=nn.Linear(6, 4)).eval()
    settings = CalibrateSettings((8,), (8,), keep={"matmul": FLOAT})
    assert observe_network(network, Batch(torch.randn(2, 5, 6)), settings.options).choices["matmul"] == [FLOAT]
