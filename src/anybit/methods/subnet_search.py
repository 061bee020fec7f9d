"""The search over a supernet's schemes: a Monte-Carlo table, a score predictor, a genetic search, and a Pareto front.

    table       P(precision of a layer | average cost of the network), counted over random schemes across the whole range of averages
    predictor   a small network from a scheme's bits to its score, fitted to the evaluated schemes; its rank correlation is measured on
                schemes that each fit left out
    search      crossover and mutation by the table towards a target average, from the table's draws and the best known schemes; the
                predictor ranks them, and the best are evaluated

Source: Xu et al., IJCAI 2022 (Monte-Carlo sampling in place of uniform, a quantization-aware accuracy predictor, a genetic search).
Reconstruction: the table follows AttentiveNAS (Wang et al., CVPR 2021), with P(architecture | FLOPs) applied to bits; the sizes of the
predictor and of the search are our own.

Deviation: uniform draws concentrate at the middle average, so the schemes that the table counts are drawn with a tilt: each layer's
precision with a probability proportional to exp(t cost), with random t. Among schemes of equal total cost the draw is still uniform,
since the tilt depends on nothing else; and the ends of the range are reached.
"""

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anybit.allocation.program import allocate, make_problem
from anybit.allocation.sensitivity import SensitivityTable
from anybit.budget import QUANTITIES, Budget, Condition, Cost
from anybit.errors import InfeasibleBudget
from anybit.methods.settings import SearchSettings
from anybit.networks.cost import CostModel
from anybit.scheme import FLOAT, FLOAT_BITS, Precision, Scheme

Choices = Mapping[str, Sequence[Precision]]
Rows = NDArray[np.int64]
Floats = NDArray[np.floating]
STRATEGIES = ("monte-carlo", "uniform", "integer-program")
BINS = 24
TILTED = 20000
"""Number of schemes that the table counts."""


@dataclass(frozen=True)
class Evaluated:
    """An evaluated scheme, its score (higher is better) and its cost; `origin` names the strategy that proposed it."""

    scheme: Scheme
    score: float
    cost: float
    origin: str


@dataclass
class SearchResult:
    """A finished search: all evaluated schemes, in order, and Kendall's tau of the predictor on schemes outside of its fit."""

    evaluated: list[Evaluated]
    rank_correlation: float | None = None


# Costs


def layer_cost(costs: CostModel, quantity: str) -> Callable[[str, Precision], float]:
    """Return a function of (layer, precision) for a layer's part of the cost."""
    cost = _cost_named(quantity)
    scale = cost.scale(costs)
    return lambda name, precision: cost.layer(costs, name, precision) / scale


def total_cost(costs: CostModel, quantity: str, scheme: Scheme) -> float:
    """Return the exact total cost of a scheme."""
    return _cost_named(quantity).total(costs, scheme)


def _cost_named(quantity: str) -> Cost:
    cost = QUANTITIES[quantity]
    assert isinstance(cost, Cost)  # `SearchSettings` accepts no other
    return cost


# Schemes as rows


class SchemeSpace:
    """All schemes of a supernet, as rows of integers: entry `l` of a row is the index of layer `l`'s precision among its choices.

    `costs` (layers, options) holds the layers' parts of the cost; `low` and `high` are the smallest and largest cost of a whole scheme.
    """

    def __init__(self, choices: Choices, cost: Callable[[str, Precision], float]):
        self.choices = {name: tuple(options) for name, options in choices.items()}
        self.names = list(self.choices)
        self.sizes = np.array([len(options) for options in self.choices.values()])
        self.costs = np.zeros((len(self.names), self.sizes.max()))  # zero beyond a layer's own options, which no row refers to
        for layer, (name, options) in enumerate(self.choices.items()):
            self.costs[layer, : len(options)] = [cost(name, precision) for precision in options]
        self.layers = np.arange(len(self.names))
        parts = [self.costs[layer, :size] for layer, size in enumerate(self.sizes)]
        self.low, self.high = (float(sum(end(part) for part in parts)) for end in (min, max))
        self.widest = max(float(part.max() - part.min()) for part in parts) or 1.0

    def cost(self, rows: Rows) -> Floats:
        """Return the cost of each row, as the sum of its layers' parts."""
        return self.costs[self.layers, rows].sum(1)

    def rows(self, schemes: Iterable[Scheme]) -> Rows:
        indices = [[options.index(scheme[name]) for name, options in self.choices.items()] for scheme in schemes]
        return np.array(indices, dtype=np.int64).reshape(-1, len(self.names))

    def scheme(self, row: Rows) -> Scheme:
        return Scheme({name: options[index] for (name, options), index in zip(self.choices.items(), row.tolist(), strict=True)})


