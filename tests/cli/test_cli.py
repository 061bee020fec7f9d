import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from commands import FAST, anybit_cli, one_json_object
from networks import Chain, images, make

import anybit
from anybit.budget import parse_size
from anybit.cli.app import VERBS, app
from anybit.cli.help import examples_in
from anybit.cli.options import Verb
from anybit.errors import InvalidSetting
from anybit.roads.settings import CalibrateSettings
from anybit.settings import PANELS, without_none

DESCRIBED = {function.__name__: Verb.of(function, *more) for function, more in VERBS.items()}
TESTS = Path(__file__).parent.parent


def calibrate(*more: str, model: str = "m.py:net", data: str = "x.npz", output: str = "run"):
    return anybit_cli("calibrate", "--model", model, "--data", data, "--output", output, *FAST, *more)


def test_calibrate_writes_a_run_that_loads_without_the_model(here):
    done = calibrate("--budget", "6bit", "--test", "x.npz")
    assert done.exit_code == 0, done.stderr
    report = json.loads(Path("run/report.json").read_text())
    assert report["result"]["bytes"] == Path("run/model.safetensors").stat().st_size and report["result"]["weight_bits"] <= 6
    assert done.stdout.splitlines()[-1].startswith("run: ") and "test top-1" in done.stdout
    certificate = json.loads(Path("run/scheme.json").read_text())["certificate"]
    assert set(certificate) == {"solver", "objective", "value", "bound", "gap", "predicted_loss", "seed", "chosen"}
    assert certificate["seed"] == 0 and certificate["predicted_loss"] == pytest.approx(certificate["value"])
    model = anybit.load("run")
    scores = anybit_cli("evaluate", "run", "--data", "x.npz", "--json")
    assert one_json_object(scores.stdout)["top1"] == pytest.approx(report["test"]["top1"])
    assert model.scheme.keys() == {"conv1", "conv2", "fc"}


def test_run_loads_from_another_working_folder(here, monkeypatch):
    assert calibrate("--budget", "6bit").exit_code == 0
    monkeypatch.chdir("/")
    assert anybit.load(here / "run").scheme
    assert anybit_cli("allocate", str(here / "run"), "--budget", "5bit", "--output", str(here / "second"), "--quiet").exit_code == 0


def test_command_and_function_write_identical_runs(here):
    assert calibrate("--budget", "6bit", "--keep", "fc=W8A8", "--seed", "3").exit_code == 0
    settings = {"pipeline": "light", "weight_bits": (4, 8), "activation_bits": (8,), "samples": 24}
    keep = {"fc": anybit.Precision(8, 8)}
    anybit.calibrate("m.py:net", "x.npz", "6bit", keep=keep, seed=3, **settings).save("twin")
    for name in ("model.safetensors", "scheme.json"):
        assert Path("run", name).read_bytes() == Path("twin", name).read_bytes()
    assert json.loads(Path("twin/scheme.json").read_text())["model"]["reference"] == f"{here / 'm.py'}:net"


def test_run_of_the_function_loads_from_another_working_folder(here, monkeypatch):
    torch.save(make(Chain, seed=5).state_dict(), "w.pt")
    result = anybit.calibrate("m.py:net", "x.npz", None, weights="w.pt", pipeline="light", samples=24)
    result.save("run")
    monkeypatch.chdir("/")
    assert torch.equal(anybit.load(here / "run")(images(2)), result.model(images(2)))
    assert anybit.allocate(here / "run", "5bit").scheme


def test_rejects_weights_with_a_network_object(here):
    with pytest.raises(anybit.InvalidSetting, match=r"w\.pt"):
        anybit.calibrate(make(Chain), "x.npz", None, weights="w.pt")


def test_json_is_one_object_on_stdout_alone(here):
    objects = {
        "calibrate": calibrate("--budget", "6bit", "--json"),
        "allocate": anybit_cli("allocate", "run", "--budget", "5bit", "--output", "second", "--json"),
        "evaluate": anybit_cli("evaluate", "run", "--data", "x.npz", "--json"),
        "evaluate float": anybit_cli("evaluate", "--model", "m.py:net", "--data", "x.npz", "--json"),
        "inspect": anybit_cli("inspect", "--model", "m.py:net", "--data", "x.npz", "--json"),
    }
    for verb, done in objects.items():
        assert done.exit_code == 0, (verb, done.stderr)
        one_json_object(done.stdout)
    assert one_json_object(objects["evaluate float"].stdout)["top1"] == 100.0
    assert set(one_json_object(objects["inspect"].stdout)["layers"]) == {"conv1", "conv2", "fc"}


