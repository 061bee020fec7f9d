"""Reproducible results: docs are generated from the committed JSON; and functions shared by benchmarks."""

import ast
import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from anybit.progress import tell, track
from benchmarks.studies import command_costs, counting
from benchmarks.studies.study import narrated
from benchmarks.tables import shared
from benchmarks.tables.commands import commands_section
from benchmarks.tables.pages import SECTIONS, TEMPLATES, first_difference, pages, with_sections
from benchmarks.tables.shared import NOT_RUN

ROOT = Path(__file__).parent.parent
SCRIPTS = [path for folder in ("studies", "reliability", "peers", "zoo") for path in sorted((ROOT / "benchmarks" / folder).glob("*.py"))]


def test_events_of_a_run_are_printed_after_the_key_of_its_entry(capsys):
    with narrated("an entry"):
        assert list(track([1], "steps")) == [1]
        tell("epoch", epoch=1, note="epoch 1/2: loss 0.5")
        tell("unit", unit="conv1")
    tell("epoch", note="after it")
    assert capsys.readouterr().out == "an entry epoch 1/2: loss 0.5\n"


def test_committed_docs_are_generated_from_the_json():
    done = subprocess.run([sys.executable, "-m", "benchmarks.tables", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_first_difference_is_named(tmp_path):
    generated = pages()
    for path, text in generated.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    assert first_difference(tmp_path, generated) is None
    results = tmp_path / "docs" / "results.md"
    lines = results.read_text().split("\n")
    number = next(number for number, line in enumerate(lines) if line.startswith("| W4A8 "))
    results.write_text("\n".join([*lines[:number], lines[number].replace("|", "/"), *lines[number + 1 :]]))
    assert first_difference(tmp_path, generated).startswith(f"docs/results.md, line {number + 1}, differs")
    results.write_text("\n".join(lines[:-5]))
    assert "(the file ends before)" in first_difference(tmp_path, generated)
    results.write_text(generated[Path("docs/results.md")])
    figure = next(path for path in generated if path.suffix == ".svg")
    (tmp_path / figure).unlink()
    assert first_difference(tmp_path, generated).startswith(f"{figure}, line 1, differs")


def test_rejects_section_that_nothing_generates():
    with pytest.raises(ValueError, match="NOSUCH"):
        with_sections("<!-- NOSUCH -->")


def test_every_measured_section_is_in_the_results():
    placed = {name for page in TEMPLATES for name in re.findall(r"<!-- ([A-Z]+) -->", (ROOT / "docs" / f"{page}.in.md").read_text())}
    assert [name for name, section in SECTIONS.items() if name not in placed and section() != NOT_RUN] == []


def test_benchmarks_readme_lists_every_script():
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    runnable = [path for path in SCRIPTS if '__name__ == "__main__"' in path.read_text()]
    assert len(runnable) > 10
    assert [path.stem for path in runnable if not re.search(rf"`(peers/|zoo/)?{path.stem}(\.py)?`", readme)] == []


@pytest.mark.parametrize("page", ["docs/results.in.md", "docs/networks.in.md", "docs/reliability.md", "Makefile"])
def test_every_command_mentioned_exists(page):
    modules = re.findall(r"python -m (benchmarks[\w.]*)", (ROOT / page).read_text())
    places = {module: ROOT / module.replace(".", "/") for module in modules}
    assert places
    assert [name for name, at in places.items() if not (at.with_suffix(".py").is_file() or (at / "__main__.py").is_file())] == []


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.parent.name != "peers"], ids=lambda path: path.stem)
def test_every_import_of_a_script_resolves(path):
    """Studies take hours and are not run by tests, but their imports are checked."""
    for statement in ast.walk(ast.parse(path.read_text())):
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").split(".")[0] in ("anybit", "benchmarks"):
            module = __import__(statement.module, fromlist=[alias.name for alias in statement.names])
            assert [alias.name for alias in statement.names if not hasattr(module, alias.name)] == []


# Commands in two trees


def fake_tree(folder, command):
    """Create a checkout whose command line is this code."""
    package = folder / "src" / "anybit"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(command)
    return folder


def test_processor_seconds_include_child_processes(tmp_path):
    """Processor seconds include those of a child process; waiting takes none."""
    busy = "import time\nwhile time.process_time() < 0.4: pass"
    tree = fake_tree(tmp_path / "tree", f"import subprocess, sys, time\nsubprocess.run([sys.executable, '-c', {busy!r}])\ntime.sleep(0.5)")
    seconds = command_costs.timed(command_costs.ANYBIT, command_costs.environment_of(tree, tmp_path))
    assert seconds["cpu"] >= 0.4 and seconds["wall"] >= 0.9
    assert seconds["cpu"] < seconds["wall"]


