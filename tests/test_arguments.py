"""Every argument of every public function: a value of another type or out of range is refused by name, before any work."""

import inspect
import math
import typing
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import Chain, images, make

import anybit
from anybit.budget import Budget, Condition
from anybit.calls import DATA, OBJECTS
from anybit.errors import InvalidInput, InvalidSetting
from anybit.reports.page import Page
from anybit.roads.result import Result
from anybit.roads.search import Search
from anybit.settings import UNIONS
from anybit.supernets.supernet import Supernet

FUNCTIONS = {
    **{name: function for name in anybit.__all__ if inspect.isfunction(function := getattr(anybit, name)) and name != "show_progress"},
    **{f"{kind.__name__}.save": kind.save for kind in (Result, Supernet, Search, Page)},
}
ARGUMENTS = [(name, argument) for name, function in FUNCTIONS.items() for argument in inspect.signature(function).parameters]
ARGUMENTS = [(name, argument) for name, argument in ARGUMENTS if argument not in ("self", "runs")]
PAIR = (images(4), torch.arange(4))
NEEDED = {
    "model": make(Chain), "data": PAIR, "train": PAIR, "run": "nowhere", "run2": "nowhere", "folder": "nowhere", "layer": "fc",
    "onnx": "nowhere.onnx", "output": "nowhere.html", "path": "nowhere.html", "budget": "4bit",
}  # fmt: skip
NUMBERS = [math.nan, math.inf, -math.inf, -7, 2.5, True, 2**70, -(10**400), 1e308]
OTHERS = [b"4", object(), {4}, 3j, int, len]


def types_in(kind) -> set:
    """Return the types that a value may have, inside optional types and unions."""
    return set().union(*map(types_in, typing.get_args(kind))) if typing.get_origin(kind) in UNIONS else {typing.get_origin(kind) or kind}


def bad_values(function, argument: str) -> list:
    """Return values that an argument rejects, by its annotation."""
    parameter = inspect.signature(function).parameters[argument]
    kinds = types_in(parameter.annotation)
    none = [] if type(None) in kinds or parameter.default is None else [None]
    if argument in DATA:
        return [*none, *NUMBERS, b"4", 3j, len, ""]
    if argument == "metric":
        return [*NUMBERS, "top1", {}, [len], lambda outputs: 1.0]
    if argument == "budget":
        return [*none, *NUMBERS, 0, *OTHERS, "", "4bits,", "nanbit", "0bit", "-4bit", {"4bit": 1}, [4], [True], ["4bit", None]]
    texts = [] if kinds & {str, Path} else ["yes", "no", "", "nan", "4,8", "4"]
    numbers = [one for one in NUMBERS if not (isinstance(one, bool) and bool in kinds)]
    if int in kinds:
        numbers = [one for one in numbers if one != -7 or argument != "seed"]
    if float in kinds:
        numbers = [one for one in numbers if one != 2.5 or argument not in ("strength", "pull", *TWO_AND_A_HALF)]
    inside = [{"fc": one} for one in (math.nan, True, [1], None)] if Mapping in kinds else [{}, {"fc": 8}]
    lists = [[], [[4]], ["fc"], ("x", 1)] if Mapping in kinds or tuple not in kinds else [[math.nan], [True], [[4]], [3.5], [None, "x"]]
    others = [one for one in OTHERS if not (isinstance(one, set) and tuple in kinds)]  # sets are lists in any order
    return [*none, *numbers, *others, *texts, *inside, *lists]


TWO_AND_A_HALF = ("logit", "plane_temperature", "fix_temperature", "final_temperature", "offset_rate", "step_rate", "rate", "gate_rate",
                  "plane_rate", "scale_rate")  # fmt: skip
"""Arguments of which 2.5 is a valid value."""


