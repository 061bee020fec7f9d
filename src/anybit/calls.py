"""Public functions called from Python: every argument is checked before any work; errors show the corrected call."""

import difflib
import functools
import inspect
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Number
from pathlib import Path
from typing import Any, TypeVar

from anybit.errors import InvalidInput, InvalidSetting
from anybit.settings import Option, Settings, documented, option, options_of
from anybit.wording import as_in_python

Function = TypeVar("Function", bound=Callable[..., Any])


BYTES = 2**60
"""No limit of memory can sensibly exceed this many bytes."""


@documented
@dataclass(frozen=True)
class Amounts(Settings):
    """Numbers that several functions and verbs take, each with its range."""

    workers: int = option(0, "Processes that load data; affects only speed.", least=0, most=1024, panel="Runtime", rare=True)
    threads: int | None = option(None, "Processor threads (default: PyTorch's choice).", least=1, most=1024, panel="Runtime")
    batch_size: int | None = option(None, "Inputs per forward pass (default: as in the run).", least=1)
    samples: int | None = option(None, "Number of inputs to run, from the first (default: all).", least=1)
    rounds: int = option(20, "Rounds of timing, about 0.05 s each.", least=1, most=10**6)
    memory: int | None = option(None, "Memory for activations (default: as in the run).", least=0, most=BYTES)
    outputs: Mapping[str, float] | None = option(None, "Outputs to compare, name -> weight (default: as in the run).", above=0)


AMOUNTS = options_of(Amounts)
DATA = {"data", "test", "train"}
"""Arguments that are data or a reference, which may be a path."""
ELSEWHERE = DATA | {"self", "budget", "metric"}
"""Arguments whose own checks say more than their type."""
OBJECTS = {
    "model": "is not a network. Give a torch.nn.Module, or a reference such as model='net.py:network'",
    "run": "is not a run. Give a run folder, such as run='runs/mine', or where a result is taken, the result itself",
    "search.run": "is not a supernet. Give what anybit.train returns, or its folder, such as run='runs/supernet'",
    "extract.run": "is not a supernet. Give what anybit.train returns, or a folder of it or of a search: search.save('runs/found')",
    "allocate.run": "is not a run folder: allocate reads a run folder. Save a result first: result.save('run')",
    "evaluate.model": "is neither a network nor a run. Give a torch.nn.Module, a result, a run folder, or model='net.py:network'",
    "run2": "is not a run. Give a run folder, such as run2='runs/mine'",
    "runs": "is not a run. Give run folders, such as 'runs/mine', 'runs/smaller'",
    "folder": "is not a folder. Give one, such as folder='runs/mine'",
    "scheme": "is not a scheme. Give a run folder, such as scheme='runs/mine', or anybit.Scheme.parse({'fc': 'W4A8', ...})",
    "weights": "is not a file. Give a state dict, such as weights='net.safetensors'",
    "checkpoint": "is not a file. Give one to write, such as checkpoint='training.safetensors'",
    "onnx": "is not a file. Give one, such as onnx='net.onnx'",
    "output": "is not a file. Give one to write, such as output='runs.html'",
    "path": "is not a file. Give one to write, such as path='page.html'",
    "cache": "is not a folder. Give one, True for the user's cache, or False for none",
    "preprocessing": "is not a Preprocessing. Write preprocessing=anybit.Preprocessing(size=224)",
}
"""Arguments of several types, of all functions or one -> what is wrong with a value of another type."""


def public(function: Function) -> Function:
    """Decorate a public function: raise InvalidSetting or InvalidInput, with the corrected call, if arguments do not match its signature
    and the types and ranges in it. Its errors name keywords, not flags."""
    signature = inspect.signature(function)
    options, checks = _options_in(function, signature), getattr(function, "checks", {})

    @functools.wraps(function)
    def called(*arguments: Any, **keywords: Any) -> Any:
        with as_in_python(signature.parameters):
            check_call(function.__name__, signature, arguments, keywords)
            call = signature.bind(*arguments, **keywords)
            bound = call.arguments
            plain = [name for name in options if name in bound and name not in OBJECTS]
            for name in plain:
                bound[name] = _checked(options[name], bound[name], signature.parameters[name], function.__name__)
            check_takes_two(bound.get("metric"))
            for name, check in checks.items():
                check(bound.get(name))
            for name in [name for name in options if name in bound and name in OBJECTS]:
                bound[name] = _checked(options[name], bound[name], signature.parameters[name], function.__name__)
            for name in DATA & bound.keys():
                bound[name] = _data(name, bound[name], signature.parameters[name].default)
            return function(*call.args, **call.kwargs)

    return called  # type: ignore[return-value]


