"""Plots of records, as plain plotly JSON: {"data": ..., "layout": ...}.

Colours are CSS variables, which the page's script resolves: one figure serves light and dark. What a colour says, a shape or a dash says
too. Names are written as plotly reads them, with entities in place of markup.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from anybit.runs.records import Epoch, Record, SchemeRow, SearchRecord
from anybit.scheme import Precision

Figure = dict[str, Any]

COLOURS = 6
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "triangle-down")  # one more than colours: 42 pairs
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
FLOAT_HEIGHT = 9  # where float stands on an axis of 2 to 8 bits
EPOCHS = {"title": {"text": "epoch"}, "tickformat": "d"}
LONGEST = 24  # letters of a name on an axis; hovering and the tables tell all of it


def colour(index: int) -> str:
    return f"var(--series-{index % COLOURS + 1})"


def loss_over_size(record: Record) -> Figure:
    """The frontier, uniform and allocated schemes, predicted (open) and measured (filled), and where the chosen one ended."""
    traces = []
    if record.table is not None:
        traces.append(frontier_line(record, "best for its size, predicted", 0))
        uniforms = {name: record.table.sums(scheme) for name, scheme in record.table.uniforms().items()}
        points = [(size, loss, name) for name, (size, loss) in uniforms.items()]
        traces.append(_markers(points, "uniform, predicted", "diamond-open", colour(5)))
    by_kind = {"allocated": [], "uniform": []}
    for row in record.schemes:
        by_kind["uniform" if row.name.startswith("uniform") else "allocated"].append(row)
    for kind, symbol, of in (("uniform", "diamond", 5), ("allocated", "square", 0)):
        measured = [(row.bytes, row.measured, told(row)) for row in by_kind[kind] if row.measured is not None]
        traces.append(_markers(measured, f"{kind}, measured", symbol, colour(of)))
        if kind == "allocated":
            predicted = [(row.bytes, row.predicted, told(row)) for row in by_kind[kind]]
            traces.append(_markers(predicted, "allocated, predicted", "square-open", colour(0)))
    if record.chosen is not None and record.chosen.measured is not None:
        point = (record.chosen.bytes, record.chosen.measured, told(record.chosen))
        traces.append(_markers([point], "chosen, measured", "circle-open", colour(1), 20))
    if record.final_loss is not None and record.result is not None:
        point = (record.result.bytes, record.final_loss, "after polishing")
        traces.append(_markers([point], "chosen, after polishing", "star", colour(1), 14))
    return _over_size(traces, "loss on held-out inputs")


def accuracy_over_size(record: Record, score: str, words: str) -> Figure:
    """What the schemes scored on held-out inputs; the end on the test data, beside the float network."""
    traces = []
    for kind, symbol, of in (("uniform", "diamond", 5), ("allocated", "square", 0)):
        rows = [row for row in record.schemes if row.name.startswith("uniform") == (kind == "uniform")]
        points = [(row.bytes, getattr(row, score), told(row)) for row in rows if getattr(row, score) is not None]
        traces.append(_markers(points, f"{kind}, held-out", symbol, colour(of)))
    if record.result is not None and record.tested(score) is not None:
        point = (record.result.bytes, record.tested(score), "this file, on test data")
        traces.append(_markers([point], "this file, test data", "star", colour(1), 14))
    return _over_size([*traces, *_level(traces, record.float_test.get(score), "float network, test data")], words, log=False)


def losses_side_by_side(records: Mapping[str, Record]) -> Figure:
    """A line and two shapes a run: its frontier as predicted, what was measured, and where it ended."""
    traces = []
    for index, (name, record) in enumerate(records.items()):
        same = next((other for other in list(records.values())[:index] if other.table == record.table), None)
        if record.table is not None and same is None:
            traces.append(frontier_line(record, f"{_short(name)}: predicted best", index))
        symbol = SYMBOLS[index % len(SYMBOLS)]
        measured = [(row.bytes, row.measured, f"{name}, {told(row)}") for row in record.schemes if row.measured is not None]
        traces.append(_markers(measured, f"{_short(name)}: measured", f"{symbol}-open", colour(index)))
        if record.final_loss is not None and record.result is not None:
            traces.append(_markers([(record.result.bytes, record.final_loss, name)], f"{_short(name)}: result", symbol, colour(index), 15))
    return _over_size(traces, "loss on held-out inputs")


def tests_side_by_side(records: Mapping[str, Record], key: str, words: str) -> Figure:
    """What every run's file scored on its test data over its size; of a supernet each uniform subnet."""
    traces = []
    for index, (name, record) in enumerate(records.items()):
        traces.append(_markers(tested_points(name, record, key), _short(name), SYMBOLS[index % len(SYMBOLS)], colour(index), 13))
    floats = {score for record in records.values() if (score := record.float_test.get(key)) is not None}
    level = _level(traces, floats.pop(), "float network") if len(floats) == 1 else []
    return _over_size([*traces, *level], f"{words} on test data", log=False)


