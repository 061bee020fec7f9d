"""The search over a supernet's schemes: a Monte-Carlo table, a predictor of the score, a genetic search, and a Pareto front.

    table       P(precision of a layer | average cost of the network), counted over random schemes that fill the whole range of averages
    predictor   a small network from a scheme's bits to its score, fitted to the schemes that were evaluated; its rank correlation is
                measured on schemes that each fit left out
    search      from the table's draws and the best schemes known, crossover and mutation by the table towards a target average; the
                predictor judges, and its favourites are evaluated

Source: Xu et al., IJCAI 2022 (Monte-Carlo sampling in place of uniform, a quantization-aware accuracy predictor, a genetic search).
Reconstruction: the table after AttentiveNAS (Wang et al., CVPR 2021), whose P(architecture | FLOPs) it carries to bits; sizes of the
predictor and of the search are our own.

Deviation: uniform draws pile up at the middle average, so the schemes that the table counts are drawn with a tilt, each layer's precision
with a probability proportional to exp(t cost), t itself drawn at random. Among schemes of one total cost that is still uniform, since
the tilt depends on nothing else; and the ends of the range are reached.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anybit.allocation.program import allocate, make_problem
from anybit.allocation.sensitivity import SensitivityTable
from anybit.budget import Budget
from anybit.errors import InfeasibleBudget, InvalidSetting
from anybit.networks.cost import CostModel
from anybit.scheme import FLOAT, FLOAT_BITS, Precision, Scheme

Choices = Mapping[str, Sequence[Precision]]
STRATEGIES = ("monte-carlo", "uniform", "integer-program")
BINS = 24
TILTED = 20000
"""Schemes that the table counts."""


@dataclass(frozen=True)
class SearchSettings:
    """evaluations   subnets that are evaluated
    strategy      "monte-carlo", "uniform" draws with the same predictor and search, or "integer-program" on measured sensitivities
    quantity      the cost that the front trades against the score: "bits", "bytes" or "bops"
    explored      share of the evaluations that the predictor is first fitted to
    rounds        how often the rest is spent: predict, search, evaluate the favourites
    targets       averages that are searched for in a round
    population, generations, mutation   of the genetic search
    """

    evaluations: int = 150
    strategy: str = "monte-carlo"
    quantity: str = "bits"
    seed: int = 0
    explored: float = 0.6
    rounds: int = 3
    targets: int = 20
    population: int = 100
    generations: int = 30
    mutation: float = 0.1

    def __post_init__(self):
        for name, allowed in (("strategy", STRATEGIES), ("quantity", ("bits", "bytes", "bops"))):
            if getattr(self, name) not in allowed:
                raise InvalidSetting(f"{name} {getattr(self, name)!r} is unknown. Choose from {', '.join(allowed)}.")
        for name, least in (("evaluations", 10), ("rounds", 1), ("targets", 1), ("population", 4), ("generations", 1)):
            if getattr(self, name) < least:
                raise InvalidSetting(f"{name} {getattr(self, name)} must be at least {least}.")
        if not 0 < self.explored < 1 or not 0 < self.mutation <= 1:
            raise InvalidSetting("explored must be between 0 and 1, mutation above 0 and at most 1.")


@dataclass(frozen=True)
class Evaluated:
    """A scheme, its score (higher is better) and its cost; `origin` says what proposed it."""

    scheme: Scheme
    score: float
    cost: float
    origin: str


@dataclass
class Found:
    """All that was evaluated, in order, and how well the predictor ranks schemes that it was not fitted to (Kendall; None without one)."""

    evaluated: list[Evaluated]
    rank_correlation: float | None = None


# Costs


def layer_cost(costs: CostModel, quantity: str) -> Callable[[str, Precision], float]:
    """A layer's part of the cost at a precision."""
    if quantity == "bops":
        return lambda name, precision: float(costs.layer_bops(name, precision))
    if quantity == "bytes":
        return lambda name, precision: float(costs.layer_bytes(name, precision))
    total = sum(size.weights for size in costs.layers.values())
    return lambda name, precision: costs.layers[name].weights * precision.stored_weight_bits / total


def total_cost(costs: CostModel, quantity: str, scheme: Scheme) -> float:
    """The exact cost of a scheme, all in."""
    return {"bits": costs.weight_bits, "bytes": costs.file_size, "bops": costs.bops}[quantity](scheme)


# Drawing