def _distinct(rows: Rows) -> Rows:
    """Return each row once, in the order of first occurrence."""
    return rows[np.sort(np.unique(rows, axis=0, return_index=True)[1])]


# Drawing


class UniformDraws:
    """Draws each layer's precision uniformly, whatever the target cost."""

    def __init__(self, space: SchemeSpace):
        self.space = space

    def sample(self, target: float, count: int, generator: np.random.Generator) -> Rows:
        return (generator.random((count, len(self.space.names))) * self.space.sizes).astype(np.int64)

    draw = sample


class MonteCarloTable:
    """Draws from P(precision of a layer | cost of the network); `counts` (layers, bins of cost, options) estimate it."""

    def __init__(self, space: SchemeSpace, generator: np.random.Generator):
        self.space = space
        # Layers differ in size a hundredfold, and so do the tilts that empty or fill the largest and the smallest.
        signs = np.where(generator.random(TILTED) < 0.5, -1, 1)
        tilts = signs * 10 ** (4 * generator.random(TILTED) - 1) / space.widest
        rows = np.empty((TILTED, len(space.names)), dtype=np.int64)
        for layer, size in enumerate(space.sizes):
            logits = tilts[:, None] * space.costs[layer, :size]
            cumulative = np.exp(logits - logits.max(1, keepdims=True)).cumsum(1)
            rows[:, layer] = _indices(cumulative, generator.random(TILTED), size)
        self.counts = np.zeros((len(space.names), BINS, space.sizes.max()))
        for layer, size in enumerate(space.sizes):
            self.counts[layer, :, :size] = 1e-3  # keep every option possible in every bin
        np.add.at(self.counts, (space.layers, self.bin(space.cost(rows))[:, None], rows), 1)
        self.cumulative = self.counts.cumsum(2)

    def bin(self, cost: Floats | float) -> Rows:
        """Return the bin, or bins, of a cost."""
        place = BINS * (np.asarray(cost) - self.space.low) / ((self.space.high - self.space.low) or 1.0)
        return np.clip(place, 0, BINS - 1).astype(np.int64)

    def sample(self, target: float, count: int, generator: np.random.Generator) -> Rows:
        """Draw rows from the distributions at this cost, each layer independently."""
        return _indices(self.cumulative[:, self.bin(target)], generator.random((count, len(self.space.names))), self.space.sizes)

    def draw(self, target: float, count: int, generator: np.random.Generator) -> Rows:
        """Draw rows near this cost, each the nearest of several samples."""
        drawn = self.sample(target, 8 * count, generator)
        nearest = np.abs(self.space.cost(drawn) - target).reshape(count, 8).argmin(1)
        return drawn.reshape(count, 8, -1)[np.arange(count), nearest]


def _indices(cumulative: Floats, uniform: Floats, sizes: Rows | int) -> Rows:
    """Return the indices below `sizes` that uniform numbers in [0, 1) select from unnormalised cumulative weights (last dimension)."""
    picked = (uniform[..., None] * cumulative[..., -1:] >= cumulative).sum(-1)
    return np.minimum(picked, np.asarray(sizes) - 1)  # the product can round up to the total weight


# Predicting


