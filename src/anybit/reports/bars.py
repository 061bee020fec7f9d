"""Show progress: in a terminal or notebook, a bar over the whole work, the current stage and the time left; elsewhere a line per stage."""

import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from anybit.calls import public
from anybit.progress import Listener, Moment, is_watched, listening
from anybit.reports.words import duration
from anybit.wording import in_python

Function = TypeVar("Function", bound=Callable[..., Any])
WIDTH = 24
"""Width of the bar in characters."""


@contextmanager
def shown_progress(bars: bool) -> Iterator[tuple[Listener | None, Callable[[str], None]]]:
    """Yield (a listener that shows progress, or None; a function that shows a line).

    Everything goes to stderr, since stdout is for results.
    """
    if not bars or not (sys.stderr.isatty() or in_notebook()):
        yield _line_listener() if bars else None, partial(print, file=sys.stderr)
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=not in_notebook())
    started, last = time.monotonic(), [Moment("starting")]
    with Live(get_renderable=lambda: _bar(last[0], time.monotonic() - started), console=console, refresh_per_second=4, transient=True):

        def show(moment: Moment) -> None:
            last[0] = moment

        yield show, partial(console.print, markup=False, highlight=False)


@public
@contextmanager
def show_progress() -> Iterator[None]:
    """Show the progress of the calls inside the block: `with anybit.show_progress(): anybit.calibrate(...)`. Notebooks always show it."""
    with shown_progress(bars=True) as (listener, show):

        def note(event: str, fields: Any) -> None:
            if "note" in fields:
                show(in_python(fields["note"]))

        with listening(listener, note):
            yield


def shown_in_notebooks(function: Function) -> Function:
    """Decorate a function whose progress a notebook shows."""

    @functools.wraps(function)
    def called(*arguments: Any, **keywords: Any) -> Any:
        if is_watched() or not in_notebook():
            return function(*arguments, **keywords)
        with show_progress():
            return function(*arguments, **keywords)

    return called  # type: ignore[return-value]


def in_notebook() -> bool:
    """Return whether the code runs in the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def stage_in_words(moment: Moment) -> str:
    """Write the stage with its place and its share of the whole: "5/9 sensitivity (28 % of the work)"."""
    place = f"{moment.place[0]}/{moment.place[1]} " if moment.place[1] else ""
    share = f" ({100 * moment.share:.0f} % of the work)" if moment.share >= 0.005 else ""
    return f"{place}{moment.stage}{share}{', reused' if moment.reused else ''}"


def _bar(moment: Moment, passed: float) -> Any:
    """Return two or three lines: the bar; the current stage and item; the best result so far."""
    from rich.text import Text

    filled = round(WIDTH * moment.whole)
    left = f", {duration(moment.left)} left" if moment.left is not None else ""
    bar = f"{'━' * filled}{'╺' if filled < WIDTH else ''}".ljust(WIDTH)
    lines = [f"{bar} {100 * moment.whole:3.0f} %  {duration(passed)}{left}"]
    items = f"  {min(moment.done + 1, moment.total)} of {moment.total}" if moment.total else ""
    lines.append(f"{stage_in_words(moment)}{items}{'  ' if moment.item else ''}{moment.item}")
    if moment.best:
        lines.append(f"best so far: {moment.best}")
    return Text("\n".join(lines), no_wrap=True, overflow="ellipsis")


def _line_listener() -> Listener:
    started = time.monotonic()

    def show(moment: Moment) -> None:
        if moment.begins:
            left = f", {duration(moment.left)} left" if moment.left is not None else ""
            print(f"{100 * moment.whole:3.0f} %  {stage_in_words(moment)}: {duration(time.monotonic() - started)}{left}", file=sys.stderr)

    return show
