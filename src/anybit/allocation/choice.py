"""Choose the scheme of a budget: solve, measure the best schemes, take the best measured one."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor, nn

from anybit.allocation.program import Allocation, allocate, best_allocations, least_costs, make_problem
from anybit.allocation.sensitivity import SensitivityTable
from anybit.budget import BITS, BYTES, DROP, LOSS, Budget, Condition
from anybit.data.batches import Batch, Labels
from anybit.data.tasks import Metric, Task, distance, labels_in, measure, metric_name, named_task, outputs_of, score
from anybit.errors import InfeasibleBudget, InvalidSetting
from anybit.files.cache import Cache
from anybit.networks.candidates import Candidates
from anybit.networks.cost import CostModel
from anybit.networks.observed import ObservedNetwork
from anybit.progress import tell
from anybit.scheme import FLOAT, Precision, Scheme


@dataclass(frozen=True)
class Judge:
    """Measures schemes on the held-out inputs: their distance to the float outputs and, with labels, their accuracy.

    `metric` is the user's own, higher is better; if given, "drop=" budgets limit it instead of top-1. `scored` says whether the labels fit
    the task.
    """

    network: ObservedNetwork
    candidates: Candidates
    held_out: list[Batch]
    reference: Tensor
    task: Task
    metric: Metric | None = None
    cache: Cache = field(default_factory=Cache)
    scored: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", named_task(self.task))

    def of_scheme(self, scheme: Scheme) -> dict[str, float]:
        """Measure a scheme built from the unchanged candidates."""
        apply = partial(self.network.apply, scheme, self.candidates)
        return self.cache.value(f"measured {scheme}", lambda: self.of_model(apply()), as_scores)

    def of_model(self, model: nn.Module) -> dict[str, float]:
        """Return {"loss": distance, with labels the task's counted score ("top1", ...), "metric": the user's}."""
        return self.of_outputs(outputs_of(model, self.held_out))

    def of_outputs(self, outputs: Tensor) -> dict[str, float]:
        """Measure outputs on the held-out inputs, as `of_model` does."""
        result = {"loss": distance(outputs, self.reference, self.task)}
        counted = self.task.counted
        if self.labels is not None and self.scored and counted is not None:
            scores = score(outputs, self.labels, self.task, reader=self.held_out[0].reader)
            result |= {counted: scores[counted]} if counted in scores else {}
        if self.labels is not None and self.metric is not None:
            result["metric"] = measure(self.metric, self.task.tensors(outputs), self.labels)
        return result

    @property
    def counted(self) -> str | None:
        """Return the name of the score that "drop=" budgets limit."""
        return (self.task.counted if self.scored else None) if self.metric is None else "metric"

    @property
    def labels(self) -> Labels | None:
        return labels_in(self.held_out)

    def float_score(self) -> float:
        """Return the score of the float network that "drop=" budgets limit."""
        assert self.counted is not None  # else the budget was refused
        return self.of_outputs(self.reference)[self.counted]

    def lost(self, float_score: float, scores: Mapping[str, float]) -> float:
        """Return what scores lose against the float network's, in percent as "drop=" budgets count it."""
        assert self.counted is not None  # else the budget was refused
        return (float_score - scores[self.counted]) / (percent_of(float_score) if self.metric is not None else 1.0)


def percent_of(float_score: float) -> float:
    """Return one percent of a user's metric, by its value for the float network: 0.01 if that is a share of 0..1, else one point of it."""
    return 0.01 if 0 < float_score <= 1 else 1.0


def drop_in_words(budget: Budget, metric: Metric, float_score: float) -> str:
    """Say what a "drop=" budget means for a user's metric."""
    allowed = percent_of(float_score) * (budget.limit(DROP.name) or 0.0)
    scale = "which is read as a share of 0 to 1" if percent_of(float_score) < 1 else "which is no share of 0 to 1"
    return f"{budget} allows {metric_name(metric)} to lose {allowed:g}: it is {float_score:.4g} for the float network, {scale}"


def as_scores(record: Mapping[str, Any]) -> dict[str, float]:
    """Return a stored record of `Judge.of_model`."""
    return {"loss": float(record["loss"])} | {str(key): float(value) for key, value in record.items()}


@dataclass(frozen=True)
class Choice:
    """The chosen scheme, the solver's allocation behind the comparison, and every measured scheme."""

    scheme: Scheme
    allocation: Allocation | None
    measured: list[dict[str, Any]]

    def certificate(self, seed: int) -> dict[str, Any]:
        """Return the solver's certificate of its best scheme, and the name of the chosen one."""
        chosen = next((row["name"] for row in self.measured if row["scheme"] == self.scheme), None)
        solved = (
            {**self.allocation.certificate(), "predicted_loss": self.allocation.predicted_loss, "seed": seed} if self.allocation else {}
        )
        return {**solved, "chosen": chosen}

    def to_json(self) -> dict[str, Any]:
        """Return all of it, for `from_json`."""
        allocation = None if self.allocation is None else {**vars(self.allocation), "scheme": self.allocation.scheme.to_json()}
        measured = [{**row, "scheme": row["scheme"].to_json()} for row in self.measured]
        return {"scheme": self.scheme.to_json(), "allocation": allocation, "measured": measured}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Choice":
        """Return the choice that `to_json` wrote."""
        solved = data["allocation"]
        allocation = None if solved is None else Allocation(**{**solved, "scheme": Scheme.parse(solved["scheme"])})
        return cls(Scheme.parse(data["scheme"]), allocation, [{**row, "scheme": Scheme.parse(row["scheme"])} for row in data["measured"]])


