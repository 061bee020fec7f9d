import hashlib
import json
import math
import os
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from networks import NETWORKS, Chain, Residual, assert_untouched, images, make, network_and_inputs, run, snapshot
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from schemes import prepared_with_candidates, random_scheme
from torch import nn

import anybit
from anybit.errors import AnybitError, InvalidFile, InvalidSetting, SchemeMismatch
from anybit.exports.compressed_tensors import export_folder
from anybit.files.strict import read_tensors
from anybit.networks.candidates import Candidates, apply_scheme
from anybit.networks.canonical import Canonical
from anybit.networks.cost import CostModel
from anybit.networks.layers import coverage, prepare, quantized_layers
from anybit.networks.wiring import observe
from anybit.reports.page import Page
from anybit.runs.candidates import read_candidates, write_candidates
from anybit.runs.folder import check_free, free_checkpoint, new_folder
from anybit.runs.report import read_report
from anybit.runs.scheme_file import SchemeFile, packed_tensors, read_canonical, read_scheme, write_canonical
from anybit.runs.trusted import is_trusted, trust
from anybit.scheme import Precision, Scheme


def random_canonical(name: str, seed: int) -> tuple[nn.Module, Canonical]:
    """An unfolded network, and a canonical form of it with random precisions."""
    model, _ = network_and_inputs(name)
    prepared, candidates = prepared_with_candidates(name)
    rng = random.Random(seed)
    edges = {f"edge/{i}": (-rng.random(), rng.random()) for i in range(rng.randint(0, 4))}
    return model, Canonical(apply_scheme(prepared, random_scheme(prepared, seed), candidates), {}, edges)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(4))
def test_any_scheme_round_trips_bitwise_at_the_counted_size(name, seed, tmp_path):
    model, canonical = random_canonical(name, seed)
    _, batch = network_and_inputs(name)
    write_canonical(tmp_path, canonical, {})
    names = coverage(model, observe(model, batch))[0]
    costs = CostModel.of(prepare(model, names), names, observe(model, batch), len(canonical.edges), model)
    assert (tmp_path / "model.safetensors").stat().st_size == costs.file_size(canonical.scheme)
    before = snapshot(model)
    again = read_canonical(tmp_path, model)
    assert_untouched(model, before)
    assert again.scheme == canonical.scheme
    assert again.edges == {key: tuple(torch.tensor(ends).tolist()) for key, ends in canonical.edges.items()}
    assert torch.equal(run(again.model, batch), run(canonical.model, batch))
    tensors = packed_tensors(again)
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in packed_tensors(canonical).items())


def test_entries_named_like_shared_tensors_do_not_collide(tmp_path):
    class Crafty(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)
            self.register_buffer("codes", torch.arange(4, dtype=torch.uint8))
            self.register_buffer("floats", torch.arange(3))

        def forward(self, x):
            return self.fc(x) + self.codes.sum() + self.floats.sum()

    model, x = make(Crafty), torch.ones(2, 3)
    try:
        result = anybit.calibrate(model, torch.randn(20, 3), None, weight_bits=(4,), activation_bits=(8,), pipeline="light")
        result.save(tmp_path / "run")
        assert torch.equal(anybit.load(tmp_path / "run", model=model)(x), result.model(x))
    except AnybitError as error:
        assert "codes" in str(error)


def test_run_loads_bitwise_into_a_fresh_network(run_folder, calibrated):
    _, x, result = calibrated
    loaded = anybit.load(run_folder, model=make(Residual, seed=9))
    assert torch.equal(loaded(x), result.model(x)) and loaded.scheme == result.scheme


def test_run_contains_only_json_and_safetensors(run_folder):
    assert {path.name for path in run_folder.iterdir()} == {
        "scheme.json", "model.safetensors", "report.json", "report.html", "candidates.json", "candidates.safetensors",
        "fingerprint.safetensors",
    }  # fmt: skip


