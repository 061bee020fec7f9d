"""References to code (`package.module:function`, `file.py:function`), imported and called."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from anybit.errors import AnybitError, InvalidSetting, MissingPackage
from anybit.files.strict import in_words
from anybit.sources.references import is_script, split_subset


def absolute(reference: str) -> str:
    """Make paths of scripts, arrays and folders absolute, so that the reference works from any working folder."""
    place, separator, name = reference.rpartition(":")
    if is_script(place):
        return f"{Path(place).resolve()}{separator}{name}"
    if reference.startswith("hf:"):
        return f"hf:{Path(reference[3:]).resolve()}" if Path(reference[3:]).is_dir() else reference
    path, subset = split_subset(reference)
    return str(Path(path).resolve()) + (f"#{subset}" if subset else "") if Path(path).exists() else reference


def call_user_function(function: Callable, what: str) -> Any:
    """Call the user's function. Raises InvalidSetting naming it on any error."""
    try:
        return function()
    except AnybitError:
        raise
    except (Exception, SystemExit) as error:
        message = " ".join(str(error).split())
        raise InvalidSetting(f"{what} failed with {type(error).__name__}: {message}. It is called without arguments.") from error


def load_callable(reference: str, option: str) -> Callable:
    """Import the function that `package.module:function` or `path/to/file.py:function` names."""
    place, separator, name = reference.rpartition(":")
    if not separator or not place or not name:
        raise InvalidSetting(f"{option} {reference!r} cannot be read. Write package.module:function or path/to/file.py:function.")
    try:
        module = _import_file(Path(place), option) if is_script(place) else importlib.import_module(place)
    except ImportError as error:
        raise InvalidSetting(f"{option} {reference}: {error}. Is the package installed and the name right?") from error
    except AnybitError:
        raise
    except (Exception, SystemExit) as error:
        raise InvalidSetting(
            f"{option} {reference}: running {place} failed with {type(error).__name__}: {error}. Repair the script."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InvalidSetting(f"{option} {reference}: {place} has no function {name!r}.")
    return function


def _import_file(path: Path, option: str) -> ModuleType:
    if not path.is_file():
        raise InvalidSetting(f"{option}: there is no file {path}.")
    name = f"anybit_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path, loader=SourceFileLoader(name, str(path)))  # also if its suffix is .PY
    assert spec is not None and spec.loader is not None, "it has this loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickled workers look up their module
    sys.path.insert(0, str(path.parent.resolve()))
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # like a script that is run, it leaves no bytecode behind
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = writes
        sys.path.remove(str(path.parent.resolve()))
    return module


def import_optional(module: str, package: str, what: str) -> Any:
    """Import a package that belongs to one of anybit's extras; `what` needs it.

    Raises MissingPackage with the command that installs it, or that replaces an incompatible build.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # torchvision raises RuntimeError with an incompatible build of torch
        why = in_words(error).rstrip(".")
        lacking = _lacking(error)
        if lacking == module.partition(".")[0]:
            raise MissingPackage(f"{what} needs {package}, which is not installed: run `pip install {package}`.") from error
        if lacking is not None:
            raise MissingPackage(f"{what} needs {package}, which needs {lacking} ({why}): run `pip install {lacking}`.") from error
        raise MissingPackage(f"{what} needs {package}, which is installed but cannot be imported ({why}). {_cure(package)}") from error


def _lacking(error: Exception) -> str | None:
    """Return the name of the missing package if that caused the error, else None."""
    top = (getattr(error, "name", None) or "").partition(".")[0]
    return top if isinstance(error, ModuleNotFoundError) and top and importlib.util.find_spec(top) is None else None


def _cure(package: str) -> str:
    """Return the command that installs compatible builds of torch and of packages compiled for it together."""
    versions = {}
    for name in ("torch", "torchvision"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    if package not in ("timm", "torchvision") or len(versions) < 2:
        return f"Reinstall it: run `pip install --force-reinstall {package}`."
    installed = " and ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"Builds of torch and torchvision must match, but these are {installed}: run `pip install --force-reinstall torch torchvision`, "
        "with the --index-url of your torch if it came from a special index."
    )
