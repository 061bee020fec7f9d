"""The log of a run: each event that `progress` tells as one JSON object a line, or as one line to read."""

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TextIO

from anybit import __version__
from anybit.errors import InvalidSetting, printable
from anybit.progress import EventListener, tell

Record = Mapping[str, Any]
"""An event, complete: time, event, stage where one is under way, its own fields, seconds."""

START = b'{"time": '
"""What every line of a log begins with."""
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
        about = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **({"stage": stage} if stage else {})}
        for sink in sinks:
            sink({**about, **fields, "seconds": fields.get("seconds", now - before)})
        stage, before = None if event == "stage ends" else stage, now

    return listen


@contextmanager
def verb_told(verb: str, settings: Mapping[str, Any]) -> Iterator[None]:
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


@contextmanager
def appended(path: Path) -> Iterator[Callable[[Record], None]]:
    """A sink that appends each record to the file at once; a disk that fills costs one warning and the rest of the log, not the work.

    No logging.FileHandler, which would go on printing an error for each event.

    Raises InvalidSetting where the first record cannot be written, or where the file holds anything but a log.
    """
    file, begun, failed = _opened(path), False, False

    def write(record: Record) -> None:
        nonlocal begun, failed
        if failed:
            return
        try:
            file.write(json.dumps(plain(record), allow_nan=False) + "\n")
            file.flush()
            begun = True
        except OSError as error:
            if not begun:
                raise InvalidSetting(f"--log {path} cannot be written: {error.strerror}. Choose another file.") from error
            failed = True
            warnings.warn(f"--log {path} ends here: {error.strerror}. The work goes on without it.", stacklevel=2)

    try:
        yield write
    finally:
        with suppress(OSError):  # what could not be flushed before
            file.close()


def _opened(path: Path) -> TextIO:
    """The file, open at its end; a last line that was cut off by a kill is ended first."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        cut = _cut_off(path)
        file = open(path, "a", encoding="utf8")  # noqa: SIM115 (closed by `appended`)
        file.write("\n" if cut else "")
        return file
    except OSError as error:
        raise InvalidSetting(f"--log {path} cannot be written: {error.strerror}. Choose another file.") from error


def _cut_off(path: Path) -> bool:
    """Whether the log's last line has no end. Raises InvalidSetting where the file is no log: appending would damage it."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as file:
        first = file.readline(2**16)
        file.seek(-1, 2)
        last = file.read(1)
    if not START.startswith(first[: len(START)]):
        raise InvalidSetting(f"--log {path} exists and is no log of anybit. Choose another file.")
    return last != b"\n"


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinity are null, anything unknown is its text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


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
