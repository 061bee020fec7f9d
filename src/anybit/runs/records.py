"""report.json and search.json, strictly typed where verbs and pages rely on them; other fields are not checked."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from anybit.allocation.frontier import Frontier, frontier
from anybit.budget import Budget, cost_quantities
from anybit.files.strict import check_version, validated
from anybit.scheme import Precision

Bits = Annotated[Precision, BeforeValidator(lambda text: text if isinstance(text, Precision) else Precision.parse(text))]
Scores = dict[str, float | None]
SCORES = ("metric", "top1", "spearman", "f1", "mean_iou")  # higher is better; the user's own first
Count = Annotated[int, Field(ge=0)]
Words = Annotated[str, Field(max_length=1000)]
"""Text that is shown in a table."""
BudgetText = Annotated[Words, AfterValidator(lambda text: Budget.parse(text) and text)]
ROWS = 1000
"""Most rows of data that a table shows completely."""


class Part(BaseModel):
    """An object of a report: known fields have their type and are finite, others are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)


class Costed(Part):
    """An object with amounts of costs: its fields, and any other quantity that anybit knows."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]

    @model_validator(mode="before")
    @classmethod
    def _of_known_quantities(cls, data: Any) -> Any:
        known = cls.model_fields.keys() | {cost.report_key for cost in cost_quantities()}
        return {key: value for key, value in data.items() if key in known} if isinstance(data, dict) else data

    def amount(self, key: str) -> float | None:
        """Return the amount of a cost, or None."""
        return getattr(self, key, None)


class Amounts(Costed):
    weight_bits: Annotated[float, Field(ge=0)]
    bytes: Annotated[int, Field(gt=0)]
    percent: Annotated[float, Field(ge=0)]
    bops: Count


class LayerRow(Part):
    precision: Bits
    weights: Count
    bytes: Count
    predicted_loss: float | None = None


class Scored(Part):
    """The scores of held-out inputs with labels."""

    metric: float | None = None
    top1: float | None = None
    spearman: float | None = None
    f1: float | None = None
    mean_iou: float | None = None


class SchemeRow(Amounts, Scored):
    """A scheme that was measured on held-out inputs before the choice."""

    name: Words
    scheme: dict[str, Bits]
    predicted: float
    measured: float | None = None
    chosen: bool


class LadderRow(Scored):
    step: Words
    kept: bool
    loss: float


class UnitErrors(Part):
    """Errors of a unit, or of a single layer, on held-out inputs and on fitting ones, and the step that was kept."""

    before: float
    after: float
    fitted_before: float | None = None
    fitted_after: float | None = None
    steps: int


Errors = Annotated[UnitErrors | None, BeforeValidator(lambda errors: None if errors == {} else errors)]
"""Empty if there was nothing to fit."""


class Stage(Part):
    stage: Words
    seconds: Annotated[float, Field(ge=0)]
    peak_bytes: Count


def counted(rows: Sequence[Scored]) -> str | None:
    """Return the first score that any of `rows` has."""
    return next((score for score in SCORES if any(getattr(row, score) is not None for row in rows)), None)


class Cell(Costed):
    loss: float
    bytes: Count
    bops: Count


class Table(Part):
    """Every candidate precision's predicted loss and costs."""

    floor: float
    fixed_bytes: Count
    weights: Annotated[int, Field(gt=0)]
    layers: dict[str, Annotated[dict[Bits, Cell], Field(min_length=1)]]

    @cached_property
    def frontier(self) -> Frontier:
        """Return the best schemes over the bytes of layers, without the floor and the fixed bytes."""
        return self.frontier_over(lambda name, precision: self.layers[name][precision].bytes)

    def frontier_over(self, cost: Callable[[str, Precision], float]) -> Frontier:
        """Return the best schemes over the `cost` of each layer at each precision."""
        losses = {name: np.array([cell.loss for cell in row.values()]) for name, row in self.layers.items()}
        costs = {name: np.array([float(cost(name, precision)) for precision in row]) for name, row in self.layers.items()}
        return frontier({name: list(row) for name, row in self.layers.items()}, losses, costs)

    def sums(self, scheme: Mapping[str, Precision]) -> tuple[int, float]:
        """Return (bytes, predicted loss) of a scheme of the table's precisions."""
        cells = [self.layers[name][precision] for name, precision in scheme.items()]
        return self.fixed_bytes + sum(cell.bytes for cell in cells), self.floor + math.fsum(cell.loss for cell in cells)

    def uniforms(self) -> dict[str, dict[str, Precision]]:
        """Return every uniform scheme: a layer that cannot have both bits has those of its weights or input, or the precision at which it
        is kept."""
        precisions = dict.fromkeys(p for row in self.layers.values() if len(row) > 1 for p in row)
        whole = [p for p in precisions if p.weight_bits is not None and p.activation_bits is not None] or list(precisions)
        return {f"uniform {p}": {name: _nearest(p, list(row)) for name, row in self.layers.items()} for p in whole}


