"""Costs compared with hand-computed counts, and with the written file."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from anybit.data.batches import Batch
from anybit.networks.candidates import ActivationCandidate, Candidates, apply_scheme, weight_candidate
from anybit.networks.canonical import Canonical
from anybit.networks.cost import CostModel, LayerSize, macs_per_sample
from anybit.networks.layers import prepare
from anybit.networks.wiring import observe
from anybit.runs.scheme_file import write_canonical
from anybit.scheme import Precision, Scheme

few = settings(max_examples=40, deadline=None)
WEIGHT_BITS, ACTIVATION_BITS = (None, 0, *range(2, 9)), (None, *range(2, 9))
precisions = st.builds(Precision, st.sampled_from(WEIGHT_BITS), st.sampled_from(ACTIVATION_BITS))


class Small(nn.Module):
    """A convolution, a norm with an integer counter, an uncovered layer norm, a classifier."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.after = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.after(self.norm(self.conv(x)).mean((2, 3))))


NAMES = ["conv", "fc"]
schemes = st.fixed_dictionaries(dict.fromkeys(NAMES, precisions)).map(Scheme)


def wired(model, *shape):
    return observe(model.eval(), Batch(torch.zeros(shape)))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model = Small().eval()
    return model, prepare(model, NAMES)


@pytest.fixture(scope="module")
def costs(small):
    model, prepared = small
    return CostModel.of(prepared, NAMES, wired(model, 2, 3, 6, 5), 0, model)


@pytest.mark.parametrize("edges", [{}, {"input/0": (0.0, 1.0)}, {"a": (0.0, 1.0), "b/add": (-1.0, 2.0)}])
def test_file_size_equals_the_written_file_for_every_scheme(small, tmp_path, edges):
    model, prepared = small
    costs = CostModel.of(prepared, NAMES, wired(model, 2, 3, 6, 5), len(edges), model)
    candidates = Candidates(
        {(name, bits): weight_candidate(prepared.get_submodule(name), bits, "minmax") for name in NAMES for bits in range(2, 9)},
        {(name, bits): ActivationCandidate(torch.tensor(0.1), torch.tensor(1.0)) for name in NAMES for bits in range(2, 9)},
    )

    @few
    @given(schemes)
    def sizes_agree(scheme):
        canonical = Canonical(apply_scheme(prepared, scheme, candidates), {}, edges)
        write_canonical(tmp_path, canonical, {})
        assert costs.file_size(scheme) == os.path.getsize(tmp_path / "model.safetensors")

    sizes_agree()


def test_float_bytes_equals_the_written_float_file(small, costs, tmp_path):
    save_file(small[0].state_dict(), tmp_path / "float.safetensors")
    assert costs.float_bytes == os.path.getsize(tmp_path / "float.safetensors")


@few
@given(schemes, schemes)
def test_overhead_of_two_schemes_differs_only_in_the_header(costs, one, other):
    # Six shared tensors of up to 100 header bytes each may be present or absent.
    assert abs(costs.overhead(one) - costs.overhead(other)) <= 600


def test_layer_sizes(costs):
    assert costs.layers == {"conv": LayerSize(4, 27, 4 * 27 * 6 * 5), "fc": LayerSize(5, 4, 20)}
    assert costs.leftover == 4 * 4 + 2 * 4 + 5  # norm's four vectors, the layer norm's two, the bias of fc
    assert list(costs.others) == ["norm.num_batches_tracked"]


@pytest.mark.parametrize(
    "precision, expected",
    # conv: 108 weights in 4 rows. A coded layer adds 4 bytes a row, a quantized input 5.
    [("W4A8", 54 + 16 + 5), ("W4", 54 + 16), ("W3", 41 + 16), ("A8", 432 + 5), ("float", 432), ("W0", 0), ("W0A4", 5)],
)
def test_layer_bytes(costs, precision, expected):
    assert costs.layer_bytes("conv", Precision.parse(precision)) == expected


@pytest.mark.parametrize(
    "precision, factor", [("W4A8", 4 * 8), ("W4", 4 * 32), ("A8", 32 * 8), ("float", 32 * 32), ("W0A8", 0), ("W2A2", 4)]
)
def test_layer_bops_are_macs_times_bit_widths(costs, precision, factor):
    assert costs.layer_bops("conv", Precision.parse(precision)) == costs.layers["conv"].macs * factor


