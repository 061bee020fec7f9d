"""The sensitivity table, and allocations compared with brute force."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from anybit.allocation.frontier import frontier
from anybit.allocation.program import Problem, allocate, best_allocations, least_costs, make_problem, milp
from anybit.allocation.sensitivity import SensitivityTable, measure_sensitivity, rows_to_measure
from anybit.budget import Budget
from anybit.data.batches import Batch
from anybit.data.tasks import distance, outputs_of
from anybit.errors import AnybitError, InfeasibleBudget, InvalidSetting, UnsupportedModel
from anybit.networks.candidates import ActivationCandidate, Candidates, apply_scheme, weight_candidate
from anybit.networks.cost import CostModel, LayerSize
from anybit.networks.layers import prepare
from anybit.numerics.packing import TensorSpec
from anybit.progress import listening
from anybit.scheme import Precision, Scheme

few = settings(max_examples=60, deadline=None)
LADDER = [Precision(bits) for bits in (2, 3, 4, 6, 8)]
thousandths = st.integers(-200, 1000).map(lambda n: n / 1000)  # measured sensitivities can be slightly negative


@st.composite
def problems(draw, budgets=(0, 1, 2), largest_cost=100):
    """Up to four layers of up to four choices, with integer costs and limits between the smallest and the largest possible sum."""
    choices = {f"layer{i}": LADDER[: draw(st.integers(1, 4))] for i in range(draw(st.integers(1, 4)))}

    def table(elements):
        return {name: np.array([draw(elements) for _ in options], dtype=float) for name, options in choices.items()}

    costs = {f"cost{i}": table(st.integers(largest_cost - 99, largest_cost)) for i in range(draw(st.sampled_from(budgets)))}
    limits = {}
    for quantity, cost in costs.items():
        least, most = sum(c.min() for c in cost.values()), sum(c.max() for c in cost.values())
        limits[quantity] = float(draw(st.integers(int(least) - 1, int(most))))
    return Problem(choices, table(thousandths), costs, limits)


def amount(table, problem, scheme):
    """Sum one quantity over a scheme's layers."""
    return sum(table[name][list(problem.choices[name]).index(precision)] for name, precision in scheme.items())


def fitting_schemes(problem):
    """Every scheme within the limits."""
    for options in itertools.product(*problem.choices.values()):
        scheme = Scheme(dict(zip(problem.choices, options, strict=True)))
        if all(amount(problem.costs[quantity], problem, scheme) <= limit for quantity, limit in problem.limits.items()):
            yield scheme


# Allocation


@few
@given(problems())
def test_the_allocation_is_the_best_of_all_schemes_that_fit(problem):
    losses = [amount(problem.losses, problem, scheme) for scheme in fitting_schemes(problem)]
    if not losses:
        with pytest.raises(InfeasibleBudget):
            allocate(problem)
        return
    solution = allocate(problem)
    assert solution.predicted_loss == pytest.approx(amount(problem.losses, problem, solution.scheme))
    assert solution.predicted_loss == pytest.approx(min(losses))


@pytest.mark.parametrize("largest_cost", [100, 10**6, 10**9, 10**12])
def test_budget_is_never_exceeded_even_by_one(largest_cost):
    @few
    @given(problems((1, 2), largest_cost))
    def holds(problem):
        assume(any(fitting_schemes(problem)))
        scheme = allocate(problem).scheme
        for quantity, limit in problem.limits.items():
            assert amount(problem.costs[quantity], problem, scheme) <= limit

    holds()


def test_accepts_scheme_exactly_at_the_limit():
    losses, costs = np.array([1.0, 0.0]), np.array([1 / 3, 2 / 3])
    problem = Problem({"a": LADDER[:2], "b": LADDER[:2]}, {"a": losses, "b": losses}, {"c": {"a": costs, "b": costs}}, {"c": 1 / 3 + 2 / 3})
    assert allocate(problem).predicted_loss == 1


