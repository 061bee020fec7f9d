"""Settings: frozen dataclasses whose fields describe themselves, the only place that describes an option.

    @documented
    @dataclass(frozen=True)
    class TrainSettings(Settings):
        epochs: int = option(10, "Passes over the training data.", least=1)

A field determines the check of its value, the option on the command line and its --help, the documentation of functions that take it, the
record in a run's report, and the reading of that record. Imports no torch, so that `anybit --help` is instant.
"""

import dataclasses
import difflib
import inspect
import math
import operator
import reprlib
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from decimal import Decimal
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

from anybit.errors import AnybitError, InvalidFile, InvalidSetting, naming
from anybit.wording import as_in_python, in_python

Value = TypeVar("Value")
INTEGERS = 2**63
"""Integers are below this in magnitude: JSON readers support no larger ones."""
LARGEST = 10**9
"""Default upper limit of a number: more inputs, steps or epochs than any machine processes, and a factor beyond which float32 loses the
rest."""
BOUNDS = (
    ("least", operator.ge, "at least"),
    ("above", operator.gt, "above"),
    ("most", operator.le, "at most"),
    ("below", operator.lt, "below"),
)
PANELS = ("Input", "Budget", "Method", "Runtime", "Output")
"""Panels of --help, in order."""
UNIONS = (typing.Union, types.UnionType)
SWITCHED = {**dict.fromkeys(("true", "yes", "on", "1"), True), **dict.fromkeys(("false", "no", "off", "0"), False)}
"""Texts and numbers that stand for true and false elsewhere."""
NOUNS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", Path: "a path"}


class Text(NamedTuple):
    """The text form of a value other than a number, word or switch; `parse` raises ValueError for an invalid text."""

    parse: Callable[[Any], Any]
    write: Callable[[Any], Any] = str
    example: str = ""


class Need(NamedTuple):
    """A condition without which options have no effect: `names` do nothing `without` it; `remedy` are the options that meet it.

    Options without effect are refused; of `amounts` of work, which many runs may share whether or not they do that work, a note is given.
    """

    names: tuple[str, ...]
    met: bool
    without: str
    remedy: str = ""
    amounts: bool = False


NUMBERS = Text(
    lambda text: tuple(float(part) for part in text.split(",")),
    lambda value: ",".join(map(str, value)),
    "numbers with commas: 0.485,0.456,0.406",
)
NAMES = Text(tuple, list)


