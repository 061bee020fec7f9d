"""--config: options from a file, a finished run's settings reused, and invalid values rejected by name before any work."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import typer
from commands import FAST, anybit_cli
from typer.testing import CliRunner

from anybit.cli.app import VERBS, app
from anybit.cli.options import Verb
from anybit.errors import AnybitError
from anybit.files.config import read_options
from anybit.settings import Option, options_of, without_none
from anybit.sources.preprocessing import Preprocessing

DESCRIBED = {function.__name__: Verb.of(function, *more) for function, more in VERBS.items()}
OPTIONS = [(verb, one) for verb, described in DESCRIBED.items() for one in described.options.values()]
SETTINGS = {"pipeline": "light", "weight_bits": [4, 8], "activation_bits": "8", "samples": 24}


def calibrate(*more: str, output: str = "run", model: str = "m.py:net"):
    return anybit_cli("calibrate", "--model", model, "--data", "x.npz", "--output", output, "--quiet", *more)


def report(folder: str) -> dict:
    return json.loads(Path(folder, "report.json").read_text())


# Options from a file


@pytest.mark.parametrize("form", ["toml", "json"])
def test_config_file_gives_the_same_run_as_flags(here, form):
    assert calibrate(*FAST, "--budget", "6bit", "--keep", "fc=W8A8", "--memory", "1GiB", "--seed", "3").exit_code == 0
    toml = """
        pipeline = "light"
        weight-bits = [4, 8]
        activation_bits = "8"
        samples = 24
        budget = "6bit"
        keep = { fc = "W8A8" }
        memory = "1GiB"
        seed = 3
    """
    written = {**SETTINGS, "budget": ["6bit"], "keep": ["fc=W8A8"], "memory": 2**30, "seed": 3}
    Path(f"c.{form}").write_text(toml if form == "toml" else json.dumps(written))
    done = calibrate("--config", f"c.{form}", output="again")
    assert done.exit_code == 0, done.stderr
    assert report("again")["settings"] == report("run")["settings"]
    assert Path("again/scheme.json").read_bytes() == Path("run/scheme.json").read_bytes()
    assert Path("again/model.safetensors").read_bytes() == Path("run/model.safetensors").read_bytes()


def test_config_file_accepts_every_option(here):
    run = {"model": "m.py:net", "data": "x.npz", "output": "run"}
    written = {**run, "json": True, "threads": 1, "cache": False, "log": "log.jsonl", **SETTINGS}
    Path("c.json").write_text(json.dumps(written))
    done = anybit_cli("calibrate", "--config", "c.json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["folder"] == "run" and Path("log.jsonl").is_file()


def test_command_line_overrides_config_file(here):
    Path("c.json").write_text(json.dumps({**SETTINGS, "samples": 20, "seed": 5, "bn_tuning": False}))
    assert calibrate("--config", "c.json", "--samples", "24", "--bn-tuning", "--seed", "0").exit_code == 0  # even with the default value, 0
    settings = report("run")["settings"]
    assert (settings["samples"], settings["bn_tuning"], settings["seed"], settings["pipeline"]) == (24, True, 0, "light")


def test_config_file_sets_settings_that_have_no_flag(here):
    Path("c.toml").write_text("epochs = 1\nbatch_size = 8\n[csq]\nlogit = 2.0\n[lsq]\nscale_rate = 0.5\n")
    line = ["grow", "--model", "m.py:net", "--train", "x.npz", "--budget", "6bit", "--output", "run", "--quiet"]
    done = anybit_cli(*line, "--config", "c.toml")
    assert done.exit_code == 0, done.stderr
    settings = report("run")["settings"]
    assert settings["csq"]["logit"] == 2.0 and settings["csq"]["scale_rate"] == settings["lsq"]["scale_rate"] == 0.5
    assert settings["train"]["epochs"] == 1 and settings["train"]["batch_size"] == 8


# Repeating a run


@pytest.mark.parametrize(
    "options",
    [
        ["--pipeline", "light"],
        ["--steps", "3", "--candidate-steps", "2", "--no-bias-tuning", "--keep", "fc=float", "--activation-bits", "8,float"],
        ["--steps", "3", "--candidate-steps", "2", "--weight-bits", "4"],
        ["--steps", "3", "--candidate-steps", "2", "--weight-bits", "4", "--parallel", "--sensitivity-base", "W8A8"],
    ],
    ids=" ".join,
)
def test_calibrate_repeats_a_run_from_its_report(here, options):
    first = ["--weight-bits", "4,8", "--activation-bits", "8", "--samples", "24", *options, "--no-cache", "--budget", "6bit"]
    assert calibrate(*first, model="m.py:residual").exit_code == 0
    done = calibrate("--config", "run/report.json", "--no-cache", output="again", model="m.py:residual")
    assert done.exit_code == 0, done.stderr
    for name in ("model.safetensors", "scheme.json"):
        assert Path("again", name).read_bytes() == Path("run", name).read_bytes()
    assert report("again")["settings"] == report("run")["settings"] and report("again")["budget"] == "6bit"
    assert [row["stage"] for row in report("again")["stages"]] == [row["stage"] for row in report("run")["stages"]]


def save_noise(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    pytest.importorskip("PIL.Image").fromarray(pixels).save(path)


@pytest.mark.parametrize("budgets", [["6bit"], ["6bit", "5bit"]], ids=["one", "several"])
def test_calibrate_repeats_the_preprocessing_of_a_run(here, budgets):
    """Explicit and derived preprocessing, such as the numbers of class folders; also of a run whose report does not record it yet."""
    for at in range(16):
        save_noise(Path("images", "dog" if at % 3 else "cat", f"{at}.png"), at)
        save_noise(Path("tests", "cow" if at % 2 else "cat", f"{at}.png"), 50 + at)
    line = ["calibrate", "--model", "m.py:net", "--data", "images", "--test", "tests", "--quiet"]
    given = ["--mean", "0.5,0.4,0.3", "--std", "0.25", "--size", "8", "--resize", "9", "--interpolation", "nearest"]
    done = anybit_cli(*line, *given, *FAST, *(f"--budget={budget}" for budget in budgets), "--output", "run")
    assert done.exit_code == 0, done.stderr
    inner = "" if len(budgets) == 1 else "5bit"
    assert report(f"run/{inner}")["preprocessing"]["classes"] == ["cat", "cow", "dog"]
    for name, file in (("again", "run/report.json"), ("old", f"run/{inner}/report.json")):
        if name == "old":
            Path(file).write_text(json.dumps({key: value for key, value in report(f"run/{inner}").items() if key != "preprocessing"}))
        done = anybit_cli(*line, "--config", file, "--output", name)
        assert done.exit_code == 0, done.stderr
        one = name if name == "old" else f"{name}/{inner}"
        assert Path(one, "model.safetensors").read_bytes() == Path("run", inner, "model.safetensors").read_bytes()
        assert Path(one, "scheme.json").read_bytes() == Path("run", inner, "scheme.json").read_bytes()
    done = anybit_cli("evaluate", f"again/{inner}", "--data", "tests", "--config", "again/report.json", "--quiet")
    assert done.exit_code == 0, done.stderr


RECORDED = [
    (verb, name, one)
    for verb in ("calibrate", "grow", "train", "search")
    for kind in DESCRIBED[verb].groups.values()
    for name, one in options_of(kind).items()
]


def another(one: Option):
    """Return a value of the option that is not its default."""
    special = {
        "keep": {"fc": "W8A8"}, "outputs": {"1": 0.5}, "weight_bits": [3, 5], "activation_bits": [8, None], "bits": [4, 8],
        "sensitivity_base": "W8A8", "blocks": ["a", "b"], "mean": [0.5], "std": [0.25], "classes": ["a", "b"], "columns": "text=a",
        "step_rates": {"4": 0.5},
    }  # fmt: skip
    if one.name in special:
        value = special[one.name]
        return 4 if one.name == "activation_bits" and one.text.example == "a bit-width, or float" else value
    if one.choices:
        return next(choice for choice in one.choices if choice != one.default)
    kind = without_none(one.kind)
    if kind is bool or isinstance(one.default, bool):
        return not one.default
    if kind not in (int, float):
        return None
    low, high = (one.least if one.least is not None else one.above), (one.most if one.most is not None else one.below)
    values = [one.default + 1 if one.default else 3, (one.default or 0) / 2, 16, 0.5, low, high]
    for value in values:
        try:
            return one.checked(kind(value)) if kind(value) != one.default else 1 / 0
        except (AnybitError, ZeroDivisionError, TypeError, ValueError):
            continue
    return None


@pytest.mark.parametrize("verb", ["calibrate", "grow", "train", "search"])
def test_every_recorded_setting_is_repeated(verb, tmp_path):
    """The repeated run has the report's settings and preprocessing, none of which is a default."""
    tried = 0
    for of_verb, name, one in RECORDED:
        value = another(one) if of_verb == verb else None
        if value is None:
            continue
        kinds = list(DESCRIBED[verb].groups.values())
        one_of = next(kind for kind in kinds if name in options_of(kind))
        try:
            settings = {kind: kind.of(**({name: value} if kind is one_of else {})) for kind in kinds}
        except AnybitError:  # it contradicts the defaults of others
            continue
        first = settings[kinds[0]].to_json()
        report = {"version": 1, "search": {"settings": first}} if verb == "search" else {"version": 1, "settings": first}
        report |= {"candidate_errors": {"fc": {}}}  # those of parallel AdaQuant, if it ran
        report |= {"preprocessing": settings[Preprocessing].to_json()} if Preprocessing in settings else {}
        (tmp_path / "report.json").write_text(json.dumps(report))
        values = read_options(tmp_path / "report.json", DESCRIBED[verb].options, kinds, "--config")
        for kind in kinds:
            again = kind.of(**{key: value for key, value in values.items() if key in options_of(kind)})
            assert again.to_json() == settings[kind].to_json(), (name, value)
        tried += 1
    assert tried >= (3 if verb == "search" else 15), tried


