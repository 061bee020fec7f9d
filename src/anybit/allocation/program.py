"""The bits of each layer from an integer program over the sensitivity table.

    min  sum_l sum_k I_lk loss_lk      s.t.  sum_l sum_k I_lk cost_lk <= budget  (one row per budget),   sum_k I_lk = 1,   I in {0, 1}

or the paper's form, the largest saving under a limit on the predicted loss, with the roles of cost and loss swapped.

Source: Hubara et al., ICML 2021, eq. 3 to 5. Deviation: several budgets at once; the solver (HiGHS) returns its bound and gap, which are
stored as a certificate; the next best schemes follow by excluding the earlier ones. For one cost at every budget at once, `frontier`
computes the convex hull of all schemes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp
from scipy.sparse import csr_matrix

from anybit.allocation.sensitivity import SensitivityTable
from anybit.budget import Budget, Cost
from anybit.environment import without_c_output
from anybit.errors import InfeasibleBudget, InvalidSetting, UnsupportedModel
from anybit.networks.cost import CostModel
from anybit.scheme import Precision, Scheme

# Choices per layer that the integer program starts with; the relaxation's reduced costs tell which, and whether they suffice.
CORE = 5

GAPS, NODES = (1e-4, 1e-3, 1e-2), 10_000
"""Relative gaps within which the solver proves a scheme, and the number of nodes of its search tree for each but the last. Layers of equal
sizes, with one loss that outweighs all others, can delay it by half an hour and more at the narrowest gap, and are solved at once at the
next. Nodes, not seconds, so that a busy machine, or one that slept meanwhile, gets the same scheme."""

SOLVED = (0, 2)
"""The solver's status when it is done, with the best scheme or because there is none."""


Words = tuple[Callable[[float], str], str]
"""Writes an amount of a limited quantity; and the limit, in the same unit."""


@dataclass(frozen=True)
class Problem:
    """One choice per layer: `losses[layer][k]`, and for every limited quantity `costs[quantity][layer][k]` with its `limits[quantity]`.

    `in_words[quantity]` writes a sum of that quantity's costs as the budget counts it, and the budget (with fixed parts, in one unit).
    """

    choices: Mapping[str, Sequence[Precision]]
    losses: Mapping[str, np.ndarray]
    costs: Mapping[str, Mapping[str, np.ndarray]]
    limits: Mapping[str, float]
    in_words: Mapping[str, Words] = field(default_factory=dict)


@dataclass(frozen=True)
class Allocation:
    """A scheme, its predicted loss, and its certificate: the minimized objective, its value, the solver's lower bound on it, and the
    relative gap between the two."""

    scheme: Scheme
    predicted_loss: float
    objective: str
    value: float
    bound: float
    gap: float

    def certificate(self) -> dict[str, Any]:
        """Return the certificate for the scheme file. It contains no time or machine, so that equal problems give equal files."""
        return {
            "solver": "HiGHS through scipy.optimize.milp",
            "objective": self.objective,
            "value": self.value,
            "bound": self.bound,
            "gap": self.gap,
        }


def make_problem(choices: Mapping[str, Sequence[Precision]], table: SensitivityTable, costs: CostModel, budget: Budget | None) -> Problem:
    """Return the problem of least predicted loss under `budget`'s limits on costs."""
    names = list(choices)
    for name in names:
        if not choices[name]:
            raise InvalidSetting(f"Layer {name} has no precision to choose from.")
    losses = {name: np.array([table.loss(name, precision) for precision in choices[name]]) for name in names}
    for name in names:
        if not np.isfinite(losses[name]).all():
            raise UnsupportedModel(f"The sensitivity of layer {name} is not finite: {losses[name].tolist()}. Fix it with --keep.")
    limited: dict[str, dict[str, np.ndarray]] = {}
    limits: dict[str, float] = {}
    in_words: dict[str, Words] = {}
    for cost, limit in budget.costs() if budget else ():
        _check_limit(cost, limit, costs)
        parts, part_limit, words = _linear(cost, limit, choices, costs)
        name = cost.counted.name
        if name not in limits or part_limit < limits[name]:  # "120kB,12.5%" limits the same bytes twice
            limited[name], limits[name], in_words[name] = parts, part_limit, words
    return Problem(choices, losses, limited, limits, in_words)


Linear = tuple[dict[str, np.ndarray], float, Words]


def _linear(cost: Cost, limit: float, choices: Mapping[str, Sequence[Precision]], costs: CostModel) -> Linear:
    """Return (the parts of each layer's choices, the limit on their sum, how a sum and the limit are written)."""
    counted = cost.counted
    parts = {name: np.array([float(counted.layer(costs, name, p)) for p in choices[name]]) for name in choices}
    fixed = counted.fixed(costs, choices)
    words = (lambda amount: cost.text((amount + fixed) / cost.scale(costs), cost.unit_for(limit))), cost.exact_text(limit)
    return parts, limit * cost.scale(costs) - fixed, words