@few
@given(problems())
def test_bound_is_at_most_the_loss_of_the_solution(problem):
    assume(any(fitting_schemes(problem)))
    solution = allocate(problem)
    assert solution.bound <= solution.predicted_loss + 1e-12
    assert solution.gap >= 0
    assert solution.bound == pytest.approx(solution.predicted_loss, abs=1e-6)  # small problems are solved to optimality


@few
@given(problems())
def test_best_allocations_are_distinct_feasible_and_sorted(problem):
    solution = list(itertools.islice(best_allocations(problem), 5)) if any(fitting_schemes(problem)) else []
    losses = [one.predicted_loss for one in solution]
    assert losses == pytest.approx(sorted(losses))
    assert len({one.scheme for one in solution}) == len(solution)
    fitting = set(fitting_schemes(problem))
    assert all(one.scheme in fitting for one in solution)


@pytest.mark.parametrize("core", [0, 1])
def test_restricting_to_a_core_gives_the_same_schemes_in_the_same_order(core):
    @few
    @given(problems((1, 2)))
    def holds(problem):
        losses = sorted(amount(problem.losses, problem, scheme) for scheme in fitting_schemes(problem))
        assume(losses)
        with patch("anybit.allocation.program.CORE", core):
            solution = [one for one, _ in zip(best_allocations(problem), range(3), strict=False)]
        assert solution[0].predicted_loss == pytest.approx(losses[0])
        assert all(one.bound <= one.predicted_loss + 1e-12 for one in solution)
        assert [one.predicted_loss for one in solution] == pytest.approx(
            [one.predicted_loss for one in itertools.islice(best_allocations(problem), 3)]
        )

    holds()


@few
@given(problems((1,)), st.integers(0, 100))
def test_more_budget_never_gives_a_worse_loss(problem, more):
    assume(any(fitting_schemes(problem)))
    roomier = Problem(problem.choices, problem.losses, problem.costs, {"cost0": problem.limits["cost0"] + more})
    assert allocate(roomier).predicted_loss <= allocate(problem).predicted_loss + 1e-9


@few
@given(problems())
def test_the_same_problem_gives_the_same_scheme(problem):
    assume(any(fitting_schemes(problem)))
    assert allocate(problem) == allocate(problem)


@few
@given(problems((1,)))
def test_loss_limit_gives_the_cheapest_scheme_within_it(problem):
    costs, loss_limit = problem.costs["cost0"], 1.0
    unlimited = Problem(problem.choices, problem.losses, {}, {})
    within = [scheme for scheme in fitting_schemes(unlimited) if amount(problem.losses, problem, scheme) <= loss_limit]
    if not within:
        with pytest.raises(InfeasibleBudget, match="loss=1"):
            next(least_costs(unlimited, costs, loss_limit))
        return
    solution = next(least_costs(unlimited, costs, loss_limit))
    assert solution.predicted_loss <= loss_limit + 1e-9
    assert amount(costs, problem, solution.scheme) == min(amount(costs, problem, scheme) for scheme in within)
    assert solution.bound <= amount(costs, problem, solution.scheme) + 1e-6


def test_the_solver_prints_nothing(capfd):
    # HiGHS writes a line to the standard output of the process for some problems; `--json` promises one JSON object there.
    generator = np.random.default_rng(1)
    for _ in range(60):
        weights = generator.integers(1000, 10**6, 8)
        names = [f"layer{i}" for i in range(8)]
        losses = {name: np.sort(generator.random(5) * generator.lognormal(0, 2))[::-1] for name in names}
        costs = {name: np.array([count * p.weight_bits for p in LADDER], dtype=float) for name, count in zip(names, weights, strict=True)}
        limit = float(weights.sum() * generator.uniform(2.5, 6))
        allocate(Problem(dict.fromkeys(names, LADDER), losses, {"bits": costs}, {"bits": limit}))
    assert capfd.readouterr() == ("", "")


def test_the_certificate_is_json_without_time_or_machine():
    problem = Problem({"a": LADDER[:2]}, {"a": np.array([1.0, 0.5])}, {}, {})
    certificate = allocate(problem).certificate()
    assert json.loads(json.dumps(certificate)) == certificate
    assert certificate["value"] == 0.5 and certificate["bound"] <= 0.5
    assert set(certificate) == {"solver", "objective", "value", "bound", "gap"}