def test_json_of_several_budgets_is_one_object(here):
    done = calibrate("--budget", "5bit", "--budget", "6bit", "--json")
    assert done.exit_code == 0, done.stderr
    summary = one_json_object(done.stdout)
    assert list(summary) == ["runs"]
    assert [(one["folder"], one["budget"]) for one in summary["runs"]] == [("run/5bit", "5bit"), ("run/6bit", "6bit")]
    for one in summary["runs"]:
        assert one["result"]["bytes"] == Path(one["folder"], "model.safetensors").stat().st_size
    assert {path.name for path in Path("run").iterdir()} == {"5bit", "6bit", "report.json", "report.html"}
    assert anybit.load("run/5bit").scheme


def test_report_puts_several_runs_on_one_page(here):
    assert calibrate("--budget", "5bit").exit_code == 0
    assert anybit_cli("allocate", "run", "--budget", "4bit", "--output", "second", "--quiet").exit_code == 0
    done = anybit_cli("report", "run", "second", "--output", "both.html")
    assert done.exit_code == 0 and done.stdout == "both.html\n", done.stderr
    page = Path("both.html").read_text(encoding="utf8")
    assert "2 runs side by side" in page and page.count('type="range" id=') == 1
    for arguments, words in ((["run"], "--overwrite"), (["run", "m.py", "--overwrite"], "m.py is a file")):
        again = anybit_cli("report", *arguments, "--output", "both.html")
        assert again.exit_code == 2 and words in again.stderr and again.stderr.count("\n") == 1
    assert Path("both.html").read_text(encoding="utf8") == page


def test_quiet_prints_only_the_result(here):
    done = calibrate("--budget", "6bit", "--quiet")
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1
    done = calibrate("--budget", "6bit", "--budget", "5bit", "--quiet", "--overwrite")
    assert done.stderr == "" and [line.split(":")[0] for line in done.stdout.splitlines()] == ["run/6bit", "run/5bit"]


def test_allocate_takes_the_common_options(here):
    assert calibrate("--budget", "6bit").exit_code == 0
    common = ["--device", "cpu", "--batch-size", "5", "--memory", "1MiB", "--metric", "m.py:ones", "--threads", "1"]
    done = anybit_cli("allocate", "run", "--budget", "drop=0.1%", "--output", "second", "--json", *common)
    assert done.exit_code == 0, done.stderr
    report = json.loads(Path("second/report.json").read_text())
    assert (report["settings"]["batch_size"], report["settings"]["memory"]) == (5, 2**20)
    assert report["result"]["weight_bits"] < 4.1 and all(row["metric"] == 1.0 for row in report["ladder"])
    third = anybit_cli("allocate", "second", "--budget", "6bit", "--output", "third", "--json")  # the run's own settings
    assert json.loads(Path("third/report.json").read_text())["settings"]["batch_size"] == CalibrateSettings().batch_size, third.stderr


def test_allocate_notes_that_the_recorded_data_have_changed(here):
    assert calibrate("--budget", "6bit").exit_code == 0
    assert "have changed" not in anybit_cli("allocate", "run", "--budget", "5bit", "--output", "same").stderr
    other = np.load("x.npz")
    x, y = other["x"][::-1] * 2, other["y"]
    np.savez("x.npz", x=x, y=y)
    done = anybit_cli("allocate", "run", "--budget", "5bit", "--output", "changed")
    assert done.exit_code == 0 and "the data have changed since run was made" in " ".join(done.stderr.split())
    assert "the data have changed" in json.loads(Path("changed/report.json").read_text())["notes"][0]


