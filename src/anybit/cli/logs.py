"""Events of a run: extended by time and stage, and written as one readable line."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from anybit import __version__
from anybit.errors import printable
from anybit.progress import EventListener, tell

Record = Mapping[str, Any]
"""A complete event: time, event, stage (if there is one), its own fields, seconds."""

WIDTH = 200
"""Longest readable line, in characters."""


def completing(*sinks: Callable[[Record], Any]) -> EventListener:
    """Return a listener that adds time, stage and seconds to each event and passes it to every sink.

    An event without `seconds` of its own gets the time since the previous event, which is how long it took.
    """
    stage: str | None = None
    before = time.monotonic()

    def listen(event: str, fields: Record) -> None:
        nonlocal stage, before
        now = time.monotonic()
        stage = fields["stage"] if event == "stage begins" else stage
        header = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **({"stage": stage} if stage else {})}
        for sink in sinks:
            sink({**header, **fields, "seconds": fields.get("seconds", now - before)})
        stage, before = None if event == "stage ends" else stage, now

    return listen


@contextmanager
def verb_events(verb: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Report the beginning of a verb and its end: done, interrupted, or an error."""
    tell("begins", verb=verb, settings=settings, version=__version__)
    started, ending = time.monotonic(), {"status": "done"}
    try:
        yield
    except KeyboardInterrupt:
        ending = {"status": "interrupted"}
        raise
    except BaseException as error:
        ending = {"status": "error", "error": type(error).__name__, "message": str(error)}
        raise
    finally:
        tell("ends", verb=verb, **ending, seconds=time.monotonic() - started)


def readable(record: Record) -> str:
    """Write a record as one line: time of day, stage, event, layer or unit, fields, seconds."""
    where = [f"{key} {record[key]}" for key in ("layer", "unit") if key in record]
    rest = {key: value for key, value in record.items() if key not in ("time", "event", "stage", "layer", "unit", "seconds")}
    stage = f"[{record['stage']}] " if "stage" in record else ""
    words = ", ".join([*where, *_words(dict(sorted(rest.items(), key=lambda item: isinstance(item[1], Mapping))))])  # long ones last
    line = printable(" ".join(f"{record['time'][11:19]} {stage}{record['event']}{': ' if words else ''}{words}".split()))
    ending = f" ({record['seconds']:.2f} s)"
    return (line if len(line) + len(ending) <= WIDTH else line[: WIDTH - len(ending) - 3] + "...") + ending


def _words(fields: Mapping[str, Any], within: str = "") -> Iterator[str]:
    for key, value in fields.items():
        name = f"{within}{key}"
        if isinstance(value, Mapping):
            yield from _words(value, f"{name}.")
        elif value is not None:
            yield f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