# The frontier


def frontier_of(problem):
    """The frontier over the problem's one cost, and (cost, loss, scheme) at its start and after each step."""
    solution = frontier(problem.choices, problem.losses, problem.costs["cost0"])
    points = [(solution.cost, solution.loss), *((step.cost, step.loss) for step in solution.steps)]
    return solution, [(*point, solution.scheme(count)) for count, point in enumerate(points)]


@few
@given(problems(budgets=(1,)))
def test_frontier_schemes_are_optimal_at_their_cost(problem):
    _, points = frontier_of(problem)
    for cost, loss, scheme in points:
        assert cost == pytest.approx(amount(problem.costs["cost0"], problem, scheme))
        assert loss == pytest.approx(amount(problem.losses, problem, scheme))
        rivals = fitting_schemes(dataclasses.replace(problem, limits={"cost0": cost + 1e-6}))
        assert loss == pytest.approx(min(amount(problem.losses, problem, rival) for rival in rivals))


@few
@given(problems(budgets=(1,)))
def test_no_scheme_lies_below_the_frontier(problem):
    solution, points = frontier_of(problem)
    prices = [step.price for step in solution.steps]
    assert prices == sorted(prices, reverse=True) and all(price > 0 for price in prices)
    for count, step in enumerate(solution.steps):  # the price is the slope between two points, and every scheme lies on or above that line
        (cost, loss, _), (dearer, lower, _) = points[count], points[count + 1]
        assert step.price == pytest.approx((loss - lower) / (dearer - cost))
        for rival in fitting_schemes(dataclasses.replace(problem, limits={})):
            line = loss - step.price * (amount(problem.costs["cost0"], problem, rival) - cost)
            assert amount(problem.losses, problem, rival) >= line - 1e-9


@few
@given(problems(budgets=(1,)))
def test_frontier_starts_at_minimum_cost_and_ends_at_minimum_loss(problem):
    _, points = frontier_of(problem)
    assert points[0][0] == pytest.approx(sum(costs.min() for costs in problem.costs["cost0"].values()))
    assert points[-1][1] == pytest.approx(sum(losses.min() for losses in problem.losses.values()))


def test_frontier_breaks_ties_by_layer_then_choice_order():
    choices = {"a": LADDER[:2], "b": LADDER[:3]}
    losses = {"a": np.array([2.0, 1.0]), "b": np.array([2.0, 1.0, 1.0])}
    costs = {"a": np.array([1.0, 2.0]), "b": np.array([1.0, 2.0, 2.0])}
    steps = frontier(choices, losses, costs).steps
    assert [(step.layer, step.precision) for step in steps] == [("a", LADDER[1]), ("b", LADDER[1])]


@few
@given(problems(budgets=(1,)))
def test_frontier_within_a_limit_gives_its_last_feasible_scheme(problem):
    solution, points = frontier_of(problem)
    limit = problem.limits["cost0"]
    fitting = [count for count, (cost, _, _) in enumerate(points) if cost <= limit]
    assert solution.within(limit) == (fitting[-1] if fitting else None)


# Problems from a table, costs and a budget


def costs_of(weights, macs=1000):
    """Return the costs of a network with these numbers of weights, one row per layer."""
    layers = {f"layer{i}": LayerSize(1, count, macs * count) for i, count in enumerate(weights)}
    return CostModel(layers, 10, {}, 2, 4 * sum(weights) + 1000)


def plain_table(choices):
    """A table in which fewer bits have more loss."""
    return SensitivityTable({(name, p): 1 / (p.weight_bits or 32) for name in choices for p in choices[name]}, Precision(), 1)


weights = st.lists(st.integers(1, 10**7), min_size=1, max_size=5)
options = st.lists(
    st.builds(Precision, st.sampled_from([None, 2, 3, 4, 6, 8]), st.sampled_from([None, 4, 8])), min_size=1, max_size=4, unique=True
)


