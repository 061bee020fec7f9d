"""Results that outlive the process: what is stored, when it is reused, and that a run's bytes do not depend on it."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import SCRIPT, anybit_cli
from hypothesis import given
from hypothesis import strategies as st
from networks import Chain, NoBatchNorm, Residual, Windows, images, make

import anybit
from anybit.files.cache import Cache, Entry, entries, remove_damaged, results_folder, trim_cache
from anybit.files.whole import whole_file, write_whole
from anybit.runs.folder import new_folder


def stored_entry(seed: int = 0) -> Entry:
    generator = torch.Generator().manual_seed(seed)
    tensors = {"weight": torch.randn(3, 4, generator=generator), "codes": torch.arange(5, dtype=torch.int8), "number": torch.tensor(2.5)}
    return Entry({"error": 0.1 + seed, "name": "layer.µ|", "none": None}, tensors)


def same(one: Entry, other: Entry) -> bool:
    tensors = all(torch.equal(one.tensors[key], other.tensors[key]) for key in one.tensors)
    types = all(one.tensors[key].dtype == other.tensors[key].dtype for key in one.tensors)
    return one.record == other.record and one.tensors.keys() == other.tensors.keys() and tensors and types


def refuse() -> Entry:
    raise AssertionError("it was to be taken up")


def test_result_is_computed_once_and_reads_back_equal(tmp_path):
    cache = Cache(tmp_path).keyed("weights")
    first = cache("result", stored_entry, lambda result: result)
    again = Cache(tmp_path).keyed("weights")
    assert same(first, stored_entry()) and same(again("result", refuse, lambda result: result), first)
    assert (cache.counts["made"], again.counts["recalled"]) == (1, 1)


@pytest.mark.parametrize("other", [("weights", 1), ("weight",), ("weights", None), ()])
def test_result_under_another_key_is_not_reused(tmp_path, other):
    Cache(tmp_path).keyed("weights").value("result", lambda: 1)
    assert Cache(tmp_path).keyed(*other).value("result", lambda: 2) == 2
    assert Cache(tmp_path).keyed("weights").value("another result", lambda: 3) == 3


def test_cache_without_folder_stores_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Cache().value("result", lambda: 1) == 1 and Cache().value("result", lambda: 2) == 2
    assert list(tmp_path.iterdir()) == []


def test_computed_value_equals_the_value_read_later(tmp_path):
    computed, read = (Cache(tmp_path).value("result", lambda: {4: (1, 2.5)}) for _ in range(2))
    assert computed == read == {"4": [1, 2.5]}


@given(st.integers(0, 2**32), st.sampled_from(["flip", "cut", "append", "empty"]))
def test_damaged_result_is_reported_and_recomputed(tmp_path_factory, seed, damage):
    folder, rng = tmp_path_factory.mktemp("cache"), random.Random(seed)
    Cache(folder)("the layer's result", stored_entry, lambda result: result)
    file = entries(folder)[0].path
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    data = {"cut": data[: rng.randrange(len(data))], "append": data + b"\0", "empty": b""}.get(damage, data)
    file.write_bytes(data)
    with pytest.warns(UserWarning, match="the layer's result.* is damaged"):
        cached = Cache(folder)("the layer's result", stored_entry, lambda result: result)
    assert same(cached, stored_entry()) and same(Cache(folder)("the layer's result", refuse, lambda result: result), stored_entry())


def test_intact_result_of_the_wrong_form_is_recomputed(tmp_path):
    Cache(tmp_path).value("result", lambda: "text")
    with pytest.warns(UserWarning, match="could not convert string to float"):
        assert Cache(tmp_path).value("result", lambda: 2, float) == 2.0


def test_unwritable_cache_costs_a_warning_not_the_run(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = Cache(tmp_path / "file")
    with pytest.warns(UserWarning, match="cannot be written to") as warned:
        assert [cache.keyed(number).value("result", lambda number=number: number) for number in range(3)] == [0, 1, 2]
    assert len(warned) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_write_leaves_no_file(tmp_path, monkeypatch, error):
    def interrupted(self, target):
        raise error(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(error):
        write_whole(tmp_path / "ab" / "entry", b"data")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_trim_removes_least_recently_used_first(tmp_path):
    for number in range(4):
        Cache(tmp_path).value(f"result {number}", lambda number=number: number)
    files = {number: Cache(tmp_path)._path(f"result {number}") for number in range(4)}
    for number, path in files.items():
        os.utime(path, (number, number))
    Cache(tmp_path).value("result 0", refuse)  # used just now
    size = entries(tmp_path)[0].bytes
    assert trim_cache(tmp_path, 2 * size) == 2 * size
    assert [number for number, path in files.items() if path.is_file()] == [0, 3]


def test_trim_removes_leftovers_of_a_killed_process(tmp_path):
    Cache(tmp_path).value("result", lambda: 1)
    folder = entries(tmp_path)[0].path.parent
    old, new = (folder / f".{'ab' * 32}.{process}.tmp" for process in (1, 2))
    for draft in (old, new):
        draft.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert trim_cache(tmp_path, 10**9) == 4 and not old.is_file() and new.is_file() and len(entries(tmp_path)) == 1


def test_trim_removes_only_files_of_the_cache(tmp_path):
    """The cache folder may contain other files, links and pipes."""
    Cache(tmp_path).value("result", lambda: 1)
    results, letters = entries(tmp_path)[0].path.parent, tmp_path / "my"
    letters.mkdir()
    for file in (letters / "letter.txt", letters / "draft.tmp", results / "note"):
        file.write_text("mine")
        os.utime(file, (0, 0))
    (letters / ("ab" * 32)).mkdir()
    os.mkfifo(letters / ("cd" * 32))
    (letters / ("ef" * 32)).symlink_to("/dev/zero")
    before = sorted(tmp_path.glob("*/*"))
    assert len(entries(tmp_path)) == 1 and remove_damaged(tmp_path) == {}
    trim_cache(tmp_path, 0)
    assert [path for path in before if not os.path.lexists(path)] == [
        path for path in before if path.parent == results and path.name != "note"
    ]


def test_unremovable_result_costs_a_warning(tmp_path, monkeypatch):
    for name in "abc":
        Cache(tmp_path).value(name, lambda: 1)
    entries(tmp_path)[0].path.write_bytes(b"damage")

    def refused(self, missing_ok=False):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.warns(UserWarning, match="cannot be removed .Permission denied") as warned:
        assert trim_cache(tmp_path, 0) == 0
    assert len(warned) == 1
    with pytest.warns(UserWarning, match="cannot be removed"):
        remove_damaged(tmp_path)


def test_damaged_results_are_detected_without_a_run(tmp_path):
    for name in "abc":
        Cache(tmp_path).value(name, lambda: 1)
    file = Cache(tmp_path)._path("b")
    file.write_bytes(file.read_bytes()[:-1])
    assert list(remove_damaged(tmp_path)) == [file] and len(entries(tmp_path)) == 2


# Whole runs


SETTINGS = {
    "samples": 40, "batch_size": 16, "weight_bits": (2, 4, 8), "activation_bits": (4, 8), "steps": 6, "candidate_steps": 3,
    "alternatives": 2, "step_batch": 4,
}  # fmt: skip


def calibrated(folder: Path, cache, network=Residual, budget="4bit", **settings) -> dict[str, bytes]:
    """The bytes of a run, without times and memory."""
    model = make(network)
    anybit.calibrate(model, images(40), budget, cache=cache, **{**SETTINGS, **settings}).save(folder, overwrite=True)
    return bytes_of(folder)


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The bytes of a run folder, without times and memory."""
    cached = json.loads((folder / "report.json").read_text())
    cached.pop("stages")
    files = ("scheme.json", "model.safetensors", "candidates.json", "candidates.safetensors")
    return {"report": json.dumps(cached).encode(), **{name: (folder / name).read_bytes() for name in files}}


