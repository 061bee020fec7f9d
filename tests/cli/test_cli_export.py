"""The export verbs from the command line, on runs of all three roads: exit status, one line for each error, one JSON object."""

import json
from pathlib import Path

import onnx
import pytest
from commands import FAST, anybit_cli, write_inputs
from onnx import numpy_helper

CALIBRATE = ["calibrate", "--model", "m.py:residual", "--data", "x.npz", *FAST, "--budget", "6bit", "--output", "run"]


def exported():
    assert anybit_cli(*CALIBRATE).exit_code == 0
    assert anybit_cli("export", "run", "--onnx", "net.onnx").exit_code == 0


@pytest.fixture(scope="module")
def exported_folder(tmp_path_factory):
    """A working folder with a run and its file, for tests that only read them."""
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        write_inputs()
        exported()
    return folder


@pytest.fixture
def exported_here(exported_folder, monkeypatch):
    """That folder as the working folder, in the home of whoever wrote it."""
    monkeypatch.chdir(exported_folder)
    monkeypatch.setenv("XDG_STATE_HOME", str(exported_folder / "state"))


def test_a_run_is_exported_verified_and_timed(exported_here):
    told = anybit_cli("verify", "run", "net.onnx", "--data", "x.npz", "--json")
    found = json.loads(told.stdout)
    assert told.exit_code == 0 and found["ok"] and found["inputs"] == 24 and set(found["accuracy"]) == {"simulated", "exported"}
    shown = anybit_cli("verify", "run", "net.onnx")
    assert shown.exit_code == 0 and "verified" in shown.stdout and "integer kernels" in shown.stdout
    timed = anybit_cli("bench", "run", "net.onnx", "--rounds", "1", "--json")
    assert json.loads(timed.stdout)["bytes"] == Path("net.onnx").stat().st_size
    assert "float32" in anybit_cli("bench", "run", "--rounds", "1").stdout


@pytest.mark.filterwarnings("ignore:.*takes no more.*what it finishes is not kept")
def test_what_a_full_disk_does_not_take_is_named_and_the_file_before_stays(here, full_disk):
    exported()
    before = Path("net.onnx").read_bytes()
    with full_disk():
        told = anybit_cli("export", "run", "--onnx", "net.onnx", "--overwrite")
        profiled = anybit_cli("profile", "--model", "m.py:net", "--data", "x.npz", "--rounds", "1")
    assert told.exit_code == 2 and told.stderr.splitlines()[-1].startswith("anybit: net.onnx cannot be written: ")
    assert "--onnx" in told.stderr and Path("net.onnx").read_bytes() == before and not list(here.rglob(".net*"))
    assert profiled.exit_code == 2 and "TMPDIR" in profiled.stderr.splitlines()[-1]


def test_a_broken_promise_is_exit_status_one(exported_here, tmp_path):
    model = onnx.load("net.onnx")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("bias_codes"))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 900, tensor.name))
    onnx.save(model, tmp_path / "broken.onnx")
    told = anybit_cli("verify", "run", str(tmp_path / "broken.onnx"))
    assert told.exit_code == 1 and tensor.name in told.stdout and "not verified" in told.stdout


def test_profile_measures_once(here):
    arguments = ["profile", "--model", "m.py:net", "--data", "x.npz", "--rounds", "1"]
    assert "int8" in anybit_cli(*arguments).stdout
    assert json.loads(anybit_cli(*arguments, "--json").stdout)["recalled"]
    assert not json.loads(anybit_cli(*arguments, "--json", "--overwrite").stdout)["recalled"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "nowhere", "--onnx", "a.onnx"], "nowhere is not there"),
        (["export", "run", "--onnx", "net.onnx"], "--overwrite"),
        (["export", "run", "--onnx", "b.onnx", "--data", "wide.npz"], "refuses"),
        (["export", "run", "--onnx", "b.onnx", "--data", "empty.npz"], "empty"),
        (["export", "run", "--onnx", "b.onnx", "--model", "m.py:net"], "m.py|residual|layer"),
        (["verify", "run", "nowhere.onnx"], "not there"),
        (["verify", "run", "x.npz"], "ONNX"),
        (["bench", "run", "x.npz"], "ONNX"),
        (["profile", "--model", "m.py:net"], "--data"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line(arguments, words, exported_here):
    told = anybit_cli(*arguments)
    message = told.stderr.strip()
    assert told.exit_code == 2 and len(message.splitlines()) == 1 and any(word in message for word in words.split("|")), message
    assert not Path("a.onnx").exists() and not Path("b.onnx").exists()


def test_grown_and_extracted_runs_are_exported(here):
    trained = ["--train", "x.npz", "--batch-size", "8", "--quiet"]
    assert anybit_cli("grow", "--model", "m.py:residual", *trained, "--epochs", "2", "--budget", "4bit", "--output", "grown").exit_code == 0
    supernet = ["train", "--model", "m.py:residual", *trained, "--epochs", "1", "--bits", "2,4,8", "--output", "super"]
    assert anybit_cli(*supernet).exit_code == 0
    Path("s.json").write_text(json.dumps(dict.fromkeys(json.loads(Path("grown/scheme.json").read_text())["layers"], "W2A4")))
    assert anybit_cli("extract", "super", "--scheme", "s.json", "--data", "x.npz", "--output", "subnet", "--quiet").exit_code == 0
    for folder in ("grown", "subnet"):
        assert anybit_cli("export", folder, "--onnx", f"{folder}.onnx", "--data", "x.npz").exit_code == 0
        told = anybit_cli("verify", folder, f"{folder}.onnx", "--data", "x.npz", "--json")
        assert told.exit_code == 0, told.stdout
