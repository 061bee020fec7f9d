import json
import re

import numpy as np
import pytest
import torch
from conftest import QUICK
from networks import (
    NETWORKS,
    CalledTwice,
    Chain,
    Items,
    NoBatchNorm,
    Residual,
    SharedWeight,
    WithoutGradients,
    assert_untouched,
    images,
    make,
    network_and_inputs,
    numbers,
    run,
    snapshot,
    tokens,
)
from torch import nn

import anybit
from anybit.data.samples import Samples
from anybit.data.tasks import named_task
from anybit.errors import AnybitError, InfeasibleBudget, InvalidFile, InvalidInput, InvalidSetting, UnsupportedModel
from anybit.networks.cost import HEADER_SLACK
from anybit.networks.layers import scheme_of
from anybit.progress import listening
from anybit.roads import memory as memory_checks
from anybit.roads.allocate import allocate
from anybit.roads.calibrate import calibrate
from anybit.roads.polish import polish_scheme
from anybit.roads.result import save_all
from anybit.roads.steps import chance_in_words
from anybit.runs.opened import load
from anybit.scheme import Precision

FAST = {**QUICK, "pipeline": "light", "samples": 24, "weight_bits": (4, 8), "activation_bits": (8,)}


def samples_of(name: str, count: int = 24) -> Samples:
    inputs = NETWORKS[name][1](count)
    if isinstance(inputs, dict):
        return Samples(Items([{key: value[i] for key, value in inputs.items()} for i in range(count)]), labelled=False)
    if isinstance(inputs, tuple):
        return Samples(Items([tuple(part[i] for part in inputs) for i in range(count)]), labelled=False)
    return Samples(Items(list(inputs)), labelled=False)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_calibrated_and_round_trips_bitwise(name, tmp_path):
    model, batch = network_and_inputs(name)
    before = snapshot(model)
    settings = {**FAST, "pipeline": "advanced", "steps": 2, "candidate_steps": 1}
    result = anybit.calibrate(model, samples_of(name), "6bit", **settings)
    assert_untouched(model, before)
    result.save(tmp_path / "run")
    loaded = anybit.load(tmp_path / "run", model=model)
    assert_untouched(model, before)
    assert loaded.scheme == result.scheme
    assert torch.equal(run(loaded, batch), run(result.model, batch))


def test_no_verb_changes_the_model_or_its_mode():
    model, x = make(Residual).train(), images(24)
    model.bn.eval()
    before = snapshot(model)
    anybit.inspect(model, x)
    assert_untouched(model, before)
    anybit.evaluate(model, (x, torch.zeros(24, dtype=torch.long)))
    assert_untouched(model, before)
    anybit.calibrate(model, x, "4bit", **FAST)
    assert_untouched(model, before)


def test_loading_leaves_the_given_model_and_its_mode_unchanged(run_folder, calibrated):
    model = make(Residual).train()
    before = snapshot(model)
    loaded = anybit.load(run_folder, model=model)
    assert_untouched(model, before)
    assert not loaded.training


def test_global_random_state_is_restored(tmp_path):
    state = torch.get_rng_state()
    anybit.calibrate(make(Chain), images(24), "4bit", **QUICK).save(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state)


