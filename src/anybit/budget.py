"""Budget: limits on the costs or the loss of a scheme, and one object for each quantity that can be limited.

A quantity knows its grammar (`4bit`, `120kB`, `12.5%`, `bops=2G`, `latency=3ms`, `loss=0.02`, `drop=1%`) and, if it is a cost, how to count
it for a scheme. All code that reads, meets, checks or reports a budget looks the quantity up in `QUANTITIES`.
"""

import difflib
import math
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal
from typing import Any, Literal, Protocol

from anybit.errors import InvalidSetting
from anybit.scheme import FLOAT_BITS, Precision
from anybit.settings import Text

_NUMBER = r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)"

Choices = Mapping[str, Sequence[Precision]]
Precisions = Mapping[str, Precision]


class Costs(Protocol):
    """The counts of a network from which costs are computed: the interface of `networks.cost.CostModel`, since budgets are read before
    torch is imported."""

    @property
    def layers(self) -> Mapping[str, Any]: ...
    @property
    def float_bytes(self) -> int: ...
    @property
    def latency(self) -> Any: ...

    def weight_bits(self, scheme: Any) -> float: ...
    def bops(self, scheme: Any) -> int: ...
    def file_size(self, scheme: Any) -> int: ...
    def layer_bops(self, name: str, precision: Precision) -> int: ...
    def layer_bytes(self, name: str, precision: Precision) -> int: ...
    def reserved_bytes(self, choices: Choices) -> int: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantity:
    """A quantity that a budget can limit, and the grammar of a limit: `prefix`, a number, and one of `units`.

    units     suffix -> its size;   examples  limits as users may write them
    unit      the unit that `text` writes, with this many `digits`; a smaller one if the limit rounds to a single step of it
    largest   largest limit that has a meaning, in units of a limit

    Quantities are compared by identity: each is one object of `QUANTITIES`.
    """

    name: str
    prefix: str = ""
    units: Mapping[str, float]
    unit: str
    digits: int
    examples: tuple[str, ...]
    largest: float = float("inf")

    def parse(self, text: str) -> float | None:
        """Return the limit that `text` writes; None if it does not match this quantity's grammar."""
        match = re.fullmatch(f"{re.escape(self.prefix)}{_NUMBER}({'|'.join(map(re.escape, self.units))})", text)
        # In decimal arithmetic: in binary, 8444.8 times a million is a little less than 8,444,800,000.
        return float(Decimal(match[1]) * Decimal(str(self.units[match[2]]))) if match else None

    def text(self, limit: float, unit: str | None = None) -> str:
        """Write a limit in the grammar of `parse`, in `unit` or the one that suits it, rounded up."""
        unit = self.unit_for(limit) if unit is None else unit
        return f"{self.prefix}{self._steps(limit, unit).scaleb(-self.digits).normalize():f}{unit}"

    def exact_text(self, limit: float) -> str:
        """Write a limit in the grammar of `parse`, in the unit that suits it, without rounding."""
        unit = self.unit_for(limit)
        return f"{self.prefix}{self._in(limit, unit).normalize():f}{unit}"

    def unit_for(self, limit: float) -> str:
        """Return the unit in which a limit does not round to a single step, or the smallest."""
        smaller = sorted((unit for unit in self.units if self.units[unit] < self.units[self.unit]), key=self.units.__getitem__)
        units = (self.unit, *reversed(smaller))
        return next((unit for unit in units if self._steps(limit, unit) > 1), units[-1])

    def _steps(self, limit: float, unit: str) -> Decimal:
        return (self._in(limit, unit) * 10**self.digits).to_integral_value(ROUND_CEILING)

    def _in(self, limit: float, unit: str) -> Decimal:
        return Decimal(repr(float(limit))) / Decimal(str(self.units[unit]))


