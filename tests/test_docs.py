"""The documentation runs: its Python is executed, its verbs, options and results are the ones that exist."""

import json
import re
from pathlib import Path

import pytest
import torch
import typer
from torch import nn

import anybit
from anybit.cli.app import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = (ROOT / "docs" / "command-line.md").read_text()
VERBS = typer.main.get_command(app).commands


class Small(nn.Module):
    """A network with the layer that the README keeps at 8 bits."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)).mean((2, 3)))


def test_the_readmes_python_runs(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert len(code.strip().splitlines()) <= 12
    monkeypatch.chdir(tmp_path)
    calibrate = anybit.calibrate
    monkeypatch.setattr("anybit.roads.calibrate.calibrate", lambda *a, **k: calibrate(*a, steps=5, candidate_steps=5, **k))
    names = {"model": Small(), "images": torch.randn(16, 3, 8, 8), "test_set": (torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,)))}
    exec(code, names)
    assert (tmp_path / "runs" / "mine" / "model.safetensors").is_file()
    assert "W8A8" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_documented(verb):
    assert f"anybit {verb}" in COMMANDS and f"anybit {verb}" in README


def test_every_option_in_the_docs_exists():
    known = {name for verb in VERBS.values() for option in verb.params for name in [*option.opts, *option.secondary_opts]}
    known |= {"--help", "--install-completion"}  # typer's own
    for text in (README, COMMANDS):
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known


def test_every_file_that_the_docs_name_is_there():
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        for name in re.findall(r"(?:docs|src|tests|examples|benchmarks)/[\w/.-]+\.(?:md|py)", text):
            assert (ROOT / name).is_file() or "NAME" in name, name


def test_what_the_docs_say_is_said_of_refused_networks_is_in_the_code():
    table = (ROOT / "docs" / "reliability.md").read_text().split("## Networks")[1].split("\n## ")[0]
    said = re.findall(r"^\|[^|]+\| `([^`]+)` \|", table, re.MULTILINE)
    code = "".join(path.read_text() for path in (ROOT / "src" / "anybit").rglob("*.py"))
    code = re.sub(r'"\n\s+f?"', "", code)  # strings that go over lines
    assert len(said) > 15 and [text for text in said if text not in code] == []
    quoted = re.findall(r'named: "([^"]+)"', table)
    assert quoted and all(text in code for text in quoted)


def test_what_the_docs_say_of_threads_was_measured():
    entries = json.loads((ROOT / "benchmarks" / "results" / "determinism.json").read_text())["entries"]
    section = (ROOT / "docs" / "reliability.md").read_text().split("## The same bytes")[1]
    assert all(entry["same_files"] and entry["same_report"] for key, entry in entries.items() if key.endswith("again"))
    for key, entry in entries.items():
        if key.endswith("one thread / two threads") and not entry["same_files"]:
            assert f"{entry['codes_that_differ']:,} of {entry['codes_compared']:,} codes differ" in section, key
        elif key.endswith("one thread / two threads"):
            assert key.startswith("light")
