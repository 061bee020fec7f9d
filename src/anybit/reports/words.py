"""Write numbers and names for people, consistently on pages, terminals and in explanations."""

from collections.abc import Iterable, Mapping
from typing import Any

SCORE_WORDS = {"metric": "metric", "top1": "top-1", "spearman": "spearman", "f1": "f1", "mean_iou": "mean IoU", "loss": "loss"}
"""Score -> its name in a sentence, the preferred ones first."""


def human_bytes(count: float) -> str:
    """Write bytes in thousands, as in budgets: "9.6 kB"."""
    for unit in ("B", "kB", "MB"):
        if count < 999.95:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def human_count(count: float) -> str:
    """Write a count to three digits: "1.31 G"."""
    for unit in ("", "k", "M", "G"):
        if count < 999.5:
            return f"{count:.3g} {unit}".strip()
        count /= 1000
    return f"{count:.3g} T"


def number(value: float | None) -> str:
    """Write a measurement to four digits; empty if it was not measured."""
    return "" if value is None else f"{value:.4g}"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms"


def points_apart(difference: float) -> str:
    """Write a difference of percentages: "2.50 points less"."""
    if abs(difference) < 0.005:
        return "no difference"
    return f"{abs(difference):.2f} points {'more' if difference > 0 else 'less'}"


def scores_line(scores: Mapping[str, float]) -> str:
    """Write accuracies in percent, other scores unchanged."""
    return "  ".join(f"{key} {value:.2f}" if key.startswith("top") else f"{key} {value:.5g}" for key, value in scores.items())


def shape_in_words(sizes: Iterable[int]) -> str:
    """Write a tensor's shape: "64x3x3"."""
    return "x".join(map(str, sizes))


def scheme_in_words(scheme: Mapping[str, Any]) -> str:
    """Write a scheme in one line: "conv1 W4A8 fc W8A8"."""
    return " ".join(f"{name} {precision}" for name, precision in scheme.items())


def duration(seconds: float) -> str:
    """Write a duration: "8 s", "3 min 20 s", "1 h 40 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole < 600 else f"{round(whole / 60)} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
