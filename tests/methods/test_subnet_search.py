"""The search, on known scores."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Residual, images, make

from anybit.data.batches import Batch
from anybit.methods.settings import SearchSettings
from anybit.methods.subnet_search import (
    BINS,
    Evaluated,
    MonteCarloTable,
    Predictor,
    SchemeSpace,
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
    settings = CalibrateSettings(weight_bits=BITS, activation_bits=(4, 8))
    return observe_network(make(Residual), Batch(images(2)), settings.options)


NETWORK = network()
WEIGHT = {name: 1.0 + 3 * (index % 3) for index, name in enumerate(NETWORK.names)}


def noise(scheme):
    """A score that falls with rounding noise, in some layers more than in others."""
    return 100 - sum(WEIGHT[name] * (4.0**-p.weight_bits + 4.0**-p.activation_bits) for name, p in scheme.items()) * 40


def space_of(quantity="bits"):
    return SchemeSpace(NETWORK.choices, layer_cost(NETWORK.costs, quantity))


def uniform_schemes(count, seed):
    """Schemes with each layer's precision drawn uniformly."""
    space = space_of()
    return list(map(space.scheme, UniformDraws(space).draw(0, count, np.random.default_rng(seed))))


def evaluated(schemes):
    return [Evaluated(scheme, noise(scheme), total_cost(NETWORK.costs, "bits", scheme), "drawn") for scheme in schemes]


@pytest.mark.parametrize("quantity", ["bits", "bops"])
def test_layer_costs_sum_to_the_total(quantity):
    part = layer_cost(NETWORK.costs, quantity)
    schemes = uniform_schemes(5, 0)
    whole = [total_cost(NETWORK.costs, quantity, scheme) for scheme in schemes]
    assert [sum(part(name, p) for name, p in scheme.items()) for scheme in schemes] == pytest.approx(whole)
    space = space_of(quantity)
    assert space.cost(space.rows(schemes)) == pytest.approx(whole)


def test_rows_and_schemes_round_trip():
    """Layers have different numbers of choices, one layer has a single choice."""
    choices = {"a": [Precision(b, 8) for b in (2, 4, 6)], "b": [Precision(3, 8)], "c": [Precision(b, 4) for b in (5, 7)]}
    space = SchemeSpace(choices, lambda name, p: float(p.weight_bits))
    assert (space.low, space.high) == (10, 16)
    for draws in (UniformDraws(space), MonteCarloTable(space, np.random.default_rng(0))):
        for sample in (draws.sample, draws.draw):
            rows = np.concatenate([sample(target, 200, np.random.default_rng(1)) for target in (10.1, 13.0, 15.9)])
            schemes = list(map(space.scheme, rows))
            assert all(scheme[name] in options for scheme in schemes for name, options in choices.items())
            assert np.array_equal(space.rows(schemes), rows) and len(set(schemes)) == 6
            assert space.cost(rows).tolist() == [sum(p.weight_bits for p in scheme.values()) for scheme in schemes]


def test_table_draws_at_the_requested_cost_and_covers_the_range():
    space, generator = space_of(), np.random.default_rng(0)
    table, uniform = MonteCarloTable(space, generator), UniformDraws(space)
    assert (space.low, space.high) == (2, 8)

    def costs(draws, target, count):
        return [total_cost(NETWORK.costs, "bits", space.scheme(row)) for row in draws.draw(target, count, generator)]

    def bins(draws):
        return Counter(int(table.bin(cost)) for index in range(BINS) for cost in costs(draws, 2 + 6 * (index + 0.5) / BINS, 10))

    assert len(bins(table)) == BINS > len(bins(uniform))
    for target in (2.3, 3.0, 5.0, 7.7):
        assert abs(sum(costs(table, target, 20)) / 20 - target) < 0.3


