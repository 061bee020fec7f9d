"""report.json, strictly typed where verbs and pages rely on it; the rest is left alone."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from anybit.allocation import Frontier, frontier
from anybit.errors import InvalidFile
from anybit.scheme import Precision

Bits = Annotated[Precision, BeforeValidator(lambda text: text if isinstance(text, Precision) else Precision.parse(text))]
Scores = dict[str, float | None]
SCORES = ("metric", "top1", "spearman", "f1")  # higher is better; the user's own first
Count = Annotated[int, Field(ge=0)]
Words = Annotated[str, Field(max_length=1000)]
"""Text that is shown in a table."""
MANY = 1000
"""Rows of a table, at most."""


class Part(BaseModel):
    """An object of a report: known fields are of their type and finite, others are not looked at."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)


Positive = Annotated[float, Field(ge=0)]


class Amounts(Part):
    weight_bits: Positive
    bytes: Annotated[int, Field(gt=0)]
    percent: Positive
    bops: Positive


class LayerRow(Part):
    precision: Bits
    weights: Count
    bytes: Count
    predicted_loss: float | None = None


class Scored(Part):
    """What held-out inputs with labels may have scored."""

    metric: float | None = None
    top1: float | None = None
    spearman: float | None = None
    f1: float | None = None


class SchemeRow(Amounts, Scored):
    """A scheme that was measured on held-out inputs before one was chosen."""

    name: Words
    scheme: dict[str, Bits]
    predicted: float
    measured: float | None = None
    chosen: bool


class LadderRow(Scored):
    step: Words
    kept: bool
    loss: float


class Unit(Part):
    """Errors of a unit of AdaQuant on held-out inputs, and the step that was kept."""

    before: float
    after: float
    steps: int


class Stage(Part):
    stage: Words
    seconds: Positive
    peak_bytes: Count


class Latencies(Part):
    """Seconds of one sample."""

    predicted: float
    exported: float
    float32: float


def counted(rows: Sequence[Scored]) -> str | None:
    """The first of the scores that any of `rows` has."""
    return next((score for score in SCORES if any(getattr(row, score) is not None for row in rows)), None)


class Cell(Part):
    loss: float
    bytes: Count
    bops: float


class Table(Part):
    """Every candidate precision's predicted loss and costs."""

    floor: float
    fixed_bytes: Count
    weights: Annotated[int, Field(gt=0)]
    layers: dict[str, Annotated[dict[Bits, Cell], Field(min_length=1)]]

    @cached_property
    def frontier(self) -> Frontier:
        """The best schemes over the bytes that layers take; the floor and the fixed bytes are in none of its numbers."""
        losses, sizes = (
            {name: np.array([float(getattr(cell, what)) for cell in row.values()]) for name, row in self.layers.items()}
            for what in ("loss", "bytes")
        )
        return frontier({name: list(row) for name, row in self.layers.items()}, losses, sizes)

    def sums(self, scheme: Mapping[str, Precision]) -> tuple[int, float]:
        """(bytes, predicted loss) of a scheme of the table's precisions."""
        cells = [self.layers[name][precision] for name, precision in scheme.items()]
        return self.fixed_bytes + sum(cell.bytes for cell in cells), self.floor + math.fsum(cell.loss for cell in cells)

    def uniforms(self) -> dict[str, dict[str, Precision]]:
        """Every uniform scheme: a layer that cannot have both its bits has those of its weights or input, or what it is kept at."""
        found = dict.fromkeys(p for row in self.layers.values() if len(row) > 1 for p in row)
        whole = [p for p in found if p.weight_bits is not None and p.activation_bits is not None] or list(found)
        return {f"uniform {p}": {name: _nearest(p, list(row)) for name, row in self.layers.items()} for p in whole}


def _nearest(wanted: Precision, options: Sequence[Precision]) -> Precision:
    parts = (wanted, Precision(wanted.weight_bits, None), Precision(None, wanted.activation_bits))
    return next((part for part in parts if part in options), options[0])


class Certificate(Part):
    """What a solver proved: the value that it reached and the least that any other could."""

    solver: str | None = None
    objective: str | None = None
    value: float | None = None
    bound: float | None = None
    gap: float | None = None
    seed: int | None = None


