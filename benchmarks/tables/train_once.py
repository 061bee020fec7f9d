"""The sections of docs/results.md on the train-once road."""

import statistics

from benchmarks.tables.shared import NOT_RUN, entries, spread, table

WIDTHS = (8, 6, 4, 3, 2)
ALL, QUARTER = "train_once_resnet20_widths", "train_once_resnet20_widths_12800"
CHOICES = "train_once_resnet20_choices_6400"

BUDGETS = (2.25, 2.5, 3.0, 4.0)
"""Bits per weight at which searches are compared."""

SUPERNETS = ((ALL, ""), (QUARTER, ", 12,800 images"))


def widths_section(name: str = ALL) -> str:
    """Tabulate accuracy at each bit-width and, where the float network was trained by the same recipe, the difference from it."""
    runs = entries(name)
    supernets = [key for key in runs if "competition" in runs[key]]
    reference = runs["float"]["top1"] if "float" in runs else None
    rows = []
    for rule in dict.fromkeys(key.rpartition(" seed")[0] for key in supernets):
        accuracies = [[runs[key]["test"][f"{bits} bits"]["top1"] for bits in WIDTHS] for key in supernets if key.startswith(f"{rule} seed")]
        rows.append([f"one supernet, {rule}", *(_beside(list(column), reference) for column in zip(*accuracies, strict=True))])
    for words, pattern in (("a network for each, as many epochs in total", "alone {} bits"), ("calibrate at each", "calibrate {} bits")):
        alone = [[runs[key]["top1"]] if (key := pattern.format(bits)) in runs else [] for bits in WIDTHS]
        if any(alone):
            rows.append([words, *(_beside(one, reference) for one in alone)])
    head = (
        ""
        if reference is None
        else f"The float network, trained as long by the same recipe: {reference:.2f}; differences from it in brackets.\n\n"
    )
    return head + table(["network", *(f"{bits} bits" for bits in WIDTHS)], rows)


def _beside(accuracies: list[float], reference: float | None) -> str:
    if not accuracies:
        return "not run"
    return spread(accuracies) + ("" if reference is None else f" ({statistics.mean(accuracies) - reference:+.2f})")


def competition_section() -> str:
    """Tabulate the paper's measures at the end of training: gradients of one-hot labels on the shared weights, variance of confidence."""
    runs = {f"{key}{of}": run for name, of in SUPERNETS for key, run in entries(name).items() if "competition" in run}
    rows = []
    for key, run in runs.items():
        for words, field, digits in (("gradient norm", "gradient_norm", 3), ("variance of the confidence", "confidence_variance", 4)):
            rows.append([key, words, *(f"{run['competition'][f'{bits} bits'][field]:.{digits}f}" for bits in WIDTHS)])
    return table(["supernet", "of each bit-width", *(f"{bits} bits" for bits in WIDTHS)], rows)


def store_section() -> str:
    rows = []
    for key, run in ((f"{key}{of}", run) for name, of in SUPERNETS for key, run in entries(name).items()):
        if "float_store" in run:
            lost = [run["test"][f"{bits} bits"]["top1"] - run["float_store"][f"{bits} bits"]["top1"] for bits in WIDTHS]
            rows.append([key, f"{run['bytes'] / 1000:.0f} kB", *(f"{change:+.2f}" for change in lost)])
    return table(["supernet", "file", *(f"{bits} bits" for bits in WIDTHS)], rows)


def search_section() -> str:
    runs = entries("train_once_resnet20_search_12800")
    if not runs:
        return NOT_RUN
    cost, score = (end(run["hypervolume"][field] for run in runs.values()) for end, field in ((max, "cost"), (min, "score")))
    tested = min(row["test"]["top1"] for run in runs.values() for row in run["front"])
    rows = []
    for key, run in runs.items():
        ranked = run["rank_correlation"]
        again = _area([(row["cost"], row["measured"]) for row in run["front"]], cost, score)
        test = _area([(row["cost"], row["test"]["top1"]) for row in run["front"]], cost, tested)
        correlation = "" if ranked is None else f"{ranked:.2f}"
        chosen = [max((row for row in run["front"] if row["cost"] <= most), key=lambda row: row["measured"]) for most in BUDGETS]
        rows.append([key, str(len(run["evaluated"])), correlation, f"{again:.2f}", f"{test:.2f}",
                     *(f"{row['test']['top1']:.2f}" for row in chosen), f"{run['second_seconds']:.1f} s"])  # fmt: skip
    columns = [
        "strategy",
        "evaluations",
        "rank correlation (Kendall)",
        "area (hypervolume), measured again",
        "area, test images",
        *(f"{most:g} bits" for most in BUDGETS),
        "time for another budget",
    ]
    best = max(runs.values(), key=lambda run: run["hypervolume"]["value"])
    schemes = [[f"{row['cost']:.2f}", *(f"{row[kind]:.2f}" for kind in ("score", "measured")), f"{row['test']['top1']:.2f}", row["origin"]]
               for row in best["front"]]  # fmt: skip
    front = table(["bits per weight", "searched on", "measured again", "test images", "proposed by"], schemes)
    corner = f"Areas are left of {cost:.2f} bits per weight and above {score:.2f} % of held-out images, {tested:.2f} % of test images. "
    corner += "The columns of bits give the test top-1 of the best subnet within those bits; the best is chosen by its second measurement."
    return "\n\n".join((table(columns, rows), corner, "Front of the run with the largest area:", front))


def _area(points: list[tuple[float, float]], cost: float, score: float) -> float:
    """Compute the area dominated by the points, above `score` and left of `cost`."""
    area, right = 0.0, cost
    for at, _ in sorted(points, reverse=True):
        height = max(other for cheaper, other in points if cheaper <= at)
        area += max(0.0, right - at) * max(0.0, height - score)
        right = at
    return area


def compose_section() -> str:
    runs = entries("train_once_resnet20_compose")
    rows = []
    for key, run in runs.items():
        steps = ", ".join(row["step"] for row in run["ladder"][1:] if row["kept"]) or "none"
        rows.append([key, f"{run['extracted']['top1']:.2f}", f"{run['polished']['top1']:.2f}", steps])
    return table(["subnet", "extracted", "polished by calibrate", "steps kept"], rows)


def cost_section() -> str:
    run = entries("train_once_resnet20_cost").get("one step")
    if not run:
        return NOT_RUN
    rounds = len(run["seconds"])
    return (
        f"One LRH step takes {run['times_three_steps']:.2f} times three steps of quantization-aware training (median of {rounds} rounds)."
    )


SECTIONS = {
    "WIDTHS": widths_section,
    "WIDTHSQUARTER": lambda: widths_section(QUARTER),
    "COMPETITION": competition_section,
    "STORE": store_section,
    "SUPERNETCHOICES": lambda: widths_section(CHOICES),
    "SEARCH": search_section,
    "COMPOSE": compose_section,
    "LRHCOST": cost_section,
}
