"""`anybit train`, `search` and `extract` from the command line."""

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
from anybit.methods.settings import MultiQuantSettings, SearchSettings
from anybit.supernets.settings import SupernetSettings


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a model script and labelled arrays."""
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(SCRIPT)
    x = images(60)
    with torch.no_grad():
        y = make(Residual)(x).argmax(1).numpy()
    np.savez("x.npz", x=x.numpy(), y=y)
    np.savez("unlabelled.npz", x=x.numpy())
    np.savez("one.npz", x=x.numpy()[:1], y=y[:1])
    return tmp_path


def train(*more: str, output: str = "supernet", train: str = "x.npz"):
    fixed = ["--model", "m.py:residual", "--train", train, "--output", output, "--epochs", "2", "--batch-size", "16"]
    return anybit_cli("train", *fixed, "--bits", "2,4,8", "--held-out", "0.3", "--bn-images", "32", *more)


def test_trains_searches_and_extracts(here):
    done = train("--test", "x.npz")
    assert done.exit_code == 0, done.stderr
    epochs = [line for line in done.stderr.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 2 and all(f"{bits} bits top1" in line for line in epochs for bits in (2, 4, 8))
    assert sorted(os.listdir("supernet")) == ["fingerprint.safetensors", "report.json", "supernet.json", "supernet.safetensors"]
    searched = anybit_cli("search", "supernet", "--evaluations", "20", "--budget", "3bit", "--budget", "5bit", "--output", "found")
    assert searched.exit_code == 0, searched.stderr
    assert "hypervolume" in searched.stdout and "3bit: " in searched.stdout
    assert sorted(os.listdir("found")) == [
        "fingerprint.safetensors",
        "report.html",
        "report.json",
        "search.json",
        "supernet.json",
        "supernet.safetensors",
    ]
    again = one_json_object(
        anybit_cli("search", "supernet", "--evaluations", "20", "--budget", "4bit", "--output", "other", "--json").stdout
    )
    assert again["recalled"] > 1 and again["budgets"]["4bit"]["weight_bits"] <= 4
    extracted = anybit_cli("extract", "found", "--budget", "3bit", "--test", "x.npz", "--output", "run", "--json")
    report = one_json_object(extracted.stdout)
    assert report["result"]["weight_bits"] <= 3
    scores = anybit_cli("evaluate", "run", "--data", "x.npz", "--json")
    assert one_json_object(scores.stdout)["top1"] == pytest.approx(report["test"]["top1"])
    polished = anybit_cli(
        "extract", "supernet", "--scheme", "run", "--data", "x.npz", "--polish", "--samples", "40", "--steps", "5", "--output", "polished"
    )
    assert polished.exit_code == 0, polished.stderr
    assert anybit.load("polished").scheme == anybit.load("run").scheme


def test_page_shows_every_evaluated_scheme(here):
    trained = train("--quiet")
    assert trained.stdout == "supernet: a supernet of 2 bits, 4 bits, 8 bits\n" and trained.stderr == ""
    assert anybit_cli("search", "supernet", "--evaluations", "15", "--output", "found", "--quiet").exit_code == 0
    report = json.loads(Path("found/search.json").read_text())
    page = Path("found/report.html").read_text(encoding="utf8")
    assert 'src="http' not in page and len(report["evaluated"]) == 15
    for row in report["evaluated"]:
        assert f"<title>{' '.join(f'{name} {precision}' for name, precision in row['scheme'].items())}, " in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "4"], "at least two"),
        (["--bits", "2,float"], "only bit-widths"),
        (["--bits", "2,9"], "outside 2..8"),
        (["--sandwich", "X"], "HRL"),
        (["--label", "soft"], "adaptive"),
        (["--step-rates", "2:1"], "2=0.1"),
        (["--bn-images", "1"], "too few"),
        (["--batch-norm", "switch", "--compile"], "compiled"),
        (["--keep", "nothing=W8A8"], "matches no"),
        (["--train", "unlabelled.npz"], "labels"),
        (["--train", "one.npz"], "two"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_to_train_exits_with_status_2_and_one_line(arguments, message, here):
    before = sorted(os.listdir())
    done = train(*arguments)
    assert done.exit_code == 2, done.exception
    lines = [line for line in done.stderr.splitlines() if line.startswith("anybit: ")]
    assert len(lines) == 1 and message in lines[0], done.stderr
    assert sorted(os.listdir()) == before


def test_bad_input_to_search_and_extract_exits_with_status_2_and_one_line(here):
    assert train().exit_code == 0
    Path("scheme.json").write_text(json.dumps({"fc": "W3A8"}))
    Path("list.json").write_text("[1]")
    before = sorted(os.listdir())
    for verb, arguments, message in (
        ("search", ["--budget", "1bit"], "smallest subnet"),
        ("search", ["--budget", "many"], "cannot be read"),
        ("search", ["--strategy", "luck"], "monte-carlo"),
        ("search", ["--data", "unlabelled.npz"], "labels"),
        ("extract", ["--budget", "1bit"], "smallest subnet"),
        ("extract", [], "a budget or a scheme"),
        ("extract", ["--scheme", "scheme.json"], "not trained at W3A8"),
        ("extract", ["--scheme", "list.json"], "not a scheme"),
        ("extract", ["--budget", "3bit", "--polish"], "--data"),
    ):
        done = anybit_cli(verb, "supernet", *arguments, "--output", "out")
        lines = [line for line in done.stderr.splitlines() if line.startswith("anybit: ")]
        assert done.exit_code == 2 and len(lines) == 1 and message in lines[0], (verb, arguments, done.stderr, done.exception)
    assert sorted(os.listdir()) == before


def test_command_line_defaults_equal_settings_defaults():
    commands = typer.main.get_command(app).commands
    exceptions = {"bits": "2,4,6,8", "keep": None, "outputs": None, "task": None, "step_rates": None, "per_channel": False}
    # `per_channel` is --per-tensor there
    for verb, kinds in (("train", (SupernetSettings, MultiQuantSettings, TrainSettings)), ("search", (SearchSettings,))):
        options = {option.name: option.default for option in commands[verb].params}
        for kind in kinds:
            for field in dataclasses.fields(kind):
                name = field.name
                if name in options and field.name != "train":  # that is the data
                    assert str(options[name]) == str(exceptions.get(field.name, getattr(kind(), field.name))), (
                        field.name
                    )  # a number is read as text
