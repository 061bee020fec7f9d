"""Public functions called from Python: for a wrong name, the error shows the corrected call."""

import inspect

import pytest
import torch
from networks import Chain, images, make

import anybit
from anybit.calls import AMOUNTS
from anybit.errors import InvalidSetting

FUNCTIONS = (
    "calibrate", "allocate", "grow", "train", "search", "extract", "evaluate", "inspect", "export", "verify", "bench", "profile", "load",
    "diff", "explain",
)  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_rejects_unknown_keywords(name):
    function = getattr(anybit, name)
    parameters = inspect.signature(function).parameters
    required = [1 for one in parameters.values() if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    known = next(reversed(parameters))
    with pytest.raises(InvalidSetting, match=rf"{name} has no '{known}x'.*{known}="):
        function(*required, **{f"{known}x": 1})
    with pytest.raises(InvalidSetting, match=f"{name}: .*missing.*Call {name}"):
        function()


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"budget": 4}, 'Write "4bit"'), ({"pipline": "light"}, r"calibrate\(\.\.\., pipeline='light'\)"),
        ({"keep": ["head"]}, r"Write keep=\{'head': 'W8A8'\}"),
        ({"weight_bits": 4}, r"Write weight_bits=\(4,\)"), ({"pipeline": "lite"}, "pipeline='light'"),
        ({"budgt": "4bit"}, r"budget='4bit'"), ({"budget": "4bitz"}, "Did you mean 4bit"),
    ],
)  # fmt: skip
def test_error_for_a_wrong_name_or_type_shows_the_corrected_call(keywords, words):
    with pytest.raises(InvalidSetting, match=words):
        anybit.calibrate(make(Chain), images(4), **keywords)


NUMBERS = [(name, number) for name in FUNCTIONS for number in inspect.signature(getattr(anybit, name)).parameters if number in AMOUNTS]


@pytest.mark.parametrize(("name", "number"), NUMBERS, ids=[f"{name}.{number}" for name, number in NUMBERS])
def test_rejects_number_out_of_range_by_name(name, number):
    function = getattr(anybit, name)
    parameters = inspect.signature(function).parameters
    required = [1 for one in parameters.values() if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    for bad in (-1, AMOUNTS[number].most + 1, 10**30, 10**5000, float("nan"), float("inf"), "4", True, 2.5):
        with pytest.raises(InvalidSetting, match=rf"^{number} .*(must be|is outside)"):
            function(*required, **{number: bad})


@pytest.mark.parametrize("device", ["meta", "cuda:²", "cuda:99999999999999999999", "cpus", torch.device("meta")])
def test_rejects_unknown_device_by_name(device):
    model, data = make(Chain), (images(4), torch.arange(4))
    for call in (anybit.evaluate, anybit.calibrate):
        with pytest.raises(InvalidSetting, match=f"device='{device}' is not a device"):
            call(model, data, device=device)
