"""A report as one self-contained page: from records to the values of the templates, which hold the page's words and order.

A page is a function of its records alone. It works offline and without JavaScript, and every chart has a table with the same values.
"""

import hashlib
import html
import os
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from anybit.budget import Budget
from anybit.calls import public
from anybit.errors import InvalidSetting, printable
from anybit.files.strict import json_text
from anybit.files.whole import check_place, whole_file
from anybit.reports import figures
from anybit.reports.words import (
    SCORE_WORDS,
    drop_interval,
    human_bytes,
    human_count,
    milliseconds,
    points_apart,
    scheme_in_words,
    score_words,
)
from anybit.reports.words import measurement as number
from anybit.runs.folder import runs_in
from anybit.runs.records import Amounts, Epoch, FoundFor, Record, SearchRecord, Table, counted, record_of
from anybit.runs.report import read_record
from anybit.scheme import Precision

SLIDER_PLACES = 200
SHOWN_BUDGETS = 12  # rows of the slider's table for those without JavaScript
NO_GAP = 1e-9  # least relative gap of a certificate that is more than float rounding
NUMBER = re.compile("[-\N{MINUS SIGN}+]?\\d[\\d.\N{MULTIPLICATION SIGN}⁰¹²³⁴⁵⁶⁷⁸⁹⁻]*( (%|[kMGT]?B|[kMGT]|ms))?")


class Rows(NamedTuple):
    """A table of the page; the first cell of a row is its heading."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def numeric(self) -> list[bool]:
        """Return whether each column has only numbers, which are aligned to the right."""
        columns = ([row[place] for row in self.rows if row[place]] for place in range(len(self.columns)))
        return [place > 0 and bool(cells) and all(map(NUMBER.fullmatch, cells)) for place, cells in enumerate(columns)]


class Amount(NamedTuple):
    """A number of the answer, and its reference."""

    name: str
    value: str
    note: str = ""


Context = dict[str, Any]
"""The values of a template, by name."""


@public
def report(*runs: str | Path, output: str | Path, overwrite: bool = False) -> Path:
    """Write one page that compares finished runs of any workflow; a folder of several runs counts as all of them.

    Returns the path of the page. Raises InvalidFile naming a folder that is not a run, InvalidSetting if `output` exists.
    """
    path = Path(output)
    check_place(path, "--output")
    if path.is_dir() or (path.exists() and not overwrite):
        raise InvalidSetting(f"{path} exists. Choose another --output{'' if path.is_dir() else ', or give --overwrite'}.")
    if not runs:
        raise InvalidSetting("No run is given. Name at least one run folder.")
    text = page(_without_common_folder({name: record for run in runs for name, record in read_records(Path(run)).items()}))
    with whole_file(path, "Make room, or choose another --output.") as draft:
        draft.write_text(text, encoding="utf8")
    return path


class Page(NamedTuple):
    """A page in memory, which notebooks show and `save` writes."""

    html: str

    def __repr__(self) -> str:
        return f"<anybit page of {len(self.html) / 1000:.0f} kB: save(path) writes it, and a notebook shows it>"

    def _repr_html_(self) -> str:
        """Show the page in an iframe, because it has its own style and script."""
        return f'<iframe srcdoc="{html.escape(self.html)}" width="100%" height="640" style="border: 0"></iframe>'

    @public
    def save(self, path: str | Path) -> Path:
        """Write the page."""
        check_place(Path(path), "path")
        with whole_file(Path(path), "Make room, or choose another path.") as draft:
            draft.write_text(self.html, encoding="utf8")
        return Path(path)


def read_records(folder: Path) -> dict[str, Record]:
    """Return name -> record of a run folder, or of each run in a folder of several."""
    return {str(run): read_record(run) for run in runs_in(folder) or [folder]}


def _without_common_folder(records: Mapping[str, Record]) -> dict[str, Record]:
    """Drop the names' common folder."""
    if len(records) == 1:
        return dict(records)
    common = os.path.commonpath([os.path.abspath(name) for name in records])
    return {os.path.relpath(name, common): record for name, record in records.items()}