def tested_points(name: str, record: Record, key: str) -> list[tuple[float, float, str]]:
    """(bytes, score, words) of what a run tested."""
    if record.result is not None:
        found = [(record.result.bytes, record.tested(key), name)]
    else:
        found = [(amounts.bytes, record.tested(key, subnet), f"{name}, {subnet}") for subnet, amounts in record.subnets.items()]
    return [point for point in found if point[1] is not None]


def frontier_line(record: Record, name: str, index: int) -> Figure:
    """The best scheme of every size that the table predicts."""
    found = record.table.frontier
    points = [(found.cost, found.loss), *((step.cost, step.loss) for step in found.steps)]
    return {
        **_points([(record.table.fixed_bytes + cost, record.table.floor + loss, "") for cost, loss in points]),
        "mode": "lines+markers",
        "line": {"dash": DASHES[index % len(DASHES)], "width": 1.5, "color": colour(index)},
        "marker": {"size": 4, "symbol": "circle", "color": colour(index)},
        "name": html.escape(name),
    }


def told(row: SchemeRow) -> str:
    return f"{row.name}, {row.weight_bits:.2f} bits a weight"


def bits_along_network(records: Mapping[str, Record]) -> Figure:
    """Bits of each layer's weights and input in the network's order: bars and diamonds of one run, lines of several."""
    names = list(dict.fromkeys(name for record in records.values() for name in record.layers))
    traces = []
    for index, (run, record) in enumerate(records.items()):
        if not record.layers:
            continue
        rows = [record.layers.get(name) for name in names]
        words = [
            html.escape(f"{run + ', ' if len(records) > 1 else ''}{name}: {row.precision if row else 'not in this run'}")
            for name, row in zip(names, rows, strict=True)
        ]
        of_weights = [row and _height(row.precision.weight_bits, row.weights > 0) for row in rows]
        of_inputs = [row and _height(row.precision.activation_bits, True) for row in rows]
        label = "" if len(records) == 1 else f"{_short(run)}: "
        shared = {"x": list(range(len(names))), "text": words, "hovertemplate": "%{text}<extra></extra>"}
        if len(records) == 1:
            traces.append(
                {**shared, "type": "bar", "y": of_weights, "textposition": "none", "name": "weights", "marker": {"color": colour(0)}}
            )
            traces.append({**shared, **_line(of_inputs, 1, "inputs", 2, "dot")})
        else:
            traces.append({**shared, **_line(of_weights, index, f"{label}weights", index, DASHES[index % len(DASHES)])})
    heights = [0, 2, 4, 6, 8, FLOAT_HEIGHT]
    of_bits = {
        "title": {"text": "bits"},
        "range": [0, FLOAT_HEIGHT + 0.3],
        "tickvals": heights,
        "ticktext": [*map(str, heights[:-1]), "float"],
    }
    return {"data": traces, "layout": {"xaxis": _name_axis(names), "yaxis": of_bits}}


def _height(bits: int | None, there: bool) -> int | None:
    return bits if bits is not None else FLOAT_HEIGHT if there else None


def _line(values: Sequence[Any], index: int, name: str, symbol: int, dash: str) -> Figure:
    return {
        "type": "scatter",
        "y": list(values),
        "mode": "lines+markers",
        "line": {"dash": dash, "width": 1.5, "color": colour(index)},
        "marker": {"symbol": SYMBOLS[symbol % len(SYMBOLS)], "size": 8, "color": colour(index)},
        "name": html.escape(name),
    }


