"""Every verb that reads a run uses the run's task: labels of other data do not choose another."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import anybit
from anybit.cli.app import app
from anybit.errors import InvalidInput
from anybit.progress import listening

N, C = 24, 3
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(N) % C
ONE_HOT = F.one_hot(CLASSES, C)
SEVERAL = torch.cat([ONE_HOT[:-2], torch.ones(2, C, dtype=torch.long)])
QUICK = {"pipeline": "light", "solver": "none", "bn_tuning": False, "weight_bits": (4, 8), "activation_bits": (8,), "cache": False}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, C))

    def forward(self, x):
        return self.layers(x)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs whose task was decided by labels or by the user."""
    folder = tmp_path_factory.mktemp("runs")
    results = {
        "by labels": anybit.calibrate(Net(), (X, SEVERAL), "6bit", **QUICK),
        "by name": anybit.calibrate(Net(), X, "6bit", task="multi-label", **QUICK),
        "grown": anybit.grow(Net(), (X, SEVERAL), "6bit", epochs=1),
    }
    for name, result in results.items():
        result.save(folder / name)
    return folder, results


@pytest.mark.parametrize("data", [(X, ONE_HOT), TensorDataset(X, ONE_HOT.float())], ids=["arrays", "data set"])
@pytest.mark.parametrize("name", ["by labels", "by name", "grown"])
def test_evaluate_keeps_the_task_of_a_run(runs, name, data):
    results = runs[1]
    scores = results[name].evaluate(data)
    assert "f1" in scores and "top1" not in scores
    assert "f1" in anybit.evaluate(results[name], data)
    assert "top1" in anybit.evaluate(results[name], data, task="classification")


def test_the_command_line_keeps_the_task_of_a_run(runs, monkeypatch):
    folder, _ = runs
    monkeypatch.chdir(folder)
    (folder / "net.py").write_text(
        "import torch\nfrom torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, {C}))\n"
        "    def forward(self, x):\n        return self.layers(x)\n"
    )
    np.savez("data.npz", x=X.numpy(), y=ONE_HOT.numpy())
    done = CliRunner().invoke(app, ["evaluate", "by labels", "--model", "net.py:Net", "--data", "data.npz", "--json"])
    assert done.exit_code == 0, done.output
    assert "f1" in json.loads(done.stdout)


def test_labels_that_do_not_fit_the_task_of_a_run_are_refused_with_its_name(runs):
    with pytest.raises(InvalidInput, match=r"task= \(classification\)"):
        anybit.evaluate(runs[1]["by labels"], (X, CLASSES))


def test_allocate_and_verify_keep_the_task_of_a_run(runs, tmp_path):
    folder, results = runs
    smaller = anybit.allocate(folder / "by labels", "5bit", (X, ONE_HOT), Net(), test=(X, ONE_HOT))
    assert "f1" in smaller.report["test"]
    results["by labels"].export(tmp_path / "net.onnx", data=X, cache=False)
    report = results["by labels"].verify(tmp_path / "net.onnx", data=(X, ONE_HOT), cache=False)
    assert "f1" in report["accuracy"]["exported"]


def test_verbs_that_keep_the_task_advise_to_make_another_run(runs, tmp_path):
    """allocate, extract and verify have no --task; evaluate has one."""
    advice = r"Make the run with their task= \(classification\)"
    with pytest.raises(InvalidInput, match=advice):
        anybit.allocate(runs[0] / "by labels", "5bit", (X, ONE_HOT), Net(), test=(X, CLASSES))
    with pytest.raises(InvalidInput, match=r"Name their task= \(classification\)"):
        anybit.evaluate(runs[1]["by labels"], (X, CLASSES))
    notes = []
    runs[1]["by labels"].export(tmp_path / "net.onnx", data=X, cache=False)
    with listening(events=lambda event, fields: notes.append(str(fields.get("note")))):
        report = runs[1]["by labels"].verify(tmp_path / "net.onnx", data=(X, CLASSES), cache=False)
    assert "accuracy" not in report and any("labels of the data are not used" in note and "Make the run with" in note for note in notes)


def test_search_and_extract_keep_the_task_of_a_supernet():
    supernet = anybit.train(Net(), (X.repeat(4, 1), SEVERAL.repeat(4, 1)), epochs=1, bits=(4, 8), held_out=0.5)
    data = X.repeat(4, 1), ONE_HOT.repeat(4, 1)
    assert anybit.search(supernet, data, evaluations=10, images=12, cache=False).report["score"] == "f1"
    assert "f1" in anybit.extract(supernet, "6bit", test=(X, ONE_HOT)).report["test"]


def test_labels_decide_after_a_run_that_could_only_guess_numbers():
    """Outputs without labels are numbers until labels show otherwise; a regression that the user named stays one."""
    run = anybit.calibrate(Net(), X, "6bit", **QUICK)
    assert run.about["task"] == "regression"
    assert "top1" in run.evaluate((X, CLASSES)) and "f1" in run.evaluate((X, SEVERAL))
    named = anybit.calibrate(Net(), X, "6bit", task="regression", **QUICK)
    assert set(named.evaluate((X, SEVERAL.float()))) == {"samples", "loss"}