@dataclass(frozen=True, kw_only=True, eq=False)
class Loss(Quantity):
    """A limit on the loss from quantization, which is measured, not counted; `chosen` says why a scheme is the best under it."""

    chosen: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Cost(Quantity):
    """A quantity that is counted for a scheme: a part per layer and a fixed part, in units of which `scale` make one unit of a limit.

    layer        part of one layer at a precision
    fixed        part that is the same for every choice
    exact        a whole scheme's cost in units of a limit, if the sum of the parts is only a bound on it
    known        whether the counts exist, for a cost that has to be measured first
    most         the float network's cost, in units of a limit: a limit above it is an error, because it saves nothing
    words        writes a scheme's cost in a sentence
    key          its name among the amounts of a report, if different
    counted_as   the cost of which this one is only another unit
    stored_bits  bits of stored weights in one unit of a layer's part; 0 if it counts something else
    recorded     where a report states a layer's part: with each of its candidates, by its number of weights, or nowhere
    remedy       advice if the smallest subnet of a supernet exceeds the limit
    """

    layer: Callable[[Costs, str, Precision], float]
    fixed: Callable[[Costs, Choices], float] = lambda costs, choices: 0
    scale: Callable[[Costs], float] = lambda costs: 1
    exact: Callable[[Costs, Precisions], float] | None = None
    known: Callable[[Costs], bool] | None = None
    most: Callable[[Costs], float] | None = None
    words: Callable[[float], str] | None = None
    key: str = ""
    counted_as: "Cost | None" = None
    stored_bits: float = 0
    recorded: Literal["candidates", "weights", "nowhere"] = "candidates"
    remedy: str = "train with lower --bits"

    @property
    def report_key(self) -> str:
        """Return the name of its amount in a report."""
        return self.key or self.name

    @property
    def counted(self) -> "Cost":
        """Return the cost that a limit on this one limits."""
        return self.counted_as or self

    def is_known(self, costs: Costs) -> bool:
        """Return whether `costs` has the counts that this needs."""
        return self.known is None or self.known(costs)

    def total(self, costs: Costs, scheme: Precisions) -> float:
        """Count a whole scheme, in units of a limit."""
        return self.bound(costs, scheme) if self.exact is None else self.exact(costs, scheme)

    def bound(self, costs: Costs, scheme: Precisions) -> float:
        """Return the sum of a whole scheme's parts, in units of a limit, which is at least its cost."""
        parts = sum(self.layer(costs, name, precision) for name, precision in scheme.items())
        return (self.fixed(costs, {name: [precision] for name, precision in scheme.items()}) + parts) / self.scale(costs)

    def in_words(self, amount: float) -> str:
        """Write an amount in a sentence."""
        return self.words(amount) if self.words else self.text(amount).removeprefix(self.prefix)


def _weights(costs: Costs) -> int:
    return sum(layer.weights for layer in costs.layers.values())


