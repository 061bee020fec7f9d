"""An exported file is as small as its bits, runs on integer kernels, and computes the same as the integer reference."""

import dataclasses
import functools
import importlib.util
import json
import random
import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from exported import EXACT, Activated, canonical_of, inputs, random_precision
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Bessel, Odd, make, tokens
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from torch import nn

import anybit
from anybit.data.batches import Batch, call, evaluating
from anybit.errors import InvalidFile, InvalidSetting, UnsupportedModel
from anybit.files.strict import sha256_of, write_json
from anybit.networks.canonical import Canonical
from anybit.networks.edges import LARGEST_BIAS
from anybit.networks.layers import fill, quantized_layers
from anybit.networks.matmul import Matmul
from anybit.networks.rounding import edge_grids, round_edges
from anybit.numerics.quantizers import UniformQuantizer
from anybit.onnx import floats
from anybit.onnx.file import EXACT_SUMS, exported, ideal_bytes, load, measured_in, outputs, save, session
from anybit.onnx.floats import input_tensors
from anybit.onnx.interpreter import interpret
from anybit.onnx.plan import Affine
from anybit.onnx.storage import PLANES, field_table, pack_fields, stored
from anybit.onnx.verification import (
    Verdict,
    check_simulation,
    flipped_codes,
    lacks_exact_kernels,
    lacks_vnni,
    saturating,
    simulated_codes,
    verify_file,
)
from anybit.onnx.writer import _Writer, with_room
from anybit.runs.scheme_file import read_scheme
from anybit.scheme import Precision

exactly = pytest.mark.skipif(lacks_exact_kernels() is not None, reason=f"bitwise equality: {lacks_exact_kernels()}")


@functools.cache
def canonical_and_graphs(name, seed=0, precision=None, tables=True):
    """(canonical model, its graphs, inputs) of one of EXACT at a mixed scheme or one precision; read only."""
    network, shape = EXACT[name]
    torch.manual_seed(seed)
    draw = random.Random(seed)
    batch = inputs(shape)
    canonical = canonical_of(network(), batch, lambda layer: precision or random_precision(draw))
    return canonical, exported(canonical, batch, tables=tables), inputs(shape, 24, seed=7)


def runtime_outputs(graph, batch):
    return outputs(session(graph), [batch])


# Storage


class _Emitted:
    """A graph that consists of unpacking operators."""

    def __init__(self):
        self.nodes, self.constants = [], {}

    def emit(self, kind, inputs, attributes, name):
        node = ir.node(kind, inputs, attributes)
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, name, array):
        if name not in self.constants:
            held = ir.tensor(array, name=name)
            self.constants[name] = ir.Value(name=name, shape=held.shape, type=ir.TensorType(held.dtype), const_value=held)
        return self.constants[name]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([0, 2, 3, 4, 5, 6, 7, 8]), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(0, 2**16))
