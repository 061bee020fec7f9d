"""Records as terminal tables."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from anybit.errors import printable, some
from anybit.reports.words import human_bytes, human_count


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """A table on the terminal: text to the left, numbers to the right; plain where it is not a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(title), "table.title"), title_justify="left", header_style="bold")
    rows = [[printable(cell) if isinstance(cell, str) else "" if cell is None else f"{cell:.4g}" for cell in row] for row in rows]
    for index, column in enumerate(columns):
        numeric = all(row[index][:1].isdigit() or row[index][:1] in "-" or not row[index] for row in rows)
        table.add_column(
            Text(printable(column)), justify="right" if numeric else "left", no_wrap=index > 0, overflow="fold"
        )  # no name is cut
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def print_report(report: Mapping[str, Any]) -> None:
    """A report as tables: schemes against the uniform ones or the epochs, bits of each layer, what each step gained, stages."""
    if "epochs" in report:
        _print_epochs(report["epochs"])
    measured = report.get("schemes", [])
    if measured:
        metric = _counted(measured)
        columns = ["scheme", "bits", "size", "% of float", "BOPs", "predicted", "measured"] + ([f"held-out {metric}"] if metric else [])
        rows = [
            [
                ("> " if row["chosen"] else "  ") + row["name"],
                f"{row['weight_bits']:.2f}",
                human_bytes(row["bytes"]),
                f"{row['percent']:.1f}",
                human_count(row["bops"]),
                row["predicted"],
                row.get("measured"),
            ]
            + ([row[metric]] if metric else [])
            for row in measured
        ]
        print_table(f"Schemes for {report['budget'] or 'no budget'} (loss on held-out inputs; > chosen)", columns, rows)
    print_table("Layers", ["layer", "bits", "weights", "share of size"], _layer_rows(report))
    if report.get("ladder"):
        metric = _counted(report["ladder"])
        rows = [[row["step"], row["loss"], row.get(metric), "yes" if row["kept"] else "no"] for row in report["ladder"]]
        print_table("What each step gained (held-out inputs)", ["step", "loss", metric or "top1", "kept"], rows)
    if report.get("units"):
        errors = [[name, unit["before"], unit["after"], str(unit["steps"])] for name, unit in report["units"].items() if unit]
        print_table("Units (relative error on held-out inputs)", ["unit", "before", "after", "steps kept"], errors)
    if "latency" in report:
        seconds = {kind: f"{1e3 * value:.4g} ms" for kind, value in report["latency"].items()}
        print(f"Latency: predicted {seconds['predicted']}, measured {seconds['exported']}, float32 {seconds['float32']}")
    stages = [[s["stage"], f"{s['seconds']:.1f} s", human_bytes(s["peak_bytes"])] for s in report["stages"]]
    print_table("Stages", ["stage", "time", "peak memory"], stages)


def _print_epochs(epochs: list[Mapping[str, Any]]) -> None:
    """How the network trained, and how its scheme grew: the bits of every layer after each epoch."""
    scores = [key for key in ("top1", "loss") if key in epochs[-1].get("frozen", {})][:1]
    columns = ["epoch", "loss", *(f"{kind} {key}" for key in scores for kind in ("soft", "frozen")), "bits"]
    told = [key for key in ("paper_bits", "undecided", "temperature") if key in epochs[-1]]
    rows = [
        [
            str(row["epoch"]), row["loss"], *(row.get(kind, {}).get(key) for key in scores for kind in ("soft", "frozen")),
            f"{row['weight_bits']:.2f}",
            *(row[key] for key in told),
        ]
        for row in epochs
    ]  # fmt: skip
    print_table("Epochs", columns + [key.replace("_", " ") for key in told], rows)
    if "undecided" in epochs[-1]:
        layers = [[name, " ".join(str(row["layers"][name]) for row in epochs)] for name in epochs[-1]["layers"]]
        print_table("Bits of each layer, epoch by epoch", ["layer", "bits"], layers)


def _counted(rows: Iterable[Mapping[str, Any]]) -> str | None:
    """What rows measured with labels count: the user's metric, else top-1."""
    return next((key for key in ("metric", "top1") if all(key in row for row in rows)), None)


def print_frontier(reports: Iterable[Mapping[str, Any]]) -> None:
    """One row a budget: what was chosen, what was predicted and measured."""
    rows = []
    for report in reports:
        chosen = next(row for row in report["schemes"] if row["chosen"])
        final = [row for row in report["ladder"] if row["kept"]][-1]
        result, test = report["result"], report.get("test", {})
        rows.append(
            [
                report["budget"] or "none", chosen["name"], f"{result['weight_bits']:.2f}", human_bytes(result["bytes"]),
                human_count(result["bops"]), chosen["predicted"], chosen.get("measured"), final["loss"], test.get("top1"),
            ]
        )  # fmt: skip
    columns = ["budget", "chosen", "bits", "size", "BOPs", "predicted", "measured", "after polish", "test top-1"]
    print_table("Frontier (loss on held-out inputs)", columns, rows)