def test_joint_report_repeats_one_of_several_budgets(here):
    assert calibrate(*FAST, "--budget", "6bit", "--budget", "5bit", "--seed", "2").exit_code == 0
    assert calibrate("--config", "run/report.json", "--budget", "5bit", output="again").exit_code == 0
    assert Path("again/model.safetensors").read_bytes() == Path("run/5bit/model.safetensors").read_bytes()
    assert calibrate("--config", "run/report.json", output="all").exit_code == 0
    assert list(report("all")["budgets"]) == ["6bit", "5bit"]


def test_allocate_repeats_the_budget_of_a_report(here):
    assert calibrate(*FAST, "--budget", "6bit").exit_code == 0
    done = anybit_cli("allocate", "run", "--data", "x.npz", "--config", "run/report.json", "--output", "same", "--quiet")
    assert done.exit_code == 0, done.stderr
    assert report("same")["budget"] == "6bit" and report("same")["layers"] == report("run")["layers"]


def test_training_and_search_repeat_from_their_reports(here):
    data = ["--model", "m.py:net", "--train", "x.npz", "--quiet"]
    few = ["--epochs", "1", "--batch-size", "8", "--seed", "1"]
    for verb, options, again, file in (
        ("grow", [*data, *few, "--budget", "6bit", "--planes", "5", "--no-anchor"], data, "model.safetensors"),
        (
            "train",
            [*data, *few, "--bits", "4,8", "--held-out", "0.4", "--step-rates", "4=0.5", "--per-tensor", "--bn-images", "8"],
            data,
            "supernet.safetensors",
        ),
        (
            "search",
            ["train", "--evaluations", "11", "--images", "3", "--bn-images", "4", "--seed", "2", "--no-cache", "--budget", "6bit"],
            ["train", "--no-cache"],
            "search.json",
        ),
    ):
        done = anybit_cli(verb, *options, "--output", verb)
        assert done.exit_code == 0, done.stderr
        done = anybit_cli(verb, *again, "--config", f"{verb}/report.json", "--output", f"{verb}2")
        assert done.exit_code == 0, done.stderr
        one, two = report(verb), report(f"{verb}2")
        assert one["settings"] == two["settings"] and one.get("search", {}).get("settings") == two.get("search", {}).get("settings")
        if file.endswith(".json"):
            first, second = (json.loads(Path(folder, file).read_text()) for folder in (verb, f"{verb}2"))
            assert first["evaluated"] == second["evaluated"] and list(second["budgets"]) == ["6bit"] and first["images"] == second["images"]
        else:
            assert Path(verb, file).read_bytes() == Path(f"{verb}2", file).read_bytes()
    assert anybit_cli("extract", "search", "--budget", "6bit", "--output", "subnet", "--quiet").exit_code == 0
    done = anybit_cli("extract", "search", "--config", "subnet/report.json", "--output", "same", "--quiet")
    assert done.exit_code == 0, done.stderr
    assert report("same")["budget"] == "6bit" and report("same")["layers"] == report("subnet")["layers"]
    done = anybit_cli("extract", "search", "--config", "subnet/report.json", "--scheme", "subnet", "--output", "of", "--quiet")
    assert done.exit_code == 0 and report("of")["budget"] is None, done.stderr  # the command line wins