def test_same_seed_gives_identical_bytes(tmp_path):
    for folder in ("one", "other"):
        torch.manual_seed(len(folder))  # nothing may depend on global state
        anybit.calibrate(make(Residual), images(40), "4bit", cache=False, **QUICK).save(tmp_path / folder)
    for name in ("scheme.json", "model.safetensors", "candidates.safetensors", "candidates.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes(), name


def least_memory(message: str) -> int:
    """Return the least memory that an error names."""
    return int(re.search(r"at least memory=(\d+),", message)[1])


def test_memory_below_what_any_run_holds_is_refused():
    with pytest.raises(InvalidSetting, match=r"memory 31MB is less than the 256MB that a run may need.*at least memory=256000000"):
        anybit.calibrate(make(Residual), images(40), "4bit", memory=31 * 10**6, **QUICK)


def test_memory_error_names_the_step_that_needs_it(monkeypatch):
    monkeypatch.setattr(memory_checks, "LEAST", 0)
    settings = {**QUICK, "bn_tuning": False, "bias_tuning": False}
    with pytest.raises(InvalidSetting, match="a step of AdaRound"):
        anybit.calibrate(make(Residual), images(40), "4bit", memory=10**5, rounding="adaround", **settings)


def test_least_memory_named_by_the_error_works_and_gives_the_same_result(monkeypatch):
    monkeypatch.setattr(memory_checks, "LEAST", 0)  # so that something spills
    settings = {**QUICK, "bn_tuning": False, "bias_tuning": False}  # their batch size depends on the memory
    network, inputs = make(Residual), images(40)
    with pytest.raises(InvalidSetting, match="a step of AdaQuant") as refused:
        anybit.calibrate(network, inputs, "4bit", memory=10**5, **settings)
    least = least_memory(str(refused.value))
    results = [anybit.calibrate(network, inputs, "4bit", memory=memory, cache=False, **settings) for memory in (least, 2**31)]
    states = [result.model.state_dict() for result in results]
    assert results[0].scheme == results[1].scheme
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


def test_report_describes_the_result(calibrated):
    _, _, result = calibrated
    report = result.report
    assert {name: row["precision"] for name, row in report["layers"].items()} == dict(result.scheme.to_json())
    assert report["result"]["weight_bits"] <= 4
    losses = [row["loss"] for row in report["ladder"] if row["kept"]]
    assert losses == sorted(losses, reverse=True)
    chosen = [row for row in report["schemes"] if row["chosen"]]
    assert chosen and all(chosen[0]["measured"] <= row["measured"] for row in report["schemes"])
    uniform = [row["name"] for row in report["schemes"] if row["name"].startswith("uniform")]
    assert set(uniform) == {"uniform W2A4", "uniform W2A8", "uniform W4A4", "uniform W4A8"}
    assert report["inputs"] == {"fitting": 32, "held_out": 8}
    assert all(stage["seconds"] >= 0 and stage["peak_bytes"] > 0 for stage in report["stages"])


def test_table_of_the_report_gives_size_and_predicted_loss_of_measured_schemes(calibrated):
    report = json.loads(json.dumps(calibrated[2].report))
    table, layers = report["table"], report["table"]["layers"]
    assert table["weights"] == sum(layer["weights"] for layer in report["layers"].values())
    for row in report["schemes"]:
        cells = [layers[name][precision] for name, precision in row["scheme"].items()]
        assert abs(table["fixed_bytes"] + sum(cell["bytes"] for cell in cells) - row["bytes"]) <= HEADER_SLACK
        assert table["floor"] + sum(cell["loss"] for cell in cells) == pytest.approx(row["predicted"])
        assert sum(cell["bops"] for cell in cells) == row["bops"]


@pytest.mark.parametrize("budget", ["4200B", "45%", "6.5bit", "5bit,bops=6M", "bops=4M"])
def test_a_budget_is_met_by_the_file_on_disk(budget, tmp_path):
    model = make(Residual)
    result = anybit.calibrate(model, images(24), budget, **{**FAST, "weight_bits": (2, 4, 8), "activation_bits": (4, 8)})
    size = (result.save(tmp_path / "run") / "model.safetensors").stat().st_size
    assert size == result.report["result"]["bytes"]
    for condition in anybit.Budget.parse(budget).conditions:
        amount = {"bytes": size, "percent": 100 * size / result.report["float_bytes"], **result.report["result"]}
        assert amount["weight_bits" if condition.quantity == "bits" else condition.quantity] <= condition.limit


def test_several_budgets_share_candidates_and_each_is_met(tmp_path):
    from anybit.roads.result import save_all

    results = anybit.calibrate(make(Residual), images(24), ["4.5bit", "6bit"], **FAST)
    assert [result.report["result"]["weight_bits"] <= limit for result, limit in zip(results, (4.5, 6), strict=True)] == [True, True]
    assert results[0].candidates is results[1].candidates
    folders = save_all(results, tmp_path / "runs")
    assert folders == [tmp_path / "runs" / "4.5bit", tmp_path / "runs" / "6bit"]
    assert all((folder / "scheme.json").is_file() for folder in folders) and (tmp_path / "runs" / "report.json").is_file()


def test_duplicate_budget_is_rejected_or_written_once(tmp_path):
    from anybit.roads.result import save_all

    try:
        folders = save_all(anybit.calibrate(make(Chain), images(24), ["6bit", "6bit"], **FAST), tmp_path / "runs")
        assert all((folder / "scheme.json").is_file() for folder in folders)
    except AnybitError as error:
        assert "6bit" in str(error)


def test_budget_with_a_single_choice_per_layer_works(tmp_path):
    settings = {**FAST, "weight_bits": (4,), "pipeline": "advanced"}
    result = anybit.calibrate(make(Chain), images(24), "4bit", **settings)
    assert set(map(str, result.scheme.values())) == {"W4A8"}
    result.save(tmp_path / "run")


def test_keep_fixes_precisions(tmp_path):
    keep = {"conv": Precision(8, 8), "block1.*": Precision(), "fc": Precision(0), "block2.shortcut.0": Precision(8)}
    model = make(Residual)
    result = anybit.calibrate(model, images(24), None, keep=keep, **FAST)
    scheme = result.scheme
    assert (scheme["conv"], scheme["fc"], scheme["block2.shortcut.0"]) == (keep["conv"], keep["fc"], Precision(8))
    assert scheme["block1.conv1"] == scheme["block1.conv2"] == Precision()
    result.save(tmp_path / "run")
    assert torch.equal(anybit.load(tmp_path / "run", model=model)(images(2)), result.model(images(2)))


def test_keep_accepts_precisions_as_text():
    result = anybit.calibrate(make(Chain), images(24), None, keep={"fc": "W8A8"}, **{**FAST, "weight_bits": (4,)})
    assert result.scheme["fc"] == Precision(8, 8)


@pytest.mark.parametrize(
    ("cls", "keep"),
    [(CalledTwice, {}), (CalledTwice, {"again": Precision()}), (SharedWeight, {})],
    ids=["called twice", "called twice, kept", "shared weight"],
)
def test_network_with_shared_weights_is_calibrated_and_loaded(cls, keep, tmp_path):
    model, x = make(cls), numbers(24, 4)
    result = anybit.calibrate(model, x, None, keep=keep, **{**FAST, "pipeline": "advanced"})
    result.save(tmp_path / "run")
    assert torch.equal(anybit.load(tmp_path / "run", model=model)(x), result.model(x))


def test_a_network_with_frozen_parameters_is_calibrated():
    result = anybit.calibrate(make(NoBatchNorm).requires_grad_(False), images(24), None, **{**FAST, "pipeline": "advanced"})
    assert all(row["loss"] < float("inf") for row in result.report["ladder"])


@pytest.mark.parametrize("setting", [{"start": "matched"}, {"solver": "none"}, {"parallel": True}, {"bn_prior": 0.9}], ids=str)
def test_every_non_default_setting_changes_the_run(setting, calibrated):
    model, x, usual = calibrated
    other = anybit.calibrate(model, x, "4bit", **QUICK, **setting)
    rows = {row["step"]: row["loss"] for row in usual.report["ladder"]}
    assert any(rows[row["step"]] != row["loss"] for row in other.report["ladder"])


def test_all_8_bit_scheme_is_rounded_to_nearest_without_the_solver(monkeypatch):
    monkeypatch.setattr("anybit.methods.gptq.gptq", lambda *problem: pytest.fail("solved"))
    steps = anybit.calibrate(make(NoBatchNorm), images(24), None, **{**FAST, "weight_bits": (8,)}).report["ladder"]
    assert [row["step"] for row in steps] == ["ranges", "candidates", "edge ranges"] and steps[0]["loss"] == steps[1]["loss"]


def test_calibrating_inside_no_grad_works():
    with torch.no_grad():
        result = anybit.calibrate(make(NoBatchNorm), images(24), None, **{**FAST, "pipeline": "advanced"})
    assert result.report["ladder"]


def test_integer_arrays_reach_embeddings_as_integers():
    result = anybit.calibrate(make(NETWORKS["tokens"][0]), tokens(24), "6bit", **FAST)
    assert result.scheme["words"].activation_bits is None


def test_regression_is_scored_on_its_targets():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(192, 1)).eval(), images(24)
    with torch.no_grad():
        targets = model(x)[:, 0] + 0.25
    assert anybit.evaluate(model, (x, targets), task="regression")["loss"] == pytest.approx(0.0625, rel=1e-4)