@st.composite
def networks(draw):
    """(choices, costs): layers of any size, each with its own choices, including float."""
    costs = costs_of(draw(weights), macs=draw(st.integers(1, 10**5)))
    return {name: draw(options) for name in costs.layers}, costs


def cost_of(costs, scheme, quantity):
    return {"bit": costs.weight_bits, "B": costs.file_size, "%": lambda s: 100 * costs.file_size(s) / costs.float_bytes}[quantity](scheme)


@few
@given(networks(), st.floats(0, 1), st.sampled_from(["bit", "B", "%"]))
def test_exact_cost_of_the_allocated_scheme_is_within_budget(network, share, quantity):
    choices, costs = network
    cheap, dear = (Scheme({name: pick(choices[name], key=lambda p: p.stored_weight_bits) for name in choices}) for pick in (min, max))
    low, high = cost_of(costs, cheap, quantity), cost_of(costs, dear, quantity)
    budget = Budget.parse(f"{max(low + share * (high - low), 0.01):.6f}{quantity}")
    try:
        solution = allocate(make_problem(choices, plain_table(choices), costs, budget))
    except (InfeasibleBudget, InvalidSetting):
        return
    assert cost_of(costs, solution.scheme, quantity) <= budget.conditions[0].limit


@pytest.mark.parametrize("first", [0, 1])
def test_byte_budget_is_exact_when_a_choice_adds_tensors(first):
    # A float scheme has no codes and no scales; the names of those tensors take bytes of the header too.
    options = [Precision(), Precision(2, 8)]
    choices, costs = {"layer0": [options[first], options[1 - first]]}, costs_of([400])
    for limit in range(300, 900, 5):
        try:
            solution = allocate(make_problem(choices, plain_table(choices), costs, Budget.parse(f"{limit}B")))
        except InfeasibleBudget:
            continue
        assert costs.file_size(solution.scheme) <= limit


def test_byte_budget_is_exact_when_header_offsets_gain_digits():
    choices = {"layer0": [Precision(2), Precision(8)]}
    for padding in range(1, 9):  # names of eight lengths, so that each digit changes the padded header for one of them
        costs = dataclasses.replace(costs_of([1000]), others={"_" * padding: TensorSpec("I64", ())})
        limit = costs.file_size(Scheme({"layer0": Precision(8)})) - 1
        solution = allocate(make_problem(choices, plain_table(choices), costs, Budget.parse(f"{limit}B")))
        assert costs.file_size(solution.scheme) <= limit


@few
@given(networks())
def test_byte_budget_with_room_for_the_header_is_feasible(network):
    choices, costs = network
    sizes = {name: min(choices[name], key=lambda p: costs.layer_bytes(name, p)) for name in choices}
    smallest = costs.file_size(Scheme(sizes)) + 512  # the header may be overestimated by a few names
    assume(smallest <= costs.float_bytes)
    allocate(make_problem(choices, plain_table(choices), costs, Budget.parse(f"{smallest}B")))


@few
@given(networks(), st.sampled_from(["0.01bit", "1B", "0.001%", "bops=1"]))
def test_infeasible_budget_error_names_binding_layers_and_a_feasible_budget(network, text):
    choices, costs = network
    with pytest.raises(InfeasibleBudget) as error:
        allocate(make_problem(choices, plain_table(choices), costs, Budget.parse(text)))
    cost = {
        "bit": lambda name, p: costs.layers[name].weights * p.stored_weight_bits,
        "bops=1": costs.layer_bops,
    }.get(text.lstrip("0.1"), costs.layer_bytes)
    largest = max(choices, key=lambda name: min(cost(name, p) for p in choices[name]))
    assert re.search(rf"The smallest scheme needs .*, more than the budget of .* \(layers .*{largest}.* bind\)", str(error.value))
    enough = re.search(r"raise the budget to (.*)\.$", str(error.value))[1]
    try:
        allocate(make_problem(choices, plain_table(choices), costs, Budget.parse(enough)))
    except InvalidSetting as refusal:
        assert "above the float network's" in str(refusal)