def test_inspect_takes_the_common_options(here):
    whole = anybit_cli("inspect", "--model", "m.py:net", "--data", "x.npz", "--threads", "1")
    quiet = anybit_cli("inspect", "--model", "m.py:net", "--data", "x.npz", "--quiet")
    assert "conv2" in whole.stdout and "conv2" not in quiet.stdout and quiet.stderr == ""
    assert quiet.stdout.strip() and whole.stdout.endswith(quiet.stdout)


def test_rejects_network_without_gradients_only_where_needed(here):
    refused = calibrate("--pipeline", "advanced", model="m.py:without_gradients")
    assert refused.exit_code == 2 and "gradient" in refused.stderr and not Path("run").exists()
    assert calibrate("--budget", "6bit", model="m.py:without_gradients").exit_code == 0
    for verb, *more in (["inspect"], ["inspect", "--data", "x.npz"], ["profile", "--data", "x.npz", "--rounds", "1"]):
        done = anybit_cli(verb, "--model", "m.py:without_gradients", *more, "--json")
        assert done.exit_code == 0, done.stderr
        assert set(one_json_object(done.stdout)["layers"]) == {"conv1", "conv2", "fc"}


def test_inspect_names_its_stages_without_a_terminal(here):
    inspect = ["inspect", "--model", "m.py:net", "--data", "x.npz"]
    assert [line.split()[3] for line in anybit_cli(*inspect).stderr.splitlines()] == ["observe", "trial"]
    assert "trial" not in anybit_cli(*inspect, "--no-export").stderr and not anybit_cli(*inspect, "--quiet").stderr


def test_inspect_without_data_names_what_needs_data(here):
    seen = anybit_cli("inspect", "--model", "m.py:net", "--data", "x.npz")
    unseen = anybit_cli("inspect", "--model", "m.py:net")
    assert unseen.exit_code == 0, unseen.stderr
    for text in ("conv2", "8x8x3x3", "W4", "% of float"):
        assert text in seen.stdout and text in unseen.stdout
    assert "3x8x8" in seen.stdout and "BOPs" in seen.stdout.split("Whole network")[1]
    assert [line for line in unseen.stdout.splitlines() if "--data" in line] == unseen.stdout.splitlines()[-1:]
    assert one_json_object(anybit_cli("inspect", "--model", "m.py:net", "--json").stdout)["layers"]["fc"]["input"] is None


def test_help_shows_every_default():
    for verb in ("calibrate", "allocate", "evaluate", "inspect"):
        done = anybit_cli(verb, "--help")
        assert done.exit_code == 0 and "--model" in done.stdout
    assert all(default in anybit_cli("calibrate", "--help-all").stdout for default in ("2,3,4,6,8", "4,6,8", "1024", "advanced", "2GiB"))


def test_rejects_existing_run_without_overwrite(here):
    assert calibrate("--budget", "6bit").exit_code == 0
    before = Path("run/scheme.json").read_bytes()
    refused = calibrate("--budget", "5bit")
    assert refused.exit_code == 2 and "--overwrite" in refused.stderr and Path("run/scheme.json").read_bytes() == before
    assert calibrate("--budget", "5bit", "--overwrite").exit_code == 0
    assert Path("run/scheme.json").read_bytes() != before


def test_reports_custom_metric(here):
    done = anybit_cli("evaluate", "--model", "m.py:net", "--data", "x.npz", "--metric", "m.py:ones", "--json")
    assert one_json_object(done.stdout)["ones"] == 1.0


def test_drop_budget_uses_the_custom_metric(here):
    done = calibrate("--budget", "drop=0.1%", "--metric", "m.py:ones", "--json")  # the metric is constant: the smallest scheme meets it
    assert done.exit_code == 0, done.stderr
    assert one_json_object(done.stdout)["result"]["weight_bits"] < 4.1
    assert calibrate("--budget", "drop=0.1%", "--metric", "m.py:fewer", "--overwrite").exit_code == 2


