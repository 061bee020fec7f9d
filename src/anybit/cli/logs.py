"""The events of a run: each complete, with its time and its stage, and as one line to read."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from anybit import __version__
from anybit.errors import printable
from anybit.progress import EventListener, tell

Record = Mapping[str, Any]
"""An event, complete: time, event, stage where one is under way, its own fields, seconds."""

WIDTH = 200
"""Characters that a line to read has at most."""


def completing(*sinks: Callable[[Record], Any]) -> EventListener:
    """A listener that gives each event its time, its stage and its seconds, and hands it to every sink.

    `seconds`, where the event does not bring its own, is the time since the event before: what was told of took that long.
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
    """Tell how a verb begins, and how it ends: done, interrupted, or with which error."""
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
    """A record in one line: the time of day, the event, where, what was measured, seconds."""
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
