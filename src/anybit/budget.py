"""Budget: what a scheme may cost, and its grammar (`4bit`, `120kB`, `12.5%`, `bops=2G`, `latency=3ms`, `loss=0.02`, `drop=1%`)."""

import re
from dataclasses import dataclass
from decimal import Decimal

from anybit.errors import InvalidSetting
from anybit.settings import Text

UNITS = {
    "bytes": {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "bops": {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12},
    "latency": {"us": 1e-6, "ms": 1e-3, "s": 1.0},
}
_NUMBER = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_FORMS = (  # (pattern, quantity, units)
    (rf"{_NUMBER}bits?", "bits", None),
    (rf"{_NUMBER}(B|kB|KB|MB|GB|KiB|MiB|GiB)", "bytes", UNITS["bytes"]),
    (rf"{_NUMBER}%", "percent", None),
    (rf"bops={_NUMBER}([kMGT]?)", "bops", UNITS["bops"]),
    (rf"latency={_NUMBER}(us|ms|s)", "latency", UNITS["latency"]),
    (rf"loss={_NUMBER}", "loss", None),
    (rf"drop={_NUMBER}%", "drop", None),
)


@dataclass(frozen=True)
class Condition:
    """One limit: `quantity` (bits, bytes, percent, bops, latency, loss or drop) is at most `limit`, in bits, bytes, seconds, ..."""

    quantity: str
    limit: float


@dataclass(frozen=True)
class Budget:
    """Conditions that must all hold, and the text that wrote them."""

    text: str
    conditions: tuple[Condition, ...]

    @classmethod
    def parse(cls, text: "str | Budget") -> "Budget":
        """The budget that `text` ("4bit", "120kB", "12.5%", "bops=2.1G", "4bit,bops=2G", ...) writes."""
        if isinstance(text, Budget):
            return text
        conditions = tuple(_parse_condition(part.strip()) for part in text.split(","))
        quantities = [condition.quantity for condition in conditions]
        if len(set(quantities)) < len(quantities):
            raise InvalidSetting(f"Budget {text!r} limits one quantity twice. Keep the smaller limit.")
        if {"loss", "drop"} <= set(quantities):
            raise InvalidSetting(f"Budget {text!r} asks for both loss= and drop=. Choose one.")
        return cls(text, conditions)

    def limit(self, quantity: str) -> float | None:
        """The limit on `quantity`, or None."""
        return next((condition.limit for condition in self.conditions if condition.quantity == quantity), None)

    def __str__(self) -> str:
        return self.text


def _parse_condition(part: str) -> Condition:
    for pattern, quantity, units in _FORMS:
        match = re.fullmatch(pattern, part)
        if match:
            # In decimals, as it is written: in binary 8444.8 times a million is a little less than 8,444,800,000.
            limit = float(Decimal(match[1]) * Decimal(str(units[match[2]] if units else 1)))
            if limit <= 0:
                raise InvalidSetting(f"Budget {part!r} must be above zero.")
            return Condition(quantity, limit)
    raise InvalidSetting(
        f"Budget {part!r} cannot be read. Write 4bit, 120kB, 1.5MiB, 12.5%, bops=2.1G, latency=3ms, loss=0.02 or drop=1%; "
        "join conditions with a comma."
    )


def parse_size(text: str) -> int:
    """Bytes that `text` ("2GiB", "500MB") writes."""
    match = re.fullmatch(rf"{_NUMBER}(B|kB|KB|MB|GB|KiB|MiB|GiB)", text)
    if not match:
        raise InvalidSetting(f"Size {text!r} cannot be read. Write 500MB or 2GiB.")
    return int(Decimal(match[1]) * Decimal(str(UNITS["bytes"][match[2]])))


def size_text(size: int) -> str:
    """What `parse_size` reads as this many bytes: in the largest binary unit that divides them."""
    unit = next(unit for unit in ("GiB", "MiB", "KiB", "B") if size % UNITS["bytes"][unit] == 0)
    return f"{size // UNITS['bytes'][unit]}{unit}"


SIZE = Text(parse_size, size_text, "500MB or 2GiB")
