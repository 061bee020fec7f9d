"""Comparison of runs: differences are reported, equal values are not, and both runs are read strictly."""

import json
from itertools import combinations

import pytest
from commands import anybit_cli, one_json_object
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Chain, images, make

import anybit
from anybit.reports.comparison import _differences, diff
from anybit.runs.report import write_report


def leaves(tree, path=()):
    if isinstance(tree, list):
        yield path, tree
    for key, piece in tree.items() if isinstance(tree, dict) else ():
        yield from leaves(piece, (*path, key))


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def test_equal_runs_are_equal_whatever_their_time_and_memory(calibrated, quick, tmp_path):
    model, inputs, first = calibrated
    second = anybit.calibrate(model, inputs, "4bit", **quick)
    folders = [result.save(tmp_path / name) for name, result in (("first", first), ("second", second))]
    assert report_of(folders[0])["stages"] != report_of(folders[1])["stages"]
    differences = diff(*folders)
    assert differences["same"] and differences["same_weights"] and differences["differences"] == {}
    text = anybit_cli("diff", *map(str, folders))
    assert text.exit_code == 0 and "are identical" in text.stdout


def test_difference_is_named_with_both_values(folders):
    first, second = folders["calibrated"], folders["seeded"]
    loaded, reports = diff(first, second), [report_of(first), report_of(second)]
    differences = loaded["differences"]
    assert not loaded["same"] and not loaded["same_weights"]
    assert differences["settings"] == {"seed": [0, 1]} and differences["run"] == {"budget": ["4bit", "3bit"]}
    bits = [{name: row["precision"] for name, row in report["layers"].items()} for report in reports]
    assert differences["bits"] == {name: [bits[0][name], bits[1][name]] for name in bits[0] if bits[0][name] != bits[1][name]} != {}
    assert differences["result"]["bytes"] == [report["result"]["bytes"] for report in reports]
    assert differences["ladder"]["ranges"]["loss"] == [report["ladder"][0]["loss"] for report in reports]
    assert "shapes" not in differences and "references" not in differences and "environment" not in differences
    assert loaded["shared_layers"] == len(bits[0])


def test_units_are_sorted_by_change_of_error(folders):
    after = [unit["after"] for unit in diff(folders["calibrated"], folders["seeded"])["differences"]["units"].values() if "after" in unit]
    moved = [abs(left - right) / max(left, right) for left, right in after]
    assert len(moved) > 2 and moved == sorted(moved, reverse=True)


def test_runs_of_all_roads_compare_symmetrically(folders):
    for first, second in combinations(folders.values(), 2):
        differences, swapped = diff(first, second), diff(second, first)
        assert not differences["same"] and json.loads(json.dumps(differences)) == differences
        assert dict(leaves(swapped["differences"])) == {path: two[::-1] for path, two in leaves(differences["differences"])}
        text = anybit_cli("diff", str(first), str(second))
        assert text.exit_code == 0 and "layers are in both" in text.stdout, text.stderr
    for folder in folders.values():
        assert diff(folder, folder)["same"]


def test_different_networks_compare_by_common_names(folders, quick, tmp_path):
    other = anybit.calibrate(make(Chain), images(40), "4bit", **quick).save(tmp_path / "other")
    differences = diff(folders["calibrated"], other)
    assert differences["shared_layers"] == 1  # fc
    bits = differences["differences"]["bits"]
    assert (
        bits["conv"][1] is None and bits["conv1"][0] is None and all(isinstance(side, str | None) for two in bits.values() for side in two)
    )


def test_the_command_prints_one_object(folders):
    text = anybit_cli("diff", str(folders["calibrated"]), str(folders["seeded"]), "--json")
    assert text.exit_code == 0 and one_json_object(text.stdout)["differences"]["settings"] == {"seed": [0, 1]}


def test_fields_of_only_one_road_are_omitted(folders):
    text = anybit_cli("diff", str(folders["calibrated"]), str(folders["grown"])).stdout
    assert "csq" not in text and "only one of the workflows" in text and "grow" in text


values = st.recursive(
    st.booleans() | st.integers() | st.text(max_size=3) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, min_size=1, max_size=3) | st.dictionaries(st.text(max_size=2), inner, min_size=1, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(values, values)
def test_only_equal_values_do_not_differ(first, second):
    assert not _differences(first, json.loads(json.dumps(first)))
    assert bool(_differences(first, second)) == (first != second)


@pytest.mark.parametrize("name", ["report.json", "scheme.json", "model.safetensors"])
def test_missing_or_broken_file_is_named(run_folder, folders, name):
    path = run_folder / name
    path.write_bytes(path.read_bytes()[:-9])
    text = anybit_cli("diff", str(folders["grown"]), str(run_folder))
    assert text.exit_code == 2 and len(text.stderr.splitlines()) == 1 and str(run_folder) in text.stderr
    path.unlink()
    text = anybit_cli("diff", str(run_folder), str(folders["grown"]))
    assert text.exit_code == 2 and name in text.stderr


@pytest.mark.parametrize("broken", [{"settings": 3}, {"environment": []}, {"version": "1"}, {"schemes": None}, {"float_bytes": -1}])
def test_rejects_file_that_is_not_a_report(run_folder, broken):
    write_report(run_folder, report_of(run_folder) | broken)
    with pytest.raises(anybit.InvalidFile, match=rf"report\.json.*{next(iter(broken))}"):
        diff(run_folder, run_folder)


@pytest.mark.parametrize("broken", ["[]", "{}", '{"version": 1}'])
def test_rejects_report_not_written_by_anybit(run_folder, broken):
    (run_folder / "report.json").write_text(broken)
    with pytest.raises(anybit.InvalidFile, match=r"report\.json"):
        diff(run_folder, run_folder)


def test_folder_of_several_runs_requires_naming_one(calibrated, quick, tmp_path):
    model, inputs, _ = calibrated
    results = anybit.calibrate(model, inputs, ["4bit", "5bit"], **{**quick, "pipeline": "light"})
    anybit.roads.result.save_all(results, tmp_path / "runs")
    with pytest.raises(anybit.InvalidFile, match="several runs: 4bit, 5bit"):
        diff(tmp_path / "runs", tmp_path / "runs")
