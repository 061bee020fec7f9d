"""The cached exported graph gives the same bytes as a new export, also with other weights and bits, and only for its own network."""

import os
import random
import shutil
import subprocess
import sys
from collections import OrderedDict

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from exported import EXACT, canonical_of, inputs, random_precision
from networks import Bessel
from torch import nn

import anybit
from anybit.data.batches import Batch
from anybit.errors import UnsupportedModel
from anybit.files.cache import Cache, Entry, _serialized, entries, results_folder
from anybit.onnx import floats, graphs
from anybit.onnx.file import exported
from anybit.onnx.traces import graph_digest
from anybit.scheme import Precision

IMAGE = (3, 12, 12)


def activations():
    """A layer before each activation function."""
    functions = nn.ReLU6(), nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.LeakyReLU(), nn.Tanh()
    return nn.Sequential(*(module for function in functions for module in (nn.Conv2d(3, 3, 1), function)), nn.Conv2d(3, 3, 1))


NETWORKS = {name: EXACT[name] for name in ("relu", "gated", "joined", "mixed", "asymmetric")} | {"activations": (activations, IMAGE)}


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The calls of PyTorch's exporter, as a growing list; the memory cache is empty at first."""
    exports, export = [], torch.onnx.export

    def counted(*args, **settings):
        exports.append(settings)
        return export(*args, **settings)

    monkeypatch.setattr(torch.onnx, "export", counted)
    monkeypatch.setattr(graphs, "_recent", OrderedDict())
    return exports


def contents(canonical, batch, cache=Cache()):
    """The bytes of the integer and the float graph."""
    result = exported(canonical, batch, cache=cache)
    return [ir.to_proto(model).SerializeToString(deterministic=True) for model in (result.integer, result.floating)]