def computed_names(monkeypatch) -> list[str]:
    """The names of results, as they are computed from now on."""
    computed: list[str] = []
    keep = Cache._keep
    monkeypatch.setattr(Cache, "_keep", lambda self, path, name, entry: (computed.append(name), keep(self, path, name, entry)))
    return computed


@pytest.mark.parametrize("network", [Residual, NoBatchNorm, Windows])
def test_run_is_byte_identical_with_any_part_cached(tmp_path, monkeypatch, network):
    settings = {"unit": "layer"} if network is Windows else {}
    reference = calibrated(tmp_path / "run", False, network, **settings)
    cache, computed = tmp_path / "kept", computed_names(monkeypatch)
    assert calibrated(tmp_path / "run", cache, network, **settings) == reference
    everything = len(computed)
    assert everything == len(entries(cache)) > 20
    computed.clear()
    assert calibrated(tmp_path / "run", cache, network, **settings) == reference and computed == []
    for seed in range(6):
        rng = random.Random(seed)
        share, cached = rng.random(), entries(cache)
        removed = [entry.path for entry in cached if rng.random() < share]
        for path in removed:
            path.unlink()
        computed.clear()
        assert calibrated(tmp_path / "run", cache, network, **settings) == reference
        assert 0 < len(computed) <= everything - (len(cached) - len(removed)) or not removed


