"""Networks of timm and torchvision by name: missing, incompatible or unreachable ones fail at once, with a remedy."""

import json
import socket
import sys
import types
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError
from urllib.error import URLError

import pytest
import torch
from networks import Chain, images
from torch import nn

import anybit
from anybit.errors import InvalidSetting, MissingPackage
from anybit.progress import listening
from anybit.sources import callables, libraries
from anybit.sources.callables import import_optional
from anybit.sources.models import load_model


class Zeroed(Chain):
    """Ends in a batch norm with zero gammas, as residual branches do at the start of training."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.bn2.weight)
        self.scale = nn.Parameter(torch.full((5,), 1e-6))

    def forward(self, x):
        return super().forward(x) * self.scale


@pytest.fixture
def library(monkeypatch):
    """torchvision's functions that anybit calls, with an unreachable server."""

    def get_model(name, weights):
        if name != "zeroed":
            raise ValueError(f"Unknown model {name}")
        if weights is not None:
            raise OSError("<urlopen error [Errno -2] Name or service not known>")
        return Zeroed()

    models = types.ModuleType("torchvision.models")
    models.get_model, models.list_models = get_model, lambda: ["zeroed", "resnet18"]
    models.get_model_builder = lambda name: Zeroed
    package = types.ModuleType("torchvision")
    package.__spec__ = ModuleSpec("torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setattr(libraries, "_hub_answers", lambda when: True)


def test_unreachable_weights_error_is_one_sentence_with_two_remedies(library):
    with pytest.raises(InvalidSetting, match=r"cannot be downloaded \(.*not known.*--weights=FILE.*--weights=random") as raised:
        load_model("torchvision:zeroed")
    assert "\n" not in str(raised.value)


def test_rejects_unknown_name_with_similar_ones(library):
    with pytest.raises(InvalidSetting, match=r"has no network of this name\. Did you mean resnet18\?"):
        load_model("torchvision:resnet81")


def test_random_weights_are_deterministic_non_degenerate_and_reported(library, tmp_path):
    notes = []
    with listening(events=lambda event, fields: notes.append(fields["note"]) if event == "note" else None):
        one, other = (load_model("torchvision:zeroed", "random") for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert "weights are random" in notes[0]
    for key, tensor in one.state_dict().items():
        assert not tensor.is_floating_point() or tensor.std() > 1e-3, key
    assert one(images(4)).std(0).min() > 0
    result = anybit.calibrate("torchvision:zeroed", images(24), weights="random", pipeline="light", cache=False, weight_bits=(8,))
    assert "weights are random" in result.report["notes"][0]
    run = result.save(tmp_path / "run")
    assert json.loads((run / "scheme.json").read_text())["model"]["weights"] == "random"
    assert torch.equal(anybit.load(run)(images(2)), result.model(images(2)))
    anybit.report(run, output=tmp_path / "page.html")
    assert "weights are random" in (tmp_path / "page.html").read_text().lower()


def test_rejects_random_weights_for_a_custom_function():
    with pytest.raises(InvalidSetting, match="Leave --weights out"):
        load_model("torch.nn:Identity", "random")


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050.lamb_in1k"])
def test_error_for_a_bare_name_lists_named_sources(name):
    with pytest.raises(InvalidSetting, match=rf"torchvision:{name} or timm:{name}"):
        load_model(name)


# Packages


def failing(monkeypatch, error: Exception, installed: dict[str, str]) -> None:
    def raised(module):
        raise error

    def version(name):
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(callables.importlib, "import_module", raised)
    monkeypatch.setattr(callables.importlib.util, "find_spec", lambda name: object() if name in installed else None)
    monkeypatch.setattr(callables, "version", version)


PAIR = {"torch": "2.13.0+cpu", "torchvision": "0.29.1+cu130", "timm": "1.0"}


TOGETHER = "`pip install --force-reinstall torch torchvision`"
BROKEN = [
    ("timm", ModuleNotFoundError("no timm", name="timm"), {}, ["timm, which is not installed", "`pip install timm`"]),
    ("timm", ModuleNotFoundError("no torchvision", name="torchvision"), {"timm": "1.0"}, ["`pip install torchvision`"]),
    ("torchvision", RuntimeError("operator torchvision::nms does not exist"), PAIR, ["cannot be imported", "torch 2.13.0+cpu", TOGETHER]),
    ("timm", OSError("libcudart.so.13: cannot open shared object file"), PAIR, ["libcudart", TOGETHER]),
    ("datasets", ImportError("cannot import name 'x'"), {"datasets": "1"}, ["`pip install --force-reinstall datasets`"]),
]


@pytest.mark.parametrize(("package", "error", "installed", "parts"), BROKEN, ids=lambda value: type(value).__name__)
def test_error_distinguishes_missing_from_incompatible_packages(package, error, installed, parts, monkeypatch):
    failing(monkeypatch, error, installed)
    with pytest.raises(MissingPackage) as raised:
        import_optional(package, package, "--model it")
    assert all(part in str(raised.value) for part in parts), raised.value
    assert "\n" not in str(raised.value)


# Servers


def test_unreachable_server_is_queried_once(monkeypatch):
    constants, timeouts = types.SimpleNamespace(HF_HUB_OFFLINE=False, ENDPOINT="http://somewhere"), []

    def away(*arguments, **options):
        timeouts.append(options["timeout"])
        raise URLError("nobody")

    monkeypatch.setattr(libraries, "_hub_constants", lambda: constants)
    monkeypatch.setattr(libraries, "urlopen", away)
    libraries._hub_answers.cache_clear()
    for _ in range(2):
        with libraries.short_timeouts():
            assert constants.HF_HUB_OFFLINE and socket.getdefaulttimeout()
        assert not constants.HF_HUB_OFFLINE and socket.getdefaulttimeout() is None
    libraries._hub_answers.cache_clear()
    assert timeouts == [libraries.PATIENCE]


def test_no_server_is_queried_for_a_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(libraries, "_hub_answers", lambda when: pytest.fail("asked"))
    with libraries.short_timeouts(str(tmp_path)):
        pass