def print_supernet(report: Mapping[str, Any]) -> None:
    """What every bit-width costs and scores, and how it trained."""
    epochs = report["epochs"]
    score = next((key for key in ("top1", "loss") if key in report.get("float_test", {})), None)
    if score is not None:
        rows = [[str(row["epoch"]), row["loss"], *(row["widths"][name][score] for name in report["subnets"])] for row in epochs]
        print_table(f"Epochs ({score} on part of the test data)", ["epoch", "loss", *report["subnets"]], rows)
    columns = ["subnet", "size", "% of float", "BOPs"] + (["float store", "stored"] if score else [])
    rows = []
    for name, row in report["subnets"].items():
        scores = [report["float_store"][name][score], report["test"][name][score]] if score else []
        rows.append([name, human_bytes(row["bytes"]), f"{row['percent']:.1f}", human_count(row["bops"]), *scores])
    float_score = f", float {report['float_test'][score]:.4g}" if score else ""
    print_table(f"Uniform subnets{f' ({score} on the test data{float_score})' if score else ''}", columns, rows)


def print_search(report: Mapping[str, Any], front: bool = True) -> None:
    """The front, and what each budget gets."""
    if front:
        rows = [[row["cost"], row["score"], row["measured"], row["origin"]] for row in report["front"]]
        columns = [report["quantity"], report["score"], "measured again", "proposed by"]
        print_table("Pareto front (held-out inputs; measured again on others)", columns, rows)
    ranked = "" if report["rank_correlation"] is None else f", rank correlation of the predictor {report['rank_correlation']:.3f}"
    print(f"hypervolume {report['hypervolume']['value']:.4g}{ranked}, {report['recalled']} results recalled")
    for text, row in report["budgets"].items():
        timed = f", {1e3 * row['latency']:.4g} ms predicted" if "latency" in row else ""
        print(f"{text}: {row['weight_bits']:.2f} bits, {human_bytes(row['bytes'])}, {human_count(row['bops'])} BOPs{timed}")


def print_inspection(found: Mapping[str, Any], layers: bool = True) -> None:
    """Layers, unless they are not asked for, and what the network would cost at each bit-width."""
    seen = all(layer["macs"] is not None for layer in found["layers"].values())
    if layers:
        _print_layers(found, seen)
    columns = ["weights", "size", "% of float"] + (["BOPs"] if seen else [])
    rows = [
        [f"W{bits}", human_bytes(row["bytes"]), f"{row['percent']:.1f}"] + ([human_count(row["bops"])] if seen else [])
        for bits, row in found["uniform"].items()
    ]
    print_table(f"Whole network (float32: {human_bytes(found['float_bytes'])})", columns, rows)
    if not seen:
        print("Shapes of inputs and outputs, BOPs, what folds and what never runs need --data; sizes are with batch norms unfolded.")


def _print_layers(found: Mapping[str, Any], seen: bool) -> None:
    """Two tables: in one, long names would leave no room for the layer's own."""
    columns = ["layer", "class", "weight"] + (["input", "output", "MACs", "folds", "block"] if seen else [])
    rows, sizes = [], []
    for name, layer in found["layers"].items():
        shapes = (
            [_shape(layer["input"]), _shape(layer["output"]), human_count(layer["macs"]), layer["folds"], layer["block"]] if seen else []
        )
        rows.append([name, layer["class"], _shape(layer["weight"]), *shapes])
        sizes.append([name, *map(human_bytes, layer["bytes"].values())])
    print_table("Layers", columns, rows)
    print_table("Bytes of each layer", ["layer", *(f"W{bits}" for bits in found["uniform"])], sizes)
    for name, reason in found["uncovered"].items():
        print(printable(f"not covered: {name}: {reason}"))


def scores_line(scores: Mapping[str, float]) -> str:
    """Accuracies in percent, other scores as they are."""
    return "  ".join(f"{key} {value:.2f}" if key.startswith("top") else f"{key} {value:.5g}" for key, value in scores.items())


def print_verdict(found: Mapping[str, Any], numbers: bool = True) -> None:
    """What an exported file kept of its promises and, with `numbers`, how it compares with the simulation."""
    if found["numbers"] and numbers:
        _print_numbers(found)
    _print_outcome(found)


def _print_outcome(found: Mapping[str, Any]) -> None:
    for failure in found["failures"]:
        print(printable(f"FAILED: {failure}"))
    print("verified" if found["ok"] else f"not verified: {len(found['failures'])} promises failed")