def drawn(make, shape, seed):
    """`make()` at a random scheme."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    return canonical_of(make(), inputs(shape), lambda layer: random_precision(draw))


# The same bytes


@pytest.mark.parametrize("name", NETWORKS)
def test_cached_graph_with_other_weights_and_bits_is_byte_identical(name, tmp_path, calls):
    make, shape = NETWORKS[name]
    first, second = (drawn(make, shape, seed) for seed in (0, 1))
    stored = Cache(tmp_path)
    contents(first, inputs(shape), stored)
    from_memory = contents(second, inputs(shape))
    graphs._recent.clear()
    from_disk = contents(second, inputs(shape), stored)
    assert len(calls) == 1
    graphs._recent.clear()
    assert from_memory == from_disk == contents(second, inputs(shape)) and len(calls) == 2


class Alike(nn.Module):
    """Two branches whose weights an optimizer may merge, and a sum with a buffer that it may drop."""

    def __init__(self, bias=0.0, shift=0.0, same=False, activation=F.relu):
        super().__init__()
        self.activation = activation
        self.left, self.right, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("shift", torch.full((6,), shift))
        nn.init.constant_(self.left.bias, bias)
        if same:
            self.right.load_state_dict(self.left.state_dict())

    def forward(self, x):
        return self.head(self.activation(self.left(x) + self.shift) - self.activation(self.right(x)))


@pytest.fixture(scope="module")
def cached_alike(tmp_path_factory):
    """(canonical network, its `contents`, the folder with its cached graph), read only."""
    canonical, folder = drawn(lambda: Alike(bias=0.5, shift=0.5), (6,), 0), tmp_path_factory.mktemp("alike")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "_recent", OrderedDict())
        return canonical, contents(canonical, inputs((6,)), Cache(folder)), folder


@pytest.fixture
def alike(cached_alike, tmp_path):
    """The same, with a folder that this test may change."""
    canonical, expected, folder = cached_alike
    return canonical, expected, shutil.copytree(folder, tmp_path / "cache")


@pytest.mark.parametrize("special", [{}, {"shift": 1.0}, {"bias": 1.0, "same": True}], ids=str)
def test_optimizer_sees_the_weights_of_the_current_network(special, alike, calls):
    canonical = drawn(lambda: Alike(**special), (6,), 1)
    first = contents(canonical, inputs((6,)), Cache(alike[2]))
    assert not calls
    graphs._recent.clear()
    assert first == contents(canonical, inputs((6,)))


class Tied(nn.Module):
    """A weight under two names, and a constant that is not a buffer."""

    def __init__(self, tied=True, factor=2.0):
        super().__init__()
        self.first, self.second, self.factor = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), torch.tensor([factor])
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(F.gelu(self.first(x)) * self.factor)


def test_inserts_shared_weight_and_constant(calls):
    plain = [Tied().eval() for _ in range(2)]
    layers, batch = ("first", "second"), inputs((6,), 4)
    values = [floats.float_graph(model, batch, batch, layers, (), Cache()) for model in plain]
    assert len(calls) == 1
    for model, (graph, initializers) in zip(plain, values, strict=True):
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(initializers[graph.graph.outputs[0].name]), model(batch.inputs), atol=1e-6)


# No other network


SCALE = 1.0


def scaled(x):
    return x * SCALE


class Plain(nn.Module):
    """The network whose digest is the key; each change of it makes another network."""

    def __init__(self, stride=1, eps=1e-5, factor=1.0, width=8):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, width, 3, stride, 1), nn.GroupNorm(2, width, eps), nn.Linear(width, 4)
        self.factor, self.constant = factor, torch.ones(1)

    def forward(self, x):
        x = scaled(self.norm(self.conv(x))) * self.factor + self.constant
        return self.head(x.mean((2, 3)))


class Branching(Plain):
    """Computes something else at batch sizes that are not tried."""

    def forward(self, x):
        return super().forward(x) if len(x) < 100 else super().forward(-x)


class Renamed(Plain):
    def __init__(self):
        super().__init__()
        self.middle, self.conv = self.conv, None

    def forward(self, x):
        return self.head((scaled(self.norm(self.middle(x))) * self.factor + self.constant).mean((2, 3)))


class Returning(Plain):
    def forward(self, x):
        return {"logits": super().forward(x)}


def digest_of(model, shape=IMAGE, dtype=torch.float32):
    return graph_digest(model.eval(), torch.ones(2, *shape, dtype=dtype), None)


def with_constant(value):
    model = Plain()
    model.constant = torch.tensor([value])
    return model


CHANGES = {
    "a layer's setting": lambda: digest_of(Plain(stride=2)),
    "a layer's number": lambda: digest_of(Plain(eps=1.01e-5)),
    "a number of the network": lambda: digest_of(Plain(factor=1.0000001)),
    "a tensor that is no buffer": lambda: digest_of(with_constant(1.0000001)),
    "a width": lambda: digest_of(Plain(width=6)),
    "a name": lambda: digest_of(Renamed()),
    "a shape": lambda: digest_of(Plain(), (3, 12, 13)),
    "a type": lambda: digest_of(Plain().double(), dtype=torch.float64),
    "what it returns": lambda: digest_of(Returning()),
    "a branch that is not taken": lambda: digest_of(Branching()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_network_has_another_key(change):
    assert CHANGES[change]() != digest_of(Plain())


def test_changed_function_called_by_the_forward_has_another_key(monkeypatch):
    before = digest_of(Plain())
    monkeypatch.setitem(globals(), "SCALE", 1.0000001)
    changed = digest_of(Plain())
    monkeypatch.setitem(globals(), "scaled", lambda x: x.reshape(2, -1, 12, 12) if len(x) == 2 else x)
    assert len({before, changed, digest_of(Plain())}) == 3


def test_changed_weights_have_the_same_key(calls):
    assert digest_of(Plain()) == digest_of(Plain())
    assert digest_of(Tied(), (6,)) == digest_of(Tied(), (6,)) != digest_of(Tied(tied=False), (6,))
    assert digest_of(Tied(factor=3.0), (6,)) != digest_of(Tied(), (6,))


def test_fixed_size_and_batch_size_have_different_keys():
    class Fixed(nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.rows, self.head = rows, nn.Linear(4, 2)

        def forward(self, x):
            return self.head(x.reshape(-1, 4))[: self.rows or len(x)]

    assert len({digest_of(Fixed(rows), (4,)) for rows in (None, 2, 3)}) == 3


@pytest.mark.parametrize("other", [lambda: Alike(activation=F.silu), Tied], ids=["function", "operators"])
def test_graph_of_another_network_is_exported_again(other, alike, tmp_path, calls, monkeypatch):
    """Simulates a digest collision."""
    canonical, expected, _ = alike
    monkeypatch.setattr(floats, "graph_digest", lambda *args: "0" * 64)
    stored = Cache(tmp_path / "collision")
    contents(drawn(other, (6,), 0), inputs((6,)), stored)
    assert contents(canonical, inputs((6,)), stored) == expected and len(calls) == 2
    assert contents(canonical, inputs((6,)), stored) == expected and len(calls) == 2


def test_unrecordable_network_is_exported_each_time(alike, calls, monkeypatch):
    def refuse(*args):
        raise RuntimeError("the forward fails under a recorder")

    canonical, expected, _ = alike
    monkeypatch.setattr(floats, "graph_digest", refuse)
    for count in (1, 2):
        assert contents(canonical, inputs((6,))) == expected and len(calls) == count


def test_unexportable_network_is_rejected_each_time(calls, tmp_path):
    network, batch = Bessel().eval(), inputs((4,), 4)
    for count in (1, 2):
        with pytest.raises(UnsupportedModel, match="bessel_j0"):
            floats.float_graph(network, batch, batch, ("layer",), (), Cache(tmp_path))
        assert len(calls) == count and not entries(tmp_path)


# Where it is stored


def resealed(change):
    """Change an entry and write it with a matching digest."""

    def written(path):
        (record, tensors), name = change, graphs.NAME
        path.write_bytes(_serialized(name, Entry(record, tensors)))

    return written


WHOLE = {"inputs": 1, "initializers": [], "names": 0}
DAMAGES = {
    "a byte": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"),
    "half": lambda path: path.write_bytes(path.read_bytes()[:1000]),
    "nothing": lambda path: path.write_bytes(b""),
    "no record": resealed((None, {"graph": torch.zeros(3, dtype=torch.uint8)})),
    "no graph": resealed((WHOLE, {})),
    "no protobuf": resealed((WHOLE, {"graph": torch.full((9,), 255, dtype=torch.uint8)})),
    "an empty graph": resealed((WHOLE | {"initializers": ["head.weight"]}, {"graph": torch.zeros(0, dtype=torch.uint8)})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_graph_is_reported_and_exported_again(damage, alike, calls):
    canonical, expected, folder = alike
    (entry,) = entries(folder)
    DAMAGES[damage](entry.path)
    with pytest.warns(UserWarning, match="damaged"):
        assert contents(canonical, inputs((6,)), Cache(folder)) == expected
    assert len(calls) == 1
    graphs._recent.clear()
    assert contents(canonical, inputs((6,)), Cache(folder)) == expected and len(calls) == 1


def test_unwritable_cache_costs_a_warning(alike, tmp_path):
    canonical, expected, _ = alike
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match="cannot be written to"):
        assert contents(canonical, inputs((6,)), Cache(tmp_path / "file")) == expected


def test_cache_stores_no_weights(tmp_path):
    torch.manual_seed(0)
    batch = Batch(torch.randn(4, 64))
    network = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64))
    contents(canonical_of(network, batch, lambda layer: Precision(4, 8)), batch, Cache(tmp_path))
    (entry,) = entries(tmp_path)
    assert entry.bytes < 20_000 < sum(tensor.nbytes for tensor in network.state_dict().values())


def test_memory_holds_only_the_most_recent_graphs(calls, monkeypatch):
    monkeypatch.setattr(graphs, "RECENT", 2)
    networks = [drawn(lambda width=width: nn.Sequential(nn.Linear(4, width), nn.ReLU()), (4,), 0) for width in (3, 4, 5)]
    for index, count in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):
        contents(networks[index], inputs((4,)))
        assert len(calls) == count and len(graphs._recent) <= 2


# The verbs

ELSEWHERE = """
import sys, warnings
import torch
from networks import Residual, make, images
import anybit