@pytest.fixture(scope="module")
def whole_cache(tmp_path_factory) -> Path:
    """The cache of a run of SETTINGS, which tests copy and do not change."""
    here = tmp_path_factory.mktemp("cache")
    calibrated(here / "run", here / "kept", Chain)
    return here / "kept"


@pytest.fixture
def filled_cache(whole_cache, tmp_path) -> Path:
    """A copy of that cache."""
    return shutil.copytree(whole_cache, tmp_path / "kept")


def test_new_budget_reuses_every_independent_result(tmp_path, monkeypatch, filled_cache):
    computed = computed_names(monkeypatch)
    calibrated(tmp_path / "run", filled_cache, Chain, budget="3bit")
    touched = ("allocation", "measured", "ranges", "candidates", "sequential", "batch-norm tuning", "bias tuning", "edge ranges")
    assert [name for name in computed if not name.startswith(touched)] == [] and "allocation" in computed


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({"steps": 7}, "sequential AdaQuant of"),
        ({"alternatives": 3}, "measured"),
        ({"pairs": True}, "floor"),
        ({"sensitivity": "hawq"}, "floor"),
        ({"sensitivity_base": "W6A6"}, "ranges"),
        ({"candidate_steps": 4, "parallel": True}, "parallel AdaQuant of"),
        ({"rounding": "adaround", "parallel": True}, "parallel AdaRound of"),
        ({"bn_prior": 0.5}, "matching of candidates"),
        ({"estimator": "minmax"}, "ranges"),
        ({"seed": 1}, "ranges"),
        ({"batch_size": 8}, "ranges"),
    ],
)
def test_changed_setting_recomputes_only_dependent_results(tmp_path, monkeypatch, filled_cache, settings, first):
    if "parallel" in settings:
        calibrated(tmp_path / "run", filled_cache, Chain, parallel=settings["parallel"])
    computed = computed_names(monkeypatch)
    with_cache = calibrated(tmp_path / "run", filled_cache, Chain, **settings)
    assert computed and computed[0].startswith(first)
    assert with_cache == calibrated(tmp_path / "run", False, Chain, **settings)


def test_other_weights_data_or_code_reuse_nothing(tmp_path, monkeypatch):
    model, inputs = make(Chain), images(40)
    computed = computed_names(monkeypatch)
    counts = []

    def run(model, inputs) -> int:
        computed.clear()
        anybit.calibrate(model, inputs, "4bit", cache=tmp_path / "kept", **{**SETTINGS, "pipeline": "light"})
        return len(computed)

    counts.append(run(model, inputs))
    assert run(model, inputs) == 0
    other = inputs.clone()
    other[0, 0, 0, 0] += 1e-3
    counts.append(run(model, other))
    other = make(Chain)
    with torch.no_grad():
        next(other.parameters())[0, 0, 0, 0] += 1e-6  # too small to change which schemes are measured
    counts.append(run(other, inputs))
    monkeypatch.setattr("anybit.roads.keys.code_version", lambda: "another")
    counts.append(run(model, inputs))
    monkeypatch.setattr("anybit.roads.keys.machine", lambda device: "another")
    counts.append(run(model, inputs))
    assert len(set(counts)) == 1 and counts[0] > 10


