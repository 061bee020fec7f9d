"""The charts of a page, from records: sizes against losses and scores, bits along a network, steps, epochs, a search."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Literal, NamedTuple

from anybit.reports.charts import (
    DASHES,
    SHAPES,
    Axis,
    Box,
    Chart,
    Point,
    Series,
    linear_axis,
    loss_axis,
    names_axis,
    percent_axis,
    short,
    upside_down,
)
from anybit.reports.words import SCORE_WORDS, human_bytes, human_count, scheme_in_words
from anybit.reports.words import measurement as number
from anybit.runs.records import Epoch, LayerRow, Record, SchemeRow, SearchRecord, Table

FLOAT_HEIGHT = 9  # place of float on an axis of 2 to 8 bits
QUANTITIES = {"bits": "bits per weight", "bytes": "bytes of the file", "bops": "bit operations per sample", "latency": "seconds per sample"}
MOST_EPOCHS = 10  # labelled on an axis
MOST_NAMED = 20_000  # precisions of evaluated subnets shown with their layers' names
MOST_EPOCH_MARKS = 40  # epochs marked one by one on a line
MOST_DIAMONDS = 60  # layers whose inputs are marked with a diamond
HEIGHT = 320
MOST_MARKS = 100  # steps of a frontier marked one by one
BITS = Axis("bits", 0, FLOAT_HEIGHT + 0.3, [*((bits, str(bits)) for bits in (0, 2, 4, 6, 8)), (FLOAT_HEIGHT, "float")])
ORIGINS = {
    "uniform": ("uniform", "diamond", False),
    "drawn": ("drawn", "circle", True),
    "sensitivity": ("one layer changed", "x", True),
    "searched": ("searched", "circle", False),
    "allocated": ("allocated", "square", False),
}
"""Origin of an evaluated subnet -> its name, its shape, and whether that is open."""


# Sizes against losses and scores


def loss_over_size(record: Record) -> Chart:
    """Draw the frontier, the uniform and the allocated schemes, predicted (open) and measured (filled), and the final result."""
    uniform, allocated = _by_kind(record.schemes)
    series = []
    if record.table is not None:
        sums = {name: record.table.sums(scheme) for name, scheme in record.table.uniforms().items()}
        series.append(frontier_line(record.table, "best for its size, predicted", 0))
        series.append(_marks("uniform, predicted", 5, "diamond", [(*point, name) for name, point in sums.items()], is_open=True))
    series += [
        _marks("uniform, measured", 5, "diamond", [(row.bytes, row.measured, in_words(row)) for row in uniform]),
        _marks("allocated, predicted", 0, "square", [(row.bytes, row.predicted, in_words(row)) for row in allocated], is_open=True),
        _marks("allocated, measured", 0, "square", [(row.bytes, row.measured, in_words(row)) for row in allocated]),
    ]
    if record.chosen is not None:
        series.append(_marks("chosen, measured", 1, "ring", [(record.chosen.bytes, record.chosen.measured, in_words(record.chosen))]))
    if record.result is not None:
        series.append(_marks("this run, after its last step", 1, "star", [(record.result.bytes, record.final_loss, "this run")]))
    label = "Loss on held-out inputs by file size: predicted frontier, uniform schemes, allocated schemes, the chosen one."
    return _over_size("losses", label, series, loss_axis, "loss on held-out inputs")


def accuracy_over_size(record: Record, score: str, words: str) -> Chart:
    """Draw the schemes' scores on held-out inputs, the final one's among them, beside the float network's."""
    uniform, allocated = _by_kind(record.schemes)
    series = [
        _marks("uniform", 5, "diamond", [(row.bytes, getattr(row, score), in_words(row)) for row in uniform]),
        _marks("allocated", 0, "square", [(row.bytes, getattr(row, score), in_words(row)) for row in allocated]),
    ]
    if record.result is not None:
        series.append(_marks("this run", 1, "star", [(record.result.bytes, record.final_score(score), "this run")]))
    series += _level(series, record.float_held_out.get(score), "float network")
    label = f"{words} on held-out inputs over the size of the file: every scheme that was measured, this run, and the float network."
    return _over_size("accuracies", label, series, score_axis(score), f"{words} on held-out inputs")