# Invalid values


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("c.json", '{"sampels": 24}', ["c.json", "'sampels'", "'samples'"]),
        ("c.toml", "weight-bit = [4]", ["c.toml", "'weight_bit'", "'weight_bits'"]),
        ("c.json", '{"config": 1}', ["c.json", "config"]),
        ("c.json", '{"samples": "24"}', ["c.json: samples", "'24'", "a whole number"]),
        ("c.json", '{"samples": 24.0}', ["c.json: samples"]),
        ("c.json", '{"samples": null}', ["c.json: samples"]),
        ("c.json", '{"samples": 1}', ["c.json: samples 1", "2..1000000000"]),
        ("c.toml", "held_out = nan", ["c.toml: held_out nan"]),
        ("c.toml", "drop = inf", ["c.toml: drop inf"]),
        ("c.json", '{"mirror": 1}', ["c.json: mirror 1"]),
        ("c.json", '{"keep": ["fc"]}', ["--keep='fc'"]),
        ("c.json", '{"keep": {"fc": "W9"}}', ["c.json: keep", "2..8"]),
        ("c.json", '{"weight_bits": "four"}', ["weight_bits 'four'", "2,3,4,6,8"]),
        ("c.json", '{"model": 3}', ["c.json: model 3"]),
        ("c.json", '{"budget": 4}', ["c.json: budget 4"]),
        ("c.json", '{"block": ["a"], "blocks": ["b"]}', ["c.json", "twice"]),
        ("c.json", '{"samples": 24, "samples": 25}', ["c.json", "twice"]),
        ("c.json", "[1]", ["c.json", "no settings"]),
        ("c.json", '{"version": 1}', ["c.json", "no settings"]),
        ("c.json", "{", ["c.json", "JSON"]),
        ("c.toml", "= 3", ["c.toml", "TOML"]),
        ("nothing/c.json", None, ["nothing/c.json"]),
    ],
)
def test_rejects_invalid_config_file_by_name(here, name, content, words):
    if content is not None:
        Path(name).write_text(content)
    done = calibrate("--config", name, model="no.py:net")
    assert done.exit_code == 2 and done.stderr.startswith("anybit: ") and len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert not Path("run").exists()


