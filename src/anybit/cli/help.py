"""Help of verbs: panels of the most used options and two examples; --help-all shows all options."""

import inspect
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

ALL = "--help-all"


class Panels:
    """Formats help in panels. Errors stay one line; typer's own rich mode would box them, too."""

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
