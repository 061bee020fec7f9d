"""Options from a file: TOML or JSON of option: value, or the report of a finished run, whose settings are used."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anybit.errors import InvalidSetting
from anybit.files.strict import parse_json, read_bytes
from anybit.settings import Option, Settings, check_known, inner_settings


def read_options(path: Path, options: Mapping[str, Option], kinds: Sequence[type[Settings]], who: str) -> dict[str, Any]:
    """Return name -> value of the options in a file. `kinds` are the classes of settings among them, first the one that runs record.

    Raises InvalidSetting, or InvalidFile if the file is malformed, naming the asking option `who`, the file and the key.
    """
    where = f"{who} {path}: "
    known = {written: name for name, one in options.items() for written in (name, one.written.strip("-").replace("-", "_"))}
    values: dict[str, Any] = {}
    for key, value in _items(_content(path, options, kinds, where), {name for kind in kinds for name in inner_settings(kind)}):
        check_known([key.replace("-", "_")], known, where)
        name = known[key.replace("-", "_")]
        value = _from_file(options[name], value, f"{where}{name}")
        if values.setdefault(name, value) != value:
            raise InvalidSetting(f"{where}{name} is given twice, as {values[name]!r} and {value!r}. Keep one of them.")
    return values


def _content(path: Path, options: Mapping[str, Option], kinds: Sequence[type[Settings]], where: str) -> Mapping[str, Any]:
    content = read_bytes(path)
    if path.suffix.lower() == ".toml":
        try:
            return tomllib.loads(content.decode("utf8"))
        except ValueError as error:
            raise InvalidSetting(f"{where}it is not valid TOML: {error}.") from error
    data = parse_json(content, str(path))
    if isinstance(data, dict) and "version" in data:
        data = _recorded(_beside(path) | data, options, kinds)
    if not isinstance(data, dict):
        raise InvalidSetting(f"{where}it holds no settings. Name a file of option: value, or the report.json of a run.")
    return data


def _beside(report: Path) -> dict[str, Any]:
    """Return the preprocessing in the file beside a report that was written before reports recorded it."""
    for name in ("scheme.json", "supernet.json"):
        file = report.with_name(name)
        data = parse_json(read_bytes(file), str(file)) if file.is_file() else None
        if isinstance(data, dict) and isinstance(data.get("preprocessing"), dict):
            return {"preprocessing": data["preprocessing"]}
    return {}


def _recorded(report: Mapping[str, Any], options: Mapping[str, Option], kinds: Sequence[type[Settings]]) -> Any:
    """Return the options of a finished run that its report holds: settings, preprocessing and budgets, if the verb takes any."""
    parts = [kind.recorded(report) for kind in kinds] or [{}]
    settings = {**parts[-1], **parts[0]} if all(isinstance(part, dict) for part in parts) else parts[0]
    if "budget" not in options or not isinstance(settings, dict):
        return settings
    of_run = report["search"] if isinstance(report.get("search"), dict) else report
    several = of_run.get("budgets")
    budgets = list(several) if isinstance(several, dict) else [one for one in [of_run.get("budget")] if one is not None]
    if not budgets:
        return settings
    return {**settings, "budget": budgets if options["budget"].repeat else budgets[0]}


def _items(data: Mapping[str, Any], inner: set[str]) -> list[tuple[str, Any]]:
    """List the items of a mapping, including those within `csq`, `train` and other `inner` settings."""
    parts = [value.items() if key in inner and isinstance(value, dict) else [(key, value)] for key, value in data.items()]
    return [item for part in parts for item in part]


def _from_file(one: Option, value: Any, name: str) -> Any:
    if one.text is not None and isinstance(value, str):
        value = one.from_text([value] if one.repeat else value, name)
    elif one.text is not None and one.repeat and isinstance(value, list):
        value = one.text.parse(value)
    return one.checked(value, name)