def test_infeasible_budget_message():
    choices = {"layer0": [Precision(4), Precision(8)], "layer1": [Precision(3)]}
    with pytest.raises(InfeasibleBudget, match=r"needs 3\.75bit, more than the budget of 2bit \(layers layer0, layer1 bind\)"):
        allocate(make_problem(choices, plain_table(choices), costs_of([300, 100]), Budget.parse("2bit")))


def test_error_distinguishes_limits_that_only_conflict_jointly():
    problem = Problem(
        {"a": LADDER[:2]}, {"a": np.zeros(2)}, {"x": {"a": np.array([1.0, 2.0])}, "y": {"a": np.array([2.0, 1.0])}}, {"x": 1.0, "y": 1.0}
    )
    with pytest.raises(InfeasibleBudget, match="together, although each alone can be met"):
        allocate(problem)


def test_smaller_of_two_byte_limits_applies():
    choices, costs = {"layer0": LADDER}, costs_of([10_000])
    for text in ("5kB,90%", "90%,5kB"):
        solution = allocate(make_problem(choices, plain_table(choices), costs, Budget.parse(text)))
        assert costs.file_size(solution.scheme) <= 5000


@pytest.mark.parametrize("text", ["33bit", "101%", "1GB"])
def test_rejects_budget_above_the_float_size(text):
    with pytest.raises(InvalidSetting, match="above the float network's"):
        make_problem({"layer0": LADDER}, plain_table({"layer0": LADDER}), costs_of([100]), Budget.parse(text))


def test_error_names_layer_without_choices():
    with pytest.raises(InvalidSetting, match="layer0"):
        make_problem({"layer0": []}, plain_table({}), costs_of([100]), None)


def test_latency_budget_requires_a_measured_table():
    with pytest.raises(InvalidSetting, match="latency needs a measured table"):
        make_problem({"layer0": LADDER}, plain_table({"layer0": LADDER}), costs_of([100]), Budget.parse("latency=3ms"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_sensitivity_is_rejected_before_solving(bad):
    choices = {"layer0": LADDER[:2], "layer1": LADDER[:2]}
    table = SensitivityTable(
        {("layer0", p): 0.1 for p in LADDER} | {("layer1", LADDER[0]): bad, ("layer1", LADDER[1]): 0.1}, Precision(), 1
    )
    with pytest.raises(AnybitError, match="layer1"):
        allocate(make_problem(choices, table, costs_of([10, 10]), None))


# The sensitivity table

NAMES = ["0", "2"]
W4, A8, W4A8, W2A8 = Precision(4), Precision(None, 8), Precision(4, 8), Precision(2, 8)


@pytest.fixture(scope="module")
def network():
    """(prepared model, its candidates, held-out batches, the float outputs)."""
    torch.manual_seed(0)
    prepared = prepare(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), NAMES)
    candidates = Candidates(
        {(name, bits): weight_candidate(prepared.get_submodule(name), bits, "minmax") for name in NAMES for bits in (2, 4)},
        {
            (name, bits): ActivationCandidate(torch.tensor(4 / 2**bits), torch.tensor(2.0 ** (bits - 1)))
            for name in NAMES
            for bits in (4, 8)
        },
    )
    held_out = [Batch(torch.randn(5, 6)), Batch(torch.randn(3, 6))]
    return prepared, candidates, held_out, outputs_of(prepared, held_out)


def measure(network, choices, **options):
    return measure_sensitivity(*network[:2], choices, *network[2:], "classification", **options)


def loss_of(network, **layers):
    """Return the distance of the outputs with these precisions (layer 0: "_0"), everything else float."""
    prepared, candidates, held_out, reference = network
    scheme = Scheme({name.strip("_"): precision for name, precision in layers.items()})
    return distance(outputs_of(apply_scheme(prepared, scheme, candidates), held_out), reference, "classification")


CHOICES = {"0": [W2A8, W4A8], "2": [W2A8, W4A8]}


def test_row_is_the_loss_with_only_that_layer_quantized(network):
    table = measure(network, CHOICES)
    assert table.samples == 8
    assert table.loss("0", W4) == pytest.approx(loss_of(network, _0=W4))
    assert table.loss("2", A8) == pytest.approx(loss_of(network, _2=A8))


def test_pair_is_the_sum_of_its_rows_unless_measured(network):
    apart, together = measure(network, CHOICES), measure(network, CHOICES, pairs=True)
    assert apart.loss("0", W4A8) == apart.loss("0", W4) + apart.loss("0", A8)
    assert together.loss("0", W4A8) == pytest.approx(loss_of(network, _0=W4A8))


def test_rows_are_relative_to_the_base_loss(network):
    table = measure(network, CHOICES, base=W4A8)
    base, changed = loss_of(network, _0=W4A8, _2=W4A8), loss_of(network, _0=W2A8, _2=W4A8)
    together = measure(network, CHOICES, base=W4A8, pairs=True)
    assert together.loss("0", W2A8) == pytest.approx(changed - base)
    assert together.loss("0", W4A8) == pytest.approx(0)
    assert table.base == W4A8


def test_single_choice_layer_adds_no_rows_and_is_in_every_measurement(network):
    table = measure(network, {"0": [W2A8], "2": [W2A8, W4A8]}, pairs=True)
    assert table.loss("0", W2A8) == 0
    assert table.loss("2", W4A8) == pytest.approx(loss_of(network, _0=W2A8, _2=W4A8) - loss_of(network, _0=W2A8))


def test_measuring_leaves_the_prepared_model_unchanged(network):
    before = {key: tensor.clone() for key, tensor in network[0].state_dict().items()}
    measure(network, CHOICES)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network[0].state_dict().items())


