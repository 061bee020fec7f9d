"""Latency budgets by a measured table: its sums, its allocations, and where it is stored."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from exported import EXACT, inputs
from hypothesis import given
from hypothesis import strategies as st
from networks import Residual, images, make

import anybit
from anybit.data.batches import Batch
from anybit.errors import AnybitError, InfeasibleBudget, InvalidFile, InvalidSetting
from anybit.networks.latency import LatencyTable, OperationFlow, kernel_class
from anybit.networks.observed import observe_network
from anybit.onnx.latency import _steps, _table_file, load_table, measure_latency, save_table
from anybit.roads.settings import CalibrateSettings
from anybit.scheme import FLOAT, Precision, Scheme

INT8 = Precision(4, 8)


def table_of(names):
    """A table with float layers three times as slow, and expensive boundaries."""
    layers = {name: {"float32": 3e-4 * (index + 1), "int8": 1e-4 * (index + 1)} for index, name in enumerate(names)}
    steps = [OperationFlow(name, (number,), (number + 1,), 1000) for number, name in enumerate(names)]
    return LatencyTable(layers, {"float32": 5e-4, "int8": 6e-4}, 1e-8, steps)


def ready(model, batch):
    return observe_network(model, batch, CalibrateSettings((8,), (8, None)).options)


@pytest.mark.parametrize(
    ("text", "kernel"), [("W4A8", "int8"), ("W0A4", "int8"), ("A8", "float32"), ("W3", "float32"), ("float", "float32")]
)
def test_a_layer_runs_on_integers_where_both_operands_are(text, kernel):
    assert kernel_class(Precision.parse(text)) == kernel
    assert kernel_class(Precision.parse("A8"), product=True) == "int8"  # it has no weights


def test_float_layer_between_integer_ones_pays_for_its_boundaries():
    table = table_of(["a", "b"])
    whole, mixed = table.total({"a": INT8, "b": INT8}), table.total({"a": INT8, "b": FLOAT})
    assert whole == pytest.approx(6e-4 + 1e-4 + 2e-4) and mixed == pytest.approx(6e-4 + 1e-4 + 6e-4 + 1e-5)
    assert table.total({"a": FLOAT, "b": FLOAT}) == pytest.approx(5e-4 + 3e-4 + 6e-4)


def test_conversions_are_counted_at_boundaries_of_integer_layers():
    table = table_of(["a", "b", "c", "d"])
    crossing = {floats: table.crossing(floats) for floats in ("", "a", "b", "bc", "ab", "abc", "d", "cd", "ac", "abcd")}
    # Conversions of the network's inputs and outputs are free; there is no boundary between adjacent float layers.
    assert crossing == {
        "": 0, "a": 1000, "b": 2000, "bc": 2000, "ab": 1000, "abc": 1000, "d": 1000, "cd": 1000, "ac": 3000, "abcd": 0,
    }  # fmt: skip
    fixed = LatencyTable(table.layers, table.rest, table.boundary, table.steps, ["b"])
    assert (fixed.crossing("b"), fixed.crossing("c"), fixed.crossing("d")) == (0, 0, 1000)


def test_join_is_integer_if_any_operand_is():
    steps = [
        OperationFlow("a", (0,), (1,), 10),
        OperationFlow("b", (1,), (2,), 20),
        OperationFlow(None, (1, 2), (3,), 40),
        OperationFlow("c", (3,), (4,), 80),
    ]
    table = LatencyTable({}, {}, 1.0, steps)
    crossing = {floats: table.crossing(floats) for floats in ("a", "b", "ab", "c", "bc")}
    assert crossing == {"a": 10, "b": 10 + 20, "ab": 40, "c": 40, "bc": 10 + 20 + 40}


@given(st.sets(st.integers(0, 30)))
def test_budget_counts_at_least_the_predicted_latency(chosen):
    """A budget counts each float layer with both its boundaries."""
    network = observed_residual()
    table = replace(table_of(network.names), steps=_steps(network))
    scheme = {name: FLOAT if index in chosen else INT8 for index, name in enumerate(network.names)}
    counted = table.rest["int8"] + sum(table.layer(name, precision) for name, precision in scheme.items())
    assert table.total(scheme) <= counted * (1 + 1e-9)


@cache
def observed_residual():
    return ready(make(Residual), Batch(images(2)))


@pytest.mark.parametrize("name", ["relu", "silu", "mixed"])
def test_measured_parts_add_up_to_measured_wholes(name):
    network, shape = EXACT[name]
    torch.manual_seed(0)
    table, provenance = measure_latency(ready(network().eval(), inputs(shape, 2)), inputs(shape, 2), rounds=2)
    for kind in ("float32", "int8"):
        assert sum(row[kind] for row in table.layers.values()) + table.rest[kind] == pytest.approx(provenance["measured"][kind], rel=1e-6)
        assert all(row[kind] > 0 for row in table.layers.values()), kind
    assert table.boundary >= 0 and all(table.crossing([layer]) > 0 for layer in list(table.layers)[1:-1])


def test_latency_budget_is_met_and_measured_again(quick, full_disk):
    model, data = make(Residual), images(40)
    quick |= {"activation_bits": (8, None), "pipeline": "light"}
    with pytest.raises(InvalidSetting, match=r"anybit\.profile"):
        anybit.calibrate(model, data, "latency=2ms", **quick)
    observed = ready(model, Batch(data[:2]))
    table = table_of(observed.names)
    with pytest.raises(AnybitError, match=r"\.json cannot be written: .*XDG_CACHE_HOME"), full_disk():
        save_table(observed, table, {"measured": {}, "more": "words " * 1000})
    assert load_table(observed) is None
    save_table(observed, table, {"measured": {}})
    least = table.total(Scheme.uniform(observed.names, INT8))
    result = anybit.calibrate(model, data, f"latency={1e3 * least * 1.05:.6f}ms", **quick)
    assert table.total(result.scheme) <= least * 1.05
    assert result.report["latency"]["predicted"] == pytest.approx(table.total(result.scheme)) == result.report["result"]["latency"]
    assert result.report["latency"]["exported"] > 0
    with pytest.raises(InfeasibleBudget, match="latency="):
        anybit.calibrate(model, data, f"latency={1e3 * least / 2:.6f}ms", **quick)


def test_allocate_supports_latency(run_folder, calibrated):
    model, data, result = calibrated
    observed = ready(model, Batch(data[:2]))
    save_table(observed, table_of(observed.names), {})
    loaded = anybit.allocate(run_folder, "latency=100ms,3bit", model=model, data=data)
    assert (
        loaded.report["latency"]["predicted"] > 0 and loaded.report["result"]["weight_bits"] <= 3 < result.report["result"]["weight_bits"]
    )


def test_search_and_extract_support_latency(tmp_path):
    x = images(40)
    labelled = x, torch.arange(40) % 5
    folder = anybit.train(make(Residual), labelled, bits=(2, 8), epochs=1, batch_size=16, held_out=0.3).save(tmp_path / "supernet")
    options = {"model": make(Residual), "data": labelled}
    for verb in (anybit.search, anybit.extract):
        with pytest.raises(InvalidSetting, match=r"anybit\.profile"):
            verb(folder, budget="latency=2ms", **options)
    observed = ready(make(Residual), Batch(x[:2]))
    table = table_of(observed.names)
    save_table(observed, table, {})
    least = table.total(Scheme.uniform(observed.names, INT8))
    enough, short = (f"latency={1e3 * least * times:.6f}ms" for times in (1.05, 0.5))
    loaded = anybit.search(folder, budget=f"5bit,{enough}", evaluations=10, **options)
    for record in loaded.report["budgets"].values():
        assert record["latency"] == pytest.approx(least) and record["weight_bits"] <= 5
    loaded.save(tmp_path / "search")
    subnet = anybit.extract(tmp_path / "search", f"5bit,{enough}", **options)
    assert subnet.report["latency"]["predicted"] == pytest.approx(least) and subnet.report["latency"]["exported"] > 0
    assert anybit.load(subnet.save(tmp_path / "run"), make(Residual)).scheme == subnet.scheme
    for verb in (anybit.search, anybit.extract):
        with pytest.raises(InfeasibleBudget, match=f"{1e3 * least:.4g} ms"):
            verb(folder, budget=short, **options)
    with pytest.raises(InvalidSetting, match="data="):
        anybit.extract(folder, enough, model=make(Residual))
    assert "latency" not in anybit.extract(loaded.supernet, scheme=subnet.scheme).report  # nothing can be measured without inputs


def test_profile_is_reused_only_for_the_same_network():
    data = images(4)
    first = anybit.profile(make(Residual), data, rounds=1)
    again = anybit.profile(make(Residual, seed=3), data, rounds=1)  # other weights, the same shape
    assert not first["recalled"] and again["recalled"] and again["layers"] == first["layers"]
    assert not anybit.profile(make(Residual), data, rounds=1, overwrite=True)["recalled"]
    assert not anybit.profile(make(Residual), torch.randn(4, 3, 12, 12), rounds=1)["recalled"]


@pytest.mark.parametrize("first", ["a", "b"])
def test_table_depends_on_which_layers_may_be_integer(first):
    networks = {
        name: observe_network(make(Residual), Batch(images(2)), CalibrateSettings((8,), (8, None), keep=keep).options)
        for name, keep in {"a": {"*conv1": Precision(4, None)}, "b": {}}.items()
    }
    save_table(networks[first], table_of(networks[first].names), {})
    assert load_table(networks[first]) is not None
    assert load_table(networks["b" if first == "a" else "a"]) is None


@pytest.mark.parametrize("content", ["{}", "[]", '{"layers": {"x": 1}}', '{"layers": 3}'])
def test_damaged_table_is_named(content):
    observed = ready(make(Residual), Batch(images(2)))
    save_table(observed, table_of(observed.names), {})
    place = _table_file(observed, 1)
    assert place is not None
    place.write_text(content)
    with pytest.raises(InvalidFile, match="--overwrite"):
        load_table(observed)