def checking(**checks: Callable[[Any], Any]) -> Callable[[Function], Function]:
    """Decorate a public function whose arguments of these names are checked by functions, before networks and data."""

    def decorate(function: Function) -> Function:
        function.checks = checks  # type: ignore[attr-defined]
        return function

    return decorate


def _options_in(function: Any, signature: inspect.Signature) -> dict[str, Option]:
    """Return name -> option for the arguments of a function: as its settings describe them, or by the types in its signature."""
    described = {**AMOUNTS, **getattr(function, "options", {})}
    options = {}
    for name, one in signature.parameters.items():
        if name not in ELSEWHERE:
            known = described.get(name) or Option(name, one.annotation, one.default, "")
            options[name] = replace(known, kind=one.annotation)
    return options


def _checked(one: Option, value: Any, parameter: inspect.Parameter, function: str) -> Any:
    """Return an argument of a function as its option's type; of a variable number of arguments, each."""
    if parameter.kind is parameter.VAR_POSITIONAL:
        return tuple(_checked(one, each, parameter.replace(kind=parameter.POSITIONAL_ONLY), function) for each in value)
    if one.name == "device" and type(value).__name__ == "device":
        value = str(value)
    if one.name in OBJECTS and not one.accepts(value):
        raise InvalidSetting(f"{one.name}={reprlib.repr(value)} {OBJECTS.get(f'{function}.{one.name}') or OBJECTS[one.name]}.")
    return one.checked(value)


def _data(name: str, value: Any, default: Any) -> Any:
    """Return data, or the text of a reference. Raises InvalidInput for what can be neither."""
    lacking = default is not None if value is None else isinstance(value, str) and not value
    if lacking or isinstance(value, (Number, bytes, bytearray)) or inspect.isroutine(value) or isinstance(value, type):
        form = "Call it and give its result:" if callable(value) else "Give"
        given = f"{name}={reprlib.repr(value)}, of type {type(value).__name__}, is not data."
        raise InvalidInput(f"{given} {form} a data set, a DataLoader, arrays (x, y), or a reference such as {name}='data.npz'.")
    return str(value) if isinstance(value, Path) else value


def check_call(name: str, signature: inspect.Signature, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Raise InvalidSetting with the corrected call if the arguments do not match the function's signature."""
    known = list(signature.parameters)
    for keyword, value in keywords.items():
        if keyword not in known:
            near = difflib.get_close_matches(keyword, known, n=1)
            meant = f" Did you mean {name}(..., {near[0]}={value!r:.60})?" if near else ""
            raise InvalidSetting(f"{name} has no {keyword!r}.{meant} help(anybit.{name}) lists its settings.")
    try:
        signature.bind(*arguments, **keywords)
    except TypeError as error:
        needed = [one.name for one in signature.parameters.values() if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
        needed = [one for one in needed if one != "self"]
        raise InvalidSetting(f"{name}: {error}. Call {name}({', '.join(needed)}, ...), with further arguments by keyword.") from None


def check_takes_two(metric: Any) -> None:
    """Raise InvalidSetting if a custom metric is not a function of (outputs, labels)."""
    if metric is None:
        return
    name = getattr(metric, "__name__", type(metric).__name__)
    if not callable(metric):
        raise InvalidSetting(f"The metric is a {name}, {metric!r:.60}. Give --metric a function of (outputs, labels), two tensors.")
    try:
        signature = inspect.signature(metric)
    except (TypeError, ValueError):  # compiled code without a signature
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise InvalidSetting(
            f"The metric {name}{signature} cannot be called as {name}(outputs, labels): {error}. Give --metric a function of two tensors "
            "that returns a number, the higher the better."
        ) from None