def losses_by_layer(rows: Sequence[tuple[str, float, float | None]]) -> Figure:
    """Bars of (layer, predicted loss, what is left of it after one step more of bits), the worst on top."""
    names, height = [name for name, _, _ in rows], 130 + 26 * len(rows)
    shared = {
        "y": list(range(len(rows))),
        "text": [html.escape(name) for name in names],
        "hovertemplate": "%{text}: %{x:.3g}<extra></extra>",
    }
    bars = {
        **shared,
        "type": "bar",
        "orientation": "h",
        "textposition": "none",
        "x": [loss for _, loss, _ in rows],
        "name": "now",
        "marker": {"color": colour(0)},
    }
    after = {
        **shared,
        "type": "scatter",
        "mode": "markers",
        "x": [left for _, _, left in rows],
        "name": "after one step more of bits",
        "marker": {"symbol": "diamond", "size": 10, "color": colour(1), "line": {"width": 1, "color": "var(--paper)"}},
    }
    layout = {
        "xaxis": {"title": {"text": "predicted loss"}, "exponentformat": "power"},
        "yaxis": _name_axis(names) | {"autorange": "reversed"},
        "height": height,
    }
    return {"data": [bars, after], "layout": layout}


def ladder(record: Record) -> Figure:
    """The held-out loss after each step, the kept ones joined."""
    steps = list(enumerate(record.ladder))
    kept = [(index, row.loss, row.step) for index, row in steps if row.kept]
    dropped = [(index, row.loss, row.step) for index, row in steps if not row.kept]
    traces = [
        {**_markers(kept, "kept", "circle", colour(0), 11), "mode": "lines+markers", "line": {"color": colour(0), "width": 1.5}},
        _markers(dropped, "not kept", "x-thin-open", colour(1), 11),
    ]
    layout = {"xaxis": _name_axis([row.step for _, row in steps]), "yaxis": _loss_axis(traces, "loss on held-out inputs")}
    return {"data": traces, "layout": layout}


def searched(found: SearchRecord) -> Figure:
    """Every evaluated subnet over its cost, the front, and the front measured again; hovering shows the scheme."""
    origins = {"uniform": "uniform", "drawn": "drawn", "sensitivity": "one layer changed", "searched": "searched", "allocated": "allocated"}
    symbols = {"uniform": "diamond", "drawn": "circle-open", "sensitivity": "x-thin-open", "searched": "circle", "allocated": "square"}
    traces = []
    for index, (origin, name) in enumerate(origins.items()):
        rows = [row for row in found.evaluated if row.origin == origin]
        points = [(row.cost, row.score, "") for row in rows]
        traces.append(_markers(points, name, symbols[origin], colour(index), 8) | {"text": [in_words(row.scheme) for row in rows]})
    front = {"x": [row.cost for row in found.front], "text": [in_words(row.scheme) for row in found.front]}
    line = {"width": 2, "color": "var(--ink)"}
    traces.append(
        {
            **front,
            "type": "scatter",
            "y": [row.score for row in found.front],
            "mode": "lines",
            "line": line | {"shape": "hv"},
            "name": "front",
        }
    )
    traces.append(
        {**front, "type": "scatter", "y": [row.measured for row in found.front], "mode": "lines+markers", "line": line | {"dash": "dot"},
         "marker": {"symbol": "circle-open"}, "name": "front, measured on other inputs"}
    )  # fmt: skip
    layout = {"xaxis": {"title": {"text": html.escape(found.quantity)}}, "yaxis": {"title": {"text": html.escape(found.score)}}}
    return {"data": _drawn(traces), "layout": layout}


def in_words(scheme: Mapping[str, Precision]) -> str:
    return "<br>".join(f"{html.escape(name)} {precision}" for name, precision in scheme.items())