def _print_simulation(found: Mapping[str, Any]) -> None:
    """How far the exported outputs are from the simulation's, and what both score."""
    simulation = found["simulation"]
    line = f"Beside the simulation, {found['inputs']} inputs: largest difference {simulation['largest_difference']:.4g}"
    line += f" (largest output {simulation['largest_output']:.4g})"
    print(line + (f", top-1 agreement {simulation['agreement']:.2f} %" if "agreement" in simulation else ""))
    for kind, scores in found.get("accuracy", {}).items():
        print(f"{kind}: {scores_line(scores)}")


def print_file(found: Mapping[str, Any], details: bool = True) -> None:
    """Print what an exported ONNX file holds."""
    over = 100 * (found["bytes"] / found["ideal_bytes"] - 1) if found["ideal_bytes"] else 0
    ideal = human_bytes(found["ideal_bytes"])
    print(f"{found['file']}: {human_bytes(found['bytes'])}, {over:.1f} % above the {ideal} of its weights' bits")
    if details:
        print(f"{found['integer_layers']} of {found['layers']} layers on integers")
    if details and found["measured_edges"]:
        count = len(found["measured_edges"])
        print(f"{count} tensors between operators have no range in the run: it was measured on the inputs of this export.")


def print_folder(found: Mapping[str, Any], details: bool = True) -> None:
    """What an exported folder holds, and what its format does not."""
    print(f"{found['folder']}: {human_bytes(found['bytes'])}, {found['packed']} of {found['layers']} quantized weights packed")
    if found["dense"] and details:
        print(printable(f"in float32 with the values of their codes ({human_bytes(found['dense_bytes'])}): {some(found['dense'])}"))
    _print_float_inputs(found, details)


def _print_float_inputs(found: Mapping[str, Any], details: bool) -> None:
    if found["float_inputs"] and details:
        print(printable(f"float, since the format has no quantizer for their inputs: {some(found['float_inputs'])}"))


def print_folder_verdict(found: Mapping[str, Any], numbers: bool = True) -> None:
    """What an exported folder kept of its promises and, with `numbers`, how it compares with the simulation."""
    for reason in found["skipped"].values():
        print(printable(f"not checked here: {reason}"))
    if "simulation" in found and numbers:
        _print_float_inputs(found, numbers)
        print(f"Every number of {found['packed']} packed layers and of all others is the run's.")
        _print_simulation(found)
    _print_outcome(found)


def _print_numbers(found: Mapping[str, Any]) -> None:
    """Kernels, equality with the reference, and the simulation beside it."""
    fused, floats = len(found["kernels"]), found["floats"]
    print(f"{fused} of {found['quantized_layers']} layers run on integer kernels" + ("" if floats else "."))
    for name, reason in floats.items():
        print(printable(f"  in float: {name}: {reason}"))
    numbers = found["numbers"]
    if found["advice"]:
        print(printable(found["advice"]))
    if "bitwise" in found["skipped"]:
        print(f"not checked here: equality with the integer reference: {found['skipped']['bitwise']}.")
    elif numbers["bitwise"]:
        print("The runtime's outputs are bit for bit those of the integer reference.")
    else:
        print("The runtime's outputs are not bit for bit those of the integer reference.")
    if numbers["in_float"]:
        print(printable(f"  computed in float between integers: {', '.join(numbers['in_float'])}"))
    if found["simulation"]["flipped_codes"]:
        layer, share = max(found["simulation"]["flipped_codes"].items(), key=lambda item: item[1])
        print(printable(f"Input codes that differ from the simulation's: at most {100 * share:.2f} %, in {layer}"))
    _print_simulation(found)


SHOWN = ("run", "settings", "environment", "references", "shapes", "bits", "result", "ladder", "float_test", "test", "units")
"""Sections of a comparison that are shown whole; of the others it is said that they differ."""
MOST_UNITS = 10


def print_difference(found: Mapping[str, Any]) -> None:
    """What differs between two runs, a table a section; of the units those whose error changed most."""
    first, second = found["runs"]
    if found["same"]:
        print(f"{first} and {second} are the same: settings, bits, measurements, and the packed weights byte for byte.")
        return
    names = [Path(run).name for run in found["runs"]]
    columns = found["runs"] if names[0] == names[1] else names
    sections, roads = dict(found["differences"]), "road" in found["differences"].get("run", {})
    if "units" in sections:
        sections["units"] = {name: {"after": unit["after"]} for name, unit in [*sections["units"].items()][:MOST_UNITS] if "after" in unit}
    for name in SHOWN:
        told = [(key, *sides) for key, sides in _leaves(sections.get(name, {})) if not roads or None not in sides]
        rows = [[key, _brief(left), _brief(right), _rise(left, right)] for key, left, right in told]
        if rows:
            print_table(name.replace("_", " "), ["", *columns, "change"], rows)
    others = {name: sum(1 for _ in _leaves(part)) for name, part in sections.items() if name not in SHOWN}
    if others:
        print("What else differs (--json shows it): " + ", ".join(f"{name} ({count})" for name, count in others.items()))
    if roads:
        print("What one road alone has is left out (--json shows it).")
    same = "the same bytes" if found["same_weights"] else "not the same bytes"
    print(f"{found['shared_layers']} layers are in both; the packed weights are {same}.")