# arguments -> words of the one line on stderr
BAD = {
    "nan weight": (["--model", "m.py:nan"], r"conv2.weight"),
    "infinite activation": (["--model", "m.py:hot"], "conv1: the weight"),
    "nan input": (["--data", "nan.npz"], "NaN or infinity"),
    "no input": (["--data", "empty.npz"], "empty"),
    "one input": (["--data", "one.npz"], "at least 2"),
    "wrong shape": (["--data", "wide.npz"], "(2, 4, 8, 8)"),
    "wrong rank": (["--data", "vectors.npz"], "(2, 4)"),
    "budget below the minimum": (["--budget", "1bit"], "raise the budget to"),
    "bytes below the minimum": (["--budget", "100B"], "bind"),
    "budget above float": (["--budget", "33bit"], "above the float"),
    "bytes above float": (["--budget", "1GB"], "above the float"),
    "budget grammar": (["--budget", "four bits"], "four bits"),
    "budget of nothing": (["--budget", "0bit"], "above zero"),
    "one bit": (["--weight-bits", "1,4"], "outside 2..8"),
    "nine bits": (["--activation-bits", "9"], "outside 2..8"),
    "bits grammar": (["--weight-bits", "four"], "--weight-bits"),
    "no bits": (["--weight-bits", ""], "--weight-bits"),
    "float weights": (["--weight-bits", "float"], "is not a bit-width of weights"),
    "no layer": (["--model", "m.py:hollow"], "no layer to quantize"),
    "other weights": (["--weights", "other.pt"], "conv1.weight"),
    "broken weights": (["--weights", "broken.pt"], "broken.pt"),
    "no weights file": (["--weights", "nowhere.pt"], "nowhere.pt"),
    "no model": (["--model", "m.py:nets"], "nets"),
    "no script": (["--model", "n.py:net"], "n.py"),
    "no data": (["--data", "nowhere.npz"], "nowhere.npz"),
    "keep nothing": (["--keep", "cnv*=W8A8"], "cnv*"),
    "keep grammar": (["--keep", "fc"], "fc"),
    "keep precision": (["--keep", "fc=W1"], "outside 2..8"),
    "unknown block": (["--block", "b1"], "b1"),
    "batch size": (["--batch-size", "0"], "batch"),
    "workers": (["--workers", "-1"], "workers"),
    "threads": (["--threads", "0"], "--threads"),
    "held out": (["--held-out", "1.5"], "held"),
    "memory": (["--memory", "lots"], "lots"),
    "task": (["--task", "poetry"], "poetry"),
    "prior": (["--bn-prior", "1.5"], "prior"),
    "sensitivity base": (["--sensitivity-base", "W9A8"], "9"),
    "mean": (["--mean", "a,b"], "--mean"),
    "mean of other channels": (["--mean", "0.1,0.2"], "3 channels"),
    "mean of vectors": (["--data", "vectors.npz", "--mean", "0.1"], "images"),
    "labels of other classes": (["--data", "labels.npz"], "5 classes"),
    "size of arrays": (["--size", "8"], "--size"),
    "unlabelled drop": (["--data", "unlabelled.npz", "--budget", "drop=1%"], "label"),
    "unlabelled test": (["--test", "unlabelled.npz"], "label"),
    "test of another shape": (["--test", "wide.npz"], "8, 8"),
    "test with other classes": (["--test", "labels.npz"], "5 classes"),
    "latency without a table": (["--budget", "latency=3ms"], "latency"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_exits_with_status_2_and_one_line(case, here):
    arguments, message = BAD[case]
    torch.save(torch.nn.Linear(2, 2).state_dict(), "other.pt")
    Path("broken.pt").write_bytes(b"garbage")
    before = sorted(os.listdir())
    done = calibrate("--quiet", *arguments)
    assert done.exit_code == 2, done.exception
    assert done.stdout == "" and done.stderr.startswith("anybit: ") and len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "run", "--data", "wide.npz"], "8, 8"),
        (["evaluate", "run", "--data", "unlabelled.npz"], "label"),
        (["evaluate", "run", "--data", "empty.npz"], "empty"),
        (["evaluate", "run"], "--data"),
        (["evaluate", "--data", "x.npz"], "--model"),
        (["evaluate", "nowhere", "--data", "x.npz"], "nowhere"),
        (["evaluate", "--model", "m.py:net", "--data", "labels.npz"], "5 classes"),
        (["allocate", "run", "--output", "second"], "--budget"),
        (["allocate", "run", "--output", "second", "--budget", "5bit", "--device", "abacus"], "--device=abacus"),
        (["allocate", "run", "--output", "second", "--budget", "5bit", "--batch-size", "0"], "--batch-size 0"),
        (["allocate", "run", "--output", "second", "--budget", "5bit", "--memory", "lots"], "lots"),
        (["allocate", "run", "--output", "second", "--budget", "5bit", "--metric", "m.py:net", "--data", "unlabelled.npz"], "labels"),
        (["inspect", "--model", "m.py:net", "--data", "x.npz", "--threads", "0"], "--threads"),
        (["allocate", "run", "--output", "second", "--budget", "1bit"], "bind"),
        (["allocate", "nowhere", "--output", "second", "--budget", "5bit"], "nowhere"),
        (["allocate", "run", "--output", "second", "--budget", "5bit", "--model", "m.py:residual"], "fingerprint"),
        (["inspect"], "--model"),
        (["inspect", "--model", "m.py:hollow"], "no layer"),
        (["inspect", "--model", "m.py:net", "--data", "wide.npz"], "8, 8"),
        (["inspect", "--model", "m.py:net", "--data", "empty.npz"], "empty"),
        (["inspect", "--model", "m.py:hollow", "--data", "x.npz"], "no layer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_to_other_verbs_exits_with_status_2_and_one_line(arguments, message, here):
    assert calibrate("--budget", "6bit").exit_code == 0
    before = sorted(os.listdir())
    done = anybit_cli(*arguments)
    assert done.exit_code == 2, done.exception
    lines = [line for line in done.stderr.splitlines() if line.startswith("anybit: ")]
    assert len(lines) == 1 and done.stderr.splitlines()[-1] == lines[0] and message in lines[0]
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
def test_no_path_or_name_may_be_empty(verb):
    """An empty path would be the working folder."""
    for one in Verb.of(verb, *VERBS[verb]).options.values():
        if one.text is None and without_none(one.kind) in (str, Path) and one.default != "":
            with pytest.raises(InvalidSetting, match=f"^{one.written} is empty"):
                one.checked("", one.written)


@pytest.mark.parametrize("empty", ["--test=", "--config=", "--weights=", "--log="])
def test_an_empty_option_is_not_the_working_folder(empty, here):
    refused = calibrate(empty)
    assert refused.exit_code == 2 and refused.stderr == f"anybit: {empty.removesuffix('=')} is empty. Give a value, or leave it out.\n"


def test_rejects_unlabelled_test_set_before_any_long_work(here, monkeypatch):

    monkeypatch.setattr("anybit.roads.calibrate.range_candidates", lambda *arguments: pytest.fail("long work has begun"))
    assert calibrate("--quiet", "--test", "unlabelled.npz").exit_code == 2


def test_error_contains_no_terminal_escapes(here):
    Path("run\x1b[2J").mkdir()
    done = anybit_cli("evaluate", "run\x1b[2J", "--data", "x.npz")
    assert done.exit_code == 2 and r"run\x1b[2J" in done.stderr and done.stderr.rstrip("\n").isprintable()


def test_interruption_exits_with_status_130_and_leaves_nothing(here, monkeypatch):

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("anybit.roads.polish.observe_edge_ranges", interrupted)
    done = calibrate("--budget", "6bit")
    assert done.exit_code == 130 and "Traceback" not in done.stderr and not Path("run").exists()


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)


