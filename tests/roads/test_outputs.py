"""Networks with several outputs: all, or the selected ones, are compared; layers that none of these reads are reported."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import anybit
from anybit.cli.app import app
from anybit.data.batches import Batch
from anybit.data.outputs import output_reader
from anybit.data.tasks import SQUARED_ERROR, TASKS, SeveralOutputs
from anybit.errors import AnybitError, InvalidSetting
from anybit.onnx import verification
from anybit.progress import listening

QUICK = {"activation_bits": (8,), "pipeline": "light", "cache": False}


class Scales(nn.Module):
    """Three outputs, each computed from the previous one, like the scales of a detector."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([nn.Sequential(nn.Conv2d(3 if i == 0 else 8, 8, 3, 2, 1), nn.ReLU()) for i in range(3)])
        self.heads = nn.ModuleList([nn.Conv2d(8, 9, 1) for _ in range(3)])

    def forward(self, x):
        outputs = []
        for body, head in zip(self.body, self.heads, strict=True):
            x = body(x)
            outputs.append(head(x))
        return outputs


class Boxes(nn.Module):
    """Class scores, boxes a hundredth as large, a state that has not one row per sample, integers, and an auxiliary head."""

    def __init__(self):
        super().__init__()
        self.body, self.scores, self.boxes, self.auxiliary = nn.Linear(12, 16), nn.Linear(16, 5), nn.Linear(16, 4), nn.Linear(16, 2)

    def forward(self, x):
        x = self.body(x.flatten(1)).relu()
        scores = self.scores(x)
        state = torch.stack([x[:, :3], x[:, 3:6]])
        return {
            "scores": scores, "boxes": self.boxes(x) / 100, "state": state, "best": scores.argmax(1), "more": [self.auxiliary(x) * 30],
        }  # fmt: skip


def network(kind):
    torch.manual_seed(0)
    return kind().eval()


def inputs(count=48, shape=(3, 16, 16)):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


def notes_of(work):
    notes = []
    with listening(lambda *_: None, lambda _, fields: notes.append(fields["note"]) if "note" in fields else None):
        result = work()
    return result, notes


def apart(result, model, x):
    with torch.no_grad():
        return [float((one - other).norm() / other.norm()) for one, other in zip(result.model(x), model(x), strict=True)]


def test_every_scale_of_a_detector_counts_and_spends_the_budget():
    model, x = network(Scales), inputs()
    result = anybit.calibrate(model, x, "4bit", **QUICK)
    assert result.report["result"]["weight_bits"] > 3.7
    assert max(apart(result, model, x)) < 0.15
    assert set(result.report["outputs"]) == {"0", "1", "2"} and all(0 < error < 0.03 for error in result.report["outputs"].values())


def test_bias_tuning_uses_every_output():
    model, x = network(Scales), inputs()
    tuned = anybit.calibrate(model, x, "3bit", **{**QUICK, "bias_tuning": True})
    assert next(row for row in tuned.report["ladder"] if row["step"] == "bias tuning")["kept"]
    assert all(not torch.equal(head.bias, tuned.model.heads[index].bias) for index, head in enumerate(model.heads))


def test_only_selected_outputs_count_and_unread_layers_are_reported():
    model, x = network(Scales), inputs()
    result, notes = notes_of(lambda: anybit.calibrate(model, x, "4bit", outputs={"1": 1.0}, **QUICK))
    unread = ["heads.0", "body.2.0", "heads.2"]
    assert all(result.scheme[name].weight_bits == 2 for name in unread)
    assert any(all(name in note for name in unread) and "heads.1" not in note for note in [*notes, *result.report["notes"]])
    assert anybit.inspect(model, x, outputs={"1": 1.0})["unread"] == unread and anybit.inspect(model, x)["unread"] == []


def test_weighting_an_output_moves_bits_to_it():
    model, x = network(Scales), inputs()
    errors = [anybit.calibrate(model, x, "3bit", outputs={"0": 1.0, "2": weight}, **QUICK).report["outputs"]["2"] for weight in (1e-4, 1e4)]
    assert errors[1] < errors[0]


