"""The figures of docs/results.md and the README, as small SVG images."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.tables.calibrate import FLOAT_TOP1, mixed_runs, scatter_schemes, uniform_8bit_input_runs
from benchmarks.tables.grow import choices

Runs = Mapping[str, Sequence[dict[str, Any]]]
"""Runs by budget or precision, one per seed."""


def figures() -> dict[str, str]:
    """Draw every figure whose study has been run; return file name in docs/ -> SVG text."""
    drawn = {}
    if schemes := scatter_schemes():
        drawn["allocation.svg"] = scatter_figure(schemes)
    if runs := choices():
        drawn["growth.svg"] = epochs_figure(runs)
    if mixed := {budget: runs for (budget, activations), runs in mixed_runs().items() if activations == "A8"}:
        drawn["frontier.svg"] = frontier_figure(mixed, uniform_8bit_input_runs())
    return drawn


def svg(width: float, height: float, parts: Sequence[str]) -> str:
    """Write an image of this size with a white background."""
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    body = "\n".join(['<rect width="100%" height="100%" fill="white"/>', *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n{body}\n</svg>\n'


def scatter_figure(rows: Sequence[dict[str, Any]]) -> str:
    """Draw predicted against measured loss, both axes logarithmic."""
    width, height, margin = 560, 420, 56
    values = [math.log10(max(row[axis], 1e-6)) for row in rows for axis in ("predicted", "measured")]
    low, high = math.floor(2 * min(values)) / 2, math.ceil(2 * max(values)) / 2

    def place(row: dict[str, Any]) -> tuple[float, float]:
        x, y = (math.log10(max(row[axis], 1e-6)) for axis in ("predicted", "measured"))
        across, up = (x - low) / (high - low), (y - low) / (high - low)
        return margin + across * (width - 2 * margin), height - margin - up * (height - 2 * margin)

    marks = {"allocated": ("circle", "#1b6ca8"), "random": ("cross", "#888888"), "uniform": ("square", "#c1440e")}
    shapes = []
    for row in rows:
        x, y = place(row)
        kind, color = marks[row["name"].split()[0]]
        title = f"<title>{row['name']}: predicted {row['predicted']:.4f}, measured {row['measured']:.4f}</title>"
        shape = {
            "circle": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{color}">{title}</circle>',
            "square": f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" fill="{color}">{title}</rect>',
            "cross": f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8" stroke="{color}" stroke-width="2">{title}</path>',
        }[kind]
        shapes.append(shape)
    ticks = []
    for tick in np.arange(low, high + 0.1, 0.5):
        x, y = place({"predicted": 10**tick, "measured": 10**tick})
        ticks.append(f'<text x="{x:.0f}" y="{height - margin + 18}" text-anchor="middle">{10**tick:.2g}</text>')
        ticks.append(f'<text x="{margin - 8}" y="{y + 4:.0f}" text-anchor="end">{10**tick:.2g}</text>')
    start, end = margin, width - margin
    frame = f'<path d="M{start} {height - margin}L{end} {margin}" stroke="#bbbbbb" stroke-dasharray="4"/>'
    frame += f'<path d="M{start} {margin}V{height - margin}H{end}" fill="none" stroke="#444444"/>'
    legend = "".join(
        f'<text x="{margin + 14}" y="{margin + 16 * index}" fill="{color}">{kind}: {name}</text>'
        for index, (name, (kind, color)) in enumerate(marks.items())
    )
    labels = f'<text x="{width / 2}" y="{height - 12}" text-anchor="middle">predicted loss</text>'
    labels += f'<text transform="translate(14 {height / 2}) rotate(-90)" text-anchor="middle">measured loss (held-out)</text>'
    return svg(width, height, [frame, *ticks, labels, legend, *shapes])


def epochs_figure(runs: dict[str, Any]) -> str:
    """Draw training loss and bits per weight over the epochs, one line per run, as two small charts side by side."""
    width, height, margin = 380, 300, 48
    styles = dict(zip(runs, (("#1b6ca8", ""), ("#1b6ca8", "6 3"), ("#c1440e", ""), ("#c1440e", "6 3")), strict=False))
    parts = []
    for place, (column, words) in enumerate((("loss", "training loss"), ("weight_bits", "bits per weight"))):
        left, most = place * width, max(row[column] for run in runs.values() for row in run["epochs"])
        longest = max(len(run["epochs"]) for run in runs.values())
        for key, run in runs.items():
            color, dash = styles[key]
            points = " ".join(
                f"{left + margin + (row['epoch'] - 1) / max(longest - 1, 1) * (width - 2 * margin):.1f},"
                f"{height - margin - row[column] / most * (height - 2 * margin):.1f}"
                for row in run["epochs"]
            )
            parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"/>')
        bottom, end = height - margin, left + width - margin
        parts.append(f'<path d="M{left + margin} {margin}V{bottom}H{end}" fill="none" stroke="#444444"/>')
        parts.append(f'<text x="{left + margin - 6}" y="{margin + 4}" text-anchor="end">{most:.2g}</text>')
        parts.append(f'<text x="{left + margin - 6}" y="{bottom}" text-anchor="end">0</text>')
        parts.append(f'<text x="{left + width / 2}" y="{height - 14}" text-anchor="middle">{words}, by epoch</text>')
    for index, (key, (color, dash)) in enumerate(styles.items()):
        y = height + 16 * index
        parts.append(f'<path d="M{margin} {y - 4}h28" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"/>')
        parts.append(f'<text x="{margin + 36}" y="{y}">{key}</text>')
    return svg(2 * width, height + 16 * len(styles), parts)


def frontier_figure(mixed: Runs, uniform: Runs) -> str:
    """Draw top-1 against relative file size: a point per budget, with a whisker from the lowest to the highest seed."""
    width, height, left, right, top, bottom = 640, 300, 62, 24, 26, 54
    sizes, scores = (80, 170), (90.4, 92.0)  # kB, percent

    def x(run: dict[str, Any]) -> float:
        return left + (run["bytes"] / 1000 - sizes[0]) / (sizes[1] - sizes[0]) * (width - left - right)

    def y(score: float) -> float:
        return height - bottom - (score - scores[0]) / (scores[1] - scores[0]) * (height - top - bottom)

    parts = []
    for tick in np.arange(90.5, scores[1] + 0.1, 0.5):
        parts.append(f'<path d="M{left} {y(tick):.1f}H{width - right}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.1f}</text>')
    for tick in range(sizes[0], sizes[1] + 1, 20):
        parts.append(f'<text x="{x({"bytes": 1000 * tick}):.1f}" y="{height - bottom + 18}" text-anchor="middle">{tick}</text>')
    whole = next(100 * run["bytes"] / run["percent"] for runs in mixed.values() for run in runs)
    parts.append(f'<path d="M{left} {y(FLOAT_TOP1):.1f}H{width - right}" stroke="#444444" stroke-width="1.5" stroke-dasharray="6 4"/>')
    parts.append(
        f'<text x="{left + 8}" y="{y(FLOAT_TOP1) - 7:.1f}" fill="#444444">float32: {FLOAT_TOP1} %, {whole / 1000:,.0f} kB (100 %)</text>'
    )
    ordered = sorted(mixed.items(), key=lambda item: item[1][0]["bytes"])
    means = [(x(runs[0]), y(statistics.mean(run["top1"] for run in runs))) for _, runs in ordered]
    path = " ".join(f"{across:.1f},{up:.1f}" for across, up in means)
    parts.append(f'<polyline points="{path}" fill="none" stroke="#1b6ca8" stroke-width="2"/>')
    for (budget, runs), (across, up) in zip(ordered, means, strict=True):
        values = [run["top1"] for run in runs]
        title = f"<title>{budget}: {statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})</title>"
        parts.append(f'<path d="M{across:.1f} {y(max(values)):.1f}V{y(min(values)):.1f}" stroke="#1b6ca8" stroke-width="2"/>')
        parts.append(f'<circle cx="{across:.1f}" cy="{up:.1f}" r="5" fill="#1b6ca8">{title}</circle>')
        words = f"{budget.removesuffix('bit')} bits per weight, {runs[0]['percent']:.1f} %"
        parts.append(f'<text x="{across + 12:.1f}" y="{up + 18:.1f}" fill="#1b6ca8">{words}</text>')
    for name, runs in uniform.items():
        across, up = x(runs[0]), y(statistics.mean(run["top1"] for run in runs))
        title = f"<title>{name} everywhere: {statistics.mean(run['top1'] for run in runs):.2f}</title>"
        square = f'<rect x="{across - 4:.1f}" y="{up - 4:.1f}" width="8" height="8" fill="white" stroke="#c1440e" stroke-width="2">'
        parts.append(f"{square}{title}</rect>")
    parts.append(f'<path d="M{left} {top}V{height - bottom}H{width - right}" fill="none" stroke="#444444"/>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 16}" text-anchor="middle">file size, kB</text>')
    parts.append(f'<text transform="translate(16 {(top + height - bottom) / 2}) rotate(-90)" text-anchor="middle">top-1, %</text>')
    legend = f'<text x="{width - right}" y="{height - bottom - 30}" text-anchor="end"'
    parts.append(f'{legend} fill="#1b6ca8">circle: mixed precision</text>')
    parts.append(
        f'{legend.replace(str(height - bottom - 30), str(height - bottom - 12))} fill="#c1440e">square: one bit-width everywhere</text>'
    )
    return svg(width, height, parts)