def test_importing_anybit_imports_no_torch():
    code = "import sys, anybit; dir(anybit); print([name for name in ('torch', 'numpy', 'scipy') if name in sys.modules])"
    assert run_python(code).stdout == "[]\n"


def test_help_needs_no_torch():
    code = """
import sys
sys.modules["torch"] = None
from anybit.cli.app import main
sys.argv = ["anybit", "calibrate", "--help"]
main()
"""
    done = run_python(code)
    assert done.returncode == 0 and "--budget" in done.stdout, done.stderr


# rejected without torch or a network: arguments -> words of the message
EARLY = {
    "calibrate --model m.py:net --data x.npz --budget 4bitz --output o": "Did you mean 4bit?",
    "calibrate --model m.py:net --data x.npz --budget 4 --output o": "Did you mean 4bit?",
    "calibrate --model m.py:net --data x.npz --budget 4bit --budget 4bit --output o": "twice",
    "calibrate --model m.py:nett --data x.npz --output o": "Did you mean net?",
    "calibrate --model n.py:net --data x.npz --output o": "Did you mean m.py?",
    "calibrate --model m.py --data x.npz --output o": "m.py:net",
    "calibrate --model resnet18 --data x.npz --output o": "torchvision:resnet18 or timm:resnet18",
    "calibrate --model no_such_package:net --data x.npz --output o": "no_such_package",
    "calibrate --model w.pt --data x.npz --output o": "--weights",
    "calibrate --model m.py:net --data y.npz --output o": "--data=y.npz is not there: no folder",
    "calibrate --model m.py:net --data x.npz --test m.py:nett --output o": "--test=m.py:nett",
    "calibrate --model m.py:net --data x.npz --weights wide.pt --output o": "Did you mean wide.npz?",
    "calibrate --model m.py:net --data x.npz --metric m.py:one --output o": "Did you mean ones?",
    "calibrate --model m.py:net --data x.npz --device abacus --output o": "--device=abacus",
    "calibrate --model m.py:net --data x.npz --pipeline fast --output o": "advanced or light",
    "calibrate --model m.py:net --data x.npz --output .": "the current folder",
    "calibrate --model m.py:net --output o": "--data is missing",
    "allocate rum --budget 3bit --output o": "Did you mean run?",
    "allocate run --budget 3bits,4bit --output o": "twice",
    "grow --model m.py:net --train y.npz --budget 3bit --output o": "--train=y.npz",
    "grow --model m.py:net --train x.npz --output o": "--budget 3bit",
    "grow --model m.py:net --train x.npz --budget bops=2G --output o": "bits or bytes",
    "grow --model m.py:net --train x.npz --scheme m.py --output o": "Name the folder of a run",
    "train --model m.py:net --train x.npz --test y.npz --output o": "--test=y.npz",
    "search run --output o": "not a supernet",
    "search run --budget drop=1% --output o": "not drop",
    "extract run --budget 3bit --output o": "not a supernet",
    "evaluate run --data y.npz": "--data=y.npz",
    "evaluate --data x.npz": "--model",
    "report run m.py --output r.html": "RUNS m.py is a file",
    "export rum --onnx o.onnx": "Did you mean run?",
    "export run": "--onnx FILE",
    "export run --onnx x.npz": "--overwrite",
    "verify run o.onnx": "EXPORTED o.onnx is not there",
    "bench run o.onnx": "ONNX o.onnx is not there",
    "profile --model m.py:net --data y.npz": "--data=y.npz",
    "inspect --model m.py:net --data y.npz": "--data=y.npz",
    "evaluate m.py:net --data x.npz": "as --model=m.py:net",
    "diff run rum": "Did you mean run?",
    "explain rum conv1": "Did you mean run?",
    "explain run conv2": "did you mean 'conv1'?",
    "calibrate --model m.py:net --data x.npz --samples 0 --output o": "--samples 0 is outside 2..",
    "grow --model m.py:net --train x.npz --budget 3bit --method csqq --output o": "Write --method csq.",
    "train --model m.py:net --train x.npz --bits 2,99 --output o": "--bits 99 is outside 2..8",
    "bench run --rounds 0": "--rounds 0 is outside",
}


