"""Fingerprints: outputs show whether a network is the one that a run was created from."""

import json
import shutil

import pytest
import torch
from conftest import QUICK
from networks import NETWORKS, Residual, assert_untouched, images, make, network_and_inputs, run, snapshot
from safetensors.torch import load_file, save_file
from torch import nn

import anybit
from anybit.data.batches import Batch
from anybit.errors import InvalidFile, SchemeMismatch
from anybit.files.strict import read_header, sha256_of
from anybit.networks.fingerprint import TOLERANCE, distance, fingerprint_of, outputs_on
from anybit.runs.fingerprint import read_fingerprint, write_fingerprint
from anybit.runs.names import FINGERPRINT
from anybit.supernets.folder import load_supernet

LIGHT = {**QUICK, "pipeline": "light", "weight_bits": (4, 8), "activation_bits": (8,)}


class Shifted(Residual):
    """Its outputs depend on a non-persistent buffer, on a plain attribute and on a plain tensor."""

    def __init__(self, shift=0.0, power=1.0, table=1.0, name="a"):
        super().__init__()
        self.register_buffer("shift", torch.linspace(0, 1, 5) + shift, persistent=False)
        self.power, self.table, self.name = power, torch.full((5,), table), name

    def forward(self, x):
        return super().forward(x) * self.power * self.table + self.shift


OTHERS = {"buffer": {"shift": 1.0}, "attribute": {"power": 1.1}, "tensor": {"table": 0.9}}


def shifted(**changes):
    torch.manual_seed(3)
    model = Shifted(**changes)
    model.load_state_dict(make(Residual).state_dict())
    return model.eval()


def labelled():
    x = images(60)
    with torch.no_grad():
        return x, make(Residual)(x).argmax(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run of `shifted()` by each road."""
    here, data = tmp_path_factory.mktemp("runs"), labelled()
    supernet = anybit.train(shifted(), data, bits=(2, 8), held_out=0.3, bn_images=16, epochs=1, batch_size=16)
    runs = {
        "calibrate": anybit.calibrate(shifted(), data[0], "6bit", **LIGHT),
        "grow": anybit.grow(shifted(), data, "4bit", epochs=1, batch_size=16),
        "train": supernet,
        "search": anybit.search(supernet, data, "5bit", evaluations=10, rounds=1),
    }
    saved = {name: run.save(here / name) for name, run in runs.items()}
    saved["extract"] = anybit.extract(saved["search"], "5bit", model=shifted()).save(here / "extract")
    saved["extract with data"] = anybit.extract(saved["train"], "5bit", model=shifted(), data=data).save(here / "with data")
    saved["allocate"] = anybit.allocate(saved["calibrate"], "5bit", data[0], model=shifted()).save(here / "allocate")
    return saved


RUNS = ["calibrate", "grow", "train", "search", "extract", "extract with data", "allocate"]


def opened(folder, model):
    return load_supernet(folder, model) if (folder / "supernet.json").is_file() else anybit.load(folder, model)


@pytest.mark.parametrize("road", RUNS)
def test_accepts_the_same_network_with_any_weights(road, folders):
    fresh = shifted(name="b")
    for parameter in fresh.parameters():
        nn.init.normal_(parameter)
    before = snapshot(fresh)
    opened(folders[road], fresh)
    assert_untouched(fresh, before)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("road", RUNS)
def test_rejects_network_with_changed_unstored_state(road, other, folders):
    with pytest.raises(SchemeMismatch, match=r"is not the one that .* was made from: outputs on the same inputs differ by .* %"):
        opened(folders[road], shifted(**OTHERS[other]))


def test_rejects_network_that_fails_to_run(folders):
    model = shifted()
    model.table = torch.ones(3)
    with pytest.raises(SchemeMismatch, match="does not accept the inputs"):
        anybit.load(folders["calibrate"], model)


def test_allocate_rejects_weights_trained_since(folders):
    model = shifted()
    with torch.no_grad():
        model.block2.conv1.weight[0, 0, 0, 0] += 1e-4
    with pytest.raises(SchemeMismatch, match=r"The weights are not those that .* was calibrated from"):
        anybit.allocate(folders["calibrate"], "5bit", labelled()[0], model=model)
    with pytest.raises(SchemeMismatch, match="is not the one"):
        anybit.allocate(folders["allocate"], "5bit", labelled()[0], model=shifted(power=1.1))
    counted = shifted()
    counted.bn.num_batches_tracked += 1
    anybit.allocate(folders["calibrate"], "5bit", labelled()[0], model=counted)


def test_runs_without_a_fingerprint_load(folders, tmp_path):
    folder = shutil.copytree(folders["calibrate"], tmp_path / "run")
    (folder / FINGERPRINT).unlink()
    anybit.load(folder, shifted(shift=1.0))
    scheme = json.loads((folder / "scheme.json").read_text())
    del scheme["fingerprint"]  # as anybit 0.1 wrote it
    (folder / "scheme.json").write_text(json.dumps(scheme))
    anybit.load(folder, shifted())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_agrees_with_its_fingerprint(name, tmp_path):
    model, batch = network_and_inputs(name)
    before, output = snapshot(model), run(model, batch)
    fingerprint = fingerprint_of(model, batch, model)
    assert fingerprint is not None and distance(outputs_on(model, fingerprint), fingerprint.outputs) == 0
    again = read_fingerprint(tmp_path, write_fingerprint(tmp_path, fingerprint))
    assert distance(outputs_on(model, again), again.outputs) == distance(again.floats, again.outputs) == 0
    assert_untouched(model, before)
    assert torch.equal(run(model, batch), output)
    assert (tmp_path / FINGERPRINT).stat().st_size < 20_000
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    assert distance(outputs_on(model, again), again.outputs) > TOLERANCE


class Jumping(nn.Module):
    """Its outputs are discontinuous in its inputs, as the boxes of a detector are."""

    def forward(self, x):
        return (x * 1e7).sin()


class Failing(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        if self.error:
            raise RuntimeError("not these")
        return x / 0


@pytest.mark.parametrize("model", [Jumping(), Failing(True), Failing(False)])
def test_uninformative_outputs_have_no_fingerprint(model):
    assert fingerprint_of(model, Batch(torch.randn(2, 8))) is None


@pytest.mark.parametrize("damage", ["cut", "structure", "twice", "type", "values", "empty", "more"])
def test_damaged_fingerprint_is_named(damage, folders, tmp_path):
    folder = shutil.copytree(folders["calibrate"], tmp_path / "run")
    path = folder / FINGERPRINT
    tensors, (_, metadata) = load_file(path), read_header(path)
    if damage == "structure":
        metadata["structure"] = "[1]"
    elif damage == "twice":
        metadata["structure"] = json.dumps({"list": [json.loads(metadata["structure"])] * 2})
    elif damage == "type":
        metadata["structure"] = metadata["structure"].replace("float32", "device")
    elif damage == "values":
        tensors["output.0"] = torch.zeros(2, 2)
    elif damage == "empty":
        del tensors["output.0"]
    elif damage == "more":
        tensors["other"] = torch.zeros(1)
    save_file(tensors, path, metadata)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        scheme = json.loads((folder / "scheme.json").read_text())
        scheme["fingerprint"] = sha256_of(path)
        (folder / "scheme.json").write_text(json.dumps(scheme))
    with pytest.raises(InvalidFile, match=FINGERPRINT):
        anybit.load(folder, shifted())
