"""Mutated files, read by the benchmark's functions; files that once caused errors; foreign folders, which execute nothing."""

import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from commands import anybit_cli
from networks import Residual, make
from PIL import Image
from safetensors.torch import save_file

import anybit
from anybit.errors import AnybitError, InvalidFile, InvalidInput, SchemeMismatch
from anybit.runs.folder import is_run
from anybit.runs.report import read_report
from anybit.runs.scheme_file import read_scheme
from anybit.sources.images import read_image
from anybit.sources.preprocessing import Preprocessing

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.reliability import hostile_files


def failed(cases) -> list:
    return [(case.number, case.kind, case.mutation, case.outcome) for case in cases if case.outcome.startswith("FAILED")]


def test_mutated_file_raises_a_typed_error_or_loads_its_contents(tmp_path):
    cases = hostile_files.run_cases(tmp_path, range(260), seed=20)
    assert failed(cases) == []
    errors = {kind: sum(case.outcome == "error" for case in cases if case.kind == kind) for kind in hostile_files.KINDS}
    assert all(count > 0 for kind, count in errors.items() if kind != "stored result"), errors
    assert {case.outcome for case in cases if not case.remade} <= {"same", "error", "edited"}


@pytest.mark.slow
def test_ten_thousand_mutated_files(tmp_path):
    assert failed(hostile_files.run_cases(tmp_path, range(10_000), seed=1)) == []


def test_harness_detects_faulty_readers(tmp_path):
    """Faulty readers accept damage, hang, exhaust memory or raise another error."""
    kinds = {"passes": lambda folder: 0, "memory": lambda folder: np.ones(2**27), "raises": lambda folder: [][0]}
    for name, read in kinds.items():
        case = hostile_files.Case(0, name, "x", "m", False)
        hostile_files.judge(case, hostile_files.Kind(("x",), read), tmp_path, {name: 1})
        assert case.outcome.startswith("FAILED"), name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hostile_files, "SECONDS", 0.05)
        case = hostile_files.Case(0, "hangs", "x", "m", False)
        hostile_files.judge(case, hostile_files.Kind(("x",), lambda folder: [None for _ in iter(int, 1)]), tmp_path, {})
        assert "TooLong" in case.outcome


# Regressions


def edited(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_rejects_bit_width_of_thousands_of_digits(run_folder):
    data = json.loads((run_folder / "scheme.json").read_text())
    data["layers"]["fc"]["precision"] = "W" + "9" * 5000
    edited(run_folder / "scheme.json", layers=data["layers"])
    with pytest.raises(InvalidFile, match=r"scheme\.json.*W999") as raised:
        read_scheme(run_folder)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(("field", "value"), [("model", {"reference": 5}), ("model", {"weights": 5}), ("data", {"reference": []})])
def test_rejects_reference_that_is_not_text(field, value, run_folder):
    edited(run_folder / "scheme.json", **{field: value})
    with pytest.raises(InvalidFile, match=rf"scheme\.json: {field}"):
        read_scheme(run_folder)


@pytest.mark.parametrize("rows", [10**12, 2**62])
def test_rejects_absurd_size_before_allocating_memory(rows, run_folder):
    data = json.loads((run_folder / "scheme.json").read_text())
    data["layers"]["fc"]["rows"] = rows
    edited(run_folder / "scheme.json", layers=data["layers"])
    hostile_files.remake_run(run_folder)
    with hostile_files.bounded(), pytest.raises(SchemeMismatch, match=str(rows)):
        anybit.load(run_folder, model=make(Residual))


@pytest.mark.parametrize("content", ['{"a": 1}', "7", "[1]", "[", "null"])
def test_broken_list_of_trusted_runs_is_named(content, run_folder, tmp_path):
    (tmp_path / "state" / "anybit" / "runs.json").write_text(content)
    edited(run_folder / "scheme.json", model={"reference": "os:getcwd"})
    with pytest.raises(InvalidFile, match=r"runs\.json"):
        anybit.load(run_folder)


def test_rejects_edited_report_and_report_of_another_run(run_folder, calibrated, tmp_path):
    assert read_report(run_folder)["result"] == calibrated[2].report["result"]
    report = json.loads((run_folder / "report.json").read_text())
    edited(run_folder / "report.json", result={**report["result"], "weight_bits": 1.0})
    with pytest.raises(InvalidFile, match=r"report\.json was changed after it was written"):
        read_report(run_folder)
    other = anybit.allocate(run_folder, "6bit", data=calibrated[1], model=calibrated[0]).save(tmp_path / "other")
    shutil.copy(other / "report.json", run_folder / "report.json")
    with pytest.raises(InvalidFile, match=r"not measured on model\.safetensors"):
        read_report(run_folder)


def test_accepts_report_with_other_times(run_folder):
    edited(run_folder / "report.json", stages=[])
    assert read_report(run_folder)["stages"] == []


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("layers", lambda layers: None),
        ("stages", lambda stages: None),
        ("stages", lambda stages: stages * 1000),
        ("budget", lambda budget: budget * 1000),
        ("result", lambda result: None),
        ("schemes", lambda rows: [{key: value for key, value in row.items() if key != "predicted"} for row in rows]),
        ("schemes", lambda rows: [{**row, "top1": [1]} for row in rows]),
        ("schemes", lambda rows: [{**row, "chosen": False} for row in rows]),
        ("ladder", lambda rows: [{**row, "kept": False} for row in rows]),
        ("ladder", lambda rows: []),
        ("units", lambda units: {name: {"before": 1.0} for name in units}),
    ],
)
def test_rejects_report_with_missing_fields(section, change, run_folder):
    path = run_folder / "report.json"
    edited(path, **{section: change(json.loads(path.read_text())[section])})
    hostile_files.remake_report(run_folder)
    with pytest.raises(InvalidFile, match=rf"report\.json.*{section[:-1]}") as raised:
        read_report(run_folder)
    assert len(str(raised.value)) < 1000


