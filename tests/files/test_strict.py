"""Strict reading: JSON and tensors with missing, extra or malformed contents."""

import ast
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import anybit
from anybit.errors import AnybitError, InvalidFile
from anybit.files.strict import (
    LEVELS,
    check_version,
    digest_of,
    load_tensors,
    parse_json,
    read_header,
    read_json,
    read_sealed,
    read_tensors,
    sealed,
    write_json,
)
from anybit.files.whole import whole_file
from anybit.numerics.packing import TensorSpec
from anybit.sources.preprocessing import Preprocessing

SOURCE = Path(anybit.__file__).parent

NO_JSON = {
    "nothing": "",
    "a key twice": '{"a": 1, "b": {"c": 1, "c": 2}}',
    "NaN": "[NaN]",
    "infinity": "[-Infinity]",
    "a number beyond float64": "[1e400]",
    "an integer beyond 64 bits": "[9223372036854775808]",
    "endless digits": "9" * 5000,
    "half of a pair": '["\\ud800"]',
    "a byte order mark": "\ufeff[]",
    "a control character": '["\x00"]',
    "two values": "[] []",
    "levels": "[" * (LEVELS + 1) + "]" * (LEVELS + 1),
    "brackets without end": "[" * 100_000,
    "no UTF-8": b'["\xff"]',
}


@pytest.mark.parametrize("name", NO_JSON)
def test_rejects_json_on_which_parsers_disagree(name):
    with pytest.raises(InvalidFile, match=r"^here is not valid JSON: .+ Restore") as raised:
        parse_json(NO_JSON[name], "here")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize("value", [[], {"a": [1, -(2**63), 2**63 - 1, 1e308, 5e-324, "é\u2028\U0001f600", None, True]}])
def test_json_round_trips(value, tmp_path):
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    deep = value
    for _ in range(LEVELS - 3):
        deep = [deep]
    assert parse_json(json.dumps(deep), "here") == deep


