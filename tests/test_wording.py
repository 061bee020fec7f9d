"""From Python, messages name keywords; on the command line, flags."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest
from commands import anybit_cli
from networks import Chain, images, make

import anybit
from anybit.errors import AnybitError, InvalidInput, InvalidSetting
from anybit.sources.preprocessing import Preprocessing
from anybit.wording import PREPROCESSING, SWITCHES, in_python

ROOT = Path(anybit.__file__).parent
FLAG = re.compile(r"(?<![\w-])--(?!force-reinstall|index-url)[a-z]")  # both are pip's
ONLY_THERE = {"log", "json", "compressed_tensors", "folder"}
"""Options of the command line alone, and what `save` takes."""


def keywords():
    """Map each keyword of the public functions to its default."""
    functions = [one for name in anybit.__all__ if inspect.isfunction(one := getattr(anybit, name))]
    return {name: one.default for function in functions for name, one in inspect.signature(function).parameters.items()}


def texts():
    """All strings in the code except docstrings, with X for interpolated values."""
    for path in sorted(ROOT.rglob("*.py")):
        if "cli" in path.parts or path.name == "wording.py":
            continue
        tree = ast.parse(path.read_text())
        skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        skipped |= {
            id(piece) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for piece in ast.walk(node) if piece is not node
        }
        for node in ast.walk(tree):
            if id(node) in skipped:
                continue
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(piece.value) if isinstance(piece, ast.Constant) else "X" for piece in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                continue
            if FLAG.search(text):
                yield f"{path.name}:{node.lineno}", text


TEXTS = dict(texts())


def test_every_message_that_names_an_option_names_a_keyword_in_python():
    known = keywords()
    assert len(TEXTS) > 100
    for where, text in TEXTS.items():
        written = in_python(text)
        assert not FLAG.search(written), (where, written)
        for name in set(re.findall(r"(?<![\w.])([a-z_]{3,})=", written)) - set(re.findall(r"([a-z_]+)=", text)) - ONLY_THERE:
            assert name in known or name in PREPROCESSING, (where, name, written)


def test_no_message_has_a_space_between_an_option_and_its_value():
    spaced = re.compile(r"--(?!force-reinstall)[a-z-]+ (X|'|[\w.,:=]*[/:=%\d]|[A-Z]|random|light)")
    assert [(where, text) for where, text in TEXTS.items() if spaced.search(text)] == []


def test_mapped_names_exist():
    known = keywords()
    assert set(PREPROCESSING) == {one.name for one in dataclasses.fields(Preprocessing)}
    assert all(known[name] is False for name in SWITCHES if name != "pack_embeddings")


@pytest.mark.parametrize(
    ("message", "written"),
    [
        ("Keep it: --keep='a.b=float'.", "Keep it: keep={'a.b': 'float'}."),
        ("Choose another --output, or give --overwrite.", "Choose another folder=, or give overwrite=True."),
        ("not --no-bias-tuning", "not bias_tuning=False"),
        ("Give at least --memory=12MB, or less.", "Give at least memory=12000000, or less."),
        ("--device=cuda:7 is no device", "device='cuda:7' is no device"),
        ("Use --pipeline=light.", "Use pipeline='light'."),
        ("Leave --weights out", "Leave weights= out"),
        ("Give a larger --resize.", "Give a larger Preprocessing(resize=)."),
        ("Extract a subnet: `anybit extract runs/s --budget=3bit`.", "Extract a subnet: `anybit.extract('runs/s', budget='3bit')`."),
        ("Measure again: `anybit profile --overwrite`.", "Measure again: `anybit.profile(overwrite=True)`."),
        ("`anybit allocate runs/a --budget=4bit --output=RUN2`, and", "`anybit.allocate('runs/a', budget='4bit').save('RUN2')`, and"),
        ("(not with --task=multi-label): --workers=0, --distill=1.", "(not with task='multi-label'): workers=0, distill=1."),
        ("--data='my file.npz' holds, --model=net.py:f: there", "data='my file.npz' holds, model='net.py:f': there"),
        ("`anybit explain SEARCH a.b` shows", "`anybit.explain('SEARCH', 'a.b')` shows"),
        ("a -- b --", "a -- b --"),
        ("run `pip install --force-reinstall torch`", "run `pip install --force-reinstall torch`"),
    ],
)
def test_flags_become_keywords(message, written):
    assert in_python(message) == written


def test_errors_name_keywords_in_python_and_flags_on_the_command_line(tmp_path):
    calls = [
        lambda: anybit.calibrate(make(Chain), images(4), "4bit", test=images(4)),
        lambda: anybit.calibrate(make(Chain), images(4), "4bit", device="cpus"),
        lambda: anybit.calibrate(make(Chain), images(4), "4bit", keep={"nothing": "W8A8"}),
        lambda: anybit.calibrate("nowhere.py:net", "nowhere.npz", "4bit"),
        lambda: anybit.Preprocessing(size=8, resize=4),
        lambda: anybit.extract("nowhere", "4bit", steps=3),
    ]
    for call in calls:
        with pytest.raises(AnybitError) as raised:
            call()
        assert not FLAG.search(str(raised.value)) and "=" in str(raised.value), raised.value
    with pytest.raises(InvalidInput, match="test=, or leave it out"):
        calls[0]()
    done = anybit_cli("calibrate", "--model", "m.py:n", "--data", "nowhere.npz", "--budget", "4bit", "--output", str(tmp_path / "run"))
    assert "--model" in done.stderr or "--data" in done.stderr


def test_error_for_saving_over_a_result_names_keywords(tmp_path):
    result = anybit.calibrate(make(Chain), images(8), "8bit", pipeline="light", cache=False, weight_bits=(8,), activation_bits=(8,))
    result.save(tmp_path / "run")
    with pytest.raises(InvalidSetting, match=r"another folder=, or give overwrite=True"):
        result.save(tmp_path / "run")


def test_polish_settings_are_keywords_of_extract():
    assert {"steps", "samples", "unit"} <= set(inspect.signature(anybit.extract).parameters)
    assert "settings" not in inspect.signature(anybit.extract).parameters
    with pytest.raises(InvalidSetting, match=r"extract has no 'stesp'.*steps="):
        anybit.extract("runs/s", "3bit", stesp=3)
    with pytest.raises(InvalidSetting, match=r"steps does not apply to an extraction without polish.*polish=True and data="):
        anybit.extract("runs/s", "3bit", steps=3)