def test_rejects_arguments_without_importing_torch_or_loading_a_network(here):
    Path("run").mkdir()
    Path("run/scheme.json").write_text('{"layers": {"conv1": {}}}')
    code = """
import sys
sys.modules["torch"] = None
from typer.testing import CliRunner
from anybit.cli.app import app
for line in sys.stdin.read().splitlines():
    done = CliRunner().invoke(app, line.split())
    print(done.exit_code, done.output.count(chr(10)), done.output.replace(chr(10), " "), done.exception if done.exit_code == 1 else "")
"""
    done = subprocess.run([sys.executable, "-c", code], input="\n".join(EARLY), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for (line, words), output in zip(EARLY.items(), done.stdout.splitlines(), strict=True):
        assert output.startswith("2 1 anybit: ") and words in output, (line, output)


def test_shell_receives_the_exit_status():
    done = subprocess.run(
        [sys.executable, "-m", "anybit", "evaluate", "nowhere", "--data", "x"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("anybit: ") and "Traceback" not in done.stderr


def test_a_warning_is_one_line(here):
    Path("state").write_text("in the way")
    arguments = ["calibrate", "--model", "m.py:net", "--data", "x.npz", "--output", "run", "--quiet", *FAST]
    done = subprocess.run(
        [sys.executable, "-m", "anybit", *arguments],
        capture_output=True, text=True, timeout=60, env={**os.environ, "XDG_STATE_HOME": "state"},
    )  # fmt: skip
    assert done.returncode == 0 and Path("run/scheme.json").is_file() and len(done.stdout.splitlines()) == 1
    assert done.stderr.startswith("warning: run is not listed") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", anybit.__all__)
def test_public_name_exists(name):
    assert getattr(anybit, name) is not None and name in dir(anybit)


def test_all_errors_have_one_root():
    for name in (
        "InvalidSetting",
        "InvalidInput",
        "InvalidFile",
        "UnsupportedModel",
        "SchemeMismatch",
        "InfeasibleBudget",
        "MissingPackage",
    ):
        assert issubclass(getattr(anybit, name), anybit.AnybitError) and issubclass(anybit.AnybitError, ValueError)


def test_command_line_defaults_equal_settings_defaults():
    options = {option.name: option.default for option in typer.main.get_command(app).commands["calibrate"].params}
    defaults = CalibrateSettings()
    written = {
        "weight_bits": ",".join(map(str, defaults.weight_bits)),
        "activation_bits": ",".join(map(str, defaults.activation_bits)),
        "sensitivity_base": str(defaults.sensitivity_base),
        "memory": "2GiB",
    }
    assert parse_size("2GiB") == defaults.memory
    for field in dataclasses.fields(CalibrateSettings):
        if field.name in options and field.name not in ("keep", "outputs"):  # tables, empty by default
            value = getattr(defaults, field.name)
            text = str(value) if type(value) in (int, float) else value
            assert options[field.name] == written.get(field.name, text), field.name
    assert {field.name for field in dataclasses.fields(CalibrateSettings)} <= set(options)


# --help


@pytest.fixture
def wide(monkeypatch):
    """A terminal 100 columns wide."""
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 100)


@pytest.mark.parametrize("verb", DESCRIBED)
def test_help_fits_a_screen_with_panels_and_two_examples(verb, wide):
    done = anybit_cli(verb, "--help")
    lines = done.stdout.splitlines()
    assert done.exit_code == 0 and len(lines) <= 48 and max(map(len, lines)) <= 100
    titles = [line.split()[1] for line in lines if line.startswith("╭")]
    assert titles and titles == [panel for panel in ("Arguments", *PANELS) if panel in titles]
    assert [line.startswith(f" $ anybit {verb} ") for line in lines].count(True) == 2
    rare = [one for one in DESCRIBED[verb].options.values() if one.rare and one.command_line]
    assert ("--help-all" in done.stdout) == bool(rare)
    assert not any(f" {one.written} " in done.stdout for one in rare)


@pytest.mark.parametrize("verb", DESCRIBED)
def test_help_all_shows_every_option(verb, wide):
    done = anybit_cli(verb, "--help-all")
    assert done.exit_code == 0
    assert all(one.positional or f" {one.written} " in done.stdout for one in DESCRIBED[verb].options.values() if one.command_line)


@pytest.mark.parametrize("verb", DESCRIBED)
def test_examples_in_help_parse(verb):
    command = typer.main.get_command(app).commands[verb]
    for line in examples_in(DESCRIBED[verb].function):
        program, name, *arguments = shlex.split(line)
        command.make_context(name, arguments)
        assert (program, name) == ("anybit", verb) and len(f" $ {line}") < 100


def test_shell_completes_verbs_options_and_choices():
    for words, complete in (
        ("anybit cal", "calibrate"),
        ("anybit calibrate --pipe", "--pipeline"),
        ("anybit calibrate --pipeline l", "light"),
    ):
        environment = {**os.environ, "_ANYBIT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        code = "import sys; sys.argv = ['anybit']; from anybit.cli.app import app; app(prog_name='anybit')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
        assert complete in done.stdout.split(), done.stderr