def _leaves(tree: Any, within: str = "") -> Iterator[tuple[str, list[Any]]]:
    """(name, [left, right]) of every difference below."""
    if isinstance(tree, list):
        yield within, tree
    for key, part in tree.items() if isinstance(tree, Mapping) else ():
        yield from _leaves(part, f"{within}.{key}" if within else key)


def _brief(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _rise(left: Any, right: Any) -> str:
    numbers = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in (left, right))
    return f"{right - left:+.4g}" if numbers else ""


def print_explanation(found: Mapping[str, Any]) -> None:
    """A layer's candidates, the one that it has marked, and the sentences that say why."""
    candidates = found.get("candidates")
    if isinstance(candidates, Mapping):
        told = {
            "loss": "predicted loss",
            "bytes": "size",
            "bops": "BOPs",
            "evaluated": "evaluated",
            "best_score": "best score",
            "on_front": "on the front",
        }
        keys = [key for key in told if all(key in row for row in candidates.values())]
        words = {"bytes": human_bytes, "bops": human_count}
        rows = [
            [("> " if name == found.get("precision") else "  ") + name, *(words.get(key, lambda value: value)(row[key]) for key in keys)]
            for name, row in candidates.items()
        ]
        print_table(f"{found['layer']}: what it could have", ["precision", *(told[key] for key in keys)], rows)
    for sentence in found["why"]:
        print(printable(sentence))


def print_bench(found: Mapping[str, Any]) -> None:
    """Size against the bits, and latency against float32, in each runtime."""
    over = 100 * (found["bytes"] / max(found["ideal_bytes"], 1) - 1)
    smaller = found["float_bytes"] / found["bytes"]
    print(f"{human_bytes(found['bytes'])}: {over:.1f} % above its weights' bits, {smaller:.2f}x smaller than float32")
    for runtime in ("onnxruntime", "openvino"):
        if runtime in found:
            faster = found[runtime]["faster"]
            print(
                f"{runtime}: {faster['ratio']:.2f}x as fast as its float32 (half of {found['rounds']} rounds between {faster['low']:.2f}x "
                f"and {faster['high']:.2f}x), batch {found['batch_size']}, {found['threads']} thread(s)"
            )


def print_profile(found: Mapping[str, Any], layers: bool = True) -> None:
    """Each layer in float and on integers, and whole networks."""
    rows = [[name, *(1e6 * row[kind] for kind in ("float32", "int8", "boundaries"))] for name, row in found["layers"].items()]
    if layers:
        rows.append(["everything else", *(1e6 * found["rest"][kind] for kind in ("float32", "int8")), None])
        print_table("Microseconds of one sample", ["layer", "float32", "int8", "boundaries, if float alone"], rows)
    whole = found["measured"]
    print(f"whole network: float32 {1e3 * whole['float32']:.4g} ms, 8 bits {1e3 * whole['int8']:.4g} ms", end="")
    print(f", every second layer float {1e3 * whole['alternating']:.4g} ms" + (" (measured before)" if found["recalled"] else ""))


def print_cache(found: Mapping[str, Any]) -> None:
    """What is kept, and what was removed."""
    for path, reason in found["damaged"].items():
        print(f"damaged and removed: {path}: {reason}")
    if found["removed_bytes"]:
        print(f"{human_bytes(found['removed_bytes'])} removed")
    print(f"{found['folder']}: {found['results']} results, {human_bytes(found['bytes'])} of at most {human_bytes(found['limit'])}")


def _shape(numbers: Iterable[int]) -> str:
    return "x".join(map(str, numbers))


def _layer_rows(report: Mapping[str, Any]) -> list[list[str]]:
    total = report["result"]["bytes"]
    return [
        [name, row["precision"], human_count(row["weights"]), f"{100 * row['bytes'] / total:.1f} %"]
        for name, row in report["layers"].items()
    ]


def result_line(report: Mapping[str, Any]) -> str:
    """One line: the size, and accuracy where it was tested."""
    result = report["result"]
    line = f"{human_bytes(result['bytes'])} ({result['percent']:.1f} % of float32), {result['weight_bits']:.2f} bits a weight"
    test, float_test = report.get("test"), report.get("float_test")
    if test and "top1" in test:
        line += f"; test top-1 {test['top1']:.2f}" + (f" (float {float_test['top1']:.2f})" if float_test else "")
    return line
