"""Every option of every settings class: invalid values are rejected by name, valid ones round-trip through JSON."""

import inspect
import json
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import anybit
from anybit.data.options import TASK_NAMES
from anybit.errors import InvalidFile, InvalidSetting
from anybit.loops.settings import TrainSettings
from anybit.methods.settings import CSQSettings, LSQSettings, MSQSettings, MultiQuantSettings, SearchSettings
from anybit.numerics.ranges import ESTIMATORS
from anybit.roads.settings import CalibrateSettings, GrowSettings
from anybit.scheme import Precision
from anybit.settings import LARGEST, Option, options_of, without_none
from anybit.sources.preprocessing import Preprocessing
from anybit.supernets.settings import SupernetSettings

METHODS = (CSQSettings, LSQSettings, MSQSettings, MultiQuantSettings, SearchSettings)
KINDS = (CalibrateSettings, GrowSettings, SupernetSettings, Preprocessing, TrainSettings, *METHODS)
OPTIONS = [(kind, one) for kind in KINDS for one in options_of(kind).values()]
NAMES = [f"{kind.__name__}.{one.name}" for kind, one in OPTIONS]


def bad_numbers(one: Option, kind: type) -> list:
    """Numbers, and values that are not numbers, that the option rejects."""
    outside = [(one.least, -1), (one.most, 1), (one.above, 0), (one.below, 0)]
    values = [bound + beyond for bound, beyond in outside if bound is not None]
    never = [math.nan, math.inf, -math.inf, 1e308, -1e308, True, "3", b"3", [3], object()]
    return [*values, *never, *([2.5, 10**30, -(10**30), 10**5000] if kind is int else [10**400])]


def numbers_in(kind) -> bool:
    """Return whether a type holds numbers."""
    return kind in (int, float) or any(map(numbers_in, typing.get_args(kind)))


def bad_values(one: Option) -> list:
    """Values that the option rejects in Python."""
    kind, inner = without_none(one.kind), typing.get_args(without_none(one.kind))
    nothing = [] if type(None) in typing.get_args(one.kind) else [None]
    if kind in (int, float):
        return nothing + bad_numbers(one, kind)
    if kind is bool:
        return [*nothing, 1, 0.0, "true", [], math.nan]
    if typing.get_origin(kind) is tuple:
        inside = [3, math.nan] if inner[0] is str else bad_numbers(one, without_none(inner[0]))
        return [*nothing, 4, math.nan, "4,8", {4: 8}, *((bad,) for bad in inside)]
    if typing.get_origin(kind) is Mapping:
        inside = bad_numbers(one, float) if inner[1] is float else [3, math.nan, "W9", "none"]
        return [*nothing, 4, math.nan, [4], "a=W8A8", *({key: bad} for bad in inside for key in ([2] if inner[0] is int else ["fc"]))]
    if kind is str:
        return [*nothing, 3, math.nan, b"flip", ["flip"], *(["nothing"] if one.choices else [])]
    assert kind is Precision
    return [*nothing, 4, math.nan, "W9", "four"]


@pytest.mark.parametrize(("kind", "one"), OPTIONS, ids=NAMES)
def test_rejects_invalid_value_by_name(kind, one):
    for bad in bad_values(one):
        with pytest.raises(InvalidSetting, match=rf"^{one.name}\b"):
            kind.of(**{one.name: bad})


@pytest.mark.parametrize(("kind", "one"), OPTIONS, ids=NAMES)
def test_range_includes_its_ends_and_is_named_in_the_error(kind, one):
    number = without_none(one.kind)
    if number not in (int, float):
        return
    for bound in (one.least, one.most):
        assert bound is None or one.checked(bound) == bound
    for bound, beyond in ((one.least, -1), (one.most, 1), (one.above, 0), (one.below, 0)):
        if bound is not None:
            with pytest.raises(InvalidSetting) as refused:
                one.checked(bound + beyond)
            assert f"{bound:g}" in str(refused.value) or str(bound) in str(refused.value)
            assert str(bound + beyond) in str(refused.value) and one.range in str(refused.value)


