"""Logs: each event is written when it happens, as valid JSON, as documented in docs/command-line.md."""

import ast
import errno
import json
import math
import re
from datetime import UTC, datetime
from pathlib import Path

import language
import numpy as np
import pytest
from commands import SCRIPT, anybit_cli
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Chain, images, make

from anybit.cli.logs import WIDTH, completing, readable
from anybit.errors import InvalidSetting
from anybit.files.lines import appended, plain
from anybit.progress import listening, tell

ROOT = Path(__file__).parent.parent.parent
TABLE = (ROOT / "docs" / "command-line.md").read_text().split("## Logs")[1].split("\n## ")[0]
DOCUMENTED = {
    cells[1].strip(" `"): set(re.findall(r"`(\w+)`", cells[3]))
    for cells in (line.split("|") for line in TABLE.splitlines() if line.startswith("| `"))
}
SELDOM = {"tokens", "texts", "windows", "latency", "top5", "spearman", "pearson", "exact", "f1", "openvino", "accuracy"}
"""Fields that need what the small runs here do not have."""


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The log of every verb that takes long, appended to one file."""
    folder = tmp_path_factory.mktemp("logged")
    x = images(48)
    y = make(Chain)(x).argmax(1).numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_STATE_HOME", "state")
        patch.setenv("XDG_CACHE_HOME", "cache")
        Path("m.py").write_text(SCRIPT)
        np.savez("x.npz", x=x.numpy(), y=y)
        language.folder("bert", Path("net"))
        language.write_tsv(Path("t.tsv"), 40)
        model, test = ["--model", "m.py:net"], ["--test", "x.npz"]
        quick = ["--weight-bits", "4,8", "--activation-bits", "8", "--samples", "40", "--steps", "3", "--candidate-steps", "2"]
        metric = ["--metric", "m.py:ones"]
        epochs = [*test, "--epochs", "2", "--batch-size", "16"]
        for line in (
            ["calibrate", *model, "--parallel", "--data", "x.npz", *test, *quick, *metric, "--budget", "6bit", "--output", "run"],
            ["calibrate", *model, "--data", "x.npz", *quick, "--budget", "6bit", "--output", "again"],
            ["allocate", "run", "--budget", "5bit", "--output", "second"],
            ["grow", *model, "--train", "x.npz", *epochs, "--budget", "4bit", "--output", "grown"],
            ["grow", *model, "--train", "x.npz", *epochs, "--method", "msq", "--budget", "4bit", "--output", "shrunk"],
            ["train", *model, "--train", "x.npz", *epochs, "--bits", "2,8", "--held-out", "0.3", "--output", "supernet"],
            ["search", "supernet", "--evaluations", "12", "--budget", "4bit", "--output", "found"],
            ["extract", "found", "--budget", "4bit", "--output", "subnet"],
            ["evaluate", "run", "--data", "x.npz", "--metric", "m.py:ones"],
            ["export", "run", "--onnx", "net.onnx"],
            ["verify", "run", "net.onnx"],
            ["bench", "run", "net.onnx", "--rounds", "1"],
            ["profile", *model, "--data", "x.npz", "--rounds", "1"],
            ["calibrate", "--model", "hf:net", "--data", "t.tsv", "--pipeline", "light", *quick, "--budget", "6bit", "--output", "texts"],
            ["export", "texts", "--compressed-tensors", "folder"],
        ):
            done = anybit_cli(*line, "--log", "log.jsonl", "--quiet")
            assert done.exit_code == 0 and not done.stderr, (line, done.stderr, done.exception)
        anybit_cli("evaluate", "run", "--data", "nowhere.npz", "--log", "log.jsonl")
        return rows("log.jsonl")


def events_in_the_code():
    for path in (ROOT / "src" / "anybit").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "tell":
                yield call.args[0].value


def test_documented_events_are_those_of_the_code():
    assert set(events_in_the_code()) == set(DOCUMENTED)


def test_logged_events_and_fields_match_the_documentation(logged):
    seen = {}
    for row in logged:
        seen.setdefault(row["event"], set()).update(set(row) - {"time", "event", "stage", "seconds", "ones"})  # ones: a metric
    assert set(seen) == set(DOCUMENTED)
    assert {event: fields - DOCUMENTED[event] for event, fields in seen.items() if not fields <= DOCUMENTED[event]} == {}
    assert {event: DOCUMENTED[event] - fields - SELDOM for event, fields in seen.items() if DOCUMENTED[event] - fields - SELDOM} == {}


def test_every_line_has_timestamp_and_elapsed_time(logged):
    times = [datetime.fromisoformat(row["time"]) for row in logged]
    assert times == sorted(times) and all(time.tzinfo == UTC for time in times)
    assert all(row["seconds"] >= 0 for row in logged) and all(list(row)[:2] == ["time", "event"] for row in logged)


def test_begin_and_end_events_nest(logged):
    verb = stage = None
    for row in logged:
        if row["event"] == "begins":
            assert verb is None
            verb = row["verb"]
        elif row["event"] == "stage begins":
            assert stage is None
            stage = row["stage"]
        assert verb is not None and row.get("stage") == stage
        if row["event"] == "stage ends":
            assert row["peak_bytes"] > 0
            stage = None
        elif row["event"] == "ends":
            assert row["verb"] == verb and stage is None
            verb = None
    assert verb is None
    assert logged[-1]["status"] == "error" and logged[-1]["error"] == "InvalidInput" and "nowhere.npz" in logged[-1]["message"]


def test_log_agrees_with_the_report(here):
    quick = ["--weight-bits", "4,8", "--activation-bits", "8", "--samples", "24", "--steps", "3", "--candidate-steps", "2"]
    line = ["calibrate", "--model", "m.py:residual", "--data", "x.npz", *quick, "--budget", "6bit", "--output", "run"]
    assert anybit_cli(*line, "--log", "logs/run.jsonl").exit_code == 0
    log, report = rows("logs/run.jsonl"), json.loads(Path("run/report.json").read_text())
    of = {event: [row for row in log if row["event"] == event] for event in DOCUMENTED}
    units = {row["unit"]: row for row in of["unit"] if row["stage"] == "polish"}
    assert {name: unit["after"] for name, unit in report["units"].items()} == {name: row["after"] for name, row in units.items()}
    candidates = {(row["unit"], row["bits"]) for row in of["unit"] if row["stage"] == "parallel AdaQuant"}
    assert candidates == {(name, int(bits)) for name, errors in report["candidate_errors"].items() for bits in errors}
    assert [(row["step"], row["loss"], row["kept"]) for row in of["step"]] == [(r["step"], r["loss"], r["kept"]) for r in report["ladder"]]
    assert [(row["name"], row["scheme"], row["measured"]) for row in of["scheme"]] == [
        (row["name"], row["scheme"], row["measured"]) for row in report["schemes"]
    ]
    assert of["allocation"][0]["certificate"] == report["certificate"]
    assert of["allocation"][0]["scheme"] == {name: row["precision"] for name, row in report["layers"].items()}
    assert [(row["stage"], row["seconds"]) for row in of["stage ends"]] == [(row["stage"], row["seconds"]) for row in report["stages"]]
    table = json.loads(Path("run/candidates.json").read_text())["table"]["rows"]
    assert {(row["layer"], row["precision"]): row["loss"] for row in of["sensitivity"]} == {
        (layer, precision): loss for layer, row in table.items() for precision, loss in row.items()
    }


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(SCRIPT)
    np.savez("x.npz", x=images(24).numpy())
    return tmp_path


def test_events_reach_only_listeners():
    events = []
    tell("note", note="lost")
    with listening(events=lambda event, fields: events.append((event, fields))):
        tell("note", note="heard")
    tell("note", note="lost")
    assert events == [("note", {"note": "heard"})]


def test_events_are_records_of_the_standard_logger(caplog):
    tell("note", note="lost")
    with caplog.at_level("INFO", "anybit"):
        tell("unit", unit="fc 100%", after=0.5)
    [record] = caplog.records
    assert (record.name, record.levelname, record.getMessage()) == ("anybit", "INFO", "unit")
    assert record.fields == {"unit": "fc 100%", "after": 0.5}


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.builds(np.float32, st.floats(width=32)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None)
@given(anything)
def test_every_event_is_one_line_of_json(value):
    line = json.dumps(plain({"time": "2026-01-01T00:00:00", "event": "note", "value": value, "seconds": 0.5}), allow_nan=False)
    assert "\n" not in line and plain(json.loads(line)) == json.loads(line)
    shown = readable({"time": "2026-01-01T00:00:00", "event": "note", "value": value, "seconds": 0.5})
    assert shown.isprintable() and len(shown) <= WIDTH


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_non_finite_number_is_null(value):
    assert plain({"loss": value, "soft": {"loss": [value, 1.5]}}) == {"loss": None, "soft": {"loss": [None, 1.5]}}


def test_events_are_written_as_they_happen(tmp_path):
    path = tmp_path / "log.jsonl"
    with appended(path) as write, listening(events=completing(write)):
        tell("stage begins", stage="ranges")
        assert [row["event"] for row in rows(path)] == ["stage begins"]
        tell("tuning", epoch=1, loss=0.25)
        assert rows(path)[1] | {"time": 0, "seconds": 0} == {
            "time": 0, "event": "tuning", "stage": "ranges", "epoch": 1, "loss": 0.25, "seconds": 0,
        }  # fmt: skip


def test_log_appends_after_a_truncated_line(tmp_path):
    path = tmp_path / "log.jsonl"
    for _ in range(2):
        with appended(path) as write, listening(events=completing(write)):
            tell("note", note="whole")
    with open(path, "a") as file:
        file.write('{"time": "2026-01-')
    with appended(path) as write, listening(events=completing(write)):
        tell("note", note="whole")
    lines = path.read_text().splitlines()
    assert [json.loads(line)["note"] for line in (lines[0], lines[1], lines[3])] == ["whole"] * 3 and len(lines) == 4


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("x.npz", "is not a log"),
        (".", "cannot be written"),
        ("x.npz/log.jsonl", "cannot be written"),
        ("/dev/full", "No space left"),
        ("run/log.jsonl", "inside the run folder"),
        ("run", "inside the run folder"),
    ],
)
def test_rejects_unwritable_log_before_any_work(here, path, words):
    before = Path("x.npz").read_bytes()
    done = anybit_cli("calibrate", "--model", "no.py:net", "--data", "x.npz", "--output", "run", "--log", path)
    assert done.exit_code == 2 and words in done.stderr and "--log" in done.stderr and len(done.stderr.splitlines()) == 1
    assert Path("x.npz").read_bytes() == before and not Path("run").exists()


def test_disk_full_during_logging_costs_the_rest_and_one_warning(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    with appended(path) as write, listening(events=completing(write)):
        tell("note", note="first")

        def full(record):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("anybit.files.lines.json.dumps", lambda *a, **k: full(None))
            with pytest.warns(UserWarning, match="No space left"):
                tell("note", note="second")
        tell("note", note="third")  # no second warning: it would be an error here
    assert [row["note"] for row in rows(path)] == ["first"]


def test_disk_full_at_the_first_line_is_an_error():
    with pytest.raises(InvalidSetting, match="No space left"), appended(Path("/dev/full")) as write:
        write({"time": "now", "event": "note"})


def test_verbose_prints_one_line_per_event_and_excludes_quiet(here):
    line = ["calibrate", "--model", "m.py:net", "--data", "x.npz", "--samples", "24", "--pipeline", "light", "--output", "run"]
    refused = anybit_cli(*line, "--verbose", "--quiet")
    assert refused.exit_code == 2 and "--verbose" in refused.stderr and not Path("run").exists()
    done = anybit_cli(*line, "--verbose", "--json", "--log", "log.jsonl")
    assert done.exit_code == 0 and len(json.loads(done.stdout)) > 1
    log = rows("log.jsonl")
    assert [re.match(r"\d\d:\d\d:\d\d (?:\[.*?\] )?([a-z ]+?)(?::| \()", text)[1] for text in done.stderr.splitlines()] == [
        r["event"] for r in log
    ]
    assert any("layer fc, precision W4" in text for text in done.stderr.splitlines())


def test_only_the_first_process_logs(here, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    done = anybit_cli("evaluate", "--model", "m.py:net", "--data", "nowhere.npz", "--log", "log.jsonl", "--verbose")
    assert done.exit_code == 2 and not Path("log.jsonl").exists() and len(done.stderr.splitlines()) == 1


def test_interruption_is_logged(here, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("anybit.roads.evaluate.load_model", stop)
    assert anybit_cli("evaluate", "--model", "m.py:net", "--data", "x.npz", "--log", "log.jsonl").exit_code == 130
    assert rows("log.jsonl")[-1]["status"] == "interrupted"