@dataclass(frozen=True)
class Option:
    """One option.

    least, above, most, below  the range of a number, of each number in a list and of each value of a mapping
    why           reason given for a value outside of it
    text          how it is written on the command line
    flag          its name there, if different; `inverted` if the flag means the opposite
    switch        a flag without its --no-
    repeat        given once for each item
    positional    an argument
    command_line  False: only for Python and --config
    ready         raises if the value names something that does not exist: called before any work
    panel         of --help, one of PANELS; `rare`: shown only by --help-all
    """

    name: str
    kind: Any
    default: Any
    doc: str
    choices: Collection[str] = ()
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    why: str = ""
    text: Text | None = None
    flag: str = ""
    inverted: bool = False
    switch: bool = False
    repeat: bool = False
    positional: bool = False
    command_line: bool = True
    ready: Callable[[Any], Any] | None = None
    panel: str = "Method"
    rare: bool = False

    @property
    def written(self) -> str:
        """Return its name on the command line."""
        return self.name.upper() if self.positional else self.flag or f"--{self.name.replace('_', '-')}"

    @property
    def is_number(self) -> bool:
        """Return whether its value is one number."""
        return without_none(self.kind) in (int, float)

    @property
    def metavar(self) -> str:
        """Return its placeholder in --help: the choices, N for a number, else its name; nothing for a switch."""
        if self.choices or self.kind is bool or bool in typing.get_args(self.kind):
            return "|".join(self.choices)
        return "N" if self.text is None and _number(self.kind) else self.name.rpartition("_")[2].upper()

    @property
    def range(self) -> str:
        """Return the range of a number, in words."""
        if self.least is not None and self.most is not None and _number(self.kind) is int:
            return f"{self.least}..{self.most}"
        if self.least is not None and self.most is not None:
            return f"from {self.least:g} to {self.most:g}"
        return " and ".join(f"{words} {bound:g}" for name, _, words in BOUNDS if (bound := getattr(self, name)) is not None)

    @property
    def allowed(self) -> str:
        """Return the allowed values and the default, in brackets."""
        allowed = ", ".join(self.choices) or self.range
        default = "" if self.default_text in (None, "") else f"default: {self.default_text}"
        return f"({'; '.join(filter(None, (allowed, default)))})" if allowed or default else ""

    def checked(self, value: Any, name: str | None = None) -> Any:
        """Return `value` as this option's type. Raises InvalidSetting with the option (or `name`), the value and the allowed values."""
        try:
            return self._typed(self.kind, value)
        except AnybitError as error:
            raise InvalidSetting(f"{name or self.name}: {error}") from error
        except ValueError as error:
            raise InvalidSetting(f"{name or self.name} {error}{self._meant(value, name or self.name)}") from error

    def _meant(self, value: Any, name: str) -> str:
        """Return the valid value that a value of another type probably stands for, `name` as a flag or a keyword; "" if there is none."""
        for form in self._forms(value):
            try:
                self._typed(self.kind, form)
            except (AnybitError, ValueError):
                continue
            return f" Write {self._spelled(form, name)}."
        return ""

    def _spelled(self, value: Any, name: str) -> str:
        """Write the option with a value in the reader's terms: in Python, on the command line, or in a file of --config."""
        file, _, key = name.rpartition(": ")
        if file:
            return f'"{key}": {_in_file(value, ": ")}' if ".json" in file.lower() else f"{key} = {_in_file(value, ' = ')}"
        if not name.startswith("--"):
            return f"{self.name}={value!r}"
        texts = self.text.write(value) if self.text else value
        return " ".join(f"{name} {text}" for text in (texts if isinstance(texts, list) else [texts]))

    def _forms(self, value: Any) -> list[Any]:
        """List the values that a value of another type may stand for."""
        kind = typing.get_origin(without_none(self.kind))
        if kind is Mapping:
            items = value if isinstance(value, (Mapping, list, tuple)) else [value]
            of = typing.get_args(without_none(self.kind))[0]
            names = [one for one in items if isinstance(one, of) and (one in range(2, 9) if of is int else one)]  # numbers are bit-widths
            return [dict.fromkeys(names or ["*"], "W8A8"), dict.fromkeys(names or ([2] if of is int else ["0"]), 1.0)]
        if without_none(self.kind) is bool:
            return [SWITCHED[form] for form in [str(value).lower()] if form in SWITCHED]
        if (whole := _whole(value)) is not None:
            return [whole]
        if kind is tuple and isinstance(value, (int, str)) and not isinstance(value, bool):
            return [(value,)]
        if isinstance(value, str) and self.choices:
            return difflib.get_close_matches(value, list(self.choices), n=1)
        return []

    def given(self, value: Any) -> str:
        """Write the option with a value as on the command line; of a value that takes several words, only its name."""
        if without_none(self.kind) is bool:
            return self.written if value is not self.inverted else f"--no-{self.written.removeprefix('--')}"
        plain = isinstance(value, (int, float, str)) and not isinstance(value, bool)
        return f"{self.written}={value}" if plain else self.written

    def check_ready(self, value: Any) -> None:
        """Raise if the value names something that does not exist, naming the option as written on the command line."""
        if self.ready is not None and value is not None:
            with naming(f"{self.written} " if self.positional else f"{self.written}="):
                self.ready(value)

    def _typed(self, kind: Any, value: Any) -> Any:
        if _is_empty(value) and kind in (str, Path) and self.default != "":  # as a path it would be the working folder
            raise ValueError("is empty. Give a value, or leave it out.")
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if origin in UNIONS:
            return self._one_of(inner, value)
        if origin in (tuple, list) and (items := _items(value)) is not None:
            return tuple(self._typed(inner[0], one) for one in items)
        if origin is Mapping and isinstance(value, Mapping):
            return {self._key(inner[0], key): self._typed_of(key, inner[1], one) for key, one in value.items()}
        if kind in (bool, int, float):
            value = _scalar(value)
        if kind in (int, float):
            return self._in_range(kind, value)
        if kind is str and isinstance(value, str) and self.choices and value not in self.choices:
            raise ValueError(f"{_shown(value)} is unknown. Choose from {_listed(self.choices)}.")
        if kind is Any or (isinstance(kind, type) and origin is None and isinstance(value, kind)):
            return value
        if isinstance(value, str) and kind is Path:
            return Path(value)
        if isinstance(value, str) and hasattr(kind, "parse"):  # as in JSON
            return kind.parse(value)
        raise ValueError(self._refusal(kind, value))

    def _one_of(self, kinds: tuple[Any, ...], value: Any) -> Any:
        """Return the value as one of several types: text as the one that reads it, a value of any other of them unchanged."""
        if value is None and types.NoneType in kinds:
            return None
        others = [kind for kind in kinds if kind is not types.NoneType]
        is_text = isinstance(value, str) and Path not in others  # text beside a path is one
        reads = next((kind for kind in others if is_text and hasattr(kind, "parse")), None)
        if len(others) > 1 and reads is None and any(isinstance(value, kind) for kind in others if not _is_empty(value)):
            return value
        return self._typed(reads or others[0], value)

    def accepts(self, value: Any) -> bool:
        """Return whether the value is of this option's type."""
        try:
            self.checked(value)
        except AnybitError:
            return False
        return True

    def _typed_of(self, key: Any, kind: Any, value: Any) -> Any:
        """Return a value of a mapping as `kind`. Raises ValueError naming its key."""
        try:
            return self._typed(kind, value)
        except ValueError as error:
            raise ValueError(f"of {_shown(key)}: {error}") from error

    def _in_range(self, kind: Any, value: Any) -> Any:
        if not isinstance(value, Integral if kind is int else Real) or isinstance(value, bool):
            raise ValueError(self._refusal(kind, value))
        try:
            number = kind(value)
        except OverflowError:
            number = math.inf
        whole = -INTEGERS < number < INTEGERS if kind is int else math.isfinite(number)
        if whole and all(holds(number, bound) for name, holds, _ in BOUNDS if (bound := getattr(self, name)) is not None):
            return number
        raise ValueError(self._refusal(kind, value))

    def _key(self, kind: Any, key: Any) -> Any:
        if kind is int and isinstance(key, str) and key.isascii() and key.isdigit():  # JSON's keys are strings
            return int(key)
        if kind is str and isinstance(key, int) and not isinstance(key, bool):  # outputs by their numbers
            return str(key)
        if not isinstance(key, kind):
            raise ValueError(self._refusal(self.kind, key))
        return key

    def _refusal(self, kind: Any, value: Any) -> str:
        """Say why `value` is not of type `kind`: the option's, or that of an item of it."""
        outside = kind is int and ".." in self.range and isinstance(value, Integral) and not isinstance(value, bool)
        demand = f"is outside {self.range}" if outside else f"must be {_noun(kind)}{self.range and ', '}{self.range}"
        return f"{_shown(value)} {demand}{self.why and ': '}{self.why}."

    def from_text(self, text: Any, name: str) -> Any:
        """Return the value of a text from the command line; `name` is how the user wrote the option."""
        if self.text is None and self.is_number:
            return _number_in(text, without_none(self.kind))
        if self.text is None:
            return not text if self.inverted else text
        try:
            return self.text.parse(text)
        except AnybitError as error:
            if name in str(error):
                raise
            raise InvalidSetting(f"{name}: {error}") from error
        except ValueError as error:
            raise InvalidSetting(f"{name} {_shown(text)} cannot be read. Write {self.text.example}.") from error

    @property
    def default_text(self) -> Any:
        """Return its default as written on the command line."""
        if self.default is None or self.default is MISSING:
            return None
        if self.text:
            return self.text.write(self.default)
        if self.is_number:
            return str(self.default)
        return not self.default if self.inverted else self.default