class UniformDraws:
    """Each layer's precision drawn uniformly, whatever average was asked for."""

    def __init__(self, choices: Choices):
        self.choices = choices

    def draw(self, target: float, generator: random.Random) -> Scheme:
        return Scheme({name: generator.choice(options) for name, options in self.choices.items()})

    def layer(self, name: str, target: float, generator: random.Random) -> Precision:
        return generator.choice(self.choices[name])


class MonteCarloTable:
    """P(precision of a layer | average cost), by counting; `low` and `high` are the ends of the range of costs."""

    def __init__(self, choices: Choices, cost: Callable[[str, Precision], float], generator: random.Random):
        self.choices, self.cost = choices, cost
        part = {name: [cost(name, precision) for precision in options] for name, options in choices.items()}
        self.low, self.high = (sum(end(row) for row in part.values()) for end in (min, max))
        span = max((max(row) - min(row) for row in part.values()), default=0.0) or 1.0
        self.counts = {name: [[1e-3] * len(options) for _ in range(BINS)] for name, options in choices.items()}
        for _ in range(TILTED):
            # Layers differ in size a hundredfold: the tilts that empty or fill the largest and the smallest lie as far apart.
            tilt = generator.choice((-1, 1)) * 10 ** generator.uniform(-1, 3) / span
            drawn = {name: _tilted(row, tilt, generator) for name, row in part.items()}
            place = self.bin(sum(part[name][index] for name, index in drawn.items()))
            for name, index in drawn.items():
                self.counts[name][place][index] += 1

    def bin(self, cost: float) -> int:
        return min(BINS - 1, max(0, int(BINS * (cost - self.low) / ((self.high - self.low) or 1.0))))

    def layer(self, name: str, target: float, generator: random.Random) -> Precision:
        """A layer's precision, drawn for this average."""
        return generator.choices(self.choices[name], self.counts[name][self.bin(target)])[0]

    def draw(self, target: float, generator: random.Random) -> Scheme:
        """A scheme drawn for this average: of several, the nearest to it."""
        drawn = [Scheme({name: self.layer(name, target, generator) for name in self.choices}) for _ in range(8)]
        return min(drawn, key=lambda scheme: abs(sum(self.cost(name, p) for name, p in scheme.items()) - target))


def _tilted(row: Sequence[float], tilt: float, generator: random.Random) -> int:
    """An index with a probability proportional to exp(tilt cost)."""
    highest = max(tilt * cost for cost in row)
    return generator.choices(range(len(row)), [math.exp(tilt * cost - highest) for cost in row])[0]


# Predicting