def losses_side_by_side(records: Mapping[str, Record]) -> Chart:
    """Draw a line and two shapes per run: its predicted frontier, the measured schemes, the final result."""
    series, drawn = [], []
    for index, (name, record) in enumerate(records.items()):
        shape = SHAPES[index % len(SHAPES)]
        if record.table is not None and record.table not in drawn:
            drawn.append(record.table)
            series.append(frontier_line(record.table, f"{short(name)}: predicted best", index))
        measured = [(row.bytes, row.measured, f"{name}, {in_words(row)}") for row in record.schemes]
        series.append(_marks(f"{short(name)}: measured", index, shape, measured, is_open=True))
        if record.result is not None:
            series.append(_marks(f"{short(name)}: result", index, shape, [(record.result.bytes, record.final_loss, name)]))
    label = "Loss on held-out inputs by file size, with a line and two shapes per run."
    return _over_size("losses", label, series, loss_axis, "loss on held-out inputs")


def tests_side_by_side(records: Mapping[str, Record], score: str, words: str) -> Chart:
    """Draw every run's test score by file size; for a supernet, each uniform subnet."""
    series = [
        _marks(short(name), index, SHAPES[index % len(SHAPES)], tested_points(name, record, score))
        for index, (name, record) in enumerate(records.items())
    ]
    floats = {record.float_test.get(score) for record in records.values()} - {None}
    series += _level(series, floats.pop(), "float network") if len(floats) == 1 else []
    label = f"{words} on test data over the size of the file, a shape for each run."
    return _over_size("tests", label, series, score_axis(score), f"{words} on test data")


def tested_points(name: str, record: Record, score: str) -> list[tuple[int, float, str]]:
    """List (bytes, score, words) of a run's tests."""
    if record.result is not None:
        points = [(record.result.bytes, record.tested(score), name)]
    else:
        points = [(amounts.bytes, record.tested(score, subnet), f"{name}, {subnet}") for subnet, amounts in record.subnets.items()]
    return [(size, value, words) for size, value, words in points if value is not None]


def frontier_line(table: Table, name: str, index: int) -> Series:
    """Draw the best predicted scheme of every size."""
    frontier = table.frontier
    ends = [(frontier.cost, frontier.loss), *((step.cost, step.loss) for step in frontier.steps)]
    points = [(table.fixed_bytes + cost, table.floor + loss, "") for cost, loss in ends]
    shape = "dot" if len(points) <= MOST_MARKS else None
    return Series(name, index, _points(points), shape, dash=DASHES[index % len(DASHES)])


def in_words(row: SchemeRow) -> str:
    return f"{row.name}, {row.weight_bits:.2f} bits per weight"


def _by_kind(rows: Iterable[SchemeRow]) -> tuple[list[SchemeRow], list[SchemeRow]]:
    """Separate uniform from allocated schemes."""
    rows = list(rows)
    return [row for row in rows if row.name.startswith("uniform")], [row for row in rows if not row.name.startswith("uniform")]


def _over_size(key: str, label: str, series: Iterable[Series], axis: Callable[..., Axis], title: str) -> Chart:
    series = [_with_values(one, human_bytes) for one in _drawn(series)]
    sizes, values = linear_axis("size of the file", _values(series, "x"), _size), axis(title, _values(series, "y"))
    return Chart(key, label, sizes, values, series, HEIGHT)


def score_axis(score: str) -> Callable[..., Axis]:
    """Return the axis of a score: percentages end at 100, and are not spread wider than a point."""
    return percent_axis if score == "top1" else linear_axis


def _values(series: Iterable[Series], place: Literal["x", "y"]) -> list[float | None]:
    return [getattr(point, place) for one in series for point in one.points]


def _with_values(series: Series, write: Callable[[float], str]) -> Series:
    """Add each point's coordinates to its words."""
    points = [(x, y, ", ".join(filter(None, (words, write(x), number(y))))) for x, y, words in series.points]
    return replace(series, points=_points(points))


def _size(value: float) -> str:
    """Write a size for an axis, as short as possible."""
    words = human_count(round(value))
    return f"{words}B" if " " in words else f"{words} B"


def _level(series: Iterable[Series], value: float | None, name: str) -> list[Series]:
    """Draw a horizontal line as long as the series are wide."""
    sizes = [point.x for one in series for point in one.points]
    if value is None or not sizes:
        return []
    return [Series(name, None, _points([(min(sizes), value, name), (max(sizes), value, name)]), dash="dash")]


# Layers


