"""Supernets: training, storage, slicing, search; and rejected inputs."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import Depthwise, NoBatchNorm, Residual, Signal, Tokens, images, make
from processes import run_processes

import anybit
from anybit.errors import InfeasibleBudget, InvalidFile, InvalidInput, InvalidSetting, SchemeMismatch
from anybit.files.cache import Entry, _serialized, entries
from anybit.networks.layers import codes_of, quantized_layers
from anybit.scheme import Precision, Scheme
from anybit.sources.inputs import as_samples
from anybit.supernets.prepared import bn_batches, held_out_split, to_store
from anybit.supernets.settings import SupernetSettings
from anybit.supernets.statistics import statistics_of
from anybit.supernets.store import slice_subnet
from anybit.supernets.supernet import scores as subnet_scores
from anybit.supernets.supernet import uniform_schemes

TESTS = Path(__file__).parent.parent

INPUTS = {
    Residual: lambda: images(60),
    Depthwise: lambda: images(60),
    NoBatchNorm: lambda: images(60),
    Signal: lambda: torch.randn(60, 2, 12, generator=torch.Generator().manual_seed(0)),
    Tokens: lambda: torch.randint(0, 20, (60, 7), generator=torch.Generator().manual_seed(0)),
}


def labelled(cls=Residual):
    x = INPUTS[cls]()
    with torch.no_grad():
        return x, make(cls)(x).argmax(1)


HELD = {"epochs": 1, "batch_size": 16, "held_out": 0.3, "bn_images": 32}


def trained(cls=Residual, **changes):
    settings = {"bits": (2, 4, 8), **HELD, **changes}
    return anybit.train(make(cls), labelled(cls), **settings)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A supernet with a kept layer, and its folder."""
    supernet = trained(keep={"conv": Precision(8, 8)})
    return supernet, supernet.save(tmp_path_factory.mktemp("supernet") / "run")


@pytest.fixture(scope="module")
def searched(stored, tmp_path_factory):
    """A search in that supernet, its folder, and the cache of its scores."""
    here = tmp_path_factory.mktemp("searched")
    result = anybit.search(stored[1], labelled(), "3bit", model=make(Residual), evaluations=10, rounds=1, cache=here / "cache")
    return result, result.save(here / "run"), here / "cache"


def random_scheme(supernet, seed=0):
    return supernet.method.drawn(random.Random(seed))


# Training


@pytest.mark.parametrize("cls", INPUTS)
def test_every_network_trains_and_loads_bitwise(cls, tmp_path):
    supernet = trained(cls)
    x = labelled(cls)[0]
    loaded = anybit.load_supernet(supernet.save(tmp_path / "run"), model=make(cls, seed=5))
    for scheme in (supernet.uniform(2), supernet.uniform(8), random_scheme(supernet)):
        assert supernet.switch(scheme) == loaded.switch(scheme)
        with torch.no_grad():
            assert torch.equal(supernet.model(x), loaded.model(x))
    assert loaded.costs == supernet.costs and loaded.settings == supernet.settings


@pytest.mark.parametrize("changes", [{"batch_norm": "switch"}, {"per_channel": False}, {"offset_rate": 1e-2}, {"bits": (2, 3)}], ids=str)
def test_every_form_of_supernet_loads_bitwise(changes, tmp_path):
    """Mixed schemes included: with a batch norm per bit-width, every layer keeps its own."""
    supernet, x = trained(**changes, test=labelled()), labelled()[0]
    loaded = anybit.load_supernet(supernet.save(tmp_path / "run"), model=make(Residual, seed=5))
    for scheme in (*uniform_schemes(supernet).values(), random_scheme(supernet)):
        supernet.switch(scheme)
        loaded.switch(scheme)
        with torch.no_grad():
            assert torch.equal(supernet.model(x), loaded.model(x))


