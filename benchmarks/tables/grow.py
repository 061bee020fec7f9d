"""The sections of docs/results.md on the grow road."""

import statistics
from typing import Any

from scipy.stats import spearmanr

from benchmarks.tables.shared import NOT_RUN, entries, hits, paired_interval, spread, table

GROWING_IMAGES = 2500
"""Test images that all runs of `growing` were scored on."""

LABELS = ("float activations", "A4")


def methods_section() -> str:
    runs = entries("grow_resnet20_methods")
    floats = [run["top1"] for key, run in runs.items() if key.startswith("float seed")]
    kinds = {
        "CSQ, `3bit`": "CSQ 3bit {label} seed",
        "CSQ's scheme, trained with LSQ": "CSQ's scheme trained, {label} seed",
        "LSQ, uniform W3": "LSQ W3 {label} seed",
        "calibrate, `3bit`": "calibrate 3bit {label} seed",
        "calibrate's scheme, trained with LSQ": "calibrate's scheme trained, {label} seed",
        "CSQ, `2bit`": "CSQ 2bit {label} seed",
        "CSQ, `4bit`": "CSQ 4bit {label} seed",
        "CSQ, `3bit`, a scale for each layer": "CSQ 3bit {label}, a scale for each layer, seed",
    }
    rows = []
    for label in LABELS:
        for words, pattern in kinds.items():
            matching = [run for key, run in runs.items() if key.startswith(pattern.format(label=label))]
            if matching:
                drop = f"{statistics.mean(floats) - statistics.mean(run['top1'] for run in matching):.2f}" if floats else ""
                planes = [run["epochs"][-1].get("paper_bits") for run in matching if run.get("epochs")]
                counted = f"{statistics.mean(planes):.2f}" if planes and None not in planes else ""
                bits, size = matching[0]["weight_bits"], matching[0]["bytes"]
                rows.append(
                    [label, words, spread([run["top1"] for run in matching]), drop, f"{bits:.2f}", counted, f"{size / 1000:.1f} kB"]
                )
    if not rows:
        return NOT_RUN
    head = f"The float network, trained as long by the same recipe: {spread(floats)}.\n\n" if floats else ""
    columns = ["activations", "method", "top-1, mean (range)", "below float", "bits per weight", "planes per layer (paper's count)", "size"]
    return head + table(columns, rows)


def growing_section() -> str:
    """Compare the methods that grow a scheme, in a short run, with uniform training."""
    runs = entries("grow_resnet20_growing_3200")
    uniform, rows = runs.get("LSQ W3 seed 0"), []
    for key, run in runs.items():
        differs = paired_interval(run["right"], uniform["right"], GROWING_IMAGES) if uniform and run is not uniform else ""
        bits = sorted({int(precision.removeprefix("W")) for precision in run["layers"].values()} if run["weight_bits"] < 32 else [])
        spans = f"{bits[0]} to {bits[-1]}" if len(bits) > 1 else ""
        rows.append(
            [
                key,
                f"{100 * hits(run['right'], GROWING_IMAGES).mean():.2f}",
                differs,
                f"{run['weight_bits']:.2f}",
                spans,
                f"{run['epochs'][-1]['loss']:.4f}",
            ]
        )
    return table(
        ["one run each", "top-1", "against uniform LSQ (95 % interval)", "bits per weight", "bits of layers", "training loss"], rows
    )


def tried_section() -> str:
    """List earlier settings; each entry's JSON has all of them."""
    rows = [[key, f"{run['top1']:.2f}"] for key, run in entries("grow_resnet20_tried").items()]
    return table(["one run each", "top-1"], rows)


def choices() -> dict[str, Any]:
    """Return the runs by their kinds of gates."""
    return dict(sorted(entries("grow_resnet20_choices_3200").items()))


