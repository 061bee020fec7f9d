"""Write numbers and names for people, consistently on pages, terminals and in explanations."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

SCORE_WORDS = {"metric": "metric", "top1": "top-1", "spearman": "spearman", "f1": "f1", "mean_iou": "mean IoU", "loss": "loss"}
"""Score -> its name in a sentence, the preferred ones first."""

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


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


def measurement(value: float | None) -> str:
    """Write a measurement as `number` does, for a page: "4.737×10⁻⁵"."""
    return powers(number(value))


def powers(text: str) -> str:
    """Write the exponent of a number as a superscript: "1e-05" becomes "1×10⁻⁵"."""
    return re.sub(r"e([+-]\d+)$", lambda match: f"\N{MULTIPLICATION SIGN}10{str(int(match[1])).translate(SUPERSCRIPTS)}", text)


def score_words(score: str, value: float) -> str:
    """Write a score with its unit."""
    return f"{value:.2f} %" if score == "top1" else measurement(value)


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms"


def points_apart(difference: float) -> str:
    """Write a difference of percentages: "2.50 points less"."""
    if abs(difference) < 0.005:
        return "no difference"
    return f"{abs(difference):.2f} points {'more' if difference > 0 else 'less'}"


def drop_interval(test: Mapping[str, Any], before: Mapping[str, Any]) -> tuple[float, float, float, int] | None:
    """Return the points of top-1 that were lost on test data, the ends of the 95 % interval, and the samples.

    None where it was not measured on classes. Outcomes are paired: at most the share that the two networks classify differently can
    have changed between right and wrong.
    """
    values: list[Any] = [test.get("top1"), before.get("top1"), test.get("agreement"), test.get("samples")]
    if not all(isinstance(value, int | float) for value in values) or values[3] <= 0:
        return None
    top1, float_top1, agreement, samples = values
    drop = float_top1 - top1
    changed = min((100 - agreement) / 100 + 1 / samples, 1.0)
    half = 196 * math.sqrt(max(changed - drop * drop / 1e4, 0) / samples)
    return drop, drop - half, drop + half, int(samples)


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
