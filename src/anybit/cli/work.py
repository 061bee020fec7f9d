"""Run a verb on the command line: print errors as one line, progress, log and result."""

import inspect
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from anybit.cli.help import ALL, show_all
from anybit.cli.options import Verb, as_parameter
from anybit.errors import AnybitError, InvalidSetting, printable
from anybit.files.whole import claimed
from anybit.settings import PANELS
from anybit.sources.published import check_published
from anybit.wording import as_on_the_command_line

SHOW_ALL = inspect.Parameter(
    "help_all", inspect.Parameter.KEYWORD_ONLY, default=False,
    annotation=Annotated[bool, typer.Option(ALL, help="Show every option and exit.", is_eager=True, callback=show_all, hidden=True)],
)  # fmt: skip
"""Parameter of every verb that shows the rarely used options."""


class Outcome(NamedTuple):
    """The outcome of a verb.

    data    what --json prints
    show    a function that prints it for people (called with False: only the result), or the name of one in reports.terminal, called with
            `data`
    status  exit status
    """

    data: Any
    show: Callable[[bool], None] | str
    status: int = 0


def as_command(function: Callable[..., Outcome | None], *more: str) -> Callable[..., None]:
    """Turn a verb into a typer command with its own options and `more` of the common ones; with `log`, report its progress."""
    verb = Verb.of(function, *more)

    def command(context: typer.Context, *, help_all: bool = False, **written: Any) -> None:
        with reported_errors():
            values = verb.read(context, written)
            common = {name: verb.value(name, values) for name in more}
        telling = (
            _telling(function.__name__, {**written, **values}, common)
            if "log" in common and is_first()
            else _waiting("threads" in common and is_first(), common)
        )
        with reported_errors(function.__name__), telling, ExitStack() as claims:
            arguments = verb.arguments(values)
            if isinstance(output := arguments.get("output"), Path) and is_first():
                claims.enter_context(claimed(output, "--output"))
            if isinstance(arguments.get("model"), str):
                check_published(arguments["model"], arguments.get("weights"))
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
        from anybit.files.lines import plain
        from anybit.files.strict import json_text

        print(json_text(plain(outcome.data)))
    elif callable(outcome.show):
        outcome.show(not common.get("quiet"))
    else:
        from anybit.reports import terminal

        show = getattr(terminal, outcome.show)
        show(outcome.data, *[not common.get("quiet")][: len(inspect.signature(show).parameters) - 1])
    if outcome.status:
        raise typer.Exit(outcome.status)


def is_first() -> bool:
    """Return whether this is the first of several processes: the one that reports and writes."""
    return os.environ.get("RANK", "0") == "0"


KEPT = {
    **dict.fromkeys(("calibrate", "allocate", "search", "extract"), "Finished results are kept in the cache"),
    **dict.fromkeys(("grow", "train"), "Finished epochs are kept beside the output"),
}
"""verb -> description of what remains after an interruption."""


@contextmanager
def reported_errors(verb: str = "") -> Iterator[None]:
    """Print anybit's own errors as one line with exit status 2; on Ctrl-C, say what remains of `verb`, and exit with 130."""
    try:
        with as_on_the_command_line():
            yield
    except AnybitError as error:
        print(f"anybit: {printable(str(error))}", file=sys.stderr)
        raise typer.Exit(2) from error
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        print(f"anybit: {printable(' '.join(str(error).split()))} Load the data in the main process: --workers 0.", file=sys.stderr)
        raise typer.Exit(2) from error  # PyTorch raises it wherever the main process is
    except KeyboardInterrupt as error:
        print(f"anybit: interrupted{_continuation(verb)}", file=sys.stderr)
        raise typer.Exit(130) from error


def _continuation(verb: str) -> str:
    """Return what remains of an interrupted verb, and the command that continues it."""
    if verb not in KEPT or "--no-cache" in sys.argv:
        return ""
    restart = "--overwrite" if verb in ("grow", "train") else None  # it would start the training again
    command = shlex.join(["anybit", *(printable(one) for one in sys.argv[1:] if one != restart)])
    return f". {KEPT[verb]}. This continues:\n  {command}"


@contextmanager
def _waiting(is_long: bool, common: Mapping[str, Any]) -> Iterator[None]:
    """Show on a terminal that a verb without stages is at work."""
    if not is_long or common.get("quiet") or common.get("as_json") or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status("starting"):
        yield


@contextmanager
def _telling(verb: str, settings: Mapping[str, Any], common: Mapping[str, Any]) -> Iterator[None]:
    """Report progress on the terminal, events on stderr with --verbose, and all events to --log."""
    log, verbose, silent = common["log"], common["verbose"], common["quiet"] or common["as_json"]
    if verbose and common["quiet"]:
        raise InvalidSetting("--verbose and --quiet contradict each other. Give only one.")
    if log is not None and settings.get("output") and log.resolve().is_relative_to(Path(settings["output"]).resolve()):
        raise InvalidSetting(
            f"--log={log} is inside the run folder, which is written completely or not at all. Choose a file outside of it."
        )
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
