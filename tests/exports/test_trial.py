"""`inspect` reports, before any work, what export would reject."""

import sys

import pytest
import torch
import torch.nn.functional as F
from networks import Bessel, Odd, Residual, images, make
from torch import nn

import anybit
from anybit.errors import InvalidInput, UnsupportedModel
from anybit.reports.terminal import export_line
from anybit.wording import in_python

LIGHT = {"samples": 8, "batch_size": 8, "weight_bits": (8,), "activation_bits": (8,), "pipeline": "light", "solver": "none"}


class Scaled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x * 2)


def undivided(self, x):
    return self.b(F.avg_pool2d(self.a(x), 2, 2, divisor_override=3))


REFUSED = {
    "an operator that the exporter lacks": (Bessel, torch.ones(8, 4)),
    "a batch that forward fixes": (lambda: Odd(lambda s, x: s.a(x).reshape(len(x), -1), a=nn.Conv2d(3, 4, 3)), images(8)),
    "a forward that is more than its operator": (lambda: Odd(lambda s, x: s.odd(x), odd=Scaled(3, 4, 3)), images(8)),
    "a function that the exporter changes": (lambda: Odd(undivided, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 4, 1)), images(8)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_inspect_reports_the_error_of_export(name, tmp_path):
    torch.manual_seed(0)
    network, data = REFUSED[name][0]().eval(), REFUSED[name][1]
    trial = anybit.inspect(network, data)["export"]
    run = anybit.calibrate(network, data, None, **LIGHT).save(tmp_path / "run")
    with pytest.raises(UnsupportedModel) as refusal:
        anybit.export(run, tmp_path / "net.onnx", model=network, data=data)
    assert trial | {"reason": in_python(trial["reason"])} == {"ok": False, "reason": str(refusal.value)}
    assert trial["reason"] in export_line(trial)


def test_inspect_counts_the_integer_layers_of_the_file(tmp_path):
    model, data, keep = make(Residual), images(8), {"fc": "float"}
    trial = anybit.inspect(model, data, keep=keep)["export"]
    run = anybit.calibrate(model, data, None, keep=keep, **LIGHT).save(tmp_path / "run")
    report = anybit.export(run, tmp_path / "net.onnx", model=model, data=data)
    assert trial["ok"] and len(trial["integer_layers"]) == report["integer_layers"] and trial["float_layers"] == ["fc"]
    assert export_line(trial).endswith("6 of 7 layers on integers, in float: fc.")


def test_inspect_says_when_export_was_not_tried():
    model = make(Residual)
    assert anybit.inspect(model)["export"] == {"ok": None, "reason": "it needs data"}
    assert anybit.inspect(model, images(4), export=False)["export"]["ok"] is None


def test_export_reuses_the_graph_of_the_trial(tmp_path, monkeypatch):
    model, data = make(Residual), images(40)
    anybit.inspect(model, data)
    monkeypatch.setattr(torch.onnx, "export", None)
    run = anybit.calibrate(model, data, None, **LIGHT).save(tmp_path / "run")
    assert anybit.export(run, tmp_path / "net.onnx", model=model, data=data)["integer_layers"] == 7


class Pairs(nn.Module):
    """Compares each text with each image, by a product that the forward itself calls."""

    def __init__(self, with_features=True):
        super().__init__()
        self.with_features = with_features
        self.words, self.text, self.image = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Conv2d(3, 8, 3)

    def forward(self, ids=None, pixels=None):
        texts, images = self.text(self.words(ids)).mean(1), self.image(pixels).mean((2, 3))
        scores = texts @ images.mT
        return (scores, texts, images) if self.with_features else scores


PAIRED = [{"pixels": torch.ones(3, 8, 8) * index, "ids": torch.full((5,), index)} for index in range(4)]


def test_products_of_several_named_inputs_are_exported():
    report = anybit.inspect(Pairs().eval(), PAIRED, cache=False)
    assert "matmul" in report["export"]["integer_layers"], report["export"]


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x, mask):
        return self.a(x) * torch.rsub(mask, 1.0)[:, None]


def test_refusal_names_the_line_that_the_exporter_cannot_translate():
    """PyTorch 2.13 cannot subtract integers from a float number."""
    report = anybit.inspect(Masked().eval(), [(torch.randn(4), torch.tensor(1)) for _ in range(2)], cache=False)["export"]
    assert report["ok"] or "test_trial.py: return self.a(x) * torch.rsub(mask, 1.0)[:, None]." in report["reason"], report


