"""A result's own methods: evaluate, export, show and save."""

import re

import pytest
import torch
from networks import Residual, images, make

import anybit
from anybit.errors import InvalidSetting


def test_result_evaluates_like_its_model_and_folder(calibrated, tmp_path):
    model, inputs, result = calibrated
    labelled = (inputs, model(inputs).argmax(1))
    run = result.save(tmp_path / "run")
    scores = result.evaluate(labelled)
    assert scores == anybit.evaluate(result.model, labelled) == anybit.evaluate(result, labelled)
    assert scores["top1"] == anybit.evaluate(anybit.load(run, model=model), labelled)["top1"]


def test_evaluates_folders_and_references(folders, calibrated, monkeypatch, here):
    result = anybit.calibrate("m.py:net", "x.npz", None, samples=16, weight_bits=(8,), activation_bits=(8,), pipeline="light")
    run = result.save("run")
    scores = anybit.evaluate(run, "x.npz")
    assert scores == anybit.evaluate("run", "x.npz") == result.evaluate("x.npz")
    assert anybit.evaluate("m.py:net", "x.npz").keys() == scores.keys()


def test_unsaved_result_is_exported_verified_and_timed(calibrated, tmp_path):
    model, inputs, result = calibrated
    before = {key: tensor.clone() for key, tensor in result.model.state_dict().items()}
    report = result.export(tmp_path / "net.onnx", inputs)
    assert report["integer_layers"] == report["layers"]
    assert result.verify(tmp_path / "net.onnx", inputs)["ok"]
    assert result.bench(tmp_path / "net.onnx", inputs, rounds=1)["bytes"] == report["bytes"]
    run = result.save(tmp_path / "run")
    assert anybit.verify(run, tmp_path / "net.onnx", model=model, data=inputs)["ok"]
    anybit.export(run, tmp_path / "again.onnx", model=model, data=inputs)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "net.onnx").read_bytes()
    assert all(torch.equal(tensor, before[key]) for key, tensor in result.model.state_dict().items())


def test_error_asks_for_data_that_the_result_does_not_name(calibrated, tmp_path):
    with pytest.raises(InvalidSetting, match="The result does not name data"):
        calibrated[2].export(tmp_path / "net.onnx")


def test_result_has_text_and_html_representations(calibrated):
    _, _, result = calibrated
    size = result.report["result"]["bytes"]
    assert repr(result).startswith("<anybit calibrate result: ") and result.summary() in repr(result) and len(repr(result)) < 200
    shown = result._repr_html_()
    assert shown.startswith("<iframe") and shown.count('"') == 8  # those of the page are escaped
    assert re.search(r"[\d.]+ kB", result.summary()) and size > 0


def test_plot_writes_a_page(calibrated, tmp_path):
    path = calibrated[2].plot().save(tmp_path / "plot.html")
    text = path.read_text(encoding="utf8")
    assert "loss on held-out inputs" in text and text.count("<figure") >= 1 and "Gain of each step" not in text


def test_layers_and_frontier_are_data_frames(calibrated):
    pytest.importorskip("pandas")
    _, _, result = calibrated
    layers, report = result.layers, result.report
    assert list(layers.index) == list(result.scheme) and list(layers["precision"]) == list(map(str, result.scheme.values()))
    assert layers["bytes"].sum() < report["result"]["bytes"] and layers["sensitivity"].notna().all()
    assert all(isinstance(why, str) and why.endswith((".", "?")) for why in layers["why"])
    frontier = result.frontier()
    measured = frontier[frontier["scheme"] != ""]
    assert sorted(measured["scheme"]) == sorted(row["name"] for row in report["schemes"]) and measured["chosen"].sum() == sum(
        row["chosen"] for row in report["schemes"]
    )
    predicted = frontier[frontier["scheme"] == ""]
    assert len(predicted) > 1 and predicted["bytes"].is_monotonic_increasing and (predicted["predicted"].diff().dropna() <= 0).all()


def test_dominated_schemes_are_marked(calibrated):
    pytest.importorskip("pandas")
    frontier = calibrated[2].frontier()
    assert frontier["dominated"].any() and not frontier["dominated"].all()
    for _, row in frontier.iterrows():
        smaller = frontier[frontier["bytes"] <= row["bytes"]]
        is_beaten = ((smaller["predicted"] < row["predicted"]) & ~(smaller["measured"] >= row["measured"])).any()
        assert row["dominated"] == is_beaten
    best = frontier[(frontier["scheme"] == "") & ~frontier["dominated"]]
    assert len(best) > 1


def test_results_of_several_budgets_print_as_a_table(calibrated):
    model, inputs, _ = calibrated
    results = anybit.calibrate(
        model, inputs, ["6bit", "80%"], samples=16, weight_bits=(4, 8), activation_bits=(8,), pipeline="light", solver="none"
    )
    lines = repr(results).splitlines()
    assert isinstance(results, list) and [line.split()[0] for line in lines] == ["6bit", "80%"]
    assert all(result.summary() in line for result, line in zip(results, lines, strict=True))
    assert "2 runs side by side" in results._repr_html_()


def test_result_without_a_table_has_no_frontier():
    pytest.importorskip("pandas")
    model, inputs = make(Residual), images(24)
    result = anybit.grow(model, (inputs, model(inputs).argmax(1)), "4bit", epochs=1, batch_size=12)
    with pytest.raises(InvalidSetting, match="grow has no frontier"):
        result.frontier()
    assert list(result.layers.index) == list(result.scheme) and result.plot().html and len(repr(result.plot())) < 100


@pytest.mark.parametrize("change", [lambda model: model.to(torch.bfloat16), lambda model: model.half(), lambda model: model.double()])
def test_rejects_converted_result_by_layer(change, tmp_path):
    model, inputs = make(Residual), images(24)
    result = anybit.calibrate(model, inputs, None, samples=16, weight_bits=(8,), activation_bits=(8,), pipeline="light", solver="none")
    change(result.model)
    with pytest.raises(InvalidSetting, match=r"conv: .*torch\.\w+.*float32"):
        result.save(tmp_path / "run")
    assert not (tmp_path / "run").exists()
