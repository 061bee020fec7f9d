"""Properties of every export format: it is recognized by its path, and rejects the options of others."""

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
def test_functions_accept_the_arguments_of_the_command_line(one):
    export, verify = functions(one)
    assert {"model", "overwrite", *one.options.values()} <= inspect.signature(export).parameters.keys()
    assert {"model", "data", "samples", "metric", "workers"} <= inspect.signature(verify).parameters.keys()
    for name in (one.table, one.verdict):
        assert len(inspect.signature(getattr(terminal, name)).parameters) == 2


@ALL
def test_path_matches_exactly_one_format(one, tmp_path):
    path = tmp_path / PATHS[one.target]
    path.write_bytes(b"x") if one.target == "FILE" else path.mkdir()
    assert format_of(path) is one and [other.name for other in FORMATS if other.accepts(path)] == [one.name]


@ALL
def test_target_selects_the_format_with_its_options(one):
    options = {name: name in one.options for other in FORMATS for name in other.options}
    targets = {other.name: Path("x") if other is one else None for other in FORMATS}
    assert chosen_format(targets, options) == (one, Path("x"))
    with pytest.raises(InvalidSetting, match=f"--{one.name} {one.target}"):
        chosen_format(dict.fromkeys(targets), options)
    with pytest.raises(InvalidSetting, match="Name what to write"):
        chosen_format(dict.fromkeys(targets, Path("x")), options)


@ALL
def test_rejects_option_of_another_format_by_name(one):
    targets = {other.name: Path("x") if other is one else None for other in FORMATS}
    for other in FORMATS:
        for name in other.options if other is not one else ():
            with pytest.raises(InvalidSetting, match=f"--{name}.* to --{other.name}"):
                chosen_format(targets, {name: True})