def test_evaluation_counts_correct_predictions(calibrated):
    model, x, _ = calibrated
    with torch.no_grad():
        labels = model(x).argmax(1)
    labels[:10] = (labels[:10] + 1) % 5
    scores = anybit.evaluate(model, (x, labels), metric=lambda outputs, labels: float(len(labels)))
    assert scores["top1"] == 75.0 and scores["samples"] == 40 and scores["<lambda>"] == 40.0


def test_test_data_are_reported_but_do_not_affect_the_result():
    x = images(24)
    labels = torch.arange(24) % 5
    with_test = anybit.calibrate(make(Chain), x, "6bit", test=(x, labels), **FAST)
    without = anybit.calibrate(make(Chain), x, "6bit", **FAST)
    assert with_test.scheme == without.scheme
    assert {"top1", "loss", "kl", "agreement"} <= set(with_test.report["test"]) and "test" not in without.report


def test_allocates_new_budget_from_a_saved_run(run_folder, calibrated, tmp_path):
    model, x, first = calibrated
    before = snapshot(model)
    result = anybit.allocate(run_folder, "3bit", data=x, model=model)
    assert result.report["result"]["weight_bits"] <= 3 < first.report["result"]["weight_bits"] + 1
    assert_untouched(model, before)
    result.save(tmp_path / "second")
    again = anybit.allocate(tmp_path / "second", "6bit", data=x, model=model)
    assert 3 < again.report["result"]["weight_bits"] <= 6
    assert torch.equal(anybit.load(tmp_path / "second", model=model)(x), result.model(x))
    assert scheme_of(result.model) == result.scheme


