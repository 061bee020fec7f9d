"""Custom metrics: one that cannot be called, or does not return a finite number, is rejected by name before the work."""

import inspect

import pytest
import torch
from networks import Chain, images, make
from typer.testing import CliRunner

import anybit
from anybit.calls import check_takes_two
from anybit.cli.app import app
from anybit.data.tasks import measure
from anybit.errors import AnybitError, InvalidInput, InvalidSetting

OUTPUTS, LABELS = torch.eye(4), torch.arange(4)
QUICK = {"activation_bits": (8,), "pipeline": "light", "cache": False}


def not_a_number(outputs, labels):
    return float("nan")


def infinite(outputs, labels):
    return float("-inf")


def of_each(outputs, labels):
    return (outputs.argmax(1) == labels).float()


def words(outputs, labels):
    return "good"


def broken(outputs, labels):
    return outputs[labels, 99].mean()


def of_three(outputs, labels, weights):
    return 1.0


def of_one(outputs):
    return 1.0


def of_names(*, outputs, labels):
    return 1.0


@pytest.mark.parametrize("metric", [not_a_number, infinite, of_each, words, broken])
def test_rejects_metric_without_finite_result_by_name(metric):
    with pytest.raises(InvalidInput, match=f"metric {metric.__name__} .*(Fix|Let it)"):
        measure(metric, OUTPUTS, LABELS)


@pytest.mark.parametrize("metric", [of_three, of_one, of_names, "accuracy", 3])
def test_rejects_metric_with_other_arguments_by_name(metric):
    with pytest.raises(InvalidSetting, match=rf"{getattr(metric, '__name__', type(metric).__name__)}.*\(outputs, labels\)"):
        check_takes_two(metric)


def test_accepts_any_callable_of_two_tensors_as_metric():
    for metric in (lambda outputs, labels: 1.0, torch.nn.MSELoss(), lambda *both: 1.0, lambda o, y, k=5: 1.0, torch.dist):
        check_takes_two(metric)
    assert measure(lambda outputs, labels: torch.tensor([[2.5]]), OUTPUTS, LABELS) == 2.5


def labelled():
    x = images(24)
    return x, torch.arange(24) % 5


@pytest.mark.parametrize("metric", [not_a_number, of_each, broken, of_three])
@pytest.mark.parametrize("data", ["data", "test"])
def test_calibrate_checks_the_metric_before_the_work(monkeypatch, metric, data):
    def begun(*_, **__):
        raise AssertionError("the work has begun")

    monkeypatch.setattr("anybit.roads.calibrate.range_candidates", begun)
    inputs = {"data": labelled()} if data == "data" else {"data": images(24), "test": labelled()}
    with pytest.raises(AnybitError, match=f"metric {metric.__name__}"):
        anybit.calibrate(make(Chain), budget="4bit", metric=metric, **inputs, **QUICK)


def test_rejects_unfit_test_labels_before_the_work(monkeypatch):
    monkeypatch.setattr("anybit.roads.calibrate.range_candidates", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(InvalidInput, match="5 classes"):
        anybit.calibrate(make(Chain), images(24), "4bit", test=(images(8), torch.arange(8)), **QUICK)


def test_command_line_rejects_metric_before_loading_anything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.py").write_text("def three(outputs, labels, weights):\n    return 1.0\n")
    (tmp_path / "x.npy").write_bytes(b"")
    (tmp_path / "m.py").write_text((tmp_path / "m.py").read_text() + "def net():\n    raise SystemExit('loaded')\n")
    done = CliRunner().invoke(app, ["evaluate", "--model", "m.py:net", "--data", "x.npy", "--metric", "m.py:three"])
    assert done.exit_code == 2 and "The metric three(outputs, labels, weights)" in done.stderr, done.stderr


@pytest.mark.parametrize("verb", [anybit.evaluate, anybit.grow, anybit.train, anybit.search, anybit.extract, anybit.allocate])
def test_every_verb_rejects_metric_with_other_arguments(verb):
    arguments = {"data": None, "train": None, "budget": None, "model": None, "run": None}
    own = {name: value for name, value in arguments.items() if name in inspect.signature(verb).parameters}
    with pytest.raises(InvalidSetting, match="of_three"):
        verb(**own, metric=of_three)


def overwriting(outputs, labels):
    right = float((outputs.argmax(1) == labels).float().mean())
    outputs.zero_()
    labels.zero_()
    return right


def test_a_metric_may_write_into_its_arguments():
    model, data = make(Chain), labelled()
    scores = anybit.evaluate(model, data, metric=overwriting)
    assert scores | {"overwriting": 0.0} == anybit.evaluate(model, data) | {"overwriting": 0.0}
    several = (torch.eye(4), torch.eye(4))
    measure(lambda outputs, labels: float(outputs[1].zero_().sum()), several, LABELS)
    assert torch.equal(several[1], torch.eye(4))


def leaving(outputs, labels):
    raise SystemExit("bye")


def test_a_metric_that_ends_the_process_is_named():
    with pytest.raises(InvalidInput, match=r"leaving failed.*SystemExit: bye"):
        measure(leaving, OUTPUTS, LABELS)