def test_prediction_includes_the_floor(network):
    base = Precision(2, 8)
    table = measure(network, CHOICES, base=base)
    assert table.floor == pytest.approx(loss_of(network, _0=base, _2=base))
    assert table.total(Scheme(dict.fromkeys(CHOICES, base))) == pytest.approx(table.floor)


def test_non_finite_output_error_names_layer_and_precision(network):
    prepared, candidates, *rest = network
    broken = Candidates(
        {**candidates.weights}, {**candidates.activations, ("2", 8): ActivationCandidate(torch.tensor(float("nan")), torch.zeros(()))}
    )
    with pytest.raises(UnsupportedModel, match="2 at A8 makes the outputs NaN or infinite"):
        measure((prepared, broken, *rest), CHOICES)


def test_progress_event_for_every_row(network):
    moments = []
    with listening(moments.append):
        measure(network, CHOICES)
    assert [(one.stage, one.done, one.total) for one in moments if one.total] == [("sensitivity", done, 6) for done in range(7)]
    count = len(moments)
    measure(network, {"0": [W4], "2": [W4]})
    assert len(moments) == count  # no listener outside the block


def test_five_by_three_choices_need_eight_or_fifteen_rows():
    grid = {"a": [Precision(w, a) for w in (2, 3, 4, 6, 8) for a in (4, 6, 8)]}
    assert len(rows_to_measure(grid, pairs=False)) == 8
    assert len(rows_to_measure(grid, pairs=True)) == 15


@few
@given(
    st.dictionaries(
        st.tuples(st.text(max_size=5), st.builds(Precision, st.sampled_from([None, 0, 2, 8]), st.sampled_from([None, 4]))),
        st.floats(-1, 1),
        max_size=6,
    ),
    st.booleans(),
)
def test_table_round_trips_through_json(rows, pairs):
    table = SensitivityTable(rows, W4A8, 7, pairs)
    assert SensitivityTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_predicted_loss_is_the_sum_over_layers():
    table = SensitivityTable({("a", W4): 0.25, ("a", A8): 0.5, ("b", W4A8): 4.0}, Precision(), 1)
    assert table.total(Scheme({"a": W4A8, "b": W4A8})) == 4.75
    assert table.total(Scheme({"a": Precision(), "b": Precision()})) == 0


