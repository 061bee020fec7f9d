"""Public functions called from Python: wrong names get the corrected call."""

import inspect

import pytest
from networks import Chain, make, pictures

import anybit
from anybit.errors import InvalidSetting

FUNCTIONS = (
    "calibrate", "allocate", "grow", "train", "search", "evaluate", "inspect", "export", "verify", "bench", "profile", "load",
    "diff", "explain",
)  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_names_its_keywords_and_refuses_others(name):
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
def test_a_wrong_name_or_type_gets_the_corrected_call(keywords, words):
    with pytest.raises(InvalidSetting, match=words):
        anybit.calibrate(make(Chain), pictures(4), **keywords)
