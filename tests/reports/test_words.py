"""Numbers as text keep their value."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit.reports.words import human_bytes, human_count

few = settings(max_examples=200, deadline=None)
FACTORS = {"": 1, "B": 1, "k": 1e3, "kB": 1e3, "M": 1e6, "MB": 1e6, "G": 1e9, "GB": 1e9, "T": 1e12}


def read(text):
    """Parse "1.31 G" to (number, unit), or fail."""
    number, unit = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?B?)", text).groups()
    return float(number), unit


@few
@given(st.integers(0, 10**12))
def test_bytes_as_text_are_exact_to_a_tenth_of_the_unit(count):
    number, unit = read(human_bytes(count))
    assert number * FACTORS[unit] == pytest.approx(count, abs=0.0501 * FACTORS[unit])
    assert number < 1000 or unit == "GB"


@few
@given(st.integers(0, 10**14))
def test_counts_as_text_are_exact_to_three_digits(count):
    number, unit = read(human_count(count))
    assert number * FACTORS[unit] == pytest.approx(count, rel=0.00501)
    assert number < 1000 or unit == "T"


@pytest.mark.parametrize("function", [human_bytes, human_count])
def test_number_just_below_a_unit_is_rounded_up_to_it(function):
    for exponent in (3, 6, 9):
        number, unit = read(function(10**exponent - 10 ** (exponent - 3) // 10 if exponent > 3 else 999))
        assert number * FACTORS[unit] == pytest.approx(10**exponent, rel=0.0011)
        assert number < 1000


@pytest.mark.parametrize(
    "count, in_bytes, in_count",
    [(0, "0 B", "0"), (999, "999 B", "999"), (1000, "1.0 kB", "1 k"), (9_640, "9.6 kB", "9.64 k"), (1_310_000_000, "1.3 GB", "1.31 G")],
)
def test_numbers_as_text(count, in_bytes, in_count):
    assert (human_bytes(count), human_count(count)) == (in_bytes, in_count)