class Predictor:
    """Small networks from a scheme to its score. Their inputs are the bits of each layer, one-hot, and the rounding noise 4^-b.

    `fitted` (networks, schemes) says which schemes each is fitted to; by default there is one network, fitted to all. All train together,
    from one start, each as if alone: with batches this small, calls take most of the time.
    """

    def __init__(self, space: SchemeSpace, rows: Rows, scores: Sequence[float], seed: int, fitted: NDArray[np.bool_] | None = None):
        self.features = _features(space)
        shares = torch.ones(1, len(rows)) if fitted is None else torch.from_numpy(fitted).float()
        shares /= shares.sum(1, keepdim=True)
        measured = torch.tensor(scores, dtype=torch.float32)
        self.mean = (shares @ measured)[:, None]
        deviation = (shares * (measured - self.mean).square()).sum(1, keepdim=True).sqrt()
        self.deviation = torch.where(deviation > 0, deviation, 1.0)
        x, y = self._inputs(rows), (measured - self.mean) / self.deviation
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = [_linears(len(shares), *sizes) for sizes in pairwise((x.shape[1], 64, 64, 1))]
        optimizer = torch.optim.AdamW([tensor for layer in self.layers for tensor in layer], lr=3e-3, weight_decay=0.1, fused=True)
        for _ in range(300):
            optimizer.zero_grad()
            (nn.functional.smooth_l1_loss(self._forward(x), y, reduction="none") * shares).sum().backward()
            optimizer.step()

    def _inputs(self, rows: Rows) -> Tensor:
        return torch.cat([table[rows[:, layer]] for layer, table in self.features.items()], 1)

    def _forward(self, x: Tensor) -> Tensor:
        (weight, bias), *deeper = self.layers
        x = torch.baddbmm(bias, x.expand(len(weight), -1, -1), weight)
        for weight, bias in deeper:
            x = torch.baddbmm(bias, nn.functional.gelu(x), weight)
        return x[..., 0]

    @torch.no_grad()
    def scores(self, rows: Rows) -> Floats:
        """Return each network's prediction for each row, (networks, rows)."""
        return (self._forward(self._inputs(rows)) * self.deviation + self.mean).numpy()