def test_every_type_of_a_signature_is_checked():
    for name, argument in ARGUMENTS:
        if argument not in {*DATA, "metric", "budget"}:
            kind = inspect.signature(FUNCTIONS[name]).parameters[argument].annotation
            assert argument in OBJECTS or len(types_in(kind) - {type(None)}) == 1 or Mapping in types_in(kind), (name, argument)


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS, ids=[f"{name}.{argument}" for name, argument in ARGUMENTS])
def test_argument_of_another_type_is_refused_by_name(name, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function = FUNCTIONS[name]
    parameters = inspect.signature(function).parameters
    needed = {key: NEEDED.get(key) for key, one in parameters.items() if one.default is one.empty and one.kind is not one.VAR_POSITIONAL}
    for bad in bad_values(function, argument):
        with pytest.raises((InvalidSetting, InvalidInput)) as refused:
            function(**{**needed, argument: bad})
        message = str(refused.value)
        assert message.lower().startswith((argument, f"the {argument}")), (bad, message)
        assert message.endswith((".", "?")) and "\n" not in message and len(message) < 500, message
    assert not list(tmp_path.rglob("*.*"))


def test_several_runs_of_a_report_are_checked():
    for bad in (4, None, True, b"runs/a"):
        with pytest.raises(InvalidSetting, match=r"^runs=.* is not a run"):
            anybit.report("nowhere", bad, output="nowhere.html")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: anybit.profile(make(Chain), images(4), keep={"6": 8}), "keep of '6': 8 must be a precision. Write keep={'6': 'W8A8'}."),
        (lambda: anybit.profile(make(Chain), images(4), keep=True), "Write keep={'*': 'W8A8'}."),
        (lambda: anybit.profile(make(Chain), images(4), keep=["fc", "conv1"]), "Write keep={'fc': 'W8A8', 'conv1': 'W8A8'}."),
        (lambda: anybit.profile(make(Chain), images(4), overwrite="no"), "overwrite 'no' must be true or false. Write overwrite=False."),
        (lambda: anybit.export("run", "net.onnx", tables="yes"), "Write tables=True."),
        (lambda: anybit.search("supernet", images(4), 4), 'Write "4bit" for bits per weight.'),
        (lambda: anybit.extract("supernet", ["3bit", "4bit"]), "Give one budget, not several."),
        (lambda: anybit.calibrate(make(Chain), lambda: images(4)), "is not data. Call it and give its result"),
        (lambda: anybit.Scheme.parse([("fc", "W4A8")]), "Write anybit.Scheme.parse({'fc': 'W4A8', ...})."),
        (lambda: anybit.Scheme({"fc": "W4A8"}), "Write anybit.Scheme.parse({'fc': 'W4A8', ...})."),  # type: ignore[dict-item]
        (lambda: anybit.Scheme(4), "is not a mapping of layers"),  # type: ignore[arg-type]
        (lambda: anybit.evaluate(make, images(4)), "is neither a network nor a run."),
    ],
)
def test_refusal_shows_the_corrected_call(call, words):
    with pytest.raises((InvalidSetting, InvalidInput)) as refused:
        call()
    assert words in str(refused.value), refused.value


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: anybit.search(anybit.Scheme(), PAIR), "is not a supernet. Give what anybit.train returns"),
        (lambda: anybit.Budget.parse(Budget("x", (Condition("bits", math.nan),))), "Condition(quantity='bits', limit=nan)"),
        (lambda: anybit.Budget.parse(Budget("x", (Condition("size", 3),))), "Write the budget as text"),
        (lambda: anybit.Budget.parse("9" * 5000 + "bit"), "must be above zero and finite"),
        (lambda: anybit.Scheme.uniform("fc", "W4A8"), "'fc' is not a list of layers"),
        (lambda: anybit.Scheme.uniform(4, "W4A8"), "4 is not a list of layers"),  # type: ignore[arg-type]
        (lambda: anybit.Samples(PAIR, "no"), "labelled 'no' must be True or False"),  # type: ignore[arg-type]
        (lambda: anybit.Samples(PAIR, True, workers="2"), "workers '2' must be a whole number"),  # type: ignore[arg-type]
        (lambda: anybit.show_progress(5), "show_progress: too many positional arguments"),  # type: ignore[call-arg]
        (lambda: anybit.calibrate(make(Chain), torch.Tensor), "is not data. Call it and give its result"),
        (lambda: anybit.grow(make(Chain), PAIR, "4bit", augment="flip,flip"), "augment='flip,flip' has no effect as a whole"),
        (lambda: anybit.grow(make(Chain), PAIR, "4bit", augment="crop0"), "augment='crop0' has no effect as a whole"),
    ],
)  # fmt: skip
def test_values_made_by_hand_are_refused_with_a_remedy(call, words):
    with pytest.raises((InvalidSetting, InvalidInput)) as refused:
        call()
    assert words in str(refused.value) and len(str(refused.value)) < 400, refused.value


@pytest.mark.parametrize("place", [str, Path])
def test_a_scheme_may_be_a_path_as_text(place, tmp_path):
    """Text was read as a scheme, not as its place."""
    (tmp_path / "scheme.json").write_text("{}")
    for call in (
        lambda: anybit.grow(make(Chain), PAIR, scheme=place(tmp_path)),
        lambda: anybit.extract("s", "4bit", scheme=place(tmp_path)),
    ):
        with pytest.raises(anybit.AnybitError) as refused:
            call()
        assert "is not a scheme" not in str(refused.value), refused.value


def test_numbers_and_switches_of_other_libraries_are_read():
    import numpy as np

    from anybit.roads.settings import CalibrateSettings

    read = CalibrateSettings(bn_tuning=np.False_, samples=np.int32(8), outputs={0: np.float32(0.5)})  # type: ignore[arg-type]
    assert read.bn_tuning is False and read.samples == 8 and read.outputs == {"0": 0.5}
    assert replace(read, samples=torch.tensor(9)).samples == 9  # type: ignore[arg-type]
