"""The layout: packages in one order, each described in a sentence, no imports from above, tests mirror the sources."""

import ast
import re
from pathlib import Path

import pytest

import anybit

ROOT = Path(anybit.__file__).parent
TESTS = Path(__file__).parent
ORDER = (
    "errors", "wording", "progress", "environment", "settings", "calls", "numerics", "scheme", "budget", "files", "data", "networks",
    "sources", "loops", "allocation", "methods", "runs", "supernets", "reports", "onnx", "exports", "roads", "cli", "__main__",
)  # fmt: skip
FILES = sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """The package's modules that a file imports, including inside functions."""
    modules = {name_of(file) for file in FILES}
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            names = [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        imported |= {name.removeprefix("anybit.") for name in names if name.startswith("anybit.")} & modules
    return imported


def test_every_file_is_in_the_order():
    assert {name_of(path).split(".")[0] for path in FILES if path != ROOT / "__init__.py"} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_imported_from_above(path):
    above = {name for name in imports_of(path) if ORDER.index(name.split(".")[0]) > ORDER.index(name_of(path).split(".")[0])}
    assert path == ROOT / "__init__.py" or not above


def test_there_are_no_import_cycles():
    below = {name_of(path): imports_of(path) for path in FILES}
    while free := [name for name, needs in below.items() if not needs & set(below) - {name}]:
        for name in free:
            del below[name]
    assert not below


@pytest.mark.parametrize("package", sorted(path.parent.name for path in ROOT.glob("*/__init__.py")))
def test_package_docstrings_state_contents_and_allowed_imports(package):
    text = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text())) or ""
    assert re.search(r"[Ii]mports \w+", text)


@pytest.mark.parametrize("folder", sorted(path.name for path in TESTS.iterdir() if any(path.glob("test_*.py"))))
def test_tests_mirror_the_packages(folder):
    assert (ROOT / folder / "__init__.py").is_file()


def test_only_one_package_imports_transformers():
    importers = {name_of(path) for path in FILES if re.search(r"^(import|from) transformers", path.read_text(), re.M)}
    assert importers and all(name.startswith("sources.huggingface.") for name in importers)


def test_no_method_imports_another():
    for path in (ROOT / "methods").glob("*.py"):
        others = {name for name in imports_of(path) if name.startswith("methods.")} - {"methods.settings"}
        assert not others, path


def test_every_module_is_on_the_map():
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", (TESTS.parent / "docs" / "design.md").read_text().split("## Three walks")[0], re.M)
    words = {package.strip("`/"): set(re.findall(r"[a-z_]+", files)) for package, files in rows}
    for path in FILES:
        package, _, module = name_of(path).rpartition(".")
        if path.name not in ("__init__.py", "__main__.py") and package:
            assert module in words[package.split(".")[0]], f"{package}/{module}.py is not on the map of docs/design.md"