def test_a_new_budget_is_tested_where_there_is_test_data(tmp_path):
    model, x = make(Chain), images(24)
    labels = torch.arange(24) % 5
    run = anybit.calibrate(model, (x, labels), "6bit", **FAST, task="classification").save(tmp_path / "run")
    tested = anybit.allocate(run, "5bit", data=x, model=model, test=(x, labels))
    assert tested.report["float_test"]["top1"] == anybit.evaluate(model, (x, labels), task="classification")["top1"]
    assert tested.report["test"]["top1"] == tested.evaluate((x, labels))["top1"]
    held_out = anybit.allocate(run, "5bit", data=(x, labels), model=model)
    assert held_out.scheme == tested.scheme and "test" not in held_out.report
    assert set(held_out.report["float_held_out"]) == {"top1"} and "; held-out top-1 " in held_out.summary()


def test_only_a_network_at_chance_is_at_chance():
    labels = torch.arange(100) % 5
    for right, is_noted in ((20, True), (25, True), (60, False), (100, False)):
        outputs = torch.nn.functional.one_hot(torch.where(torch.arange(100) < right, labels, (labels + 1) % 5), 5).float()
        assert bool(chance_in_words(outputs, labels, named_task("classification"), "test data")) == is_noted
        assert not chance_in_words(outputs[:20], labels[:20], named_task("classification"), "test data")  # too few
    assert not chance_in_words(outputs, torch.zeros(100).long(), named_task("classification"), "test data")  # one class tells nothing