def test_weight_bits_are_averaged_over_weights_not_layers(costs):
    scheme = Scheme({"conv": Precision(2), "fc": Precision(8)})
    assert costs.weight_bits(scheme) == (108 * 2 + 20 * 8) / 128
    assert costs.weight_bits(Scheme({"conv": Precision(), "fc": Precision(0)})) == 108 * 32 / 128


@few
@given(st.sampled_from(WEIGHT_BITS[1:]), st.sampled_from(ACTIVATION_BITS))
def test_uniform_scheme_has_its_bits_as_mean(costs, weight_bits, activation_bits):
    assert costs.weight_bits(Scheme.uniform(NAMES, Precision(weight_bits, activation_bits))) == weight_bits


@few
@given(schemes, st.sampled_from(NAMES), st.integers(2, 7))
def test_one_more_weight_bit_raises_every_cost(costs, scheme, name, bits):
    fewer, more = (scheme.replace({name: Precision(b, scheme[name].activation_bits)}) for b in (bits, bits + 1))
    low, high = costs.summary(fewer), costs.summary(more)
    assert low.keys() == high.keys() == {"weight_bits", "bytes", "percent", "bops"}
    assert all(low[quantity] < high[quantity] for quantity in ("weight_bits", "bops"))
    assert costs.layer_bytes(name, fewer[name]) < costs.layer_bytes(name, more[name])


@few
@given(schemes)
def test_summary_agrees_with_the_single_costs(costs, scheme):
    summary = costs.summary(scheme)
    assert summary["bytes"] == costs.file_size(scheme)
    assert summary["percent"] / 100 * costs.float_bytes == pytest.approx(summary["bytes"])
    assert summary["bops"] == sum(costs.layer_bops(name, precision) for name, precision in scheme.items())


@pytest.mark.parametrize(
    "layer, shape, macs",
    [
        (nn.Linear(6, 5), (2, 6), 30),
        (nn.Linear(6, 5), (2, 7, 6), 30 * 7),  # once for each of seven tokens
        (nn.Conv1d(2, 4, 3), (2, 2, 10), 24 * 8),
        (nn.Conv2d(4, 6, 3, stride=2, groups=2), (2, 4, 7, 9), 6 * 2 * 9 * 3 * 4),
        (nn.Conv3d(1, 2, 2), (2, 1, 3, 3, 3), 16 * 8),
        (nn.ConvTranspose2d(3, 2, 2, stride=2), (2, 3, 4, 5), 24 * 20),  # each input position meets every weight once
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_multiply_accumulates_of_one_sample(layer, shape, macs, batch_size):
    model = nn.Sequential(layer)
    assert macs_per_sample(model[0], "0", wired(model, batch_size, *shape[1:])) == macs


def test_embedding_has_no_multiply_accumulates():
    model = nn.Sequential(nn.Embedding(10, 4))
    wiring = observe(model, Batch(torch.zeros(2, 5, dtype=torch.long)))
    assert macs_per_sample(model[0], "0", wiring) == 0


class Tied(nn.Module):
    """Two layers that share a weight, two norms that share one, and a shared counter."""

    def __init__(self):
        super().__init__()
        self.fc, self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.one, self.two = nn.LayerNorm(3), nn.LayerNorm(3)
        self.right.weight, self.two.weight = self.left.weight, self.one.weight
        self.one.register_buffer("seen", torch.arange(5))
        self.two.register_buffer("seen", self.one.seen)

    def forward(self, x):
        return self.right(self.left(self.two(self.one(self.fc(x)))))


@pytest.mark.parametrize("precision", ["W4A8", "W2", "W0", "float"])
def test_file_size_equals_the_written_file_for_tied_weights(precision, tmp_path):
    model, names = Tied(), ["fc", "left", "right"]
    prepared = prepare(model, names, ["left", "right"])
    costs = CostModel.of(prepared, names, wired(model, 2, 3), 0, model)
    assert costs.leftover == 3 * 3 + 2 * 3 + 2 * 3  # three biases; the shared norm weight, once per key; the norms' biases
    candidates = Candidates(
        {("fc", bits): weight_candidate(prepared.fc, bits, "minmax") for bits in (2, 4)},
        {("fc", 8): ActivationCandidate(torch.tensor(0.1), torch.tensor(1.0))},
    )
    scheme = Scheme({"fc": Precision.parse(precision), "left": Precision(), "right": Precision()})
    write_canonical(tmp_path, Canonical(apply_scheme(prepared, scheme, candidates), {}, {}), {})
    assert costs.file_size(scheme) == os.path.getsize(tmp_path / "model.safetensors")
