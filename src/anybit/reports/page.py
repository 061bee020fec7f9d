"""Reports as one self-contained page: nothing is asked of the network, and every plot has a table that says the same.

A page is a function of its `records` alone."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from anybit.budget import Budget
from anybit.errors import InvalidSetting
from anybit.files.whole import whole_file
from anybit.reports import markup
from anybit.reports.figures import (
    accuracy_over_size,
    bits_along_network,
    bits_over_epochs,
    ladder,
    loss_over_size,
    losses_by_layer,
    losses_side_by_side,
    mean_bits_over_epochs,
    scores_over_epochs,
    searched,
    tested_points,
    tests_side_by_side,
)
from anybit.reports.words import human_bytes, human_count
from anybit.runs.folder import runs_in
from anybit.runs.records import Amounts, Record, Table, counted, record_of
from anybit.runs.report import read_record
from anybit.scheme import Precision

WORDS = {"metric": "metric", "top1": "top-1", "spearman": "spearman", "f1": "f1", "loss": "loss"}
SLIDER_PLACES = 200
SHOWN_BUDGETS = 12  # rows of the slider's table for those without JavaScript
WORST = 15  # layers in the plot of those that hurt most; the table has all


def report(*runs: str | Path, output: str | Path, overwrite: bool = False) -> Path:
    """One page of finished runs side by side, of any roads; a folder of several runs counts as each of them.

    Raises InvalidFile naming a folder that is no run, InvalidSetting where `output` is there already.
    """
    path = Path(output)
    if path.is_dir() or (path.exists() and not overwrite):
        raise InvalidSetting(f"{path} exists. Choose another --output{'' if path.is_dir() else ', or give --overwrite'}.")
    if not runs:
        raise InvalidSetting("There is no run to report on. Name at least one run folder.")
    made = page(_shortly_named({name: record for run in runs for name, record in read_records(Path(run)).items()}))
    with whole_file(path, "Make room, or choose another --output.") as draft:
        draft.write_text(made, encoding="utf8")
    return path


def read_records(folder: Path) -> dict[str, Record]:
    """Name -> record of a run folder, or of each run in a folder that holds several."""
    several = runs_in(folder)
    if several:
        return {str(run): read_record(run) for run in several}
    return {str(folder): read_record(folder)}


def _shortly_named(records: Mapping[str, Record]) -> dict[str, Record]:
    """Names without the folder that all have in common."""
    if len(records) == 1:
        return dict(records)
    common = os.path.commonpath([os.path.abspath(name) for name in records])
    return {os.path.relpath(name, common): record for name, record in records.items()}


def run_page(report: Mapping[str, Any]) -> str:
    """The page of one run's report."""
    return page({"this run": record_of(report)})