@pytest.mark.parametrize("where", ["data", "test"])
def test_a_float_network_at_chance_is_noted(where):
    x, notes = images(64), []
    labels = torch.arange(64) % 5

    given = {"data": (x, labels)} if where == "data" else {"data": x, "test": (x, labels)}
    options = FAST | {"samples": 64, "held_out": 0.5, "task": "classification"}
    with listening(events=lambda event, fields: notes.extend([fields["note"]] if "note" in fields else [])):
        report = anybit.calibrate(make(Chain), budget=None, **given, **options).report
    (note,) = (note for note in report["notes"] if "most frequent class" in note)
    assert "--weights=FILE" in note and note in notes


def test_rounding_is_recorded_and_names_its_stages(tmp_path):
    result = anybit.calibrate(make(Residual), images(40), "4bit", rounding="adaround", parallel=True, **QUICK)
    report = result.report
    assert report["settings"]["rounding"] == "adaround"
    assert "parallel AdaRound" in [stage["stage"] for stage in report["stages"]]
    assert "sequential AdaRound" in [row["step"] for row in report["ladder"]]
    assert anybit.load(result.save(tmp_path / "run"), model=make(Residual)).scheme == result.scheme


def test_rejects_infeasible_budget_before_any_long_work(monkeypatch):
    monkeypatch.setattr("anybit.roads.calibrate.range_candidates", lambda *arguments: pytest.fail("long work has begun"))
    for budget in ("1bit", ["6bit", "100B"], "40bit", "latency=3ms"):
        with pytest.raises((InfeasibleBudget, InvalidSetting)):
            anybit.calibrate(make(Chain), images(24), budget, **QUICK)