def edit(folder: Path, change) -> None:
    """Change scheme.json as in an editor."""
    data = json.loads((folder / "scheme.json").read_text())
    change(data)
    (folder / "scheme.json").write_text(json.dumps(data))


def rehash(folder: Path) -> None:
    """Write the hash of the (changed) tensors into scheme.json."""
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    edit(folder, lambda data: data.update(sha256=digest))


def reseal(folder: Path, change=lambda tensors: tensors) -> None:
    """Rewrite model.safetensors for the current scheme.json, as one who knows both formats could."""
    data = json.loads((folder / "scheme.json").read_text())
    with suppress(ValidationError):  # an unreadable file has no digest
        digest = SchemeFile.model_validate(data).digest()
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, {"scheme": digest})
        rehash(folder)


EDITS = {
    "fewer activation bits": lambda d: d["layers"]["fc"].update(precision=d["layers"]["fc"]["precision"][:3] + "7"),
    "another preprocessing": lambda d: d.update(preprocessing={"mean": [0.5], "interpolation": "bilinear"}),
    "another task": lambda d: d.update(task="embedding"),
    "other outputs": lambda d: d.update(outputs={"0": 1.0}),
    "fewer weight bits": lambda d: d["layers"]["fc"].update(precision="W2A8" if d["layers"]["fc"]["precision"][1] != "2" else "W3A8"),
    "weights said to be float": lambda d: d["layers"]["fc"].update(precision="float"),
    "weights said to be pruned": lambda d: d["layers"]["fc"].update(precision="W0A8"),
    "no such precision": lambda d: d["layers"]["fc"].update(precision="W9"),
    "not a precision": lambda d: d["layers"]["fc"].update(precision="four"),
    "precision is a number": lambda d: d["layers"]["fc"].update(precision=4),
    "rows": lambda d: d["layers"]["fc"].update(rows=4),
    "no rows": lambda d: d["layers"]["fc"].update(rows=0),
    "columns as text": lambda d: d["layers"]["fc"].update(columns="8"),
    "rows and columns swapped": lambda d: d["layers"]["fc"].update(rows=8, columns=5),
    "unknown field of a layer": lambda d: d["layers"]["fc"].update(bits=4),
    "unknown field": lambda d: d.update(note="mine"),
    "layer left out": lambda d: d["layers"].pop("fc"),
    "layer that is none": lambda d: d["layers"].update({"bn": d["layers"].pop("fc")}),
    "layer of another model": lambda d: d["layers"].update({"fc9": d["layers"].pop("fc")}),
    "layer without a name": lambda d: d["layers"].update({"": d["layers"].pop("fc")}),
    "no layers": lambda d: d.update(layers={}),
    "layers is a list": lambda d: d.update(layers=[]),
    "no hash": lambda d: d.pop("sha256"),
    "another hash": lambda d: d.update(sha256="0" * 64),
    "another format": lambda d: d.update(format="other"),
    "version from the future": lambda d: d.update(version=99),
    "version below the first": lambda d: d.update(version=0),
    "version as text": lambda d: d.update(version="1"),
    "an edge more": lambda d: d["edges"].append("more"),
    "an edge less": lambda d: d["edges"].pop(),
    "no edges": lambda d: d.update(edges=[]),
    "one edge twice": lambda d: d["edges"].__setitem__(0, d["edges"][1]),
    "folds a convolution": lambda d: d["folded"].update(conv="conv"),
    "folds another norm": lambda d: d["folded"].update({"conv": "block2.bn1"}),
    "folds a block": lambda d: d["folded"].update({"block1": "bn"}),
    "folds nothing": lambda d: d.update(folded={}),
    "folds one norm twice": lambda d: d["folded"].update(fc="bn"),
    "folds an unknown norm": lambda d: d["folded"].update(conv="bn7"),
    "task": lambda d: d.update(task="drawing"),
    "preprocessing": lambda d: d.update(preprocessing={"crop": 3}),
}  # fmt: skip


