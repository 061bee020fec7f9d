"""Progress and events of long work, sent to whoever listens. The command line and notebooks show them; the library is silent.

Progress is a `Moment`: the stage at work, its share of the whole, how far the whole is, the time left. A workflow says what its stages are
expected to take (`plan`), in seconds as far as it knows; what the finished ones took corrects what is left. Events are records of the
standard logger "anybit" at level INFO: the message is the event's name, `record.fields` what was measured.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Moment:
    """A moment of long work.

    stage   the name of the stage at work; `begins` at its first moment
    place   its number and the number of stages; 0 of 0 without a plan
    share   its expected share of the whole, 0..1
    whole   how far the whole is, 0..1; never falls
    item    what of the stage is at work, such as a layer; done, total: of its items
    left    seconds that are left, as far as is known
    best    the best result so far, in words
    reused  whether some of the stage was taken up from an earlier run
    """

    stage: str
    begins: bool = False
    place: tuple[int, int] = (0, 0)
    share: float = 0.0
    whole: float = 0.0
    item: str = ""
    done: int = 0
    total: int = 0
    left: float | None = None
    best: str = ""
    reused: bool = False


Listener = Callable[[Moment], None]
EventListener = Callable[[str, Mapping[str, Any]], Any]
"""Called with (event, fields) as it happens; docs/command-line.md lists them."""
EVENTS = logging.getLogger("anybit")
DOUBT = 0.05
"""Share of the whole for which the expectation is believed before measured times count."""

SEEN = 0.1
"""Share of a stage's items after which their own pace counts."""


class Meter:
    """Where long work is: the planned stages, the one at work, and what the finished ones took."""

    def __init__(self, listener: Listener, clock: Callable[[], float] = time.monotonic):
        self._listener, self._clock = listener, clock
        self._plan: list[tuple[str, float]] = []
        self._at = 0
        self._stage = ""
        self._since = clock()
        self._spent = self._expected = 0.0  # seconds of finished stages, and those that were expected of what they computed
        self._item, self._done, self._total, self._inside, self._reused = "", 0, 0, 0.0, 0.0
        self._whole, self._best, self._measured = 0.0, "", False

    def plan(self, stages: Sequence[tuple[str, float]], measured: bool) -> None:
        """Expect these seconds of all stages, in order; not `measured`: in proportion alone. Stages begun keep their place."""
        self._plan, self._measured = [(name, max(seconds, 1e-6)) for name, seconds in stages], measured
        self._at = min(self._at, len(self._plan) - 1)
        self._spent = self._expected = 0.0 if measured else self._spent
        self._tell()

    def enter(self, stage: str) -> None:
        """Begin a stage: the next one of this name in the plan, which finishes all before it."""
        if stage == self._stage:
            return
        self._leave()
        names = [name for name, _ in self._plan]
        if stage in names[self._at :]:
            self._at = names.index(stage, self._at)
        self._stage, self._item, self._done, self._total, self._inside, self._reused = stage, "", 0, 0, 0.0, 0.0
        self._tell(begins=True)

    def count(self, done: int, total: int, item: str = "") -> None:
        """Say how many items of the stage are done, and which is at work."""
        self._done, self._total, self._item, self._inside = done, total, item, 0.0
        self._tell()

    def inside(self, part: float) -> None:
        """Say how far the item at work is, 0..1."""
        self._inside = part
        self._tell()

    def reuse(self) -> None:
        """Say that a result was taken up: its time tells nothing of the others'."""
        self._reused += 1 / max(self._total, 1)
        self._tell()

    def best(self, words: str) -> None:
        self._best = words
        self._tell()

    def _within(self) -> float:
        return min((self._done + self._inside) / self._total, 1.0) if self._total else self._inside

    def _leave(self) -> None:
        now = self._clock()
        if self._plan and self._stage == self._plan[self._at][0]:
            self._spent += now - self._since
            self._expected += self._plan[self._at][1] * max(1 - self._reused, 0.0)
        self._since = now

    def _left(self) -> float | None:
        """Return the seconds that are expected to be left: of this stage, from its own items where some are done, and of those after it."""
        if not self._plan or not self._measured:
            return None
        spent, expected, doubt = self._spent, self._expected, DOUBT * sum(seconds for _, seconds in self._plan)
        own, within, seconds = self._plan[self._at][1], self._within(), self._clock() - self._since
        computed = within - self._reused
        if computed > SEEN:
            spent, expected = spent + seconds, expected + own * computed
        factor = (spent + doubt) / (expected + doubt)
        here = seconds / computed * (1 - within) if computed > SEEN else max(factor * own * (1 - within) - seconds * (not self._total), 0.0)
        return here + factor * sum(seconds for _, seconds in self._plan[self._at + 1 :])

    def _tell(self, begins: bool = False) -> None:
        whole = share = 0.0
        place = (0, 0)
        if self._plan:
            total = sum(seconds for _, seconds in self._plan)
            before = sum(seconds for _, seconds in self._plan[: self._at])
            here = self._plan[self._at][1] if self._stage == self._plan[self._at][0] else 0.0
            whole, share, place = (before + here * self._within()) / total, here / total, (self._at + 1, len(self._plan))
        self._whole = max(self._whole, whole)
        items = self._item, self._done, self._total
        self._listener(Moment(self._stage, begins, place, share, self._whole, *items, self._left(), self._best, self._reused > 0))