BITS = Cost(
    name="bits",
    units={"bit": 1, "bits": 1},
    unit="bit",
    digits=3,
    examples=("4bit",),
    layer=lambda costs, name, precision: costs.layers[name].weights * precision.stored_weight_bits,
    scale=_weights,
    exact=lambda costs, scheme: costs.weight_bits(scheme),
    most=lambda costs: FLOAT_BITS,
    words=lambda bits: f"{bits:.4g} bits per weight",
    key="weight_bits",
    stored_bits=1,
    recorded="weights",
)
BYTES = Cost(
    name="bytes",
    units={"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    unit="kB",
    digits=3,
    examples=("120kB", "1.5MiB"),
    layer=lambda costs, name, precision: costs.layer_bytes(name, precision),
    fixed=lambda costs, choices: costs.reserved_bytes(choices),
    exact=lambda costs, scheme: costs.file_size(scheme),
    most=lambda costs: costs.float_bytes,
    words=lambda size: f"{size:.0f} bytes",
    stored_bits=8,
)
PERCENT = replace(
    BYTES,
    name="percent",
    units={"%": 1},
    unit="%",
    digits=3,
    examples=("12.5%",),
    scale=lambda costs: costs.float_bytes / 100,
    exact=lambda costs, scheme: 100 * costs.file_size(scheme) / costs.float_bytes,
    most=lambda costs: 100,
    words=lambda share: f"{share:.4g} %",
    counted_as=BYTES,
)
BOPS = Cost(
    name="bops",
    prefix="bops=",
    units={"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12},
    unit="M",
    digits=1,
    examples=("bops=2.1G",),
    layer=lambda costs, name, precision: costs.layer_bops(name, precision),
    exact=lambda costs, scheme: costs.bops(scheme),
    words=lambda count: f"{count:.4g} BOPs",
)
LATENCY = Cost(
    name="latency",
    prefix="latency=",
    units={"us": 1e-6, "ms": 1e-3, "s": 1.0},
    unit="ms",
    digits=4,
    examples=("latency=3ms",),
    layer=lambda costs, name, precision: costs.latency.layer(name, precision),
    fixed=lambda costs, choices: costs.latency.rest["int8"],
    exact=lambda costs, scheme: costs.latency.total(scheme),  # float layers that feed each other share no boundary
    known=lambda costs: costs.latency is not None,
    words=lambda seconds: f"{1e3 * seconds:.4g} ms",
    recorded="nowhere",
    remedy="keep fewer layers float, since integers of any bits are as fast",
)
LOSS = Loss(
    name="loss",
    prefix="loss=",
    units={"": 1},
    unit="",
    digits=6,
    examples=("loss=0.02",),
    chosen="It is the smallest that keeps the limit on the loss.",
)
DROP = Loss(
    name="drop",
    prefix="drop=",
    units={"%": 1},
    unit="%",
    digits=3,
    examples=("drop=1%",),
    largest=100,
    chosen="It is the smallest found that loses no more accuracy than allowed.",
)
QUANTITIES: dict[str, Quantity] = {one.name: one for one in (BITS, BYTES, PERCENT, BOPS, LATENCY, LOSS, DROP)}


def cost_quantities() -> list[Cost]:
    """Return the quantities that are counted for a scheme."""
    return [one for one in QUANTITIES.values() if isinstance(one, Cost)]


def own_costs() -> list[Cost]:
    """Return the costs that need no measurement and are not another's in another unit: the possible axes of a front."""
    return [one for one in cost_quantities() if one.counted is one and one.known is None]


@dataclass(frozen=True)
class Condition:
    """One limit: `quantity`, a name in `QUANTITIES`, is at most `limit`, in bits, bytes, seconds, ..."""

    quantity: str
    limit: float


@dataclass(frozen=True)
class Budget:
    """Conditions that must all hold, and their original text: `Budget.parse("4bit,bops=2G")`."""

    text: str
    conditions: tuple[Condition, ...]

    @classmethod
    def parse(cls, text: "str | Budget", check: "Callable[[Budget], None]" = lambda budget: None) -> "Budget":
        """Read a budget that `check` accepts: "4bit", "120kB", "12.5%", "bops=2.1G", "4bit,bops=2G", ... Raises InvalidSetting if it cannot
        be read, or is not accepted; suggestions are accepted."""
        budget = text._checked() if isinstance(text, Budget) else cls._read(text, _accepted(check))
        check(budget)
        return budget

    def _checked(self) -> "Budget":
        """Return this budget, made by hand. Raises InvalidSetting for a condition that no text writes."""
        for one in self.conditions:
            number = isinstance(one.limit, (int, float)) and not isinstance(one.limit, bool)
            if one.quantity not in QUANTITIES or not number or not 0 < one.limit < math.inf:
                raise InvalidSetting(f"Budget {self.text!r} has the condition {one}. Write the budget as text, such as '4bit'.")
        return self

    @classmethod
    def _read(cls, text: str, accepted: "Sequence[Quantity]") -> "Budget":
        if not isinstance(text, str):
            near = f' Write "{text:g}bit" for bits per weight.' if _are_bits(text) else ""
            near = " Give one budget, not several." if isinstance(text, (list, tuple)) else near
            raise InvalidSetting(f"Budget {reprlib.repr(text)} is not a text with a unit.{near or f' Write {_examples(accepted)}.'}")
        text = text.strip()
        _check_decimal_point(text, accepted)
        conditions = tuple(_parse_condition(part.strip(), accepted) for part in text.split(","))
        quantities = [condition.quantity for condition in conditions]
        if len(set(quantities)) < len(quantities):
            raise InvalidSetting(f"Budget {text!r} limits one quantity twice. Keep the smaller limit.")
        losses = [quantity.prefix for quantity in QUANTITIES.values() if isinstance(quantity, Loss) and quantity.name in quantities]
        if len(losses) > 1:
            raise InvalidSetting(f"Budget {text!r} asks for both {' and '.join(losses)}. Choose one.")
        return cls(text, conditions)

    def limit(self, quantity: str) -> float | None:
        """Return the limit on `quantity`, or None."""
        return next((condition.limit for condition in self.conditions if condition.quantity == quantity), None)

    def costs(self) -> list[tuple[Cost, float]]:
        """Return the limited costs, each with its limit."""
        limited = ((QUANTITIES[condition.quantity], condition.limit) for condition in self.conditions)
        return [(quantity, limit) for quantity, limit in limited if isinstance(quantity, Cost)]

    def loss(self) -> Loss | None:
        """Return the limited loss, or None."""
        limited = (QUANTITIES[condition.quantity] for condition in self.conditions)
        return next((quantity for quantity in limited if isinstance(quantity, Loss)), None)

    def __str__(self) -> str:
        return self.text


def listed(budget: Any) -> list[Any]:
    """Return one or several budgets as a list; the caller knows what none means."""
    return list(budget) if isinstance(budget, (list, tuple)) else [] if budget is None else [budget]


def budget_check(check: "Callable[[Budget], None]" = lambda budget: None) -> Callable[[Any], None]:
    """Return a check of an argument: none, one or several budgets that `check` accepts."""

    def checked(budget: Any) -> None:
        parse_budgets(listed(budget), check)

    return checked


def parse_budgets(budgets: "Iterable[str | Budget]", check: "Callable[[Budget], None]" = lambda budget: None) -> "tuple[Budget, ...]":
    """Read several budgets, each accepted by `check`. Raises InvalidSetting if one is named twice."""
    parsed = tuple(Budget.parse(one, check) for one in budgets)
    first: dict[frozenset[Condition], Budget] = {}
    for one in parsed:
        other = first.setdefault(frozenset(one.conditions), one)
        if other is not one:
            also = "" if str(other) == str(one) else f", also as {one}"
            raise InvalidSetting(f"Budget {other} is given twice{also}. Name each budget once.")
    return parsed


def _accepted(check: "Callable[[Budget], None]") -> "list[Quantity]":
    """Return the quantities of which `check` accepts a budget."""
    accepted = []
    for one in QUANTITIES.values():
        with suppress(InvalidSetting):
            check(Budget(one.examples[0], (Condition(one.name, 1.0),)))
            accepted.append(one)
    return accepted


def _parse_condition(part: str, accepted: "Sequence[Quantity]") -> Condition:
    for quantity in QUANTITIES.values():
        limit = quantity.parse(part)
        if limit is not None:
            if not 0 < limit < math.inf:
                raise InvalidSetting(f"Budget {reprlib.repr(part)} must be above zero and finite.")
            if limit > quantity.largest and quantity in accepted:
                raise InvalidSetting(f"Budget {part!r} must be at most {quantity.text(quantity.largest)}.")
            return Condition(quantity.name, limit)
    raise InvalidSetting(
        f"Budget {part!r} cannot be read.{_meant(part, accepted)} Write {_examples(accepted)}; join conditions with a comma."
    )


def _examples(accepted: "Sequence[Quantity]") -> str:
    *examples, last = (example for quantity in accepted for example in quantity.examples)
    return f"{', '.join(examples)} or {last}"


def _meant(part: str, accepted: "Sequence[Quantity]") -> str:
    """Return a question with the nearest valid budget; "" if none is near."""
    match = re.fullmatch(rf"\s*(\D*?)\s*{_NUMBER}\s*(\D*)", part)
    if match is None:
        return ""
    limits = {f"{one.prefix}{match[2]}{unit}": one for one in accepted for unit in one.units}
    text = f"{match[1]}{match[2]}{match[3] or 'bit'}"
    near = [one for one in limits if one.casefold() == text.casefold()] or difflib.get_close_matches(text, sorted(limits), n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near and _is_sensible(limits[near[0]], near[0]) else ""


def _are_bits(value: Any) -> bool:
    """Return whether a number may stand for bits per weight."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= FLOAT_BITS


def _is_sensible(quantity: Quantity, text: str) -> bool:
    """Return whether a limit is above zero, and not above what any float network has."""
    return 0 < (quantity.parse(text) or 0) <= {BITS.name: FLOAT_BITS, PERCENT.name: 100.0}.get(quantity.name, quantity.largest)


def _check_decimal_point(text: str, accepted: "Sequence[Quantity]") -> None:
    """Raise InvalidSetting for a number with a decimal comma, whose parts are not budgets."""
    pointed = re.sub(r"([0-9]),([0-9])", r"\1.\2", text)
    if _are_valid(pointed, accepted) and not _are_valid(text, accepted):
        parts = [(one, part.strip()) for part in pointed.split(",") for one in accepted]
        sensible = all(_is_sensible(one, part) for one, part in parts if one.parse(part) is not None)
        whole = re.sub(r"([0-9]),([0-9]{3})(?![0-9])", r"\1\2", text)  # 1,000kB
        meant = f" Did you mean {whole}?" if _are_valid(whole, accepted) else f" Did you mean {pointed}?" if sensible else ""
        raise InvalidSetting(f"Budget {text!r} cannot be read.{meant} Write {_examples(accepted)}; join conditions with a comma.")


def _are_valid(text: str, accepted: "Sequence[Quantity]") -> bool:
    """Return whether all conditions can be read as `accepted` quantities."""
    return all(any(one.parse(part.strip()) is not None for one in accepted) for part in text.split(","))


def check_counts_weights(budget: Budget) -> None:
    """Raise InvalidSetting if the budget limits anything but stored weights."""
    for condition in budget.conditions:
        quantity = QUANTITIES[condition.quantity]
        if not (isinstance(quantity, Cost) and quantity.stored_bits):
            raise InvalidSetting(f"grow counts weights: give a budget of bits or bytes, not {quantity.name} ({budget}).")


def bits_above(budget: Budget, costs: Costs, scheme: Precisions) -> float:
    """Return the stored bits per weight by which a scheme exceeds a budget of weights; negative if it is below."""
    over = []
    for cost, limit in budget.costs():
        bits = cost.scale(costs) * cost.stored_bits  # of the file, in one unit of the limit
        over.append((cost.total(costs, scheme) - limit) * bits / _weights(costs))
    return max(over)


def check_within(budget: Budget, costs: Costs, ends: tuple[Precisions, Precisions], whose: str, wider: Mapping[str, Precisions]) -> None:
    """Raise InvalidSetting if a limit exceeds the cost of the largest scheme. `ends` are the smallest and the largest; `whose` words it for
    the method; `wider` are the largest schemes with other options, by rising cost."""
    limits = budget.costs()
    least, most = ([_reached(quantity, costs, scheme) for quantity, _ in limits] for scheme in ends)
    exceeded = [(quantity, limit, reached) for (quantity, limit), reached in zip(limits, most, strict=True) if limit > reached]
    if not exceeded:
        return
    possible = [min(max(limit, low), high) for (_, limit), low, high in zip(limits, least, most, strict=True)]
    lower = ",".join(quantity.exact_text(limit) for (quantity, _), limit in zip(limits, possible, strict=True))
    can_be_met = all(limit >= low for (_, limit), low in zip(limits, least, strict=True))
    enough = [
        name for name, scheme in wider.items() if can_be_met and all(limit <= _reached(cost, costs, scheme) for cost, limit in limits)
    ]
    quantity, limit, reached = exceeded[0]
    raise InvalidSetting(
        f"A budget of {quantity.exact_text(limit)} exceeds what {whose}, {quantity.exact_text(reached)}. Lower the budget to {lower}"
        f"{f', or give {enough[0]}' if enough else ''}."
    )


def _reached(quantity: Cost, costs: Costs, scheme: Precisions) -> float:
    """Return the least limit that a scheme meets for certain, as written."""
    return quantity.parse(quantity.text(quantity.bound(costs, scheme))) or 0.0


def check_is_counted(budget: Budget) -> None:
    """Raise InvalidSetting if the budget limits a loss, which must be measured."""
    loss = budget.loss()
    if loss is not None:
        *names, last = (cost.name for cost in cost_quantities())
        raise InvalidSetting(f"A search takes budgets of {', '.join(names)} and {last}, not {loss.name} ({budget}).")


def parse_size(text: str) -> int:
    """Return the bytes that `text` ("2GiB", "500MB") writes."""
    size = BYTES.parse(text)
    if size is None:
        raise InvalidSetting(f"Size {text!r} cannot be read. Write 500MB or 2GiB.")
    return int(size)


def size_text(size: int) -> str:
    """Write a number of bytes in the grammar of `parse_size`: in the largest binary unit that divides it."""
    unit = next(unit for unit in ("GiB", "MiB", "KiB", "B") if size % BYTES.units[unit] == 0)
    return f"{size // int(BYTES.units[unit])}{unit}"


SIZE = Text(parse_size, size_text, "500MB or 2GiB")
BUDGETS = Text(lambda texts: tuple(map(str, parse_budgets(texts))), list)
"""Text of an option that may be given several times."""


COUNTED = Text(lambda texts: tuple(map(str, parse_budgets(texts, check_is_counted))), list)
"""The same, without losses."""


def budget_text(check: Callable[[Budget], None]) -> Text:
    """Return the text of budgets that `check` accepts."""

    def parse(text: str) -> str:
        return str(Budget.parse(text, check))

    return Text(parse, str, "3bit, 80kB or 12.5%")