def without_none(kind: Any) -> Any:
    """Return the type T of an optional type T | None."""
    if typing.get_origin(kind) not in UNIONS:
        return kind
    return next(one for one in typing.get_args(kind) if one is not types.NoneType)


def _noun(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in UNIONS:
        return _noun(without_none(kind))
    if origin in (tuple, Mapping):
        return f"{'a list' if origin is tuple else 'a mapping'}, each {_noun(inner[0 if origin is tuple else 1])}"
    return NOUNS.get(kind, f"a {kind.__name__.lower()}")


def _number(kind: Any) -> Any:
    """Return the type of the numbers in a type, if there are any."""
    inner = [_number(one) for one in reversed(typing.get_args(kind))]
    return next(filter(None, inner), None) if inner else kind if kind in (int, float) else None


def _in_file(value: Any, assign: str) -> str:
    """Write a value as in a file of --config: JSON if `assign` is a colon, else TOML."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f'"{key}"{assign}{_in_file(one, assign)}' for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_in_file(one, assign) for one in value)}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _number_in(text: Any, kind: Any) -> Any:
    """Return the number that a text from the command line spells; the text itself, which no option accepts, if it spells none."""
    try:
        number = kind(text)
    except ValueError:
        return text
    return number if -math.inf < number < math.inf else text


def _whole(value: Any) -> int | None:
    """Return the whole number that a value of another type equals, as 64.0 and "1e3" do; None if there is none."""
    try:
        number: Any = value if isinstance(value, Decimal) else float(value) if isinstance(value, (str, float)) else math.nan
        return int(number) if number == int(number) and abs(number) < INTEGERS else None
    except (ValueError, OverflowError):
        return None


def _is_empty(value: Any) -> bool:
    return isinstance(value, str) and not value


def _scalar(value: Any) -> Any:
    """Return the number in an array or tensor without dimensions, of integers or floats; other values unchanged."""
    try:
        return value.item() if getattr(value, "ndim", None) == 0 and not isinstance(value, Real) else value
    except (AttributeError, RuntimeError, NotImplementedError):  # a tensor without data
        return value


def _items(value: Any) -> list[Any] | None:
    """Return the items of a list, tuple, range or one-dimensional array, and those of a set in order; None for anything else."""
    if isinstance(value, (list, tuple, range)):
        return list(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=lambda one: (one is None, type(one).__name__, one if isinstance(one, (Real, str)) else 0))
    return value.tolist() if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist") else None


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 64:
        return f"(an integer of {value.bit_length()} bits)"
    return reprlib.repr(value)


def _listed(names: Collection[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


# Fields


def option(default: Value | Callable[[], Value], doc: str, **description: Any) -> Value:
    """Return a field of a dataclass, or a parameter of a command, described by `Option`'s fields. A default that is a class is called."""
    of_field: Any = {"default_factory" if isinstance(default, type) else "default": default}
    return typing.cast(Value, dataclasses.field(**of_field, metadata={"doc": doc, **description}))


def argument(doc: str, default: Any = ..., **description: Any) -> Any:
    """Return a positional parameter of a command, required if it has no default."""
    return option(default, doc, **{"positional": True, **description})


def same_as(kind: "type[Settings]", name: str, **changes: Any) -> Any:
    """Return the field `name` of another class, with the same description except for `changes`."""
    source = next(one for one in dataclasses.fields(kind) if one.name == name)
    default = source.default if source.default_factory is MISSING else source.default_factory
    default, doc = changes.pop("default", default), changes.pop("doc", source.metadata["doc"])
    return option(default, doc, **{key: value for key, value in source.metadata.items() if key != "doc"} | changes)


def described(name: str, kind: Any, one: dataclasses.Field, **common: Any) -> Option:
    """Return a field as an option; `common` describes what its own metadata does not."""
    default = one.default if one.default_factory is MISSING else one.default_factory()
    default = MISSING if default is ... else default
    description = {**common, **one.metadata}
    number = _number(kind)
    if number and "most" not in description and "below" not in description:
        description["most"] = LARGEST
    if number is float and "least" not in description and "above" not in description:
        description["least"] = -LARGEST
    return Option(name, kind, default, **description)


def options_of(*kinds: "type[Settings]") -> dict[str, Option]:
    """Return name -> option for all fields of these classes and of the settings within them. Of equal names the first counts."""
    options: dict[str, Option] = {}
    for kind in kinds:
        for name, one in [*_own(kind).items(), *options_of(*inner_settings(kind).values()).items()]:
            options.setdefault(name, one)
    return options


def _is_settings(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Settings)


# Classes


@dataclass(frozen=True)
class Settings:
    """Base of all settings: checked on creation, converted to JSON and back. `common` describes each option that does not override it."""

    common: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        for name, one in _own(type(self)).items():
            object.__setattr__(self, name, one.checked(getattr(self, name)))
        with as_in_python(_own(type(self))):
            self.check()

    def check(self) -> None:
        """Raise InvalidSetting for valid values that contradict each other."""

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """Create settings from one flat set of names, each a field of this class or of the settings within it."""
        check_known(settings, options_of(cls))
        parts = {}
        for name, kind in inner_settings(cls).items():
            known = options_of(kind)
            parts[name] = kind.of(**{key: value for key, value in settings.items() if key in known})
        created = cls(**parts, **{name: value for name, value in settings.items() if name in _own(cls)})
        with as_in_python(_own(cls)):
            created.check_effect(created.needs())
        return created

    def needs(self) -> list[Need]:
        """List what options need in order to have an effect. Checked of new settings, not of those in files of earlier versions."""
        return []

    def check_effect(self, needs: Iterable[Need]) -> None:
        """Raise InvalidSetting for an option that is not at its default, and has no effect."""
        for words in self._idle(need for need in needs if not need.amounts):
            raise InvalidSetting(words)

    def notes_on_effect(self, needs: Iterable[Need] = ()) -> list[str]:
        """Return notes on amounts that are not at their default, and have no effect."""
        return [words.rstrip(".").replace(". Leave", ": leave") for words in self._idle(n for n in (*self.needs(), *needs) if n.amounts)]

    def _idle(self, needs: Iterable[Need]) -> Iterator[str]:
        """Yield what to say of each option that is not at its default, and has no effect."""
        options, values = options_of(type(self)), self.flat()
        for need in needs:
            for name in () if need.met else need.names:
                if values[name] != options[name].default:
                    written = options[name].given(values[name])
                    yield f"{written} has no effect {need.without}. Leave it out{need.remedy and f', or give {need.remedy}'}."

    def flat(self) -> dict[str, Any]:
        """Return all settings under their own names, as accepted by `of`."""
        values = {name: getattr(self, name) for name in _own(type(self))}
        for value in vars(self).values():
            values = {**(value.flat() if isinstance(value, Settings) else {}), **values}
        return values

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {one.name: _plain(getattr(self, one.name)) for one in dataclasses.fields(self)}

    @classmethod
    def recorded(cls, report: Mapping[str, Any]) -> Any:
        """Return the settings in a run's report.json, in a form that can be passed again."""
        return report.get("settings")

    @classmethod
    def from_json(cls, data: Any, where: str = "settings") -> Self:
        """Return the settings that `to_json` wrote; omitted ones have their default.

        Raises InvalidFile, naming `where`, for any other type, value or name.
        """
        if not isinstance(data, dict):
            raise InvalidFile(f"{where} is a {type(data).__name__}, not a JSON object. Restore it or recreate it.")
        inner = inner_settings(cls)
        unknown = next((key for key in data if key not in inner and key not in _own(cls)), None)
        if unknown is not None:
            raise InvalidFile(f"{where}: {reprlib.repr(unknown)} is unknown: written by a newer anybit (upgrade) or edited.")
        parts = {key: inner[key].from_json(value, f"{where}: {key}") for key, value in data.items() if key in inner}
        try:
            return cls(**{**data, **parts})
        except InvalidSetting as error:
            raise InvalidFile(f"{where}: {' '.join(str(error).split())[:300]} Restore it or recreate it.") from error


def _own(kind: "type[Settings]") -> dict[str, Option]:
    """Return name -> option for a class's own fields."""
    return {one.name: described(one.name, one.type, one, **kind.common) for one in dataclasses.fields(kind) if not _is_settings(one.type)}


def inner_settings(kind: "type[Settings]") -> "dict[str, type[Settings]]":
    """Return name -> class for the settings within a class."""
    return {one.name: typing.cast(Any, one.type) for one in dataclasses.fields(kind) if _is_settings(one.type)}


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.to_json()
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def check_known(names: Iterable[str], known: Collection[str], where: str = "") -> None:
    """Raise InvalidSetting for the first unknown name, with its nearest match; `where` begins the message."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, list(known), n=1)
            raise InvalidSetting(f"{where}There is no option {reprlib.repr(name)}.{f' Did you mean {near[0]!r}?' if near else ''}")


# Documentation


def documented(kind: type[Value]) -> type[Value]:
    """Append the description of each option to the class's docstring."""
    kind.__doc__ = f"{inspect.cleandoc(kind.__doc__ or '')}\n\n{_table(_own(typing.cast(Any, kind)))}"
    return kind


def takes(*kinds: type[Settings], only: Collection[str] | None = None) -> Callable[[Value], Value]:
    """Decorate a function that takes options of these classes (only some, with `only`) as `**settings`: add them to signature and
    docstring."""

    def decorate(function: Any) -> Any:
        options = {name: one for name, one in options_of(*kinds).items() if only is None or name in only}
        own = [one for one in inspect.signature(function).parameters.values() if one.kind is not one.VAR_KEYWORD]
        keywords = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.kind)
            for name, one in options.items()
        ]
        function.__signature__ = inspect.signature(function).replace(parameters=[*own, *keywords])
        function.options = options
        function.__doc__ = f"{inspect.cleandoc(function.__doc__)}\n\nSettings:\n\n{_table(options)}"
        return function

    return decorate


def _table(options: Mapping[str, Option]) -> str:
    width = max(map(len, options))
    return "\n".join(
        textwrap.fill(f"{name:<{width}}  {in_python(one.doc)} {one.allowed}".rstrip(), 140, subsequent_indent=" " * (width + 2))
        for name, one in options.items()
    )