def test_failing_command_is_not_a_measurement(tmp_path):
    tree = fake_tree(tmp_path / "tree", "raise SystemExit('out of luck')")
    with pytest.raises(RuntimeError, match="out of luck"):
        command_costs.timed(command_costs.ANYBIT, command_costs.environment_of(tree, tmp_path))


def test_rejects_folder_that_is_not_a_checkout(tmp_path):
    assert command_costs.checked(fake_tree(tmp_path / "tree", "")) == tmp_path / "tree"
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="Name the root of a checkout"):
        command_costs.checked(tmp_path / "empty")


WRITES = """
import os, sys, pathlib
options = dict(zip(sys.argv, sys.argv[1:]))
cache = pathlib.Path(os.environ["XDG_CACHE_HOME"])
with open({log!r}, "a") as log:
    print({side!r}, sys.argv[1], "cached" if cache.exists() else "empty", file=log)
cache.mkdir(exist_ok=True)
if sys.argv[1] == "calibrate":
    pathlib.Path(options["--output"]).mkdir()
if sys.argv[1] in ("export", "verify"):
    assert pathlib.Path(sys.argv[2]).is_dir()
if sys.argv[1] == "export":
    pathlib.Path(options["--onnx"]).touch()
if sys.argv[1] == "verify":
    assert pathlib.Path(sys.argv[3]).is_file()
"""


def test_trees_run_in_turn_and_with_an_empty_cache_where_required(tmp_path):
    log = tmp_path / "log"
    trees = {side: fake_tree(tmp_path / side, WRITES.format(log=str(log), side=side)) for side in command_costs.SIDES}
    subject = command_costs.Subject("net.py:network", (), (), 1)
    seconds = command_costs.one_round(subject, trees, command_costs.SIDES, tmp_path / "round")
    verbs = [verb for verb, _ in command_costs.COMMANDS.values()]
    states = ["cached" if within else "empty" for _, within in command_costs.COMMANDS.values()]
    expected = [f"{side} {verb} {state}" for verb, state in zip(verbs, states, strict=True) for side in command_costs.SIDES]
    assert log.read_text().splitlines() == expected
    assert all(pair[side]["cpu"] > 0 for pair in seconds.values() for side in command_costs.SIDES)


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
def test_ratios_are_taken_within_a_round(factor):
    """Rounds of very different speed, as on a busy machine, leave the ratio alone."""
    pairs = [
        {side: {"cpu": second * by, "wall": 2 * second * by} for side, by in (("before", 1), ("after", factor))} for second in (1, 8, 3)
    ]
    summary = command_costs.summary(pairs)
    assert summary["cpu"]["ratio"] == summary["wall"]["ratio"] == {"median": factor, "low": factor, "high": factor}
    assert summary["cpu"]["before"] == {"min": 1, "median": 3, "all": [1, 8, 3]} and summary["wall"]["after"]["min"] == 2 * factor


def test_passes_copies_and_exporter_calls_are_counted(monkeypatch):
    """Only those of the whole network, wrapped or not, count."""
    network = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), nn.Flatten(), nn.Linear(8, 3))
    monkeypatch.setattr(torch.onnx, "export", lambda model: model)
    inputs = torch.zeros(1, 1, 2, 2)
    with counting.counting({"0.0", "2"}) as counts:
        twin = copy.deepcopy(network)
        copy.deepcopy(network[0])
        copy.deepcopy({"a": 1})
        for one in (network, twin, nn.Sequential(network)):
            one(inputs)
        network[0](inputs)
        torch.onnx.export(network)
    copy.deepcopy(network)(inputs)
    assert counts == {"exporter": 1, "passes": 3, "copies": 1}


def test_command_table_has_the_measurements(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "RESULTS", tmp_path)
    assert commands_section() == NOT_RUN
    pairs = [{"before": {"cpu": 4.0, "wall": 5.0}, "after": {"cpu": cpu, "wall": 2.5}} for cpu in (1.0, 2.0, 3.0)]
    counts = {"before": {"exporter": 1, "passes": 8, "copies": 36}, "after": {"exporter": 0, "passes": 8, "copies": 0}}
    entry = {"commands": {"export": command_costs.summary(pairs) | {"counts": counts}}}
    (tmp_path / "command_costs.json").write_text(json.dumps({"entries": {"digits": entry}}))
    row = commands_section().splitlines()[-1]
    cells = [
        "digits",
        "export",
        "4.00 s (5.00 s)",
        "1.00 s (2.50 s)",
        "0.50 (0.25 to 0.75)",
        "0.50 (0.50 to 0.50)",
        "1 to 0",
        "8",
        "36 to 0",
    ]
    assert row == f"| {' | '.join(cells)} |"
