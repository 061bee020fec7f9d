"""The distribution: metadata, licence, citation, extras, and shipped files. `make package` builds it."""

import email
import hashlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

import anybit
from anybit.cli.app import app

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "anybit"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def required(extra: str) -> set[str]:
    """The packages that an extra installs, including those of extras that it names."""
    requirements = [Requirement(text) for text in EXTRAS[extra]]
    own = [requirement for requirement in requirements if requirement.name == "anybit"]
    return {canonicalize_name(requirement.name) for requirement in requirements if requirement not in own}.union(
        *(required(name) for requirement in own for name in requirement.extras)
    )


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """(the wheel's metadata, the folder that contains it), built from a copy of the sources."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    (source / "src" / "anybit").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "src/anybit/__init__.py"):
        shutil.copy(ROOT / name, source / name)
    code = f"import setuptools.build_meta as backend; backend.prepare_metadata_for_build_wheel({str(target)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (folder,) = target.glob("anybit-*.dist-info")
    return email.message_from_string((folder / "METADATA").read_text()), folder


def test_metadata_are_complete(metadata):
    fields, _ = metadata
    assert (fields["Name"], fields["Version"], fields["License-Expression"]) == ("anybit", anybit.__version__, "Apache-2.0")
    for name in ("Summary", "Author", "Keywords", "Requires-Python", "Description-Content-Type"):
        assert fields[name], name
    classifiers = fields.get_all("Classifier")
    assert "Typing :: Typed" in classifiers and not [text for text in classifiers if text.startswith("License ::")]
    assert sorted(fields.get_all("Provides-Extra")) == sorted(EXTRAS)


def test_the_wheel_carries_the_licence(metadata):
    fields, folder = metadata
    assert fields.get_all("License-File") == ["LICENSE"]
    assert (folder / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_licence_is_apache_2_with_the_copyright_holder():
    text, filled = re.subn(
        "Copyright 2026 The anybit authors", "Copyright [yyyy] [name of copyright owner]", (ROOT / "LICENSE").read_text()
    )
    assert filled == 1 and hashlib.sha256(text.encode()).hexdigest() == APACHE_2


def test_every_file_beside_the_code_is_shipped():
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["anybit"]
    shipped = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    beside = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert PACKAGE / "py.typed" in beside and beside <= shipped


def test_citation_has_this_version_and_the_papers_of_the_methods():
    assert (CITATION["title"], CITATION["version"], CITATION["license"]) == ("anybit", anybit.__version__, PROJECT["license"])
    methods = {path.stem: " ".join(path.read_text().split()) for path in (PACKAGE / "methods").glob("*.py")}
    assert len(CITATION["references"]) == 3
    for method, paper in zip(("adaquant", "csq", "multiquant"), CITATION["references"], strict=True):
        authors = ", ".join(author["family-names"] for author in paper["authors"])
        assert authors in methods[method] and paper["title"] in methods[method] and str(paper["year"]) in methods[method]


def test_the_changelog_has_a_section_of_this_version():
    assert f"\n## {anybit.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_every_recommended_extra_exists():
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *PACKAGE.rglob("*.py")]
    named = {name for path in texts for names in re.findall(r"anybit\[([\w,-]+)\]", path.read_text()) for name in names.split(",")}
    assert {"onnx", "images", "hf", "compressed-tensors", "openvino"} <= named <= set(EXTRAS)


def test_all_is_every_extra_for_users():
    users = set(EXTRAS) - {"all", "demo", "docs", "test"}
    assert required("all") == set().union(*(required(extra) for extra in users))


def test_make_installs_pinned_versions_and_requirements_have_only_lower_bounds():
    pinned = {canonicalize_name(Requirement(line).name) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    direct = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    assert (direct | required("test") | required("demo") | required("docs") | required("images")) - {"setuptools"} <= pinned
    floors = [Requirement(text) for texts in (PROJECT["dependencies"], *EXTRAS.values()) for text in texts]
    assert all([clause.operator for clause in floor.specifier] == [">="] for floor in floors if floor.name != "anybit")


def test_command_prints_its_version():
    answer = CliRunner().invoke(app, ["--version"])
    assert (answer.exit_code, answer.output) == (0, f"anybit {anybit.__version__}\n")
