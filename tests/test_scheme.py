"""Precision, Scheme and Budget: text and value round-trip, and invalid ones are rejected with a remedy."""

import copy
import fnmatch
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit.budget import Budget, parse_size
from anybit.errors import InvalidSetting, SchemeMismatch
from anybit.scheme import Precision, Scheme, check_names, match_patterns

few = settings(max_examples=100, deadline=None)
bits = st.integers(2, 8)
precisions = st.builds(Precision, st.none() | st.just(0) | bits, st.none() | bits)
names = st.text(min_size=1, max_size=8)
schemes = st.dictionaries(names, precisions, max_size=5).map(Scheme)
W4A8, W8, FLOAT = Precision(4, 8), Precision(8), Precision()


# Precision


@few
@given(precisions)
def test_precision_round_trips_through_text(precision):
    assert Precision.parse(str(precision)) == precision


@pytest.mark.parametrize(
    "text, weight_bits, activation_bits",
    [("W4A8", 4, 8), ("W4", 4, None), ("A8", None, 8), ("W0", 0, None), ("W0A8", 0, 8), ("float", None, None)],
)
def test_every_documented_precision(text, weight_bits, activation_bits):
    precision = Precision.parse(text)
    assert (precision.weight_bits, precision.activation_bits, str(precision)) == (weight_bits, activation_bits, text)


@pytest.mark.parametrize(
    "text", ["", " ", "w4a8", "W4 A8", "W4A8 ", "W4A8\n", "A8W4", "W", "A", "WA", "W4A", "W-4", "W4.0", "4", "4bit", "Float", "W4A8x", "W٤"]
)
def test_rejects_malformed_precision_listing_the_forms(text):
    with pytest.raises(InvalidSetting, match=rf"Precision {re.escape(repr(text))} cannot be read\. Write W4A8, .*float\."):
        Precision.parse(text)


@pytest.mark.parametrize(
    "text, operand", [("W1", "weight"), ("W9A8", "weight"), ("W32", "weight"), ("A1", "activation"), ("W4A0", "activation")]
)
def test_rejects_bits_outside_2_to_8_naming_the_operand(text, operand):
    with pytest.raises(InvalidSetting, match=f"{operand} bit-width .* is outside 2..8"):
        Precision.parse(text)


@pytest.mark.parametrize("weight_bits", [False, True, 4.0, 0.0, "4"])
def test_rejects_non_integer_bit_width(weight_bits):
    with pytest.raises(InvalidSetting, match="weight bit-width"):
        Precision(weight_bits)


def test_float_weight_counts_32_bits_and_pruned_weight_0():
    assert [Precision.parse(text).stored_weight_bits for text in ("float", "A8", "W0", "W3A4")] == [32, 32, 0, 3]


# Scheme


@few
@given(schemes)
def test_scheme_round_trips_through_json_in_order(scheme):
    again = Scheme.parse(json.loads(json.dumps(scheme.to_json())))
    assert again == scheme and list(again) == list(scheme)


@few
@given(schemes)
def test_equal_schemes_have_equal_hashes(scheme):
    backwards = Scheme(dict(list(scheme.items())[::-1]))
    assert backwards == scheme
    assert hash(backwards) == hash(scheme) == hash(copy.deepcopy(scheme))


def test_different_schemes_are_unequal():
    assert len({Scheme({"a": W4A8}), Scheme({"a": W8}), Scheme({"b": W4A8}), Scheme({"a": W4A8, "b": W4A8}), Scheme()}) == 5


def test_scheme_is_independent_of_its_source_dictionary():
    layers = {"conv": W4A8}
    scheme = Scheme(layers)
    layers["conv"] = FLOAT
    assert scheme["conv"] == W4A8


def test_scheme_is_immutable():
    scheme = Scheme({"conv": W4A8})
    with pytest.raises(TypeError):
        scheme["conv"] = FLOAT
    with pytest.raises(TypeError):
        scheme.layers["conv"] = FLOAT
    with pytest.raises(AttributeError):
        scheme.layers = {}