def test_outputs_that_cannot_be_compared_are_excluded_and_reported():
    model, x = network(Boxes), inputs(shape=(12,))
    result, notes = notes_of(lambda: anybit.calibrate(model, x, "4bit", **QUICK))
    assert set(result.report["outputs"]) == {"scores", "boxes", "more.0"}
    assert any("state" in note and "best (int64)" in note for note in notes)
    assert any("scores [5]" in note and "--outputs" in note for note in notes)


@pytest.mark.parametrize(
    "name, message", [("best", "int64"), ("state", "rows"), ("box", "Choose from scores, boxes, more.0"), ("9", "is not an output")]
)
def test_rejects_unknown_output_by_name(name, message):
    with pytest.raises(InvalidSetting, match=message):
        anybit.calibrate(network(Boxes), inputs(shape=(12,)), "4bit", outputs={name: 1.0}, **QUICK)


@pytest.mark.parametrize("outputs", ["boxes", ["boxes"], {"boxes": 0.0}, {"boxes": float("nan")}])
def test_rejects_malformed_outputs_with_a_correction(outputs):
    with pytest.raises(InvalidSetting, match="outputs"):
        anybit.calibrate(network(Boxes), inputs(shape=(12,)), "4bit", outputs=outputs, **QUICK)


def test_one_output_by_name_or_index_is_compared_as_if_alone():
    model, x = network(Boxes), inputs(shape=(12,))

    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x)["boxes"]

    alone = anybit.calibrate(Only(), x, "4bit", **QUICK)
    for name in ("boxes", "1"):
        result = anybit.calibrate(model, x, "4bit", outputs={name: 1.0}, **QUICK)
        assert {f"model.{layer}": p for layer, p in result.scheme.items() if layer in ("body", "boxes")}.items() <= alone.scheme.items()
        assert "outputs" not in result.report


def test_labels_refer_to_the_first_output_and_a_metric_gets_all():
    model, x = network(Boxes), inputs(shape=(12,))
    with torch.no_grad():
        labels = model(x)["scores"].argmax(1)

    def largest(outputs, labels):
        scores, boxes, more = outputs
        assert scores.shape == (len(labels), 5) and boxes.shape == (len(labels), 4) and more.shape == (len(labels), 2)
        return -float(boxes.abs().max())

    scores = anybit.evaluate(model, (x, labels), metric=largest)
    assert scores["top1"] == 100 and scores["largest"] < 0
    result = anybit.calibrate(model, (x, labels), "drop=5%", metric=largest, **QUICK)
    assert all(abs(row["metric"] - scores["largest"]) < 5 for row in result.report["schemes"])


def test_new_budget_compares_the_outputs_of_the_run(tmp_path):
    model, x = network(Scales), inputs()
    anybit.calibrate(model, x, "4bit", outputs={"0": 1.0, "2": 2.0}, **QUICK).save(tmp_path / "run")
    again = anybit.allocate(tmp_path / "run", "5bit", x, model, cache=False)
    assert set(again.report["outputs"]) == {"0", "2"} and again.report["result"]["weight_bits"] > 4


@pytest.mark.parametrize("verb", ["grow", "train"])
def test_training_uses_every_output(verb):
    model, x = network(Scales), inputs(16)
    common = {"distill": 1.0, "epochs": 1, "batch_size": 8}
    if verb == "grow":
        assert anybit.grow(model, x, "4bit", **common).model(x)[2].shape == model(x)[2].shape
    else:
        supernet = anybit.train(model, x, bits=(4, 8), **common)
        result = anybit.extract(supernet, "8bit", data=x, polish=True, samples=8, steps=2, cache=False)
        assert result.model(x)[2].shape == model(x)[2].shape and result.report["ladder"]