class Reversed(torch.nn.Module):
    """Layers that are defined in another order than they run in."""

    def __init__(self):
        super().__init__()
        self.fc, self.second, self.first = torch.nn.Linear(8, 5), torch.nn.Linear(6, 8), torch.nn.Linear(4, 6)

    def forward(self, x):
        return self.fc(torch.relu(self.second(torch.relu(self.first(x)))))


def test_layers_are_stored_by_name_in_any_order(tmp_path):
    x = torch.randn(60, 4)
    supernet = anybit.train(make(Reversed), (x, x.argmax(1)), bits=(2, 8), epochs=1, batch_size=16)
    folder = supernet.save(tmp_path / "run")
    loaded, scheme = anybit.load_supernet(folder, model=make(Reversed, seed=3)), random_scheme(supernet)
    supernet.switch(scheme)
    loaded.switch(scheme)
    with torch.no_grad():
        assert torch.equal(supernet.model(x), loaded.model(x))
    sliced = slice_subnet(folder, scheme)
    for name, layer in quantized_layers(loaded.canonical().model).items():
        assert np.array_equal(sliced[name][0], codes_of(layer).numpy())


def test_mixed_subnet_uses_the_batch_norm_of_each_layers_bits():
    supernet = trained(batch_norm="switch")
    supernet.switch(supernet.uniform(2))
    low = supernet.method.norms["conv"].chosen().running_mean.clone()
    words = supernet.switch(supernet.uniform(8).replace({"conv": Precision(2, 8)}))
    assert "own bit-width" in words and torch.equal(supernet.method.norms["conv"].chosen().running_mean, low)


def test_report_covers_every_bit_width_and_the_store():
    report = trained(test=labelled()).report
    names = ["2 bits", "4 bits", "8 bits"]
    assert all(list(report[key]) == names for key in ("test", "float_store", "subnets")) and list(report["epochs"][0]["widths"]) == names
    assert report["bn_images"] == 32 and report["inputs"] == {"fitting": 42, "held_out": 18}
    json.dumps(report, allow_nan=False)


def test_training_lowers_the_loss_of_the_lowest_bits():
    before = trained(epochs=1, rate=1e-9, step_rate=1e-9, test=labelled()).report["test"]["2 bits"]["loss"]
    assert trained(epochs=12, rate=3e-3, test=labelled()).report["test"]["2 bits"]["loss"] < before