FUNCTIONS = [
    (function, name)
    for function in (getattr(anybit, name) for name in anybit.__all__)
    if inspect.isfunction(function)
    for name, one in inspect.signature(function).parameters.items()
    if numbers_in(one.annotation) and name != "metric"
]


@pytest.mark.parametrize(("function", "name"), FUNCTIONS, ids=[f"{function.__name__}.{name}" for function, name in FUNCTIONS])
def test_every_number_of_a_function_has_limits(function, name):
    parameters = inspect.signature(function).parameters
    needed = {key: object() for key, one in parameters.items() if one.default is one.empty}
    kind = without_none(parameters[name].annotation)
    for bad in (math.nan, math.inf, -math.inf, 1e308, -1e308, 10**400, -(10**400)):
        origin = typing.get_origin(kind)
        key = 2 if origin is Mapping and typing.get_args(kind)[0] is int else "fc"
        value = (bad,) if origin is tuple else {key: bad} if origin is Mapping else bad
        with pytest.raises(InvalidSetting, match=rf"^{name}\b"):
            function(**{**needed, name: value})


@pytest.mark.parametrize(("kind", "one"), OPTIONS, ids=NAMES)
def test_every_number_has_two_bounds(kind, one):
    if numbers_in(one.kind):
        assert (one.least is not None or one.above is not None) and (one.most is not None or one.below is not None)
        assert max(one.most or 0, one.below or 0) <= max(LARGEST, 2**63)


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_is_described_and_accepts_its_default(kind):
    for name, one in options_of(kind).items():
        assert one.doc.endswith((".", "406", "0.3.")) and one.doc[0] != " ", name
        assert one.default is not MISSING and one.checked(one.default) == one.default
        assert name in kind.__doc__ or name not in {field.name for field in fields(kind)}
    assert kind() == kind.of() and kind.from_json(json.loads(json.dumps(kind().to_json()))).to_json() == kind().to_json()


values = {
    bool: st.booleans(),
    int: st.integers(2, 8),
    float: st.sampled_from([0.25, 0.5]),
    Precision: st.sampled_from([Precision(), Precision(4, 8), Precision(0)]),
}


def good(one: Option) -> st.SearchStrategy:
    kind, inner = without_none(one.kind), typing.get_args(without_none(one.kind))
    if one.choices:
        strategy = st.sampled_from(list(one.choices))
    elif one.name in ("augment", "sandwich", "columns"):
        strategy = st.sampled_from({"augment": ["", "flip"], "sandwich": ["HRL", "HL"], "columns": ["text=a,label=1"]}[one.name])
    elif typing.get_origin(kind) is tuple:
        one_of = st.sampled_from(["a", "b", "c", "d"]) if inner[0] is str else values[without_none(inner[0])]
        strategy = st.lists(one_of, min_size=2, max_size=4, unique=True).map(tuple)
    elif typing.get_origin(kind) is Mapping:
        strategy = st.dictionaries(st.integers(2, 8) if inner[0] is int else st.text(max_size=3), values[inner[1]], max_size=2)
    elif kind is int:
        least = 2 if one.least is None else int(one.least)
        strategy = st.integers(least, least + 5 if one.most is None else int(one.most))
    elif kind is float:
        strategy = st.sampled_from([0.25, 0.5] if (one.least or 0) < 0.25 else [1.0, 7.5])
    else:
        strategy = values[kind]
    return strategy | st.none() if type(None) in typing.get_args(one.kind) else strategy


def created(kind, chosen: dict) -> tuple:
    """The settings, and what of `chosen` has an effect beside the rest of it."""
    while True:
        try:
            return kind.of(**chosen), chosen
        except InvalidSetting as refused:
            idle = re.match(r"(\w+)=.* has no effect", str(refused))
            assert idle and idle[1] in chosen, refused
            chosen = {name: value for name, value in chosen.items() if name != idle[1]}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_settings_round_trip_through_json_and_flat_names(kind, data):
    options = {name: one for name, one in options_of(kind).items() if name not in ("compile", "label", "resize")}
    chosen = data.draw(st.fixed_dictionaries({}, optional={name: good(one) for name, one in options.items() if name != "label_weight"}))
    chosen = {name: min(value, 0.3) if name == "fix" else max(value, 0.3) if name == "harden" else value for name, value in chosen.items()}
    settings, chosen = created(kind, chosen)
    assert all(settings.flat()[name] == value for name, value in chosen.items())
    assert kind.of(**settings.flat()) == settings
    again = kind.from_json(json.loads(json.dumps(settings.to_json(), allow_nan=False)))
    assert again.to_json() == settings.to_json() and (kind is CalibrateSettings or again == settings)


