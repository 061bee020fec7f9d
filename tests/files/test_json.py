"""Numbers that JSON cannot represent: a network that gives them is refused early, and no writer emits them."""

import ast
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import FAST, anybit_cli, write_inputs
from torch import nn

import anybit
from anybit.errors import AnybitError, UnsupportedModel
from anybit.files.strict import json_text, write_json

SOURCES = Path(anybit.__file__).parent
NET = """
import torch
class Scaled(torch.nn.Module):
    def __init__(self, by):
        super().__init__()
        self.conv, self.fc, self.by = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 5), by
    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3))) * self.by
def nan(): return Scaled(float("nan"))
def infinite(): return Scaled(float("inf"))
def late(): return Late(1.0)
def above():
    torch.manual_seed(0)
    return Above(1.0)
class Above(Scaled):
    def forward(self, x):
        return torch.where(x.amax((1, 2, 3))[:, None] > 50, torch.nan, super().forward(x))
class Late(Scaled):
    def forward(self, x):
        y = super().forward(x)
        return torch.where((x.mean((1, 2, 3)) == x.mean((1, 2, 3)).max())[:, None] & (len(x) > 8), torch.nan, y)
"""


@pytest.mark.parametrize("network", ["nan", "infinite"])
@pytest.mark.parametrize("verb", ["inspect", "calibrate", "grow", "train", "evaluate"])
def test_network_without_finite_outputs_is_refused_by_every_verb(network, verb, here):
    Path("n.py").write_text(NET)
    data = "--train" if verb in ("grow", "train") else "--data"
    more = {"calibrate": ["--budget", "6bit", *FAST], "grow": ["--budget", "6bit"]}.get(verb, [])
    output = [] if verb in ("inspect", "evaluate") else ["--output", "run"]
    done = anybit_cli(verb, "--model", f"n.py:{network}", data, "x.npz", *more, *output, "--json")
    assert done.exit_code == 2 and "outputs are NaN or infinite" in done.stderr and done.stderr.count("\n") == 1 and not done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run, its supernet and its exported file, of a network whose outputs are NaN for inputs above 50."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_inputs()
        Path("n.py").write_text(NET)
        net = ["--model", "n.py:above"]
        for line in (
            ["calibrate", *net, "--data", "x.npz", "--budget", "6bit", *FAST, "--output", "run"],
            ["train", *net, "--train", "x.npz", "--output", "super", "--epochs", "1", "--bits", "4,8", "--held-out", "0.5"],
            ["export", "run", "--onnx", "run.onnx", "--no-cache"],
        ):
            done = anybit_cli(*line, "--quiet")
            assert done.exit_code == 0, done.stderr
    return folder


VERBS = {
    "inspect": ["--no-cache"],
    "calibrate": ["--budget", "6bit", *FAST, "--output", "o"],
    "grow": ["--budget", "6bit", "--output", "o"],
    "train": ["--output", "o"],
    "evaluate": ["run"],
    "allocate": ["run", "--budget", "5bit", "--output", "o"],
    "search": ["super", "--output", "o"],
    "extract": ["super", "--budget", "6bit", "--output", "o"],
    "export": ["run", "--onnx", "o.onnx", "--no-cache"],
    "verify": ["run", "run.onnx", "--no-cache"],
    "bench": ["run", "--no-cache"],
    "profile": ["--no-cache"],
}


DRAWING = ("calibrate", "grow", "train", "allocate", "search", "extract")
"""Verbs that draw the samples that they read."""


@pytest.mark.parametrize("value", [math.nan, math.inf, 100.0])
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_inputs_and_outputs_that_are_not_finite_in_the_same_words(run, verb, value, monkeypatch):
    """A sample is named by its number in the data, in whatever order samples are drawn."""
    monkeypatch.chdir(run)
    arrays = dict(np.load("x.npz"))
    arrays["x"][1, 0, 0, 0] = value
    np.savez("bad.npz", **arrays)
    if verb in DRAWING:
        arrays["x"][:, 0, 0, 0] = value
        np.savez("bad.npz", **arrays)
    done = anybit_cli(
        verb, *VERBS[verb], "--model", "n.py:above", "--train" if verb in ("grow", "train") else "--data", "bad.npz", "--json"
    )
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and not done.stdout, done.stderr
    which = (
        r"[Ss]ample 1 of the data"
        if verb in ("inspect", "evaluate", "export", "verify", "bench", "profile")
        else r"[Ss]ample \d+ of the data"
    )
    assert re.search(which, done.stderr), done.stderr
    assert ("outputs are NaN or infinite" if value == 100 else "holds NaN or infinity") in done.stderr
    assert not Path("o").exists() and not Path("o.onnx").exists()


@pytest.mark.parametrize("verb", ["calibrate", "grow"])
def test_a_sample_is_named_by_its_number_in_the_data(run, verb, monkeypatch):
    monkeypatch.chdir(run)
    arrays = dict(np.load("x.npz"))
    arrays["x"][17, 0, 0, 0] = math.nan
    np.savez("bad.npz", **arrays)
    done = anybit_cli(verb, *VERBS[verb], "--model", "n.py:above", "--train" if verb == "grow" else "--data", "bad.npz", "--json")
    assert done.exit_code == 2 and "Sample 17 of the data holds NaN" in done.stderr, done.stderr


def test_evaluation_names_the_sample_whose_outputs_are_nan(here):
    Path("n.py").write_text(NET)
    done = anybit_cli("evaluate", "--model", "n.py:late", "--data", "x.npz", "--json")
    assert done.exit_code == 2 and "score loss is nan: the outputs are NaN or infinite on 1 samples" in done.stderr


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_writers_refuse_what_json_cannot_represent(value, tmp_path):
    for write in (json_text, lambda data: write_json(tmp_path / "a.json", data)):
        with pytest.raises(AnybitError, match=r"rows\.1\.loss is NaN or infinite"):
            write({"rows": [{"loss": 1.0}, {"loss": value}]})
    assert json.loads(json_text({"a": [1, None, "x", True]})) == {"a": [1, None, "x", True]}


def test_every_writer_uses_the_one_that_refuses():
    """Only digests, lengths and copies still use `json.dumps`."""
    calls = []
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps"):
                calls.append((path.relative_to(SOURCES).as_posix(), ast.unparse(node)))
    strict = [call for call in calls if "allow_nan=False" in call[1]]
    others = {place for place, _ in set(calls) - set(strict)}
    assert others <= {
        "files/strict.py", "files/cache.py", "loops/checkpoint.py", "numerics/packing.py", "onnx/latency.py", "onnx/traces.py",
        "runs/scheme_file.py",
    }  # fmt: skip


def test_network_is_refused_from_python_before_any_output():
    class Nothing(nn.Linear):
        def forward(self, x):
            return super().forward(x) * float("nan")

    with pytest.raises(UnsupportedModel, match="NaN or infinite on sample 0 of the data"):
        anybit.evaluate(nn.Sequential(nn.Linear(4, 4), Nothing(4, 2)), (torch.randn(4, 4), torch.zeros(4, dtype=torch.int64)))