def bits_over_epochs(epochs: Sequence[Epoch]) -> Figure:
    """The bits of every layer after each epoch."""
    names = list(epochs[-1].layers)
    grid = {
        "type": "heatmap",
        "x": [row.epoch for row in epochs],
        "y": list(range(len(names))),
        "z": [[row.layers.get(name) for row in epochs] for name in names],
        "zmin": 0,
        "zmax": 8,
        "colorscale": "Cividis",
        "texttemplate": "%{z}",
        "colorbar": {"title": {"text": "bits"}},
    }
    layout = {
        "xaxis": EPOCHS,
        "yaxis": _name_axis(names) | {"autorange": "reversed"},
        "height": 200 + 22 * len(names),
    }
    return {"data": [grid], "layout": layout}


def mean_bits_over_epochs(epochs: Sequence[Epoch]) -> Figure:
    """Bits a weight of the whole network."""
    line = {"x": [row.epoch for row in epochs], **_line([row.weight_bits for row in epochs], 0, "bits a weight", 0, "solid")}
    return {"data": [line], "layout": {"xaxis": EPOCHS, "yaxis": {"title": {"text": "bits a weight"}}}}


def scores_over_epochs(epochs: Sequence[Epoch], key: str) -> Figure:
    """A score as the network trains (soft) and as it would be saved (frozen)."""
    numbers = [row.epoch for row in epochs]
    traces = [
        {"x": numbers, **_line([getattr(row, kind).get(key) for row in epochs], index, f"{kind} {key}", index, DASHES[index])}
        for index, kind in enumerate(("soft", "frozen"))
    ]
    return {"data": traces, "layout": {"xaxis": EPOCHS, "yaxis": {"title": {"text": html.escape(key)}}}}


def _points(points: Iterable[tuple[float, float, str]]) -> Figure:
    points = list(points)
    return {
        "type": "scatter",
        "x": [x for x, _, _ in points],
        "y": [y for _, y, _ in points],
        "text": [html.escape(words) for _, _, words in points],
        "hovertemplate": "%{text}<br>%{x:,}, %{y:.4g}<extra></extra>",
    }


def _markers(points: Iterable[tuple[float, float, str]], name: str, symbol: str, of: str, size: int = 9) -> Figure:
    marker = {"symbol": symbol, "size": size, "color": of, "line": {"width": 1.5, "color": of}}
    return {**_points(points), "mode": "markers", "marker": marker, "name": html.escape(name)}


def _drawn(traces: Sequence[Figure]) -> list[Figure]:
    """Those that have a point: an empty one would be in the legend all the same."""
    return [trace for trace in traces if trace["x"]]


def _over_size(traces: Sequence[Figure], score: str, log: bool = True) -> Figure:
    traces = _drawn(traces)
    size = {"title": {"text": "size of the file"}, "tickformat": "~s", "ticksuffix": "B"}
    return {
        "data": traces,
        "layout": {"xaxis": size, "yaxis": _loss_axis(traces, score) if log else {"title": {"text": html.escape(score)}}},
    }


def _loss_axis(traces: Sequence[Figure], title: str) -> Figure:
    """Logarithmic where losses above zero span much; those at or below it are then not drawn (the tables have them)."""
    values = [y for trace in traces for y in trace["y"] if y is not None and y > 0]
    wide = bool(values) and max(values) > 20 * min(values)
    return {"title": {"text": title}, "exponentformat": "power", **({"type": "log", "dtick": 1} if wide else {})}


def _level(traces: Sequence[Figure], value: float | None, name: str) -> list[Figure]:
    """A horizontal line as long as the traces are wide."""
    sizes = [x for trace in traces for x in trace["x"]]
    if value is None or not sizes:
        return []
    line = {"dash": "dash", "width": 1.5, "color": "var(--ink)"}
    return [{**_points([(min(sizes), value, name), (max(sizes), value, name)]), "mode": "lines", "line": line, "name": name}]


def _name_axis(names: Sequence[str]) -> Figure:
    """Names along an axis of numbers, so that names may be long, alike at their beginning, or the same."""
    every = max(1, -(-len(names) // 40))
    places = range(0, len(names), every)
    return {"tickvals": list(places), "ticktext": [html.escape(_short(names[place])) for place in places], "automargin": True}


def _short(name: str) -> str:
    """The end of a long name, where layers and runs differ."""
    return name if len(name) <= LONGEST else "…" + name[1 - LONGEST :]