def test_rejects_an_output_of_pairs_of_inputs_alone():
    with pytest.raises(UnsupportedModel, match=r"shape \[2, 2\] for 2 inputs and \[3, 3\] for 3"):
        anybit.inspect(Pairs(with_features=False).eval(), PAIRED)


class Placed(nn.Module):
    """Texts whose positions are counted by a size."""

    def __init__(self):
        super().__init__()
        self.words, self.places, self.a = nn.Embedding(9, 8), nn.Parameter(torch.randn(16, 8)), nn.Linear(8, 4)

    def forward(self, ids, attention_mask):
        return (self.a(self.words(ids) + self.places[: ids.shape[1]]) * attention_mask[..., None]).sum(1)


class Counted(Placed):
    """Texts whose positions are counted by a number of Python."""

    def forward(self, ids, attention_mask):
        return (self.a(self.words(ids) + self.places[: int(ids.shape[1])]) * attention_mask[..., None]).sum(1)


@pytest.mark.parametrize(("network", "fixed"), [(Placed, False), (Counted, True)])
def test_fixed_length_of_texts_is_said_before_the_work_and_of_the_file(network, fixed, tmp_path):
    model, texts = (
        network().eval(),
        [{"ids": torch.arange(5) + one, "attention_mask": torch.ones(5, dtype=torch.int64)} for one in range(4)],
    )
    shorter = [{name: tensor[:4] for name, tensor in text.items()} for text in texts]
    trial = anybit.inspect(model, texts)["export"]
    run = anybit.calibrate(model, texts, None, **LIGHT).save(tmp_path / "run")
    report = anybit.export(run, tmp_path / "net.onnx", model=model, data=texts)
    assert trial["text_length"] == report["text_length"] == (5 if fixed else None)
    assert ("texts of 5 tokens only" in export_line(trial)) == fixed
    if fixed:
        with pytest.raises(InvalidInput, match=r"takes ids of the shape \[batch, 5\], and a batch of the data has \[4, 4\]"):
            anybit.verify(run, tmp_path / "net.onnx", model=model, data=shorter)
    else:
        assert anybit.verify(run, tmp_path / "net.onnx", model=model, data=shorter)["ok"]


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x).reshape(len(x), -1)


def test_code_that_python_knows_by_two_names_is_exported_and_left_as_it_was(monkeypatch):
    """Transformers registers some of its modules twice."""
    own = sys.modules[Counted.__module__]
    monkeypatch.setitem(sys.modules, f"{Counted.__module__}.again", own)
    report = anybit.inspect(Counted().eval(), torch.randn(8, 4), cache=False)["export"]
    assert report["ok"], report
    assert "len" not in vars(own)


class Normalized(nn.Module):
    """A network with a buffer of any name, which it subtracts from its input `x`, and operators called sub, relu and mean."""

    def __init__(self, name, persistent):
        super().__init__()
        self.name = name
        self.register_buffer(name, torch.full((1, 3, 1, 1), 0.5), persistent=persistent)
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)

    def forward(self, x):
        return self.fc((self.conv(x - getattr(self, self.name))).relu().mean((2, 3)))


@pytest.mark.parametrize(("name", "persistent"), [("mean", True), ("relu", False), ("sub", True), ("x", True), ("output", False)])
def test_buffers_with_names_of_operators_and_arguments_are_exported(name, persistent, tmp_path):
    model, x = Normalized(name, persistent).eval(), images(24)
    result = anybit.calibrate(model, x, pipeline="light", weight_bits=(8,), activation_bits=(8,), cache=False)
    result.export(tmp_path / "net.onnx", x)
    assert result.verify(tmp_path / "net.onnx", x)["ok"]


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.ones(4))
        self.fc = nn.Linear(4, 3)

    def forward(self, features, shift):
        return self.fc(features + shift * self.shift)


def test_buffer_called_like_a_named_input_is_refused_before_the_work():
    items = [{"features": torch.randn(4), "shift": torch.randn(4)} for _ in range(8)]
    trial = anybit.inspect(Shifted().eval(), items, cache=False)["export"]
    assert not trial["ok"] and "shift is an argument of the network's forward" in trial["reason"], trial