def run_page(report: Mapping[str, Any]) -> str:
    """Return the page of one run's report."""
    return page({"this run": record_of(report)})


def runs_page(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page of several runs' reports by name."""
    return page({name: record_of(report, name) for name, report in reports.items()})


def figure_page(report: Mapping[str, Any]) -> str:
    """Return a page with only a run's headline and its charts of size against loss and score."""
    record = record_of(report)
    charts = _sizes(record)["charts"] if record.schemes else [figures.bits_along_network({"this run": record})]
    head = {"title": f"anybit: {_asked(record)}", "above": _asked(record), **_headline(record)}
    return _rendered("figure.html.j2", {**head, "charts": charts})


def page(records: Mapping[str, Record]) -> str:
    """Return the page of one run, or of several by name."""
    if len(records) == 1:
        (record,) = records.values()
        return _rendered("run.html.j2", _of_one(record))
    return _rendered("runs.html.j2", _of_several(records))


def _rendered(template: str, context: Context) -> str:
    style, script = _page_file("page.css"), _page_file("page.js")
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
    return _templates().get_template(template).render(**context, style=style, script=script, policy=policy)


@cache
def _page_file(name: str) -> str:
    return (files("anybit.reports") / name).read_text(encoding="utf8")


def _hash(text: str) -> str:
    """Return the hash by which the page's policy allows its one script or style."""
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _templates() -> Environment:
    """Return templates that escape every value: markup as entities, control and bidirectional characters as text."""
    templates = Environment(
        loader=PackageLoader("anybit.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_escaped,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["number"] = number
    templates.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return templates


def _escaped(value: Any) -> Any:
    is_text = isinstance(value, str) and not hasattr(value, "__html__")
    return printable(value) if is_text else value


def _of_one(record: Record) -> Context:
    records = {"this run": record}
    return {
        "title": f"anybit: {_asked(record)}",
        "above": _asked(record),
        **_headline(record),
        "sizes": _sizes(record) if record.schemes else None,
        "search": _search(record.search) if record.search else None,
        "explorer": _explorer("budgets", record.table, record) if record.table else None,
        "layers": _layers(record) if record.layers else None,
        "training": _training(record) if record.epochs else None,
        "subnets": _subnets(record) if record.subnets else None,
        "ladders": _ladders(records),
        "sentences": list(_certainty(record)),
        "settings": _settings(records),
    }


def _of_several(records: Mapping[str, Record]) -> Context:
    score = next((score for record in records.values() if (score := record.score_tested())), None)
    has_schemes = any(record.schemes for record in records.values())
    return {
        "title": f"anybit: {len(records)} runs",
        "above": "anybit",
        "headline": f"{len(records)} runs side by side",
        "runs": _ends(records, score),
        "losses": _losses_side_by_side(records) if has_schemes else None,
        "tests": _tests_side_by_side(records, score) if score else None,
        "explorers": _explorers(records),
        "bits": _bits(records) if any(record.layers for record in records.values()) else None,
        "ladders": _ladders(records),
        "sentences": {name: sentences for name, record in records.items() if (sentences := list(_certainty(record)))},
        "settings": _settings(records),
    }


# The head of the page


def _asked(record: Record) -> str:
    return f"{record.road}, budget {record.budget}" if record.budget else record.road


def _headline(record: Record) -> Context:
    """Return the answer: score, size and speed beside the float network's, and the question."""
    result = record.result
    if result is None:
        count = f"{len(record.search.front)} subnets on the front" if record.search else f"{len(record.subnets)} uniform subnets"
        amounts = [] if record.search is None else [_within(budget, row, record.search) for budget, row in record.search.budgets.items()]
        return {"headline": f"A supernet: {count}", "lead": "Each is a separate network, from one stored file.", "amounts": amounts}
    whole = f"float {human_bytes(record.float_bytes)}; {result.percent:.1f} % of it" if record.float_bytes else ""
    amounts = [
        Amount("file size", human_bytes(result.bytes), whole),
        Amount("bits per weight", f"{result.weight_bits:.2f}", f"{human_count(result.bops)} bit operations per sample"),
    ]
    if (times := record.latency) is not None:
        faster = f"; {times.float32 / times.exported:.2g} times as fast" if times.exported > 0 else ""
        amounts.insert(1, Amount("latency", milliseconds(times.exported), f"float {milliseconds(times.float32)}{faster}"))
    score = record.score_tested()
    scored = None if score is None else record.tested(score)
    if score is not None and scored is not None:
        headline = f"{SCORE_WORDS[score].capitalize()} {score_words(score, scored)} in {human_bytes(result.bytes)}"
        return {"headline": headline, "lead": _interval(record), "amounts": [_tested(record, score, scored), *amounts]}
    if record.final_loss is not None:
        amounts.append(Amount("loss on held-out inputs", number(record.final_loss), "0 where outputs equal the float network's"))
    untested = "Accuracy was not tested; give labelled data to --test."
    headline = f"{human_bytes(result.bytes)}{f' instead of {human_bytes(record.float_bytes)}' if record.float_bytes else ''}"
    return {"headline": headline, "lead": untested, "amounts": amounts}


def _tested(record: Record, score: str, scored: float) -> Amount:
    before = record.float_test.get(score)
    apart = f"; {points_apart(scored - before)}" if before is not None and score == "top1" else ""
    name = "top-1 accuracy" if score == "top1" else SCORE_WORDS[score]
    return Amount(
        f"{name} on test data", score_words(score, scored), "" if before is None else f"float {score_words(score, before)}{apart}"
    )


def _interval(record: Record) -> str:
    """Write how certain the difference of accuracies is."""
    lost = drop_interval(record.test, record.float_test)
    if lost is None:
        return ""
    _, low, high, count = lost
    ends = " to ".join(f"{end:.2f}".replace("-", "\N{MINUS SIGN}") for end in (low, high))
    return f"95 % interval of the loss of accuracy, on {count} test samples: {ends} points."


def _within(budget: str, row: FoundFor, search: SearchRecord) -> Amount:
    """Return a search's scheme for a budget: its size, and its score as measured last."""
    same = next((one for one in (*search.front, *search.evaluated) if one.scheme == row.scheme), None)
    score = None if same is None else same.score if same.measured is None else same.measured
    scored = "" if score is None else f", {SCORE_WORDS.get(search.score, search.score)} {score_words(search.score, score)}"
    return Amount(f"within {budget}", human_bytes(row.bytes), f"{row.weight_bits:.2f} bits per weight{scored}")


def _ends(records: Mapping[str, Record], score: str | None) -> Rows:
    columns = ["run", *([f"test {SCORE_WORDS[score]}", f"float {SCORE_WORDS[score]}"] if score else [])]
    columns += ["size", "% of float", "bits per weight", "BOPs", "held-out loss", "workflow", "budget"]
    rows = [row for name, record in records.items() for row in _end(name, record, score)]
    return Rows("Results of the runs", columns, rows)


def _end(name: str, record: Record, score: str | None) -> Iterable[list[str]]:
    """Yield a row for the run's network, for a search's scheme of each budget, or for each uniform subnet of a supernet."""

    def row(label: str, budget: str | None, amounts: Amounts, loss: float | None, tested: float | None) -> list[str]:
        sizes = [human_bytes(amounts.bytes), f"{amounts.percent:.1f}", f"{amounts.weight_bits:.2f}", human_count(amounts.bops)]
        scores = [number(tested), number(record.float_test.get(score))] if score else []
        return [label, *scores, *sizes, number(loss), record.road, budget or ""]

    if record.result is not None:
        yield row(name, record.budget, record.result, record.final_loss, record.tested(score) if score else None)
    elif record.search is not None and record.search.budgets:
        for budget, found_for in record.search.budgets.items():
            yield row(f"{name}, {budget}", budget, found_for, None, None)
    else:
        for subnet, amounts in record.subnets.items():
            yield row(f"{name}, {subnet}", None, amounts, None, record.tested(score, subnet) if score else None)


# Sizes, losses, accuracies


def _sizes(record: Record) -> Context:
    score = counted(record.schemes)
    charts = [figures.accuracy_over_size(record, score, SCORE_WORDS[score])] if score else []
    charts.append(figures.loss_over_size(record))
    tables = [_schemes_table(record, "Schemes measured on held-out inputs")]
    tables += [_uniforms_table(record.table)] if record.table is not None else []
    return {"charts": charts, "tables": tables}


def _schemes_table(record: Record, caption: str) -> Rows:
    score = counted(record.schemes)
    rows = [
        [
            f"{row.name} (chosen)" if row.chosen else row.name,
            human_bytes(row.bytes),
            f"{row.weight_bits:.2f}",
            number(row.predicted),
            number(row.measured),
            *([number(getattr(row, score))] if score else []),
        ]
        for row in record.schemes
    ]
    columns = ["scheme", "size", "bits per weight", "predicted loss", "measured loss", *([SCORE_WORDS[score]] if score else [])]
    return Rows(caption, columns, rows)


def _uniforms_table(table: Table) -> Rows:
    sums = {name: table.sums(scheme) for name, scheme in table.uniforms().items()}
    rows = [[name, human_bytes(size), number(loss)] for name, (size, loss) in sums.items()]
    return Rows("Uniform schemes, as predicted", ["scheme", "size", "predicted loss"], rows)


def _losses_side_by_side(records: Mapping[str, Record]) -> Context:
    tables = [
        _schemes_table(record, f"Schemes of {name}, measured on held-out inputs") for name, record in records.items() if record.schemes
    ]
    return {"chart": figures.losses_side_by_side(records), "tables": tables}


def _tests_side_by_side(records: Mapping[str, Record], score: str) -> Context:
    """Show the first score that any run tested."""
    points = [point for name, record in records.items() for point in figures.tested_points(name, record, score)]
    rows = [[words, human_bytes(size), number(value)] for size, value, words in points]
    chart = figures.tests_side_by_side(records, score, SCORE_WORDS[score])
    return {"is_loss": score == "loss", "chart": chart, "table": Rows("Tested", ["run", "size", SCORE_WORDS[score]], rows)}


# Bits, layer by layer


def _bits(records: Mapping[str, Record]) -> Context:
    names = list(dict.fromkeys(name for record in records.values() for name in record.layers))
    table = next((list(one.table.layers) for one in records.values() if one.table), [])
    places = {name: place for place, name in enumerate(table)}
    rows = [
        (name, [one.layers[name].precision if name in one.layers else None for one in records.values()], places.get(name, ""))
        for name in names
    ]
    return {"chart": figures.bits_along_network(records), "runs": list(records), "rows": rows}


def _layers(record: Record) -> Context:
    """Show every layer: its precision, its size, and its share of the predicted loss."""
    losses = {name: row.predicted_loss for name, row in record.layers.items()}
    if record.table is not None:
        losses = {name: record.table.layers[name][row.precision].loss for name, row in record.layers.items()}
    places = {name: place for place, name in enumerate(record.table.layers if record.table else ())}
    largest = max((loss for loss in losses.values() if loss is not None), default=0.0)
    rows = [
        {
            "name": name,
            "place": places.get(name, ""),
            "precision": row.precision,
            "weights": human_count(row.weights),
            "bytes": human_bytes(row.bytes),
            "loss": losses[name],
            "share": round(100 * min(max(loss, 0.0) / largest, 1.0), 1) if (loss := losses[name]) is not None and largest > 0 else 0.0,
        }
        for name, row in record.layers.items()
    ]
    return {
        "chart": figures.bits_along_network({"this run": record}),
        "rows": rows,
        "has_losses": any(loss is not None for loss in losses.values()),
        "hurting": _hurting(record, record.table) if record.table else None,
    }


class Hurt(NamedTuple):
    """A layer's predicted loss, and its best step to more bytes: precision, extra bytes, resulting loss, loss gained per byte."""

    name: str
    precision: Precision
    loss: float
    more: tuple[Precision, int, float, float] | None


def _hurting(record: Record, table: Table) -> Context:
    layers = sorted((_hurt(name, record, table) for name in record.layers), key=lambda one: -one.loss)
    total = sum(max(one.loss, 0.0) for one in layers) or 1.0
    rows = [_hurt_row(one, total) for one in layers]
    columns = ["layer", "now", "predicted loss", "share", "one step more", "loss saved", "extra size", "loss saved per kB"]
    return {
        "worst": dict(zip(("name", "precision", "loss", "share", "more", "gain", "cost"), rows[0], strict=False))
        if layers and layers[0].loss > 0
        else None,
        "table": Rows("Predicted loss by layer, and the step that gains most per byte", columns, rows),
    }


def _hurt(name: str, record: Record, table: Table) -> Hurt:
    precision, options = record.layers[name].precision, table.layers[name]
    now = options[precision]
    steps = [
        (more, cell.bytes - now.bytes, cell.loss, (now.loss - cell.loss) / (cell.bytes - now.bytes))
        for more, cell in options.items()
        if cell.bytes > now.bytes and cell.loss < now.loss
    ]
    return Hurt(name, precision, now.loss, max(steps, key=lambda step: step[3], default=None))


def _hurt_row(hurt: Hurt, total: float) -> list[str]:
    row = [hurt.name, str(hurt.precision), number(hurt.loss), f"{100 * max(hurt.loss, 0.0) / total:.1f} %"]
    if hurt.more is None:
        return [*row, "", "", "", ""]
    precision, more_bytes, loss, gain = hurt.more
    return [*row, str(precision), number(hurt.loss - loss), human_bytes(more_bytes), number(1000 * gain)]


def _ladders(records: Mapping[str, Record]) -> Context | None:
    climbed = {name: record for name, record in records.items() if record.ladder}
    if not climbed:
        return None
    charts = [figures.ladder(record) for record in climbed.values()] if len(records) == 1 else []
    tables = [_ladder_table(record, name if len(records) > 1 else "Steps") for name, record in climbed.items()]
    return {"charts": charts, "tables": tables}


def _ladder_table(record: Record, caption: str) -> Rows:
    score = counted(record.ladder)
    rows, last = [], None
    for row in record.ladder:
        change = "" if last is None else f"{100 * (row.loss - last) / last:+.1f} %".replace("-", "\N{MINUS SIGN}") if last > 0 else ""
        scored = [number(getattr(row, score))] if score else []
        rows.append([row.step, number(row.loss), change, *scored, "kept" if row.kept else "not kept"])
        last = row.loss if row.kept or last is None else last
    return Rows(caption, ["step", "held-out loss", "change", *([SCORE_WORDS[score]] if score else []), "kept?"], rows)


# The slider: the best scheme within any size, as the table predicts


def _explorers(records: Mapping[str, Record]) -> list[Context]:
    """Show a slider for each table: budgets of one calibrate run share theirs."""
    shared: list[tuple[Table, list[str]]] = []
    for name, record in records.items():
        names = next((names for table, names in shared if table == record.table), None)
        if names is not None:
            names.append(name)
        elif record.table is not None:
            shared.append((record.table, [name]))
    return [
        _explorer(f"budgets-{index}", table, records[names[0]], names[0]) | {"runs": names if len(shared) > 1 else []}
        for index, (table, names) in enumerate(shared)
    ]


def _explorer(key: str, table: Table, record: Record, name: str = "this run") -> Context:
    data = frontier_data(table, record) | {"own": _own(table, record)}
    sizes = [data["bytes"], *(step["bytes"] for step in data["steps"])]
    place = _round_number((sizes[-1] - sizes[0]) / SLIDER_PLACES)
    low, high = (-(-size // place) * place for size in (sizes[0], sizes[-1]))
    return {
        "key": key,
        "name": printable(name),
        "data": data,
        "slider": {"min": low, "max": high, "step": place, "value": record.result.bytes if record.result else low},
        "table": _some_budgets(data, record.float_bytes),
        "runs": [],
    }


def _own(table: Table, record: Record) -> Context:
    """Return the run's own scheme, at which the slider starts."""
    scheme = {name: record.layers[name].precision for name in table.layers}
    size, loss = table.sums(scheme)
    bits = sum(record.layers[name].weights * precision.stored_weight_bits for name, precision in scheme.items()) / table.weights
    own = [str(precision) for precision in scheme.values()]
    return {"scheme": own, "bytes": record.result.bytes if record.result else size, "loss": loss, "bits": bits}


def frontier_data(table: Table, record: Record) -> Context:
    """Return the frontier as file sizes and predicted losses, with the resulting bits per weight of each step."""
    weights = {name: record.layers[name].weights for name in table.layers}
    names, frontier = list(table.layers), table.frontier
    now = dict(frontier.start)
    bits = sum(weights[name] * precision.stored_weight_bits for name, precision in now.items())
    steps: list[Context] = []
    data: Context = {
        "layers": [printable(name) for name in names],
        "start": [str(precision) for precision in now.values()],
        "bytes": round(table.fixed_bytes + frontier.cost),
        "loss": table.floor + frontier.loss,
        "bits": bits / table.weights,
        "steps": steps,
    }
    for step in frontier.steps:
        bits += weights[step.layer] * (step.precision.stored_weight_bits - now[step.layer].stored_weight_bits)
        now[step.layer] = step.precision
        steps.append(
            {
                "layer": names.index(step.layer),
                "precision": str(step.precision),
                "bytes": round(table.fixed_bytes + step.cost),
                "loss": table.floor + step.loss,
                "bits": bits / table.weights,
            }
        )
    return data


def _some_budgets(data: Mapping[str, Any], float_bytes: int) -> Rows:
    points = [data, *data["steps"]]
    count = min(SHOWN_BUDGETS, len(points))
    places = sorted({round(index * (len(points) - 1) / max(1, count - 1)) for index in range(count)})
    rows = []
    for place in places:
        size, gained = points[place]["bytes"], ""
        if place + 1 < len(points):
            step = points[place + 1]
            gained = f"{data['layers'][step['layer']]} at {step['precision']}"
        share = f"{100 * size / float_bytes:.1f}" if float_bytes else ""
        rows.append([human_bytes(size), share, f"{points[place]['bits']:.2f}", number(points[place]["loss"]), gained])
    return Rows("Best predicted schemes by file size", ["size", "% of float", "bits per weight", "predicted loss", "next step"], rows)


def _round_number(value: float) -> int:
    """Return the nearest of 1, 2, 5, 10, 20, 50, ... not above `value`."""
    power = 1
    while power * 10 <= value:
        power *= 10
    return next((factor * power for factor in (5, 2) if factor * power <= value), power)


# Trainings and searches


def _training(record: Record) -> Context:
    epochs = record.epochs
    charts, columns, rows = [], ["epoch", "loss"], [[str(row.epoch), number(row.loss)] for row in epochs]
    if epochs[-1].layers:
        charts.append(figures.bits_over_epochs(epochs))
    if epochs[-1].weight_bits is not None:
        charts.append(figures.mean_bits_over_epochs(epochs, record.budget))
        columns.append("bits per weight")
        rows = [[*cells, number(row.weight_bits)] for cells, row in zip(rows, epochs, strict=True)]
    score = next((key for key in SCORE_WORDS if epochs[-1].frozen.get(key) is not None), None)
    if score:
        charts.append(figures.scores_over_epochs(epochs, score))
        columns += [f"{SCORE_WORDS[score]} as it trains", f"{SCORE_WORDS[score]} as it would be saved"]
        rows = [[*cells, number(row.soft.get(score)), number(row.frozen.get(score))] for cells, row in zip(rows, epochs, strict=True)]
    tables = [Rows("Epochs", columns, rows)]
    if epochs[-1].layers:
        tables.append(_bits_by_epoch(epochs))
    return {"charts": charts, "tables": tables}


def _bits_by_epoch(epochs: Sequence[Epoch]) -> Rows:
    rows = [[name, ", ".join(_stretch_in_words(one) for one in figures.stretches(name, epochs))] for name in epochs[-1].layers]
    return Rows("Bits of every layer after each epoch", ["layer", "bits"], rows)


def _stretch_in_words(stretch: figures.Stretch) -> str:
    epochs = f"epochs {stretch.first} to {stretch.last}" if stretch.first != stretch.last else f"epoch {stretch.first}"
    return f"{stretch.text} ({epochs})"


def _search(search: SearchRecord) -> Context:
    front = [[number(row.cost), number(row.score), number(row.measured), row.origin, scheme_in_words(row.scheme)] for row in search.front]
    budgets = [
        [budget, human_bytes(row.bytes), f"{row.weight_bits:.2f}", human_count(row.bops), scheme_in_words(row.scheme)]
        for budget, row in search.budgets.items()
    ]
    tables = [Rows("Schemes by budget", ["budget", "size", "bits per weight", "BOPs", "scheme"], budgets)] if budgets else []
    tables.append(Rows("The front", [search.quantity, search.score, "measured again", "proposed by", "scheme"], front))
    return {"count": len(search.evaluated), "chart": figures.searched(search), "tables": tables}


def _subnets(record: Record) -> Rows:
    scored = [key for key in SCORE_WORDS if any(record.tested(key, name) is not None for name in record.subnets)]
    rows = [
        [
            name,
            human_bytes(amounts.bytes),
            f"{amounts.weight_bits:.2f}",
            human_count(amounts.bops),
            *(number(record.tested(key, name)) for key in scored),
        ]
        for name, amounts in record.subnets.items()
    ]
    return Rows("Uniform subnets", ["subnet", "size", "bits per weight", "BOPs", *(SCORE_WORDS[key] for key in scored)], rows)


# What stands behind it


def _certainty(record: Record) -> Iterable[str]:
    """Write what was solved, its gap, the measurements, the choice and its reason."""
    yield from (f"{note[:1].upper()}{note[1:]}." for note in record.notes)
    if record.certificate.value is not None and record.certificate.bound is not None:
        yield _solved(record, record.certificate.value, record.certificate.bound)
    elif record.schemes and record.budget is None:
        yield "No budget was given: every layer has its largest candidate, and nothing was solved for."
    if len(record.schemes) > 1:
        yield _measured(record)
    if record.uncovered:
        yield "Not quantized: " + "; ".join(f"{name} ({why})" for name, why in record.uncovered.items()) + "."
    if record.certificate.seed is not None:
        yield f"All random draws used seed {record.certificate.seed}: the same command on the same machine gives the same file."


def _solved(record: Record, value: float, bound: float) -> str:
    certificate = record.certificate
    is_closed = value - bound <= NO_GAP * abs(value)
    better = "so there is none better" if is_closed else f"so none can be better by more than {number(value - bound)}"
    if record.schemes:
        better += ", as far as the prediction is right"
    return (
        f"An integer program ({certificate.solver or 'its solver is not named'}) looked for the {certificate.objective or 'best scheme'} "
        f"within {record.budget}. Its best scheme reaches {number(value)}. It proved that none within the budget reaches less than "
        f"{number(bound)} (gap {number(0.0 if is_closed else 100 * (certificate.gap or 0.0))} %), {better}."
    )


def _measured(record: Record) -> str:
    uniform, chosen = sum(row.name.startswith("uniform") for row in record.schemes), record.chosen
    count = f"{record.inputs['held_out']} " if "held_out" in record.inputs else ""
    words = (
        f"A prediction adds up the losses of single layers. Therefore {len(record.schemes) - uniform} solved and {uniform} uniform schemes "
        f"were measured whole, on {count}held-out inputs that nothing was fitted to."
    )
    if chosen is not None:
        words += f" Chosen: {chosen.name}, predicted {number(chosen.predicted)}, measured {number(chosen.measured)}. {_reason(record)}"
    return words


def _reason(record: Record) -> str:
    limited = Budget.parse(record.budget).loss() if record.budget else None
    return limited.chosen if limited else "No other measured less."


def _settings(records: Mapping[str, Record]) -> list[Rows]:
    tables = []
    for name, record in records.items():
        values = {**record.settings, **{f"environment: {key}": value for key, value in record.environment.items()}}
        rows = [[key, value if isinstance(value, str) else json_text(value)] for key, value in values.items()]
        title = "Settings and environment" + (f" of {name}" if len(records) > 1 else "")
        tables += [Rows(title, ["what", "value"], rows)] if rows else []
    return tables
