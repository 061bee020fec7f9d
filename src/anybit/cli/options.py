"""Options of a verb: read from its signature, passed to typer, with values from the command line and --config."""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from anybit.calls import check_takes_two
from anybit.errors import InvalidSetting, naming
from anybit.roads.settings import CalibrateSettings
from anybit.runs.options import RunOptions
from anybit.settings import Option, Settings, described, option, options_of, without_none
from anybit.sources.references import check_there


@dataclass(frozen=True)
class Telling(Settings):
    """Options of long-running verbs: output, and a file of further options."""

    common: ClassVar[Mapping[str, Any]] = {"panel": "Output", "rare": True}

    config: Path | None = option(
        None, "Options from a .toml or .json file, or a run's report.json.",
        panel="Runtime", rare=False,
    )  # fmt: skip
    log: Path | None = option(None, "Append each event to this file as it happens, one JSON object per line.")
    verbose: bool = option(False, "Print each event on stderr as it happens.", switch=True)
    quiet: bool = option(False, "Print only the result.", switch=True, rare=False)
    as_json: bool = option(False, "Print one JSON object instead of tables.", flag="--json", switch=True, rare=False)


SHARED = options_of(RunOptions, Telling)
"""Options shared by several verbs."""
COMMON = options_of(CalibrateSettings) | SHARED
"""Options that a verb takes by naming a parameter after them."""


def load_metric(reference: str | None) -> Any:
    """Import the function that --metric names. Raises InvalidSetting if it does not take (outputs, labels)."""
    from anybit.sources.callables import load_callable

    metric = None if reference is None else load_callable(reference, "--metric")
    check_takes_two(metric)
    return metric


@dataclass(frozen=True)
class Verb:
    """A function that the command line calls, with its options and the settings classes among its parameters."""

    function: Callable[..., Any]
    options: dict[str, Option]
    groups: dict[str, type[Settings]]

    @classmethod
    def of(cls, function: Callable[..., Any], *more: str) -> "Verb":
        """Read the options from a signature, whose parameters describe options, are settings classes or name some of COMMON; add `more`."""
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

    def read(self, context: typer.Context, written: Mapping[str, Any]) -> dict[str, Any]:
        """Return name -> value of the options given on the command line or, failing that, in the file of --config."""
        values = {}
        if written.get("config") is not None:
            from anybit.files.config import read_options

            file = self.value("config", written)
            with naming("--config="):
                check_there(file)
            values = read_options(file, self.options, list(self.groups.values()), "--config")
        on_line = {
            name: self.options[name].from_text(text, self.options[name].written)
            for name, text in written.items()
            if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
        }
        replaced = {"budget", "scheme"} if on_line.keys() & {"budget", "scheme"} else set()  # each stands for the other
        return {name: value for name, value in values.items() if name not in replaced} | on_line

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the function's arguments. Raises InvalidSetting if an option is missing or invalid."""
        for name in values:
            self.value(name, values)
        for name, one in self.options.items():
            if one.default is MISSING and name not in values:
                raise InvalidSetting(f"{one.written} is missing. `anybit {self.function.__name__} --help` lists the options.")
        named = [name for name in inspect.signature(self.function).parameters if name not in self.groups]
        known = {name: {key: values[key] for key in options_of(kind) if key in values} for name, kind in self.groups.items()}
        groups = {name: kind.of(**known[name]) for name, kind in self.groups.items()}
        arguments = {name: self.value(name, values) for name in named} | groups
        for name, one in self.options.items():
            one.check_ready(arguments.get(name))
        return arguments

    def value(self, name: str, values: Mapping[str, Any]) -> Any:
        """Return an option's checked value, or its default."""
        one = self.options[name]
        return one.checked(values[name], one.written) if name in values else one.default


def _completion(choices: Collection[str]) -> Callable[[str], list[str]]:
    """Return a shell completion over `choices`."""

    def starting(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return starting


def as_parameter(one: Option) -> inspect.Parameter:
    """Return the option as a parameter of a typer command."""
    kind, default, flag = without_none(one.kind), one.default_text, one.written
    if one.text is not None:
        kind = list[str] if one.repeat else str
    elif one.is_number:  # read by the option, whose errors name the range
        kind = str
    elif kind is bool and not one.switch:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    common: dict[str, Any] = {"help": one.doc, "hidden": one.rare}
    if kind is Path:
        common["path_type"] = str  # which tells an empty text from the working folder
    if one.choices:
        common["autocompletion"] = _completion(one.choices)
    info = typer.Argument(**common) if one.positional else typer.Option(flag, metavar=one.metavar, rich_help_panel=one.panel, **common)
    if one.positional and one.default is MISSING:
        default = inspect.Parameter.empty
    annotation = Annotated[kind | None if default is None else kind, info]  # type: ignore[valid-type]
    return inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