def bits_along_network(records: Mapping[str, Record]) -> Chart:
    """Draw the bits of each layer's weights and input in the network's order: bars and diamonds of one run, lines of several."""
    names = list(dict.fromkeys(name for record in records.values() for name in record.layers))
    series = _bits_of_one(names, *records.values()) if len(records) == 1 else _bits_of_several(names, records)
    label = "Bits of every layer's weights and input, in the network's order."
    return Chart("bits", label, names_axis(names), BITS, series, 200)


def _bits_of_one(names: Sequence[str], record: Record) -> list[Series]:
    heights = [_weight_height(record.layers[name]) for name in names]
    words = [f"{name}: {record.layers[name].precision}" for name in names]
    bars = [
        Box((at - 0.4, at + 0.4), (0, height), words[at], level=level_of(record.layers[names[at]].precision.weight_bits))
        for at, height in enumerate(heights)
        if height is not None
    ]
    inputs = [_height(record.layers[name].precision.activation_bits) for name in names]
    points = list(zip(range(len(names)), inputs, words, strict=True))
    return [Series("weights", 0, boxes=bars), Series("inputs", None, _points(points), "diamond" if len(names) <= MOST_DIAMONDS else "dot")]


def _bits_of_several(names: Sequence[str], records: Mapping[str, Record]) -> list[Series]:
    series = []
    for index, (run, record) in enumerate(records.items()):
        points = [
            (at, _weight_height(record.layers[name]), f"{run}, {name}: {record.layers[name].precision}")
            if name in record.layers
            else (at, None, "")
            for at, name in enumerate(names)
        ]
        series.append(_line(f"{short(run)}: weights", index, points))
    return _drawn(series)


def _weight_height(layer: LayerRow) -> int | None:
    return _height(layer.precision.weight_bits) if layer.weights or layer.precision.weight_bits else None


def level_of(bits: int | None) -> str:
    """Return the name of the colour for this many bits."""
    return "float" if bits is None else str(bits)


def _height(bits: int | None) -> int:
    return FLOAT_HEIGHT if bits is None else bits


# Steps, epochs, searches


def ladder(record: Record) -> Chart:
    """Draw the held-out loss after each step, with the kept steps joined."""
    steps = list(enumerate(record.ladder))
    series = [
        _line("kept", 0, [(at, row.loss, f"{row.step}: {number(row.loss)}") for at, row in steps if row.kept], dash="solid"),
        _marks("not kept", 1, "x", [(at, row.loss, f"{row.step}: {number(row.loss)}") for at, row in steps if not row.kept]),
    ]
    losses = loss_axis("loss on held-out inputs", [row.loss for row in record.ladder])
    return Chart("ladder", "Held-out loss after each step.", names_axis([row.step for row in record.ladder]), losses, _drawn(series), 220)


def searched(search: SearchRecord) -> Chart:
    """Draw every evaluated subnet over its cost, the front, and the front measured again; pointing at a subnet shows its scheme.

    With very many subnets, precisions are shown without the layers' names, in the network's order, to limit the size of the page.
    """
    is_small = sum(len(row.scheme) for row in search.evaluated) <= MOST_NAMED
    in_short = scheme_in_words if is_small else lambda scheme: " ".join(map(str, scheme.values()))
    series = []
    for index, (origin, (name, shape, is_open)) in enumerate(ORIGINS.items()):
        rows = [row for row in search.evaluated if row.origin == origin]
        series.append(_marks(name, index, shape, [(row.cost, row.score, in_short(row.scheme)) for row in rows], is_open=is_open))
    front = [(row.cost, row.score, scheme_in_words(row.scheme)) for row in search.front]
    again = [(row.cost, row.measured, scheme_in_words(row.scheme)) for row in search.front]
    series.append(Series("front", None, _points(_stairs(front)), dash="solid"))
    series.append(Series("front, measured on other inputs", None, _points(again), "circle", is_open=True, dash="dot"))
    series = [_with_values(one, number) for one in _drawn(series)]
    quantity, words = QUANTITIES.get(search.quantity, search.quantity), SCORE_WORDS.get(search.score, search.score)
    costs, scores = linear_axis(quantity, _values(series, "x")), score_axis(search.score)(words, _values(series, "y"))
    return Chart("search", f"{words} over {quantity} of every evaluated subnet, and the front.", costs, scores, series, HEIGHT)