def test_table_draws_uniformly_among_schemes_of_equal_cost():
    """Two equal layers at the middle cost: by symmetry both have the same, symmetric distribution."""
    choices = {name: [Precision(b, 8) for b in (2, 4, 6)] for name in "ab"}
    table = MonteCarloTable(SchemeSpace(choices, lambda name, p: float(p.weight_bits)), np.random.default_rng(0))
    for row in table.counts[:, table.bin(8.0)]:  # (2, 6), (4, 4), (6, 2): a third each
        assert all(0.28 < count / sum(row) < 0.39 for count in row)


def test_predictor_ranks_unseen_schemes():
    known, space = evaluated(uniform_schemes(90, 0)), space_of()
    assert rank_correlation(space, known, 0) > 0.7
    rows, scores = space.rows(one.scheme for one in known), [one.score for one in known]
    again = [Predictor(space, rows, scores, 0).scores(rows[:1]) for _ in range(2)]
    assert again[0] == again[1]


def test_predictors_fitted_together_equal_those_fitted_alone():
    known, space = evaluated(uniform_schemes(12, 0)), space_of()
    rows, scores = space.rows(one.scheme for one in known), np.array([one.score for one in known])
    fitted = np.array([np.arange(12) < 8, np.arange(12) >= 3])
    together = Predictor(space, rows, scores, 0, fitted).scores(rows)
    alone = [Predictor(space, rows[some], scores[some], 0).scores(rows)[0] for some in fitted]
    assert together == pytest.approx(np.array(alone), abs=0.02 * scores.std())  # float rounding accumulates over 300 steps


@pytest.mark.parametrize("strategy", ["monte-carlo", "uniform", "integer-program"])
def test_search_spends_its_evaluations_and_beats_random_draws(strategy):
    calls = []

    def score(scheme):
        calls.append(scheme)
        return noise(scheme)

    settings = SearchSettings(evaluations=80, strategy=strategy, generations=8, population=30, targets=8)
    uniform = [NETWORK.uniform(bits, 8) for bits in BITS]
    result = search_subnets(NETWORK.choices, NETWORK.costs, score, settings, uniform)
    assert len(calls) == len(set(calls)) == len(result.evaluated) <= 80
    assert [one.scheme for one in result.evaluated[:5]] == uniform
    drawn = evaluated([*uniform, *uniform_schemes(75, 1)])
    areas = [hypervolume(pareto_front(some), 8.0, 60.0) for some in (result.evaluated, drawn)]
    assert areas[0] > areas[1]
    assert (result.rank_correlation is None) == (strategy == "integer-program")


def test_search_is_deterministic():
    settings = SearchSettings(evaluations=40, generations=4, population=20, targets=4)
    first, second = (search_subnets(NETWORK.choices, NETWORK.costs, noise, settings) for _ in range(2))
    assert first == second
    assert first.evaluated != search_subnets(NETWORK.choices, NETWORK.costs, noise, replace(settings, seed=1)).evaluated


points = st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), min_size=1, max_size=12)


def as_evaluated(pairs):
    return [Evaluated(Scheme({str(i): Precision(2, 2)}), score, cost, "drawn") for i, (cost, score) in enumerate(pairs)]


@settings(max_examples=60, deadline=None)
@given(points)
def test_no_scheme_dominates_the_front(pairs):
    some = as_evaluated(pairs)
    front = pareto_front(some)
    for one in some:
        assert any(best.cost <= one.cost and best.score >= one.score for best in front)
    for one in front:
        assert not any((o.cost <= one.cost and o.score > one.score) or (o.cost < one.cost and o.score >= one.score) for o in some)


@settings(max_examples=60, deadline=None)
@given(points)
def test_hypervolume_is_the_dominated_area(pairs):
    front = pareto_front(as_evaluated(pairs))
    steps = sorted({0.0, 10.0, *(one.cost for one in front)})
    heights = [max((one.score for one in front if one.cost <= left), default=0.0) for left in steps[:-1]]
    expected = sum((right - left) * height for (left, right), height in zip(pairwise(steps), heights, strict=True))
    assert hypervolume(front, 10.0, 0.0) == pytest.approx(expected, abs=1e-9)