def test_stored_codes_unpack_exactly(bits, shape, seed):
    half = 2 ** (bits - 1) if bits else 0
    codes = np.random.default_rng(seed).integers(-half, max(half, 1), shape).astype(np.int8)
    emitted = _Emitted()
    value = stored("layer", codes, bits, emitted.emit, emitted.constant)
    identity = ir.node("Identity", [value])
    identity.outputs[0].name, identity.outputs[0].type = "codes", ir.TensorType(ir.DataType.INT8)
    graph = ir.Graph(
        [], identity.outputs, nodes=[*emitted.nodes, identity], initializers=list(emitted.constants.values()), opset_imports={"": 21}
    )
    (there,) = session(ir.Model(graph, ir_version=10)).run(None, {})
    assert there.dtype == np.int8 and np.array_equal(there, codes)
    assert np.array_equal(interpret(ir.Model(graph, ir_version=10), {}).constants["codes"].numpy(), codes)
    packed = sum(value.const_value.nbytes for name, value in emitted.constants.items() if name.startswith("layer.packed"))
    assert packed <= -(-codes.size // 8) * bits if bits in PLANES else packed <= codes.size


def test_unpacking_table_covers_every_field_of_every_byte():
    for width, shift, signed in [(1, 2, True), (2, 0, False), (2, 4, True), (4, 0, False)]:
        fields = np.random.default_rng(0).integers(0, 2**width, 64).astype(np.uint8)
        worth = field_table(width, shift, signed)[pack_fields(fields, width)].reshape(-1).astype(int)
        expected = fields.astype(int) - (2**width * (fields >= 2 ** (width - 1)) if signed else 0)
        assert (worth == expected << shift).all()


# The numbers


@exactly
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", EXACT)
def test_runtime_equals_the_integer_reference(name, seed, tmp_path):
    canonical, graphs, batch = canonical_and_graphs(name, seed)
    feeds = dict(zip([value.name for value in graphs.integer.graph.inputs], input_tensors(batch), strict=True))
    reference = interpret(graphs.integer, feeds)
    if name == "mixed":  # its norm and its mean over tokens are float sums, which differ between libraries
        verdict = verdict_of(canonical, graphs, batch, tmp_path)
        assert reference.in_float and not verdict.failures and verdict.numbers.get("codes_apart", 0) <= 1
        return
    assert not reference.in_float
    for value, there in zip(graphs.integer.graph.outputs, runtime_outputs(graphs.integer, batch), strict=True):
        assert np.array_equal(there, reference.values[value.name].numpy())


@exactly
@pytest.mark.parametrize("precision", [Precision(8, 8), Precision(7, 8), Precision(8, 7), Precision(2, 8)], ids=str)
@pytest.mark.parametrize("name", ["joined", "mixed"])
def test_saturating_layers_are_named_and_summed_exactly(name, precision, tmp_path):
    """Two products of 8-bit codes can exceed 16 bits, the accumulator of some processors unless a session asks for a wider one."""
    canonical, graphs, batch = canonical_and_graphs(name, precision=precision)
    save(graphs.integer, tmp_path / "net.onnx")
    file = load(tmp_path / "net.onnx")
    verdict = verify_file(tmp_path / "net.onnx", file, graphs, canonical.model, batch)
    assert not verdict.failures and not verdict.skipped
    assert set(verdict.saturating) == (set(canonical.scheme) if precision == Precision(8, 8) else set())
    assert (EXACT_SUMS[0] in verdict.advice) == bool(verdict.saturating)


@pytest.mark.skipif(not lacks_vnni(), reason="this processor sums 8-bit products exactly, whatever a session asks for")
def test_inexact_sessions_saturate_only_in_the_named_layers():
    exact_by_precision = {}
    for precision in (Precision(8, 8), Precision(7, 8), Precision(8, 7)):
        canonical, graphs, batch = canonical_and_graphs("asymmetric", precision=precision)
        exact, plain = (outputs(session(graphs.integer, exact=options), [batch]) for options in (True, False))
        exact_by_precision[precision] = np.array_equal(exact[0], plain[0])
        assert exact_by_precision[precision] == (not saturating(canonical.model, graphs.plan))
    assert not exact_by_precision[Precision(8, 8)]


@pytest.mark.parametrize("name", EXACT)
def test_file_has_no_unused_nodes(name):
    _, graphs, _ = canonical_and_graphs(name)
    for node in graphs.integer.graph:
        assert any(value.uses() or value.is_graph_output() for value in node.outputs), node.op_type


@pytest.mark.parametrize("name", EXACT)
def test_8_bit_file_is_close_to_the_simulation(name):
    canonical, graphs, batch = canonical_and_graphs(name, precision=Precision(8, 8))
    with evaluating(canonical.model), torch.no_grad():
        simulated = call(canonical.model, batch.inputs)
    for ours, there in zip(
        simulated if isinstance(simulated, tuple) else (simulated,), runtime_outputs(graphs.integer, batch), strict=True
    ):
        assert torch.from_numpy(there).sub(ours).norm() < 0.05 * ours.norm()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("tables", [False, True])
def test_every_code_of_the_file_is_within_one_of_the_simulation(name, seed, tables):
    """At any bits: each operator of the file is given the simulation's codes and must reproduce its output."""
    canonical, _, batch = canonical_and_graphs(name, seed)
    graphs = exported(canonical, batch, tables=tables)
    verdict = Verdict()
    check_simulation(verdict, graphs, batch)
    assert not verdict.failures
    assert set(edge_grids(graphs.model)) == set(graphs.edges)
    assert verdict.numbers["simulation"]["codes"] > 0
    assert verdict.numbers["simulation"]["differ"] < 0.005 * verdict.numbers["simulation"]["codes"]


@pytest.mark.parametrize(("bias", "most"), [(False, 1e-4), (True, 0.03)])
def test_codes_without_shared_tensors_equal_the_simulation(bias, most):
    """A chain has no edges: the file's quantizers are the layers' own. Codes differ where float sums round otherwise, and where an int32
    bias does, which counts in units of input scale times weight scale."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=bias), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4, bias=bias), nn.ReLU6(), nn.Flatten()]
    batch = inputs((3, 12, 12))
    canonical = canonical_of(nn.Sequential(*layers, nn.Linear(512, 4, bias=bias)), batch, lambda layer: Precision(5, 6))
    flipped = flipped_codes(exported(canonical, batch), batch)
    assert set(flipped) == {"0", "2", "5"} and max(flipped.values()) < most


def test_reports_final_pool_that_is_summed_in_float():
    torch.manual_seed(0)
    pooled = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    batch = inputs((3, 12, 12))
    graphs = exported(canonical_of(pooled, batch, lambda layer: Precision(8, 8)), batch)
    reference = interpret(graphs.integer, {graphs.integer.graph.inputs[0].name: batch.inputs})
    assert len(reference.in_float) == 1
    assert np.allclose(
        runtime_outputs(graphs.integer, batch)[0],
        reference.values[graphs.integer.graph.outputs[0].name].numpy(),
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", ["relu", "silu", "joined", "mixed"])
def test_every_quantized_layer_has_an_integer_kernel(name, tmp_path):
    canonical, graphs, batch = canonical_and_graphs(name)
    save(graphs.integer, tmp_path / "net.onnx")
    verdict = verify_file(tmp_path / "net.onnx", load(tmp_path / "net.onnx"), graphs, canonical.model, batch)
    assert not verdict.failures and set(verdict.kernels) == set(canonical.scheme) and not verdict.floats


def test_float_layers_are_named_with_a_reason(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.up, self.free, self.whole, self.last = (
                nn.Embedding(9, 4), nn.ConvTranspose1d(4, 4, 2, stride=2), nn.Conv1d(4, 6, 3), nn.Conv1d(6, 6, 3), nn.Linear(6, 3)
            )  # fmt: skip

        def forward(self, words):
            h = F.relu(self.up(self.words(words).transpose(1, 2)))
            return self.last(F.relu(self.whole(F.relu(self.free(h)))).mean(2))

    precisions = {"words": "W3", "up": "W4A8", "free": "W3", "whole": "float", "last": "W0A8"}
    batch = anybit.data.batches.Batch(torch.randint(9, (12, 8), generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(0)
    canonical = canonical_of(Net(), batch, lambda layer: Precision.parse(precisions[layer]))
    graphs = exported(canonical, batch)
    save(graphs.integer, tmp_path / "net.onnx")
    verdict = verify_file(tmp_path / "net.onnx", load(tmp_path / "net.onnx"), graphs, canonical.model, batch)
    assert set(verdict.floats) == {"words", "up", "free", "whole"} and not verdict.failures
    for layer, reason in {"words": "embedding", "up": "ConvTranspose", "free": "activations", "whole": "weights"}.items():
        assert reason in verdict.floats[layer]
    with torch.no_grad():
        simulated = canonical.model(batch.inputs)
    (there,) = runtime_outputs(graphs.integer, batch)
    assert np.allclose(there, simulated.numpy(), atol=1e-5)


def test_layer_kept_float_between_integer_ones_stays_float(tmp_path):
    """By default the runtime rounds the weights of a float layer between quantizers to 8 bits."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(288, 16), nn.ReLU()]
    batch = inputs((3, 12, 12))
    canonical = canonical_of(nn.Sequential(*layers, nn.Linear(16, 4)), batch, lambda n: Precision.parse("float" if n in "26" else "W8A8"))
    graphs = exported(canonical, batch)
    save(graphs.integer, tmp_path / "net.onnx")
    verdict = verify_file(tmp_path / "net.onnx", load(tmp_path / "net.onnx"), graphs, canonical.model, batch)
    assert set(verdict.floats) == {"2", "6"} and set(verdict.kernels) == {"0", "4", "8"} and not verdict.failures


@pytest.mark.parametrize("between", [[], [nn.ReLU()], [nn.ReLU6()]], ids=["", "relu", "relu6"])
def test_pool_after_a_float_layer_is_rounded_after_pooling(between, tmp_path, monkeypatch):
    """The numbers are the same: the runtime computes the maximum of floats fast, that of codes in their float layout slowly."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), *between, nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)]
    batch = inputs((3, 16, 16))
    canonical = canonical_of(nn.Sequential(*layers), batch, lambda name: Precision.parse("float" if name == "0" else "W8A4"))
    graphs = exported(canonical, batch)
    save(graphs.integer, tmp_path / "net.onnx")
    session(tmp_path / "net.onnx", optimized=tmp_path / "optimized.onnx")
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    pooled = {name for node in nodes if node.op_type == "MaxPool" for name in node.input}
    assert pooled and not any(node.op_type in ("QuantizeLinear", "Clip") for node in nodes if pooled & set(node.output))
    verdict = verify_file(tmp_path / "net.onnx", load(tmp_path / "net.onnx"), graphs, canonical.model, batch)
    assert not verdict.failures
    monkeypatch.setattr(_Writer, "_pooled", lambda self, node, affine: self._as_codes(node.outputs[0].name, on_codes(self, node), affine))
    assert np.array_equal(runtime_outputs(exported(canonical, batch).integer, batch), runtime_outputs(graphs.integer, batch))


def on_codes(writer, node):
    return writer.emit("MaxPool", [writer.codes[node.inputs[0].name]], node.attributes, node.name)


def test_weight_only_file_equals_the_simulation():
    canonical, graphs, batch = canonical_and_graphs("relu", precision=Precision(3, None))
    with torch.no_grad():
        simulated = canonical.model(batch.inputs)
    assert not any(node.op_type == "QuantizeLinear" for node in graphs.integer.graph)
    assert np.allclose(runtime_outputs(graphs.integer, batch)[0], simulated.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_weight_only_linears_run_on_packed_weights(bits, tmp_path):
    torch.manual_seed(0)
    batch = inputs((64,))
    network = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32), nn.GELU(), nn.Linear(32, 8))
    canonical = canonical_of(network, batch, lambda layer: Precision(bits, None))
    graphs = exported(canonical, batch, weight_only=True)
    save(graphs.integer, tmp_path / "net.onnx")
    verdict = verify_file(tmp_path / "net.onnx", load(tmp_path / "net.onnx"), graphs, canonical.model, batch)
    assert not verdict.failures and all("MatMulNBits" in reason for reason in verdict.floats.values()) and len(verdict.floats) == 3
    with torch.no_grad():
        simulated = canonical.model(batch.inputs)
    assert torch.from_numpy(runtime_outputs(graphs.integer, batch)[0]).sub(simulated).norm() < 0.03 * simulated.norm()


def test_batch_size_is_dynamic():
    _, graphs, batch = canonical_and_graphs("joined")
    running = session(graphs.integer)
    whole = outputs(running, [batch])
    single = [running.run(None, {"x": batch.inputs[i : i + 1].numpy()}) for i in range(3)]
    for index, array in enumerate(whole):
        assert np.array_equal(array[:3], np.concatenate([piece[index] for piece in single]))


@exactly
@pytest.mark.parametrize("name", ["silu", "gelu", "hardswish", "mixed", "gated"])
def test_float_functions_are_within_one_code_of_the_reference(name, tmp_path):
    canonical, graphs, batch = canonical_and_graphs(name, tables=False)
    save(graphs.integer, tmp_path / "net.onnx")
    verdict = verify_file(tmp_path / "net.onnx", load(tmp_path / "net.onnx"), graphs, canonical.model, batch)
    assert not verdict.failures and verdict.numbers["in_float"] and set(verdict.kernels) == set(canonical.scheme)


# Size


def test_file_size_falls_with_bits():
    class Wide(nn.Sequential):
        def __init__(self):
            super().__init__(
                nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Conv2d(128, 128, 3), nn.Flatten(), nn.Linear(128, 9)
            )

    batch = inputs((3, 7, 7))
    for bits in range(2, 9):
        canonical = canonical_of(Wide(), batch, lambda layer, bits=bits: Precision(bits, 8))
        content = ir.to_proto(exported(canonical, batch).integer).SerializeToString()
        assert ideal_bytes(canonical) < len(content) < ideal_bytes(canonical) + 16_000, bits


# Corners


def test_bias_beyond_int32_coarsens_the_weight_scale():
    codes, scale = torch.tensor([[100, -50], [3, 4]], dtype=torch.int8), np.array([1e-9, 0.1], np.float32)
    coarser, wider = with_room(codes, scale, np.array([50.0, 1.0]), 8)
    assert 50 / wider[0] <= LARGEST_BIAS * 1.001 and wider[1] == scale[1]
    assert coarser[1].tolist() == [3, 4] and coarser[0].abs().max() < 100


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_edge_covers_its_range_and_represents_zero_exactly(a, b):
    low, high = sorted((a, b))
    affine = Affine.of_range(low, high)
    assert affine.scale > 0 and 0 <= affine.zero_point <= 255
    for value in (low, 0.0, high):
        stands_for = (affine.code(value) - affine.zero_point) * affine.scale
        assert abs(stands_for - value) <= affine.scale * 1.01
    assert affine.code(0.0) == affine.zero_point


# The verbs


def test_exports_verifies_and_times_a_run(exported_run):
    run, path, model, data = exported_run
    report = anybit.verify(run, path, model=model, data=data)
    assert report["ok"] and not report["failures"] and report["simulation"]["agreement"] > 80
    assert set(report["kernels"]) | set(report["floats"]) == set(anybit.load(run, model).scheme)
    timed = anybit.bench(run, path, model=model, data=data, rounds=2)
    assert timed["bytes"] == path.stat().st_size < timed["float_bytes"] and timed["onnxruntime"]["faster"]["ratio"] > 0


BESIDE = """
import json, sys
from pathlib import Path
import numpy as np, openvino, torch
from anybit.data.batches import Batch
from anybit.exports.verbs import measured
from anybit.onnx import file as onnx_file
graph, x = onnx_file.load(Path(sys.argv[1])), torch.from_numpy(np.load(sys.argv[2]))
timed = measured(graph, graph, Batch(x), 1)
core, running = openvino.Core(), onnx_file.session(graph)
there = next(iter(core.compile_model(core.read_model(sys.argv[1]), "CPU")([x.numpy()]).values()))
here = running.run(None, {running.get_inputs()[0].name: x.numpy()})[0]
print(json.dumps([timed["openvino"]["faster"]["ratio"], float(np.abs(there - here).max() / np.abs(here).max())]))
"""


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is optional, and not installed")
def test_bench_compares_openvino_on_the_same_file(exported_run, tmp_path):
    _, path, _, data = exported_run
    np.save(tmp_path / "x.npy", data[:16].numpy())
    command = [sys.executable, "-W", "ignore", "-c", BESIDE, str(path), str(tmp_path / "x.npy")]
    ratio, apart = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    assert ratio > 0 and apart < 0.1


def edited(path, change):
    """The file with `change` applied to the first initializer that it accepts, by its return value."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor).copy()
        if change(tensor.name, array):
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
            onnx.save(model, path)
            return tensor.name
    raise AssertionError("nothing was edited")


def _code(name, array):
    if ".codes" in name or ".packed" in name:
        array.reshape(-1)[0] = array.reshape(-1)[0] ^ array.reshape(-1)[0].__class__(1)
        return True
    return False


def _scale(name, array):
    if name.endswith(".scale"):
        array[0] *= 1.5
        return True
    return False


def _zero_point(name, array):
    if name.startswith("zero_point"):
        array[...] = array + 100 if array < 100 else array - 100  # so much that codes saturate: they share the value at either end
        return True
    return False


@pytest.mark.parametrize("change", [_code, _scale, _zero_point])
def test_verify_names_the_altered_layer(change, exported_run):
    run, path, model, data = exported_run
    name = edited(path, change)
    report = anybit.verify(run, path, model=model, data=data)
    layers = list(anybit.load(run, model).scheme)
    assert len(report["failures"]) > 1  # the stored number, and the runtime's output
    owner = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
    assert not report["ok"] and report["failures"][0].startswith(name)
    assert any((owner or layers[0]) in failure for failure in report["failures"])


def test_verify_names_the_altered_operator(exported_run):
    run, path, model, data = exported_run
    content = onnx.load(path)
    node = next(node for node in content.graph.node if node.op_type == "Conv")
    next(attribute for attribute in node.attribute if attribute.name == "pads").ints[:] = [0, 0, 2, 2]
    onnx.save(content, path)
    report = anybit.verify(run, path, model=model, data=data)
    assert not report["ok"] and node.name in report["failures"][0]


def test_rejects_file_of_another_run(exported_run, tmp_path):
    _, path, model, data = exported_run
    other = anybit.calibrate(model, data, "3bit", samples=40, weight_bits=(2, 4), activation_bits=(8,), pipeline="light").save(
        tmp_path / "b"
    )
    report = anybit.verify(other, path, model=model, data=data)
    assert not report["ok"] and "another run" in report["failures"][0]


@pytest.mark.parametrize("content", [b"", b"not a file", b"\x08\x0a" * 50])
def test_rejects_file_not_written_by_anybit(content, exported_run):
    run, path, model, data = exported_run
    path.write_bytes(content)
    with pytest.raises(InvalidFile, match=r"net\.onnx"):
        anybit.verify(run, path, model=model, data=data)


def test_existing_file_is_replaced_only_on_request(exported_run):
    run, path, model, data = exported_run
    before = path.read_bytes()
    with pytest.raises(InvalidSetting, match="overwrite"):
        anybit.export(run, path, model=model, data=data)
    assert path.read_bytes() == before
    anybit.export(run, path, model=model, data=data, overwrite=True)
    assert path.read_bytes() == before


def test_unexportable_operator_is_named_and_leaves_no_file(tmp_path):
    result = anybit.calibrate(Bessel(), torch.randn(24, 4), samples=24, weight_bits=(8,), activation_bits=(8,), pipeline="light")
    run = result.save(tmp_path / "run")
    with pytest.raises(UnsupportedModel, match="bessel_j0"):
        anybit.export(run, tmp_path / "net.onnx", model=Bessel(), data=torch.randn(4, 4))
    assert [item.name for item in tmp_path.iterdir() if item.name.endswith(".onnx")] == []


def test_error_for_an_older_runtime_names_the_operator_set(monkeypatch, exported_run):
    run, path, model, data = exported_run
    monkeypatch.setattr("anybit.onnx.writer.IR_VERSION", 99)
    with pytest.raises(UnsupportedModel, match="operator set"):
        anybit.export(run, path.with_name("new.onnx"), model=model, data=data)
    assert not path.with_name("new.onnx").exists()


def test_network_is_unchanged():
    canonical, *_ = canonical_and_graphs("relu")
    before = {name: tensor.clone() for name, tensor in canonical.model.state_dict().items()}
    exported(canonical, inputs((3, 12, 12)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in canonical.model.state_dict().items())
    assert all(layer.weight_quantizer is not None for layer in quantized_layers(canonical.model).values())
    assert isinstance(canonical.model, Activated)


# Regressions


def verdict_of(canonical, graphs, batch, folder):
    save(graphs.integer, folder / "net.onnx")
    return verify_file(folder / "net.onnx", load(folder / "net.onnx"), graphs, canonical.model, batch)


@exactly
@pytest.mark.parametrize("width", [8, 6])
def test_a_transposed_operand_is_compared_as_its_operator_reads_it(width, tmp_path):
    """Shapes cannot tell it if there are as many tokens as channels; otherwise its codes were once not compared at all."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.scores, self.last = nn.Linear(width, 3 * width), Matmul(transposed=True), nn.Linear(width, width)

        def forward(self, x):
            query, key, value = self.qkv(x).chunk(3, -1)
            return self.last((20 * self.scores(query, key)).softmax(-1) @ value)

    torch.manual_seed(0)
    batch = inputs((8, width))
    canonical = canonical_of(Attention(), batch, lambda name: Precision.parse("A8" if name in ("scores", "matmul") else "W8A8"))
    verdict = verdict_of(canonical, exported(canonical, batch), batch, tmp_path)
    assert not verdict.failures and verdict.numbers["simulation"]["codes_apart"] <= 1


def odd(function, shape=(3, 8, 8), precision="W8A8", **layers):
    torch.manual_seed(0)
    batch = inputs(shape)
    return canonical_of(Odd(function, **layers).eval(), batch, lambda layer: Precision.parse(precision)), batch


LEFT_OUT = "the file leaves it out: it depends on no input, or no output on it"


def conv(narrow, wide, kernel=3, **more):
    return nn.Conv2d(narrow, wide, kernel, **more)


@pytest.mark.parametrize(
    ("function", "layers", "shape"),
    [
        (
            lambda s, x: sum(f(p) for f, p in zip((s.b, s.c), s.a(x).chunk(2, 1), strict=True)),
            {"a": (3, 8), "b": (4, 4), "c": (4, 4)},
            (3, 8, 8),
        ),
        (lambda s, x: s.b(F.relu(s.a(x.transpose(0, 1)))).transpose(0, 1), {"a": 6, "b": 6}, (5, 6)),
        (lambda s, x: s.b(F.silu(s.a(x).transpose(1, 2)).transpose(1, 2)), {"a": 6, "b": 6}, (5, 6)),
        (lambda s, x: s.b(torch.cat([s.a(x.mean(1, keepdim=True)).expand(-1, 2, -1), x], 1)), {"a": 6, "b": 6}, (5, 6)),
        (lambda s, x: s.relu(F.relu(s.flat(x))), {"flat": (3, 8), "relu": (8, 4)}, (3, 8, 8)),
    ],
    ids=["split", "sequence first", "moved function", "class token", "names of operators"],
)
@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("precision", ["W8A8", "W3A8"])
def test_exports_unusual_graphs(function, layers, shape, tables, precision, tmp_path):
    made_layers = {name: nn.Linear(6, size) if isinstance(size, int) else conv(*size) for name, size in layers.items()}
    canonical, batch = odd(function, shape, precision, **made_layers)
    graphs = exported(canonical, batch, tables=tables)
    verdict = verdict_of(canonical, graphs, batch, tmp_path)
    with torch.no_grad():
        simulated = canonical.model(batch.inputs)
    assert not verdict.failures
    assert torch.from_numpy(runtime_outputs(graphs.integer, batch)[0]).sub(simulated).norm() < 0.05 * simulated.norm()


def test_layers_of_any_name_are_exported(tmp_path):
    names = ["in", "class", "a b", "a'b", 'a"b', "a\nb", "a\\b", "a/b", "\u202eab", "0"]
    canonical, batch = odd(
        lambda s, x: [x := F.relu(s._modules[name](x)) for name in names][-1], (6,), **{n: nn.Linear(6, 6) for n in names}
    )
    graphs = exported(canonical, batch)
    assert not verdict_of(canonical, graphs, batch, tmp_path).failures and set(graphs.plan.integer) == set(names)


@dataclasses.dataclass
class Answer:
    scores: torch.Tensor
    more: object


@pytest.mark.parametrize("more", [None, "a text", 3, {"text": "a", "none": None, "number": 2.0}, {1, 2}], ids=str)
def test_a_file_gives_the_tensors_of_any_output(more, tmp_path):
    canonical, batch = odd(lambda s, x: Answer(s.b(h := F.relu(s.a(x))), [more, h]), (6,), a=nn.Linear(6, 8), b=nn.Linear(8, 4))
    graphs = exported(canonical, batch)
    assert [tuple(out.shape) for out in runtime_outputs(graphs.integer, batch)] == [(len(batch), 4), (len(batch), 8)]
    assert not verdict_of(canonical, graphs, batch, tmp_path).failures


@exactly
@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.AvgPool2d(3, 2, padding=1, ceil_mode=True), 14),
        (nn.AvgPool2d(3, 2, ceil_mode=True), 14),
        (nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, count_include_pad=False), 14),
        (nn.MaxPool2d(3, 2, padding=1, ceil_mode=True), 14),
        (nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1, groups=2), 9),
        (nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1, groups=8), 9),
    ],
    ids=["padded mean", "mean", "mean without padding", "maximum", "grouped transposed", "depthwise transposed"],
)
def test_windows_over_the_border_equal_the_simulation(layer, size, tmp_path):
    canonical, batch = odd(lambda s, x: s.c(s.b(F.relu(s.a(x)))), (3, size, size), a=conv(3, 8), b=layer, c=conv(8, 4, 1))
    graphs = exported(canonical, batch)
    with torch.no_grad():
        simulated = canonical.model(batch.inputs)
    assert not verdict_of(canonical, graphs, batch, tmp_path).failures
    assert torch.from_numpy(runtime_outputs(graphs.integer, batch)[0]).sub(simulated).norm() < 0.02 * simulated.norm()


class Typed(nn.Module):
    """Token types gathered from a buffer longer than the texts, as in BERT and RoBERTa."""

    def __init__(self):
        super().__init__()
        self.words, self.types, self.head = nn.Embedding(30, 16), nn.Embedding(2, 16), nn.Linear(16, 3)
        self.register_buffer("type_ids", torch.zeros(1, 80, dtype=torch.long))

    def forward(self, tokens):
        types = torch.gather(self.type_ids, 1, torch.arange(tokens.shape[1])[None])
        return self.head(torch.tanh(self.words(tokens) + self.types(types.expand(tokens.shape[0], -1))).mean(1))


def test_interprets_operator_without_an_implementation(tmp_path, capfd):
    torch.manual_seed(0)
    batch = Batch(torch.randint(0, 30, (16, 22)))
    canonical = canonical_of(Typed().eval(), batch, lambda layer: Precision.parse("W8" if layer != "head" else "W8A8"))
    verdict = verdict_of(canonical, exported(canonical, batch), batch, tmp_path)
    assert not verdict.failures and not verdict.skipped and capfd.readouterr() == ("", "")


@exactly
def test_clamp_of_floats_is_not_taken_for_one_of_codes(tmp_path):
    canonical, batch = odd(lambda s, x: F.normalize(s.b(F.relu(s.a(x)))), (6,), a=nn.Linear(6, 8), b=nn.Linear(8, 4))
    assert not verdict_of(canonical, exported(canonical, batch), batch, tmp_path).failures


class HeadTwice(nn.Module):
    """One head for two levels, as in detectors."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 8, padding=1), conv(8, 8, stride=2, padding=1)
        self.head = nn.Sequential(conv(8, 8, padding=1), nn.ReLU(), conv(8, 6, 1))

    def forward(self, x):
        p = F.relu(self.a(x))
        return torch.cat([self.head(p).flatten(2), self.head(F.relu(self.b(p))).flatten(2)], 2)


def test_float_layer_that_runs_twice_is_two_nodes(tmp_path):
    model, data = HeadTwice().eval(), torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = {"weight_bits": (8,), "activation_bits": (8,), "pipeline": "light", "keep": {"head.0": "float", "head.2": "float"}}
    anybit.calibrate(model, data, **settings).save(tmp_path / "run")
    anybit.export(tmp_path / "run", tmp_path / "net.onnx", model=model, data=data)
    names = [node.name for node in load(tmp_path / "net.onnx").graph]
    assert {"head.0", "head.0#2", "head.2", "head.2#2"} <= set(names)
    assert anybit.verify(tmp_path / "run", tmp_path / "net.onnx", model=model, data=data)["ok"]


@pytest.mark.parametrize(
    ("function", "layers"),
    [
        (lambda s, x: s.b(F.relu(s.a(x)).permute(0, 3, 1, 2).flatten(2)).transpose(0, 1).transpose(0, 1), {"a": (3, 8), "b": 48}),
        (lambda s, x: (lambda y: (y, y, F.relu(y), x))(s.b(F.relu(s.a(x)))), {"a": (3, 8), "b": (8, 4)}),
        (lambda s, x: s.conv2d(F.relu(s.conv2d_1(x))).transpose(2, 3), {"conv2d": (8, 4), "conv2d_1": (3, 8)}),
    ],
    ids=["transposed", "returned twice", "layers named as values"],
)
def test_names_in_a_file_are_unique(function, layers, tmp_path):
    made_layers = {name: nn.Linear(size, 7) if isinstance(size, int) else conv(*size) for name, size in layers.items()}
    canonical, batch = odd(function, **made_layers)
    assert not verdict_of(canonical, exported(canonical, batch), batch, tmp_path).failures


@exactly
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("precision", ["W8A8", "W4A4"])
def test_convolution_padded_with_its_input_computes_on_integers(mode, precision, tmp_path):
    layers = {"a": conv(3, 8, padding=1, padding_mode=mode), "b": conv(8, 3, padding=2, dilation=2, stride=2, padding_mode=mode)}
    canonical, batch = odd(lambda s, x: s.b(F.relu(s.a(x))), precision=precision, **layers)
    graphs = exported(canonical, batch)
    verdict = verdict_of(canonical, graphs, batch, tmp_path)
    assert not verdict.failures and set(verdict.kernels) == {"a", "b"}
    with torch.no_grad():
        simulated = canonical.model(batch.inputs)
    assert torch.from_numpy(runtime_outputs(graphs.integer, batch)[0]).sub(simulated).norm() < 0.05 * simulated.norm()


def test_layer_on_constants_is_computed_once(tmp_path):
    def function(s, x):
        places = torch.arange(6, dtype=torch.float32)[None] / 6
        return s.b(torch.sin(s.a(x)) + torch.sin(s.of_places(places)))

    canonical, batch = odd(function, (6,), a=nn.Linear(6, 8), of_places=nn.Linear(6, 8), b=nn.Linear(8, 4))
    verdict = verdict_of(canonical, exported(canonical, batch), batch, tmp_path)
    assert not verdict.failures and verdict.floats["of_places"] == LEFT_OUT


class Biased(nn.Module):
    """Attention whose bias is computed from a table of positions, as in Swin v2."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.of_places, self.last = (
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)),
            nn.Linear(6, 3),
        )
        self.register_buffer("places", 8 * torch.randn(25, 2))
        nn.init.normal_(self.of_places[0].weight)

    def forward(self, x):
        bias = 8 * torch.sigmoid(self.of_places(self.places)).view(5, 5)
        return self.last((torch.softmax(self.q(x) @ self.k(x).mT + bias, -1) @ x).mean(1))


def test_inputs_of_constant_layers_are_not_rounded(tmp_path):
    """The file computes these layers once, in float."""
    torch.manual_seed(0)
    model, data = Biased().eval(), torch.randn(24, 5, 6)
    result = anybit.calibrate(
        model, data, weight_bits=(8,), activation_bits=(8,), pipeline="light", cache=False, keep={"of_places.*": "W8A8"}
    )
    assert {str(result.scheme[name]) for name in ("of_places.0", "of_places.2")} == {"W8"} and str(result.scheme["last"]) == "W8A8"
    result.export(tmp_path / "net.onnx", data=data)
    assert not result.verify(tmp_path / "net.onnx", data=data)["failures"]


def test_layer_that_no_output_depends_on_is_left_out(tmp_path):
    def function(s, x):
        h = F.relu(s.a(x))
        torch.tanh(s.pooler(h))
        return s.b(h)

    canonical, batch = odd(function, (6,), a=nn.Linear(6, 8), pooler=nn.Linear(8, 8), b=nn.Linear(8, 4))
    verdict = verdict_of(canonical, exported(canonical, batch), batch, tmp_path)
    assert not verdict.failures and verdict.floats["pooler"] == LEFT_OUT and set(verdict.kernels) == {"a", "b"}


class Positions(nn.Embedding):
    """Looks up positions from 2 on; of the tokens, it uses only their number."""

    def __init__(self, of_the_tokens):
        super().__init__(12, 6)
        self.of_the_tokens = of_the_tokens

    def forward(self, tokens):
        places = tokens if self.of_the_tokens else torch.arange(tokens.shape[1])
        return super().forward(places + 2)


@pytest.mark.parametrize(("of_the_tokens", "reason"), [(True, "an embedding looks rows up"), (False, LEFT_OUT)])
def test_embedding_may_compute_its_indices(of_the_tokens, reason, tmp_path):
    torch.manual_seed(0)
    batch = anybit.data.batches.Batch(torch.randint(9, (12, 6)))
    layers = {"words": nn.Embedding(9, 6), "places": Positions(of_the_tokens), "b": nn.Linear(6, 4)}
    model = Odd(lambda s, x: s.b(F.relu(s.words(x) + s.places(x))), **layers)
    canonical = canonical_of(model, batch, lambda layer: Precision(8, 8 if layer == "b" else None))
    verdict = verdict_of(canonical, exported(canonical, batch), batch, tmp_path)
    assert not verdict.failures and verdict.floats["places"] == reason


@pytest.mark.parametrize(
    "branches", [lambda a, b: a + b + 0, lambda a, b: 0 + a + b, lambda a, b: sum([a, b])], ids=["last", "first", "sum"]
)
def test_a_sum_with_zero_is_no_edge_of_its_own(branches, tmp_path):
    """The exporter leaves it out, and the sum before it is clamped at once."""

    def function(s, x):
        h = F.relu(branches(s.a(x), s.b(x)))
        return s.d(F.relu(s.c(h) + h))

    canonical, batch = odd(function, a=conv(3, 8), b=conv(3, 8), c=nn.Conv2d(8, 8, 3, padding=1), d=conv(8, 4))
    verdict = verdict_of(canonical, exported(canonical, batch), batch, tmp_path)
    assert not verdict.failures and verdict.numbers["simulation"]["codes_apart"] <= 1


def test_a_layer_may_have_the_names_that_the_runtime_makes(tmp_path):
    canonical, batch = odd(lambda s, x: s.last(F.relu(s.only_token_0(x))), (6,), only_token_0=nn.Linear(6, 8), last=nn.Linear(8, 4))
    verdict = verdict_of(canonical, exported(canonical, batch), batch, tmp_path)
    assert not verdict.failures and set(verdict.kernels) == {"only_token_0", "last"}


def test_layers_where_autocast_is_turned_off_are_found_in_the_graph(tmp_path):
    """Linear attention divides in float32, whatever surrounds it."""

    def function(s, x):
        with torch.autocast("cpu", enabled=False):
            return s.b(F.relu(s.a(x.float())))

    canonical, batch = odd(function, (6,), a=nn.Linear(6, 8), b=nn.Linear(8, 4))
    verdict = verdict_of(canonical, exported(canonical, batch), batch, tmp_path)
    assert not verdict.failures and set(verdict.kernels) == {"a", "b"}


class Doubled(nn.Embedding):
    def forward(self, x):
        return F.embedding(x, self.weight * x.float().mean())


class Dynamic(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - x.mean(), self.bias)


class Scaled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x * 2)


@pytest.mark.parametrize("cls", [Dynamic, Scaled])
def test_rejects_layer_whose_forward_is_more_than_its_operator(cls):
    canonical, batch = odd(lambda s, x: s.odd(x), odd=cls(3, 4, 3))
    with pytest.raises(UnsupportedModel, match=rf"odd: the forward of .*{cls.__name__}"):
        exported(canonical, batch)


def test_rejects_embedding_of_another_table():
    torch.manual_seed(0)
    batch = anybit.data.batches.Batch(torch.randint(9, (12, 6)))
    canonical = canonical_of(Odd(lambda s, x: s.b(s.odd(x)), odd=Doubled(9, 6), b=nn.Linear(6, 4)), batch, lambda layer: Precision(8))
    with pytest.raises(UnsupportedModel, match=r"odd: the forward of .*Doubled"):
        exported(canonical, batch)


def test_detects_arguments_that_the_exporter_drops():
    canonical, batch = odd(lambda s, x: s.b(F.avg_pool2d(s.a(x), 2, 2, divisor_override=3)), a=conv(3, 8), b=conv(8, 4, 1))
    with pytest.raises(UnsupportedModel, match="exporter changes the network"):
        exported(canonical, batch)


def lively_norm(channels):
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    return norm


@pytest.mark.parametrize("precision", ["W8A8", "float"])
def test_exports_convolution_with_unfolded_norm(precision, tmp_path):
    torch.manual_seed(0)
    norms = {"norm": lively_norm(8), "twice": lively_norm(8)}
    canonical, batch = odd(
        lambda s, x: s.c(s.twice(s.b(s.twice(F.relu(sum((s.norm(y := s.a(x)), y)))))).relu()),
        precision=precision, a=conv(3, 8), b=conv(8, 8), c=conv(8, 4), **norms,
    )  # fmt: skip
    assert not canonical.folded and "a" in canonical.edges
    graphs = exported(canonical, batch)
    verdict = verdict_of(canonical, graphs, batch, tmp_path)
    with torch.no_grad():
        simulated = canonical.model(batch.inputs)
    assert not verdict.failures and bool(graphs.plan.integer) == (precision != "float")
    assert torch.from_numpy(runtime_outputs(graphs.integer, batch)[0]).sub(simulated).norm() < 0.05 * simulated.norm()


def pyramid(net, x):
    """A head on two sizes of images, and a linear on its own output."""
    large = F.relu(net.a(x))
    levels = [F.relu(net.head(level)).flatten(2) for level in (large, F.relu(net.b(large)))]
    return torch.cat(levels, 2).mean(2) + net.m(net.m(x.mean((2, 3))))


@pytest.mark.parametrize("precision", ["W8A8", "W3A8", "W4A4", "float"])
def test_exports_layers_that_run_several_times(precision, tmp_path):
    layers = {"a": conv(3, 8, padding=1), "b": conv(8, 8, stride=2), "head": conv(8, 3), "m": nn.Linear(3, 3)}
    canonical, batch = odd(pyramid, precision=precision, **layers)
    graphs = exported(canonical, batch)
    verdict = verdict_of(canonical, graphs, batch, tmp_path)
    with torch.no_grad():
        simulated = canonical.model(batch.inputs)
    assert not verdict.failures and ("head" in verdict.kernels) == (precision != "float")
    names = [node.name for node in graphs.integer.graph if node.name]
    assert len(set(names)) == len(names) and {"head", "head#2", "m", "m#2"} <= set(names)
    assert (
        sum(name.startswith("head.") and "packed" in name for name in graphs.integer.graph.initializers) <= 2
    )  # its weight is stored once
    assert torch.from_numpy(runtime_outputs(graphs.integer, batch)[0]).sub(simulated).norm() < 0.05 * simulated.norm()


def two_heads(net, x):
    """Two layers that read the same images of two sizes, each with its own grid for both."""
    large = F.relu(net.a(x))
    levels = [F.relu(net.tower(level)) for level in (large, 3 * F.relu(net.b(large)))]
    return [head(level) for level in levels for head in (net.p, net.q)]


@exactly
def test_edge_that_layers_round_again_to_8_bits_keeps_its_codes(tmp_path):
    layers = {"a": conv(3, 8, padding=1), "b": conv(8, 8, stride=2), "tower": conv(8, 8), "p": conv(8, 3, 1), "q": conv(8, 2, 1)}
    canonical, batch = odd(two_heads, precision="W8A8", **layers)
    verdict = verdict_of(canonical, exported(canonical, batch), batch, tmp_path)
    assert not verdict.failures and verdict.numbers["bitwise"] and set(verdict.kernels) == set(layers)


@exactly
@pytest.mark.parametrize("activation", [F.relu, F.relu6, F.hardtanh, torch.tanh, F.leaky_relu, torch.sigmoid])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_integer_before_an_activation_with_a_float_reader(activation, bias, tmp_path):
    layers = {"a": nn.Linear(6, 8, bias=bias), "b": nn.Linear(8, 4)}
    canonical, batch = odd(lambda s, x: s.b(F.softmax(activation(s.a(x)), -1)), (6,), **layers)
    verdict = verdict_of(canonical, exported(canonical, batch), batch, tmp_path)
    assert not verdict.failures and set(verdict.kernels) == {"a", "b"}


class AnyArguments(nn.Module):
    """A forward whose input has no parameter name."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, *args, **kwargs):
        return self.b(F.relu(self.a(*args)))


def test_exports_forward_with_variable_arguments():
    torch.manual_seed(0)
    batch = inputs((6,))
    canonical = canonical_of(AnyArguments().eval(), batch, lambda layer: Precision.parse("W4A8"))
    graphs = exported(canonical, batch)
    more = inputs((6,), 3)
    (args,) = runtime_outputs(graphs.integer, more)
    with torch.no_grad():
        assert np.abs(args - canonical.model(more.inputs).numpy()).max() < 0.05


def test_rejects_fixed_batch_size():
    canonical, batch = odd(lambda s, x: s.a(x).reshape(len(x), -1), a=conv(3, 4))
    with pytest.raises(UnsupportedModel, match="size of the batch"):
        exported(canonical, batch)


class Deciding(nn.Module):
    """A forward that looks at the numbers before it goes on."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 4)

    def forward(self, x):
        if (x > 0).any():
            x = 2 * x
        return self.a(x)


def test_branch_on_data_is_refused_by_its_line():
    canonical = canonical_of(Deciding().eval(), inputs((6,)), lambda layer: Precision(8, 8))
    with pytest.raises(
        UnsupportedModel, match=r"numbers in a tensor .* line \d+ of test_onnx\.py: if \(x > 0\)\.any\(\):\. .*torch\.where"
    ):
        exported(canonical, inputs((6,)))


class Masked(nn.Module):
    """A float number minus an integer mask."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 4)

    def forward(self, x, mask):
        return self.a(x * (1.0 - mask))


def test_integer_mask_subtracted_from_a_number_is_exported():
    batch = Batch((inputs((6,)).inputs, torch.randint(2, (16, 6))))
    canonical = canonical_of(Masked().eval(), batch, lambda layer: Precision(8, 8))
    with torch.no_grad():
        simulated = call(canonical.model, batch.inputs)
    assert torch.from_numpy(runtime_outputs(exported(canonical, batch).integer, batch)[0]).sub(simulated).norm() < 0.05 * simulated.norm()


class Counted(nn.Module):
    """A forward that takes the size of the batch by `len`."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 4), nn.Linear(4 * 36, 5)

    def forward(self, x):
        h = F.relu(self.a(x))
        return self.b(h.reshape(len(h), -1)).tile([len(h) // len(x), 1])


class Pairs(nn.Module):
    """Both images of a pair pass in one batch, whose halves have to be alike."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 4), conv(4, 2)

    def forward(self, x, y):
        one, other = torch.chunk(input=F.relu(self.a(torch.cat([x, y]))), chunks=2, dim=0)
        if one.shape != other.shape:
            raise ValueError("the images of a pair have one size")
        return self.b(one - other)


@pytest.mark.parametrize(("network", "count"), [(Counted, 1), (Pairs, 2)])
def test_file_takes_batches_of_any_size(network, count):
    torch.manual_seed(0)
    images = [inputs((3, 8, 8), seed=seed).inputs for seed in range(count)]

    def batch(size):
        return Batch(images[0][:size] if count == 1 else tuple(one[:size] for one in images))

    canonical = canonical_of(network().eval(), batch(16), lambda layer: Precision(8, 8))
    file = exported(canonical, batch(16)).integer
    for size in (1, 3):
        with torch.no_grad():
            simulated = call(canonical.model, batch(size).inputs)
        assert torch.from_numpy(runtime_outputs(file, batch(size))[0]).sub(simulated).norm() < 0.05 * simulated.norm()
    assert "len" not in globals()


def test_of_equal_looking_edges_the_widest_is_chosen():
    """On the first inputs no value reaches the clamp, so that the clamped tensor equals the unclamped one."""
    torch.manual_seed(0)
    layers = {"z": conv(3, 8), "b": conv(8, 8, 1), "c": conv(8, 4, 1)}
    batch = inputs((3, 8, 8))
    batch.inputs[:4] *= 1e-3
    network = Odd(lambda s, x: (lambda h: s.c(h + s.b(h.clamp(-0.5, 0.5))))(s.z(x)), **layers).eval()
    canonical = canonical_of(network, batch, lambda layer: Precision(8, 8))
    with torch.no_grad():
        simulated = canonical.model(batch.inputs)
    assert torch.from_numpy(runtime_outputs(exported(canonical, batch).integer, batch)[0]).sub(simulated).norm() < 0.05 * simulated.norm()


def test_exports_layer_with_per_tensor_scale(tmp_path):
    canonical, batch = odd(lambda s, x: s.b(F.relu(s.a(x))), a=conv(3, 8), b=conv(8, 16))
    for layer in quantized_layers(canonical.model).values():
        fill(layer, UniformQuantizer(8, True, layer.weight_quantizer.scale.max().reshape(1, 1)), layer.input_quantizer)
    verdict = verdict_of(canonical, exported(canonical, batch), batch, tmp_path)
    assert not verdict.failures and set(verdict.kernels) == {"a", "b"}


def test_verify_accepts_final_float_layer(tmp_path):
    canonical, batch = odd(lambda s, x: s.b(F.relu(s.a(x))), precision="W4", a=conv(3, 8), b=conv(8, 16))
    verdict = verdict_of(canonical, exported(canonical, batch), batch, tmp_path)
    assert not verdict.failures and set(verdict.floats) == {"a", "b"}


def test_verify_detects_altered_setting(tmp_path):
    canonical, batch = odd(lambda s, x: F.leaky_relu(s.a(x).mean((2, 3)), 0.01), a=conv(3, 8))
    graphs = exported(canonical, batch)
    save(graphs.integer, tmp_path / "net.onnx")
    content = onnx.load(tmp_path / "net.onnx")
    next(node for node in content.graph.node if node.op_type == "LeakyRelu").attribute[0].f = 0.5
    onnx.save(content, tmp_path / "net.onnx")
    verdict = verify_file(tmp_path / "net.onnx", load(tmp_path / "net.onnx"), graphs, canonical.model, batch)
    assert any("leakyrelu" in failure for failure in verdict.failures)


def test_verify_detects_exchanged_outputs(tmp_path):
    canonical, batch = odd(
        lambda s, x: (lambda h: (s.a(h), s.b(h)))(F.gelu(s.z(x))), (6,), z=nn.Linear(6, 6), a=nn.Linear(6, 3), b=nn.Linear(6, 3)
    )
    graphs = exported(canonical, batch)
    save(graphs.integer, tmp_path / "net.onnx")
    content = onnx.load(tmp_path / "net.onnx")
    first, second = (output.name for output in content.graph.output)
    for node in content.graph.node:
        node.output[:] = [{first: second, second: first}.get(name, name) for name in node.output]
    onnx.save(content, tmp_path / "net.onnx")
    assert verify_file(tmp_path / "net.onnx", load(tmp_path / "net.onnx"), graphs, canonical.model, batch).failures


def test_verify_uses_ranges_measured_by_the_export(tmp_path):
    """Inputs other than the export's would give other ranges, but the file still belongs to the run."""
    torch.manual_seed(0)
    network = Odd(lambda s, x: s.b(s.norm(s.a(x))), a=conv(3, 8), norm=nn.GroupNorm(2, 8), b=conv(8, 4))
    batch = inputs((3, 8, 8))
    result = anybit.calibrate(network, batch.inputs, samples=16, weight_bits=(8,), activation_bits=(8,), pipeline="light")
    canonical = Canonical(round_edges(result.model, {}), {}, {})  # a run that rounds no edges, and has no ranges: all are measured
    graphs = exported(canonical, batch)
    assert measured_in(graphs.integer)
    save(graphs.integer, tmp_path / "net.onnx")
    file = load(tmp_path / "net.onnx")
    other = inputs((3, 8, 8), seed=5)
    again = exported(canonical, other, measured=measured_in(file))
    assert not verify_file(tmp_path / "net.onnx", file, again, canonical.model, other).failures
    assert verify_file(tmp_path / "net.onnx", file, exported(canonical, other), canonical.model, other).failures


def test_run_from_before_rounded_edges_opens_and_exports(tmp_path):
    """Its scheme.json lists no rounded edges: its outputs stay the same, and the simulation of its file rounds them."""
    torch.manual_seed(0)
    network = Odd(lambda s, x: s.a(x) + s.b(x), a=conv(3, 4), b=conv(3, 4)).eval()
    x = inputs((3, 8, 8)).inputs
    run = anybit.calibrate(network, x, samples=16, weight_bits=(8,), activation_bits=(8,), pipeline="light").save(tmp_path / "run")
    assert edge_grids(anybit.load(run, network))
    before = read_scheme(run).model_copy(update={"rounded": None})
    tensors = run / "model.safetensors"
    save_file(load_file(tensors), tensors, {"scheme": before.digest()})
    before.sha256 = sha256_of(tensors)
    write_json(run / "scheme.json", before.to_json())
    assert "rounded" not in (run / "scheme.json").read_text() and not edge_grids(anybit.load(run, network))
    anybit.export(run, tmp_path / "net.onnx", model=network, data=x)
    assert anybit.verify(run, tmp_path / "net.onnx", model=network, data=x)["ok"]


def test_verify_names_operator_more_than_one_code_from_the_simulation():
    """The simulation rounds an edge differently from the file."""
    canonical, batch = odd(lambda s, x: s.b(y := F.relu(s.a(x))) + y, a=conv(3, 4), b=conv(4, 4, padding=1))
    graphs = exported(canonical, batch)
    grids = dict(edge_grids(graphs.model))
    scale, zero_point = grids["relu"]
    round_edges(graphs.model, grids | {"relu": (scale, zero_point + 9)})
    verdict = Verdict()
    check_simulation(verdict, graphs, batch)
    assert len(verdict.failures) == 1 and verdict.failures[0].startswith("a: ")
    assert "codes of the file are not the simulation's" in verdict.failures[0]


@pytest.mark.parametrize("padding", [0, 1, "same"])
def test_inputs_that_a_convolution_pads_itself_are_compared_with_the_simulation(padding):
    """The exporter's graph merges zero padding into the next convolution. Codes that were not compared hid where a difference arises."""
    stride = 1 if padding == "same" else 2
    layers = {"a": conv(3, 4), "b": conv(4, 4, padding=padding, stride=stride)}
    canonical, batch = odd(lambda s, x: s.b(F.pad(F.relu(s.a(x)), (0, 1, 2, 3))), **layers)
    graphs = exported(canonical, batch)
    values = interpret(graphs.integer, dict(zip([value.name for value in graphs.integer.graph.inputs], [batch.inputs], strict=True))).values
    codes = simulated_codes(graphs, batch, values)
    (read,) = graphs.inputs["b"]
    assert codes[read].shape == values[read].shape == (len(batch), 4, 6, 6)
    assert (codes[read].int() - values[read].int()).abs().max() <= 1


class Encoder(nn.Module):
    def __init__(self, words):
        super().__init__()
        self.words, self.hidden = words, nn.Linear(8, 8)

    def forward(self, x):
        return self.hidden(self.words(x)).mean(1)


class TwoNames(nn.Module):
    """One embedding that two parts call by different names, as in encoder-decoders."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Embedding(20, 8)
        self.encoder, self.decoder = Encoder(self.shared), Encoder(self.shared)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.encoder(x) + self.decoder(x.flip(1)))


def test_layer_with_several_names_is_one_layer_of_the_file(tmp_path):
    model, data = make(TwoNames), tokens(24)
    run = anybit.calibrate(model, data, None, weight_bits=(4,), activation_bits=(8,), pipeline="light", samples=24).save(tmp_path / "run")
    report = anybit.export(run, tmp_path / "net.onnx", model=model, data=data)
    assert report["layers"] == 4
    assert anybit.verify(run, tmp_path / "net.onnx", model=model, data=data)["ok"]


@pytest.mark.parametrize("scope", ["shared", "encoder.words", "decoder.words"])
def test_node_is_assigned_to_its_layer_by_any_scope_name(scope):
    words, rows = ir.Value(name="words"), ir.Value(name="rows")
    weight = np.arange(160, dtype=np.float32).reshape(20, 8)
    words.const_value = ir.tensor(weight, name="words")
    node = ir.node("Gather", [words, rows], metadata_props={"pkg.torch.onnx.name_scopes": repr(["", scope, "embedding"])})
    graph = ir.Graph([rows], [node.outputs[0]], nodes=[node], initializers=[words], opset_imports={"": floats.OPSET})
    floats._name_layers(ir.Model(graph, ir_version=floats.IR_VERSION), {"shared": weight}, floats._aliases(make(TwoNames)))
    assert node.metadata_props[floats.LAYER] == "shared" and node.name == "shared"
