"""`anybit grow` from the command line."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from commands import SCRIPT, anybit_cli, one_json_object
from networks import Residual, images, make

import anybit
from anybit.cli.app import app
from anybit.loops.settings import TrainSettings
from anybit.methods.settings import CSQSettings
from anybit.roads.settings import GrowSettings


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a model script and labelled arrays."""
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(SCRIPT)
    x = images(32)
    with torch.no_grad():
        y = make(Residual)(x).argmax(1).numpy()
    np.savez("x.npz", x=x.numpy(), y=y)
    np.savez("unlabelled.npz", x=x.numpy())
    np.savez("empty.npz", x=x.numpy()[:0], y=y[:0])
    np.savez("nan.npz", x=np.full_like(x.numpy(), np.nan), y=y)
    return tmp_path


def grow(*more: str, output: str = "run", train: str = "x.npz"):
    fixed = ["--model", "m.py:residual", "--train", train, "--output", output, "--epochs", "2", "--batch-size", "16"]
    return anybit_cli("grow", *fixed, *more)


def test_grow_writes_a_run_that_loads_without_the_model(here):
    done = grow("--budget", "3bit", "--test", "x.npz", "--activation-bits", "4")
    assert done.exit_code == 0, done.stderr
    report = json.loads(Path("run/report.json").read_text())
    assert report["result"]["weight_bits"] <= 3 and report["result"]["bytes"] == Path("run/model.safetensors").stat().st_size
    assert sorted(os.listdir("run")) == ["fingerprint.safetensors", "model.safetensors", "report.html", "report.json", "scheme.json"]
    certificate = json.loads(Path("run/scheme.json").read_text())["certificate"]
    assert certificate["objective"] == "likeliest planes" and certificate["bound"] <= certificate["value"]
    assert "Bits of each layer" in done.stdout and done.stdout.splitlines()[-1].startswith("run: ")
    epochs = [line for line in done.stderr.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 2 and all("frozen top1" in line and "bits" in line and "temperature" in line for line in epochs)
    scores = anybit_cli("evaluate", "run", "--data", "x.npz", "--json")
    assert one_json_object(scores.stdout)["top1"] == pytest.approx(report["test"]["top1"])
    assert {precision.activation_bits for precision in anybit.load("run").scheme.values()} == {4}


def test_trains_the_scheme_of_a_run(here):
    assert grow("--budget", "3bit", output="first").exit_code == 0
    assert grow("--scheme", "first", "--quiet", output="second").exit_code == 0
    assert anybit.load("first").scheme == anybit.load("second").scheme


def test_the_method_follows_from_the_scheme_and_is_recorded(here):
    assert grow("--budget", "3bit", "--method", "csq", "--quiet", output="first").exit_code == 0
    assert grow("--scheme", "first", "--quiet", output="second").exit_code == 0
    assert [json.loads(Path(run, "report.json").read_text())["settings"]["method"] for run in ("first", "second")] == ["csq", "lsq"]


@pytest.mark.parametrize(
    ("method", "options", "remedy"),
    [
        ("lsq", ["--budget", "3bit"], "Method lsq trains a scheme: give one with --scheme=RUN, or choose --method=csq or --method=msq."),
        ("csq", ["--scheme", "first"], "Method csq grows a scheme of its own: leave out --scheme, or choose --method=lsq."),
        ("msq", ["--scheme", "first"], "Method msq grows a scheme of its own: leave out --scheme, or choose --method=lsq."),
        ("qat", ["--budget", "3bit"], "method 'qat' is unknown. Choose from csq, msq or lsq."),
    ],
)
def test_rejects_unsuitable_method_with_a_remedy(here, folders, method, options, remedy):
    Path("first").symlink_to(folders["grown"])
    done = grow("--method", method, *options)
    assert done.exit_code == 2 and remedy in " ".join(done.stderr.split())


def test_json_is_one_object_on_stdout_alone(here):
    done = grow("--budget", "3bit", "--json")
    assert one_json_object(done.stdout)["result"]["weight_bits"] <= 3 and not done.stderr


def test_interrupted_training_resumes_and_rejects_other_settings(here, monkeypatch):
    from anybit.loops.checkpoint import save_checkpoint

    assert grow("--budget", "3bit", output="whole").exit_code == 0
    save = save_checkpoint

    def interrupted(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("anybit.loops.training.save_checkpoint", interrupted)
        assert grow("--budget", "3bit").exit_code == 130
    assert os.listdir("run") == ["checkpoint.safetensors"]
    other = grow("--budget", "4bit")
    assert other.exit_code == 2 and "3bit" in other.stderr and "4bit" in other.stderr
    calibrating = anybit_cli("calibrate", "--model", "m.py:residual", "--data", "x.npz", "--output", "run")
    assert calibrating.exit_code == 2 and "unfinished training" in calibrating.stderr
    assert grow("--budget", "3bit").exit_code == 0
    assert Path("run/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    assert sorted(os.listdir("run")) == ["fingerprint.safetensors", "model.safetensors", "report.html", "report.json", "scheme.json"]
    finished = grow("--budget", "3bit")
    assert finished.exit_code == 2 and "--overwrite" in finished.stderr


def test_resumed_training_may_add_test_data(here, monkeypatch):
    from anybit.loops.checkpoint import save_checkpoint

    save = save_checkpoint
    with monkeypatch.context() as patched:
        patched.setattr(
            "anybit.loops.training.save_checkpoint", lambda *arguments: [save(*arguments), (_ for _ in ()).throw(KeyboardInterrupt)]
        )
        assert grow("--budget", "3bit").exit_code == 130
    done = grow("--budget", "3bit", "--test", "x.npz")
    assert done.exit_code == 0, done.exception
    assert "frozen top1" in done.stdout and "frozen" not in json.loads(Path("run/report.json").read_text())["epochs"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "1bit"], "bind"),
        (["--budget", "9bit"], "all planes need"),
        (["--budget", "bops=1M"], "bits or bytes"),
        ([], "--budget"),
        (["--budget", "3bit", "--scheme", "other"], "not both"),
        (["--scheme", "nowhere"], "nowhere"),
        (["--budget", "3bit", "--activation-bits", "9"], "outside 2..8"),
        (["--budget", "3bit", "--activation-bits", "4,8"], "one number"),
        (["--budget", "3bit", "--planes", "8"], "1..7"),
        (["--budget", "3bit", "--epochs", "0"], "outside 1.."),
        (["--budget", "3bit", "--augment", "twirl"], "twirl"),
        (["--budget", "3bit", "--phase", "none"], "restart, rewind or continue"),
        (["--budget", "3bit", "--keep", "nothing=W8A8"], "matches no"),
        (["--budget", "3bit", "--train", "empty.npz"], "empty"),
        (["--budget", "3bit", "--train", "unlabelled.npz"], "--distill"),
        (["--budget", "3bit", "--train", "nan.npz"], "NaN"),
        (["--budget", "3bit", "--test", "unlabelled.npz"], "labels"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_exits_with_status_2_and_one_line(arguments, message, here):
    Path("other").mkdir()
    Path("other/scheme.json").touch()
    before = sorted(os.listdir())
    done = grow(*arguments)
    assert done.exit_code == 2, done.exception
    lines = [line for line in done.stderr.splitlines() if line.startswith("anybit: ")]
    assert len(lines) == 1 and message in lines[0], done.stderr
    assert sorted(os.listdir()) == before


def test_command_line_defaults_equal_settings_defaults():
    options = {option.name: option.default for option in typer.main.get_command(app).commands["grow"].params}
    exceptions = {"activation_bits": str(GrowSettings().activation_bits), "keep": None, "outputs": None, "task": None}
    for kind in (CSQSettings, TrainSettings, GrowSettings):
        for field in dataclasses.fields(kind):
            name = field.name
            if name in options and field.name != "train":  # that is the data
                assert str(options[name]) == str(exceptions.get(field.name, getattr(kind(), field.name))), (
                    field.name
                )  # a number is read as text