class Predictor:
    """A small network from a scheme to its score. What it sees of a layer: its bits one-hot, and the rounding noise 4^-b that they make."""

    def __init__(self, choices: Choices, evaluated: Sequence[Evaluated], seed: int):
        self.names = [name for name, options in choices.items() if len(options) > 1]
        self.widths = sorted({bits for name in self.names for p in choices[name] for bits in _widths(p)})
        scores = torch.tensor([one.score for one in evaluated])
        self.mean, self.deviation = float(scores.mean()), float(scores.std(correction=0)) or 1.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            x, y = self.features([one.scheme for one in evaluated]), (scores - self.mean) / self.deviation
            self.network = nn.Sequential(nn.Linear(x.shape[1], 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
            optimizer = torch.optim.AdamW(self.network.parameters(), lr=3e-3, weight_decay=0.1)
            for _ in range(300):
                optimizer.zero_grad()
                nn.functional.smooth_l1_loss(self.network(x)[:, 0], y).backward()
                optimizer.step()

    def features(self, schemes: Sequence[Scheme]) -> Tensor:
        rows = []
        for scheme in schemes:
            bits = [width for name in self.names for width in _widths(scheme[name])]
            rows.append([float(b == width) for b in bits for width in self.widths] + [16 * 4.0**-b for b in bits])
        return torch.tensor(rows)

    @torch.no_grad()
    def scores(self, schemes: Sequence[Scheme]) -> list[float]:
        return (self.network(self.features(schemes))[:, 0] * self.deviation + self.mean).tolist()


def _widths(precision: Precision) -> tuple[int, int]:
    return precision.stored_weight_bits, precision.activation_bits or FLOAT_BITS


def rank_correlation(choices: Choices, evaluated: Sequence[Evaluated], seed: int, folds: int = 5) -> float | None:
    """Kendall's tau of predicted and measured scores, each scheme predicted by a fit that left its fold out; None of too few schemes."""
    if len(evaluated) < 2 * folds:
        return None
    order = list(range(len(evaluated)))
    random.Random(seed).shuffle(order)
    predicted = [0.0] * len(evaluated)
    for fold in range(folds):
        out = order[fold::folds]
        left = set(out)
        fitted = Predictor(choices, [one for index, one in enumerate(evaluated) if index not in left], seed)
        for index, score in zip(out, fitted.scores([evaluated[index].scheme for index in out]), strict=True):
            predicted[index] = score
    from scipy.stats import kendalltau  # takes a second, and all roads import the settings that are here

    return float(kendalltau(predicted, [one.score for one in evaluated]).statistic)


# Searching


def genetic(
    draws: UniformDraws | MonteCarloTable,
    predictor: Predictor,
    cost: Callable[[Scheme], float],
    target: float,
    start: Sequence[Scheme],
    settings: SearchSettings,
    generator: random.Random,
) -> list[Scheme]:
    """Schemes of at most the target cost, the best predicted first."""
    fits = [scheme for scheme in start if cost(scheme) <= target]
    population = list(dict.fromkeys([*fits, *(draws.draw(target, generator) for _ in range(settings.population))]))
    names = list(draws.choices)
    ranked: list[Scheme] = []
    for _ in range(settings.generations):
        allowed = [scheme for scheme in dict.fromkeys([*ranked, *population]) if cost(scheme) <= target]
        if not allowed:  # every draw was too large
            allowed = sorted(population, key=cost)[: settings.population // 4]
        scores = predictor.scores(allowed)
        ranked = [scheme for _, _, scheme in sorted(zip(scores, range(len(allowed)), allowed, strict=True), reverse=True)]
        ranked = ranked[: settings.population // 2]
        population = []
        while len(population) < settings.population:
            mother, father = generator.choice(ranked), generator.choice(ranked)
            child = {name: (mother if generator.random() < 0.5 else father)[name] for name in names}
            for name in names:
                if generator.random() < settings.mutation:
                    child[name] = draws.layer(name, target, generator)
            population.append(Scheme(child))
    return [scheme for scheme in ranked if cost(scheme) <= target]


def search_subnets(
    choices: Choices, costs: CostModel, evaluate: Callable[[Scheme], float], settings: SearchSettings, always: Sequence[Scheme] = ()
) -> Found:
    """Spend `settings.evaluations` calls of `evaluate` (a scheme's score, higher is better) on schemes along the whole range of costs.

    `always` are evaluated first: the uniform schemes, say.
    """
    generator = random.Random(settings.seed)
    found = Found([])
    scores: dict[Scheme, float] = {}

    def try_scheme(scheme: Scheme, origin: str) -> None:
        if scheme not in scores and len(scores) < settings.evaluations:
            scores[scheme] = evaluate(scheme)
            found.evaluated.append(Evaluated(scheme, scores[scheme], total_cost(costs, settings.quantity, scheme), origin))

    for scheme in always:
        try_scheme(scheme, "uniform")
    if settings.strategy == "integer-program":
        _by_program(choices, costs, settings, try_scheme, scores)
        return found
    part = layer_cost(costs, settings.quantity)
    table = MonteCarloTable(choices, part, generator)
    draws = table if settings.strategy == "monte-carlo" else UniformDraws(choices)
    ends = [table.low + (index + 0.5) / settings.targets * (table.high - table.low) for index in range(settings.targets)]
    explored, attempts = max(len(scores) + 4, int(settings.explored * settings.evaluations)), 0
    while len(scores) < min(explored, settings.evaluations) and attempts < 20 * explored:
        try_scheme(draws.draw(generator.uniform(table.low, table.high), generator), "drawn")
        attempts += 1

    def cost(scheme: Scheme) -> float:
        return sum(part(name, precision) for name, precision in scheme.items())

    for left in range(settings.rounds, 0, -1):
        room = math.ceil((settings.evaluations - len(scores)) / left)
        if not room or all(len(options) == 1 for options in choices.values()):
            break
        until, each = len(scores) + room, math.ceil(room / len(ends))
        predictor = Predictor(choices, found.evaluated, settings.seed)
        known = [one.scheme for one in pareto_front(found.evaluated)]
        for target in generator.sample(ends, len(ends)):
            if len(scores) >= until:
                break
            best = [scheme for scheme in genetic(draws, predictor, cost, target, known, settings, generator) if scheme not in scores]
            for scheme in best[: min(each, until - len(scores))]:
                try_scheme(scheme, "searched")
    drawn = [one for one in found.evaluated if one.origin != "searched"]
    found.rank_correlation = rank_correlation(choices, drawn, settings.seed)
    return found


def _by_program(
    choices: Choices,
    costs: CostModel,
    settings: SearchSettings,
    try_scheme: Callable[[Scheme, str], None],
    scores: Mapping[Scheme, float],
) -> None:
    """Sensitivities of single layers, lowest bits first, then the schemes that an integer program makes of them, evaluated.

    Weights and inputs are measured apart, at two thirds of the evaluations; rows that are not measured follow from the widest that is by
    the noise of rounding, 4^-b.
    """
    lowest, highest = (Scheme({name: end(options, key=_widths) for name, options in choices.items()}) for end in (min, max))
    measured: dict[tuple[str, Precision], float] = {}
    try_scheme(highest, "sensitivity")
    rows = []
    for name, options in choices.items():
        top = highest[name]
        rows += [
            (p.stored_weight_bits, name, p, Precision(p.weight_bits, None))
            for p in options
            if p.activation_bits == top.activation_bits and p != top
        ]
        rows += [
            (p.activation_bits or FLOAT_BITS, name, p, Precision(None, p.activation_bits))
            for p in options if p.weight_bits == top.weight_bits and p != top
        ]  # fmt: skip
    room = max(1, int(2 / 3 * settings.evaluations) - len(scores))
    for _, name, precision, row in sorted(rows, key=lambda one: one[0])[:room]:
        scheme = highest.replace({name: precision})
        try_scheme(scheme, "sensitivity")
        measured[name, row] = scores[highest] - scores[scheme]
    table = SensitivityTable(_completed(choices, highest, measured), FLOAT, 0)
    limits = [total_cost(costs, settings.quantity, scheme) for scheme in (lowest, highest)]
    left = settings.evaluations - len(scores)
    for pieces in (left + 1, 2 * left + 1, 4 * left + 1, 8 * left + 1):  # neighbouring budgets often have one solution: then finer ones
        for index in range(1, pieces):
            if len(scores) >= settings.evaluations:
                return
            limit = limits[0] + index / pieces * (limits[1] - limits[0])
            text = {"bits": f"{limit:.6f}bit", "bytes": f"{math.floor(limit)}B", "bops": f"bops={limit:.0f}"}[settings.quantity]
            with suppress(InfeasibleBudget):
                try_scheme(allocate(make_problem(choices, table, costs, Budget.parse(text))).scheme, "allocated")


def _completed(choices: Choices, highest: Scheme, measured: Mapping[tuple[str, Precision], float]) -> dict[tuple[str, Precision], float]:
    """Every layer's rows, W and A apart: as measured, none at the highest bits, else scaled by 4^-b from the nearest that was measured."""
    rows: dict[tuple[str, Precision], float] = {}
    for name, options in choices.items():
        for pick, make in ((_weights, lambda b: Precision(b, None)), (_inputs, lambda b: Precision(None, b))):
            top = pick(highest[name])
            for bits in {pick(p) for p in options}:
                near = [b for b in {pick(p) for p in options} if b is not None and (name, make(b)) in measured]
                if (name, make(bits)) in measured:
                    rows[name, make(bits)] = max(0.0, measured[name, make(bits)])
                elif bits == top or not near or bits is None:
                    rows[name, make(bits)] = 0.0
                else:
                    rows[name, make(bits)] = max(0.0, measured[name, make(max(near))]) * 4.0 ** (max(near) - bits)
    return rows


def _weights(precision: Precision) -> int | None:
    return precision.weight_bits


def _inputs(precision: Precision) -> int | None:
    return precision.activation_bits


# The front


def pareto_front(evaluated: Sequence[Evaluated]) -> list[Evaluated]:
    """Those that no other beats at the same cost or less, by rising cost."""
    front: list[Evaluated] = []
    for one in sorted(evaluated, key=lambda e: (e.cost, -e.score)):
        if not front or one.score > front[-1].score:
            front.append(one)
    return front


def hypervolume(front: Sequence[Evaluated], cost: float, score: float) -> float:
    """Area that the front dominates, above `score` and left of `cost`, the corner that counts as nothing."""
    area, right = 0.0, cost
    for one in sorted(front, key=lambda e: -e.cost):
        if one.cost < right and one.score > score:
            area += (right - one.cost) * (one.score - score)
            right = one.cost
    return area
