"""Progress of long work, told to whoever listens: the command line draws bars, the library is silent."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Item = TypeVar("Item")
Listener = Callable[[str, int, int], None]
"""Called with (what, done, total) at the start and after each item."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_notes: ContextVar[Callable[[str], None] | None] = ContextVar("notes", default=None)


def track(items: Collection[Item], what: str) -> Iterator[Item]:
    """The items, each reported when it has been worked on."""
    listener = _listener.get()
    if listener:
        listener(what, 0, len(items))
    for done, item in enumerate(items, 1):
        yield item
        if listener:
            listener(what, done, len(items))


def note(line: str) -> None:
    """Tell what an item of long work has come to."""
    listener = _notes.get()
    if listener:
        listener(line)


@contextmanager
def listening(listener: Listener, notes: Callable[[str], None] | None = None) -> Iterator[None]:
    """Send progress to `listener`, and notes to `notes`, inside the block."""
    tokens = _listener.set(listener), _notes.set(notes)
    try:
        yield
    finally:
        _listener.reset(tokens[0])
        _notes.reset(tokens[1])
