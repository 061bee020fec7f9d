"""The options of a verb: read from its signature, made into typer's, and their values from the command line and --config."""

import dataclasses
import inspect
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from anybit.errors import InvalidSetting
from anybit.roads.settings import CalibrateSettings
from anybit.settings import NAMES, Option, Settings, Text, check_known, described, options_of, without_none


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
        values = self._configured(written["config"]) if written.get("config") else {}
        for name, text in written.items():
            if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE":
                values[name] = self.options[name].from_text(text, flag_of(self.options[name]))
        return values

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The function's arguments. Raises InvalidSetting where an option is missing or cannot be."""
        for name, one in self.options.items():
            if one.default is MISSING and name not in given:
                raise InvalidSetting(f"{flag_of(one)} is missing. `anybit {self.function.__name__} --help` lists the options.")
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
        return one.checked(given[name], flag_of(one) if name in SHARED else name) if name in given else one.default

    def _configured(self, path: Path) -> dict[str, Any]:
        """name -> value, of the options in a file. Raises InvalidSetting that says the file and the key."""
        known = {written: name for name, one in self.options.items() for written in (name, flag_of(one).strip("-").replace("-", "_"))}
        flat: dict[str, Any] = {}
        for key, value in _items(_read(path, [*self.groups.values()]), self.groups.values()):
            name = key.replace("-", "_")
            check_known([name], known, f"--config {path}: ")
            if known[name] in flat and flat[known[name]] != value:
                raise InvalidSetting(f"--config {path}: {key} is given twice, as {flat[known[name]]!r} and {value!r}. Leave one of them.")
            flat[known[name]] = value
        return {name: self._from_file(self.options[name], value, f"--config {path}: {name}") for name, value in flat.items()}

    @staticmethod
    def _from_file(one: Option, value: Any, name: str) -> Any:
        if one.text is not None and isinstance(value, str):
            value = one.from_text([value] if one.repeat else value, name)
        elif one.text is not None and one.repeat and isinstance(value, list):
            value = one.text.parse(value)
        return one.checked(value, name)


def _read(path: Path, kinds: list[type[Settings]]) -> Mapping[str, Any]:
    """What a file gives of options: its content, or where it is a run's report, the settings in it."""
    from anybit.files.strict import parse_json, read_bytes

    if path.suffix == ".toml":
        try:
            return tomllib.loads(read_bytes(path).decode("utf8"))
        except ValueError as error:
            raise InvalidSetting(f"--config {path} is not valid TOML: {error}.") from error
    data = parse_json(read_bytes(path), str(path))
    if isinstance(data, dict) and "version" in data and kinds:
        data = kinds[0].recorded(data)
    if not isinstance(data, dict):
        raise InvalidSetting(f"--config {path} holds no settings. Name a file of option: value, or the report.json of a run.")
    return data


def _items(data: Mapping[str, Any], kinds: Any) -> list[tuple[str, Any]]:
    """The items of a mapping, those within `csq`, `train` and the like among them."""
    inner = {
        one.name for kind in kinds for one in dataclasses.fields(kind) if isinstance(one.type, type) and issubclass(one.type, Settings)
    }
    nested = [key for key, value in data.items() if key in inner and isinstance(value, dict)]
    return [
        *((key, value) for key, value in data.items() if key not in nested),
        *(item for key in nested for item in data[key].items()),
    ]


# To typer


def flag_of(one: Option) -> str:
    """What an option is called on the command line."""
    return one.name.upper() if one.positional else one.flag or f"--{one.name.replace('_', '-')}"


def as_parameter(one: Option) -> inspect.Parameter:
    """A parameter of a function that typer makes a command of."""
    flag, kind = flag_of(one), without_none(one.kind)
    if one.positional:
        return _parameter(one, kind, typer.Argument(help=one.doc))
    metavar = f"[{'|'.join(one.choices)}]" if one.choices else None
    if kind is bool and not one.switch:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    if one.text is not None:
        kind = list[str] if one.repeat else str
    return _parameter(one, kind, typer.Option(flag, help=one.doc, metavar=metavar))


def _parameter(one: Option, kind: Any, about: Any) -> inspect.Parameter:
    default = one.default_text
    required = one.positional and one.default is MISSING
    return inspect.Parameter(
        one.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else default,
        annotation=Annotated[kind | None if default is None and not required else kind, about],
    )
