"""How a verb works on the command line: its errors in a line, what it tells on the terminal and in the log, its result printed."""

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from anybit.cli.help import ALL, show_all
from anybit.cli.options import Verb, as_parameter
from anybit.errors import AnybitError, InvalidSetting, printable
from anybit.settings import PANELS

SHOW_ALL = inspect.Parameter(
    "help_all", inspect.Parameter.KEYWORD_ONLY, default=False,
    annotation=Annotated[bool, typer.Option(ALL, help="Show every option and exit.", is_eager=True, callback=show_all, hidden=True)],
)  # fmt: skip
"""The parameter of every verb that shows the options that few need."""


class Outcome(NamedTuple):
    """The outcome of a verb.

    data    is printed where --json asks for it
    show    prints it to be read; called with False, the result alone. A name is that of a function of reports.terminal, called with `data`
    status  the exit status
    """

    data: Any
    show: Callable[[bool], None] | str
    status: int = 0


def as_command(function: Callable[..., Outcome | None], *more: str) -> Callable[..., None]:
    """A verb as typer takes it, with its own options and `more` of the common ones. With `log` it tells of its work."""
    verb = Verb.of(function, *more)

    def command(context: typer.Context, *, help_all: bool = False, **written: Any) -> None:
        with reported_errors():
            values = verb.read(context, written)
            common = {name: verb.value(name, values) for name in more}
        telling = _telling(function.__name__, {**written, **values}, common) if "log" in common and is_first() else nullcontext()
        with reported_errors(), telling:
            arguments = verb.arguments(values)
            if common.get("threads"):
                import torch

                torch.set_num_threads(common["threads"])
            outcome = function(**arguments)
        if outcome is not None:
            _print(outcome, common)

    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    options = sorted((one for one in verb.options.values() if one.command_line), key=lambda one: PANELS.index(one.panel))
    signature = inspect.Signature([context, *map(as_parameter, options), SHOW_ALL])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {name: one.annotation for name, one in signature.parameters.items()}
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    return command


def _print(outcome: Outcome, common: Mapping[str, Any]) -> None:
    if common.get("as_json"):
        print(json.dumps(outcome.data))
    elif callable(outcome.show):
        outcome.show(not common.get("quiet"))
    else:
        from anybit.reports import terminal

        show = getattr(terminal, outcome.show)
        show(outcome.data, *[not common.get("quiet")][: len(inspect.signature(show).parameters) - 1])
    if outcome.status:
        raise typer.Exit(outcome.status)


def is_first() -> bool:
    """Whether this is the first process of several: the one that tells, and writes."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def reported_errors() -> Iterator[None]:
    """anybit's own errors as one line and exit status 2; Ctrl-C as 130."""
    try:
        yield
    except AnybitError as error:
        print(f"anybit: {printable(str(error))}", file=sys.stderr)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        print("anybit: interrupted", file=sys.stderr)
        raise typer.Exit(130) from error


@contextmanager
def _telling(verb: str, settings: Mapping[str, Any], common: Mapping[str, Any]) -> Iterator[None]:
    """Tell of the work: how far it is on the terminal, each event in a line where --verbose asks for it, and all into --log."""
    log, verbose, silent = common["log"], common["verbose"], common["quiet"] or common["as_json"]
    if verbose and common["quiet"]:
        raise InvalidSetting("--verbose and --quiet contradict each other. Give one of them.")
    if log is not None and settings.get("output") and log.resolve().is_relative_to(Path(settings["output"]).resolve()):
        raise InvalidSetting(f"--log {log} is inside the run folder, which is written whole or not at all. Put the log beside it.")
    from anybit.cli.logs import completing, readable, verb_events
    from anybit.files.lines import appended
    from anybit.progress import listening
    from anybit.reports.bars import shown_progress

    with ExitStack() as stack:
        listener, show = stack.enter_context(shown_progress(bars=not silent))
        sinks: list[Callable[[Mapping[str, Any]], Any]] = [stack.enter_context(appended(log))] if log is not None else []
        if verbose:
            sinks.append(lambda record: show(readable(record)))
        elif not silent:
            sinks.append(lambda record: "note" in record and show(printable(record["note"])))
        own = {name: value for name, value in settings.items() if name == "threads" or name not in common}
        with listening(listener, completing(*sinks)), verb_events(verb, own):
            yield