def test_changed_metric_code_is_measured_again(tmp_path, monkeypatch):
    model, inputs = make(Residual), images(40)
    labels = torch.zeros(40, dtype=torch.int64)
    computed = computed_names(monkeypatch)
    for metric in (lambda outputs, labels: 1.0, lambda outputs, labels: 2.0):
        computed.clear()
        settings = {**SETTINGS, "pipeline": "light"}
        result = anybit.calibrate(model, (inputs, labels), "4bit", metric=metric, cache=tmp_path / "kept", **settings)
        assert {row["metric"] for row in result.report["schemes"]} == {metric(None, None)} and any(
            n.startswith("measured") for n in computed
        )


@pytest.mark.parametrize("reader", ["constant path", "computed path", "imported module"])
def test_a_metric_that_reads_files_or_imports_is_measured_again(reader, tmp_path, monkeypatch):
    model, data, file = make(Residual), (images(40), torch.zeros(40, dtype=torch.int64)), tmp_path / "weights.py"
    settings = {**SETTINGS, "pipeline": "light", "cache": tmp_path / "kept"}
    monkeypatch.syspath_prepend(tmp_path)

    def constant(outputs, labels):
        return float(file.read_text().partition("=")[2])

    def computed(outputs, labels):
        with open(os.path.join(tmp_path, "weights" + ".py")) as opened:
            return float(opened.read().partition("=")[2])

    def imported(outputs, labels):
        import weights

        return weights.value

    metric = {"constant path": constant, "computed path": computed, "imported module": imported}[reader]
    for value in (1.0, 2.0):
        file.write_text(f"value={value}")
        sys.modules.pop("weights", None)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        result = anybit.calibrate(model, data, "4bit", metric=metric, **settings)
        assert {row["metric"] for row in result.report["schemes"]} == {value}
    sys.modules.pop("weights", None)


# The command line


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(SCRIPT)
    np.savez("x.npz", x=images(60).numpy())
    return tmp_path


COMMAND = [
    "calibrate", "--model", "m.py:residual", "--data", "x.npz", "--budget", "4bit", "--samples", "60", "--batch-size", "16",
    "--weight-bits", "2,4,8", "--activation-bits", "8", "--steps", "5", "--candidate-steps", "3",
]  # fmt: skip


def started(output: str) -> subprocess.Popen:
    arguments = [sys.executable, "-m", "anybit", *COMMAND, "--threads", "1", "--output", output]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stopped(output: str, after: int, by: signal.Signals) -> subprocess.Popen:
    """A run that receives this signal once `after` results are stored."""
    process = started(output)
    while process.poll() is None and len(entries(results_folder())) < after:
        time.sleep(0.05)
    process.send_signal(by)
    process.out, process.err = process.communicate(timeout=60)
    return process


def test_killed_run_resumes_to_identical_bytes(here):
    assert anybit_cli(*COMMAND, "--threads", "1", "--no-cache", "--output", "reference").exit_code == 0
    for after in (3, 25):
        assert stopped("run", after, signal.SIGKILL).returncode == -signal.SIGKILL
        assert not Path("run").exists() and len(entries(results_folder())) >= after
    resumed = anybit_cli(*COMMAND, "--threads", "1", "--output", "run")
    assert resumed.exit_code == 0 and "results reused from the cache" in resumed.stderr
    assert bytes_of(Path("run")) == bytes_of(Path("reference"))


def test_ctrl_c_exits_with_130_and_keeps_finished_results(here):
    process = stopped("run", 10, signal.SIGINT)
    assert process.returncode == 130 and "anybit: interrupted" in process.err
    assert process.err.rstrip().splitlines()[-1].endswith(" ".join([*COMMAND, "--threads", "1", "--output", "run"]))  # which continues
    assert {path.name for path in here.iterdir()} == {"m.py", "x.npz"}
    assert len(entries(results_folder())) >= 10 and not list(results_folder().rglob("*.tmp"))


def test_cache_verb_shows_and_trims(here):
    assert anybit_cli(*COMMAND, "--output", "run", "--pipeline", "light").exit_code == 0
    cached = json.loads(anybit_cli("cache", "--json").stdout)
    assert cached["results"] > 10 and cached["bytes"] == sum(entry.bytes for entry in entries(results_folder())) > 0
    assert f"{cached['results']} results" in anybit_cli("cache").stdout
    file = entries(results_folder())[0].path
    file.write_bytes(b"damage")
    assert f"damaged and removed: {file}" in anybit_cli("cache", "--check").stdout and not file.exists()
    assert json.loads(anybit_cli("cache", "--trim", "0B", "--json").stdout)["results"] == 0
    assert anybit_cli("cache", "--trim", "much").exit_code == 2