def bad_texts(one: Option) -> list[str]:
    """Values that the option rejects on the command line."""
    kind = without_none(one.kind)
    if kind in (int, float):
        outside = [(one.least, -1), (one.most, 1), (one.above, 0), (one.below, 0)]
        beyond = [str(bound + more) for bound, more in outside if bound is not None]
        return [*beyond, "nan", "inf", "1e400", "many", "", *([str(10**30), str(-(10**30)), "1" * 5000] if kind is int else [])]
    if one.name == "classes":
        return ["", "cat,,dog", "cat,cat"]
    if one.text is not None and not one.repeat:
        return ["nan,inf", "=", "2=nan"]
    return ["nothing"] if one.choices else []


@pytest.fixture(scope="module")
def commands():
    return typer.main.get_command(app).commands


REFUSED = [(verb, one) for verb, one in OPTIONS if one.command_line and bad_texts(one)]


@pytest.mark.parametrize(("verb", "one"), REFUSED, ids=[f"{verb} {one.name}" for verb, one in REFUSED])
def test_command_line_rejects_invalid_value_by_name(commands, verb, one, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    valid = {"model": "no.py:net", "data": "no.npz", "train": "no.npz", "output": "out", "budget": "4bit"}
    options = [f"--{name}={value}" for name, value in valid.items() if name in DESCRIBED[verb].options and name != one.name]
    arguments = ["no" for other in DESCRIBED[verb].options.values() if other.positional]
    for text in bad_texts(one):
        with pytest.raises(SystemExit) as ended:
            commands[verb].main([*arguments, *options, f"{one.written}={text}"])
        message = capsys.readouterr().err
        assert ended.value.code == 2 and (one.name in message or one.written in message), (text, message)
        assert "no.py" not in message and "no.npz" not in message and not Path("out").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("calibrate --batch-size 1e3", "--batch-size '1e3' must be a whole number, 1..1000000000. Write --batch-size 1000."),
        ("calibrate --batch-size 0x10", "--batch-size '0x10' must be a whole number, 1..1000000000."),
        ("calibrate --held-out 1e400", "--held-out '1e400' must be a finite number, above 0 and below 1."),
        ("calibrate --bach-size 3", "there is no option --bach-size. Did you mean --batch-size?"),
        ("calibrate --batch-size", "'--batch-size' requires an argument"),
        ("calibrat", "Did you mean 'calibrate'?"),
        ("calibrate --quiet=3", "'--quiet' does not take a value."),
        ("explain", "Missing argument"),
        ("explain a b c", "unexpected extra argument"),
    ],
)
def test_every_error_of_the_command_line_is_one_line(line, words):
    done = CliRunner().invoke(app, line.split())
    assert done.exit_code == 2 and done.stderr.startswith("anybit: ") and len(done.stderr.splitlines()) == 1
    assert words in done.stderr and not done.stdout