def _check_limit(cost: Cost, limit: float, costs: CostModel) -> None:
    if not cost.is_known(costs):
        raise InvalidSetting(f"A budget of {cost.name} needs a measured table: run `anybit profile` on this model and data first.")
    if cost.most is not None and limit > cost.most(costs):
        raise InvalidSetting(
            f"A budget of {cost.in_words(limit)} is above the float network's {cost.in_words(cost.most(costs))}: there is nothing to save. "
            "Lower the budget."
        )


def allocate(problem: Problem, objective: Mapping[str, np.ndarray] | None = None, name: str = "least predicted loss") -> Allocation:
    """Return the best scheme, proven within the returned gap. `objective` (default: the losses) is minimized instead, for the paper's
    form."""
    return next(best_allocations(problem, objective, name))


def least_costs(problem: Problem, cost: Mapping[str, np.ndarray], loss_limit: float) -> Iterator[Allocation]:
    """Yield the paper's form: schemes with a predicted loss of at most `loss_limit`, by rising cost."""
    costs, limits = {**problem.costs, "loss": problem.losses}, {**problem.limits, "loss": loss_limit}
    bounded = Problem(problem.choices, problem.losses, costs, limits, problem.in_words)
    return best_allocations(bounded, cost, "least cost under a loss limit")


def best_allocations(
    problem: Problem, objective: Mapping[str, np.ndarray] | None = None, name: str = "least predicted loss"
) -> Iterator[Allocation]:
    """Yield allocations, the best first, each excluding the earlier ones; ends when no other scheme fits.

    Choices that another of the same layer beats in every respect are removed beforehand, so that no runner-up uses one either.
    """
    objective = objective or problem.losses
    layers = list(problem.choices)
    columns = [(layer, int(k)) for layer in layers for k in _undominated(problem, objective, layer)]
    program = _Program.of(problem, objective, layers, columns)
    feasible = False
    while (solved := program.solve()) is not None:
        chosen, bound = solved
        picked = {columns[i][0]: columns[i][1] for i in chosen}
        if all(sum(problem.costs[q][layer][k] for layer, k in picked.items()) <= limit for q, limit in problem.limits.items()):
            feasible = True
            scheme = Scheme({layer: problem.choices[layer][k] for layer, k in picked.items()})
            predicted = float(sum(problem.losses[layer][k] for layer, k in picked.items()))
            value = float(sum(objective[layer][k] for layer, k in picked.items()))
            bound = min(bound, value)
            yield Allocation(scheme, predicted, name, value, bound, (value - bound) / max(abs(value), 1e-300))
        # A duplicate, or above a limit by less than the solver's tolerance: exclude it.
        program.exclude(chosen)
    if not feasible:
        raise InfeasibleBudget(_why_infeasible(problem))


