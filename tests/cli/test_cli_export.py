"""The export verbs from the command line, on runs of all three roads: exit status, one line per error, one JSON object."""

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
    """That folder as the working folder, with the home folder in which it was written."""
    monkeypatch.chdir(exported_folder)
    monkeypatch.setenv("XDG_STATE_HOME", str(exported_folder / "state"))


def test_exports_verifies_and_times_a_run(exported_here):
    done = anybit_cli("verify", "run", "net.onnx", "--data", "x.npz", "--json")
    report = json.loads(done.stdout)
    assert done.exit_code == 0 and report["ok"] and report["inputs"] == 24 and set(report["accuracy"]) == {"simulated", "exported"}
    shown = anybit_cli("verify", "run", "net.onnx")
    assert shown.exit_code == 0 and "verified" in shown.stdout and "integer kernels" in shown.stdout
    timed = anybit_cli("bench", "run", "net.onnx", "--rounds", "1", "--json")
    assert json.loads(timed.stdout)["bytes"] == Path("net.onnx").stat().st_size
    assert "float32" in anybit_cli("bench", "run", "--rounds", "1").stdout


@pytest.mark.filterwarnings("ignore:.*cannot be written to.*its results are not stored")
def test_full_disk_error_names_the_file_and_keeps_the_previous_one(here, full_disk):
    exported()
    before = Path("net.onnx").read_bytes()
    with full_disk():
        done = anybit_cli("export", "run", "--onnx", "net.onnx", "--overwrite")
        profiled = anybit_cli("profile", "--model", "m.py:net", "--data", "x.npz", "--rounds", "1")
    assert done.exit_code == 2 and done.stderr.splitlines()[-1].startswith("anybit: net.onnx cannot be written: ")
    assert "--onnx" in done.stderr and Path("net.onnx").read_bytes() == before and not list(here.rglob(".net*"))
    assert profiled.exit_code == 2 and "TMPDIR" in profiled.stderr.splitlines()[-1]


def test_failed_verification_exits_with_status_1(exported_here, tmp_path):
    model = onnx.load("net.onnx")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("bias_codes"))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 900, tensor.name))
    onnx.save(model, tmp_path / "broken.onnx")
    done = anybit_cli("verify", "run", str(tmp_path / "broken.onnx"))
    assert done.exit_code == 1 and tensor.name in done.stdout and "not verified" in done.stdout


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
    done = anybit_cli(*arguments)
    message = done.stderr.strip()
    assert done.exit_code == 2 and len(message.splitlines()) == 1 and any(word in message for word in words.split("|")), message
    assert not Path("a.onnx").exists() and not Path("b.onnx").exists()


def test_exports_grown_and_extracted_runs(here):
    trained = ["--train", "x.npz", "--batch-size", "8", "--quiet"]
    assert anybit_cli("grow", "--model", "m.py:residual", *trained, "--epochs", "2", "--budget", "4bit", "--output", "grown").exit_code == 0
    supernet = ["train", "--model", "m.py:residual", *trained, "--epochs", "1", "--bits", "2,4,8", "--output", "super"]
    assert anybit_cli(*supernet).exit_code == 0
    Path("s.json").write_text(json.dumps(dict.fromkeys(json.loads(Path("grown/scheme.json").read_text())["layers"], "W2A4")))
    assert anybit_cli("extract", "super", "--scheme", "s.json", "--data", "x.npz", "--output", "subnet", "--quiet").exit_code == 0
    for folder in ("grown", "subnet"):
        assert anybit_cli("export", folder, "--onnx", f"{folder}.onnx", "--data", "x.npz").exit_code == 0
        done = anybit_cli("verify", folder, f"{folder}.onnx", "--data", "x.npz", "--json")
        assert done.exit_code == 0, done.stdout