# The options themselves


def test_command_line_defaults_equal_option_defaults(commands):
    for verb, one in OPTIONS:
        if one.command_line:
            [parameter] = [parameter for parameter in commands[verb].params if parameter.name == one.name]
            assert parameter.default in (one.default_text, None), (verb, one.name)
            assert parameter.default == one.default_text or one.positional
            assert one.written in [*parameter.opts, *parameter.secondary_opts] or one.positional


def test_preprocessing_options_are_equal_in_every_verb():
    options = options_of(Preprocessing)
    verbs = {verb for verb, described in DESCRIBED.items() if "mean" in described.options}
    assert verbs == {"calibrate", "grow", "train", "evaluate", "inspect", "profile"} and len(options) == 9
    assert all(DESCRIBED[verb].options[name] == one for verb in verbs for name, one in options.items())
    assert {verb for verb, described in DESCRIBED.items() if "config" in described.options} >= verbs


def test_options_page_is_up_to_date():
    docs = Path(__file__).parent.parent.parent / "docs"
    page = (docs / "command-line.md").read_text(encoding="utf8")
    assert runpy.run_path(str(docs / "reference.py"))["with_tables"](page) == page, "run: make reference"
    assert all(one.written in page for _, one in OPTIONS if one.command_line and not one.positional)