def test_uniform_accepts_text_or_value_and_keeps_the_order():
    scheme = Scheme.uniform(["b", "a"], "W4A8")
    assert scheme == Scheme.uniform(["b", "a"], W4A8)
    assert list(scheme.items()) == [("b", W4A8), ("a", W4A8)]


def test_replace_returns_a_changed_copy():
    scheme = Scheme.uniform(["conv1", "conv2", "fc"], W4A8)
    changed = scheme.replace({"conv2": FLOAT})
    assert list(changed.items()) == [("conv1", W4A8), ("conv2", FLOAT), ("fc", W4A8)]
    assert scheme == Scheme.uniform(["conv1", "conv2", "fc"], W4A8)


def test_error_for_unknown_layer_suggests_the_nearest_match():
    scheme = Scheme.uniform(["layer1.conv1", "fc"], W4A8)
    with pytest.raises(SchemeMismatch, match=r"no quantizable layer 'layer1\.conv' \(did you mean 'layer1\.conv1'\?\)"):
        scheme.replace({"layer1.conv": W8})


def test_many_unknown_layers_are_counted():
    with pytest.raises(SchemeMismatch, match=r"The file has .*'n0'.*'n4' and 2 more"):
        check_names([f"n{i}" for i in range(7)], ["xyz"], "The file")


def test_accepts_known_names():
    check_names(["a"], ["a", "b"], "The model")
    check_names([], [], "The model")


# Keep patterns

LAYERS = ["stem", "layer1.conv1", "layer1.conv2", "layer2.conv1", "fc"]


def test_patterns_match_whole_names_in_the_order_of_the_model():
    matched = match_patterns({"fc": FLOAT, "*.conv1": W8}, LAYERS)
    assert list(matched.items()) == [("layer1.conv1", W8), ("layer2.conv1", W8), ("fc", FLOAT)]


def test_later_pattern_takes_precedence():
    assert match_patterns({"*": W8, "stem": FLOAT}, LAYERS)["stem"] == FLOAT
    overlapping = match_patterns({"layer*": FLOAT, "*.conv1": W8}, LAYERS)
    assert overlapping["layer1.conv1"] == W8 and FLOAT in overlapping.values()


@pytest.mark.parametrize("patterns", [{"stem": FLOAT, "*": W8}, {"layer1*": FLOAT, "fc": W8, "l*": FLOAT}])
def test_rejects_pattern_whose_every_layer_a_later_one_matches(patterns):
    first, *_, last = patterns
    with pytest.raises(InvalidSetting, match=rf"{re.escape(first)}=float' has no effect, since --keep='{re.escape(last)}="):
        match_patterns(patterns, LAYERS)
    assert match_patterns({name: patterns[name] for name in reversed(patterns)}, LAYERS)[next(iter(fnmatch.filter(LAYERS, first)))] == FLOAT


@pytest.mark.parametrize("pattern", ["conv1", "layer1", "f", "FC", "layer1.conv"])
def test_rejects_pattern_that_matches_no_whole_name(pattern):
    with pytest.raises(InvalidSetting, match=f"--keep=.{re.escape(pattern)}=W8. matches no quantizable layer"):
        match_patterns({pattern: W8}, LAYERS)


def test_error_for_a_pattern_suggests_near_matches():
    with pytest.raises(InvalidSetting, match=r"Near matches: layer1\.conv"):
        match_patterns({"layer1.conv": W8}, LAYERS)


# Budget


