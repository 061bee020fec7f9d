"""Every export format keeps the same promises: it is told from its path, and refuses what is another's."""

import importlib
import inspect
from pathlib import Path

import pytest

from anybit.errors import InvalidSetting
from anybit.exports.formats import FORMATS, chosen_format, format_of
from anybit.reports import terminal

ALL = pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.name)
PATHS = {"FILE": "net.onnx", "FOLDER": "net"}


def functions(one):
    for place in (one.export, one.verify):
        module, name = place.split(":")
        yield getattr(importlib.import_module(module), name)


@ALL
def test_its_functions_take_what_the_command_line_gives(one):
    export, verify = functions(one)
    assert {"model", "overwrite", *one.options.values()} <= inspect.signature(export).parameters.keys()
    assert {"model", "data", "samples", "metric", "workers"} <= inspect.signature(verify).parameters.keys()
    for name in (one.table, one.verdict):
        assert len(inspect.signature(getattr(terminal, name)).parameters) == 2


@ALL
def test_a_path_is_of_one_format_alone(one, tmp_path):
    path = tmp_path / PATHS[one.target]
    path.write_bytes(b"x") if one.target == "FILE" else path.mkdir()
    assert format_of(path) is one and [other.name for other in FORMATS if other.accepts(path)] == [one.name]


@ALL
def test_its_target_alone_chooses_it_with_its_own_options(one):
    options = {name: name in one.options for other in FORMATS for name in other.options}
    targets = {other.name: Path("x") if other is one else None for other in FORMATS}
    assert chosen_format(targets, options) == (one, Path("x"))
    with pytest.raises(InvalidSetting, match=f"--{one.name} {one.target}"):
        chosen_format(dict.fromkeys(targets), options)
    with pytest.raises(InvalidSetting, match="Name what to write"):
        chosen_format(dict.fromkeys(targets, Path("x")), options)


@ALL
def test_an_option_of_another_format_is_refused_by_name(one):
    targets = {other.name: Path("x") if other is one else None for other in FORMATS}
    for other in FORMATS:
        for name in other.options if other is not one else ():
            with pytest.raises(InvalidSetting, match=f"--{name}.* to --{other.name}"):
                chosen_format(targets, {name: True})