def refuse(*args, **settings):
    raise AssertionError("the exporter is called")

torch.onnx.export = refuse
model, data = make(Residual), images(40)
assert anybit.verify(sys.argv[1], sys.argv[2], model=model, data=data)["ok"]
anybit.bench(sys.argv[1], sys.argv[2], model=model, data=data, rounds=1)
anybit.bench(sys.argv[1], model=model, data=data, rounds=1, batch_size=40)
anybit.export(sys.argv[1], sys.argv[3], model=model, data=data[:7])
"""


def test_export_verify_and_bench_call_the_exporter_once_across_processes(run_folder, calibrated, tmp_path, calls):
    model, data, _ = calibrated
    file, again = tmp_path / "net.onnx", tmp_path / "again.onnx"
    anybit.export(run_folder, file, model=model, data=data)
    assert anybit.verify(run_folder, file, model=model, data=data)["ok"]
    anybit.bench(run_folder, file, model=model, data=data, rounds=1)
    assert len(calls) == 1
    command = [sys.executable, "-c", ELSEWHERE, run_folder, file, again]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr


def test_custom_cache_folder_and_no_cache(run_folder, calibrated, tmp_path, calls):
    model, data, _ = calibrated
    options = {"model": model, "data": data, "overwrite": True}
    anybit.export(run_folder, tmp_path / "net.onnx", cache=False, **options)
    before = (tmp_path / "net.onnx").read_bytes()
    assert not entries(results_folder())
    anybit.export(run_folder, tmp_path / "net.onnx", cache=tmp_path / "kept", **options)
    assert len(entries(tmp_path / "kept")) == 1 and not entries(results_folder())
    assert len(calls) == 1 and (tmp_path / "net.onnx").read_bytes() == before