def test_resumed_training_is_byte_identical(tmp_path, monkeypatch):
    from anybit.loops.checkpoint import save_checkpoint

    changes = {"epochs": 3, "middle": "worst", "label": "adaptive"}
    trained(**changes, checkpoint=tmp_path / "whole").save(tmp_path / "a")
    save, calls = save_checkpoint, []

    def interrupted(*arguments):
        save(*arguments)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("anybit.loops.training.save_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(**changes, checkpoint=tmp_path / "broken")
    with pytest.raises(InvalidSetting, match=r"label_weight was 0\.5"):
        trained(**changes, label_weight=1.0, checkpoint=tmp_path / "broken")
    trained(**changes, checkpoint=tmp_path / "broken").save(tmp_path / "b")
    for name in ("supernet.safetensors", "supernet.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_store_rounds_weights_once_and_preserves_the_highest_bits():
    supernet = trained()
    before = {name: layer._parameters["weight"].clone() for name, layer in supernet.method.layers.items()}
    to_store(supernet.method)  # a second time
    assert all(torch.equal(before[name], layer._parameters["weight"]) for name, layer in supernet.method.layers.items())


WORKER = f"""
import sys
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / "supernets")!r}]
import torch
torch.set_num_threads(1)
import test_supernet as t
supernet = t.of_several_processes()
assert len(t.bn_batches(t._samples()[0], t._samples()[1])[0]) == 16  # every process sees all
import torch.distributed as dist
if dist.get_rank() == 0:
    supernet.save(sys.argv[1])
dist.destroy_process_group()
"""


def of_several_processes():
    return trained(cls=NoBatchNorm, epochs=3, middle="worst", label="adaptive", augment="flip", test=labelled(NoBatchNorm))


def test_two_processes_give_the_supernet_of_one(tmp_path):
    run_processes(2, tmp_path / "by two", tmp_path, WORKER)
    of_several_processes().save(tmp_path / "by one")
    one, two = (anybit.load_supernet(tmp_path / folder, model=make(NoBatchNorm)) for folder in ("by one", "by two"))
    x = labelled()[0]
    for scheme in (one.uniform(2), one.uniform(8), random_scheme(one)):
        one.switch(scheme)
        two.switch(scheme)
        with torch.no_grad():
            assert torch.allclose(one.model(x), two.model(x), rtol=1e-4, atol=1e-5)  # much less than training changes them


@pytest.mark.slow  # it compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # the compiler's own
def test_a_compiled_supernet_is_compiled_once_for_all_its_networks():
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = trained(compile=True, epochs=2, test=labelled())
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]  # the scheme of a step is data, not code
    plain = trained(epochs=2, test=labelled())
    assert compiled.report["test"]["8 bits"]["loss"] == pytest.approx(plain.report["test"]["8 bits"]["loss"], rel=0.05)


def test_store_preserves_the_codes_of_the_lowest_bits():
    supernet = trained(bits=(2, 4, 8), epochs=1)
    layer = supernet.method.layers["block1.conv1"]
    slot = layer.weight_quantizer
    slot.switch(2)
    threshold = 0.5 * slot.scale().expand(len(layer._parameters["weight"]), 1)
    with torch.no_grad():  # every weight next to a two-bit threshold, where rounding to eight bits would push half of them across
        beside = threshold * (1 + 1e-3 * torch.randn(threshold.shape[0], 54, generator=torch.Generator().manual_seed(0)))
        layer._parameters["weight"].copy_(beside.view_as(layer._parameters["weight"]))
        before = slot.freeze(len(beside)).codes(beside)
        to_store(supernet.method)
        assert torch.equal(slot.freeze(len(beside)).codes(layer._parameters["weight"].flatten(1)), before)


# Subnets


def test_batch_norm_is_estimated_for_the_current_subnet(stored):
    supernet, _ = stored
    batches = bn_batches(held_out_split(*_samples())[0], supernet.settings)
    supernet.switch(supernet.uniform(2), batches)
    low = statistics_of(supernet.model)
    supernet.switch(supernet.uniform(8), batches)
    assert not torch.allclose(low, statistics_of(supernet.model))
    supernet.switch(supernet.uniform(2))
    assert torch.equal(low, statistics_of(supernet.model))


def _samples():
    from anybit.sources.inputs import as_samples

    return as_samples(labelled()), SupernetSettings.of(held_out=0.3, bn_images=32, batch_size=16)


def test_numpy_alone_slices_a_subnet_from_the_file(stored):
    supernet, folder = stored
    for seed in range(5):
        scheme = random_scheme(supernet, seed)
        supernet.switch(scheme)
        sliced = slice_subnet(folder, scheme)
        frozen = supernet.canonical()
        for name, layer in quantized_layers(frozen.model).items():
            assert np.array_equal(sliced[name][0], codes_of(layer).numpy())
    script = (
        "import sys, json; from anybit.supernets.store import slice_subnet; from anybit.scheme import Scheme; "
        f"slice_subnet({str(folder)!r}, {supernet.uniform(4).to_json()!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_extracted_run_is_an_ordinary_run(stored, tmp_path):
    supernet, folder = stored
    x = labelled()[0]
    result = anybit.extract(folder, "3bit", model=make(Residual), test=labelled())
    assert result.report["result"]["weight_bits"] <= 3 and "stored for this scheme" in result.report["statistics"]
    run = result.save(tmp_path / "run")
    loaded = anybit.load(run, model=make(Residual, seed=9))
    assert torch.equal(loaded(x), result.model(x)) and (run / "model.safetensors").stat().st_size == result.report["result"]["bytes"]
    supernet.switch(result.scheme)
    with torch.no_grad():
        assert torch.allclose(supernet.model(x), result.model(x), atol=1e-5)


def test_report_names_the_source_of_batch_norm_statistics(stored, tmp_path):
    supernet, folder = stored
    mixed = random_scheme(supernet, 3)
    (tmp_path / "scheme.json").write_text(json.dumps(mixed.to_json()))
    near = anybit.extract(folder, scheme=tmp_path / "scheme.json", model=make(Residual))
    assert "nearest" in near.report["statistics"] and near.scheme == mixed
    own = anybit.extract(folder, scheme=mixed, data=labelled(), model=make(Residual))
    assert own.report["statistics"] == "estimated on 32 inputs"
    again = anybit.extract(folder, scheme=anybit.extract(folder, "3bit", model=make(Residual)).save(tmp_path / "run"), model=make(Residual))
    assert again.scheme == supernet.uniform(2)


def test_polishing_never_moves_a_subnet_away_from_the_float_outputs(stored):
    _, folder = stored
    options = {"data": labelled(), "model": make(Residual), "scheme": anybit.load_supernet(folder, make(Residual)).uniform(2)}
    result = anybit.extract(folder, polish=True, samples=42, steps=20, batch_size=16, **options)
    losses = [row["loss"] for row in result.report["ladder"] if row["kept"]]
    assert losses == sorted(losses, reverse=True) and len(result.report["ladder"]) == 5
    assert result.scheme == options["scheme"]


# Searching


def test_search_stores_the_best_of_each_budget_with_its_statistics(stored, tmp_path):
    _, folder = stored
    result = anybit.search(folder, labelled(), ["3bit", "5bit"], model=make(Residual), evaluations=20, cache=tmp_path / "cache")
    fits = {text: supernet_bits(result, scheme) for text, scheme in result.chosen.items()}
    assert fits["3bit"] <= 3 and fits["5bit"] <= 5
    rows = result.report["evaluated"]
    assert len(rows) == len({json.dumps(row["scheme"]) for row in rows}) == 20
    best = max(row["score"] for row in rows if row["cost"] <= 3)
    assert next(r["score"] for r in rows if r["scheme"] == result.chosen["3bit"].to_json()) == best
    assert all(row["measured"] is not None for row in result.report["front"])
    run = result.save(tmp_path / "search")
    assert "stored for this scheme" in anybit.extract(run, "3bit", model=make(Residual)).report["statistics"]
    assert anybit.extract(run, "5bit", model=make(Residual)).scheme == result.chosen["5bit"]


def supernet_bits(result, scheme):
    return result.supernet.costs.weight_bits(scheme)


def test_interrupted_search_resumes_without_repetition_to_the_same_end(stored, tmp_path, monkeypatch):
    _, folder = stored
    options = {"model": make(Residual), "evaluations": 12, "rounds": 1}
    whole = anybit.search(folder, labelled(), "3bit", cache=tmp_path / "a", **options)
    scores, calls = subnet_scores, []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return scores(*arguments)

    monkeypatch.setattr("anybit.roads.search.scores", counted)
    with pytest.raises(KeyboardInterrupt):
        anybit.search(folder, labelled(), "3bit", cache=tmp_path / "b", **options)
    again = anybit.search(folder, labelled(), "3bit", cache=tmp_path / "b", **options)
    assert again.report["evaluated"] == whole.report["evaluated"]
    assert again.report["recalled"] == 7
    before = len(calls)
    other = anybit.search(folder, labelled(), "5bit", cache=tmp_path / "b", **options)
    assert len(calls) == before and other.chosen["5bit"]  # another budget measures nothing


def test_search_estimates_batch_norm_on_the_requested_number_of_inputs(stored, tmp_path, monkeypatch):
    _, folder = stored
    options = {"model": make(Residual), "evaluations": 12, "rounds": 1, "cache": tmp_path / "cache"}
    scores, seen = subnet_scores, []

    def counted(supernet, scheme, statistics, *arguments):
        seen.append(sum(map(len, statistics)))
        return scores(supernet, scheme, statistics, *arguments)

    monkeypatch.setattr("anybit.roads.search.scores", counted)
    report = anybit.search(folder, labelled(), bn_images=16, **options).report
    front = len(seen) - 12
    assert report["images"]["batch_norm"] == 16 < report["images"]["batch_norm_of_the_front"]
    assert seen == [16] * 12 + [report["images"]["batch_norm_of_the_front"]] * front and front >= len(report["front"])
    for other in (17, None):  # measurements with other statistics are not reused, even with as many inputs: 17 are also one batch of 16
        before = len(seen)
        anybit.search(folder, labelled(), bn_images=other, **options)
        assert len(seen) >= before + 12
    with pytest.raises(InvalidSetting, match="bn_images 1 "):
        anybit.search(folder, labelled(), bn_images=1, **options)


def test_custom_metric_ranks_subnets_and_names_scores(stored, tmp_path):
    _, folder = stored

    def fewest(outputs, labels):
        return -float(outputs.abs().mean())

    options = {"model": make(Residual), "evaluations": 12, "rounds": 1, "cache": tmp_path / "cache"}
    result = anybit.search(folder, labelled(), metric=fewest, **options)
    assert result.report["score"] == "fewest" and all(row["score"] < 0 for row in result.report["evaluated"])
    plain = anybit.search(folder, labelled(), **options)  # scores of another metric are never reused from the file
    assert plain.report["score"] == "top1" and max(row["score"] for row in plain.report["evaluated"]) > 1


def test_scores_of_another_supernet_are_never_reused(searched, tmp_path):
    cache = shutil.copytree(searched[2], tmp_path / "cache")
    other = trained(seed=3, keep={"conv": Precision(8, 8)})
    assert anybit.search(other, labelled(), evaluations=10, rounds=1, cache=cache).report["recalled"] == 0


@pytest.mark.parametrize("change", ["a label", "an input", "an input for batch norm", "an attribute"])
def test_scores_of_other_data_or_code_are_never_reused(change, stored, searched, tmp_path):
    supernet, folder = stored
    x, y = (tensor.clone() for tensor in labelled())
    cache = shutil.copytree(searched[2], tmp_path / "cache")
    fitting, held_out = (part.dataset.indices for part in held_out_split(as_samples((x, y)), supernet.settings))
    model = make(Residual)
    if change == "a label":
        y[held_out[-1]] = (y[held_out[-1]] + 1) % 5
    elif change == "an attribute":
        model.block2.scale = 2.0
    else:
        x[held_out[0] if change == "an input" else list(bn_indices(fitting, supernet.settings))[-1]] += 0.5
    assert anybit.search(folder, (x, y), model=model, evaluations=10, rounds=1, cache=cache).report["recalled"] == 0


def bn_indices(fitting, settings):
    """The fitting samples from which batch-norm statistics are estimated."""
    x, y = labelled()
    batches = bn_batches(as_samples((x[fitting], y[fitting])), settings)
    rows = torch.cat([batch.inputs for batch in batches]).flatten(1)
    return (index for index in fitting if (rows == x[index].flatten()).all(1).any())


def test_another_budget_estimates_nothing_again(stored, tmp_path, monkeypatch):
    _, folder = stored
    options = {"model": make(Residual), "evaluations": 15, "rounds": 1, "cache": tmp_path / "cache"}
    first = anybit.search(folder, labelled(), "3bit", **options)
    with monkeypatch.context() as patched:
        patched.setattr("anybit.networks.batchnorm.reestimate", lambda *arguments: pytest.fail("estimated"))
        second = anybit.search(folder, labelled(), "3bit", **options)
    for one, other in zip(first.supernet.known, second.supernet.known, strict=True):
        assert one.scheme == other.scheme and torch.equal(one.statistics, other.statistics) and torch.equal(one.edges, other.edges)


@pytest.mark.parametrize("settings", [{"bits": (4, 8)}, {"bits": (4, 8), "keep": {"*": Precision(8, 8)}}], ids=["few", "none"])
def test_a_search_among_few_schemes_ends(settings):
    from torch import nn

    x = torch.randn(60, 6)
    supernet = anybit.train(nn.Sequential(nn.Linear(6, 4)), (x, x[:, :4].argmax(1)), epochs=1, batch_size=16, held_out=0.3, **settings)
    report = anybit.search(supernet, (x, x[:, :4].argmax(1)), evaluations=20, rounds=1, cache=False).report
    assert len(report["evaluated"]) == (1 if "keep" in settings else 4) and report["rank_correlation"] is None


# Rejected inputs


def test_error_for_budget_below_the_lowest_subnet_names_it(stored):
    _, folder = stored
    least = anybit.load_supernet(folder, make(Residual))
    bits = least.costs.weight_bits(least.method.lowest)
    options = {"model": make(Residual)}
    for verb in (lambda: anybit.search(folder, labelled(), "1bit", **options), lambda: anybit.extract(folder, "1bit", **options)):
        with pytest.raises(InfeasibleBudget, match=f"{bits:.4g} bits"):
            verb()


@pytest.mark.parametrize(
    ("run", "error"),
    [
        (lambda f: anybit.extract(f, scheme={"fc": "W3A8"} and Scheme({"fc": Precision(3, 8)}), model=make(Residual)), SchemeMismatch),
        (lambda f: anybit.extract(f, model=make(Residual)), InvalidSetting),
        (lambda f: anybit.extract(f, "3bit", polish=True, model=make(Residual)), InvalidSetting),
        (lambda f: anybit.extract(f, "3bit", steps=3, model=make(Residual)), InvalidSetting),
        (lambda f: anybit.search(f, labelled()[0], "3bit", model=make(Residual)), InvalidInput),
        (lambda f: anybit.search(f, labelled(), "latency=3ms", model=make(Residual)), InvalidSetting),
        (lambda f: anybit.search(f, labelled(), "3bit", model=make(Residual), strategy="guess"), InvalidSetting),
        (lambda f: anybit.search(f, tuple(t[:3] for t in labelled()), "3bit", model=make(Residual)), InvalidInput),
        (lambda f: anybit.load_supernet(f, make(Depthwise)), SchemeMismatch),
        (lambda f: slice_subnet(f, {"fc": "W3A8"}), SchemeMismatch),
        (lambda f: slice_subnet(f, {"fc": 4}), (SchemeMismatch, InvalidSetting)),
        (lambda f: anybit.extract(f, scheme=Scheme({"fc": Precision(2, 8)}), model=make(Residual)), SchemeMismatch),
        (lambda f: anybit.load_supernet(f, make(Residual)).uniform(3), SchemeMismatch),
        (lambda f: anybit.extract(f, "3bit", polish=True, pairs=True, data=labelled(), model=make(Residual)), InvalidSetting),
        (lambda f: anybit.extract(f, "3bit", data=tuple(t[:2] for t in labelled()), model=make(Residual)), InvalidInput),
        (lambda f: anybit.train(make(Residual), labelled(), keep={"fc": Precision(0, 8)}), InvalidSetting),
        (lambda f: anybit.train(make(Residual), labelled(), metric=lambda outputs, labels: 1.0), InvalidSetting),
        (lambda f: anybit.train(make(Residual), labelled(), label="teacher", sandwich="LRH"), InvalidSetting),
        (
            lambda f: anybit.train(make(Residual), labelled()[0], distill=1.0, label="adaptive", task="classification", **HELD),
            InvalidSetting,
        ),
        (lambda f: slice_subnet(f / "nowhere", {"fc": "W2A8"}), InvalidFile),
    ],
)
def test_rejects_invalid_calls(run, error, stored):
    with pytest.raises(error):
        run(stored[1])


def test_distillation_needs_no_labels():
    assert anybit.train(make(Residual), labelled()[0], distill=1.0, **HELD).report["epochs"][0]["loss"] > 0


@pytest.mark.parametrize("damage", ["codes", "json", "settings", "surplus", "scale", "missing", "order", "macs", "truncated"])
def test_damaged_store_is_named(damage, stored, tmp_path):
    from safetensors.torch import load_file, save_file

    from anybit.files.strict import sha256_of

    folder = tmp_path / "run"
    shutil.copytree(stored[1], folder)
    weights, provenance = folder / "supernet.safetensors", json.loads((folder / "supernet.json").read_text())
    if damage == "codes":
        data = bytearray(weights.read_bytes())
        data[-40] ^= 1
        weights.write_bytes(bytes(data))
    elif damage == "missing":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif damage == "order":
        provenance["layers"] = dict(reversed(provenance["layers"].items()))
    elif damage == "macs":
        provenance["layers"]["fc"]["macs"] += 1
    elif damage in ("surplus", "scale"):
        tensors = load_file(weights)
        if damage == "surplus":
            tensors["more"] = torch.zeros(3)
        else:
            tensors["weight_scales"][0] = -1.0
        save_file(tensors, weights)
        provenance["sha256"] = sha256_of(weights)
    else:
        provenance["settings" if damage == "settings" else "edges"] = {"bits": "many"}
    (folder / "supernet.json").write_text(json.dumps(provenance))
    with pytest.raises(InvalidFile):
        anybit.load_supernet(folder, make(Residual))
    if damage in ("codes", "missing", "truncated"):
        with pytest.raises(InvalidFile):
            slice_subnet(folder, {"fc": "W2A8"})


ONE_LAYER = '{"evaluated": [{"scheme": {"fc": "W2A8"}, "score": 1.0, "cost": 1.0}]}'


@pytest.mark.parametrize("damage", ["[]", "{}", ONE_LAYER, '{"evaluated": [{}]}'])
def test_damaged_search_is_named(damage, searched, tmp_path):
    folder = shutil.copytree(searched[1], tmp_path / "run")
    (folder / "search.json").write_text(damage)
    with pytest.raises(InvalidFile, match=r"search\.json"):
        anybit.extract(folder, "3bit", model=make(Residual))


def test_malformed_cached_score_is_measured_again(stored, searched, tmp_path):
    first, cache = searched[0], shutil.copytree(searched[2], tmp_path / "cache")
    for entry in entries(cache):
        entry.path.write_bytes(_serialized("score", Entry({})))
    with pytest.warns(UserWarning, match="is damaged"):
        again = anybit.search(stored[1], labelled(), "3bit", model=make(Residual), evaluations=10, rounds=1, cache=cache)
    assert again.report["evaluated"] == first.report["evaluated"] and again.report["recalled"] == 0


def test_rejects_too_few_samples():
    x, y = labelled()
    with pytest.raises(InvalidInput, match="two"):
        anybit.train(make(Residual), (x[:1], y[:1]))
    with pytest.raises(InvalidSetting, match="bn_images"):
        trained(bn_images=1)


def test_foreign_reference_is_never_followed_or_passed_on(stored, monkeypatch, tmp_path):
    supernet, _ = stored
    supernet.about = {"model": {"reference": f"{tmp_path}/evil.py:network"}, "data": {"reference": f"{tmp_path}/evil.py:data"}}
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    foreign = supernet.save(tmp_path / "theirs")
    supernet.about = {}
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))  # another user's list of trusted runs
    with pytest.raises(InvalidSetting, match="was not written by your own"):
        anybit.load_supernet(foreign)
    own = anybit.load_supernet(foreign, model=make(Residual)).save(tmp_path / "mine")
    result = anybit.search(foreign, labelled(), "3bit", model=make(Residual), evaluations=10, cache=False).save(tmp_path / "found")
    for folder in (own, result):
        with pytest.raises(InvalidSetting, match="does not name its network"):
            anybit.load_supernet(folder)
    run = anybit.extract(foreign, "3bit", model=make(Residual)).save(tmp_path / "run")
    with pytest.raises(InvalidSetting, match="does not name its network"):
        anybit.load(run)