class _Program:
    """min values x  s.t.  one choice per layer, every limit, none of the excluded schemes; x in {0, 1}.

    Solved over a core of its columns. The linear relaxation gives each column a reduced cost: a scheme that uses the column exceeds the
    relaxation's value by at least that much. The core's best scheme is therefore the best of all if it lies closer to the relaxation than
    any column outside the core; until then, the core grows by those that could still beat it. (Savelsbergh, "Preprocessing and probing
    techniques for mixed integer programming problems", 1994: reduced-cost fixing.)
    """

    def __init__(self, values: np.ndarray, owner: np.ndarray, limited: np.ndarray, limits: np.ndarray):
        self.unit = max(float(np.abs(values).max()), 1e-300)  # coefficients of at most 1 keep the solver's absolute tolerances meaningful
        self.values, self.limited, self.limits = values / self.unit, limited, limits
        self.layers = int(owner.max()) + 1
        self.one_each = csr_matrix((np.ones(len(values)), (owner, np.arange(len(values)))))
        self.excluded: list[np.ndarray] = []
        self.gap = 0  # index of GAPS
        rows = {"A_ub": limited, "b_ub": limits} if len(limits) else {}
        with without_c_output():
            relaxed = linprog(self.values, A_eq=self.one_each, b_eq=np.ones(self.layers), method="highs", **rows)
        self.feasible = relaxed.status == 0
        if self.feasible:
            self.relaxed, self.reduced = float(relaxed.fun), relaxed.lower.marginals
            enough = min(CORE * self.layers, len(values) - 1)
            self.reach = float(np.partition(self.reduced, enough)[enough])

    @classmethod
    def of(cls, problem: Problem, objective: Mapping[str, np.ndarray], layers: list[str], columns: list[tuple[str, int]]) -> "_Program":
        values = np.array([objective[layer][k] for layer, k in columns], dtype=float)
        index = {layer: number for number, layer in enumerate(layers)}
        rows, limits = np.empty((len(problem.limits), len(columns))), np.empty(len(problem.limits))
        for row, (quantity, limit) in enumerate(problem.limits.items()):
            # Costs relative to each layer's cheapest choice: small numbers, which the solver's tolerances can distinguish.
            least = {layer: float(problem.costs[quantity][layer].min()) for layer in layers}
            costs = np.array([problem.costs[quantity][layer][k] - least[layer] for layer, k in columns])
            largest = float(np.abs(costs).max()) or 1.0
            rows[row], limits[row] = costs / largest, (limit - sum(least.values())) / largest
        return cls(values, np.array([index[layer] for layer, _ in columns]), rows, limits)

    def solve(self) -> tuple[np.ndarray, float] | None:
        """Return (chosen columns, proven lower bound of every scheme that is not excluded); None if no scheme is left."""
        while self.feasible:
            core = np.flatnonzero(self.reduced <= self.reach)
            everything = len(core) == len(self.values)
            constraints = [LinearConstraint(self.one_each[:, core], 1, 1)]
            if len(self.limits):
                constraints.append(LinearConstraint(self.limited[:, core], -np.inf, self.limits))
            if self.excluded:
                constraints.append(LinearConstraint(np.stack(self.excluded)[:, core], -np.inf, self.layers - 1))
            result = self._solved(self.values[core], constraints)
            if result.x is None:
                if everything:
                    return None
                self.reach = np.inf
            elif everything or result.fun <= self.relaxed + self.reach:
                outside = np.inf if everything else self.relaxed + self.reach
                return core[result.x > 0.5], min(float(result.mip_dual_bound), outside) * self.unit
            else:
                self.reach = (result.fun - self.relaxed) * (1 + 1e-9) + 1e-12  # above rounding errors
        return None

    def _solved(self, values: np.ndarray, constraints: list[LinearConstraint]) -> OptimizeResult:
        """Return the solver's result within the narrowest of GAPS that it reaches in NODES. Gaps that were too narrow are not tried
        again."""
        while True:
            last = self.gap == len(GAPS) - 1
            options = {"mip_rel_gap": GAPS[self.gap]} | ({} if last else {"node_limit": NODES})
            with without_c_output():
                result = milp(values, integrality=np.ones(len(values)), bounds=Bounds(0, 1), constraints=constraints, options=options)
            if last or result.status in SOLVED:
                return result
            self.gap += 1

    def exclude(self, chosen: np.ndarray) -> None:
        """Exclude this scheme from now on."""
        cut = np.zeros(len(self.values))
        cut[chosen] = 1
        self.excluded.append(cut)


def _undominated(problem: Problem, objective: Mapping[str, np.ndarray], layer: str) -> np.ndarray:
    """Return indices of the choices that no other beats in the objective and in every limited cost; the best scheme needs only these."""
    table = np.stack([objective[layer], *(problem.costs[quantity][layer] for quantity in problem.limits)])  # [quantities, choices]
    better_or_equal = (table[:, :, None] <= table[:, None, :]).all(0)  # [j, k]: j is nowhere above k
    better = better_or_equal & (table[:, :, None] < table[:, None, :]).any(0)
    twin_before = better_or_equal & better_or_equal.T & np.triu(np.ones_like(better), 1)  # the first of equal choices stays
    return np.flatnonzero(~(better | twin_before).any(0))


def _why_infeasible(problem: Problem) -> str:
    """Return an error message with the least of each limited quantity, the layers that need most of it, and a budget that can be met."""
    parts, enough, witness = [], [], _thrifty(problem)
    for quantity, limit in problem.limits.items():
        least = {layer: float(problem.costs[quantity][layer].min()) for layer in problem.choices}
        words, allowed = problem.in_words.get(
            quantity, (lambda amount, quantity=quantity: f"{quantity}={amount:.6g}", f"{quantity}={limit:.6g}")
        )
        if sum(least.values()) > limit:
            binding = sorted(least, key=least.__getitem__, reverse=True)[:3]
            needed = words(sum(least.values()))
            parts.append(f"The smallest scheme needs {needed}, more than the budget of {allowed} (layers {', '.join(binding)} bind).")
        amount = float(sum(problem.costs[quantity][layer][k] for layer, k in witness.items()))
        enough.append(words(amount) if amount > limit else allowed)
    if not parts:
        together = "No scheme meets all conditions of the budget together, although each alone can be met."
        return f"{together} Relax one, as in {','.join(enough)}."
    advice = "Allow lower bit-widths (--weight-bits, of 2 or more; in grow --prune), keep fewer layers, or raise the budget to"
    return f"{' '.join(parts)} {advice} {','.join(enough)}."


def _thrifty(problem: Problem) -> dict[str, int]:
    """Return the choice of each layer that needs the least of all limited quantities, each relative to its own least."""
    least = {quantity: sum(float(parts[layer].min()) for layer in parts) for quantity, parts in problem.costs.items()}
    shares = {quantity: max(amount, 1e-300) for quantity, amount in least.items() if quantity in problem.limits}
    return {
        layer: int(np.argmin(sum(problem.costs[quantity][layer] / share for quantity, share in shares.items())))
        for layer in problem.choices
    }