@pytest.mark.parametrize("change", EDITS)
def test_rejects_edited_scheme(change, run_folder):
    edit(run_folder, EDITS[change])
    with pytest.raises(AnybitError) as raised:
        anybit.load(run_folder, model=make(Residual))
    assert "\n" not in str(raised.value)


SOUND = ("fewer activation bits", "another preprocessing", "another task", "other outputs", "another hash")  # nothing else shows it


@pytest.mark.parametrize("change", [name for name in EDITS if name not in SOUND])
def test_rejects_invalid_scheme_with_a_matching_digest(change, run_folder):
    edit(run_folder, EDITS[change])
    reseal(run_folder)
    with pytest.raises(AnybitError) as raised:
        anybit.load(run_folder, model=make(Residual))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", '{"format": "anybit"}', "[" * 100_000, '{"version": NaN}', "\udcff"], ids=repr
)
def test_rejects_file_that_is_not_a_scheme(text, run_folder):
    (run_folder / "scheme.json").write_bytes(text.encode("utf8", "surrogateescape"))
    with pytest.raises(InvalidFile, match=r"scheme\.json"):
        anybit.load(run_folder, model=make(Residual))


@pytest.mark.parametrize("name", ["scheme.json", "model.safetensors"])
def test_rejects_every_truncation(name, run_folder):
    whole = (run_folder / name).read_bytes()
    for share in (0, 0.1, 0.5, 0.9, 0.999):
        (run_folder / name).write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(InvalidFile, match=name.replace(".", r"\.")):
            anybit.load(run_folder, model=make(Residual))


def test_rejects_one_flipped_bit(run_folder):
    path = run_folder / "model.safetensors"
    whole = path.read_bytes()
    for position in random.Random(0).sample(range(len(whole)), 20):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(InvalidFile, match="SHA-256"):
            anybit.load(run_folder, model=make(Residual))


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_rejects_truncated_file_with_a_matching_hash(share, run_folder):
    path = run_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    rehash(run_folder)
    with pytest.raises(InvalidFile, match=r"model\.safetensors"):
        anybit.load(run_folder, model=make(Residual))


TENSORS = {
    "a tensor more": lambda t: t | {"more": torch.ones(1)},
    "a tensor less": lambda t: {key: value for key, value in t.items() if key != "floats"},
    "shorter codes": lambda t: t | {"codes": t["codes"][:-1].clone()},
    "codes of another type": lambda t: t | {"codes": t["codes"].to(torch.int8)},
    "flat edges": lambda t: t | {"edges": t["edges"].flatten()},
    "zero scale": lambda t: t | {"weight_scales": torch.zeros_like(t["weight_scales"])},
    "negative scale": lambda t: t | {"activation_scales": -t["activation_scales"]},
    "nan scale": lambda t: t | {"weight_scales": t["weight_scales"] * float("nan")},
    "nan bias": lambda t: t | {"floats": t["floats"] * float("nan")},
}


@pytest.mark.parametrize("change", TENSORS)
def test_rejects_other_tensors_with_a_matching_hash(change, run_folder):
    reseal(run_folder, TENSORS[change])
    with pytest.raises(InvalidFile):
        anybit.load(run_folder, model=make(Residual))


def test_rejects_zero_point_outside_its_bits(tmp_path):
    prepared, candidates = prepared_with_candidates("chain")
    model = apply_scheme(prepared, Scheme.uniform(quantized_layers(prepared), "W5A4"), candidates)
    quantized_layers(model)["conv2"].input_quantizer.zero_point.fill_(16)
    write_canonical(tmp_path, Canonical(model, {}), {})
    with pytest.raises(InvalidFile, match="conv2: activation zero point 16"):
        read_canonical(tmp_path, make(Chain))


