"""Options that change nothing beside the others are refused before the work; the remedy that the message names is accepted."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import anybit_cli
from networks import Chain, images, make

import anybit
from anybit.data.options import parse_outputs
from anybit.errors import InvalidSetting
from anybit.loops.settings import TrainSettings
from anybit.methods.settings import CSQSettings, LSQSettings, MSQSettings, SearchSettings, parse_factors
from anybit.progress import listening
from anybit.roads.settings import CalibrateSettings, GrowSettings
from anybit.scheme import parse_keep
from anybit.settings import Option, options_of, without_none
from anybit.supernets.settings import SupernetSettings

DATA = (images(8), torch.arange(8) % 5)
TRAINING = ("start", "rounding", "drop", "tune_scales")
DRAWING = ("explored", "rounds", "targets", "population", "generations", "mutation", "seed")
IDLE = [
    *((CalibrateSettings, {"pipeline": "light"}, name) for name in TRAINING),
    *((CalibrateSettings, {"sequential": False}, name) for name in ("start", "rounding", "drop")),
    (CalibrateSettings, {"pipeline": "light", "solver": "none"}, "unit"),
    (CalibrateSettings, {"unit": "layer"}, "blocks"),
    (CalibrateSettings, {"bias_tuning": False}, "tune_scales"),
    *((CalibrateSettings, {"bn_tuning": False}, name) for name in ("bn_prior", "bn_target")),
    *((kind, {"augment": augment}, "border") for kind in (TrainSettings, GrowSettings, SupernetSettings) for augment in ("", "flip")),
    (SupernetSettings, {}, "label_weight"),
    (SupernetSettings, {"sandwich": "HL"}, "middle"),
    *((SearchSettings, {"strategy": "integer-program"}, name) for name in DRAWING),
]


def other_value(one: Option):
    """A valid value that is not the option's default."""
    kind = without_none(one.kind)
    if one.choices:
        return next(choice for choice in one.choices if choice != one.default)
    if kind is bool:
        return not one.default
    if kind in (int, float):
        return next(kind(value) for value in (0.25, 0.5, 5, 7, 3) if kind(value) == value != one.default and accepted(one, value))
    return {"blocks": ("a",)}[one.name]


def accepted(one: Option, value) -> bool:
    try:
        one.checked(value)
    except InvalidSetting:
        return False
    return True


@pytest.mark.parametrize(("kind", "beside", "name"), IDLE, ids=[f"{kind.__name__}.{name} {beside}" for kind, beside, name in IDLE])
def test_option_without_effect_is_refused_with_what_it_needs(kind, beside, name):
    one = options_of(kind)[name]
    value = other_value(one)
    assert kind.of(**beside, **{name: one.default}).flat()[name] == one.default
    with pytest.raises(InvalidSetting, match=rf"^{name}=.* has no effect .*Leave it out") as refused:
        kind.of(**beside, **{name: value})
    remedy = re.search(r"or give (\w+=.*?)(?: or .*)?\.$", str(refused.value))
    if remedy:
        given = eval(f"dict({remedy[1]})")
        assert kind.of(**{**beside, name: value, **given}).flat()[name] == value


@pytest.mark.parametrize("method", ["csq", "msq", "lsq"])
def test_options_of_another_method_are_refused(method, run_folder):
    kinds = {"csq": CSQSettings, "msq": MSQSettings, "lsq": LSQSettings}
    target = {"scheme": anybit.Scheme.parse({"fc": "W4A8"})} if method == "lsq" else {"budget": "4bit"}
    own = options_of(kinds[method])
    others = {name: one for kind in kinds.values() for name, one in options_of(kind).items() if name not in own}
    assert len(others) > 3
    for name, one in others.items():
        with pytest.raises(InvalidSetting, match=rf"^{name}=.* has no effect with method='{method}'.*or give method='"):
            anybit.grow(make(Chain), DATA, method=method, **target, **{name: other_value(one)})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: anybit.train(make(Chain), DATA, step_rates={3: 0.1}, bits=(2, 4)), "step_rates= has no effect for 3 bits"),
        (lambda: anybit.grow(make(Chain), DATA, strength=0.5), "strength=0.5 has no effect without a budget"),
        (lambda: anybit.grow(make(Chain), DATA, method="msq", pull=0.1), "pull=0.1 has no effect without a budget"),
        (lambda: anybit.grow(make(Chain), DATA, "4bit", prune=True, anchor=False), "anchor=False has no effect with prune=True"),
        (lambda: anybit.grow(make(Chain), DATA, scheme=anybit.Scheme(), keep={"fc": "W8A8"}), "keep= has no effect with scheme="),
        (lambda: anybit.grow(make(Chain), DATA, scheme=anybit.Scheme(), activation_bits=4), "activation_bits=4 has no effect with scheme="),
        (lambda: anybit.profile(make(Chain), DATA[0], weights="w.pt"), "The weights w.pt are for a model given by reference"),
        (lambda: anybit.extract("supernet", "3bit", metric=lambda outputs, labels: 1.0), "A metric is reported on test data"),
        (lambda: anybit.inspect(make(Chain), outputs={"0": 1.0}), "outputs= has no effect without data"),
        (lambda: parse_factors("2=0.1,2=0.4"), "2 bits are given twice"),
        (lambda: parse_keep(["fc=W4A8", "fc=W8A8"]), "fc is also kept at W4A8"),
        (lambda: parse_outputs(["boxes=1", "boxes=2"]), "boxes is given twice"),
    ],
)  # fmt: skip
def test_argument_without_effect_is_refused_before_the_work(call, words):
    with pytest.raises(InvalidSetting) as refused:
        call()
    assert words in str(refused.value), refused.value