def several(weights=(1.0, 1.0)):
    outputs = [torch.randn(6, 2, 3), torch.randn(6, 4) * 100]
    reader, _ = output_reader(nn.Identity(), [Batch(outputs)], {"0": weights[0], "1": weights[1]})
    return SeveralOutputs(TASKS["regression"], reader), reader.read(outputs, Batch(torch.zeros(6)))


def test_output_counts_by_its_energy_and_weight():
    torch.manual_seed(0)
    for weights in ((1.0, 1.0), (3.0, 0.5)):
        task, reference = several(weights)
        outputs = reference + torch.randn_like(reference) * reference.abs()
        expected = [SQUARED_ERROR.of_samples(one, other) for one, other in zip(task.tensors(outputs), task.tensors(reference), strict=True)]
        mean = sum(weight * errors for weight, errors in zip(weights, expected, strict=True)) / sum(weights)
        torch.testing.assert_close(task.distance.of_samples(outputs, reference), mean)
        parts = sum(task.distance.loss(outputs[part], reference[part], reference) for part in (slice(0, 2), slice(2, 6)))
        torch.testing.assert_close(parts, task.distance.loss(outputs, reference))
        torch.testing.assert_close(parts.double(), task.distance.of_samples(outputs, reference).mean())


def test_all_zero_output_does_not_count():
    outputs = [torch.zeros(4, 3), torch.randn(4, 2)]
    reader, _ = output_reader(nn.Identity(), [Batch(outputs)], {})
    task, reference = SeveralOutputs(TASKS["regression"], reader), reader.read(outputs, Batch(torch.zeros(4)))
    other = reference + 1
    torch.testing.assert_close(task.distance.of_samples(other, reference), SQUARED_ERROR.of_samples(other[:, 3:], reference[:, 3:]))
    assert task.distance.of_samples(torch.zeros(4, 5), torch.zeros(4, 5)).tolist() == [0] * 4


def test_rejects_output_whose_rows_change_later_by_name():
    reader, _ = output_reader(nn.Identity(), [Batch([torch.ones(4, 3), torch.ones(4, 2)])], {})
    with pytest.raises(AnybitError, match=r"Output 1 .*--outputs"):
        reader.read([torch.ones(4, 3), torch.ones(4, 5)], Batch(torch.zeros(4)))


def test_command_line_selects_and_weights_outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two_heads.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        torch.manual_seed(0)\n"
        "        self.one, self.two = torch.nn.Linear(4, 3), torch.nn.Linear(4, 2)\n"
        "    def forward(self, x):\n"
        "        return {'one': self.one(x), 'two': self.two(x)}\n"
    )
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(24, 4)).astype("float32"))
    common = ["--model", "two_heads.py:Net", "--data", "x.npz", "--json"]
    seen = CliRunner().invoke(app, ["inspect", *common, "--outputs", "two"])
    assert seen.exit_code == 0 and json.loads(seen.stdout)["unread"] == ["one"], seen.stderr
    run = ["--output", "run", "--budget", "6bit", "--pipeline", "light", "--activation-bits", "8", "--no-cache"]
    done = CliRunner().invoke(app, ["calibrate", *common, *run, "--outputs", "two=3", "--outputs", "0=0.5"])
    assert done.exit_code == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report["outputs"]) == {"one", "two"} and report["settings"]["outputs"] == {"two": 3.0, "0": 0.5}
    for wrong in ("two=much", "=2", "three", "two=0"):
        refused = CliRunner().invoke(app, ["calibrate", *common, *run[2:], "--output", "other", "--outputs", wrong])
        assert refused.exit_code == 2 and "outputs" in refused.stderr, refused.stderr


# What is done with a run


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """A run, and its export, that compares two of five outputs, neither of which is the scores."""
    folder, x = tmp_path_factory.mktemp("outputs"), inputs(70, (3, 2, 2))
    result = anybit.calibrate(network(Boxes), x, "4bit", outputs={"boxes": 1, "more.0": 2}, **QUICK)
    result.save(folder / "run")
    anybit.export(result, folder / "run.onnx", data=x)
    return result, folder, x


