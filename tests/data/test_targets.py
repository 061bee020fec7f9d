"""Labels that are not numbers of one shape, such as boxes: a custom metric gets them as a list, and nothing else reads them."""

import copy

import numpy as np
import pytest
import torch
from networks import Items
from torch import nn
from torch.utils.data import DataLoader
from typer.testing import CliRunner

import anybit
from anybit.cli.app import app
from anybit.data.batches import Batch, Targets, join_labels
from anybit.data.samples import Calibration
from anybit.errors import InvalidInput
from anybit.progress import listening
from anybit.roads.keys import data_digest, metric_digest
from anybit.sources.inputs import samples_from

N = 12
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
BOXES = [torch.full((1 + index % 3, 4), float(index)) for index in range(N)]
TARGETS = [{"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64), "name": f"{at}.png"} for at, boxes in enumerate(BOXES)]
QUICK = {"activation_bits": (8,), "pipeline": "light", "cache": False}


class Heads(nn.Module):
    """Raw heads of a detector: 2 boxes of 4 numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.body(x).relu()).view(-1, 2, 4)


class Metric:
    """Keeps the labels that it gets, and then changes them."""

    def __init__(self):
        self.seen = []

    def __call__(self, outputs, labels):
        self.seen.append(copy.deepcopy(labels))
        assert type(labels) is list and len(labels) == len(outputs)
        labels.clear()
        return 1.0


def boxes_of(label):
    return label["boxes"] if isinstance(label, dict) else label[0]["boxes"] if isinstance(label, list) else label[0]


def collated(items):
    return torch.stack([x for x, _ in items]), [target for _, target in items]


def collated_as_rows(items):
    return torch.stack([x for x, _ in items]), {"boxes": torch.stack([target["boxes"][0] for _, target in items])}


ITEMS = {
    "dictionaries": Items([(x, target) for x, target in zip(X, TARGETS, strict=True)]),
    "lists of dictionaries": Items([(x, [target]) for x, target in zip(X, TARGETS, strict=True)]),
    "tuples": Items([(x, (target["boxes"], target["labels"])) for x, target in zip(X, TARGETS, strict=True)]),
    "entries": Items([{"x": x, "target": target} for x, target in zip(X, TARGETS, strict=True)]),
    "beside a path": Items([(x, target, f"{at}.png") for at, (x, target) in enumerate(zip(X, TARGETS, strict=True))]),
    "a loader": DataLoader(Items(list(zip(X, TARGETS, strict=True))), collate_fn=collated, batch_size=5),
    "Samples": anybit.Samples(Items(list(zip(X, TARGETS, strict=True))), labelled=True),
}


@pytest.mark.parametrize("kind", ITEMS)
@pytest.mark.parametrize("task", ["detection", None])
def test_metric_gets_a_list_with_the_label_of_each_sample(kind, task):
    metric = Metric()
    scores = anybit.evaluate(Heads(), ITEMS[kind], metric=metric, task=task, batch_size=5)
    assert scores == {"samples": N, "metric": 1.0}
    assert all(torch.equal(boxes_of(label), boxes) for label, boxes in zip(metric.seen[-1], BOXES, strict=True))
    if kind == "dictionaries":
        assert [label["name"] for label in metric.seen[-1]] == [f"{at}.png" for at in range(N)]


def test_tensors_of_several_shapes_are_a_list_and_of_one_shape_a_tensor():
    metric = Metric()
    anybit.evaluate(Heads(), Items(list(zip(X, BOXES, strict=True))), metric=metric, batch_size=5)
    assert all(torch.equal(label, boxes) for label, boxes in zip(metric.seen[-1], BOXES, strict=True))
    whole = lambda outputs, labels: float(labels.shape == (N, 4))  # noqa: E731
    assert anybit.evaluate(Heads(), (X, torch.rand(N, 4)), metric=whole, task="detection")["<lambda>"] == 1


def test_padded_boxes_of_a_loader_are_split_by_sample():
    metric = Metric()
    loader = DataLoader(ITEMS["dictionaries"], collate_fn=collated_as_rows, batch_size=4)
    anybit.evaluate(Heads(), loader, metric=metric)
    assert [label["boxes"].tolist() for label in metric.seen[-1]] == [[float(at)] * 4 for at in range(N)]
    unequal = DataLoader(ITEMS["dictionaries"], collate_fn=lambda items: (collated(items)[0], [items[0][1]]))
    with pytest.raises(InvalidInput, match=r"labels of a batch of 2 samples are a list, not .* Let the collate_fn"):
        anybit.evaluate(Heads(), unequal, metric=metric)


@pytest.mark.parametrize("kind", ["dictionaries", "tuples", "entries", "a loader"])
def test_without_a_metric_they_are_noted_and_not_scored(kind):
    notes = []
    with listening(events=lambda event, fields: notes.append(str(fields.get("note")))):
        assert next(samples_from(ITEMS[kind], 0, model=Heads()).batches(N)).labels is None
    assert len([note for note in notes if "for a metric alone" in note]) == 1
    with pytest.raises(InvalidInput, match=r"has none\. (Element 1|Entry target) of its items is for a metric alone"):
        anybit.evaluate(Heads(), ITEMS[kind], task="detection")


def test_calibrate_and_allocate_score_them(tmp_path):
    metric, run = Metric(), tmp_path / "run"
    data = ITEMS["dictionaries"]
    result = anybit.calibrate(Heads(), data, "drop=1%", metric=metric, test=data, task="detection", **QUICK)
    assert result.report["test"]["metric"] == 1 and {len(seen) for seen in metric.seen} >= {N}
    assert all(isinstance(label, dict) for seen in metric.seen for label in seen)
    result.save(run)
    notes = []
    with listening(events=lambda event, fields: notes.append(str(fields.get("note")))):
        anybit.allocate(run, "6bit", model=Heads(), data=data, cache=False)
    again = anybit.allocate(run, "6bit", model=Heads(), data=data, test=data, metric=metric, cache=False)
    assert again.report["test"]["metric"] == 1 and "changed" not in str(notes)


def test_grow_train_search_and_extract_score_them():
    data, metric, common = ITEMS["dictionaries"], Metric(), {"distill": 1.0, "epochs": 1, "batch_size": 8}
    grown = anybit.grow(Heads(), data, "4bit", test=data, metric=metric, **common)
    assert grown.report["test"]["metric"] == 1 == grown.report["epochs"][0]["frozen"]["metric"]
    supernet = anybit.train(Heads(), data, bits=(4, 8), test=data, metric=metric, held_out=0.5, **common)
    found = anybit.search(supernet, data, "6bit", metric=metric, evaluations=10, cache=False)
    assert {row["score"] for row in found.report["evaluated"]} == {1.0}
    assert anybit.extract(supernet, "8bit", test=data, metric=metric, cache=False).report["test"]["metric"] == 1
    with pytest.raises(InvalidInput, match=r"Training needs labels, .* Element 1 of its items is for"):
        anybit.grow(Heads(), data, "4bit", **common | {"distill": 0.0})


@pytest.mark.parametrize("verb", [anybit.grow, anybit.train])
@pytest.mark.parametrize(
    ("items", "why"),
    [
        ([(x, "cat") for x in X], r"Element 1 of its items is text \('cat'\)"),
        ([(x, None) for x in X], r"Element 1 of its items is None"),
        ([(x, {"boxes": X}, {"masks": X}) for x in X], r"Elements 1, 2 of its items may each be for a metric: keep one of them"),
        (ITEMS["tuples"], r"Element 1 of its items is for a metric alone"),
        ("x.npz", r"x\.npz holds x, x_test, and no y"),
        ("x.npz#test", r"x\.npz holds x, x_test, and no y_test"),
    ],
)
def test_training_without_labels_says_why_they_are_lacking(verb, items, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", x=X, x_test=X)
    with pytest.raises(InvalidInput, match=rf"Training needs labels, and this data has none\. {why}.*, or distill=1\."):
        verb(Heads(), items)


def test_command_line_passes_them_to_the_metric(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "boxes_code.py").write_text(
        "from tests.data.test_targets import Heads, ITEMS, N\n\n\ndef data():\n    return ITEMS['dictionaries']\n\n\n"
        "def right(outputs, labels):\n    return sum(float(label['boxes'][0, 0]) == at for at, label in enumerate(labels)) / len(outputs)\n"
    )
    command = ["evaluate", "--model", "boxes_code.py:Heads", "--data", "boxes_code.py:data"]
    done = CliRunner().invoke(app, [*command, "--metric", "boxes_code.py:right", "--json"])
    assert done.exit_code == 0 and '"right": 1.0' in done.stdout, done.output
    done = CliRunner().invoke(app, [*command, "--task", "detection"])
    assert done.exit_code == 2 and "Element 1 of its items is for a metric alone" in done.stderr


def test_stored_scores_depend_on_them_and_nothing_else_does():
    def of(scale):
        targets = Targets([{"boxes": boxes * scale, "name": "a"} for boxes in BOXES])
        return Calibration([Batch(X, targets)], [Batch(X, targets)])

    one, other, metric = of(1), of(2), Metric()
    assert data_digest(one) == data_digest(other)
    assert metric_digest(metric, one.held_out) == metric_digest(metric, of(1).held_out) != metric_digest(metric, other.held_out)
    assert metric_digest(None, one.held_out) is None


def test_labels_of_batches_are_joined_or_refused():
    assert join_labels([Targets([1]), Targets([2, 3])]) == Targets([1, 2, 3])
    for labels in ([torch.zeros(2), Targets([1])], [torch.zeros(2, 3), torch.zeros(2, 4)]):
        with pytest.raises(InvalidInput, match="differ in shape"):
            join_labels(labels)