def _linears(count: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Return the weights (count, inputs, outputs) and biases (count, 1, outputs) of `count` linear layers with the same random start."""
    layer = nn.Linear(inputs, outputs).requires_grad_(False)
    weight, bias = layer.weight.T.repeat(count, 1, 1), layer.bias.repeat(count, 1, 1)
    return weight.requires_grad_(), bias.requires_grad_()


def _features(space: SchemeSpace) -> dict[int, Tensor]:
    """Return the predictor's features of each layer with a choice: (options, features)."""
    open_layers = {layer: options for layer, options in enumerate(space.choices.values()) if len(options) > 1}
    widths = sorted({bits for options in open_layers.values() for precision in options for bits in _widths(precision)})

    def seen(precision: Precision) -> list[float]:
        bits = _widths(precision)
        return [float(b == width) for b in bits for width in widths] + [16 * 4.0**-b for b in bits]

    return {layer: torch.tensor([seen(precision) for precision in options]) for layer, options in open_layers.items()}


def _widths(precision: Precision) -> tuple[int, int]:
    return precision.stored_weight_bits, precision.activation_bits or FLOAT_BITS


def rank_correlation(space: SchemeSpace, evaluated: Sequence[Evaluated], seed: int, folds: int = 5) -> float | None:
    """Return Kendall's tau of predicted and measured scores, each scheme predicted by a fit that left its fold out.

    None if there are too few schemes.
    """
    from scipy.stats import kendalltau  # slow to import for every command

    if len(evaluated) < 2 * folds:
        return None
    order = list(range(len(evaluated)))
    random.Random(seed).shuffle(order)
    fold_of = np.empty(len(evaluated), dtype=np.int64)
    fold_of[order] = np.arange(len(evaluated)) % folds
    rows, scores = space.rows(one.scheme for one in evaluated), [one.score for one in evaluated]
    predictor = Predictor(space, rows, scores, seed, fitted=np.arange(folds)[:, None] != fold_of)
    predicted = predictor.scores(rows)[fold_of, np.arange(len(evaluated))]
    return float(kendalltau(predicted, scores).statistic)


# Searching


def genetic(
    draws: UniformDraws | MonteCarloTable,
    predictor: Predictor,
    target: float,
    start: Rows,
    settings: SearchSettings,
    generator: np.random.Generator,
) -> Rows:
    """Return schemes of at most the target cost, by falling predicted score."""
    space, size = draws.space, settings.population
    population = np.concatenate([start[space.cost(start) <= target], draws.draw(target, size, generator)])
    ranked = population[:0]
    for _ in range(settings.generations):
        population = _distinct(np.concatenate([ranked, population]))
        cost = space.cost(population)
        fits = population[cost <= target]
        if not len(fits):  # every draw exceeds the target
            fits = population[np.argsort(cost, kind="stable")[: size // 4]]
        ranked = fits[np.argsort(-predictor.scores(fits)[0], kind="stable")][: size // 2]
        mothers, fathers = (ranked[(generator.random(size) * len(ranked)).astype(np.int64)] for _ in range(2))
        children = np.where(generator.random(mothers.shape) < 0.5, mothers, fathers)
        mutated = generator.random(children.shape) < settings.mutation
        population = np.where(mutated, draws.sample(target, size, generator), children)
    return ranked[space.cost(ranked) <= target]


def search_subnets(
    choices: Choices, costs: CostModel, evaluate: Callable[[Scheme], float], settings: SearchSettings, always: Sequence[Scheme] = ()
) -> SearchResult:
    """Spend `settings.evaluations` calls of `evaluate` (a scheme's score, higher is better) on schemes along the whole range of costs.

    `always` are evaluated first, for example the uniform schemes.
    """
    result = SearchResult([])
    scores: dict[Scheme, float] = {}

    def try_scheme(scheme: Scheme, origin: str) -> None:
        if scheme not in scores and len(scores) < settings.evaluations:
            scores[scheme] = evaluate(scheme)
            result.evaluated.append(Evaluated(scheme, scores[scheme], total_cost(costs, settings.quantity, scheme), origin))

    for scheme in always:
        try_scheme(scheme, "uniform")
    if settings.strategy == "integer-program":
        _by_program(choices, costs, settings, try_scheme, scores)
        return result
    space, generator = SchemeSpace(choices, layer_cost(costs, settings.quantity)), np.random.default_rng(settings.seed)
    draws = MonteCarloTable(space, generator) if settings.strategy == "monte-carlo" else UniformDraws(space)
    explored, attempts = max(len(scores) + 4, int(settings.explored * settings.evaluations)), 0
    while len(scores) < min(explored, settings.evaluations) and attempts < 20 * explored:
        target = space.low + generator.random() * (space.high - space.low)
        try_scheme(space.scheme(draws.draw(target, 1, generator)[0]), "drawn")
        attempts += 1
    targets = space.low + (np.arange(settings.targets) + 0.5) / settings.targets * (space.high - space.low)
    for left in range(settings.rounds, 0, -1):
        room = math.ceil((settings.evaluations - len(scores)) / left)
        if not room or (space.sizes == 1).all():
            break
        until, each = len(scores) + room, math.ceil(room / len(targets))
        predictor = Predictor(space, space.rows(scores), list(scores.values()), settings.seed)
        known = space.rows(one.scheme for one in pareto_front(result.evaluated))
        for target in generator.permutation(targets):
            if len(scores) >= until:
                break
            best = genetic(draws, predictor, target, known, settings, generator)
            fresh = (scheme for scheme in map(space.scheme, best) if scheme not in scores)
            for scheme in list(islice(fresh, min(each, until - len(scores)))):
                try_scheme(scheme, "searched")
    drawn = [one for one in result.evaluated if one.origin != "searched"]
    result.rank_correlation = rank_correlation(space, drawn, settings.seed)
    return result


def _by_program(
    choices: Choices,
    costs: CostModel,
    settings: SearchSettings,
    try_scheme: Callable[[Scheme, str], None],
    scores: Mapping[Scheme, float],
) -> None:
    """Evaluate the sensitivities of single layers, lowest bits first, then the schemes that an integer program chooses from them.

    Weights and inputs are measured separately, with two thirds of the evaluations; a row that is not measured follows from the widest one
    that is, scaled by the noise of rounding, 4^-b.
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
    for pieces in (left + 1, 2 * left + 1, 4 * left + 1, 8 * left + 1):  # neighbouring budgets often share a solution, so refine them
        for index in range(1, pieces):
            if len(scores) >= settings.evaluations:
                return
            limit = limits[0] + index / pieces * (limits[1] - limits[0])
            budget = Budget(f"{settings.quantity} {limit:g}", (Condition(settings.quantity, limit),))
            with suppress(InfeasibleBudget):
                try_scheme(allocate(make_problem(choices, table, costs, budget)).scheme, "allocated")


def _completed(choices: Choices, highest: Scheme, measured: Mapping[tuple[str, Precision], float]) -> dict[tuple[str, Precision], float]:
    """Return every layer's rows, separately for W and A: measured, zero at the highest bits, else scaled by 4^-b from the nearest
    measured."""
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
    """Return the schemes that no other beats at equal or lower cost, by rising cost."""
    front: list[Evaluated] = []
    for one in sorted(evaluated, key=lambda e: (e.cost, -e.score)):
        if not front or one.score > front[-1].score:
            front.append(one)
    return front


def hypervolume(front: Sequence[Evaluated], cost: float, score: float) -> float:
    """Return the area that the front dominates, above `score` and left of `cost`, the reference corner."""
    area, right = 0.0, cost
    for one in sorted(front, key=lambda e: -e.cost):
        if one.cost < right and one.score > score:
            area += (right - one.cost) * (one.score - score)
            right = one.cost
    return area
