"""Public functions called from Python: an unknown keyword or a number out of range raises an error with the corrected call."""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from anybit.errors import InvalidSetting
from anybit.settings import Settings, documented, option, options_of
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
DATA = {"data", "test"}
"""Arguments that are data or a reference, which may be a path."""


def public(function: Function) -> Function:
    """Decorate a public function: raise InvalidSetting with the corrected call if arguments do not match its signature. Its errors name
    keywords, not flags."""
    signature = inspect.signature(function)
    code = inspect.unwrap(function).__code__
    own = AMOUNTS.keys() & {*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]}  # settings classes check the others

    @functools.wraps(function)
    def called(*arguments: Any, **keywords: Any) -> Any:
        with as_in_python(signature.parameters):
            check_call(function.__name__, signature, arguments, keywords)
            call = signature.bind(*arguments, **keywords)
            bound = call.arguments
            for name in DATA & bound.keys():
                bound[name] = str(bound[name]) if isinstance(bound[name], Path) else bound[name]
            check_takes_two(bound.get("metric"))
            for name in sorted(own & bound.keys()):
                if bound[name] is not None or signature.parameters[name].default is not None:
                    AMOUNTS[name].checked(bound[name])
            return function(*call.args, **call.kwargs)

    return called  # type: ignore[return-value]


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
