"""Numbers as words: bytes, counts."""


def human_bytes(count: float) -> str:
    """ "9.6 kB": thousands, as in budgets."""
    for unit in ("B", "kB", "MB"):
        if count < 999.95:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def human_count(count: float) -> str:
    """ "1.31 G" """
    for unit in ("", "k", "M", "G"):
        if count < 999.5:
            return f"{count:.3g} {unit}".strip()
        count /= 1000
    return f"{count:.3g} T"