def _stairs(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Repeat each value up to the next one's place."""
    held = [[before, (after[0], before[1], before[2])] for before, after in pairwise(points)]
    return [corner for corners in held for corner in corners] + list(points[-1:])


def bits_over_epochs(epochs: Sequence[Epoch]) -> Chart:
    """Draw the bits of every layer after each epoch, as one box per stretch of equal bits."""
    names = list(epochs[-1].layers)
    boxes = [_box(at, name, stretch) for at, name in enumerate(names) for stretch in stretches(name, epochs)]
    label = "Bits of every layer after each epoch."
    return Chart(
        "epoch-bits", label, _epoch_axis(epochs), upside_down(names_axis(names)), [Series("bits", 0, boxes=boxes)], 24 * len(names)
    )


class Stretch(NamedTuple):
    """Consecutive epochs of equal bits: positions and numbers of the first and the last."""

    start: int
    end: int
    first: int
    last: int
    bits: int | None

    @property
    def text(self) -> str:
        return "float" if self.bits is None else str(self.bits)


def stretches(name: str, epochs: Sequence[Epoch]) -> Iterable[Stretch]:
    """Yield the stretches over which a layer's bits stay the same."""
    for bits, rows in groupby(enumerate(epochs), key=lambda row: row[1].layers.get(name)):
        places, same = zip(*rows, strict=True)
        yield Stretch(places[0], places[-1], same[0].epoch, same[-1].epoch, bits)


def _box(at: int, name: str, stretch: Stretch) -> Box:
    words = f"{name}, epochs {stretch.first} to {stretch.last}: {stretch.text}"
    place = (stretch.start - 0.5, stretch.end + 0.5), (at - 0.47, at + 0.47)
    return Box(*place, words, text=stretch.text, level=stretch.text)


def mean_bits_over_epochs(epochs: Sequence[Epoch], budget: str | None) -> Chart:
    """Draw the network's bits per weight."""
    line = _line(
        "bits per weight", 0, [(at, row.weight_bits, f"epoch {row.epoch}: {number(row.weight_bits)}") for at, row in enumerate(epochs)]
    )
    return _over_epochs("mean-bits", f"Bits per weight by epoch; budget {budget or 'none'}.", epochs, [line], "bits per weight")


def scores_over_epochs(epochs: Sequence[Epoch], score: str) -> Chart:
    """Draw a score as the network trains (soft) and as it would be saved (frozen)."""
    series = []
    for index, (kind, name) in enumerate({"soft": "as it trains", "frozen": "as it would be saved"}.items()):
        values = [getattr(row, kind).get(score) for row in epochs]
        points = [(at, value, f"epoch {row.epoch}: {number(value)}") for at, (row, value) in enumerate(zip(epochs, values, strict=True))]
        series.append(_line(name, index, points))
    words = SCORE_WORDS.get(score, score)
    return _over_epochs(
        "scores", f"{words} by epoch, as the network trains and as it would be saved.", epochs, series, words, score_axis(score)
    )


def _over_epochs(
    key: str, label: str, epochs: Sequence[Epoch], series: Iterable[Series], title: str, axis: Callable[..., Axis] = linear_axis
) -> Chart:
    series = [one if len(epochs) <= MOST_EPOCH_MARKS else replace(one, shape=None) for one in _drawn(series)]
    return Chart(key, label, _epoch_axis(epochs), axis(title, _values(series, "y")), series, 220)


def _epoch_axis(epochs: Sequence[Epoch]) -> Axis:
    """Place epochs at 0, 1, 2, ... by their order."""
    every = -(-len(epochs) // MOST_EPOCHS)
    return Axis("epoch", -0.5, len(epochs) - 0.5, [(at, str(row.epoch)) for at, row in enumerate(epochs) if at % every == 0])


# Series


def _points(points: Iterable[tuple[float, float | None, str]]) -> list[Point]:
    return [Point(*point) for point in points]


def _marks(name: str, colour: int, shape: str, points: Iterable[tuple[float, float | None, str]], is_open: bool = False) -> Series:
    return Series(name, colour, [point for point in _points(points) if point.y is not None], shape, is_open)


def _line(name: str, index: int, points: Iterable[tuple[float, float | None, str]], dash: str | None = None) -> Series:
    return Series(name, index, _points(points), SHAPES[index % len(SHAPES)], dash=dash or DASHES[index % len(DASHES)])


def _drawn(series: Iterable[Series]) -> list[Series]:
    """Leave out empty series, which would still appear in the legend."""
    return [one for one in series if one.boxes or any(point.y is not None for point in one.points)]