def test_missing_file_or_folder_is_named(run_folder, tmp_path):
    (run_folder / "model.safetensors").unlink()
    with pytest.raises(InvalidFile, match=r"model\.safetensors is missing"):
        anybit.load(run_folder, model=make(Residual))
    with pytest.raises(InvalidFile, match="nowhere"):
        anybit.load(tmp_path / "nowhere", model=make(Residual))


def test_rejects_another_network_by_name(run_folder):
    with pytest.raises(SchemeMismatch, match=r"no quantizable layer .*conv"):
        anybit.load(run_folder, model=make(Chain))


TRAP = """
import pathlib
pathlib.Path(__file__).with_name("executed").touch()
def make():
    import networks
    return networks.make(networks.Residual)
"""


@pytest.fixture
def trapped(run_folder):
    """A folder whose model reference leaves a mark when followed."""
    script = run_folder.parent / "trap.py"
    script.write_text(TRAP)
    edit(run_folder, lambda data: data.update(model={"reference": f"{script}:make"}))
    return run_folder, script


def test_reference_of_a_foreign_folder_is_not_followed(trapped, calibrated):
    folder, script = trapped
    with pytest.raises(InvalidSetting, match=r"not written by your own anybit.*model="):
        anybit.load(folder)
    with pytest.raises(InvalidSetting, match="not written by your own anybit"):
        anybit.allocate(folder, "4bit", data=calibrated[1])
    assert not script.with_name("executed").exists()
    anybit.load(folder, model=make(Residual))
    assert not script.with_name("executed").exists()


def test_reference_of_a_foreign_folder_is_not_passed_on(trapped, calibrated, tmp_path):
    folder, script = trapped
    anybit.allocate(folder, "4bit", data=calibrated[1], model=make(Residual)).save(tmp_path / "second")
    with pytest.raises(InvalidSetting, match="does not name its network"):
        anybit.load(tmp_path / "second")
    assert not script.with_name("executed").exists()


def test_data_of_a_foreign_folder_are_not_followed(run_folder, calibrated):
    script = run_folder.parent / "trap.py"
    script.write_text(TRAP)
    edit(run_folder, lambda data: data.update(data={"reference": f"{script}:make"}))
    with pytest.raises(InvalidSetting, match="data="):
        anybit.allocate(run_folder, "4bit", model=calibrated[0])
    assert not script.with_name("executed").exists()


def test_reference_of_a_trusted_folder_is_followed_until_it_changes(trapped, monkeypatch, tmp_path):
    folder, script = trapped
    trust(folder)
    assert anybit.load(folder).scheme and script.with_name("executed").exists()
    edit(folder, lambda data: data.update(budget="other"))
    assert not is_trusted(folder)
    with pytest.raises(InvalidSetting):
        anybit.load(folder)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    assert not is_trusted(folder)


LISTS = """
import sys, warnings
from pathlib import Path
from anybit.runs.trusted import trust
warnings.simplefilter("error")
for folder in sorted(Path(sys.argv[1]).iterdir()):
    trust(folder)
"""


def test_runs_that_finish_concurrently_are_all_listed(tmp_path):
    for process in "abc":
        for number in range(40):
            (tmp_path / process / str(number)).mkdir(parents=True)
            (tmp_path / process / str(number) / "scheme.json").write_text(f"{process} {number}")
    listing = [subprocess.Popen([sys.executable, "-c", LISTS, tmp_path / process]) for process in "abc"]
    assert [process.wait(timeout=120) for process in listing] == [0, 0, 0]
    assert all(is_trusted(tmp_path / process / str(number)) for process in "abc" for number in range(40))


