"""Help of verbs: panels of the most used options and two examples; --help-all shows all options."""

import difflib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from anybit.errors import printable

ALL = "--help-all"
USAGE_ERROR: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")
"""Errors of typer about a command line, which it does not export."""


class Panels:
    """Formats help in panels, and prints each error in one line; typer's own rich mode would box both."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with one_line(ctx):
            parsed: list[str] = super().parse_args(ctx, args)  # type: ignore[misc]
            return parsed

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from typer import rich_utils

        command: Any = self
        for parameter in command.params:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
        examples, command.epilog = command.epilog, None
        rich_utils.rich_format_help(obj=command, ctx=ctx, markup_mode="rich")
        typer.echo(f"{examples}\n")


class VerbCommand(Panels, TyperCommand):
    """A verb, whose help omits --help itself and rarely used options, which --help-all shows."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None:
            option.hidden = True
        return option


class Verbs(Panels, TyperGroup):
    """All verbs."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        with one_line(ctx):
            return super().resolve_command(ctx, args)


@contextmanager
def one_line(context: Any) -> Iterator[None]:
    """Print an error of typer about the command line as one line, and exit with status 2."""
    try:
        yield
    except USAGE_ERROR as error:
        if context.resilient_parsing or type(error).__name__ == "NoArgsIsHelpError":
            raise
        print(f"anybit: {printable(_in_one_line(error, context))}", file=sys.stderr)
        raise typer.Exit(2) from error


def _in_one_line(error: Any, context: Any) -> str:
    """Write an error of typer with what to do: the nearest option, and where all are listed."""
    verb = "" if context.parent is None else f" {context.info_name}"
    listed = f"`anybit{verb} --help` lists the {'options' if verb else 'verbs'}."
    option = getattr(error, "option_name", None)
    if option is None or type(error).__name__ != "NoSuchOption":
        words = str(error.format_message()).strip()
        return f"{words}{'' if words.endswith(('.', '?')) else '.'} {listed}"
    known = [name for one in context.command.params for name in (*one.opts, *one.secondary_opts) if name.startswith("--")]
    near = difflib.get_close_matches(option, known, n=1)
    return f"there is no option {option}. {f'Did you mean {near[0]}?' if near else listed}"


def show_all(context: typer.Context, value: bool) -> None:
    """Print the help with every option and exit."""
    if not value or context.resilient_parsing:
        return
    for parameter in context.command.params:
        if parameter.name != "help_all":
            parameter.hidden = False  # type: ignore[attr-defined]
    context.command.epilog = examples_of(context.command.callback)
    context.get_help()
    raise typer.Exit


def summary_of(function: Callable[..., Any]) -> str:
    """Return a verb's docstring without its examples."""
    return "\n".join(line for line in _lines(function) if not line.startswith("anybit ")).strip()


def examples_in(function: Callable[..., Any]) -> list[str]:
    """List the commands in a verb's docstring."""
    return [line for line in _lines(function) if line.startswith("anybit ")]


def _lines(function: Callable[..., Any]) -> list[str]:
    return (inspect.getdoc(function) or "").splitlines()


def examples_of(function: Any, hidden: int = 0) -> str:
    """Write the examples of a verb, one per line, and how to see its other options."""
    rest = [f"\n {hidden} more options: anybit {function.__name__} {ALL}"] if hidden else []
    return "\n".join([*(f" $ {line}" for line in examples_in(function)), *rest])