def test_no_cache_stores_nothing(here):
    assert anybit_cli(*COMMAND, "--output", "run", "--pipeline", "light", "--no-cache").exit_code == 0
    assert entries(results_folder()) == []


def test_full_disk_keeps_finished_results_and_no_partial_files(here):
    limited = [sys.executable, "-c", LIMITED, *COMMAND, "--threads", "1", "--output", "run"]
    process = subprocess.run(limited, capture_output=True, text=True, timeout=120)
    assert process.returncode == 2, process.stderr
    assert "anybit: run cannot be written" in process.stderr.splitlines()[-1] and "the same command continues" in process.stderr
    assert {path.name for path in here.iterdir()} == {"m.py", "x.npz"}
    resumed = anybit_cli(*COMMAND, "--threads", "1", "--output", "run")
    recalled, computed = map(int, re.search(r"(\d+) results reused from the cache, (\d+) computed", resumed.stderr).groups())
    assert resumed.exit_code == 0 and recalled > 20 and computed < 5  # the few that were too large to store


# No file of this process can grow beyond a few kB, as on a full disk: results of layers fit, the run's files do not.
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))
sys.argv[0] = "anybit"
from anybit.cli.app import main
main()
"""


WRITER = """
import sys, time
from pathlib import Path
from anybit.files.whole import whole_file
from anybit.runs.folder import new_folder
place = Path(sys.argv[1])
with whole_file(place / "file.json", "") as file, new_folder(place / "run", overwrite=True) as draft:
    file.write_text("theirs")
    (draft / "report.json").write_text("theirs")
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writers(tmp_path):
    """Start processes that write a file and a run, each once it reads a line from stdin."""
    started = []

    def start() -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def write_both(place: Path) -> None:
    with whole_file(place / "file.json", "") as file:
        file.write_text("mine")
    with new_folder(place / "run", overwrite=True) as draft:
        (draft / "report.json").write_text("mine")


def test_partial_files_of_a_killed_process_are_removed_by_the_next(tmp_path, writers):
    process = writers()
    assert len(list(tmp_path.iterdir())) == 2
    process.kill()
    process.wait()
    write_both(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "file.json"}


def test_concurrent_writers_all_finish_and_the_last_one_wins(tmp_path, writers):
    others = [writers(), writers()]
    write_both(tmp_path)
    assert (tmp_path / "file.json").read_text() == (tmp_path / "run" / "report.json").read_text() == "mine"
    for process in others:
        process.communicate("", timeout=20)
        assert process.returncode == 0
    assert (tmp_path / "file.json").read_text() == (tmp_path / "run" / "report.json").read_text() == "theirs"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "file.json"}


def test_old_run_stays_when_its_replacement_is_killed(tmp_path):
    draft = tmp_path / f".run.{'0' * 16}.anybit"
    (draft / "old").mkdir(parents=True)
    with new_folder(tmp_path / "run") as new:
        (new / "report.json").write_text("{}")
    assert draft.is_dir()
    with new_folder(tmp_path / "run", overwrite=True) as new:
        (new / "report.json").write_text("{}")
    assert not draft.exists()


@pytest.mark.parametrize("dead", [1, 2024, 10**8])
def test_user_files_stay_whatever_their_names(dead, tmp_path):
    names = [f".run.{dead}.backup", f".run.{dead}.old.backup", f".run.{dead}.0123abcd", ".run.anybit", ".run.tmp", ".file.json.tmp",
             f".file.json.{dead}.tmp", f".run.2.{'0' * 16}.anybit"]  # fmt: skip
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f".run.{'1' * 16}.anybit").symlink_to(tmp_path / "elsewhere")
    write_both(tmp_path)
    assert all((tmp_path / name / "mine.txt").is_file() for name in names) and (tmp_path / "elsewhere").is_dir()


def test_writes_the_longest_file_name(tmp_path):
    name = "µ" * 120 + ".json"
    with whole_file(tmp_path / name, "") as draft:
        draft.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == [name]