@pytest.mark.parametrize("status", [1, 4])
def test_unreached_gap_is_widened_and_reported(status, monkeypatch):
    gaps, solve = [], milp

    def slow(*arguments, options, **more):
        gaps.append(options["mip_rel_gap"])
        solution = solve(*arguments, **more)
        if options["mip_rel_gap"] < 1e-3:  # stopped at its limit with an incumbent
            solution.status = status
        else:
            solution.mip_dual_bound = solution.fun - 5e-4 * abs(solution.fun)
        return solution

    choices = {layer: [Precision(bits, 8) for bits in (2, 4, 8)] for layer in "abc"}
    losses = {layer: np.array([3.0, 1.0, 0.0]) * weight for layer, weight in zip("abc", (1, 2, 3), strict=True)}
    costs = {"bits": {layer: np.array([2.0, 4.0, 8.0]) for layer in "abc"}}
    problem = Problem(choices, losses, costs, {"bits": 14.0}, {})
    plain = allocate(problem)
    monkeypatch.setattr("anybit.allocation.program.milp", slow)
    solution = list(itertools.islice(best_allocations(problem), 3))
    assert solution[0].scheme == plain.scheme and 0 < solution[0].gap <= 1e-3
    assert gaps[0] == 1e-4 and set(gaps[1:]) == {1e-3}  # a gap that was not reached is not tried again


def hard_problem():
    """A problem for which the solver needs more than one node at the narrowest gap."""
    rng = np.random.default_rng(1)
    options = [Precision(bits) for bits in (2, 3, 4, 6, 8)]
    layers = [f"layer{i}" for i in range(20)]
    costs = {f"cost{i}": {name: rng.integers(1, 100, len(options)).astype(float) for name in layers} for i in range(4)}
    losses = {name: rng.random(len(options)) for name in layers}
    limits = {quantity: 0.5 * sum(cost.max() for cost in table.values()) for quantity, table in costs.items()}
    return Problem(dict.fromkeys(layers, options), losses, costs, limits)


def test_solver_limit_counts_nodes_not_time(monkeypatch):
    """The scheme is the same on a busy machine, or on one that slept meanwhile."""
    results, solve = [], milp

    def watched(*arguments, options, **more):
        assert "time_limit" not in options
        results.append(solve(*arguments, options=options, **more))
        return results[-1]

    monkeypatch.setattr("anybit.allocation.program.milp", watched)
    monkeypatch.setattr("anybit.allocation.program.NODES", 1)
    schemes = [allocate(hard_problem()) for _ in range(2)]
    assert schemes[0] == schemes[1] and schemes[0].gap <= 1e-2
    assert results[0].status not in (0, 2) and results[0].mip_node_count == 1


LOUD = """
import ctypes, threading
from anybit.environment import without_c_output
c = ctypes.CDLL(None)
with without_c_output(), without_c_output():
    c.puts(b"from C")
    print("from Python")
entered, go_on = threading.Event(), threading.Event()
def silent():
    with without_c_output():
        entered.set()
        go_on.wait()
other = threading.Thread(target=silent)
with without_c_output():
    other.start()
    entered.wait()
c.puts(b"while another thread is silent")
go_on.set()
other.join()
print("at the end")
"""


def test_silences_compiled_code_but_not_python():
    run = subprocess.run([sys.executable, "-c", LOUD], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.splitlines() == ["from Python", "at the end"]


def test_solving_in_threads_loses_no_output_of_other_threads(capfd):
    """stdout is restored afterwards."""
    done = threading.Event()

    def printing():
        while not done.is_set():
            os.write(1, b"x")
            time.sleep(1e-3)
            written.append(1)

    written, problem = [], hard_problem()
    threads = [threading.Thread(target=allocate, args=(problem,)) for _ in range(2)]
    talker = threading.Thread(target=printing)
    for thread in (talker, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    talker.join()
    assert capfd.readouterr().out == "x" * len(written)
    os.write(1, b"still here")
    assert capfd.readouterr().out == "still here"
