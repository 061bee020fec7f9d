"""Every value that a message suggests is accepted in the suggested form."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Residual, images, make
from test_settings import NAMES, OPTIONS, bad_values

import anybit
from anybit.allocation.choice import check_feasible
from anybit.allocation.program import Problem, allocate
from anybit.budget import QUANTITIES, Budget, check_counts_weights, check_is_counted
from anybit.data.batches import Batch
from anybit.errors import InfeasibleBudget, InvalidSetting
from anybit.roads.grow import observe_trainable
from anybit.roads.search import check_fits
from anybit.roads.settings import CalibrateSettings, GrowSettings
from anybit.scheme import Precision
from anybit.supernets.settings import SupernetSettings

SUGGESTED = re.compile(
    r'(?:Did you mean |Write "|raise the budget to |[Rr]aise the budget to |Lower the budget to |as in |at most )([^\s"?;]+)'
)
EXAMPLES = {example for quantity in QUANTITIES.values() for example in quantity.examples}
CHECKS = (lambda budget: None, check_counts_weights, check_is_counted)


def suggested(message: str) -> list[str]:
    """The budgets that a message suggests, with the examples that it lists."""
    listed = re.findall(r"Write ([^;\"]+);", message)
    examples = re.split(r", | or ", listed[0]) if listed else []
    return [one.rstrip(".,") for one in [*SUGGESTED.findall(message), *examples]]


numbers = st.sampled_from(
    ["0", "-4", "4", "32", "33", "100.5", "1e3", "nan", "inf", "0.0", str(2**70), "0,0", "4,5", "200,5", "4 ", ".5", ""]
)
units = st.sampled_from(["bit", "bits", "bit ", "bi", "kB", "kb", "%", "", "G", "ms", "BIT", "ΓΩ", "bit,"])
prefixes = st.sampled_from(["", "bops=", "bop=", "latency=", "loss=", "drop=", "los=", "=", "bits="])


@settings(max_examples=300, deadline=None)
@given(text=st.tuples(prefixes, numbers, units).map("".join), check=st.sampled_from(CHECKS))
def test_a_budget_suggested_for_one_that_cannot_be_read_is_accepted(text, check):
    try:
        Budget.parse(text, check)
    except InvalidSetting as refused:
        for one in suggested(str(refused)):
            again = Budget.parse(one, check)
            assert again.limit("bits") is None or again.limit("bits") <= 32, refused
            assert again.limit("percent") is None or again.limit("percent") <= 100, refused


@pytest.mark.parametrize("budget", [np.nan, np.inf, 0, -4, 2**70, True, False, 1e-400, 33, [4], None, b"4bit"], ids=repr)
def test_numbers_that_are_no_bits_per_weight_are_not_suggested(budget):
    with pytest.raises(InvalidSetting, match="is not a text") as refused:
        Budget.parse(budget)
    assert not re.search(r'Write "', str(refused.value))


@pytest.mark.parametrize(("kind", "one"), OPTIONS, ids=NAMES)
def test_a_suggested_value_of_an_option_is_accepted(kind, one):
    for bad in [*bad_values(one), "1", "yes", 4.0, ["fc"], "fc", {"fc": 8}]:
        try:
            kind.of(**{one.name: bad})
        except InvalidSetting as refused:
            for written in re.findall(rf" Write ({one.name}=.*)\.$", str(refused)):
                one.checked(eval(written.partition("=")[2], {"Precision": Precision}))


@pytest.mark.parametrize(
    ("given", "written"), [({2: 0.0}, "{2: 1.0}"), (0.1, "{2: 1.0}"), ([4], "{4: 1.0}"), ({4: "x", 2: 1}, "{4: 1.0, 2: 1.0}")], ids=str
)
def test_suggested_factors_are_of_the_given_bit_widths(given, written):
    with pytest.raises(InvalidSetting) as refused:
        SupernetSettings.of(step_rates=given)
    assert str(refused.value).endswith(f" Write step_rates={written}.")
    SupernetSettings.of(step_rates=eval(written))


BUDGETS = [
    "100bit",
    "9bit",
    "8.001bit",
    "5.5bit",
    "1bit",
    "0.1%",
    "100%",
    "99.9%",
    "70%",
    "1B",
    "1GB",
    "4bit,1%",
    "6bit,1kB",
    "7.99bit,90%",
]
GROWING = [{}, {"planes": 4}, {"planes": 1}, {"method": "msq"}, {"method": "msq", "start_bits": 2}, {"keep": {"*1": "W3A8"}},
           {"keep": {"fc": "float"}}, {"prune": True}]  # fmt: skip


@pytest.fixture(scope="module")
def example():
    return make(Residual), Batch(images(2))


@pytest.mark.parametrize("options", GROWING, ids=str)
def test_what_grow_suggests_is_accepted(example, options):
    def check(budget: str, **more) -> None:
        chosen = GrowSettings.of(**{**options, **more})
        method = chosen.method or "csq"
        network = observed(tuple({**options, **more}.items()), chosen, method)
        from anybit.methods.table import grow_method_named

        limits = Budget.parse(budget, check_counts_weights)
        grow_method_named(method).check_budget(limits, network)
        check_feasible(network, limits)

    networks: dict = {}

    def observed(key, chosen, method):
        key = str(key)
        if key not in networks:
            networks[key] = observe_trainable(example[0], example[1], chosen, None, method)
        return networks[key]

    for budget in BUDGETS:
        try:
            check(budget)
        except (InvalidSetting, InfeasibleBudget) as refused:
            for one in suggested(str(refused)):
                check(one)
            for name, value in re.findall(r"--([a-z-]+)=(\d+)", str(refused)):
                check(budget, **{name.replace("-", "_"): int(value)})
            assert "--planes=8" not in str(refused)


@pytest.mark.parametrize("budget", ["1bit", "0.001%", "bops=1", "1bit,bops=1", "1B,bops=20k", "3bit,bops=1k", "2.0001bit,100B,bops=1M"])
def test_what_calibrate_suggests_is_accepted(example, budget):
    from anybit.networks.observed import observe_network

    network = observe_network(*example, CalibrateSettings(activation_bits=(4, 8)).options)
    try:
        check_feasible(network, Budget.parse(budget))
    except InfeasibleBudget as refused:
        assert suggested(str(refused))
        for one in suggested(str(refused)):
            check_feasible(network, Budget.parse(one))


def test_a_budget_that_conditions_contradict_is_relaxed_so_that_it_can_be_met():
    """Fast layers are large: each condition can be met, but not both."""
    costs = {"bits": {"a": np.array([2.0, 8.0]), "b": np.array([2.0, 8.0])}, "time": {"a": np.array([9.0, 1.0]), "b": np.array([9.0, 1.0])}}
    problem = Problem({"a": [Precision(2), Precision(8)], "b": [Precision(2), Precision(8)]},
                      {"a": np.zeros(2), "b": np.zeros(2)}, costs, {"bits": 5.0, "time": 3.0})  # fmt: skip
    with pytest.raises(InfeasibleBudget, match="although each alone") as refused:
        allocate(problem)
    limits = dict(part.split("=") for part in suggested(str(refused.value))[0].split(","))
    allocate(Problem(problem.choices, problem.losses, costs, {name: float(limit) for name, limit in limits.items()}))


@pytest.mark.parametrize("budget", ["1bit", "0.1%", "bops=1k", "10B", "1bit,bops=1k", "8bit,1kB"])
def test_what_a_search_suggests_is_accepted(folders, calibrated, budget):
    supernet = anybit.load_supernet(folders["supernet"], calibrated[0])
    check = partial(check_fits, supernet)
    with pytest.raises(InfeasibleBudget) as refused:
        check(Budget.parse(budget))
    assert len(suggested(str(refused.value))) == 1
    check(Budget.parse(suggested(str(refused.value))[0]))


def test_a_suggested_drop_is_not_below_the_loss_that_it_is_to_permit():
    """It was once rounded to four digits, down as well as up."""
    for lost in torch.rand(200, generator=torch.Generator().manual_seed(0)).mul(99).tolist():
        assert Budget.parse(QUANTITIES["drop"].text(lost)).limit("drop") >= lost
