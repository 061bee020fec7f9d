"""Values that are refused by name with a remedy that is true."""

import numpy as np
import pytest
import torch
from commands import anybit_cli
from torch import nn

import anybit
from anybit.errors import InvalidInput, InvalidSetting
from anybit.roads.settings import CalibrateSettings
from anybit.sources.preprocessing import Preprocessing
from anybit.sources.references import check_device

NET, X = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(8, 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: CalibrateSettings(samples=64.0), ("64.0 must be a whole number", "samples=64")),
        (lambda: CalibrateSettings(steps=-0.0), ("-0.0 must be a whole number",)),
        (lambda: CalibrateSettings(samples=2.5), ("2.5 must be a whole number",)),
        (lambda: Preprocessing(std=(1e-320,)), ("std", "1e-320", "from 1e-06")),
        (lambda: anybit.calibrate(NET, X, "4bit", cache=5), ("cache=5 is not a folder",)),
        (lambda: anybit.calibrate(NET, X, []), ("budget is an empty list",)),
        (lambda: anybit.allocate(anybit.calibrate, "4bit"), ("allocate reads a run folder", "result.save")),
        (lambda: check_device("cpu:99"), ("cpu:99 is not a device",)),
    ],
    ids=["float", "negative zero", "fraction", "denormal", "cache", "no budget", "result", "device"],
)
def test_values_are_refused_with_what_is_meant(call, words):
    with pytest.raises(InvalidSetting) as refused:
        call()
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_outputs_may_be_named_by_their_numbers():
    assert CalibrateSettings(outputs={0: 1.0}).outputs == {"0": 1.0}
    check_device("cpu:0")


def test_arrays_of_objects_are_refused_without_advice_to_unpickle(here):
    np.savez("o.npz", x=np.array([[1], [2, 3]], dtype=object))
    done = anybit_cli("evaluate", "--model", "m.py:net", "--data", "o.npz")
    assert done.exit_code == 2 and "holds Python objects" in done.stderr and "pickle" not in done.stderr
    with pytest.raises(InvalidInput, match="Python objects"):
        anybit.evaluate(NET, (np.array([[1], [2, 3]], dtype=object), np.arange(2)))
