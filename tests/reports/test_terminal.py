"""Numbers in words keep their value; the clock adds up; tables show every cell."""

import json
import re
import subprocess
import sys
import textwrap
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anybit.environment import StageClock, environment, peak_memory
from anybit.errors import printable
from anybit.reports.terminal import print_explanation, print_inspection, print_table, result_line
from anybit.reports.words import human_bytes, human_count

few = settings(max_examples=200, deadline=None)
FACTORS = {"": 1, "B": 1, "k": 1e3, "kB": 1e3, "M": 1e6, "MB": 1e6, "G": 1e9, "GB": 1e9, "T": 1e12}


def read(text):
    """(number, unit) of "1.31 G", or fail."""
    number, unit = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?B?)", text).groups()
    return float(number), unit


@few
@given(st.integers(0, 10**12))
def test_bytes_in_words_are_the_bytes_to_a_tenth_of_the_unit(count):
    number, unit = read(human_bytes(count))
    assert number * FACTORS[unit] == pytest.approx(count, abs=0.0501 * FACTORS[unit])
    assert number < 1000 or unit == "GB"


@few
@given(st.integers(0, 10**14))
def test_counts_in_words_are_the_counts_to_three_digits(count):
    number, unit = read(human_count(count))
    assert number * FACTORS[unit] == pytest.approx(count, rel=0.00501)
    assert number < 1000 or unit == "T"


@pytest.mark.parametrize("function", [human_bytes, human_count])
def test_a_number_just_below_a_unit_is_written_in_the_unit(function):
    for exponent in (3, 6, 9):
        number, unit = read(function(10**exponent - 10 ** (exponent - 3) // 10 if exponent > 3 else 999))
        assert number * FACTORS[unit] == pytest.approx(10**exponent, rel=0.0011)
        assert number < 1000


@pytest.mark.parametrize(
    "count, in_bytes, in_count",
    [(0, "0 B", "0"), (999, "999 B", "999"), (1000, "1.0 kB", "1 k"), (9_640, "9.6 kB", "9.64 k"), (1_310_000_000, "1.3 GB", "1.31 G")],
)
def test_numbers_in_words_by_hand(count, in_bytes, in_count):
    assert (human_bytes(count), human_count(count)) == (in_bytes, in_count)


def test_the_clock_keeps_the_stages_in_order():
    clock = StageClock()
    for name in ("one", "two", "one"):
        with clock.stage(name):
            time.sleep(0.002)
    assert [stage["stage"] for stage in clock.stages] == ["one", "two", "one"]
    assert all(stage["seconds"] >= 0.002 for stage in clock.stages)


def test_a_stage_sees_the_memory_that_it_takes():
    # A process of its own: where the high-water mark cannot be reset, what ran before in this one would hide the block.
    script = """
        from anybit.environment import StageClock
        clock = StageClock()
        with clock.stage("small"):
            pass
        with clock.stage("large"):
            block = bytearray(256 * 2**20)
        print(clock.stages[1]["peak_bytes"] - clock.stages[0]["peak_bytes"])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert 128 * 2**20 < int(done.stdout) < 512 * 2**20
    assert peak_memory() > 0


def test_the_environment_is_json_with_versions_and_machine():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"] and found["machine"]["threads"] >= 1


def test_a_table_shows_every_cell(capsys):
    print_table("Title", ["name", "value"], ([name, value] for name, value in [("a", 0.123456), ("b", None), ("c", "text")]))
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("Title", "name", "value", "a", "0.1235", "b", "c", "text"))
    assert "None" not in shown


STEERING = "a\x1b[31m\x9b2J\u202e\n\ud800"


def test_names_are_shown_as_they_are_and_steer_no_terminal(capsys):
    """Names come from strangers' files too: rich's own markup in them is text, and control characters are escaped."""
    for name in ("a[/b]", "[bold]c", STEERING):
        print_table(name, [name], [[name]])
        print_explanation({"layer": name, "why": [name]})
    shown = capsys.readouterr().out
    assert all(shown.count(name) == 4 for name in ("a[/b]", "[bold]c", r"a\x1b[31m\x9b2J\u202e\n\ud800"))
    assert all(line.isprintable() for line in shown.split("\n"))


@given(st.text(st.characters()))
def test_printable_text_is_left_alone_and_other_text_becomes_it(text):
    assert printable(text).isprintable() and (not text.isprintable() or printable(text) == text)


def test_a_table_without_rows_shows_its_columns(capsys):
    print_table("Title", ["name", "value"], [])
    assert "name" in capsys.readouterr().out


def test_the_result_line_tells_accuracy_only_where_it_was_tested():
    report = {"result": {"bytes": 9_600, "percent": 12.5, "weight_bits": 4.0}}
    line = "9.6 kB (12.5 % of float32), 4.00 bits a weight"
    assert result_line(report) == line
    tested = {**report, "test": {"top1": 91.5}, "float_test": {"top1": 92.25}}
    assert result_line(tested) == line + "; test top-1 91.50 (float 92.25)"


def test_an_inspection_cuts_no_name(capsys):
    name = "_blocks.12._depthwise_conv"
    layer = {"class": "Conv2dStaticSamePadding", "weight": [1152, 1, 5, 5], "input": [1152, 112, 112], "output": [1152, 112, 112]}
    layer |= {"macs": 361_267_200, "folds": "_blocks.12._bn1", "block": "_blocks.12", "bytes": dict.fromkeys((2, 3, 4, 6, 8), 1_234_567)}
    whole = {"bytes": 10**6, "percent": 12.5, "bops": 10**9}
    print_inspection({"layers": {name: layer}, "uncovered": {}, "float_bytes": 10**7, "uniform": dict.fromkeys(layer["bytes"], whole)})
    shown = capsys.readouterr().out
    assert shown.count(name) == 2
    assert all(text in shown for text in (layer["class"], "1152x1x5x5", "1152x112x112", layer["folds"], "361 M", "1.2 MB"))
