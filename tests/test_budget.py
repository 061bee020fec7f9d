"""Properties of every budget quantity, including one defined only here: energy in joules."""

import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import anybit
from anybit.allocation.choice import fits_budget
from anybit.allocation.program import allocate, make_problem
from anybit.allocation.sensitivity import SensitivityTable
from anybit.budget import QUANTITIES, Budget, Cost, Loss, cost_quantities, own_costs, parse_budgets
from anybit.errors import InfeasibleBudget, InvalidSetting
from anybit.networks.cost import HEADER_SLACK, CostModel, LayerSize
from anybit.networks.latency import LatencyTable, OperationFlow
from anybit.runs.records import Amounts, Cell
from anybit.scheme import FLOAT, Precision, Scheme

few = settings(max_examples=40, deadline=None)

WEIGHTS = {"first": 300, "middle": 5000, "last": 1200}
PRECISIONS = [Precision(2, 8), Precision(4, 8), Precision(8, 8), Precision(4, None), FLOAT]
CHOICES = dict.fromkeys(WEIGHTS, PRECISIONS)
JOULES = {"first": 4e-5, "middle": 2e-6, "last": 3e-4}
"""Joules of one sample for each bit that a layer's weight has: the small layers are the hungry ones."""

ENERGY = Cost(
    name="energy",
    prefix="energy=",
    units={"mJ": 1e-3, "J": 1.0},
    unit="mJ",
    digits=3,
    examples=("energy=2mJ",),
    layer=lambda costs, name, precision: JOULES[name] * precision.stored_weight_bits,
)
ALL = [*QUANTITIES.values(), ENERGY]
COSTS = [one for one in ALL if isinstance(one, Cost)]


def named(quantity):
    return quantity.name


@pytest.fixture(autouse=True)
def energy(monkeypatch):
    monkeypatch.setitem(QUANTITIES, "energy", ENERGY)


