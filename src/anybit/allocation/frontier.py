"""The Pareto frontier of all budgets, from the sensitivity table alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from anybit.scheme import Precision, Scheme


@dataclass(frozen=True)
class Step:
    """One step up the frontier: `layer` changes to `precision`; `cost` and `loss` are the whole scheme's after it; `price` is the loss
    saved per unit of cost, the shadow price of a budget that ends here."""

    layer: str
    precision: Precision
    cost: float
    loss: float
    price: float


@dataclass(frozen=True)
class Frontier:
    """The lower convex hull of all schemes over one cost: the cheapest scheme (with ties, the one of least loss) and the steps up from it,
    with falling prices. After each step the scheme is the best at its cost; between two steps, another may be slightly better."""

    start: Scheme
    cost: float
    loss: float
    steps: tuple[Step, ...]

    def scheme(self, steps: int) -> Scheme:
        """Return the scheme after this many steps."""
        return Scheme({**self.start, **{step.layer: step.precision for step in self.steps[:steps]}})

    def within(self, limit: float) -> int | None:
        """Return the number of steps within a limit on the cost; None if even the start exceeds it."""
        return None if self.cost > limit else sum(step.cost <= limit for step in self.steps)


def frontier(choices: Mapping[str, Sequence[Precision]], losses: Mapping[str, np.ndarray], costs: Mapping[str, np.ndarray]) -> Frontier:
    """Return the best schemes over one cost, without a solver: each layer's own convex hull, their steps merged by loss saved per cost.

    With I relaxed to [0, 1] and one limit, this is the exact solution at every limit. Source: Sinha and Zoltners, "The multiple-choice
    knapsack problem", 1979. With ties, the earlier layer and the earlier choice come first.
    """
    hulls = {layer: _hull(losses[layer], costs[layer]) for layer in choices}
    moves = [(price, layer, k) for layer, hull in hulls.items() for k, price in hull[1:]]
    moves.sort(key=lambda move: -move[0])  # stable, and prices fall within a layer: each layer's steps stay in order
    taken = {layer: hull[0][0] for layer, hull in hulls.items()}
    start = Scheme({layer: choices[layer][k] for layer, k in taken.items()})
    cost, loss = (math.fsum(table[layer][k] for layer, k in taken.items()) for table in (costs, losses))
    begin, steps = (cost, loss), []
    for price, layer, k in moves:
        cost += float(costs[layer][k] - costs[layer][taken[layer]])
        loss += float(losses[layer][k] - losses[layer][taken[layer]])
        taken[layer] = k
        steps.append(Step(layer, choices[layer][k], cost, loss, price))
    return Frontier(start, *begin, tuple(steps))


def _hull(losses: np.ndarray, costs: np.ndarray) -> list[tuple[int, float]]:
    """Return (index of a choice, loss saved per cost since the previous one) from the cheapest choice on, with falling positive savings."""
    hull: list[tuple[int, float]] = []
    for k in map(int, np.lexsort((losses, costs))):
        if hull and not losses[k] < losses[hull[-1][0]]:
            continue
        while len(hull) > 1 and hull[-1][1] <= _price(losses, costs, hull[-2][0], k):
            hull.pop()
        hull.append((k, _price(losses, costs, hull[-1][0], k) if hull else math.inf))
    return hull


def _price(losses: np.ndarray, costs: np.ndarray, one: int, other: int) -> float:
    return float((losses[one] - losses[other]) / (costs[other] - costs[one]))