def test_an_error_while_saving_leaves_nothing(calibrated, monkeypatch, tmp_path):
    def full(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr("anybit.roads.result.write_candidates", full)
    with pytest.raises(AnybitError, match=r"no space.*Nothing is left there"):
        calibrated[2].save(tmp_path / "runs" / "mine")
    assert not (tmp_path / "state").exists() and list((tmp_path / "runs").iterdir()) == []


def test_layer_may_have_float_weights_and_integer_input(tmp_path):
    model = make(Chain)
    result = anybit.calibrate(model, images(24), None, keep={"conv2": Precision(None, 8)}, **FAST)
    assert result.scheme["conv2"] == Precision(None, 8)
    result.save(tmp_path / "run")
    assert torch.equal(anybit.load(tmp_path / "run", model=model)(images(2)), result.model(images(2)))


def test_inspect_predicts_the_file_size(tmp_path):
    model, x = make(Residual), images(24)
    inspected = anybit.inspect(model, x, weight_bits=(3, 8), activation_bits=(8,))
    assert list(inspected["layers"]) == [
        "conv",
        *(f"block1.conv{i}" for i in (1, 2)),
        "block2.conv1",
        "block2.conv2",
        "block2.shortcut.0",
        "fc",
    ]
    for bits in (3, 8):
        result = anybit.calibrate(model, x, None, **{**FAST, "weight_bits": (bits,)})
        assert (result.save(tmp_path / f"{bits}") / "model.safetensors").stat().st_size == inspected["uniform"][bits]["bytes"]
    assert inspected["layers"]["conv"]["folds"] == "bn" and inspected["layers"]["block2.conv1"]["block"] == "block2"
    assert inspected["layers"]["conv"]["macs"] == 6 * 27 * 64 and inspected["layers"]["fc"]["macs"] == 40


def test_rejects_network_without_gradients_only_where_needed():
    model, x = make(WithoutGradients), images(24)
    with pytest.raises(UnsupportedModel, match="gradient"):
        anybit.calibrate(model, x, "6bit", **{**FAST, "pipeline": "advanced"})
    with pytest.raises(UnsupportedModel, match="gradient"):
        anybit.calibrate(model, x, "6bit", **FAST, bias_tuning=True)
    assert anybit.calibrate(model, x, "6bit", **FAST).scheme.keys() == {"conv1", "conv2", "fc"}
    like = make(Chain)
    assert anybit.inspect(model, x) == anybit.inspect(like, x) and anybit.inspect(model) == anybit.inspect(like)
    assert anybit.profile(model, x, rounds=1)["layers"].keys() == {"conv1", "conv2", "fc"}


def test_inspection_shows_the_shapes_of_one_sample():
    layers = anybit.inspect(make(Residual), images(5))["layers"]
    assert [layers["conv"][key] for key in ("weight", "input", "output")] == [[6, 3, 3, 3], [3, 8, 8], [6, 8, 8]]
    assert [layers["fc"][key] for key in ("weight", "input", "output")] == [[5, 8], [8], [5]]
    windows = anybit.inspect(make(NETWORKS["windows"][0]), NETWORKS["windows"][1](2))["layers"]
    assert (windows["inner"]["input"], windows["inner"]["output"]) == ([3, 4], [3, 6])  # three rows per sample


@pytest.mark.parametrize("name", ["residual", "tokens", "no batch norm"])
def test_inspection_without_data_counts_the_same_weights(name):
    model, inputs = make(NETWORKS[name][0]), NETWORKS[name][1](4)
    before = snapshot(model)
    seen, unseen = anybit.inspect(model, inputs), anybit.inspect(model)
    assert_untouched(model, before)
    assert set(seen["layers"]) == set(unseen["layers"]) and seen["float_bytes"] == unseen["float_bytes"]
    for layer, row in unseen["layers"].items():
        same = ("class", "weight", "bytes", "choices")
        assert {key: row[key] for key in same} == {key: seen["layers"][layer][key] for key in same}
        assert row["input"] is row["output"] is row["macs"] is None
    assert all(row["bops"] is None and row["bytes"] < unseen["float_bytes"] for row in unseen["uniform"].values())


def test_float_size_equals_that_of_its_file(tmp_path):
    from safetensors.torch import save_file

    model = make(Residual)
    save_file(model.state_dict(), tmp_path / "float.safetensors")
    assert anybit.inspect(model, images(2))["float_bytes"] == (tmp_path / "float.safetensors").stat().st_size


# Invalid input: each is one error that names its cause.


def broken(key: str, value: float) -> nn.Module:
    model = make(Residual)
    with torch.no_grad():
        model.get_parameter(key).view(-1)[0] = value
    return model


class DividesByZero(Chain):
    def forward(self, x):
        return super().forward(x) / 0


WITH_NAN = images(24)
WITH_NAN[17, 0, 0, 0] = float("nan")

BAD = {
    "nan weight": (lambda: broken("block1.conv2.weight", float("nan")), images(24), {}, UnsupportedModel, r"block1\.conv2\.weight"),
    "infinite bias": (lambda: broken("fc.bias", float("inf")), images(24), {}, UnsupportedModel, r"fc\.bias"),
    "too large a weight": (
        lambda: broken("bn.weight", 3e38),
        images(24) * 1e4,
        {},
        UnsupportedModel,
        r"^conv: the weight.*keep=\{'conv': 'float'\}",
    ),
    "infinite activation": (lambda: broken("bn.weight", 1e33), images(24) * 1e8, {}, AnybitError, r"block1|layer conv"),
    "nan output": (lambda: make(DividesByZero), images(24), {"weight_bits": (8,), "activation_bits": (8,)}, AnybitError, "output"),
    "nan input": (lambda: make(Chain), WITH_NAN, {}, InvalidInput, "NaN or infinity"),
    "no input": (lambda: make(Chain), images(0), {}, InvalidInput, "empty"),
    "empty list": (lambda: make(Chain), [], {}, InvalidInput, "empty"),
    "one input": (lambda: make(Chain), images(1), {}, InvalidInput, "at least 2"),
    "wrong shape": (lambda: make(Chain), numbers(24, 4, 8, 8), {}, InvalidInput, r"\(2, 4, 8, 8\)"),
    "wrong rank": (lambda: make(Chain), numbers(24, 7), {}, InvalidInput, r"\(2, 7\)"),
    "images without channels": (lambda: make(Chain), np.zeros((24, 8, 8), np.uint8), {}, InvalidInput, r"8, 8"),
    "ragged": (lambda: make(Chain), [images(1)[0], torch.zeros(3, 6, 6)] * 8, {}, InvalidInput, "size"),
    "one bit": (lambda: make(Chain), images(24), {"weight_bits": (1, 4)}, InvalidSetting, r"1 is outside 2\.\.8"),
    "nine bits": (lambda: make(Chain), images(24), {"activation_bits": (9,)}, InvalidSetting, r"9 is outside 2\.\.8"),
    "no layer": (lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), images(24), {}, UnsupportedModel, "no layer to quantize"),
    "keep nothing": (lambda: make(Chain), images(24), {"keep": {"cnv*": Precision(8)}}, InvalidSetting, "matches no"),
    "unknown block": (lambda: make(Chain), images(24), {"blocks": ("b1",)}, InvalidSetting, "b1"),
    "not data": (lambda: make(Chain), 7, {}, InvalidInput, "int"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_input_is_one_error_that_names_it(case):
    make_model, data, settings, kind, message = BAD[case]
    with pytest.raises(kind, match=message) as raised:
        anybit.calibrate(make_model(), data, None, **{**FAST, **settings})
    assert "\n" not in str(raised.value) and str(raised.value).endswith((".", "?"))


@pytest.mark.parametrize("budget", ["1bit", "100B", "1%", "bops=10"])
def test_infeasible_budget_error_names_the_minimum_and_binding_layers(budget):
    with pytest.raises(InfeasibleBudget, match=r"needs .*layers .*conv2.* bind.*raise the budget to"):
        anybit.calibrate(make(Chain), images(24), budget, **FAST)


@pytest.mark.parametrize("budget", ["33bit", "1MB", "150%"])
def test_rejects_budget_above_the_float_size(budget):
    with pytest.raises(InvalidSetting, match="above the float network's"):
        anybit.calibrate(make(Chain), images(24), budget, **FAST)


def test_error_of_the_model_on_test_data_is_an_input_error():
    with pytest.raises(InvalidInput):
        anybit.calibrate(make(Chain), images(24), None, test=(numbers(8, 4, 8, 8), torch.zeros(8, dtype=torch.long)), **FAST)
    with pytest.raises(InvalidInput):
        anybit.evaluate(make(Chain), (numbers(8, 4, 8, 8), torch.zeros(8, dtype=torch.long)))


def test_allocates_from_a_folder_of_several_runs(tmp_path):
    model, data = make(Residual), images(24)
    results = calibrate(model, data, ["4bit", "3bit"], steps=3, candidate_steps=3, bias_tuning=False)
    save_all(results, tmp_path / "runs")
    result = allocate(tmp_path / "runs", "2.5bit", data=data, model=model)
    assert result.report["result"]["weight_bits"] <= 2.5
    assert result.report["settings"]["sequential"] is False
    with pytest.raises(InvalidFile, match="holds several runs: 3bit, 4bit"):
        load(tmp_path / "runs", model=model)


@pytest.mark.parametrize(
    ("folder", "message"), [("supernet", "a supernet.* Extract a subnet"), ("search", "a supernet"), ("grown", "only runs of calibrate")]
)
def test_error_distinguishes_runs_of_other_roads_from_broken_ones(folders, calibrated, folder, message):
    with pytest.raises(InvalidFile, match=message):
        anybit.allocate(folders[folder], "3bit", model=calibrated[0])


def test_certificate_names_the_chosen_scheme():
    result = calibrate(make(Residual), images(24), "4bit", pipeline="light")
    chosen = next(row["name"] for row in result.report["schemes"] if row["chosen"])
    assert result.about["certificate"]["chosen"] == chosen and result.about["certificate"]["gap"] <= 1e-3


def test_rejects_metric_without_test_data():
    with pytest.raises(InvalidSetting, match="test="):
        calibrate(make(Residual), images(24), "4bit", metric=lambda outputs, labels: 0.0)


def test_drop_of_a_metric_of_0_to_1_binds_and_is_said(tmp_path):
    model, x = make(Chain), images(40)
    data = (x, model(x).argmax(1))

    def share(outputs, labels):
        return float((outputs.softmax(1).gather(1, labels[:, None])).mean())

    told: list[str] = []
    with listening(None, lambda event, fields: told.append(fields.get("note", ""))):
        result = anybit.calibrate(model, data, "drop=0.2%", metric=share, **FAST)
        again = anybit.allocate(result.save(tmp_path / "run"), "drop=0.1%", data=data, model=model, metric=share)
    assert sum(re.search(r"^drop=0\.[12]% allows share to lose 0\.00[12]: ", note) is not None for note in told) == 2
    for one, allowed in ((result, 0.002), (again, 0.001)):
        chosen = next(row for row in one.report["schemes"] if row["chosen"])
        assert one.report["float_held_out"]["metric"] - chosen["metric"] <= allowed


def test_new_drop_budget_holds_after_polishing(tmp_path, monkeypatch):
    model, x = make(Residual), images(40)
    with torch.no_grad():
        data = (x, model(x).argmax(1))
    anybit.calibrate(model, data, "4bit", **{**QUICK, "pipeline": "light"}).save(tmp_path / "run")
    polish = polish_scheme

    def spoiling(state, scheme):
        polished = polish(state, scheme)
        polished.model.fc.bias.data[0] = 1e3
        return polished

    monkeypatch.setattr("anybit.roads.calibrate.polish_scheme", spoiling)
    result = anybit.allocate(tmp_path / "run", "drop=30%", data=data, model=model)
    assert result.model.fc.bias.abs().max() < 1e3


def test_report_of_a_new_budget_has_all_fields_of_the_first(calibrated, run_folder):
    model, x, first = calibrated
    again = anybit.allocate(run_folder, "3bit", data=x, model=model)
    assert list(again.report) == list(first.report) and list(again.about) == ["model", "data", "preprocessing", *first.about]
    assert again.table == {key: first.table[key] for key in again.table}


class Clamping(nn.Conv2d):
    """A convolution that clamps beyond the values seen in calibration."""

    def forward(self, x):
        return super().forward(x).clamp(-5, 5)


def test_float_score_is_that_of_the_given_network():
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    model = nn.Sequential(Clamping(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *head).eval()
    model[1].weight.data.uniform_(0.1, 4)
    tests = (20 * images(32), torch.arange(32) % 5)
    result = anybit.calibrate(model, images(8), "8bit", test=tests, pipeline="light", solver="none", cache=False)
    expected = anybit.evaluate(model, tests)
    assert {key: result.report["float_test"][key] for key in expected} == expected


def unusable(name, x, y):
    """Return labelled data that cannot be scored."""
    items = list(zip(x, y, strict=True))
    return {
        "an input that is infinite": (torch.where(x > 1, torch.inf, x), y),
        "labels that are complex": (x, y.to(torch.complex64)),
        "an empty pair": (x[:0], y[:0]),
        "a short item": [*items[:3], items[3][:1], *items[4:]],
        "an item of another kind": [*items[:3], {"x": items[3][0], "label": items[3][1]}, *items[4:]],
        "lists of different lengths": (list(x), list(y)[:1]),
    }[name]


UNUSABLE = {
    "an input that is infinite": "NaN or infinity", "labels that are complex": "complex64", "an empty pair": "empty",
    "a short item": "other parts", "an item of another kind": "other parts", "lists of different lengths": "other parts",
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_rejects_unusable_labelled_data_before_the_work(name, monkeypatch):
    model, x = make(Residual), images(24)
    data = unusable(name, x, torch.arange(24) % 5)
    with pytest.raises(InvalidInput, match=UNUSABLE[name]):
        anybit.evaluate(model, data)
    monkeypatch.setattr("anybit.roads.calibrate.sensitivity_table", lambda *given: pytest.fail("the work began"))
    with pytest.raises(InvalidInput, match=UNUSABLE[name]):
        anybit.calibrate(model, x, "6bit", test=data, pipeline="light", cache=False)


def huge(outputs, labels):
    return 10**400


def test_rejects_a_metric_beyond_the_range_of_floats():
    with pytest.raises(InvalidInput, match="The metric huge returned"):
        anybit.evaluate(make(Residual), (images(24), torch.arange(24) % 5), metric=huge)
