"""Content digests of values: equal for equal contents in any process, different otherwise."""

import functools
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import Residual, make
from torch import nn

from anybit.files.contents import contents_of, digest, network_contents

LOGGER = logging.getLogger("test")
FACTOR = 2.0


def helper(x):
    return x * FACTOR


def metric(outputs, labels):
    LOGGER.debug("measured")
    return float(helper(outputs).mean())


class Scale:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, outputs, labels):
        return self.factor


def scaled(factor):
    return lambda outputs, labels: factor * 1.0


def one(outputs, labels):
    return 1.0


def other(outputs, labels, by=2.0):
    return 1.0


ARRAY = np.arange(6.0)
VALUES = [
    None, 0, False, 0.0, "0", b"0", 1, [], (), {}, [0], (0,), {0: 0}, {"0": 0}, set(), {1}, {1, 2}, ["ab", "c"], ["a", "bc"], [[], []],
    [[[]]],
    ARRAY, ARRAY.astype(np.float32), ARRAY[::-1], ARRAY.reshape(2, 3), torch.arange(6.0), torch.arange(6), torch.arange(6.0).view(2, 3),
    np.array(["a", None], object), one, other, scaled(1), scaled(2), functools.partial(other, by=3.0), functools.partial(other, by=4.0),
    (lambda outputs, labels: 1.0), (lambda outputs, labels: 2.0), Scale(1), Scale(2), Scale(1).__call__, int, Scale,
]  # fmt: skip


def test_digests_are_distinct_and_repeatable():
    digests = [contents_of(value) for value in VALUES]
    assert len(set(digests)) == len(digests)
    assert digests == [contents_of(value) for value in VALUES]


def test_equal_objects_have_equal_digests_and_cycles_terminate():
    circle = [1]
    circle.append(circle)
    again = [1]
    again.append(again)
    assert contents_of(circle) == contents_of(again)
    assert contents_of(Scale([1, 2])) == contents_of(Scale([1, 2])) != contents_of(Scale([1, 3]))
    assert contents_of({1, 2, 3}) == contents_of({3, 2, 1})
    shared = [1]
    assert contents_of([shared, shared]) == contents_of([[1], [1]])


@pytest.mark.parametrize("name, value", [("FACTOR", 3.0), ("helper", lambda x: x + 1)])
def test_digest_covers_globals_that_a_function_reads(name, value, monkeypatch):
    before = contents_of(metric)
    monkeypatch.setitem(globals(), name, value)
    assert contents_of(metric) != before


def test_digest_covers_other_user_modules(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    seen = set()
    for number, factor in enumerate((1, 2)):
        (tmp_path / f"tools{number}.py").write_text(f"def measured(x):\n    return {factor} * x\n")
        names: dict = {}
        exec(f"import tools{number} as tools\ndef metric(x):\n    return tools.measured(x)", names)
        seen.add(contents_of(names["metric"]))
    assert len(seen) == 2


def test_opaque_objects_are_never_equal():
    import threading

    assert contents_of(threading.Lock()) != contents_of(threading.Lock())


SCRIPT = """
import sys
sys.path.insert(0, {tests!r}); sys.path.insert(0, {files!r})
from test_contents import VALUES, metric
from networks import Residual, make
from anybit.files.contents import contents_of, network_contents
print(contents_of(metric), contents_of(VALUES), network_contents(make(Residual)))
"""


def test_digests_are_equal_in_every_process():
    here = Path(__file__).parent
    script = SCRIPT.format(tests=str(here.parent), files=str(here))
    runs = [
        subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": seed}, capture_output=True)
        for seed in "12"
    ]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout


class Shifted(nn.Module):
    """A buffer that is not in the state dict, a plain attribute and a plain list."""

    def __init__(self, shift=1.0, table=1.0, factor=2, name="a"):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("shift", torch.tensor(shift), persistent=False)
        self.register_buffer("stored", torch.tensor(table))
        self.others, self.factor, self.name = [nn.Linear(2, 2)], factor, name
        nn.init.constant_(self.others[0].weight, table)
        nn.init.zeros_(self.others[0].bias)

    def forward(self, x):
        return self.fc(x) * self.factor + self.shift


def test_network_digest_covers_state_outside_the_state_dict():
    plain = network_contents(Shifted())
    assert plain == network_contents(Shifted())
    trained = Shifted()
    nn.init.ones_(trained.fc.weight)
    trained.stored.fill_(7)
    assert network_contents(trained.train()) == plain == network_contents(trained.eval())
    for changed in (Shifted(shift=2.0), Shifted(table=2.0), Shifted(factor=3), Shifted(name="b")):
        assert {name for name in plain if network_contents(changed)[name] != plain[name]} == {""}
    hooked = Shifted()
    hooked.fc.register_forward_hook(lambda module, inputs, output: output + 1)
    assert network_contents(hooked)["fc"] != plain["fc"]

    class Changed(Shifted):
        def forward(self, x):
            return self.fc(x) * self.factor - self.shift

    Changed.__qualname__, Changed.__module__ = Shifted.__qualname__, Shifted.__module__
    assert network_contents(Changed()) != plain


def test_weight_digest_covers_name_type_and_shape():
    weights = make(Residual).state_dict()
    renamed = {f"other.{name}": tensor for name, tensor in weights.items()}
    assert digest(weights) == digest(dict(weights)) != digest(renamed)
    assert digest([torch.zeros(4)]) != digest([torch.zeros(2, 2)]) != digest([torch.zeros(2, 2, dtype=torch.int32)])