class Epoch(Part):
    epoch: int
    loss: float
    weight_bits: float | None = None
    layers: dict[str, float | None] = {}
    soft: Scores = {}
    frozen: Scores = {}


class Evaluated(Part):
    scheme: dict[str, Bits]
    score: float
    cost: float
    origin: str
    measured: float | None = None


class FoundFor(Amounts):
    scheme: dict[str, Bits]


class SearchRecord(Part):
    """What a search found; `evaluated` is in search.json alone."""

    score: str
    quantity: str
    front: list[Evaluated]
    budgets: dict[str, FoundFor]
    settings: dict[str, Any]
    evaluated: list[Evaluated] = []


class Record(Part):
    """One run's report, of any road. `test` is of the run's network, or of each uniform subnet of a supernet."""

    version: Annotated[int, Field(ge=1, le=1)]
    road: str = "calibrate"
    budget: Words | None = None
    result: Amounts | None = None
    float_bytes: Count | None = None
    layers: dict[str, LayerRow] = {}
    schemes: Annotated[list[SchemeRow], Field(max_length=MANY)] = []
    table: Table | None = None
    certificate: Certificate = Certificate()
    ladder: Annotated[list[LadderRow], Field(max_length=MANY)] = []
    units: dict[str, Unit | None] = {}
    stages: Annotated[list[Stage], Field(max_length=MANY)] = []
    latency: Latencies | None = None
    epochs: list[Epoch] = []
    subnets: dict[str, Amounts] = {}
    search: SearchRecord | None = None
    test: Scores | dict[str, Scores] = {}
    float_test: Scores = {}
    inputs: dict[str, int] = {}
    uncovered: dict[str, str] = {}
    settings: dict[str, Any] = {}
    environment: dict[str, Any] = {}

    @model_validator(mode="after")
    def _layers_agree(self) -> "Record":
        for what, names in [("table", self.table and self.table.layers), *((row.name, row.scheme) for row in self.schemes)]:
            if names and set(names) != set(self.layers):
                raise ValueError(f"{what} is not of the layers that the report lists: {sorted(set(names) ^ set(self.layers))[0]!r}")
        return self

    @model_validator(mode="after")
    def _all_that_a_run_is_shown_by(self) -> "Record":
        lacking = {"budget", "layers", "stages"} - self.model_fields_set
        if self.result is not None and lacking:
            raise ValueError(f"{', '.join(sorted(lacking))} lacking beside the result")
        if self.result is None and self.schemes:
            raise ValueError("the result is lacking beside the schemes")
        if self.schemes and self.chosen is None:
            raise ValueError("none of the schemes is chosen")
        if (self.schemes or self.ladder) and self.final_loss is None:
            raise ValueError("no step of the ladder is kept")
        return self

    @property
    def chosen(self) -> SchemeRow | None:
        return next((row for row in self.schemes if row.chosen), None)

    @property
    def final_loss(self) -> float | None:
        """On held-out inputs, after the last step that was kept."""
        return next((row.loss for row in reversed(self.ladder) if row.kept), None)

    def tested(self, score: str, subnet: str | None = None) -> float | None:
        """What the run's own network, or a subnet, scored on the test data."""
        scores = self.test if subnet is None else self.test.get(subnet)
        value = scores.get(score) if isinstance(scores, dict) else None
        return None if isinstance(value, dict) else value

    def score_tested(self) -> str | None:
        """The first of the scores that test data gave, or "loss"."""
        return next((s for s in (*SCORES, "loss") if any(self.tested(s, of) is not None for of in (None, *self.subnets))), None)


def record_of(report: Mapping[str, Any], where: str = "The report") -> Record:
    """`report` as a record; raises InvalidFile naming the field that cannot be."""
    version = report.get("version") if isinstance(report, Mapping) else None
    if type(version) is int and version > 1:
        raise InvalidFile(f"{where} has format version {version}; this anybit reads up to 1. Upgrade anybit.")
    try:
        return Record.model_validate(report)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise InvalidFile(f"{where}: {place}: {first['msg']}. Restore it or run again.") from error
