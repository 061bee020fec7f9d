"""Explanation of a layer's bits: prices are slopes of the frontier, words agree with numbers, and files are read strictly."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import anybit_cli, one_json_object
from hypothesis import given, settings
from hypothesis import strategies as st

import anybit
from anybit.allocation.frontier import frontier
from anybit.files.strict import sealed, write_json
from anybit.reports.explanation import explain
from anybit.runs.report import write_report
from anybit.scheme import Precision

BITS = (2, 3, 4, 6, 8)


def written(folder: Path, report: dict) -> Path:
    folder.mkdir(exist_ok=True)
    write_report(folder, report)
    return folder


def report_of_table(table: dict, scheme: dict, budget: str | None, weights: dict) -> dict:
    """A report of layers with this table (layer -> precision -> candidate) at a scheme."""
    total = sum(weights.values())
    bits = sum(weights[name] * Precision.parse(precision).weight_bits for name, precision in scheme.items()) / total
    size = sum(table[name][precision]["bytes"] for name, precision in scheme.items())
    bops = sum(table[name][precision]["bops"] for name, precision in scheme.items())
    return {
        "version": 1,
        "settings": {},
        "environment": {},
        "budget": budget,
        "result": {"weight_bits": bits, "bytes": size, "percent": 100 * size / (4 * total), "bops": bops},
        "float_bytes": 4 * total,
        "layers": {n: {"precision": p, "weights": weights[n], "bytes": table[n][p]["bytes"]} for n, p in scheme.items()},
        "table": {"floor": 0.0, "fixed_bytes": 0, "weights": total, "layers": table},
        "certificate": {"chosen": "allocated 1"},
        "stages": [],
    }


@st.composite
def tables(draw):
    """(table, weights): three layers of random size, whose losses are random."""
    weights = {name: draw(st.integers(1, 500)) * 8 for name in ("a", "b.conv", "b.other")}
    losses = st.integers(-3, 1000).map(lambda number: number / 1024)
    table = {
        name: {
            f"W{bits}A8": {"loss": draw(losses), "bytes": count * bits // 8 + 4, "bops": count * bits * 8 * 3} for bits in BITS
        }
        for name, count in weights.items()
    }  # fmt: skip
    return table, weights


@settings(max_examples=60, deadline=None)
@given(tables(), st.sampled_from(["3bit", "900kB", "50%", "bops=10G"]), st.integers(0, 20))
def test_prices_of_steps_on_the_frontier_bracket_the_shadow_price(tmp_path_factory, network, budget, steps):
    table, weights = network
    cost = {"3bit": "bits", "900kB": "bytes", "50%": "bytes", "bops=10G": "bops"}[budget]
    choices = {name: [Precision.parse(text) for text in options] for name, options in table.items()}
    losses = {name: np.array([one["loss"] for one in options.values()]) for name, options in table.items()}
    costs = {
        name: np.array([weights[name] * p.weight_bits / 8 if cost == "bits" else table[name][str(p)][cost] for p in options], float)
        for name, options in choices.items()
    }
    hull = frontier(choices, losses, costs)
    steps = min(steps, len(hull.steps))
    scheme = {name: str(precision) for name, precision in hull.scheme(steps).items()}
    folder = written(tmp_path_factory.mktemp("run") / "run", report_of_table(table, scheme, budget, weights))
    for name in table:
        explanation = explain(folder, name)
        last, following, more, less = (explanation[key] for key in ("shadow_price", "next_step", "more", "less"))
        assert explanation["limited"] == cost and explanation["precision"] == scheme[name] and explanation["on_frontier"]
        assert (last is None) == (steps == 0) and (following is None) == (steps == len(hull.steps))
        if last:
            step = hull.steps[steps - 1]
            assert (last["layer"], last["to"]) == (step.layer, str(step.precision)) and last["price"] == pytest.approx(step.price)
            assert more is None or more["price"] <= last["price"] * (1 + 1e-9)
        if following:
            assert following["price"] == pytest.approx(hull.steps[steps].price) and following["layer"] == hull.steps[steps].layer
            assert less is None or less["price"] >= following["price"] * (1 - 1e-9)
        at = list(table[name]).index(scheme[name])
        rises, falls = costs[name] - costs[name][at], losses[name][at] - losses[name]
        assert (None if more is None else more["price"]) == max((falls[rises > 0] / rises[rises > 0]).tolist(), default=None)
        assert (None if less is None else less["price"]) == min((falls[rises < 0] / rises[rises < 0]).tolist(), default=None)
        for move in filter(None, (more, less)):
            loss = {text: one["loss"] for text, one in table[name].items()}
            assert move["loss"] == pytest.approx(loss[move["to"]] - loss[scheme[name]]) and move["price"] == -move["loss"] / move["cost"]
        assert explanation["why"] and all(sentence.endswith(".") and "nan" not in sentence for sentence in explanation["why"])


WEIGHTS = {"a": 8000, "b": 8000}
TABLE = {
    "a": {"W2A8": {"loss": 0.5, "bytes": 2000, "bops": 1}, "W4A8": {"loss": 0.1, "bytes": 4000, "bops": 2}},
    "b": {"W2A8": {"loss": 0.3, "bytes": 2000, "bops": 1}, "W4A8": {"loss": 0.2, "bytes": 4000, "bops": 2}},
}
THREE = TABLE | {"c": {"W2A8": {"loss": 0.05, "bytes": 2000, "bops": 1}, "W4A8": {"loss": 0.04, "bytes": 4000, "bops": 2}}}


def test_explanation_of_a_hand_computed_case(tmp_path):
    scheme = {"a": "W4A8", "b": "W2A8"}
    explanation = explain(written(tmp_path / "run", report_of_table(TABLE, scheme, "7kB", WEIGHTS)), "b")
    assert explanation["shadow_price"] == {
        "layer": "a", "from": "W2A8", "to": "W4A8", "cost": 2000, "loss": pytest.approx(-0.4), "price": pytest.approx(2e-4),
    }  # fmt: skip
    assert explanation["more"] == {
        "layer": "b", "from": "W2A8", "to": "W4A8", "cost": 2000, "loss": pytest.approx(-0.1), "price": pytest.approx(5e-5),
    }  # fmt: skip
    assert explanation["next_step"] == explanation["more"] and explanation["less"] is None and explanation["left"] == 1000
    words = " ".join(explanation["why"])
    assert "b is W2A8: 8 k weights, 2.0 kB of the file's 6.0 kB (33.3 %), 0.3 of predicted loss." in words
    assert "shadow price is 0.2 of loss per kB: the last step within this size took a from W2A8 to W4A8, 2.0 kB for 0.4 less" in words
    assert "More, W4A8, would cost 2.0 kB and gain 0.1, 0.05 of loss per kB: less than the shadow price" in words


@pytest.mark.parametrize(
    ("scheme", "budget", "layer", "words"),
    [
        ({"a": "W2A8", "b": "W4A8"}, "7kB", "a", "1.0 kB left, too little"),
        ({"a": "W2A8", "b": "W4A8"}, "9kB", "a", "steps are whole"),
        ({"a": "W2A8", "b": "W4A8"}, "9kB", "b", "not on the frontier"),
        ({"a": "W2A8", "b": "W2A8", "c": "W4A8"}, "9kB", "c", "less than the next step would gain with it, but"),
        ({"a": "W4A8", "b": "W4A8", "c": "W2A8"}, "9kB", "b", "more than the next step would gain with it."),
        ({"a": "W4A8", "b": "W4A8"}, "9kB", "b", "no other layer can use it"),
        ({"a": "W4A8", "b": "W4A8"}, None, "b", "No budget was given"),
        ({"a": "W2A8", "b": "W2A8"}, "loss=0.9", "a", "smallest scheme that keeps its limit"),
        ({"a": "W2A8", "b": "W2A8"}, "2bit", "a", "0 B of codes left, too little"),
        ({"a": "W4A8", "b": "W2A8"}, "3bit", "a", "per kB of codes"),
        ({"a": "W4A8", "b": "W2A8"}, "bops=3", "a", "per million BOPs"),
    ],
)
def test_every_reason_has_its_words(tmp_path, scheme, budget, layer, words):
    report = report_of_table({name: THREE[name] for name in scheme}, scheme, budget, dict.fromkeys(scheme, 8000))
    assert words in " ".join(explain(written(tmp_path / "run", report), layer)["why"])


def test_explains_the_tightest_of_several_limits(tmp_path):
    scheme = {"a": "W4A8", "b": "W2A8"}
    limited = {
        text: explain(written(tmp_path / "run", report_of_table(TABLE, scheme, text, WEIGHTS)), "a")["limited"]
        for text in ("3bit,100kB", "8bit,6kB", "8bit,60kB,bops=3")
    }
    assert list(limited.values()) == ["bits", "bytes", "bops"]


def test_explanation_of_a_run_agrees_with_its_files(folders):
    report = json.loads((folders["calibrated"] / "report.json").read_text())
    for layer, row in report["layers"].items():
        explanation = explain(folders["calibrated"], layer)
        assert explanation["candidates"] == report["table"]["layers"][layer] and explanation["precision"] == row["precision"]
        assert explanation["errors"]["candidates"] == report["candidate_errors"].get(layer, {})
        assert {name for name in report["units"] if name == layer or layer.startswith(f"{name}.")} == set(explanation["errors"]["units"])
        assert json.loads(json.dumps(explanation)) == explanation and explanation["left"] >= 0 and explanation["limited"] == "bits"
    chosen = report["certificate"]["chosen"]
    assert any(chosen in sentence for sentence in explanation["why"]) == (chosen != "allocated 1")


def test_kept_layer_is_explained_by_keep(calibrated, quick, tmp_path):
    model, inputs, _ = calibrated
    run = anybit.calibrate(model, inputs, "4bit", keep={"fc": "W8A8"}, **{**quick, "pipeline": "light"}).save(tmp_path / "run")
    assert any("no choice" in sentence for sentence in explain(run, "fc")["why"])


def test_training_shows_the_bits_after_each_epoch(folders):
    report = json.loads((folders["grown"] / "report.json").read_text())
    explanation = explain(folders["grown"], "fc")
    assert explanation["bits"] == {row["epoch"]: row["layers"]["fc"] for row in report["epochs"]} and explanation["road"] == "grow"
    assert f"after each: {', '.join(map(str, explanation['bits'].values()))}." in explanation["why"][0]


@pytest.mark.parametrize(("objective", "words"), [("likeliest planes", "the likeliest planes within"), (None, "started with")])
def test_training_says_what_decided_the_bits(folders, tmp_path, objective, words):
    report = json.loads((folders["grown"] / "report.json").read_text())
    report["certificate"] = {"objective": objective} if objective else {}
    del report["sha256"]
    assert words in explain(written(tmp_path / "run", report), "fc")["why"][-1]


def test_search_shows_the_evaluated_precisions(folders):
    search, explanation = json.loads((folders["search"] / "search.json").read_text()), explain(folders["search"], "fc")
    assert sum(row["evaluated"] for row in explanation["candidates"].values()) == len(search["evaluated"])
    assert max(row["best_score"] for row in explanation["candidates"].values() if row["evaluated"]) == max(
        r["score"] for r in search["evaluated"]
    )
    assert explanation["budgets"] == {"5bit": search["budgets"]["5bit"]["scheme"]["fc"]}
    assert len(explanation["front"]) == len(search["front"]) == sum(row["on_front"] for row in explanation["candidates"].values())
    assert "extract" in explain(folders["supernet"], "fc")["why"][0]
    assert "subnet" in explain(folders["subnet"], "fc")["why"][0]


@pytest.mark.parametrize("road", ["calibrated", "grown", "supernet", "search", "subnet"])
def test_command_explains_runs_of_every_road_and_suggests_layers(folders, road):
    text = anybit_cli("explain", str(folders[road]), "fc")
    assert text.exit_code == 0 and "fc" in text.stdout and not text.stderr
    assert one_json_object(anybit_cli("explain", str(folders[road]), "fc", "--json").stdout)["layer"] == "fc"
    for name in ("block1.conv", "fc "):
        wrong = anybit_cli("explain", str(folders[road]), name)
        assert wrong.exit_code == 2 and "did you mean" in wrong.stderr and len(wrong.stderr.splitlines()) == 1


def test_table_marks_the_precision_of_the_layer(folders):
    explanation = explain(folders["calibrated"], "fc")
    marked = [line for line in anybit_cli("explain", str(folders["calibrated"]), "fc").stdout.splitlines() if "> " in line]
    assert len(marked) == 1 and f"> {explanation['precision']} " in marked[0]


def test_report_without_a_table_must_be_recreated(run_folder):
    report = json.loads((run_folder / "report.json").read_text())
    written(run_folder, {key: value for key, value in report.items() if key != "table"})
    with pytest.raises(anybit.InvalidFile, match=r"anybit.allocate\(.*, budget='4bit'\)\.save\("):
        explain(run_folder, "fc")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("layers",), None),
        (("layers", "fc", "precision"), 4),
        (("layers", "fc", "precision"), "W5A5"),
        (("layers", "fc", "weights"), "many"),
        (("table",), []),
        (("table", "layers"), {}),
        (("table", "layers", "another"), {"W4A8": {"loss": 0.0, "bytes": 1, "bops": 1}}),
        (("table", "layers", "fc"), {}),
        (("table", "layers", "fc", "W4A8", "loss"), None),
        (("table", "layers", "fc", "W4A8", "bytes"), 1.5),
        (("table", "layers", "fc", "W44A8"), {"loss": 0.0, "bytes": 1, "bops": 1}),
        (("result",), 3),
        (("budget",), 3),
        (("budget",), "4 bits or so"),
        (("candidate_errors",), {"fc": 1}),
        (("units",), {"fc": {"before": "small"}}),
        (("certificate",), None),
    ],
)
def test_rejects_broken_report(run_folder, place, value):
    report = json.loads((run_folder / "report.json").read_text())
    piece = report
    for key in place[:-1]:
        piece = piece[key]
    piece[place[-1]] = value
    with pytest.raises(anybit.InvalidFile, match=r"report\.json"):
        explain(written(run_folder, report), "fc")


def test_rejects_other_folders(tmp_path, folders):
    with pytest.raises(anybit.InvalidFile, match="not a run folder"):
        explain(tmp_path, "fc")
    search = tmp_path / "search"
    search.mkdir()
    for path in folders["search"].iterdir():
        (search / path.name).write_bytes(path.read_bytes())
    whole = json.loads((search / "search.json").read_text())
    for broken, words in (
        ({}, "Field required"),
        (whole | {"evaluated": 3}, "evaluated"),
        (whole | {"front": [{**whole["front"][0], "scheme": {"fc": "W8"}, "origin": "guessed"}]}, "origin"),
        (whole | {"budgets": {"5 bits or so": whole["budgets"]["5bit"]}}, "budgets"),
        (whole | {"sha256": "another"}, "supernet"),
    ):
        write_json(search / "search.json", sealed({"version": 1, **broken}))
        with pytest.raises(anybit.InvalidFile, match=rf"search\.json.*{words}"):
            explain(search, "fc")
    (search / "search.json").write_text("[]")
    with pytest.raises(anybit.InvalidFile, match=r"search\.json"):
        explain(search, "fc")
