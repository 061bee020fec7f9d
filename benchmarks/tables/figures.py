"""The figures of docs/results.md, as small SVG pictures."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.tables.calibrate import scatter_schemes
from benchmarks.tables.grow import choices


def figures() -> dict[str, str]:
    """Draw every figure whose study has been run: file name in docs/ -> its text."""
    drawn = {}
    if schemes := scatter_schemes():
        drawn["allocation.svg"] = scatter_figure(schemes)
    if runs := choices():
        drawn["growth.svg"] = epochs_figure(runs)
    return drawn


def svg(width: float, height: float, parts: Sequence[str]) -> str:
    """A picture of this size with a white background."""
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
    """Draw training loss and bits a weight over the epochs, one line a run, as two small pictures side by side."""
    width, height, margin = 380, 300, 48
    styles = dict(zip(runs, (("#1b6ca8", ""), ("#1b6ca8", "6 3"), ("#c1440e", ""), ("#c1440e", "6 3")), strict=False))
    parts = []
    for place, (column, words) in enumerate((("loss", "training loss"), ("weight_bits", "bits a weight"))):
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