_meter: ContextVar[Meter | None] = ContextVar("meter", default=None)


def plan(stages: Sequence[tuple[str, float]], measured: bool = True) -> None:
    """Expect (stage, seconds) of the work, in order; not `measured`: seconds in proportion alone, from which no time left follows."""
    if meter := _meter.get():
        meter.plan(stages, measured)


def enter(stage: str) -> None:
    """Begin a stage."""
    if meter := _meter.get():
        meter.enter(stage)


def inside(done: int, total: int) -> None:
    """Say how far the item at work is."""
    if meter := _meter.get():
        meter.inside(done / total)


def is_watched() -> bool:
    """Return whether somebody listens to progress."""
    return _meter.get() is not None


def track(items: Collection[Item], stage: str, name: Callable[[Item], str] = lambda item: "") -> Iterator[Item]:
    """Yield the items of a stage, reporting each by `name` when it starts and when it is done."""
    meter = _meter.get()
    if meter:
        meter.enter(stage)
    for done, item in enumerate(items):
        if meter:
            meter.count(done, len(items), name(item))
        yield item
    if meter and items:
        meter.count(len(items), len(items))


def tell(event: str, /, **fields: Any) -> None:
    """Report an event with its measurements. A `note` among its fields is a line that is always shown."""
    if meter := _meter.get():
        _read(meter, event, fields)
    EVENTS.info(event, extra={"fields": fields})


def _read(meter: Meter, event: str, fields: Mapping[str, Any]) -> None:
    """Take what an event says of progress."""
    if event == "stage begins":
        meter.enter(fields["stage"])
    elif event == "recalled":
        meter.reuse()
    elif event == "scheme":
        meter.best(f"{fields['name']}: {fields['weight_bits']:.2f} bits, held-out loss {fields['measured']:.3g}")
    elif event == "step" and fields["kept"]:
        meter.best(f"{fields['step']}: held-out loss {fields['loss']:.3g}")


class EventHandler(logging.Handler):
    """Pass each event to a function, whose errors are raised where the event is reported."""

    def __init__(self, listener: EventListener):
        super().__init__()
        self.listener = listener

    def emit(self, record: logging.LogRecord) -> None:
        self.listener(record.getMessage(), getattr(record, "fields", {}))


@contextmanager
def listening(listener: Listener | None = None, events: EventListener | None = None) -> Iterator[None]:
    """Send progress to `listener`, and events to `events`, inside the block."""
    token = _meter.set(Meter(listener) if listener else None)
    level, handler = EVENTS.level, EventHandler(events) if events else logging.NullHandler()
    EVENTS.addHandler(handler)
    EVENTS.setLevel(logging.INFO)
    try:
        yield
    finally:
        EVENTS.removeHandler(handler)
        EVENTS.setLevel(level)
        _meter.reset(token)