@pytest.fixture
def network():
    """Three layers in a row, with latencies."""
    layers = {name: LayerSize(10, count // 10, 7 * count) for name, count in WEIGHTS.items()}
    seconds = {name: {"float32": 1e-6 * count, "int8": 4e-7 * count} for name, count in WEIGHTS.items()}
    flow = tuple(OperationFlow(name, (index,), (index + 1,), 50) for index, name in enumerate(WEIGHTS))
    latency = LatencyTable(seconds, {"float32": 1e-4, "int8": 2e-4}, 1e-6, flow)
    return CostModel(layers, 40, {}, 3, 4 * sum(WEIGHTS.values()) + 800, latency)


def plain_table(choices):
    """Fewer bits, more loss, all layers equal."""
    return SensitivityTable({(name, p): 1 / p.stored_weight_bits for name in choices for p in choices[name]}, FLOAT, 1)


def schemes():
    return map(Scheme, (dict(zip(CHOICES, row, strict=True)) for row in itertools.product(*CHOICES.values())))


@few
@given(st.sampled_from(ALL), st.floats(1e-5, 1e8))
def test_limit_as_text_is_rounded_up_by_less_than_its_last_digit(quantity, limit):
    back = quantity.parse(quantity.text(limit))
    assert 0 <= back - limit <= quantity.units[quantity.unit] / 10**quantity.digits * (1 + 1e-6) + 1e-12 * limit
    assert quantity.text(back) == quantity.text(limit)


@pytest.mark.parametrize("quantity", ALL, ids=named)
def test_examples_and_units_parse_only_in_their_own_grammar(quantity):
    written = [f"{quantity.prefix}3{unit}" for unit in quantity.units]
    for text in (*quantity.examples, *written):
        assert [other.name for other in ALL if other.parse(text) is not None] == [quantity.name], text
        assert Budget.parse(text).conditions[0].quantity == quantity.name
    assert [quantity.parse(text) for text in written] == pytest.approx([3 * factor for factor in quantity.units.values()])


@pytest.mark.parametrize("quantity", ALL, ids=named)
def test_rejects_zero_limit_and_shows_examples_for_malformed_ones(quantity):
    with pytest.raises(InvalidSetting, match="above zero"):
        Budget.parse(f"{quantity.prefix}0{quantity.unit}")
    with pytest.raises(InvalidSetting) as refusal:
        Budget.parse(f"{quantity.prefix}x{quantity.unit}")
    assert all(example in str(refusal.value) for example in quantity.examples)


@pytest.mark.parametrize("quantity", COSTS, ids=named)
def test_parts_sum_to_the_total_or_bound_it(quantity, network):
    # Bytes reserve part of the header; adjacent float layers share a boundary.
    room = {"bytes": HEADER_SLACK, "percent": 100 * HEADER_SLACK / network.float_bytes}
    for scheme in schemes():
        parts = sum(quantity.layer(network, name, precision) for name, precision in scheme.items())
        bound = (quantity.fixed(network, CHOICES) + parts) / quantity.scale(network)
        total = quantity.total(network, scheme)
        assert total <= bound * (1 + 1e-12)
        if all(precision.weight_bits and precision.activation_bits for precision in scheme.values()):  # every file has the same tensors
            assert bound - total <= room.get(quantity.name, 0) + 1e-9 * bound


@pytest.mark.parametrize("quantity", COSTS, ids=named)
def test_more_bits_cost_no_less(quantity, network):
    totals = [quantity.total(network, Scheme.uniform(WEIGHTS, Precision(bits, 8))) for bits in (2, 3, 4, 6, 8)]
    assert totals == sorted(totals) and totals[0] > 0


@pytest.mark.parametrize("quantity", COSTS, ids=named)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_the_allocated_scheme_is_the_best_that_fits(quantity, share, network):
    table = plain_table(CHOICES)
    totals = sorted(quantity.total(network, scheme) for scheme in schemes())
    room = HEADER_SLACK / quantity.scale(network) if quantity.counted.name == "bytes" else 0
    limit = totals[0] + room + share * (totals[-1] - totals[0] - room)
    budget = Budget.parse(quantity.text(limit))
    allocation = allocate(make_problem(CHOICES, table, network, budget))
    assert fits_budget(network, allocation.scheme, budget)
    assert quantity.total(network, allocation.scheme) <= budget.conditions[0].limit
    # The solver counts by parts, which is a bound: no scheme that fits by parts is better than its solution.
    counted = quantity.counted
    limit = budget.conditions[0].limit * quantity.scale(network) - counted.fixed(network, CHOICES)
    fitting = [s for s in schemes() if sum(counted.layer(network, name, p) for name, p in s.items()) <= limit]
    assert allocation.predicted_loss == pytest.approx(min(map(table.total, fitting)), rel=1e-3)


@pytest.mark.parametrize("one, other", [("4bit", " 4bit "), ("4bit", "4.0bits"), ("12.5%", "12.50%"), ("4bit,bops=2G", "bops=2000M, 4bit")])
def test_one_budget_in_two_spellings_is_given_twice(one, other):
    with pytest.raises(InvalidSetting, match="given twice"):
        parse_budgets([one, other])
    assert str(Budget.parse(f" {one} ")) == one


@pytest.mark.parametrize(
    "text",
    [
        "-0bit",
        "12,5%",
        "4BIT",
        "1500",
        "0",
        "64bitz",
        "101 %",
        "4bitz",
        "drop=1",
        "DROP=101%",
        "12kb",
        "bops=3g",
        "-4bit",
        "4",
        "4bit,3,5%",
    ],
)
def test_a_suggested_budget_is_accepted(text, network):
    """The network accepts it, too: no suggestion is above the cost of a float network."""
    with pytest.raises(InvalidSetting) as refusal:
        Budget.parse(text)
    meant = re.search(r"Did you mean (.*)\?", str(refusal.value))
    assert meant is not None or text in ("-0bit", "1500", "0", "64bitz", "101 %", "DROP=101%")
    for cost, limit in [] if meant is None else Budget.parse(meant[1]).costs():
        assert limit > 0 and (cost.most is None or limit <= cost.most(network))


@pytest.mark.parametrize(
    ("text", "meant"), [("12,5%", "12.5%"), ("4BIT", "4bit"), ("12kb", "12kB"), ("bops=2,5G", "bops=2.5G"), ("4 Bit", "4bit")]
)
def test_a_near_spelling_is_suggested(text, meant):
    with pytest.raises(InvalidSetting, match=f"Did you mean {re.escape(meant)}\\?"):
        Budget.parse(text)


def test_no_network_loses_more_accuracy_than_it_has():
    with pytest.raises(InvalidSetting, match="at most drop=100%"):
        Budget.parse("drop=101%")


def test_small_limits_are_written_in_a_smaller_unit():
    assert [QUANTITIES["bops"].text(count) for count in (10, 12_345, 2.1e9)] == ["bops=10", "bops=12.4k", "bops=2100M"]


def test_sizes_are_written_to_the_byte():
    """An error that names the least budget asks for no byte more, and shows enough digits to differ from the requested budget."""
    for count in (7_520, 7_552, 40_000, 123_456_789):
        assert round(Budget.parse(QUANTITIES["bytes"].text(count)).conditions[0].limit) == count


@pytest.mark.parametrize("quantity", COSTS, ids=named)
def test_infeasible_limit_error_names_the_minimum(quantity, network):
    choices = dict.fromkeys(WEIGHTS, PRECISIONS[:3])
    least = min(quantity.total(network, Scheme(dict(zip(choices, row, strict=True)))) for row in itertools.product(*choices.values()))
    budget = Budget.parse(quantity.text(least / 10))
    with pytest.raises(InfeasibleBudget) as refusal:
        allocate(make_problem(choices, plain_table(choices), network, budget))
    needed = re.search(r"raise the budget to (.*)\.$", str(refusal.value))[1]
    enough = Budget.parse(needed)
    assert enough.conditions[0].quantity == quantity.name
    allocation = allocate(make_problem(choices, plain_table(choices), network, enough))
    rounded = quantity.units[quantity.unit] / 10**quantity.digits * quantity.scale(network)
    slack = rounded + (HEADER_SLACK if quantity.counted.name == "bytes" else 0)
    assert quantity.total(network, allocation.scheme) <= (1 + 1e-9) * least + slack / quantity.scale(network)


@pytest.mark.parametrize("quantity", COSTS, ids=named)
def test_report_has_the_amount_under_the_key_of_the_quantity(quantity, network):
    scheme = Scheme.uniform(WEIGHTS, Precision(4, 8))
    amounts = network.summary(scheme)
    assert amounts[quantity.report_key] == quantity.total(network, scheme)
    assert Amounts.model_validate(amounts).amount(quantity.report_key) == pytest.approx(amounts[quantity.report_key])
    assert quantity.in_words(amounts[quantity.report_key])


def test_amounts_of_unknown_quantities_are_ignored():
    cell = Cell.model_validate({"loss": 0.0, "bytes": 3, "bops": 4, "energy": 0.5, "colour": "red"})
    assert cell.amount("energy") == 0.5 and cell.amount("colour") is None and cell.amount("latency") is None


@pytest.mark.parametrize("quantity", [one for one in ALL if isinstance(one, Loss)], ids=named)
def test_loss_limits_have_no_cost(quantity, network):
    budget = Budget.parse(f"{quantity.examples[0]},4bit")
    assert budget.loss() is quantity and [cost.name for cost, _ in budget.costs()] == ["bits"]
    assert set(make_problem(CHOICES, plain_table(CHOICES), network, budget).limits) == {"bits"}


def test_kinds_in_the_table():
    assert len({one.name for one in ALL}) == len(ALL) and all(QUANTITIES[one.name] is one for one in ALL)
    assert cost_quantities() == COSTS
    assert [cost.name for cost in own_costs()] == ["bits", "bytes", "bops", "energy"]


def test_unmeasured_cost_is_rejected_and_not_reported(network):
    costs = SimpleNamespace(latency=None)
    unknown = [cost for cost in COSTS if not cost.is_known(costs)]
    assert [cost.name for cost in unknown] == ["latency"]
    bare = CostModel(network.layers, network.leftover, {}, network.edges, network.float_bytes)
    with pytest.raises(InvalidSetting, match="latency needs a measured table"):
        make_problem(CHOICES, plain_table(CHOICES), bare, Budget.parse("latency=3ms"))
    assert set(bare.summary(Scheme.uniform(WEIGHTS, Precision(4, 8)))) == {"weight_bits", "bytes", "percent", "bops", "energy"}


def test_energy_budget_puts_bits_where_they_take_least_energy(network):
    """All layers lose equally, so bits go where a bit takes the least energy, which is not where it takes the least memory."""
    choices = {name: [Precision(bits, 8) for bits in (2, 4, 8)] for name in WEIGHTS}
    least = sum(2 * joules for joules in JOULES.values())
    scheme = allocate(make_problem(choices, plain_table(choices), network, Budget.parse(f"energy={1e3 * (least + 3e-5):.6f}mJ"))).scheme
    assert scheme == Scheme({"first": Precision(2, 8), "middle": Precision(8, 8), "last": Precision(2, 8)})
    assert ENERGY.total(network, scheme) == pytest.approx(least + 6 * JOULES["middle"])
    both = make_problem(choices, plain_table(choices), network, Budget.parse(f"energy={1e3 * (least + 3e-5):.6f}mJ,3bit"))
    spent = allocate(both).scheme
    assert network.weight_bits(spent) <= 3 and spent["middle"] == Precision(2, 8) and spent["first"] == Precision(2, 8)
    assert np.isclose(both.limits["energy"], least + 3e-5)


def test_bytes_are_no_list_of_budgets():
    for work in (lambda: anybit.calibrate(None, None, b"4bit"), lambda: parse_budgets([b"4bit"])):
        with pytest.raises(InvalidSetting, match="b'4bit' is not a text"):
            work()