def choices_section() -> str:
    rows = []
    for key, run in choices().items():
        last, search = run["epochs"][-1], round(run["settings"]["csq"]["fix"] * len(run["epochs"]))
        before = run["epochs"][search - 1]  # the last epoch in which only the gates decide the planes
        cells = [f"{before['weight_bits']:.2f}", *(f"{before[kind]['top1']:.2f}" for kind in ("soft", "frozen")), f"{before['loss']:.3f}"]
        rows.append(
            [key, *cells, *(f"{last[kind]['top1']:.2f}" for kind in ("soft", "frozen")), f"{run['top1']:.2f}", f"{last['loss']:.3f}"]
        )
    text = table(
        [
            "gates",
            "bits per weight before fixing",
            "soft, before fixing",
            "frozen, before fixing",
            "loss, before fixing",
            "soft, 3 bits",
            "frozen",
            "frozen, all images",
            "loss",
        ],
        rows,
    )
    return f"{text}\n\n![Loss and bits over the epochs](growth.svg)"


def agreement_section() -> str:
    """Show whether layers that calibrate finds sensitive get more bits in grown schemes."""
    runs, after, rows = entries("grow_resnet20_methods"), entries("grow_resnet20_agreement"), []
    for key, run in runs.items():
        if not key.startswith("CSQ "):
            continue
        label, seed = ("A4" if "A4" in key else "float activations"), key.rsplit(" ", 1)[1]
        measured = runs.get(f"calibrate 3bit {label} seed {seed}", {}).get("table")
        if measured:
            names = list(run["layers"])
            bits = [int(run["layers"][name].split("A")[0].removeprefix("W")) for name in names]
            sensitivity = [measured["rows"][name]["W3"] for name in names]
            chosen = runs[f"calibrate 3bit {label} seed {seed}"]["layers"]
            other = [int(chosen[name].split("A")[0].removeprefix("W")) for name in names]
            grown = after.get(key.replace(" ", "_"), {}).get("table")
            later = _ranked(bits, [grown["rows"][name]["W2"] for name in names]) if grown else "not run"
            if "3bit" not in key:
                alike = "not run at this budget"
            else:
                alike = _ranked(bits, other) if len(set(other)) > 1 else "calibrate chose a uniform scheme"
            rows.append([key, _ranked(bits, sensitivity), later, alike])
    columns = ["run", "rank correlation of its bits with W3 sensitivity before", "with W2 sensitivity after", "with calibrate's bits"]
    return table(columns, rows)


def _ranked(bits: list[int], others: list[float]) -> str:
    return f"{spearmanr(bits, others).statistic:+.2f}" if len(set(bits)) > 1 else "all layers have the same bits"


def borders_section() -> str:
    """List the accuracy of the float network by the images on which its statistics were estimated."""
    rows = [[words, f"{run['top1']:.2f}"] for words, run in entries("grow_resnet20_borders").items()]
    return table(["statistics of batch norm from", "top-1"], rows) if rows else NOT_RUN


def cost_section() -> str:
    run = entries("grow_resnet20_cost").get("one step", {})
    rows = [
        [name, f"{kind['times_float']:.2f}", f"{kind['bytes_trained_a_weight']:.0f}", f"{kind['bytes_kept_a_weight']:.0f}"]
        for name, kind in run.items()
        if isinstance(kind, dict)
    ]
    return table(
        ["step of", "time relative to float (median of rounds)", "bytes trained per weight", "bytes kept for the backward pass per weight"],
        rows,
    )


def scratch_section() -> str:
    rows = [[key, f"{run['top1']:.2f}", f"{run['epochs'][-1]['loss']:.2f}"] for key, run in entries("grow_resnet20_scratch_3200").items()]
    return table(["one run each", "top-1", "training loss"], rows)


SECTIONS = {
    "GROW": methods_section,
    "GROWING": growing_section,
    "GROWTRIED": tried_section,
    "CHOICES": choices_section,
    "AGREEMENT": agreement_section,
    "GROWBORDERS": borders_section,
    "GROWCOST": cost_section,
    "SCRATCH": scratch_section,
}
