"""Progress and events of long work, sent to whoever listens. The command line shows and logs them; the library is silent.

Events are records of the standard logger "anybit" at level INFO: the message is the event's name, `record.fields` what was measured.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

Item = TypeVar("Item")
Listener = Callable[[str, int, int], None]
"""Called with (what, done, total) at the start and after each item."""
EventListener = Callable[[str, Mapping[str, Any]], Any]
"""Called with (event, fields) as it happens; docs/command-line.md lists them."""
EVENTS = logging.getLogger("anybit")

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


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
    EVENTS.info(event, extra={"fields": fields})


class EventHandler(logging.Handler):
    """Hands each event to a function; what that raises is raised where the event is told of."""

    def __init__(self, listener: EventListener):
        super().__init__()
        self.listener = listener

    def emit(self, record: logging.LogRecord) -> None:
        self.listener(record.getMessage(), getattr(record, "fields", {}))


@contextmanager
def listening(listener: Listener | None = None, events: EventListener | None = None) -> Iterator[None]:
    """Send progress to `listener`, and events to `events`, inside the block."""
    token, level, handler = _listener.set(listener), EVENTS.level, EventHandler(events) if events else logging.NullHandler()
    EVENTS.addHandler(handler)
    EVENTS.setLevel(logging.INFO)
    try:
        yield
    finally:
        EVENTS.removeHandler(handler)
        EVENTS.setLevel(level)
        _listener.reset(token)