def choose_scheme(network: ObservedNetwork, table: SensitivityTable, budget: Budget | None, alternatives: int, judge: Judge) -> Choice:
    """Solve for `budget`, measure the best schemes and every uniform one that fits, and take the best measured one.

    Under a limit on the loss, the best is the smallest that meets it.
    """
    if budget is None:
        return Choice(network.largest, None, [measured_row(network, table, "largest", network.largest, judge)])
    if budget.loss() is DROP:
        return _choose_by_drop(network, table, budget, judge)
    problem = make_problem(network.choices, table, network.costs, budget)
    loss_limit = budget.limit(LOSS.name)
    if loss_limit is not None:
        size = make_problem(network.choices, table, network.costs, Budget.parse("100%")).costs[BYTES.name]
        of_loss = (lambda amount: LOSS.text(amount + table.floor)), LOSS.exact_text(loss_limit)
        problem = replace(problem, in_words={**problem.in_words, LOSS.name: of_loss})
        solutions = least_costs(problem, size, loss_limit - table.floor)
    else:
        solutions = best_allocations(problem)
    solved = list(islice(solutions, alternatives))
    rows = [measured_row(network, table, f"allocated {index}", solution.scheme, judge) for index, solution in enumerate(solved, 1)]
    rows += uniform_rows(network, table, budget, judge)
    if loss_limit is None:
        best = min(rows, key=lambda row: row["measured"])
    else:  # the smallest that meets the limit when measured, or else the smallest that was predicted to
        best = min((row for row in rows if row["measured"] <= loss_limit), key=lambda row: row["bytes"], default=rows[0])
    return Choice(best["scheme"], solved[0], rows)


def check_feasible(network: ObservedNetwork, budget: Budget) -> None:
    """Raise InfeasibleBudget, naming the minimum, before any long work, since costs need no measurement."""
    nothing_lost = SensitivityTable({(name, p): 0.0 for name, options in network.choices.items() for p in options}, FLOAT, 0)
    allocate(make_problem(network.choices, nothing_lost, network.costs, budget))


def uniform_rows(network: ObservedNetwork, table: SensitivityTable, budget: Budget, judge: Judge) -> list[dict[str, Any]]:
    """Return every uniform scheme (apart from kept layers) that fits the budget, measured."""
    schemes = {Precision(w, a): network.uniform(w, a) for w in network.options.weight_bits for a in network.options.activation_bits}
    return [
        measured_row(network, table, f"uniform {precision}", scheme, judge)
        for precision, scheme in schemes.items()
        if fits_budget(network.costs, scheme, budget)
    ]


def fits_budget(costs: CostModel, scheme: Scheme, budget: Budget) -> bool:
    """Return whether the scheme meets every limit on costs."""
    return all(cost.total(costs, scheme) <= limit * (1 + 1e-12) for cost, limit in budget.costs() if cost.is_known(costs))


def measured_row(network: ObservedNetwork, table: SensitivityTable, name: str, scheme: Scheme, judge: Judge) -> dict[str, Any]:
    """Return a scheme's row: the table's prediction, its measurement on held-out inputs, and its costs."""
    measured = judge.of_scheme(scheme)
    loss = measured.pop("loss")
    row = {"name": name, "scheme": scheme, "predicted": table.total(scheme), "measured": loss, **measured, **network.costs.summary(scheme)}
    tell("scheme", **row)
    return row


def _choose_by_drop(network: ObservedNetwork, table: SensitivityTable, budget: Budget, judge: Judge) -> Choice:
    """Return the smallest scheme whose metric (or top-1) on the held-out inputs is within the allowed drop, by bisection on weight bits."""
    if judge.labels is None or judge.counted is None:
        raise InvalidSetting(
            "A budget of drop= needs labelled data, and a --metric unless the network is a classifier. Give them, or use loss=."
        )
    float_score, allowed = judge.float_score(), budget.limit(DROP.name) or 0.0
    others = tuple(c for c in budget.conditions if c.quantity != DROP.name)
    rows: list[dict[str, Any]] = []
    passed: tuple[Scheme, Allocation] | None = None
    low, high = float(min(network.options.weight_bits)), network.costs.weight_bits(network.largest)
    for attempt in range(8):
        # The largest scheme first: if it fails, so do all smaller ones.
        bits = high if attempt == 0 else (low + high) / 2
        trial = Budget(f"{bits}bit", (*others, Condition(BITS.name, bits)))
        try:
            allocation = next(best_allocations(make_problem(network.choices, table, network.costs, trial)))
        except InfeasibleBudget:
            if attempt == 0:
                raise
            low = bits
            continue
        row = measured_row(network, table, f"allocated at {bits:.2f} bits", allocation.scheme, judge)
        rows.append(row)
        lost = judge.lost(float_score, row)
        if lost <= allowed:
            passed, high = (allocation.scheme, allocation), bits
        elif attempt == 0:
            enough = f" or raise the budget to {DROP.text(lost)}" if lost < DROP.largest else ""
            raise InfeasibleBudget(
                f"Even the largest scheme loses {lost:.4g} % of {judge.counted} on the held-out inputs, more than {allowed:g} %. "
                f"Allow more bits{enough}."
            )
        else:
            low = bits
    assert passed is not None  # the first attempt passes or raises
    return Choice(*passed, rows)