def test_error_messages_are_short_for_any_file(run_folder, calibrated, tmp_path):
    save_file({"a" * 10_000: torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(SchemeMismatch, match="have additional aaa") as raised:
        anybit.sources.models.load_weights(make(Residual), tmp_path / "w.safetensors")
    assert len(str(raised.value)) < 1000
    path = run_folder / "candidates.json"
    edited(path, settings={**json.loads(path.read_text())["settings"], "task": "a" * 10_000})
    hostile_files.reseal(path)
    with pytest.raises(InvalidFile, match=r"candidates\.json: settings: task") as raised:
        anybit.allocate(run_folder, "4bit", data=calibrated[1], model=calibrated[0])
    assert len(str(raised.value)) < 1000


def test_rejects_candidates_of_another_run(run_folder, calibrated, tmp_path):
    other = anybit.allocate(run_folder, "6bit", data=calibrated[1], model=calibrated[0]).save(tmp_path / "other")
    for name in ("candidates.json", "candidates.safetensors"):
        shutil.copy(other / name, run_folder / name)
    with pytest.raises(InvalidFile, match="belongs to a different run"):
        anybit.allocate(run_folder, "4bit", data=calibrated[1], model=calibrated[0])


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("settings", lambda s: {**s, "samples": "many"}),
        ("settings", lambda s: {**s, "weight_bits": [8]}),
        ("settings", lambda s: {**s, "keep": {"fc": "W99"}}),
        ("settings", lambda s: {**s, "alternatives": 10**9}),
        ("table", lambda t: {**t, "rows": {name: row for name, row in t["rows"].items() if name != "fc"}}),
        ("table", lambda t: {**t, "base": "W99"}),
        ("choices", lambda c: {**c, "fc": []}),
        ("choices", lambda c: {**c, "fc9": ["W8A8"]}),
    ],
)
def test_rejects_edited_candidates_with_a_matching_digest(section, change, run_folder, calibrated):
    path = run_folder / "candidates.json"
    edited(path, **{section: change(json.loads(path.read_text())[section])})
    hostile_files.reseal(path)
    with pytest.raises(AnybitError) as raised:
        anybit.allocate(run_folder, "4bit", data=calibrated[1], model=calibrated[0])
    assert isinstance(raised.value, (InvalidFile, SchemeMismatch)) and "\n" not in str(raised.value)


def test_rejects_run_that_links_to_its_parent(run_folder):
    (run_folder / "again").symlink_to(run_folder.parent)
    assert not is_run(run_folder)


def test_rejects_compressed_archive_of_weights(tmp_path):
    import zipfile

    torch.save(make(Residual).state_dict(), tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as archive, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in archive.namelist():
            bomb.writestr(name, archive.read(name))
    anybit.sources.models.load_weights(make(Residual), tmp_path / "w.pt")
    with pytest.raises(InvalidFile, match=r"bomb\.pt.*compressed"):
        anybit.sources.models.load_weights(make(Residual), tmp_path / "bomb.pt")


class Marker:
    """A pickle that leaves a mark when it runs code."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_code_in_weights_is_not_executed(tmp_path):
    torch.save({"a": Marker(tmp_path / "executed")}, tmp_path / "w.pt")
    np.savez(tmp_path / "x.npz", x=np.array([Marker(tmp_path / "executed")], dtype=object))
    with pytest.raises(InvalidFile, match=r"w\.pt"):
        anybit.sources.models.load_weights(make(Residual), tmp_path / "w.pt")
    with pytest.raises(InvalidFile, match=r"x\.npz"):
        anybit.sources.inputs.load_data(str(tmp_path / "x.npz"))
    assert not (tmp_path / "executed").exists()


def test_a_broken_image_is_named(tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(100):
        broken = bytearray(whole)
        broken[rng.integers(8, len(whole))] = rng.integers(256)
        (tmp_path / "a.png").write_bytes(bytes(broken[: rng.integers(20, len(whole))]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read_image(tmp_path / "a.png", Preprocessing())
            except InvalidInput as error:
                assert "a.png" in str(error)


def test_rejects_exported_file_with_external_data(exported_run):
    run_folder, exported, model, data = exported_run
    graph = onnx.load(exported)
    tensor = graph.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    tensor.external_data.add(key="location", value="../../etc/passwd")
    exported.write_bytes(graph.SerializeToString())
    with pytest.raises(InvalidFile, match=r"net\.onnx.*other files"):
        anybit.verify(run_folder, exported, model=model, data=data)


def another_shape(graph: onnx.GraphProto) -> str:
    """Change a constant that reshapes a weight's codes."""
    shape = next(tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT64)
    shape.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(shape) + 10**12, shape.name))
    return shape.name