def _nearest(precision: Precision, options: Sequence[Precision]) -> Precision:
    parts = (precision, Precision(precision.weight_bits, None), Precision(None, precision.activation_bits))
    return next((option for option in parts if option in options), options[0])


class Certificate(Part):
    """The solver's proof: the value that it reached and the lower bound; and the name of the `chosen` scheme."""

    solver: str | None = None
    objective: str | None = None
    value: float | None = None
    bound: float | None = None
    gap: float | None = None
    seed: int | None = None
    chosen: Words | None = None


class Latency(Part):
    """Seconds of one sample."""

    predicted: float
    exported: float
    float32: float


class Epoch(Part):
    epoch: int
    loss: float
    weight_bits: float | None = None
    layers: dict[str, int | None] = {}
    soft: Scores = {}
    frozen: Scores = {}


class EvaluatedRecord(Part):
    scheme: dict[str, Bits]
    score: float
    cost: float
    origin: Literal["uniform", "drawn", "sensitivity", "searched", "allocated"]
    measured: float | None = None


class FoundFor(Amounts):
    scheme: dict[str, Bits]


class SearchRecord(Part):
    """The result of a search, as in its report."""

    score: str
    quantity: str
    front: list[EvaluatedRecord]
    budgets: dict[BudgetText, FoundFor]
    settings: dict[str, Any]
    evaluated: list[EvaluatedRecord] = []


class SearchFile(SearchRecord):
    """search.json: also every evaluated subnet, and the hash of the supernet to which they belong."""

    evaluated: list[EvaluatedRecord]
    sha256: str


class Record(Part):
    """One run's report, of any road. `test` belongs to the run's network, or to each uniform subnet of a supernet."""

    version: Annotated[int, Field(ge=1, le=1)]
    road: str = "calibrate"
    budget: BudgetText | None = None
    result: Amounts | None = None
    float_bytes: Count = 0
    layers: dict[str, LayerRow] = {}
    schemes: Annotated[list[SchemeRow], Field(max_length=ROWS)] = []
    table: Table | None = None
    certificate: Certificate = Certificate()
    candidate_errors: dict[str, dict[str, Errors]] = {}
    ladder: Annotated[list[LadderRow], Field(max_length=ROWS)] = []
    units: dict[str, Errors] = {}
    stages: Annotated[list[Stage], Field(max_length=ROWS)] = []
    latency: Latency | None = None
    epochs: list[Epoch] = []
    subnets: dict[str, Amounts] = {}
    search: SearchRecord | None = None
    test: Scores | dict[str, Scores] = {}
    float_test: Scores = {}
    float_held_out: Scores = {}
    inputs: dict[str, int] = {}
    uncovered: dict[str, str] = {}
    notes: list[str] = []
    settings: dict[str, Any] = {}
    preprocessing: dict[str, Any] = {}
    environment: dict[str, Any] = {}

    @model_validator(mode="after")
    def _layers_agree(self) -> "Record":
        tables = {} if self.table is None else self.table.layers
        named: list[tuple[str, Collection[str]]] = [] if self.table is None else [("table", tables)]
        for what, names in [*named, *((row.name, row.scheme) for row in self.schemes)]:
            if set(names) != set(self.layers):
                raise ValueError(f"{what} does not belong to the layers that the report lists: {min(set(names) ^ set(self.layers))!r}")
        for name in tables:
            if self.layers[name].precision not in tables[name]:
                raise ValueError(f"table has no {self.layers[name].precision} for {name!r}, which the layers list")
        return self

    @model_validator(mode="after")
    def _all_that_a_run_is_shown_by(self) -> "Record":
        lacking = {"budget", "float_bytes", "layers", "stages"} - self.model_fields_set
        if self.result is not None and lacking:
            raise ValueError(f"{', '.join(sorted(lacking))} missing beside the result")
        if self.result is None and self.schemes:
            raise ValueError("the result is missing beside the schemes")
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
        """Return the held-out loss after the last kept step."""
        return next((row.loss for row in reversed(self.ladder) if row.kept), None)

    def final_score(self, score: str) -> float | None:
        """On held-out inputs, after the last step that was kept."""
        return next((getattr(row, score) for row in reversed(self.ladder) if row.kept), None)

    def tested(self, score: str, subnet: str | None = None) -> float | None:
        """Return the score of the run's own network, or of a subnet, on the test data."""
        scores = self.test if subnet is None else self.test.get(subnet)
        value = scores.get(score) if isinstance(scores, dict) else None
        return None if isinstance(value, dict) else value

    def score_tested(self) -> str | None:
        """Return the first of the scores on test data, or "loss"."""
        return next((s for s in (*SCORES, "loss") if any(self.tested(s, of) is not None for of in (None, *self.subnets))), None)


def record_of(report: Mapping[str, Any], where: str = "The report") -> Record:
    """Return `report` as a record. Raises InvalidFile naming the faulty field."""
    check_version(report, where, 1)
    return validated(Record, report, where)