@pytest.mark.parametrize(
    "change",
    [{"epochs": "many"}, {"epochs": 2.0}, {"epochs": True}, {"half": 1}, {"augment": None}, {"epochs": 0}, {"more": 1}, {"distill": 2}],
    ids=str,
)
def test_settings_of_wrong_types_in_a_file_are_named(change):
    stored = TrainSettings().to_json()
    with pytest.raises(InvalidFile, match=f"^here: .*{next(iter(change))}"):
        TrainSettings.from_json({**stored, **change}, "here")
    with pytest.raises(InvalidFile, match=f"^here: train: .*{next(iter(change))}"):
        GrowSettings.from_json({"train": {**stored, **change}}, "here")
    with pytest.raises(InvalidFile, match=r"^here is a list"):
        TrainSettings.from_json([stored], "here")


def test_error_for_unknown_option_suggests_the_nearest_match():
    cases = ((CalibrateSettings, "sampels", "samples"), (GrowSettings, "epoch", "epochs"), (GrowSettings, "plane", "planes"))
    for kind, name, near in cases:
        with pytest.raises(InvalidSetting, match=f"'{name}'.*'{near}'"):
            kind.of(**{name: 1})


@pytest.mark.parametrize(
    ("function", "kind"),
    [(anybit.calibrate, CalibrateSettings), (anybit.grow, GrowSettings), (anybit.train, SupernetSettings), (anybit.search, SearchSettings)],
)
def test_functions_document_their_options(function, kind):
    parameters = inspect.signature(function).parameters
    for name, one in options_of(kind).items():
        assert parameters[name].default == one.default and parameters[name].annotation == one.kind
        assert name in function.__doc__ and one.doc.split()[0] in function.__doc__
    assert not any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def test_choices_are_those_of_the_code():
    assert set(options_of(CalibrateSettings)["estimator"].choices) == set(ESTIMATORS)
    assert {tuple(options_of(kind)["task"].choices) for kind in (CalibrateSettings, GrowSettings, SupernetSettings)} == {TASK_NAMES}


# Values of another type


def test_a_message_quotes_the_bounds_that_hold_and_the_type_that_is_wrong():
    for wrong in (64.5, Decimal("64"), "64", True, [64]):
        with pytest.raises(InvalidSetting, match=r"^samples .* must be a whole number, 2\.\.") as refused:
            anybit.calibrate(None, None, "4bit", samples=wrong)
        assert ("Write samples=64." in str(refused.value)) == (wrong in (Decimal("64"), "64"))
    with pytest.raises(InvalidSetting, match=r"^samples 0 is outside 2\.\."):
        anybit.calibrate(None, None, "4bit", samples=0)
    with pytest.raises(InvalidSetting, match=r"^weight_bits '4' must be a whole number, 2\.\.8\."):
        CalibrateSettings(weight_bits=(2, "4"))  # type: ignore[arg-type]
    with pytest.raises(InvalidSetting, match=r"^outputs of 'a.b': 0.0 must be a finite number, above 0"):
        CalibrateSettings(outputs={"a.b": 0.0})
    with pytest.raises(InvalidSetting, match=r"^std 0.0 must be a finite number, from 1e-06"):
        Preprocessing(std=(0.0,))


@pytest.mark.parametrize("bits", [range(2, 5), {4, 2, 3}, np.array([2, 3, 4]), torch.tensor([2, 3, 4])])
def test_numbers_and_lists_of_other_libraries_are_read(bits):
    assert CalibrateSettings(weight_bits=bits).weight_bits == (2, 3, 4)
    assert type(CalibrateSettings(samples=torch.tensor(64)).samples) is int  # type: ignore[arg-type]
