"""The options of a verb: read from its signature, made into typer's, and their values from the command line and --config."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from anybit.errors import InvalidSetting
from anybit.roads.settings import CalibrateSettings
from anybit.settings import NAMES, Option, Settings, Text, described, options_of, without_none


def load_metric(reference: str) -> Any:
    """The function that `--metric` names."""
    from anybit.sources.callables import load_callable

    return load_callable(reference, "--metric")


SHARED = {
    one.name: one
    for one in (
        Option("output", Path, None, "The run folder to write."),
        Option(
            "model", str | None, None,
            "The network: package.module:function, FILE.py:function, hf:FOLDER or NAME, timm:NAME, torchvision:NAME.",
        ),
        Option("weights", str | None, None, "State dict to load into it (.safetensors, .pt, .pth)."),
        Option(
            "data", str | None, None,
            "Inputs: a folder of images, FILE.npz, FILE.npz#test, texts (.tsv, .csv, .jsonl, .txt), FILE.py:function.",
        ),
        Option("train", str | None, None, "Labelled training data, named as for --data elsewhere."),
        Option("test", str | None, None, "Labelled data for the report; nothing is chosen on it."),
        Option(
            "budget", tuple[str, ...] | None, None,
            "4bit, 120kB, 12.5%, bops=2.1G, latency=3ms, loss=0.02, drop=1%; join with commas, or repeat.",
            text=NAMES, repeat=True,
        ),
        Option("cache", bool, True, "Keep results of stages and take them up again, from the user's cache directory."),
        Option("workers", int, 0, "Processes that load data; changes speed alone.", least=0),
        Option("threads", int | None, None, "Processor threads (default: PyTorch's choice).", least=1),
        Option(
            "metric", Any, None, "FILE.py:function of (outputs, labels), higher is better: reported, and what drop= counts.",
            text=Text(load_metric),
        ),
        Option("device", str, "cpu", "Where to compute: cpu, cuda, cuda:1, ..."),
        Option("overwrite", bool, False, "Replace a finished run.", switch=True),
        Option("as_json", bool, False, "Print one JSON object instead of tables.", flag="--json", switch=True),
        Option("quiet", bool, False, "Print the result alone.", switch=True),
        Option("verbose", bool, False, "Print each event as it happens, in a line on stderr.", switch=True),
        Option("log", Path | None, None, "Append each event to this file as it happens, one JSON object a line."),
        Option(
            "config", Path | None, None,
            "Options from a .toml or .json file, or the settings of a run's report.json; the command line wins over them.",
        ),
    )
}  # fmt: skip
"""Options that several verbs have."""
COMMON = options_of(CalibrateSettings) | SHARED
"""Options that a verb may have by their name alone."""


@dataclass(frozen=True)
class Verb:
    """A function that the command line calls: its options, flat, and the settings classes among its parameters."""

    function: Callable[..., Any]
    options: dict[str, Option]
    groups: dict[str, type[Settings]]

    @classmethod
    def of(cls, function: Callable[..., Any], *more: str) -> "Verb":
        """From its signature: a parameter is an option described there, a class of settings, or one of COMMON; `more` of these join."""
        options: dict[str, Option] = {}
        groups: dict[str, type[Settings]] = {}
        for name, parameter in inspect.signature(function).parameters.items():
            if isinstance(parameter.default, dataclasses.Field):
                options[name] = described(name, parameter.annotation, parameter.default)
            elif isinstance(parameter.annotation, type) and issubclass(parameter.annotation, Settings):
                groups[name] = parameter.annotation
                options |= options_of(parameter.annotation)
            else:
                default = MISSING if parameter.default is parameter.empty else parameter.default
                options[name] = dataclasses.replace(COMMON[name], default=default)
        return cls(function, options | {name: COMMON[name] for name in more if name not in options}, groups)

    def parameters(self) -> list[inspect.Parameter]:
        """As typer takes them."""
        return [as_parameter(one) for one in self.options.values() if one.command_line]

    def given(self, context: typer.Context, written: Mapping[str, Any]) -> dict[str, Any]:
        """name -> value, of each option that stands on the command line or else in the file of --config."""
        values = {}
        if written.get("config"):
            from anybit.files.config import read_options

            values = read_options(written["config"], self.options, list(self.groups.values()), "--config")
        for name, text in written.items():
            if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE":
                values[name] = self.options[name].from_text(text, self.options[name].written)
        return values

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The function's arguments. Raises InvalidSetting where an option is missing or cannot be."""
        for name, one in self.options.items():
            if one.default is MISSING and name not in given:
                raise InvalidSetting(f"{one.written} is missing. `anybit {self.function.__name__} --help` lists the options.")
        arguments: dict[str, Any] = {}
        for name in inspect.signature(self.function).parameters:
            if name in self.groups:
                known = options_of(self.groups[name])
                arguments[name] = self.groups[name].of(**{key: value for key, value in given.items() if key in known})
            else:
                arguments[name] = self.value(name, given)
        return arguments

    def value(self, name: str, given: Mapping[str, Any]) -> Any:
        """An option's value."""
        one = self.options[name]
        return one.checked(given[name], one.written if name in SHARED else name) if name in given else one.default


def as_parameter(one: Option) -> inspect.Parameter:
    """A parameter of a function that typer makes a command of."""
    kind, default, flag = without_none(one.kind), one.default_text, one.written
    if one.text is not None:
        kind = list[str] if one.repeat else str
    elif kind is bool and not one.switch:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    metavar = f"[{'|'.join(one.choices)}]" if one.choices else None
    about = typer.Argument(help=one.doc) if one.positional else typer.Option(flag, help=one.doc, metavar=metavar)
    if one.positional and one.default is MISSING:
        default = inspect.Parameter.empty
    annotation = Annotated[kind | None if default is None else kind, about]  # type: ignore[valid-type]
    return inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
