"""Every error that anybit raises on purpose.

    AnybitError (a ValueError)
    |-- InvalidSetting     a precision, budget, bit-width or option with an invalid value
    |-- InvalidInput       data: empty, of a shape that the model rejects, not finite
    |-- InvalidFile        a run folder, weights or scheme file that cannot be trusted
    |-- UnsupportedModel   a network, or a part of one, that anybit does not cover
    |-- SchemeMismatch     a scheme or weights made for another model
    |-- InfeasibleBudget   no scheme meets the budget; the message names the nearest that does
    `-- MissingPackage     an optional package is needed; the message gives the pip command

A message says what, where (the layer's name), the values, and what to do.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class AnybitError(ValueError):
    """Base of all errors that anybit raises on purpose."""


class InvalidSetting(AnybitError):
    """A precision, budget, bit-width or option with an invalid value."""


class InvalidInput(AnybitError):
    """Data that is empty, of a shape that the model rejects, or not finite."""


class InvalidFile(AnybitError):
    """A run folder, weights or scheme file that cannot be trusted."""


class UnsupportedModel(AnybitError):
    """A network, or a part of one, that anybit does not cover."""


class SchemeMismatch(AnybitError):
    """A scheme or weights that were made for another model."""


class InfeasibleBudget(AnybitError):
    """No scheme meets the budget."""


class MissingPackage(AnybitError):
    """An optional package is needed."""


@contextmanager
def naming(prefix: str) -> Iterator[None]:
    """Put an option in front of the message of an error raised inside the block, which begins with the option's value."""
    try:
        yield
    except AnybitError as error:
        raise type(error)(f"{prefix}{error}") from error


def printable(text: str) -> str:
    """Escape terminal control characters, since a name may come from a foreign file."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def some(names: list[str], most: int = 4) -> str:
    """Join the first of many names, and say how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
