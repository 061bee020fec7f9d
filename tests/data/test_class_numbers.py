"""Class numbers stored as floats or in a column are read as classes if the network gives class scores, or refused by name."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import anybit
from anybit.errors import InvalidInput
from anybit.progress import listening
from anybit.sources.inputs import as_samples, compared

N, C = 24, 3
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % C
QUICK = {"pipeline": "light", "solver": "none", "bn_tuning": False, "weight_bits": (4, 8), "activation_bits": (8,)}


def net(outputs=C):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, outputs))


class Segmenting(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, C, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


KINDS = {
    "floats": lambda y: (X.numpy(), y.float().numpy()),
    "doubles in a column": lambda y: {"x": X.numpy(), "y": y.double().numpy()[:, None]},
    "tensors": lambda y: TensorDataset(X, y.float()),
    "tensors in a column": lambda y: TensorDataset(X, y.float()[:, None]),
    "integers in a column": lambda y: TensorDataset(X, y[:, None]),
    "python floats": lambda y: [(x, float(label)) for x, label in zip(X, y, strict=True)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_whole_floats_are_class_numbers(kind):
    notes = []
    with listening(events=lambda event, fields: notes.append(str(fields.get("note")))):
        scores = anybit.evaluate(net(), KINDS[kind](Y))
    assert scores == anybit.evaluate(net(), (X, Y)) and "top1" in scores
    assert sum("class numbers" in note for note in notes) == (0 if "integers" in kind else 1)


def test_every_road_reads_whole_floats_as_classes():
    data, whole = TensorDataset(X, Y.float()), TensorDataset(X, Y)
    ours, theirs = (anybit.calibrate(net(), each, "6bit", test=each, cache=False, **QUICK).report for each in (data, whole))
    assert ours["test"] == theirs["test"] and ours["schemes"] == theirs["schemes"]
    grown, as_well = (anybit.grow(net(), each, "4bit", epochs=1, test=each).report for each in (data, whole))
    assert [epoch["loss"] for epoch in grown["epochs"]] == [epoch["loss"] for epoch in as_well["epochs"]]
    trained, also = (anybit.train(net(), each, epochs=1).report["epochs"][0]["loss"] for each in (data, whole))
    assert trained == also


def test_masks_of_floats_are_classes():
    x, masks = torch.randn(4, 1, 6, 6), torch.randint(0, C, (4, 6, 6))
    model = Segmenting()
    for labels in (masks.float(), masks.double()[:, None]):
        assert anybit.evaluate(model, TensorDataset(x, labels)) == anybit.evaluate(model, TensorDataset(x, masks))


@pytest.mark.parametrize("wrong", [0.5, float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("place", [0, 20], ids=["first", "late"])
@pytest.mark.parametrize("run", [anybit.evaluate, anybit.calibrate, anybit.grow], ids=["evaluate", "calibrate", "grow"])
def test_fractions_and_nan_are_no_classes(run, wrong, place):
    y = Y.double()
    y[place] = wrong
    options = {} if run is anybit.evaluate else QUICK if run is anybit.calibrate else {"epochs": 1}
    with pytest.raises(InvalidInput) as refused:
        run(net(), TensorDataset(X, y), task="classification", **options)
    assert f"{wrong:g}" in str(refused.value) and "--task" not in str(refused.value)


def test_numbers_of_a_regression_stay_numbers():
    one = anybit.evaluate(net(1), TensorDataset(X, Y.float()))
    several = anybit.evaluate(net(), TensorDataset(X, torch.eye(C)[Y] + 1))
    named = compared(net(), as_samples(TensorDataset(X, Y.float()), model=net()), {}, "regression")
    assert "top1" not in one and "top1" not in several and np.isfinite(one["loss"])
    assert next(named.batches(4)).labels.dtype == torch.float32