@pytest.mark.parametrize("state", ["a file", "a broken list"])
def test_run_that_cannot_be_listed_is_saved_with_a_warning(state, calibrated, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
    if state == "a file":
        (tmp_path / "elsewhere").write_text("in the way")
    else:
        (tmp_path / "elsewhere" / "anybit").mkdir(parents=True)
        (tmp_path / "elsewhere" / "anybit" / "runs.json").write_text("[")
    with pytest.warns(UserWarning, match="not listed as your own run") as warned:
        folder = calibrated[2].save(tmp_path / "run")
    assert len(warned) == 1 and "\n" not in str(warned[0].message)
    assert anybit.load(folder, model=calibrated[0]).scheme == calibrated[2].scheme


def test_run_without_a_reference_requires_the_network(run_folder):
    with pytest.raises(InvalidSetting, match=r"with model="):
        anybit.load(run_folder)


def test_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError, match="half way"), new_folder(tmp_path / "runs" / "mine") as draft:
        (draft / "scheme.json").write_text("{")
        raise RuntimeError("half way")
    assert not (tmp_path / "runs" / "mine").exists() and list((tmp_path / "runs").iterdir()) == []
    with new_folder(tmp_path / "runs" / "mine") as draft:
        (draft / "scheme.json").write_text("{}")
        assert not (tmp_path / "runs" / "mine").exists()
    assert [path.name for path in (tmp_path / "runs" / "mine").iterdir()] == ["scheme.json"]


def test_ctrl_c_while_creating_the_draft_leaves_nothing(tmp_path, monkeypatch):
    mkdir = os.mkdir

    def interrupted(*args, **options):
        mkdir(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "run"):
        pytest.fail("the folder was not made")
    assert list(tmp_path.iterdir()) == []


def test_path_created_by_another_run_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(InvalidSetting, match="holds a finished run"), new_folder(tmp_path / "run") as late:
        (late / "report.json").write_text("late")
        with new_folder(tmp_path / "run") as draft:
            (draft / "report.json").write_text("first")
    assert (tmp_path / "run" / "report.json").read_text() == "first" and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_run_has_the_permissions_of_the_umask(calibrated, tmp_path):
    mask = os.umask(0o027)
    try:
        folder = calibrated[2].save(tmp_path / "run")
    finally:
        os.umask(mask)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("moved", [0, 1, 2])
def test_interrupted_overwrite_keeps_one_run_whole(error, moved, run_folder, monkeypatch):
    old, moves, rename = (run_folder / "scheme.json").read_text(), [], Path.rename

    def interrupted(self, target):
        moves.append(self)
        if moved == 0 and len(moves) == 1:
            raise error
        rename(self, target)
        if len(moves) == moved:
            raise error

    with pytest.raises((KeyboardInterrupt, AnybitError)), new_folder(run_folder, overwrite=True) as draft:
        (draft / "scheme.json").write_text("new")
        monkeypatch.setattr(Path, "rename", interrupted)
    assert (run_folder / "scheme.json").read_text() == ("new" if moved == 2 else old)
    assert not list(run_folder.parent.glob(f".{run_folder.name}.*"))


def test_old_run_that_cannot_be_restored_is_not_deleted(run_folder, monkeypatch):
    old, moves, rename = (run_folder / "scheme.json").read_text(), [], Path.rename

    def full(self, target):
        moves.append(self)
        if len(moves) > 1:
            raise OSError
        rename(self, target)

    with pytest.raises(AnybitError), new_folder(run_folder, overwrite=True) as draft:
        (draft / "scheme.json").write_text("new")
        monkeypatch.setattr(Path, "rename", full)
    (left,) = run_folder.parent.glob(f".{run_folder.name}.*")
    assert (left / "old" / "scheme.json").read_text() == old


def test_failed_overwrite_keeps_the_existing_run(run_folder):
    before = {path.name: path.read_bytes() for path in run_folder.iterdir()}
    with pytest.raises(RuntimeError), new_folder(run_folder, overwrite=True) as draft:
        (draft / "scheme.json").write_text("{}")
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in run_folder.iterdir()} == before


def test_existing_run_is_replaced_only_on_request(run_folder, calibrated):
    with pytest.raises(InvalidSetting, match="overwrite=True"):
        calibrated[2].save(run_folder)
    (run_folder / "report.json").write_text("old")
    calibrated[2].save(run_folder, overwrite=True)
    assert (run_folder / "report.json").read_text() != "old"
    assert not [path.name for path in run_folder.parent.iterdir() if path.name.startswith(".")]