@pytest.mark.parametrize(
    "text, limits",
    [
        ("4bit", {"bits": 4}), ("4bits", {"bits": 4}), ("3.5bit", {"bits": 3.5}), (".5bit", {"bits": 0.5}),
        ("120B", {"bytes": 120}), ("120kB", {"bytes": 120e3}), ("120KB", {"bytes": 120e3}),
        ("2MB", {"bytes": 2e6}), ("1GB", {"bytes": 1e9}),
        ("3KiB", {"bytes": 3072}), ("1.5MiB", {"bytes": 1572864}), ("1GiB", {"bytes": 1073741824}),
        ("12.5%", {"percent": 12.5}),
        ("bops=7", {"bops": 7}), ("bops=5k", {"bops": 5e3}), ("bops=5M", {"bops": 5e6}), ("bops=2.1G", {"bops": 2.1e9}),
        ("bops=1T", {"bops": 1e12}),
        ("latency=5us", {"latency": 5e-6}), ("latency=3ms", {"latency": 3e-3}), ("latency=2s", {"latency": 2}),
        ("loss=0.02", {"loss": 0.02}), ("drop=1%", {"drop": 1}),
        ("4bit,bops=2G", {"bits": 4, "bops": 2e9}), (" 4bit , 12.5%,drop=1% ", {"bits": 4, "percent": 12.5, "drop": 1}),
    ],
)  # fmt: skip
def test_every_documented_budget(text, limits):
    budget = Budget.parse(text)
    assert {condition.quantity: condition.limit for condition in budget.conditions} == pytest.approx(limits)
    assert all(budget.limit(quantity) == pytest.approx(limit) for quantity, limit in limits.items())


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ",", "4bit,", "4", "bit", "four bit", "-4bit", "4 bit", "120", "120kb", "120 kB", "%", "1e3kB", "bops=",
        "bops=2g", "latency=3", "loss=1%", "drop=1", "size=3MB", "4bit;3MB", "4bit bops=2G", "nan%", "inf kB", "٤bit",
    ],
)  # fmt: skip
def test_rejects_malformed_budget_listing_the_forms(text):
    with pytest.raises(InvalidSetting, match=r"Budget .* cannot be read\. (Did you mean \S+\? )?Write 4bit, 120kB, .*drop=1%"):
        Budget.parse(text)


@pytest.mark.parametrize(
    "text, why",
    [
        ("0bit", "'0bit' must be above zero"), ("0.0%", "must be above zero"), ("4bit,drop=0%", "'drop=0%' must be above zero"),
        ("4bit,3bit", "limits one quantity twice"), ("1kB,2MB", "limits one quantity twice"), ("loss=1,drop=1%", "both loss= and drop="),
    ],
)  # fmt: skip
def test_rejects_contradictory_budget_with_a_reason(text, why):
    with pytest.raises(InvalidSetting, match=why):
        Budget.parse(text)


pieces = st.sampled_from(["4bit", "120kB", "12.5%", "bops=2.1G", "latency=3ms", "loss=0.02", "drop=1%", "0%", "x", " ", ""])


@few
@given(st.lists(pieces, min_size=1, max_size=4).map(",".join) | st.text(max_size=10))
def test_any_text_is_a_budget_that_round_trips_or_is_rejected(text):
    try:
        budget = Budget.parse(text)
    except InvalidSetting:
        return
    assert Budget.parse(str(budget)) == budget == Budget.parse(budget)
    assert all(condition.limit > 0 for condition in budget.conditions)


def test_unlimited_quantity_has_no_limit():
    assert Budget.parse("4bit").limit("bops") is None


@pytest.mark.parametrize("text, size", [("500MB", 500_000_000), ("2GiB", 2**31), ("1.5KiB", 1536), ("7B", 7)])
def test_sizes_are_read_in_thousands_or_in_powers_of_two(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "500", "GiB", "2 GiB", "-1MB", "2gib"])
def test_rejects_malformed_size(text):
    with pytest.raises(InvalidSetting, match=r"cannot be read\. Write 500MB or 2GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "limit"), [("bops=8444.8M", 8_444_800_000), ("bops=2.1G", 2_100_000_000), ("0.3MB", 300_000), ("latency=0.3339ms", 0.0003339)]
)
def test_budget_text_is_exact_to_the_last_digit(text, limit):
    assert Budget.parse(text).conditions[0].limit == limit
