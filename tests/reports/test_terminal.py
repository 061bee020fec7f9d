"""Tables show every cell, and no name controls the terminal."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from anybit.errors import printable
from anybit.reports.outcomes import print_runs
from anybit.reports.terminal import print_explanation, print_inspection, print_table, result_line


def test_a_table_shows_every_cell(capsys):
    print_table("Title", ["name", "value"], ([name, value] for name, value in [("a", 0.123456), ("b", None), ("c", "text")]))
    shown = capsys.readouterr().out
    assert all(piece in shown for piece in ("Title", "name", "value", "a", "0.1235", "b", "c", "text"))
    assert "None" not in shown


STEERING = "a\x1b[31m\x9b2J\u202e\n\ud800"


def test_names_are_shown_verbatim_without_terminal_control(capsys):
    """Names may come from foreign files: rich's markup in them is text, and control characters are escaped."""
    for name in ("a[/b]", "[bold]c", STEERING):
        print_table(name, [name], [[name]])
        print_explanation({"layer": name, "why": [name]})
    shown = capsys.readouterr().out
    assert all(shown.count(name) == 4 for name in ("a[/b]", "[bold]c", r"a\x1b[31m\x9b2J\u202e\n\ud800"))
    assert all(line.isprintable() for line in shown.split("\n"))


@given(st.text(st.characters()))
def test_printable_text_is_unchanged_and_other_text_becomes_printable(text):
    assert printable(text).isprintable() and (not text.isprintable() or printable(text) == text)


def test_a_table_without_rows_shows_its_columns(capsys):
    print_table("Title", ["name", "value"], [])
    assert "name" in capsys.readouterr().out


def test_result_line_shows_accuracy_only_if_tested():
    report = {"result": {"bytes": 9_600, "percent": 12.5, "weight_bits": 4.0}}
    line = "9.6 kB (12.5 % of float32), 4.00 bits per weight"
    assert result_line(report) == line
    tested = {**report, "test": {"top1": 91.5}, "float_test": {"top1": 92.25}}
    assert result_line(tested) == line + "; test top-1 91.50 (float 92.25)"
    held_out = {**report, "ladder": [{"kept": True, "top1": 90.5}, {"kept": False, "top1": 1.0}], "float_held_out": {"top1": 91.0}}
    assert result_line(held_out) == line + "; held-out top-1 90.50 (float 91.00)"


def test_inspection_truncates_no_name(capsys):
    name = "_blocks.12._depthwise_conv"
    layer = {"class": "Conv2dStaticSamePadding", "weight": [1152, 1, 5, 5], "input": [1152, 112, 112], "output": [1152, 112, 112]}
    layer |= {"macs": 361_267_200, "folds": "_blocks.12._bn1", "block": "_blocks.12", "bytes": dict.fromkeys((2, 3, 4, 6, 8), 1_234_567)}
    whole = {"bytes": 10**6, "percent": 12.5, "bops": 10**9}
    others = {
        "uncovered": {},
        "unfolded": {},
        "unread": [],
        "float_bytes": 10**7,
        "export": {"ok": True, "integer_layers": [name], "float_layers": [], "text_length": None},
    }
    print_inspection({"layers": {name: layer}, "uniform": dict.fromkeys(layer["bytes"], whole), **others})
    shown = capsys.readouterr().out
    assert shown.count(name) == 2 and "every layer on integers" in shown
    assert all(text in shown for text in (layer["class"], "1152x1x5x5", "1152x112x112", layer["folds"], "361 M", "1.2 MB"))


def test_names_of_folders_cannot_control_the_terminal(calibrated, capsys):
    print_runs({Path("a\x1b[31m\u202eb\nc"): calibrated[2].report})
    out, err = capsys.readouterr()
    assert "\\x1b[31m\\u202eb\\nc" in out and not set(out + err) & set("\x1b\u202e")