def runs_page(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of several runs' reports by name."""
    return page({name: record_of(report, name) for name, report in reports.items()})


def page(records: Mapping[str, Record]) -> str:
    """The page of one run, or of several by name."""
    if len(records) == 1:
        (record,) = records.values()
        return markup.document(f"anybit: {_asked(record)}", _of_one(record))
    return markup.document(f"anybit: {len(records)} runs", _of_several(records))


def _of_one(record: Record) -> list[str]:
    return [
        _headline(record),
        _sizes_and_losses(record) if record.schemes else "",
        _searched(record) if record.search else "",
        _explorer("budgets", record.table, record, "Any other budget") if record.table else "",
        _bits({"this run": record}) if record.layers else "",
        _what_hurts(record, record.table) if record.table else "",
        _training(record) if record.epochs else "",
        _subnets(record) if record.subnets else "",
        _ladders({"this run": record}),
        _certificates({"this run": record}),
        _settings({"this run": record}),
    ]


def _of_several(records: Mapping[str, Record]) -> list[str]:
    return [
        _runs(records),
        _losses_side_by_side(records) if any(record.schemes for record in records.values()) else "",
        _tests_side_by_side(records),
        *_explorers(records),
        _bits(records) if any(record.layers for record in records.values()) else "",
        _ladders(records),
        _certificates(records),
        _settings(records),
    ]


# The head of the page


def _headline(record: Record) -> str:
    if record.result is None:
        found = f"{len(record.search.front)} subnets on the front" if record.search else f"{len(record.subnets)} uniform subnets"
        return _header(record, f"A supernet: {found}", "Each is a network of its own, from one stored file.")
    result = record.result
    whole = f" instead of {human_bytes(record.float_bytes)}" if record.float_bytes else ""
    return _header(record, f"{human_bytes(result.bytes)}{whole}, {result.weight_bits:.2f} bits a weight", _accuracy(record))


def _header(record: Record, headline: str, lead: str) -> str:
    amounts = ""
    if record.result is not None:
        pairs = [
            ("of the float network's file", f"{record.result.percent:.1f} %"),
            ("bit operations a sample", human_count(record.result.bops)),
            ("layers", str(len(record.layers))),
        ]
        if record.final_loss is not None:
            pairs.append(("loss on held-out inputs", _number(record.final_loss)))
        amounts = markup.pairs(pairs)
    return markup.header(_asked(record), headline, lead, amounts)


def _asked(record: Record) -> str:
    asked = f", budget {record.budget}" if record.budget else ""
    return f"{record.road}{asked}"


def _accuracy(record: Record) -> str:
    """What was tested, against float, in a sentence."""
    score = record.score_tested()
    if score is None:
        return "Its accuracy was not tested: --test takes labelled data. Below it is compared with the float network on held-out inputs."
    scored, before = record.tested(score), record.float_test.get(score)
    if score == "top1":
        words = f"On the test data it gets {scored:.2f} % right (top-1)"
        return f"{words}." if before is None else f"{words}, the float network {before:.2f} %: {_difference(scored - before)}."
    beside = "" if before is None else f", the float network's {_number(before)}"
    return f"On the test data its {WORDS[score]} is {_number(scored)}{beside}."


def _difference(points: float) -> str:
    if abs(points) < 0.005:
        return "no difference"
    return f"{abs(points):.2f} points {'more' if points > 0 else 'less'}"


def _runs(records: Mapping[str, Record]) -> str:
    score = _score_tested(records)
    rows = [row for name, record in records.items() for row in _ended_with(name, record, score)]
    columns = ["run", "road", "budget", "size", "% of float", "bits a weight", "BOPs", "held-out loss"]
    columns += [f"test {WORDS[score]}", f"float {WORDS[score]}"] if score else []
    lead = "Sizes are those of the files; a held-out loss is the distance to the float network's outputs on held-out inputs."
    table = markup.table("What each run ended with", columns, rows)
    return markup.header("anybit", f"{len(records)} runs side by side", lead) + markup.section("The runs", table)


def _score_tested(records: Mapping[str, Record]) -> str | None:
    return next((score for record in records.values() if (score := record.score_tested())), None)


def _ended_with(name: str, record: Record, score: str | None) -> Iterable[list[str]]:
    """A row for the run's network, for what a search found within each budget, or for each uniform subnet of a supernet."""

    def row(label: str, budget: str | None, amounts: Amounts, loss: float | None, tested: float | None) -> list[str]:
        sizes = [human_bytes(amounts.bytes), f"{amounts.percent:.1f}", f"{amounts.weight_bits:.2f}", human_count(amounts.bops)]
        scores = [_number(tested), _number(record.float_test.get(score))] if score else []
        return [label, record.road, budget or "", *sizes, _number(loss), *scores]

    if record.result is not None:
        yield row(name, record.budget, record.result, record.final_loss, record.tested(score) if score else None)
    elif record.search is not None and record.search.budgets:
        for budget, found in record.search.budgets.items():
            yield row(f"{name}, {budget}", budget, found, None, None)
    else:
        for subnet, amounts in record.subnets.items():
            yield row(f"{name}, {subnet}", None, amounts, None, record.tested(score, subnet) if score else None)


# Sizes, losses, accuracies


def _sizes_and_losses(record: Record) -> str:
    intro = (
        "What the sensitivity table predicts (open shapes and the line) and what held-out inputs measured (filled shapes). "
        "The loss is the distance to the float network's outputs: lower and further left is better."
    )
    label = "Loss on held-out inputs over the size of the file: predicted frontier, uniform schemes, allocated schemes, the chosen one."
    parts = [markup.paragraph(intro), markup.plot("losses", loss_over_size(record), label)]
    score = counted(record.schemes)
    if score:
        label = (
            f"{WORDS[score]} over the size of the file: schemes on held-out inputs, the finished file and the float network on test data."
        )
        parts.append(markup.plot("accuracies", accuracy_over_size(record, score, WORDS[score]), label))
    tables = [_schemes_table(record, "Schemes that were measured on held-out inputs")]
    if record.table is not None:
        tables.append(_uniforms_table(record.table))
    return markup.section("Size against loss", *parts, markup.details("As tables", *tables))


def _schemes_table(record: Record, caption: str) -> str:
    score = counted(record.schemes)
    rows = [
        [
            f"{row.name} (chosen)" if row.chosen else row.name,
            human_bytes(row.bytes),
            f"{row.weight_bits:.2f}",
            _number(row.predicted),
            _number(row.measured),
            *([_number(getattr(row, score))] if score else []),
        ]
        for row in record.schemes
    ]
    columns = ["scheme", "size", "bits a weight", "predicted loss", "measured loss", *([WORDS[score]] if score else [])]
    return markup.table(caption, columns, rows)


def _uniforms_table(table: Table) -> str:
    sums = {name: table.sums(scheme) for name, scheme in table.uniforms().items()}
    rows = [[name, human_bytes(size), _number(loss)] for name, (size, loss) in sums.items()]
    return markup.table("Uniform schemes, as the table predicts them", ["scheme", "size", "predicted loss"], rows)


def _losses_side_by_side(records: Mapping[str, Record]) -> str:
    label = "Loss on held-out inputs over the size of the file, a line and two shapes for each run."
    named = [(name, record) for name, record in records.items() if record.schemes]
    twins = [_schemes_table(record, f"Schemes of {name}, measured on held-out inputs") for name, record in named]
    return markup.section(
        "Size against loss", markup.plot("losses", losses_side_by_side(records), label), markup.details("As tables", *twins)
    )


def _tests_side_by_side(records: Mapping[str, Record]) -> str:
    """The first score that any run tested; nothing where none did."""
    score = _score_tested(records)
    if score is None:
        return ""
    points = [point for name, record in records.items() for point in tested_points(name, record, score)]
    rows = [[words, human_bytes(size), _number(value)] for size, value, words in points]
    figure = tests_side_by_side(records, score, WORDS[score])
    plot = markup.plot("tests", figure, f"{WORDS[score]} on test data over the size of the file, a shape for each run.")
    twin = markup.details("As a table", markup.table("Tested", ["run", "size", WORDS[score]], rows))
    return markup.section("Size against accuracy" if score != "loss" else "Size against loss on test data", plot, twin)


# Bits, layer by layer


def _bits(records: Mapping[str, Record]) -> str:
    label = "Bits of every layer's weights and input, in the network's order."
    several = len(records) > 1
    names = list(dict.fromkeys(name for record in records.values() for name in record.layers))
    rows = [[name, *(str(r.layers[name].precision) if name in r.layers else "" for r in records.values())] for name in names]
    if not several:
        (record,) = records.values()
        rows = [
            [*row, human_count(layer.weights), human_bytes(layer.bytes)] for row, layer in zip(rows, record.layers.values(), strict=True)
        ]
    columns = ["layer", *records] if several else ["layer", "precision", "weights", "bytes"]
    intro = "W4A8: weights of 4 bits, an input of 8. W4: the input is float. A8: a product of two activations, without weights."
    twin = markup.details("As a table", markup.table("Precision of every layer", columns, rows))
    return markup.section("Bits along the network", markup.paragraph(intro), markup.plot("bits", bits_along_network(records), label), twin)


def _what_hurts(record: Record, table: Table) -> str:
    rows = sorted(_hurting(record, table), key=lambda row: -row["loss"])
    total = sum(max(row["loss"], 0.0) for row in rows) or 1.0
    cells = []
    for row in rows:
        more = row["more"]
        bought = [str(more[0]), _number(row["loss"] - more[2]), human_bytes(more[1]), _number(1000 * more[3])] if more else ["", "", "", ""]
        cells.append([row["name"], str(row["precision"]), _number(row["loss"]), f"{100 * max(row['loss'], 0.0) / total:.1f} %", *bought])
    columns = ["layer", "now", "predicted loss", "share", "one step more", "takes off", "for", "a kB"]
    worst = [(row["name"], row["loss"], row["more"][2] if row["more"] else None) for row in rows[:WORST]]
    head = cells[0] if cells else []
    intro = (
        "The loss that the table predicts of each layer at its bits, every other layer left as it was measured: kept layers count nothing."
    )
    if rows and rows[0]["loss"] > 0:
        intro += f" {head[0]} at {head[1]} hurts most: {head[3]} of the sum."
        intro += f" {head[4]} instead would take off {head[5]} for {head[6]}." if head[4] else " It has its best already."
    plot = markup.plot(
        "layers", losses_by_layer(worst), "Predicted loss of the layers that hurt most, now and after one step more of bits."
    )
    twin = markup.details(
        "As a table", markup.table("Predicted loss by layer, and what the step that gains most a byte would buy", columns, cells)
    )
    return markup.section("Which layer hurts", markup.paragraph(intro), plot, twin)


def _hurting(record: Record, table: Table) -> list[dict[str, Any]]:
    """Each layer's predicted loss, and (precision, bytes more, loss then, loss gained a byte) of its best step to more bytes."""
    rows = []
    for name, layer in record.layers.items():
        options, now = table.layers[name], table.layers[name].get(layer.precision)
        if now is None:
            continue
        steps = [
            (precision, cell.bytes - now.bytes, cell.loss, (now.loss - cell.loss) / (cell.bytes - now.bytes))
            for precision, cell in options.items()
            if cell.bytes > now.bytes and cell.loss < now.loss
        ]
        best = max(steps, key=lambda step: step[3], default=None)
        rows.append({"name": name, "precision": layer.precision, "loss": now.loss, "more": best})
    return rows


def _ladders(records: Mapping[str, Record]) -> str:
    climbed = {name: record for name, record in records.items() if record.ladder}
    if not climbed:
        return ""
    intro = "A step that does not lower the loss on held-out inputs is not kept; the next one starts where the last kept one ended."
    plots = [markup.plot("ladder", ladder(record), "Held-out loss after each step.") for record in climbed.values()]
    tables = [_ladder_table(record, name if len(records) > 1 else "Steps") for name, record in climbed.items()]
    return markup.section("What each step gained", markup.paragraph(intro), *(plots if len(records) == 1 else []), *tables)


def _ladder_table(record: Record, caption: str) -> str:
    score = counted(record.ladder)
    rows = [
        [row.step, _number(row.loss), *([_number(getattr(row, score))] if score else []), "kept" if row.kept else "not kept"]
        for row in record.ladder
    ]
    return markup.table(caption, ["step", "held-out loss", *([WORDS[score]] if score else []), "kept?"], rows)


# The slider


def _explorers(records: Mapping[str, Record]) -> list[str]:
    """One for each table: budgets of one calibrate run share theirs."""
    shared: list[tuple[Table, list[str]]] = []
    for name, record in records.items():
        known = next((names for table, names in shared if table == record.table), None)
        if known is not None:
            known.append(name)
        elif record.table is not None:
            shared.append((record.table, [name]))
    return [
        _explorer(f"budgets-{index}", table, records[names[0]], f"Any other budget{'' if len(shared) == 1 else ' of ' + ', '.join(names)}")
        for index, (table, names) in enumerate(shared)
    ]


def _explorer(key: str, table: Table, record: Record, heading: str) -> str:
    """The best scheme within any size, as the table predicts: a slider, and for those without JavaScript a table of some sizes."""
    data = frontier_data(table, record)
    note = (
        f'<p id="{key}-note">Every scheme here is the best of its own size, as the table predicts it before polishing. Between two of them '
        "<code>anybit allocate</code> may find a slightly better one: it solves for your budget, measures the best schemes and polishes. "
        "Sizes are within 64 bytes of the file; limits on anything but size have no part here.</p>"
    )
    some = markup.details("Some budgets as a table", _some_budgets(data, record.float_bytes))
    section = markup.section(heading, note, _controls(key, data, record), some, markup.embedded(f"{key}-data", data))
    return f'<div class="explorer" data-explorer="{key}-data">{section}</div>'


def _controls(key: str, data: Mapping[str, Any], record: Record) -> str:
    """What the script shows and fills in; hidden where there is none."""
    sizes = [data["bytes"], *(step["bytes"] for step in data["steps"])]
    place = _round_number((sizes[-1] - sizes[0]) / SLIDER_PLACES)
    low, high = (-(-size // place) * place for size in (sizes[0], sizes[-1]))
    now = record.result.bytes if record.result else low
    return (
        f'<div class="controls" hidden><p class="budget"><label for="{key}-slider">Budget for the file</label> '
        '<span data-show="budget" aria-hidden="true"></span></p>'
        f'<input type="range" id="{key}-slider" min="{low}" max="{high}" step="{place}" value="{now}" aria-describedby="{key}-note">'
        '<p class="buttons"><button type="button">Previous scheme</button><button type="button">Next scheme</button></p>'
        f"{markup.pairs([('size', ''), ('bits a weight', ''), ('predicted loss', '')], shown=('size', 'bits', 'loss'))}"
        '<p data-show="next"></p><p class="unseen" role="status" data-show="status"></p>'
        '<div class="strip" data-show="strip" aria-hidden="true"></div>'
        '<p class="key">Bars: bits of the weights of each layer. Line: of its input.</p>'
        f"{_scheme_table(data['layers'], record)}</div>"
    )


def _scheme_table(names: Sequence[str], record: Record) -> str:
    """Each layer's precision in the run, and where the script writes that at the budget."""
    rows = []
    for index, name in enumerate(names):
        own = markup.text(str(record.layers[name].precision))
        rows.append(f'<tr><th scope="row">{markup.text(name)}</th><td>{own}</td><td data-layer="{index}">{own}</td></tr>')
    head = '<tr><th scope="col">layer</th><th scope="col">this run</th><th scope="col">at this budget</th></tr>'
    return (
        '<div class="scroll tall" tabindex="0" role="region" aria-label="Scheme at this budget"><table>'
        "<caption>Precision of every layer, as the run has it and at this budget (\u2260 where they differ)</caption>"
        f"<thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def frontier_data(table: Table, record: Record) -> dict[str, Any]:
    """The frontier in whole file sizes and predicted losses, each step with the bits a weight that it ends at."""
    weights = {name: record.layers[name].weights for name in table.layers}
    names, found = list(table.layers), table.frontier
    now = dict(found.start)
    bits = sum(weights[name] * precision.stored_weight_bits for name, precision in now.items())
    data = {
        "layers": names,
        "start": [str(precision) for precision in now.values()],
        "bytes": round(table.fixed_bytes + found.cost),
        "loss": table.floor + found.loss,
        "bits": bits / table.weights,
        "steps": [],
    }
    for step in found.steps:
        bits += weights[step.layer] * (step.precision.stored_weight_bits - now[step.layer].stored_weight_bits)
        now[step.layer] = step.precision
        data["steps"].append(
            {
                "layer": names.index(step.layer),
                "precision": str(step.precision),
                "bytes": round(table.fixed_bytes + step.cost),
                "loss": table.floor + step.loss,
                "bits": bits / table.weights,
            }
        )
    return data


def _some_budgets(data: Mapping[str, Any], float_bytes: int) -> str:
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
        rows.append([human_bytes(size), share, f"{points[place]['bits']:.2f}", _number(points[place]["loss"]), gained])
    columns = ["size", "% of float", "bits a weight", "predicted loss", "next step"]
    return markup.table("Best predicted schemes over the size of the file", columns, rows)


def _round_number(value: float) -> int:
    """The nearest of 1, 2, 5, 10, 20, 50, ... not above `value`."""
    power = 1
    while power * 10 <= value:
        power *= 10
    return next((factor * power for factor in (5, 2) if factor * power <= value), power)


# Trainings and searches


def _training(record: Record) -> str:
    epochs = record.epochs
    columns, rows = ["epoch", "loss"], [[str(row.epoch), _number(row.loss)] for row in epochs]
    parts = []
    if epochs[-1].layers:
        parts.append(markup.plot("epoch-bits", bits_over_epochs(epochs), "Bits of every layer after each epoch."))
    if epochs[-1].weight_bits is not None:
        parts.append(markup.plot("mean-bits", mean_bits_over_epochs(epochs), f"Bits a weight by epoch; budget {record.budget or 'none'}."))
        columns.append("bits a weight")
        rows = [[*cells, _number(row.weight_bits)] for cells, row in zip(rows, epochs, strict=True)]
    score = next((key for key in WORDS if epochs[-1].frozen.get(key) is not None), None)
    if score:
        label = f"{score} by epoch, as the network trains and as it would be saved."
        parts.append(markup.plot("scores", scores_over_epochs(epochs, score), label))
        columns += [f"soft {score}", f"frozen {score}"]
        rows = [[*cells, _number(row.soft.get(score)), _number(row.frozen.get(score))] for cells, row in zip(rows, epochs, strict=True)]
    return markup.section("How it trained", *parts, markup.details("As a table", markup.table("Epochs", columns, rows)))


def _searched(record: Record) -> str:
    found = record.search
    shown = [[_number(row.cost), _number(row.score), _number(row.measured), row.origin, _scheme(row.scheme)] for row in found.front]
    columns = [found.quantity, found.score, "measured again", "proposed by", "scheme"]
    budgets = [
        [text, human_bytes(row.bytes), f"{row.weight_bits:.2f}", human_count(row.bops), _scheme(row.scheme)]
        for text, row in found.budgets.items()
    ]
    tables = [markup.table("The front", columns, shown)]
    if budgets:
        tables.insert(0, markup.table("What each budget gets", ["budget", "size", "bits a weight", "BOPs", "scheme"], budgets))
    count = len(found.evaluated)
    intro = f"{count} subnets were evaluated. " if count else ""
    intro += "The front is the best score of every cost; it was measured again on samples that were not searched on."
    label = f"{found.score} over {found.quantity} of every evaluated subnet, and the front."
    return markup.section(
        "The search", markup.paragraph(intro), markup.plot("search", searched(found), label), markup.details("As tables", *tables)
    )


def _subnets(record: Record) -> str:
    scored = [key for key in WORDS if any(record.tested(key, name) is not None for name in record.subnets)]
    rows = []
    for name, amounts in record.subnets.items():
        told = [_number(record.tested(key, name)) for key in scored]
        rows.append([name, human_bytes(amounts.bytes), f"{amounts.weight_bits:.2f}", human_count(amounts.bops), *told])
    return markup.section(
        "Uniform subnets",
        markup.table("Uniform subnets", ["subnet", "size", "bits a weight", "BOPs", *(WORDS[key] for key in scored)], rows),
    )


def _scheme(scheme: Mapping[str, Precision]) -> str:
    return " ".join(f"{name} {precision}" for name, precision in scheme.items())


# What stands behind it


def _certificates(records: Mapping[str, Record]) -> str:
    parts = []
    for name, record in records.items():
        said = [markup.paragraph(words) for words in _in_plain_words(record)]
        parts += [markup.subheading(name), *said] if said and len(records) > 1 else said
    return markup.section("How sure this is", *parts) if parts else ""


def _in_plain_words(record: Record) -> Iterable[str]:
    """What was solved, how far from the best it can be, what was measured, what was chosen and why."""
    if record.certificate.value is not None and record.certificate.bound is not None:
        yield _solved(record)
    elif record.schemes and record.budget is None:
        yield "No budget was given: every layer has its largest candidate, and nothing was solved for."
    if len(record.schemes) > 1:
        yield _measured(record)
    if record.uncovered:
        yield "Not quantized: " + "; ".join(f"{name} ({why})" for name, why in record.uncovered.items()) + "."
    if record.certificate.seed is not None:
        yield f"Every draw came from seed {record.certificate.seed}: the same command on the same machine gives the same file."


def _solved(record: Record) -> str:
    certificate = record.certificate
    value, bound = certificate.value, certificate.bound
    better = "so there is none better" if value <= bound else f"so none can be better by more than {_number(value - bound)}"
    if record.schemes:
        better += ", as far as the prediction is right"
    return (
        f"An integer program ({certificate.solver or 'its solver is not named'}) looked for the {certificate.objective or 'best scheme'} "
        f"within {record.budget}. Its best scheme reaches {_number(value)}. It proved that none within the budget reaches less than "
        f"{_number(bound)} (gap {_number(100 * (certificate.gap or 0.0))} %), {better}."
    )


def _measured(record: Record) -> str:
    uniform, chosen = sum(row.name.startswith("uniform") for row in record.schemes), record.chosen
    count = f"{record.inputs['held_out']} " if "held_out" in record.inputs else ""
    words = (
        f"A prediction adds up what the layers cost one by one. So {len(record.schemes) - uniform} solved and {uniform} uniform schemes "
        f"were measured whole, on {count}held-out inputs that nothing was fitted to."
    )
    if chosen is not None:
        words += f" Chosen: {chosen.name}, predicted {_number(chosen.predicted)}, measured {_number(chosen.measured)}. {_reason(record)}"
    return words


def _reason(record: Record) -> str:
    limited = Budget.parse(record.budget).loss() if record.budget else None
    return limited.chosen if limited else "No other measured less."


def _settings(records: Mapping[str, Record]) -> str:
    parts = []
    for name, record in records.items():
        flat = {**record.settings, **{f"environment: {key}": value for key, value in record.environment.items()}}
        rows = [[key, value if isinstance(value, str) else json.dumps(value)] for key, value in flat.items()]
        title = "Settings and environment" + (f" of {name}" if len(records) > 1 else "")
        parts += [markup.details(title, markup.table(title, ["what", "value"], rows))] if rows else []
    return markup.section("How it was made", *parts) if parts else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
