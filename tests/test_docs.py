"""The documentation is executable: its Python runs, and its verbs, options and results exist."""

import ast
import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import anybit
from anybit.cli.app import app
from anybit.roads.settings import CalibrateSettings, GrowSettings
from anybit.settings import options_of
from anybit.supernets.settings import SupernetSettings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = (ROOT / "docs" / "command-line.md").read_text()
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
VERBS = typer.main.get_command(app).commands


class Small(nn.Module):
    """[N, 3, H, W] -> [N, 4]."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)).mean((2, 3)))


NETWORK = f"""
import torch
from torch import nn

{inspect.getsource(Small)}

def network():
    torch.manual_seed(0)
    return Small()
"""


def test_python_in_the_readme_runs(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert len([line for line in code.splitlines() if line and not line.startswith("#")]) <= 10
    monkeypatch.chdir(tmp_path)
    calibrate = anybit.calibrate
    monkeypatch.setattr("anybit.roads.calibrate.calibrate", lambda *a, **k: calibrate(*a, steps=5, candidate_steps=5, **k))
    names = {"model": Small(), "images": torch.randn(16, 3, 8, 8), "test_set": (torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,)))}
    exec(code, names)
    assert (tmp_path / "runs" / "mine" / "model.safetensors").is_file()
    scheme, *_, verified = capsys.readouterr().out.splitlines()
    assert re.search(r"body: W\d+A\d+", scheme) and verified == "True"


def test_commands_in_the_readme_run(tmp_path, monkeypatch):
    section = README.split("## Command line")[1].split("\n## ")[0]
    commands = re.findall(r"^    anybit (.*)$", section, re.MULTILINE)
    assert len(commands) == 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORK)
    save_file(Small().state_dict(), "net.safetensors")
    random = np.random.default_rng(0)
    arrays = {
        f"{name}_{part}": values
        for part in ("train", "test")
        for name, values in (("x", random.normal(size=(16, 3, 8, 8)).astype(np.float32)), ("y", random.integers(0, 4, 16)))
    }
    np.savez("data.npz", **arrays)
    for command in commands:
        fewer = ["--steps", "5"] if command.startswith("calibrate") else []
        answer = CliRunner().invoke(app, [*command.split(), *fewer])
        assert answer.exit_code == 0, answer.output
    assert (tmp_path / "runs" / "mine" / "report.html").is_file() and (tmp_path / "mine.onnx").is_file()


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_documented(verb):
    assert f"anybit {verb}" in COMMANDS


def test_every_option_in_the_docs_exists():
    known = {name for verb in VERBS.values() for option in verb.params for name in [*option.opts, *option.secondary_opts]}
    known |= {"--help", "--install-completion"}  # built into typer
    for text in (README, COMMANDS):
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known


def test_every_file_named_in_the_docs_exists():
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        for name in re.findall(r"(?:docs|src|tests|examples|benchmarks)/[\w/.-]+\.(?:md|py|svg)", text):
            assert (ROOT / name).is_file() or "NAME" in name, name


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in PAGES)])
def test_every_link_has_a_target(page):
    for target, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", (ROOT / page).read_text()):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.is_file(), f"{page}: {target}"
        headings = [re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in lines_of(file) if line.startswith("#")]
        assert not heading or heading in headings, f"{page}: {target}#{heading}"


def lines_of(file):
    return file.read_text().splitlines() if file.suffix == ".md" else []


def test_quoted_error_messages_are_in_the_code():
    table = (ROOT / "docs" / "reliability.md").read_text().split("## Networks")[1].split("\n## ")[0]
    messages = re.findall(r"^\|[^|]+\| `([^`]+)` \|", table, re.MULTILINE)
    code = "".join(path.read_text() for path in (ROOT / "src" / "anybit").rglob("*.py"))
    code = re.sub(r'"\n\s+f?"', "", code)  # strings that span lines
    assert len(messages) > 15 and [text for text in messages if text not in code] == []
    quoted = re.findall(r'named: "([^"]+)"', table)
    assert quoted and all(text in code for text in quoted)


def test_documented_thread_figures_are_those_measured():
    entries = json.loads((ROOT / "benchmarks" / "results" / "determinism.json").read_text())["entries"]
    section = (ROOT / "docs" / "reliability.md").read_text().split("## Reproducibility")[1]
    assert all(entry["same_files"] and entry["same_report"] for key, entry in entries.items() if key.endswith("again"))
    for key, entry in entries.items():
        if key.endswith("one thread / two threads") and not entry["same_files"]:
            assert f"{entry['codes_that_differ']:,} of {entry['codes_compared']:,} codes differ" in section, key
        elif key.endswith("one thread / two threads"):
            assert key.startswith("light")


def test_every_page_is_in_the_sites_navigation():
    index = (ROOT / "docs" / "index.md").read_text()
    blocks = re.findall(r"```\{toctree\}\n(.*?)```", index, re.S)
    named = {name for block in blocks for name in block.splitlines() if name and name[0] != ":"}
    pages = {str(path.relative_to(ROOT / "docs")).removesuffix(".md") for path in PAGES if not path.name.endswith(".in.md")}
    assert pages == named | {"index"}


def code_of(path):
    return "\n".join(re.findall(r"```\{code-cell\}\n(.*?)```", path.read_text(), re.S))


NOTEBOOKS = [path for path in PAGES if "{code-cell}" in path.read_text()]


def test_every_public_function_has_an_example_and_its_reference():
    page = ROOT / "docs" / "reference" / "api.md"
    for name in anybit.__all__:
        thing = getattr(anybit, name)
        if inspect.isfunction(thing):
            assert f"anybit.{name}(" in code_of(page) and f"autofunction:: anybit.{name}\n" in page.read_text(), name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_calls_of_every_notebook_have_their_keywords(path):
    for call in ast.walk(ast.parse(code_of(path))):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == "anybit":
            parameters = inspect.signature(getattr(anybit, call.func.attr)).parameters
            assert {keyword.arg for keyword in call.keywords} <= set(parameters), call.func.attr


SETTINGS = {"calibrate": CalibrateSettings, "grow": GrowSettings, "train": SupernetSettings}


def test_settings_in_the_calls_of_all_pages_have_values_that_are_accepted():
    checked = 0
    for path in [ROOT / "README.md", *PAGES]:
        for text in re.findall(rf"anybit\.(?:{'|'.join(SETTINGS)})\(.*\)$", path.read_text(), re.M):
            calls = [
                call for call in ast.walk(ast.parse(text)) if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in SETTINGS
            ]
            for name, keyword in ((call.func.attr, keyword) for call in calls for keyword in call.keywords):
                options, names = options_of(SETTINGS[name]), [node for node in ast.walk(keyword.value) if isinstance(node, ast.Name)]
                if keyword.arg in options and not names:
                    options[keyword.arg].checked(ast.literal_eval(keyword.value))
                    checked += 1
    assert checked > 10


def test_every_option_in_the_how_to_pages_exists():
    known = {name for verb in VERBS.values() for option in verb.params for name in [*option.opts, *option.secondary_opts]}
    for path in PAGES:
        if path.parent.name in ("how-to", "tutorials"):
            assert set(re.findall(r"(?<![\w-])--(?!nproc)[a-z][a-z-]+", path.read_text())) <= known, path


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    exec(code_of(path), {})
