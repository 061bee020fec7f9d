"""Print reports on the terminal, as tables and short sentences. Names are escaped, because they may come from foreign files."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from anybit.errors import printable, some
from anybit.reports.words import SCORE_WORDS, human_bytes, human_count, milliseconds, scores_line, shape_in_words

Report = Mapping[str, Any]

SHOWN = ("run", "settings", "environment", "references", "shapes", "bits", "result", "ladder", "float_test", "test", "units")
"""Sections of a comparison that are shown completely; for the others, only the number of differences."""
MOST_UNITS = 10


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print a table, with text to the left and numbers to the right; plain if stdout is not a terminal."""
    table = Table(title=Text(printable(title), "table.title"), title_justify="left", header_style="bold")
    cells = [[_cell(value) for value in row] for row in rows]
    for index, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if all(_is_numeric(row[index]) for row in cells) else "left"
        table.add_column(Text(printable(column)), justify=justify, no_wrap=index > 0, overflow="fold")  # no name is truncated
    for row in cells:
        table.add_row(*map(Text, row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return printable(value)
    return "" if value is None else f"{value:.4g}"


def _is_numeric(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in "-"


def print_line(words: str) -> None:
    print(printable(words))


# A run


def print_report(report: Report) -> None:
    """Print a run: its schemes or epochs, the bits of each layer, the gain of each step, its stages."""
    if "epochs" in report:
        _print_epochs(report["epochs"])
    if report.get("schemes"):
        _print_schemes(report)
    total = report["result"]["bytes"]
    layers = [
        [name, row["precision"], human_count(row["weights"]), f"{100 * row['bytes'] / total:.1f} %"]
        for name, row in report["layers"].items()
    ]
    print_table("Layers (W4A8: 4-bit weights, 8-bit input)", ["layer", "bits", "weights", "share of size"], layers)
    if report.get("ladder"):
        _print_ladder(report["ladder"])
    if report.get("units"):
        errors = [[name, unit["before"], unit["after"], str(unit["steps"])] for name, unit in report["units"].items() if unit]
        print_table("Units (relative error on held-out inputs)", ["unit", "before", "after", "steps kept"], errors)
    if "latency" in report:
        times = {kind: milliseconds(seconds) for kind, seconds in report["latency"].items()}
        print_line(f"Latency: predicted {times['predicted']}, measured {times['exported']}, float32 {times['float32']}")
    stages = [[stage["stage"], f"{stage['seconds']:.1f} s", human_bytes(stage["peak_bytes"])] for stage in report["stages"]]
    print_table("Stages", ["stage", "time", "peak memory"], stages)


def _print_schemes(report: Report) -> None:
    score = _score_counted(report["schemes"])
    rows = [
        [
            _marked(row["name"], row["chosen"]),
            f"{row['weight_bits']:.2f}",
            human_bytes(row["bytes"]),
            f"{row['percent']:.1f}",
            human_count(row["bops"]),
            row["predicted"],
            row.get("measured"),
            *([row[score]] if score else []),
        ]
        for row in report["schemes"]
    ]
    columns = ["scheme", "bits", "size", "% of float", "BOPs", "predicted", "measured", *([f"held-out {score}"] if score else [])]
    print_table(f"Schemes for {report['budget'] or 'no budget'} (loss on held-out inputs; > chosen)", columns, rows)


def _print_ladder(ladder: Sequence[Report]) -> None:
    score = _score_counted(ladder)
    rows = [[row["step"], row["loss"], row.get(score) if score else None, "yes" if row["kept"] else "no"] for row in ladder]
    print_table("Gain of each step (held-out inputs)", ["step", "loss", score or "top1", "kept"], rows)


def _print_epochs(epochs: Sequence[Report]) -> None:
    """Print the training and how the scheme grew: the bits of every layer after each epoch."""
    scores = [key for key in ("top1", "loss") if key in epochs[-1].get("frozen", {})][:1]
    kinds = [(kind, key) for key in scores for kind in ("soft", "frozen")]
    gates = [key for key in ("paper_bits", "undecided", "temperature") if key in epochs[-1]]
    rows = [
        [
            str(row["epoch"]),
            row["loss"],
            *(row.get(kind, {}).get(key) for kind, key in kinds),
            f"{row['weight_bits']:.2f}",
            *(row[key] for key in gates),
        ]
        for row in epochs
    ]
    columns = ["epoch", "loss", *(f"{kind} {key}" for kind, key in kinds), "bits", *(key.replace("_", " ") for key in gates)]
    print_table("Epochs", columns, rows)
    if "above_budget" in epochs[-1]:
        layers = [[name, " ".join(str(row["layers"][name]) for row in epochs)] for name in epochs[-1]["layers"]]
        print_table("Bits of each layer, epoch by epoch", ["layer", "bits"], layers)


def _score_counted(rows: Sequence[Report]) -> str | None:
    """Return the score that every row has from labels: the user's metric, else the task's."""
    return next((key for key in SCORE_WORDS if key != "loss" and all(key in row for row in rows)), None)


def _marked(name: str, is_chosen: bool) -> str:
    return f"{'> ' if is_chosen else '  '}{name}"


def result_line(report: Report) -> str:
    """Write a run in one line: its size and its accuracy on test data, or else on held-out inputs."""
    result, test, float_test = report["result"], report.get("test") or {}, report.get("float_test")
    line = f"{human_bytes(result['bytes'])} ({result['percent']:.1f} % of float32), {result['weight_bits']:.2f} bits per weight"
    if "top1" in test:
        line += f"; test top-1 {test['top1']:.2f}" + (f" (float {float_test['top1']:.2f})" if float_test else "")
    elif (held_out := [row["top1"] for row in report.get("ladder") or () if row["kept"] and "top1" in row]) and not test:
        before = report.get("float_held_out", {}).get("top1")
        line += f"; held-out top-1 {held_out[-1]:.2f}" + (f" (float {before:.2f})" if before is not None else "")
    return line


def print_frontier(reports: Iterable[Report]) -> None:
    """Print a row per budget: the chosen scheme, its predicted and measured loss."""
    columns = ["budget", "chosen", "bits", "size", "BOPs", "predicted", "measured", "after polish", "test top-1"]
    print_table("Frontier (loss on held-out inputs)", columns, map(_frontier_row, reports))


def _frontier_row(report: Report) -> list[Any]:
    chosen = next(row for row in report["schemes"] if row["chosen"])
    last_kept = [row for row in report["ladder"] if row["kept"]][-1]
    result = report["result"]
    amounts = [f"{result['weight_bits']:.2f}", human_bytes(result["bytes"]), human_count(result["bops"])]
    losses = [chosen["predicted"], chosen.get("measured"), last_kept["loss"]]
    return [report["budget"] or "none", chosen["name"], *amounts, *losses, report.get("test", {}).get("top1")]


# A supernet, a search


def print_supernet(report: Report) -> None:
    """Print a supernet's training, and cost and score of every bit-width."""
    score = next((key for key in ("top1", "loss") if key in report.get("float_test", {})), None)
    columns = ["subnet", "size", "% of float", "BOPs"]
    if score is None:
        print_table("Uniform subnets", columns, [_subnet_row(name, row) for name, row in report["subnets"].items()])
        return
    epochs = [[str(row["epoch"]), row["loss"], *(row["widths"][name][score] for name in report["subnets"])] for row in report["epochs"]]
    print_table(f"Epochs ({score} on part of the test data)", ["epoch", "loss", *report["subnets"]], epochs)
    rows = [
        [*_subnet_row(name, row), report["float_store"][name][score], report["test"][name][score]]
        for name, row in report["subnets"].items()
    ]
    title = f"Uniform subnets ({score} on the test data, float {report['float_test'][score]:.4g})"
    print_table(title, [*columns, "float store", "stored"], rows)


def _subnet_row(name: str, row: Report) -> list[str]:
    return [name, human_bytes(row["bytes"]), f"{row['percent']:.1f}", human_count(row["bops"])]


def print_search(report: Report, front: bool = True) -> None:
    """Print the front of a search, and the scheme of each budget."""
    if front:
        rows = [[row["cost"], row["score"], row["measured"], row["origin"]] for row in report["front"]]
        columns = [report["quantity"], report["score"], "measured again", "proposed by"]
        print_table("Pareto front (held-out inputs; measured again on others)", columns, rows)
    ranked = "" if report["rank_correlation"] is None else f", rank correlation of the predictor {report['rank_correlation']:.3f}"
    print_line(f"hypervolume {report['hypervolume']['value']:.4g}{ranked}, {report['recalled']} results reused")
    for budget, row in report["budgets"].items():
        timed = f", {milliseconds(row['latency'])} predicted" if "latency" in row else ""
        print_line(f"{budget}: {row['weight_bits']:.2f} bits, {human_bytes(row['bytes'])}, {human_count(row['bops'])} BOPs{timed}")


# An inspected network


def print_inspection(inspection: Report, layers: bool = True) -> None:
    """Print the layers (with `details`) and the network's cost at each bit-width."""
    ran = all(layer["macs"] is not None for layer in inspection["layers"].values())
    if layers:
        _print_layers(inspection, ran)
    columns = ["weights", "size", "% of float", *(["BOPs"] if ran else [])]
    rows = [
        [f"W{bits}", human_bytes(row["bytes"]), f"{row['percent']:.1f}", *([human_count(row["bops"])] if ran else [])]
        for bits, row in inspection["uniform"].items()
    ]
    print_table(f"Whole network (float32: {human_bytes(inspection['float_bytes'])})", columns, rows)
    print_line(export_line(inspection["export"]))
    if not ran:
        print("Shapes, BOPs, folded batch norms and unused layers need --data; sizes are those without folding.")


def export_line(trial: Report) -> str:
    """Return whether the network can be exported, and which layers would compute in float."""
    if not trial["ok"]:
        return f"{'ONNX export not tried' if trial['ok'] is None else 'ONNX export fails'}: {trial['reason']}"
    integer, floating = trial["integer_layers"], trial["float_layers"]
    some = f"{len(integer)} of {len(integer) + len(floating)} layers on integers, in float: {', '.join(floating)}"
    fixed = f" {length_line(trial['text_length'])}" if trial["text_length"] else ""
    return f"ONNX export: {some if floating else 'every layer on integers'}.{fixed}"


def length_line(length: int) -> str:
    """Return that a file takes texts of one length only."""
    return (
        f"The file takes texts of {length} tokens only, padding included: the forward takes their length as a number of Python, as in "
        f"int(x.shape[1]). Pad every text to {length} tokens, or let the forward use x.shape[1] as it is."
    )


def _print_layers(inspection: Report, ran: bool) -> None:
    """Print two tables: in a single one, long names would leave no room for the layer's own."""
    columns = ["layer", "class", "weight", *(["input", "output", "MACs", "folds", "block"] if ran else [])]
    print_table("Layers", columns, [_layer_row(name, layer, ran) for name, layer in inspection["layers"].items()])
    sizes = [[name, *map(human_bytes, layer["bytes"].values())] for name, layer in inspection["layers"].items()]
    print_table("Bytes of each layer", ["layer", *(f"W{bits}" for bits in inspection["uniform"])], sizes)
    for name, reason in inspection["uncovered"].items():
        print_line(f"not covered: {name}: {reason}")
    for name, reason in inspection["unfolded"].items():
        print_line(f"not folded: {name}: {reason}")
    if inspection.get("unread"):  # older inspections have none
        print_line(f"on which no compared output depends: {', '.join(inspection['unread'])}")


def _layer_row(name: str, layer: Report, ran: bool) -> list[Any]:
    row = [name, layer["class"], shape_in_words(layer["weight"])]
    if not ran:
        return row
    shapes = [shape_in_words(layer["input"]), shape_in_words(layer["output"])]
    return [*row, *shapes, human_count(layer["macs"]), layer["folds"], layer["block"]]


def print_profile(profile: Report, layers: bool = True) -> None:
    """Print the time of each layer in float and on integers, and of whole networks."""
    if layers:
        rows = [[name, *(1e6 * row[kind] for kind in ("float32", "int8", "boundaries"))] for name, row in profile["layers"].items()]
        rows.append(["everything else", *(1e6 * profile["rest"][kind] for kind in ("float32", "int8")), None])
        print_table("Microseconds of one sample", ["layer", "float32", "int8", "boundaries, if float alone"], rows)
    times = {kind: milliseconds(seconds) for kind, seconds in profile["measured"].items()}
    recalled = " (measured before)" if profile["recalled"] else ""
    print_line(
        f"whole network: float32 {times['float32']}, 8 bits {times['int8']}, every second layer float {times['alternating']}{recalled}"
    )


# An exported file or folder


def print_verdict(verdict: Report, numbers: bool = True) -> None:
    """Print the checks of an exported file and, with `numbers`, its comparison with the simulation."""
    if verdict["numbers"] and numbers:
        _print_kernels(verdict)
        _print_equality(verdict)
        _print_simulation(verdict)
    _print_outcome(verdict)


def _print_kernels(verdict: Report) -> None:
    print_line(
        f"{len(verdict['kernels'])} of {verdict['quantized_layers']} layers run on integer kernels" + ("" if verdict["floats"] else ".")
    )
    for name, reason in verdict["floats"].items():
        print_line(f"  in float: {name}: {reason}")
    if verdict["advice"]:
        print_line(verdict["advice"])


def _print_equality(verdict: Report) -> None:
    """Print whether the runtime equals the integer reference, and where input codes flip."""
    numbers, flipped = verdict["numbers"], verdict["simulation"]["flipped_codes"]
    if "bitwise" in verdict["skipped"]:
        print_line(f"not checked here: equality with the integer reference: {verdict['skipped']['bitwise']}.")
    else:
        print_line(f"The runtime's outputs are {'' if numbers['bitwise'] else 'not '}bit for bit equal to the integer reference.")
    if numbers["in_float"]:
        print_line(f"  computed in float between integers: {', '.join(numbers['in_float'])}")
    if flipped:
        layer, share = max(flipped.items(), key=lambda item: item[1])
        print_line(f"Input codes that differ from the simulation: at most {100 * share:.2f} %, in {layer}")


def _print_simulation(verdict: Report) -> None:
    """Print the difference between exported and simulated outputs, and the scores of both."""
    simulation = verdict["simulation"]
    line = f"Compared with the simulation on {verdict['inputs']} inputs: largest difference {simulation['largest_difference']:.4g}"
    line += f" (largest output {simulation['largest_output']:.4g})"
    several = simulation.get("outputs", {})
    print_line(line + (f", top-1 agreement {simulation['agreement']:.2f} %" if "agreement" in simulation and not several else ""))
    for name, apart in several.items():
        print_line(f"  output {name}: largest difference {apart['largest_difference']:.4g} (largest {apart['largest_output']:.4g})")
    for kind, scores in verdict.get("accuracy", {}).items():
        print_line(f"{kind}, on these inputs: {scores_line(scores)}")


def _print_outcome(verdict: Report) -> None:
    for failure in verdict["failures"]:
        print_line(f"FAILED: {failure}")
    failed = len(verdict["failures"])
    print_line("verified" if verdict["ok"] else f"not verified: {failed} check{'s' * (failed > 1)} failed")


def print_file(report: Mapping[str, Any], details: bool = True) -> None:
    """Print the contents of an exported ONNX file."""
    size, packed = human_bytes(report["bytes"]), human_bytes(report["ideal_bytes"])
    print_line(f"{report['file']}: {size}, of which the packed weights take {packed}")
    if details:
        print_line(f"{report['integer_layers']} of {report['layers']} layers on integers")
    if details and report["measured_edges"]:
        count = len(report["measured_edges"])
        print_line(f"{count} tensors between operators have no range in the run; their ranges were measured on the inputs of this export.")
    if report["text_length"]:
        print_line(length_line(report["text_length"]))


def print_folder(exported: Report, details: bool = True) -> None:
    """Print the contents of an exported folder, and what its format cannot store."""
    size = human_bytes(exported["bytes"])
    print_line(f"{exported['folder']}: {size}, {exported['packed']} of {exported['layers']} quantized weights packed")
    if exported["dense"] and details:
        print_line(f"in float32 with the values of their codes ({human_bytes(exported['dense_bytes'])}): {some(exported['dense'])}")
    if details:
        _print_float_inputs(exported)


def _print_float_inputs(exported: Report) -> None:
    if exported["float_inputs"]:
        print_line(f"float, because the format has no quantizer for their inputs: {some(exported['float_inputs'])}")


def print_folder_verdict(verdict: Report, numbers: bool = True) -> None:
    """Print the checks of an exported folder and, with `numbers`, its comparison with the simulation."""
    for reason in verdict["skipped"].values():
        print_line(f"not checked here: {reason}")
    if "simulation" in verdict and numbers:
        _print_float_inputs(verdict)
        print_line(f"Every number of {verdict['packed']} packed layers and of all others equals the run's.")
        _print_simulation(verdict)
    _print_outcome(verdict)


def print_bench(bench: Report) -> None:
    """Print the size against the bits, and the latency against float32 in each runtime."""
    size, packed = human_bytes(bench["bytes"]), human_bytes(bench["ideal_bytes"])
    smaller = bench["float_bytes"] / bench["bytes"]
    print_line(f"{size}, of which the packed weights take {packed}: {smaller:.2f}x smaller than float32")
    for runtime in ("onnxruntime", "openvino"):
        if runtime in bench:
            faster = bench[runtime]["faster"]
            print(
                f"{runtime}: {faster['ratio']:.2f}x as fast as float32 (half of {bench['rounds']} rounds between {faster['low']:.2f}x "
                f"and {faster['high']:.2f}x), batch {bench['batch_size']}, {bench['threads']} thread(s)"
            )


# Two runs, one layer, the cache


def print_difference(difference: Report) -> None:
    """Print the differences between two runs, one table per section; of the units, those whose error changed most."""
    if difference["same"]:
        first, second = difference["runs"]
        print_line(f"{first} and {second} are identical: settings, bits, measurements and packed weights.")
        return
    sections = dict(difference["differences"])
    across_roads = "road" in sections.get("run", {})
    if "units" in sections:
        sections["units"] = {name: {"after": unit["after"]} for name, unit in [*sections["units"].items()][:MOST_UNITS] if "after" in unit}
    _print_sections(sections, _columns(difference["runs"]), across_roads)
    others = {name: sum(1 for _ in _leaves(piece)) for name, piece in sections.items() if name not in SHOWN}
    if others:
        print_line("Other differences (--json shows them): " + ", ".join(f"{name} ({count})" for name, count in others.items()))
    if across_roads:
        print("Entries of only one of the workflows are left out (--json shows them).")
    same = "the same bytes" if difference["same_weights"] else "not the same bytes"
    print_line(f"{difference['shared_layers']} layers are in both; the packed weights are {same}.")


def _columns(runs: Sequence[str]) -> Sequence[str]:
    """Name two runs by their folders' names, or by their paths if the names are equal."""
    names = [Path(run).name for run in runs]
    return runs if names[0] == names[1] else names


def _print_sections(sections: Report, columns: Sequence[str], both_sides: bool) -> None:
    """Print each complete section; with `both_sides`, only entries of both runs."""
    for name in SHOWN:
        leaves = [(key, *sides) for key, sides in _leaves(sections.get(name, {})) if not both_sides or None not in sides]
        if leaves:
            rows = [[key, _brief(left), _brief(right), _rise(left, right)] for key, left, right in leaves]
            print_table(name.replace("_", " "), ["", *columns, "change"], rows)


def _leaves(tree: Any, within: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Yield (name, [left, right]) of every difference below."""
    if isinstance(tree, list):
        yield within, tree
    for key, piece in tree.items() if isinstance(tree, Mapping) else ():
        yield from _leaves(piece, f"{within}.{key}" if within else key)


def _brief(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _rise(left: Any, right: Any) -> str:
    are_numbers = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in (left, right))
    return f"{right - left:+.4g}" if are_numbers else ""


CANDIDATE_COLUMNS = {
    "loss": "predicted loss",
    "bytes": "size",
    "bops": "BOPs",
    "evaluated": "evaluated",
    "best_score": "best score",
    "on_front": "on the front",
}


def print_explanation(explanation: Report) -> None:
    """Print a layer's candidates with its own one marked, and the explanation."""
    if isinstance(explanation.get("candidates"), Mapping):
        _print_candidates(explanation)
    for sentence in explanation["why"]:
        print_line(sentence)


def _print_candidates(explanation: Report) -> None:
    candidates, formats = explanation["candidates"], {"bytes": human_bytes, "bops": human_count}
    keys = [key for key in CANDIDATE_COLUMNS if all(key in row for row in candidates.values())]
    rows = [
        [_marked(name, name == explanation.get("precision")), *(formats[key](row[key]) if key in formats else row[key] for key in keys)]
        for name, row in candidates.items()
    ]
    print_table(f"{explanation['layer']}: candidate precisions", ["precision", *(CANDIDATE_COLUMNS[key] for key in keys)], rows)


def print_cache(cache: Report) -> None:
    """Print the contents of the cache, and what was removed."""
    for path, reason in cache["damaged"].items():
        print_line(f"damaged and removed: {path}: {reason}")
    if cache["removed_bytes"]:
        print_line(f"{human_bytes(cache['removed_bytes'])} removed")
    print_line(f"{cache['folder']}: {cache['results']} results, {human_bytes(cache['bytes'])} of at most {human_bytes(cache['limit'])}")