def test_stored_settings_without_effect_are_read():
    """Earlier versions accepted them."""
    for kind, beside, name in IDLE:
        stored = {**kind.of(**beside).to_json(), **({} if kind is not CalibrateSettings else {name: kind().to_json()[name]})}
        kind.from_json(stored)
    assert SupernetSettings.from_json({"multiquant": {"step_rates": {"3": 0.1}}, "bits": [2, 4]}).multiquant.step_rates == {3: 0.1}
    assert CalibrateSettings.from_json({"pipeline": "light", "steps": 7}).steps == 7


AMOUNTS = [
    (CalibrateSettings, {"pipeline": "light"}, {"steps": 7, "candidate_steps": 7, "step_batch": 7}),
    (CalibrateSettings, {"sequential": False}, {"steps": 7}),
    (CalibrateSettings, {}, {"candidate_steps": 7}),
    (SupernetSettings, {"batch_norm": "switch"}, {"bn_images": 7}),
]


@pytest.mark.parametrize(("kind", "beside", "amounts"), AMOUNTS, ids=str)
def test_amounts_of_work_that_is_not_done_are_noted(kind, beside, amounts):
    assert kind.of(**beside).notes_on_effect() == []
    notes = kind.of(**beside, **amounts).notes_on_effect()
    assert [note.partition("=")[0] for note in notes] == [options_of(kind)[name].written for name in amounts]
    assert all(" has no effect " in note and note.partition("=")[2].startswith("7 ") for note in notes)


def test_a_calibration_notes_amounts_of_work_that_it_does_not_do():
    told = []
    with pytest.raises(InvalidSetting, match="not a device"), listening(None, lambda event, fields: told.append(fields.get("note", ""))):
        anybit.calibrate(make(Chain), DATA, "drop=1%", pipeline="light", steps=7, alternatives=3, device="cpus")
    assert [note.split()[0] for note in told if "no effect" in note] == ["--steps=7", "--alternatives=3"]


LINES = {
    "extract run --budget 3bit --output e --steps 5": "--steps",
    "extract run --budget 3bit --output e --samples 5": "--samples",
    "evaluate run --weights w.safetensors --data x.npz": "--weights=w.safetensors has no effect on a run",
    "train --model m.py:net --train x.npz --step-rates 2=0.1,2=0.2 --output t": "2 bits are given twice",
    "train --model m.py:net --train x.npz --step-rates 3=0.1 --bits 2,4 --output t": "--step-rates has no effect for 3 bits",
    "grow --model m.py:net --train x.npz --budget 3bit --start-bits 4 --output g": "--start-bits=4 has no effect with --method=csq",
    "grow --model m.py:net --train x.npz --budget 3bit --method msq --planes 4 --output g": "--planes=4 has no effect with --method=msq",
    "calibrate --model m.py:net --data x.npz --budget 4bit --pipeline light --rounding adaround --output c": "--rounding=adaround has no",
}


@pytest.mark.parametrize("line", LINES)
def test_option_without_effect_is_refused_on_the_command_line(here, run_folder, line):
    np.savez("w.npz", x=np.zeros(1))
    Path("w.npz").rename("w.safetensors")
    (run_folder / "supernet.json").write_text("{}") if line.startswith("extract") else None
    done = anybit_cli(*line.split())
    assert done.exit_code == 2 and LINES[line] in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not any(Path(name).exists() for name in ("e", "t", "g", "c"))