def test_rejects_folders_and_pipes(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.json")  # reading it would block forever
    for name in (".", "pipe.json", "nowhere.json"):
        with pytest.raises(InvalidFile, match="is not there"):
            read_json(tmp_path / name)


def test_file_is_written_whole_or_left_unchanged(tmp_path, full_disk):
    path = tmp_path / "new" / "x.json"
    writers = (lambda draft: write_json(draft, [0] * 1000), lambda draft: save_file({"x": torch.zeros(1000)}, draft))
    for before in (None, b"before"):
        for write in writers:
            refused = pytest.raises(AnybitError, match=r"x\.json cannot be written: .*Make room\.$")
            with refused, full_disk(), whole_file(path, "Make room.") as draft:
                write(draft)
            assert [file.read_bytes() for file in path.parent.iterdir()] == [before] * (before is not None)
        path.write_bytes(b"before")
    with pytest.raises(ZeroDivisionError), whole_file(path, "") as draft:
        draft.write_text(str(1 / 0))
    assert [file.read_bytes() for file in path.parent.iterdir()] == [b"before"]
    elsewhere = tmp_path / "theirs"
    elsewhere.write_text("theirs")
    path.with_name(f".x.json.{'0' * 16}.anybit").symlink_to(elsewhere)
    with whole_file(path, "") as draft:
        draft.write_text("after")
    assert path.read_text() == "after" and elsewhere.read_text() == "theirs"


@pytest.mark.parametrize("place", ["file/x.json", "folder"])
def test_unwritable_path_is_named(place, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with (
        pytest.raises(AnybitError, match=f"{place} cannot be written: .*Choose another"),
        whole_file(tmp_path / place, "Choose another.") as draft,
    ):
        draft.write_text("text")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "inside"]


@pytest.mark.parametrize(
    ("version", "message"), [(2, "Upgrade anybit"), (0, "from 1 to 1"), ("1", "from 1 to 1"), (True, "from 1 to 1"), (None, "None")]
)
def test_rejects_unknown_version(version, message):
    with pytest.raises(InvalidFile, match=message):
        check_version({"version": version}, Path("x.json"), 1)


def test_rejects_sealed_file_once_changed(tmp_path):
    path, data = tmp_path / "x.json", {"version": 1, "a": [1.5, "b"], "seconds": 3.0}
    write_json(path, sealed(data, ("seconds",)))
    assert read_sealed(path, 1, "Make it again.", ("seconds",))["a"] == data["a"]
    write_json(path, {**sealed(data, ("seconds",)), "seconds": 4.0})
    read_sealed(path, 1, "Make it again.", ("seconds",))
    for changed in ({**sealed(data), "a": [1.25, "b"]}, {**sealed(data), "more": 1}, {**data, "digest": 3}):
        write_json(path, changed)
        with pytest.raises(InvalidFile, match=r"x\.json was changed after it was written.*Make it again\."):
            read_sealed(path, 1, "Make it again.")
    write_json(path, data)
    with pytest.raises(InvalidFile, match="has no digest"):
        read_sealed(path, 1, "Make it again.")


def test_digest_is_independent_of_formatting(tmp_path):
    data = {"a": 1, "é": [0.1, None]}
    for text in (json.dumps(data), json.dumps(data, indent=3, ensure_ascii=False)):
        assert digest_of(parse_json(text, "here")) == digest_of(data)
    assert digest_of({"é": [0.1, None], "a": 1}) != digest_of(data)


@pytest.mark.parametrize(
    "data",
    [{"size": True}, {"size": 1.5}, {"size": 10**12}, {"mean": "0.5"}, {"columns": 5}, {"interpolation": []}, {"std": {}}, [], {"crop": 3}],
    ids=str,
)
def test_rejects_preprocessing_of_other_types(data):
    with pytest.raises(anybit.AnybitError):
        Preprocessing.from_json(data)


def header(entries: dict, data: bytes = bytes(16)) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


SPEC = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
NO_TENSORS = {
    "nothing": b"",
    "seven bytes": bytes(7),
    "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header of 10^8 bytes": struct.pack("<Q", 10**8) + b"{}",
    "a shape beyond memory": header({"x": {**SPEC, "shape": [10**12]}}),
    "a shape that overflows": header({"x": {**SPEC, "shape": [2**32, 2**32]}}),
    "a negative shape": header({"x": {**SPEC, "shape": [-4]}}),
    "offsets beyond the end": header({"x": {**SPEC, "data_offsets": [0, 10**12]}}),
    "offsets before the start": header({"x": {**SPEC, "data_offsets": [-16, 0]}}),
    "overlapping tensors": header({"x": SPEC, "y": SPEC}),
    "bytes besides": header({"x": SPEC}, bytes(24)),
    "another type": header({"x": {**SPEC, "dtype": "I32"}}),
    "no such type": header({"x": {**SPEC, "dtype": "F31"}}),
    "another name": header({"z": SPEC}),
    "a tensor more": header({"x": SPEC, "y": {**SPEC, "shape": [0, 10**18], "data_offsets": [16, 16]}}),
    "NaN": header({"x": SPEC}, struct.pack("<4f", 0, 0, float("nan"), 0)),
}


@pytest.mark.parametrize("name", NO_TENSORS)
@pytest.mark.parametrize("framework", ["pt", "np"])
def test_unexpected_tensors_are_named(name, framework, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(NO_TENSORS[name])
    with pytest.raises(InvalidFile, match=r"x\.safetensors"):
        read_tensors(tmp_path / "x.safetensors", {"x": TensorSpec("F32", (4,))}, framework)


def test_reads_expected_tensors(tmp_path):
    save_file({"x": torch.arange(4.0), "y": torch.ones(2, 3, dtype=torch.int8)}, tmp_path / "x.safetensors", {"a": "b"})
    specs, metadata = read_header(tmp_path / "x.safetensors")
    assert specs == {"x": TensorSpec("F32", (4,)), "y": TensorSpec("I8", (2, 3))} and metadata == {"a": "b"}
    assert torch.equal(read_tensors(tmp_path / "x.safetensors", specs)["x"], torch.arange(4.0))


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu"])
def test_rejects_float_types_that_no_run_has(name, tmp_path):
    """For some of them, PyTorch cannot tell whether a number is finite."""
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(4).to(getattr(torch, f"float8_{name}"))}, path)
    with pytest.raises(InvalidFile, match=r"float8|cannot be read"):
        load_tensors(path, ["x"])


# No pickle: all imports and calls of the package

FORBIDDEN = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "jsonpickle", "code", "codeop",
}  # fmt: skip
"""Modules whose readers can be made to run what a file says, or that run text."""
GUARDED = {
    ("torch", "load"): ("weights_only", True),
    ("np", "load"): ("allow_pickle", False),
    ("onnx", "load"): ("load_external_data", False),
}
"""Readers that are safe with one argument alone."""


def modules(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def unguarded_calls(tree: ast.AST) -> list[str]:
    """Calls that execute text (eval, exec, compile), and readers without the argument that forbids it."""
    names = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func
        if isinstance(name, ast.Name) and name.id in ("eval", "exec", "compile", "__import__"):
            names.append(name.id)
        if isinstance(name, ast.Attribute) and isinstance(name.value, ast.Name) and (name.value.id, name.attr) in GUARDED:
            argument, value = GUARDED[name.value.id, name.attr]
            if not any(k.arg == argument and isinstance(k.value, ast.Constant) and k.value.value is value for k in call.keywords):
                names.append(f"{name.value.id}.{name.attr} without {argument}={value}")
    return names


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_module_can_execute_file_contents(path):
    tree = ast.parse(path.read_text())
    assert modules(tree) & FORBIDDEN == set() and unguarded_calls(tree) == []


def test_detects_such_calls():
    # Text for the detector, never executed.
    code = "import pickle, numpy as np\nnp.load('x')\ntorch.load(f, weights_only=False)\neval('1')\nmodel.eval()\nast.literal_eval('1')"
    assert modules(ast.parse(code)) & FORBIDDEN == {"pickle"} and len(unguarded_calls(ast.parse(code))) == 3
