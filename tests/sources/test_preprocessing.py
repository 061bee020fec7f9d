"""Preprocessing that the user asks for applies to the data, or is refused before the work; that of a model or a run is no option given."""

import json

import numpy as np
import pytest
import torch
from commands import anybit_cli
from torch import nn

import anybit
from anybit.errors import InvalidSetting
from anybit.progress import listening
from anybit.sources.models import with_model_defaults
from anybit.sources.preprocessing import APPLY_TO, ARRAYS, CODE, IMAGES, TEXTS, Preprocessing, check_applies, kind_of

VALUES = {
    "mean": (0.5,), "std": (0.5,), "size": 8, "resize": 9, "interpolation": "nearest", "classes": ("a", "b"), "columns": "text=a",
    "length": 7, "stride": 3,
}  # fmt: skip
DATA = {IMAGES: "images", ARRAYS: "x.npz", TEXTS: "t.tsv", CODE: "m.py:data"}
REFUSING = "def net():\n    raise SystemExit('loaded')\n"
BUILDING = "from torch import nn\n\n\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images" / "a").mkdir(parents=True)
    np.savez("x.npz", x=np.zeros((8, 3, 8, 8), np.float32), y=np.arange(8) % 2)
    (tmp_path / "t.tsv").write_text("a\tb\n")
    (tmp_path / "m.py").write_text(REFUSING)
    return tmp_path


def test_every_option_names_the_data_that_it_applies_to(here):
    assert set(APPLY_TO) == set(vars(Preprocessing())) == set(VALUES)
    assert {kind_of(data): data for data in DATA.values()} == DATA and kind_of("hf:sst2#test") == TEXTS and kind_of(torch.ones(2)) == CODE


@pytest.mark.parametrize("name", VALUES)
def test_option_that_cannot_apply_is_refused(name, here):
    more = {"size": 8} if name == "interpolation" else {}
    given = Preprocessing(**{name: VALUES[name]}, **more)
    takes = next(DATA[kind] for kind in APPLY_TO[name])
    for kind, data in DATA.items():
        if kind in APPLY_TO[name]:
            check_applies(given, [data])
            check_applies(given, [data, "m.py:data"])
            check_applies(given, [torch.ones(2), data, None])
            continue
        for others in ([data], [data, takes])[: 1 + (kind != CODE)]:
            with pytest.raises(InvalidSetting, match=rf"--(size|{name}) applies to .*, and {data} is {kind}\. Leave it out\."):
                check_applies(given, others)
    with pytest.raises(InvalidSetting, match="and the data are in memory"):
        check_applies(given, [torch.ones(2)])


def test_interpolation_without_resizing_is_refused(here):
    with pytest.raises(InvalidSetting, match=r"--interpolation=nearest has no effect without --size or --resize"):
        check_applies(Preprocessing(interpolation="nearest"), ["images"])
    check_applies(Preprocessing(interpolation="nearest"), ["images"], Preprocessing(size=8))


@pytest.mark.parametrize(
    "command",
    [
        ["calibrate", "--data=x.npz", "--budget=4bit", "--output=run"], ["grow", "--train=x.npz", "--budget=4bit", "--output=run"],
        ["train", "--train=x.npz", "--output=run"], ["evaluate", "--data=x.npz"], ["inspect", "--data=x.npz"], ["inspect"],
        ["profile", "--data=x.npz"], ["calibrate", "--data=images", "--test=x.npz", "--output=run"],
    ],
)  # fmt: skip
def test_every_verb_refuses_before_the_network_is_loaded(command, here):
    done = anybit_cli(*command, "--model=m.py:net", "--size=8")
    where = "there is no --data" if command == ["inspect"] else "x.npz is a file of arrays"
    assert done.exit_code == 2 and f"--size applies to a folder of images, and {where}. Leave it out." in done.stderr, done.stderr


@pytest.mark.parametrize("verb", ["calibrate", "grow", "train", "evaluate", "profile"])
def test_python_refuses_what_data_in_memory_would_ignore(verb):
    network, data = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), (torch.zeros(8, 3, 8, 8), torch.arange(8) % 2)
    with pytest.raises(InvalidSetting, match=r"Preprocessing\(mean\W*\) applies to .*, and the data are in memory"):
        getattr(anybit, verb)(network, data, preprocessing=Preprocessing(mean=(0.5,)))


def test_preprocessing_of_a_run_is_no_option_that_was_given(here):
    """A run on images evaluates arrays, which have the recorded size already."""
    image = pytest.importorskip("PIL.Image")
    (here / "images" / "b").mkdir()
    for at in range(8):
        image.fromarray(np.full((12, 12, 3), 20 * at, np.uint8)).save(here / "images" / "ab"[at % 2] / f"{at}.png")
    (here / "m.py").write_text(BUILDING)
    quick = {"pipeline": "light", "activation_bits": (8,), "cache": False}
    given = Preprocessing(size=8, interpolation="nearest")
    result = anybit.calibrate("m.py:net", "images", "4bit", preprocessing=given, **quick)
    result.save("run")
    assert anybit.evaluate(result, "x.npz")["samples"] == 8
    assert result.evaluate("images", preprocessing=Preprocessing(interpolation="bicubic"))["samples"] == 8
    done = anybit_cli("evaluate", "run", "--data=x.npz", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["samples"] == 8, done.stderr
    done = anybit_cli("evaluate", "run", "--data=x.npz", "--size=8")
    assert done.exit_code == 2 and "--size applies to a folder of images" in done.stderr


def test_preprocessing_of_a_model_is_not_applied_to_arrays_which_a_note_says(here, monkeypatch):
    settings = {"mean": (0.5,), "size": 8}
    monkeypatch.setattr("anybit.sources.models.is_transformers", lambda model: True)
    monkeypatch.setattr("anybit.sources.models.huggingface", lambda *_: type("models", (), {"image_settings": lambda model: settings}))
    notes = []
    with listening(events=lambda event, fields: notes.append(fields.get("note"))):
        assert with_model_defaults(Preprocessing(), nn.Identity(), ["x.npz"]) == Preprocessing()
        assert with_model_defaults(Preprocessing(), nn.Identity(), ["images"]) == Preprocessing(**settings)
    assert notes == ["x.npz is used without the preprocessing in the model's own files (mean, size). --mean and --std normalize it"]


def test_stride_for_another_head_is_refused(here, monkeypatch):
    monkeypatch.setattr("anybit.sources.models.is_transformers", lambda model: True)
    reader = type("reader", (), {"task": "classification"})
    monkeypatch.setattr("anybit.sources.models.huggingface", lambda *_: type("heads", (), {"reader_of": lambda model: reader}))
    with pytest.raises(InvalidSetting, match="--stride is for question answering"):
        with_model_defaults(Preprocessing(stride=3), nn.Identity(), ["t.tsv"])
