"""The search, on scores that are known."""

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Residual, make, pictures

from anybit.data.batches import Batch
from anybit.methods.subnet_search import (
    BINS,
    Evaluated,
    MonteCarloTable,
    Predictor,
    SearchSettings,
    UniformDraws,
    hypervolume,
    layer_cost,
    pareto_front,
    rank_correlation,
    search_subnets,
    total_cost,
)
from anybit.networks.observed import observe_network
from anybit.roads.settings import CalibrateSettings
from anybit.scheme import Precision, Scheme

BITS = (2, 3, 4, 6, 8)


def network():
    wanted = CalibrateSettings(weight_bits=BITS, activation_bits=(4, 8))
    return observe_network(make(Residual), Batch(pictures(2)), wanted.options)


NETWORK = network()
WEIGHT = {name: 1.0 + 3 * (index % 3) for index, name in enumerate(NETWORK.names)}


def noise(scheme):
    """A score that falls with the noise of rounding, in some layers more than in others."""
    return 100 - sum(WEIGHT[name] * (4.0**-p.weight_bits + 4.0**-p.activation_bits) for name, p in scheme.items()) * 40


def evaluated(schemes):
    return [Evaluated(scheme, noise(scheme), total_cost(NETWORK.costs, "bits", scheme), "drawn") for scheme in schemes]


@pytest.mark.parametrize("quantity", ["bits", "bops"])
def test_a_layers_costs_sum_to_the_whole(quantity):
    part, generator = layer_cost(NETWORK.costs, quantity), random.Random(0)
    scheme = UniformDraws(NETWORK.choices).draw(0, generator)
    assert sum(part(name, p) for name, p in scheme.items()) == pytest.approx(total_cost(NETWORK.costs, quantity, scheme))


def test_the_table_draws_where_it_is_asked_to_and_fills_the_range():
    part, generator = layer_cost(NETWORK.costs, "bits"), random.Random(0)
    table = MonteCarloTable(NETWORK.choices, part, generator)
    assert (table.low, table.high) == (2, 8)
    uniform = UniformDraws(NETWORK.choices)

    def bins(draws):
        targets = [2 + 6 * (index + 0.5) / BINS for index in range(BINS) for _ in range(10)]
        return Counter(table.bin(total_cost(NETWORK.costs, "bits", draws.draw(target, generator))) for target in targets)

    assert len(bins(table)) == BINS > len(bins(uniform))
    for target in (2.3, 3.0, 5.0, 7.7):
        drawn = [total_cost(NETWORK.costs, "bits", table.draw(target, generator)) for _ in range(20)]
        assert abs(sum(drawn) / 20 - target) < 0.3


def test_the_table_counts_what_is_uniform_among_schemes_of_one_cost():
    """Two equal layers at an average in the middle: by symmetry both have the same distribution, and it is symmetric too."""
    choices = {name: [Precision(b, 8) for b in (2, 4, 6)] for name in "ab"}
    table = MonteCarloTable(choices, lambda name, p: float(p.weight_bits), random.Random(0))
    counts = [table.counts[name][table.bin(8.0)] for name in "ab"]  # (2, 6), (4, 4), (6, 2): a third each
    for row in counts:
        assert all(0.28 < count / sum(row) < 0.39 for count in row)


def test_the_predictor_ranks_schemes_that_it_has_not_seen():
    generator, draws = random.Random(0), UniformDraws(NETWORK.choices)
    known = evaluated([draws.draw(0, generator) for _ in range(90)])
    assert rank_correlation(NETWORK.choices, known, 0) > 0.7
    again = [Predictor(NETWORK.choices, known, 0).scores([known[0].scheme]) for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.parametrize("strategy", ["monte-carlo", "uniform", "integer-program"])
def test_a_search_spends_what_it_may_and_beats_random_draws(strategy):
    calls = []

    def score(scheme):
        calls.append(scheme)
        return noise(scheme)

    wanted = SearchSettings(evaluations=80, strategy=strategy, generations=8, population=30, targets=8)
    uniform = [NETWORK.uniform(bits, 8) for bits in BITS]
    found = search_subnets(NETWORK.choices, NETWORK.costs, score, wanted, uniform)
    assert len(calls) == len(set(calls)) == len(found.evaluated) <= 80
    assert [one.scheme for one in found.evaluated[:5]] == uniform
    generator, draws = random.Random(1), UniformDraws(NETWORK.choices)
    drawn = evaluated([*uniform, *(draws.draw(0, generator) for _ in range(75))])
    areas = [hypervolume(pareto_front(some), 8.0, 60.0) for some in (found.evaluated, drawn)]
    assert areas[0] > areas[1]
    assert (found.rank_correlation is None) == (strategy == "integer-program")


def test_the_same_seed_gives_the_same_search():
    wanted = SearchSettings(evaluations=40, generations=4, population=20, targets=4)
    first, second = (search_subnets(NETWORK.choices, NETWORK.costs, noise, wanted) for _ in range(2))
    assert first == second


points = st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), min_size=1, max_size=12)


def as_evaluated(pairs):
    return [Evaluated(Scheme({str(i): Precision(2, 2)}), score, cost, "drawn") for i, (cost, score) in enumerate(pairs)]


@settings(max_examples=60, deadline=None)
@given(points)
def test_nothing_beats_the_front(pairs):
    some = as_evaluated(pairs)
    front = pareto_front(some)
    for one in some:
        assert any(best.cost <= one.cost and best.score >= one.score for best in front)
    for one in front:
        assert not any((o.cost <= one.cost and o.score > one.score) or (o.cost < one.cost and o.score >= one.score) for o in some)


@settings(max_examples=60, deadline=None)
@given(points)
def test_the_hypervolume_is_the_area_that_is_beaten(pairs):
    front = pareto_front(as_evaluated(pairs))
    steps = sorted({0.0, 10.0, *(one.cost for one in front)})
    heights = [max((one.score for one in front if one.cost <= left), default=0.0) for left in steps[:-1]]
    expected = sum((right - left) * height for (left, right), height in zip(pairwise(steps), heights, strict=True))
    assert hypervolume(front, 10.0, 0.0) == pytest.approx(expected, abs=1e-9)