def another_setting(graph: onnx.GraphProto) -> str:
    next(setting for node in graph.node if node.op_type == "Conv" for setting in node.attribute if setting.name == "pads").ints[0] = 10**12
    return "operators"


@pytest.mark.parametrize("change", [another_shape, another_setting])
def test_graph_that_differs_from_the_run_is_not_executed(change, calibrated, tmp_path, monkeypatch):
    model, data, _ = calibrated
    result = anybit.calibrate(model, data, "6bit", pipeline="light", cache=False)  # with bit-widths that ONNX has no type for
    run_folder, exported = result.save(tmp_path / "run"), tmp_path / "net.onnx"
    anybit.export(run_folder, exported, model=model, data=data)
    graph = onnx.load(exported)
    named = change(graph.graph)
    exported.write_bytes(graph.SerializeToString())
    monkeypatch.setattr("anybit.onnx.verification.session", lambda *args, **kwargs: pytest.fail("the file is run"))
    report = anybit.verify(run_folder, exported, model=model, data=data)
    assert not report["ok"] and named in report["failures"][0] and "not run" in report["skipped"]["kernels and numbers"]


# A foreign folder: its references are code, and no verb follows them

SCRIPT = """
import pathlib
pathlib.Path({mark!r}).touch()
def make():
    import networks
    return networks.make(networks.Residual)
def data():
    return make()
def network():
    return make()
"""


def foreign(folder: Path, script: Path) -> None:
    """Turn the folder into a stranger's: every reference in it names the script."""
    for name in ("scheme.json", "supernet.json"):
        if (folder / name).is_file():
            edited(folder / name, model={"reference": f"{script}:make", "weights": str(script)}, data={"reference": f"{script}:data"})


@pytest.mark.parametrize("reference", ["{script}:make", "os:getcwd", "antigravity:fly", "timm:hf-hub:someone/else", "torchvision:../x"])
def test_foreign_reference_is_not_followed(reference, run_folder, tmp_path):
    script = tmp_path / "trap.py"
    script.write_text(SCRIPT.format(mark=str(tmp_path / "executed")))
    edited(run_folder / "scheme.json", model={"reference": reference.format(script=script)})
    with pytest.raises(anybit.InvalidSetting, match="is code"):
        anybit.load(run_folder)
    assert not (tmp_path / "executed").exists()


def test_no_verb_executes_code_named_by_a_foreign_folder(exported_run, tmp_path, monkeypatch):
    run_folder, exported, *_ = exported_run
    monkeypatch.chdir(tmp_path)
    network, x = make(Residual), torch.randn(40, 3, 8, 8)
    supernet = anybit.train(network, (x, torch.arange(40) % 5), bits=(2, 4), epochs=1, batch_size=16, held_out=0.3, bn_images=16)
    store = supernet.save(tmp_path / "store")
    np.savez("x.npz", x=x.numpy(), y=np.arange(40) % 5)
    script = tmp_path / "trap.py"
    script.write_text(SCRIPT.format(mark=str(tmp_path / "executed")))
    for folder in (run_folder, store):
        foreign(folder, script)
    run, supernet_run = str(run_folder), str(store)
    for arguments in (
        ["evaluate", run, "--data", "x.npz"],
        ["allocate", run, "--budget", "4bit", "--output", "out"],
        ["allocate", run, "--budget", "4bit", "--data", "x.npz", "--output", "out"],
        ["export", run, "--onnx", "y.onnx"],
        ["verify", run, str(exported)],
        ["bench", run],
        ["search", supernet_run, "--output", "out"],
        ["search", supernet_run, "--data", "x.npz", "--output", "out"],
        ["extract", supernet_run, "--budget", "3bit", "--output", "out"],
        ["extract", supernet_run, "--scheme", run, "--output", "out"],
    ):
        done = anybit_cli(*arguments)
        assert done.exit_code == 2 and done.stderr.count("\n") == 1, (arguments, done.stderr, done.exception)
        assert not (tmp_path / "executed").exists(), arguments
    for arguments in (
        ["report", run, supernet_run, "--output", "page.html"],
        ["diff", run, run],
        ["explain", run, "fc"],
        ["explain", supernet_run, "fc"],
    ):
        assert anybit_cli(*arguments).exit_code == 0, arguments
        assert not (tmp_path / "executed").exists(), arguments
    anybit.supernets.store.slice_subnet(store, supernet.uniform(4))
    read_report(run_folder)
    with pytest.raises(anybit.InvalidSetting):
        anybit.load_supernet(store)
    with pytest.raises(anybit.InvalidSetting, match="data="):
        anybit.verify(run_folder, exported, model=network)
    assert not (tmp_path / "executed").exists() and not Path("out").exists()
