"""Progress and events of long work, sent to listeners. The command line and notebooks show them; the library itself prints nothing.

Progress is a `Moment`: the current stage, its share of the whole, the total progress, and the time left. A workflow announces its stages
with their expected seconds (`plan`), as far as it knows them; the measured times of finished stages correct the rest. Events are records of
the standard logger "anybit" at level INFO: the message is the event's name, `record.fields` holds the measurements.
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

    stage   the name of the current stage; `begins` at its first moment
    place   its number and the number of stages; 0 of 0 without a plan
    share   its expected share of the whole, 0..1
    whole   total progress, 0..1; never falls
    item    the current item of the stage, such as a layer; done, total: of its items
    left    seconds left, or None if unknown
    best    the best result so far, in words
    reused  whether some of the stage was reused from an earlier run
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
"""Called with (event, fields) immediately; docs/command-line.md lists them."""
EVENTS = logging.getLogger("anybit")
DOUBT = 0.05
"""Share of the whole for which the expectation is used before measured times count."""

SEEN = 0.1
"""Share of a stage's items after which their measured pace counts."""


class Meter:
    """Track long work: the planned stages, the current one, and the measured times of finished ones."""

    def __init__(self, listener: Listener, clock: Callable[[], float] = time.monotonic):
        self._listener, self._clock = listener, clock
        self._plan: list[tuple[str, float]] = []
        self._at = 0
        self._stage = ""
        self._since = clock()
        self._spent = self._expected = 0.0  # measured and expected seconds of finished stages
        self._item, self._done, self._total, self._inside, self._reused = "", 0, 0, 0.0, 0.0
        self._whole, self._best = 0.0, ""
        self._measured: bool | None = False
        self._ground: tuple[float, float] | None = None  # when the stage first reported progress, and how far it was
        self._pace: float | None = None  # seconds per expected second, of an earlier stage

    def plan(self, stages: Sequence[tuple[str, float]], measured: bool | None) -> None:
        """Expect these seconds for all stages, in order; only their proportions if not `measured`, with a time left by the pace of the work
        if that is None. Stages that began keep their place."""
        self._plan, self._measured = [(name, max(seconds, 1e-6)) for name, seconds in stages], measured
        self._at = min(self._at, len(self._plan) - 1)
        self._spent = self._expected = 0.0 if measured else self._spent
        self._tell()

    def enter(self, stage: str) -> None:
        """Begin a stage: the next one with this name in the plan, which finishes all earlier ones."""
        if stage == self._stage:
            return
        self._leave()
        names = [name for name, _ in self._plan]
        if stage in names[self._at :]:
            self._at = names.index(stage, self._at)
        self._stage, self._item, self._done, self._total, self._inside, self._reused = stage, "", 0, 0, 0.0, 0.0
        self._ground = None
        self._tell(begins=True)

    def count(self, done: int, total: int, item: str = "") -> None:
        """Report how many items of the stage are done, and which is the current one."""
        self._done, self._total, self._item, self._inside = done, total, item, 0.0
        self._tell()

    def inside(self, part: float) -> None:
        """Report the progress of the current item, 0..1."""
        self._inside = part
        self._tell()

    def reuse(self) -> None:
        """Report that a result was reused, so that its time is no measure for the others'."""
        self._reused += 1 / max(self._total, 1)
        self._tell()

    def best(self, words: str) -> None:
        self._best = words
        self._tell()

    def _within(self) -> float:
        return min((self._done + self._inside) / self._total, 1.0) if self._total else self._inside

    def _seconds(self) -> float | None:
        """Return the seconds that the whole stage takes at its pace, without its start; None before it has shown one."""
        within, now = self._within(), self._clock()
        if self._ground is None and within > 0:
            self._ground = now, within
        if self._ground is None or within - self._reused < SEEN or within <= self._ground[1]:
            return None
        return (now - self._ground[0]) / (within - self._ground[1])

    def _left_by_pace(self) -> float | None:
        """Return the expected seconds left by the pace of this stage or, until it has one, of an earlier long one."""
        own, seconds = self._plan[self._at][1], self._seconds()
        pace = self._pace if seconds is None else seconds / own
        if pace is None or self._stage != self._plan[self._at][0]:
            return None
        return pace * (own * (1 - self._within()) + sum(later for _, later in self._plan[self._at + 1 :]))

    def _leave(self) -> None:
        now = self._clock()
        if self._plan and self._stage == self._plan[self._at][0]:
            own, seconds = self._plan[self._at][1], self._seconds()
            if seconds is not None and own >= SEEN * sum(one for _, one in self._plan):
                self._pace = seconds / own
            self._spent += now - self._since
            self._expected += self._plan[self._at][1] * max(1 - self._reused, 0.0)
        self._since = now

    def _left(self) -> float | None:
        """Return the expected seconds left: of this stage, from its finished items if there are any, and of later stages."""
        if self._plan and self._measured is None:
            return self._left_by_pace()
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


def plan(stages: Sequence[tuple[str, float]], measured: bool | None = True) -> None:
    """Expect (stage, seconds) of the work, in order; if not `measured`, only in proportion, without a time left (None: with one by the pace
    of the work)."""
    if meter := _meter.get():
        meter.plan(stages, measured)


def enter(stage: str) -> None:
    """Begin a stage."""
    if meter := _meter.get():
        meter.enter(stage)


def inside(done: float, total: int) -> None:
    """Report the progress of the current item."""
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
    """Update the meter from an event."""
    if event == "stage begins":
        meter.enter(fields["stage"])
    elif event == "recalled":
        meter.reuse()
    elif event == "scheme":
        meter.best(f"{fields['name']}: {fields['weight_bits']:.2f} bits, held-out loss {fields['measured']:.3g}")
    elif event == "step" and fields["kept"]:
        meter.best(f"{fields['step']}: held-out loss {fields['loss']:.3g}")


class EventHandler(logging.Handler):
    """Pass each event to a function, whose errors are raised at the place that reports the event; equal notes once."""

    def __init__(self, listener: EventListener):
        super().__init__()
        self.listener = listener
        self.notes: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        event, fields = record.getMessage(), getattr(record, "fields", {})
        if event == "note" and fields.get("note") in self.notes:  # of the data and again of the test data
            return
        self.notes.add(str(fields.get("note")))
        self.listener(event, fields)


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
