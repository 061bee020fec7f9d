"""Progress and events of long work, sent to whoever listens. The command line shows and logs them; the library is silent."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

Item = TypeVar("Item")
Listener = Callable[[str, int, int], None]
"""Called with (what, done, total) at the start and after each item."""
EventListener = Callable[[str, Mapping[str, Any]], None]
"""Called with (event, fields) as it happens; docs/command-line.md lists them."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_event_listener: ContextVar[EventListener | None] = ContextVar("event_listener", default=None)


def track(items: Collection[Item], what: str) -> Iterator[Item]:
    """Yield the items, reporting each when it has been worked on."""
    listener = _listener.get()
    if listener:
        listener(what, 0, len(items))
    for done, item in enumerate(items, 1):
        yield item
        if listener:
            listener(what, done, len(items))


def tell(event: str, /, **fields: Any) -> None:
    """Tell of an event, with what was measured. A `note` among its fields is a line that is shown without being asked for."""
    listener = _event_listener.get()
    if listener:
        listener(event, fields)


@contextmanager
def listening(listener: Listener | None = None, events: EventListener | None = None) -> Iterator[None]:
    """Send progress to `listener`, and events to `events`, inside the block."""
    tokens = _listener.set(listener), _event_listener.set(events)
    try:
        yield
    finally:
        _listener.reset(tokens[0])
        _event_listener.reset(tokens[1])
