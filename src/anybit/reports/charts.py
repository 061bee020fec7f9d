"""Charts as places on an area: axes that fit their data, and series of lines, marks and boxes. `chart.html.j2` draws them.

Drawn here as SVG rather than by a chart library: the available ones put 1 to 5 MB of script into each page, or start a JavaScript engine in
the process that trains. Every place is in percent of the area, so that a chart is as wide as its page without a script. Shapes and dashes
repeat the information of colours.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from anybit.reports.words import powers

COLOURS = 6
SHAPES = ("circle", "square", "diamond", "triangle", "x", "cross", "wedge")  # one more than colours, which gives 42 pairs
DASHES = ("solid", "dash", "dot", "dash-dot", "long", "long-dot")
MOST_TICKS = 6
MOST_NAMES = 30
LONGEST = 24  # letters of a name on an axis; tooltips and tables have all of it
MARGIN = 0.04
"""Margin at each end of an axis, as a share."""
LARGEST = 1e300
"""Values are clipped to this, since a foreign report may contain any number."""


@dataclass(frozen=True)
class Axis:
    """The values at an axis's two ends, and its ticks."""

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]] = ()
    is_log: bool = False
    is_named: bool = False

    def place(self, value: float) -> float:
        """Return the position of `value` between `low` and `high`, in percent."""
        low, high, at = (math.log10(one) if self.is_log else one for one in (self.low, self.high, value))
        return round(100 * (at - low) / (high - low), 2)

    @property
    def scale(self) -> str:
        """The two ends, and whether the axis is logarithmic, for the script."""
        return f"{self.low!r},{self.high!r}{',log' if self.is_log else ''}"

    def can_show(self, value: float | None) -> bool:
        return value is not None and (value > 0 or not self.is_log)


class Point(NamedTuple):
    x: float
    y: float | None
    words: str


class Box(NamedTuple):
    """A rectangle between two corners; `text` is its label. Each `level` of bits has a colour."""

    x: tuple[float, float]
    y: tuple[float, float]
    words: str
    text: str = ""
    level: str = ""


@dataclass(frozen=True)
class Series:
    """One entry of the legend: marks (if it has a shape), a line through them (if it has a dash), boxes."""

    name: str
    colour: int | None = None
    points: Sequence[Point] = ()
    shape: str | None = None
    is_open: bool = False
    dash: str | None = None
    boxes: Sequence[Box] = ()

    @property
    def classes(self) -> str:
        of = "ink" if self.colour is None else f"series-{self.colour % COLOURS + 1}"
        return f"{of} open" if self.is_open else of


@dataclass(frozen=True)
class Chart:
    key: str
    label: str
    x: Axis
    y: Axis
    series: Sequence[Series] = ()
    height: int = 380

    @property
    def legend(self) -> list[Series]:
        """Return the series to explain: open marks are left out if the same marks also occur filled."""
        filled = {series.name.partition(", ")[0] for series in self.series if not series.is_open}
        return [one for one in self.series if not (one.is_open and not one.dash and one.name.partition(", ")[0] in filled)]

    def marks(self, series: Series) -> Iterator[tuple[float, float, str]]:
        """Yield (left, top, words) of each mark."""
        for point in self._shown(series.points):
            if point is not None:
                yield *self._place(point), point.words

    def lines(self, series: Series) -> Iterator[str]:
        """Yield the points of each piece of the line, which breaks where a value was not measured."""
        piece: list[str] = []
        for point in (*self._shown(series.points), None):
            if point is not None:
                piece.append(",".join(f"{place:g}" for place in self._place(point)))
            elif len(piece) > 1:
                yield " ".join(piece)
            if point is None:
                piece = []

    def boxes(self, series: Series) -> Iterator[tuple[float, float, float, float, Box]]:
        """Yield (left, top, width, height, box) of each box."""
        for box in series.boxes:
            (left, right), (top, bottom) = (sorted(places) for places in zip(*map(self._place_of, box.x, box.y), strict=True))
            yield left, top, round(right - left, 2), round(bottom - top, 2), box

    def _shown(self, points: Iterable[Point]) -> Iterator[Point | None]:
        return (point if self.y.can_show(point.y) and self.x.can_show(point.x) else None for point in points)

    def _place(self, point: Point) -> tuple[float, float]:
        assert point.y is not None, "an axis shows no value that was not measured"
        return self._place_of(point.x, point.y)

    def _place_of(self, x: float, y: float) -> tuple[float, float]:
        return self.x.place(x), round(100 - self.y.place(y), 2)


