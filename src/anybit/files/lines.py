"""A file of JSON lines, appended to until the disk is full."""

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TextIO

from anybit.errors import InvalidSetting

START = b'{"time": '
"""Fields that begin every line of a log."""


@contextmanager
def appended(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a sink that appends each record to the file immediately; a full disk costs one warning and the rest of the log, not the work.

    Not a logging.FileHandler, which would print an error for each further event.

    Raises InvalidSetting if the first record cannot be written, or if the file is not a log.
    """
    file, begun, failed = _opened(path), False, False

    def write(record: Mapping[str, Any]) -> None:
        nonlocal begun, failed
        if failed:
            return
        try:
            file.write(json.dumps(plain(record), allow_nan=False) + "\n")
            file.flush()
            begun = True
        except OSError as error:
            if not begun:
                raise InvalidSetting(f"--log={path} cannot be written: {error.strerror}. Choose another file.") from error
            failed = True
            warnings.warn(f"--log={path} ends here: {error.strerror}. The work continues without it.", stacklevel=2)

    try:
        yield write
    finally:
        with suppress(OSError):  # the rest could not be flushed before
            file.close()


def _opened(path: Path) -> TextIO:
    """Open the file at its end; a last line that a kill cut off is completed first."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        cut = _cut_off(path)
        file = open(path, "a", encoding="utf8")  # noqa: SIM115 (closed by `appended`)
        file.write("\n" if cut else "")
        return file
    except OSError as error:
        raise InvalidSetting(f"--log={path} cannot be written: {error.strerror}. Choose another file.") from error


def _cut_off(path: Path) -> bool:
    """Return whether the log's last line is incomplete. Raises InvalidSetting if the file is not a log, which appending would damage."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as file:
        first = file.readline(2**16)
        file.seek(-1, 2)
        last = file.read(1)
    if not START.startswith(first[: len(START)]):
        raise InvalidSetting(f"--log={path} exists and is not a log of anybit. Choose another file.")
    return last != b"\n"


def plain(value: Any) -> Any:
    """Return `value` as JSON: NaN and infinity become null, unknown types their text."""
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