def test_run_folder_with_other_files_is_not_deleted(run_folder, calibrated):
    (run_folder / "notes.txt").write_text("dear reader")
    with pytest.raises(InvalidSetting, match="holds a run and other files"):
        calibrated[2].save(run_folder, overwrite=True)
    assert (run_folder / "notes.txt").read_text() == "dear reader"


def test_folder_that_is_not_a_run_is_never_replaced(tmp_path, calibrated):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("dear reader")
    (tmp_path / "file").write_text("dear reader")
    for path in (tmp_path / "thesis", tmp_path / "file"):
        with pytest.raises(InvalidSetting, match="not a run folder"):
            calibrated[2].save(path, overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == (tmp_path / "file").read_text() == "dear reader"


def test_an_empty_folder_may_be_filled(tmp_path, calibrated):
    (tmp_path / "empty").mkdir()
    assert (calibrated[2].save(tmp_path / "empty") / "scheme.json").is_file()


def saved_candidates(folder: Path) -> tuple[Candidates, dict, dict]:
    """(candidates of every bit-width, their metadata, the layers' shapes), written beside a model as by calibrate."""
    prepared, candidates = prepared_with_candidates("upsampling")
    names = list(quantized_layers(prepared))
    write_canonical(folder, Canonical(apply_scheme(prepared, Scheme.uniform(names, "W8A8"), candidates), {}), {})
    table = {"base": "float", "samples": 8, "pairs": False, "floor": 0.0, "rows": {name: {"W8": 0.1, "A8": 0} for name in names}}
    args = {"table": table, "choices": {name: ["W8A8", "W3A4"] for name in names}, "settings": {"seed": 3}}
    write_candidates(folder, candidates, args)
    return candidates, args, {name: tuple(candidates.weights[name, 8].codes.shape) for name in names}


def test_candidates_round_trip_bitwise(tmp_path):
    candidates, args, shapes = saved_candidates(tmp_path)
    again, provenance = read_candidates(tmp_path, shapes)
    assert (
        args.items() <= provenance.items()
        and set(again.weights) == set(candidates.weights)
        and set(again.activations) == set(candidates.activations)
    )
    for key, candidate in candidates.weights.items():
        assert torch.equal(again.weights[key].codes, candidate.codes) and torch.equal(again.weights[key].scale, candidate.scale)
        assert torch.equal(again.weights[key].bias, candidate.bias)
    for key, candidate in candidates.activations.items():
        assert again.activations[key].scale == candidate.scale and again.activations[key].zero_point == candidate.zero_point


@pytest.mark.parametrize("name", ["candidates.json", "candidates.safetensors"])
def test_rejects_damaged_candidates(name, run_folder, calibrated):
    whole = (run_folder / name).read_bytes()
    for content in (b"", whole[: len(whole) // 2]):
        (run_folder / name).write_bytes(content)
        with pytest.raises(InvalidFile, match="candidates"):
            anybit.allocate(run_folder, "4bit", data=calibrated[1], model=calibrated[0])


@pytest.mark.parametrize("field", ["table", "choices", "settings", "sha256", "version"])
def test_rejects_candidates_with_a_missing_field(field, run_folder, calibrated):
    path = run_folder / "candidates.json"
    data = json.loads(path.read_text())
    del data[field]
    path.write_text(json.dumps(data))
    with pytest.raises(InvalidFile, match="candidates"):
        anybit.allocate(run_folder, "4bit", data=calibrated[1], model=calibrated[0])


def test_rejects_file_that_is_not_safetensors(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"not json at all!")
    with pytest.raises(InvalidFile, match=r"x\.safetensors cannot be read"):
        read_tensors(tmp_path / "x.safetensors", {})


def test_scheme_file_lists_its_contents(run_folder, calibrated):
    file = read_scheme(run_folder)
    assert file.scheme == calibrated[2].scheme and set(file.folded) < set(file.layers)
    assert (
        file.budget == "4bit" and file.certificate["seed"] == 0 and file.certificate["bound"] <= file.certificate["predicted_loss"] + 1e-9
    )


def test_pruned_layer_costs_only_its_bias(tmp_path):
    prepared, candidates = prepared_with_candidates("chain")
    sizes = []
    for precision in ("W8", "W2", "W0"):
        scheme = Scheme({name: Precision.parse(precision if name == "conv2" else "W8") for name in quantized_layers(prepared)})
        (tmp_path / precision).mkdir()
        write_canonical(tmp_path / precision, Canonical(apply_scheme(prepared, scheme, candidates), {}), {})
        sizes.append((tmp_path / precision / "model.safetensors").stat().st_size)
    codes = 8 * 72  # weights of conv2; the header's length changes by at most eight bytes
    assert 0 <= sizes[0] - sizes[1] - codes * 6 // 8 <= 8
    assert 0 <= sizes[1] - sizes[2] - codes * 2 // 8 - 8 * 4 <= 8


class Late(Chain):
    """A batch norm that cannot be folded, and a mask of infinities between two layers."""

    def __init__(self):
        super().__init__()
        self.bn0 = nn.BatchNorm2d(3)
        self.last = nn.Linear(5, 5)

    def forward(self, x):
        masked = super().forward(self.bn0(x)).masked_fill(torch.arange(5) == 1, -torch.inf)
        return self.last(torch.softmax(masked, 1))


def hostile(change):
    model = make(Late)
    with torch.no_grad():
        change(model)
    return model


HOSTILE = {
    "a variance just below zero": lambda model: model.bn0.running_var[0].fill_(-1e-12),
    "a variance below zero that folds": lambda model: model.bn1.running_var[0].fill_(-1e-12),
    **{f"a weight of {v}": lambda model, v=v: model.conv1.weight[0, 0, 0, 0].fill_(v) for v in (1e30, 1e36, 1e38)},
    **{f"a bias of {v}": lambda model, v=v: model.fc.bias[0].fill_(v) for v in (1e30, 3e38)},
    "a gamma of 1e38": lambda model: model.bn2.weight[0].fill_(1e38),
    **{f"gammas of {v}": lambda model, v=v: model.bn0.weight.fill_(v) for v in (1e-20, 1e20, 1e36)},
    "no weights but zeros": lambda model: model.conv1.weight.fill_(0),
    "tiny weights": lambda model: model.conv1.weight.mul_(1e-42),
    **{
        f"a buffer {name[:20]!r} of {kind}": lambda model, name=name, kind=kind: model.register_buffer(name, torch.zeros(3, dtype=kind))
        for name in ("__metadata__", "codes", "statistics", "a|W4|codes", "\n")
        for kind in (torch.float32, torch.int64)
    },
    **{
        f"a module {name[:20]!r}": lambda model, name=name: model.add_module(name, nn.BatchNorm2d(3))
        for name in ("__metadata__", "a|W4|codes", "x" * 300, "\u202e")
    },
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_rejects_unreadable_runs_before_the_work(case, tmp_path, monkeypatch):
    """Each accepted run ends in a run that every reader reads back unchanged."""
    model, x = hostile(HOSTILE[case]), images(24)
    try:
        with monkeypatch.context() as patch:
            patch.setattr("anybit.roads.calibrate.sensitivity_table", refuse_to_measure)
            anybit.calibrate(model, x, "6bit", **LIGHT)
    except AnybitError:
        return
    except ZeroDivisionError:  # accepted
        run = anybit.calibrate(model, x, "6bit", **LIGHT)
    folder = run.save(tmp_path / "run")
    assert torch.equal(anybit.load(folder, model)(x[:2]), run.model(x[:2]))
    anybit.allocate(folder, "5bit", x, model=model, cache=False)
    read_report(folder)


def refuse_to_measure(*arguments):
    """Stands for the start of the long work."""
    raise ZeroDivisionError


LIGHT = {"pipeline": "light", "samples": 24, "batch_size": 8, "weight_bits": (2, 8), "activation_bits": (4, 8), "cache": False}


def test_ranges_ignore_infinities_of_a_mask(tmp_path):
    run = anybit.calibrate(make(Late), images(24), "6bit", **LIGHT)
    ends = [end for edge in run.canonical.edges.values() for end in edge]
    assert ends and all(math.isfinite(end) for end in ends)


UNWRITABLE = ["file/run", "bytes\0", "x" * 300, "new/" + "x" * 300 + "/run", "d/" * 1950 + "run", "\udc80", "/proc/run", "/proc/new/run"]


@pytest.mark.parametrize("place", [".", "..", "dangling", *UNWRITABLE])
def test_rejects_unwritable_output_before_the_work(place, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("file").write_text("")
    Path("dangling").symlink_to("nowhere")
    for check in (check_free, free_checkpoint):
        with pytest.raises(InvalidSetting, match=r"Choose another --output|Name a new one inside: --output"):
            check(Path(place), True)
    Path("new/run").mkdir(parents=True)
    check_free(Path("new/run"))
    check_free(Path("new/er/run"))


@pytest.mark.parametrize("place", UNWRITABLE)
def test_every_function_that_writes_rejects_unwritable_places_before_the_work(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    for name in ("roads.grow.training_inputs", "roads.train.training_inputs", "exports.verbs.opened", "reports.page.read_records"):
        monkeypatch.setattr(f"anybit.{name}", refuse_to_measure)
    monkeypatch.setattr("anybit.exports.compressed_tensors.opened", refuse_to_measure)
    model, x = make(Late), images(4)
    writers = {
        "checkpoint": [
            lambda: anybit.grow(model, x, "4bit", distill=1.0, checkpoint=place),
            lambda: anybit.train(model, x, distill=1.0, checkpoint=place),
        ],
        "onnx": [lambda: anybit.export("run", place)],
        "compressed_tensors": [lambda: export_folder("run", place)],
        "output": [lambda: anybit.report("run", output=place)],
        "path": [lambda: Page("").save(place)],
    }
    for option, calls in writers.items():
        for call in calls:
            with pytest.raises(InvalidSetting, match=rf"Choose another (--)?{option.replace('_', '[-_]')}"):
                call()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file"]


def test_read_only_folder_is_found_before_the_work(tmp_path, monkeypatch):
    def mkdir(path, mode=0o777):  # permissions do not stop the superuser
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.mkdir", mkdir)
    with pytest.raises(InvalidSetting, match=r"accepts no files \(Permission denied\)\. Choose another --output"):
        check_free(tmp_path / "run")


def test_checkpoint_of_other_data_names_the_argument(tmp_path, monkeypatch):
    model, place = make(Late), tmp_path / "here" / "mine.ckpt"
    options = {"epochs": 1, "batch_size": 8, "distill": 1.0}
    anybit.grow(model, images(16), "4bit", checkpoint=place, **options)
    with pytest.raises(InvalidSetting, match=r"mine\.ckpt holds an unfinished training .*data was .*another checkpoint=\.") as refused:
        anybit.grow(model, images(17)[1:], "4bit", checkpoint=place, **options)
    assert "folder" not in str(refused.value) and "output" not in str(refused.value)
    with pytest.raises(InvalidSetting, match=r"other settings: train\.seed was 0 and is now 7\. Use") as refused:
        anybit.grow(model, images(16), "4bit", checkpoint=place, **options, seed=7)
    with pytest.raises(InvalidSetting, match=r"here is a folder\. Name a file with checkpoint="):
        anybit.grow(model, images(16), "4bit", checkpoint=tmp_path / "here", **options)