def test_evaluate_reads_the_outputs_recorded_in_the_run(chosen, tmp_path, monkeypatch):
    result, folder, x = chosen
    boxes = torch.randn(70, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = float((result.model(x)["boxes"] - boxes).square().mean())
    read = lambda model, **options: anybit.evaluate(model, (x, boxes), metric=lambda outputs, _: len(outputs), **options)  # noqa: E731
    scores = read(result)
    assert scores["loss"] == pytest.approx(expected, rel=1e-5) and scores["<lambda>"] == 2
    assert "loss" not in read(result, outputs={"scores": 1})  # told otherwise: four numbers are no labels of five scores
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", x=x.numpy(), y=boxes.numpy())
    (tmp_path / "boxes_net.py").write_text(f"import sys; sys.path[:0] = {sys.path!r}\nfrom tests.roads.test_outputs import Boxes\n")
    done = CliRunner().invoke(app, ["evaluate", str(folder / "run"), "--model", "boxes_net.py:Boxes", "--data", "data.npz", "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["loss"] == pytest.approx(expected, rel=1e-5)


def test_verify_compares_every_output_and_names_a_different_one(chosen, monkeypatch):
    result, folder, x = chosen
    verdict = anybit.verify(result, folder / "run.onnx", data=x)
    assert verdict["ok"] and list(verdict["numbers"]["outputs"]) == ["scores", "boxes", "state", "best", "more.0"]
    apart = verdict["simulation"]["outputs"]
    assert set(apart) == {"boxes", "more.0"}
    assert all(one["largest_difference"] < 1e-3 * one["largest_output"] for one in apart.values())

    compute = verification.outputs

    def broken(running, batches, names=None):
        arrays = compute(running, batches, names)
        place = [value.name for value in running.get_outputs()].index(name_of_more)
        return [array * 1.5 if index == place else array for index, array in enumerate(arrays)]

    name_of_more = anybit.onnx.file.session(folder / "run.onnx").get_outputs()[4].name
    monkeypatch.setattr(verification, "outputs", broken)
    verdict = anybit.verify(result, folder / "run.onnx", data=x)
    assert not verdict["ok"] and "Of the outputs, more.0 differ" in verdict["failures"][0]


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (lambda x: {"a.b": x, "a": {"b": 2 * x}}, ["a.b", "a.b#2"]),
        (lambda x: {0: x, "0": 100 * x, "0#2": x}, ["0", "0#2", "0#2#2"]),
    ],
)
def test_outputs_of_one_name_are_numbered(output, names):
    network = nn.Identity()
    network.forward = output
    reader, _ = output_reader(network, [Batch(torch.ones(2, 3)), Batch(torch.ones(3, 3))], {})
    assert [one.name for one in reader.outputs] == names
    assert output_reader(network, [Batch(torch.ones(2, 3))], {names[-1]: 1.0})[0].outputs[0].place == len(names) - 1


@pytest.mark.parametrize("beside", [False, True])
def test_sparse_outputs_are_refused_in_one_line_and_left_out_beside_others(beside):
    network = nn.Sequential(nn.Linear(4, 3), nn.Identity()).eval()
    network[1].forward = lambda x: (x, x.to_sparse()) if beside else x.to_sparse()
    data = (torch.randn(12, 4), torch.zeros(12, dtype=torch.int64))
    if beside:
        assert "top1" in anybit.evaluate(network, data)
        return
    for verb in (anybit.evaluate, anybit.inspect):
        with pytest.raises(AnybitError, match=r"first output is sparse .*to_dense\(\)"):
            verb(network, data)


def test_only_the_output_that_labels_refer_to_is_compared_with_chance():
    model, x = network(Boxes), inputs(64, shape=(12,))
    with torch.no_grad():
        labels = model(x)["scores"].argmax(1)
    report = anybit.calibrate(model, x, "8bit", test=(x, labels), task="classification", **QUICK).report
    assert report["float_test"]["top1"] == 100 and not any("most frequent class" in note for note in report.get("notes", []))
