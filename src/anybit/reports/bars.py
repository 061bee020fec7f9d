"""Show progress: bars with the time left on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


@contextmanager
def shown_progress(bars: bool) -> Iterator[tuple[Callable[[str, int, int], None] | None, Callable[[str], None]]]:
    """Return (a listener that shows progress, if it is to be shown; a function that shows a line): bars with time left on a terminal, plain
    lines elsewhere.

    All on stderr: stdout is for results.
    """
    if not bars or not sys.stderr.isatty():
        yield _line_listener() if bars else None, partial(print, file=sys.stderr)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as shown:
        yield _bar_listener(shown), partial(shown.console.print, markup=False, highlight=False)


def _bar_listener(bars) -> Callable[[str, int, int], None]:
    current: dict[str, Any] = {}

    def show(what: str, done: int, total: int) -> None:
        if done == 0:
            current[what] = bars.add_task(what, total=total)
        bars.update(current[what], completed=done)

    return show


def _line_listener() -> Callable[[str, int, int], None]:
    started: dict[str, float] = {}

    def show(what: str, done: int, total: int) -> None:
        if done == 0:
            started[what] = time.monotonic()
            print(f"{what}: {total} steps", file=sys.stderr)
        elif done == total or (10 * done // total) > (10 * (done - 1) // total):
            passed = time.monotonic() - started[what]
            print(f"{what}: {done}/{total}, {passed:.0f} s, {passed / done * (total - done):.0f} s left", file=sys.stderr)

    return show