# Axes


def linear_axis(title: str, values: Iterable[float | None], write: Callable[[float], str] = lambda value: powers(f"{value:.10g}")) -> Axis:
    """Fit an axis to values; a single value is centred."""
    low, high = _extent(values)
    step = _round_step((high - low) / (MOST_TICKS - 1))
    ticks = [count * step for count in range(math.ceil(low / step), math.floor(high / step) + 1)]
    free = MARGIN * (high - low)
    return Axis(title, low - free, high + free, [(tick, write(tick)) for tick in ticks])


def percent_axis(title: str, values: Iterable[float | None]) -> Axis:
    """Fit an axis to percentages: it is at least a point wide and ends at 100."""
    numbers = _clipped(values)
    low, high = min(numbers), max(numbers)
    ends = (low, high) if high - low >= 1 else ((low + high) / 2 - 0.5, (low + high) / 2 + 0.5)
    fitted = linear_axis(f"{title}, %", ends)
    if high > 100:
        return fitted
    end = min(fitted.high, 100.0 + MARGIN * (fitted.high - fitted.low))
    return replace(fitted, high=end, ticks=[tick for tick in fitted.ticks if tick[0] <= 100])


def _clipped(values: Iterable[float | None]) -> list[float]:
    return [float(min(max(value, -LARGEST), LARGEST)) for value in values if value is not None] or [0.0]


def _extent(values: Iterable[float | None]) -> tuple[float, float]:
    numbers = _clipped(values)
    low, high = min(numbers), max(numbers)
    if high - low > max(1e-9 * max(abs(low), abs(high)), 1e-200):
        return low, high
    spread = abs(low) / 20 if abs(low) > 1e-200 else 1.0
    return low - spread, high + spread


def _round_step(least: float) -> float:
    """Return the smallest of 1, 2, 5, 10, 20, 50, ... times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next((factor * power for factor in (1, 2, 5) if factor * power >= least), 10 * power)


def loss_axis(title: str, values: Iterable[float | None]) -> Axis:
    """Fit an axis to losses: logarithmic if the positive ones span a wide range. Others are then only in the tables."""
    numbers = [value for value in values if value is not None]
    positive = [value for value in numbers if value > 0]
    if not positive or max(positive) / 20 <= min(positive):
        return linear_axis(title, numbers)
    low, high = math.log10(min(positive)), math.log10(max(positive))
    every = math.ceil((high - low) / MOST_TICKS)
    factors = (1, 2, 5) if high - low < 2 else (1,)
    ticks = [factor * 10.0**power for power in range(math.floor(low), math.floor(high) + 1, every) for factor in factors]
    free = MARGIN * (high - low)
    shown = [(tick, powers(f"{tick:g}")) for tick in ticks if tick > 0 and low <= math.log10(tick) <= high]
    return Axis(title, 10 ** max(low - free, -323), 10 ** min(high + free, 308), shown, is_log=True)


def names_axis(names: Sequence[str], title: str = "") -> Axis:
    """Place names at 0, 1, 2, ...: they may be long, begin alike, or repeat."""
    every = -(-len(names) // MOST_NAMES) or 1
    ticks = [(place, short(names[place])) for place in range(0, len(names), every)]
    return Axis(title, -0.5, max(len(names), 1) - 0.5, ticks, is_named=True)


def upside_down(axis: Axis) -> Axis:
    """Reverse an axis, so that the first entry of a list is on top."""
    return replace(axis, low=axis.high, high=axis.low)


def short(name: str) -> str:
    """Shorten a long name to its end, where layers and runs differ."""
    return name if len(name) <= LONGEST else "…" + name[1 - LONGEST :]
