"""Counts of passes and copies of a network: each pass over the data and each copy of the weights has a reason."""

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from math import ceil

import pytest
import torch
from networks import NETWORKS, Chain, Residual, calibration_of, images, make, network_and_inputs
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

import anybit
from anybit.data.batches import Batch
from anybit.data.tasks import outputs_of
from anybit.files.cache import Cache
from anybit.networks.observed import observe_network
from anybit.roads.settings import CalibrateSettings
from anybit.roads.steps import batch_norm_targets, matched_candidates, range_candidates, sensitivity_table

SETTINGS = CalibrateSettings(weight_bits=(2, 4, 8), activation_bits=(4, 8))
OPTIONS = replace(SETTINGS.options, gradients=False)
LIGHT = {"samples": 40, "batch_size": 16, "weight_bits": (2, 4, 8), "activation_bits": (4, 8), "alternatives": 2, "pipeline": "light"}


@pytest.fixture
def work(monkeypatch) -> Iterator[Counter]:
    """Counts of "passes" and "copies" of every network of the classes in NETWORKS, including its copies."""
    counts: Counter = Counter()
    whole = (*(cls for cls, _ in NETWORKS.values() if isinstance(cls, type)), Caching)
    deepcopy = copy.deepcopy

    def copied(value, memo=None, *rest):
        counts["copies"] += isinstance(value, whole)
        return deepcopy(value, memo, *rest)

    monkeypatch.setattr(copy, "deepcopy", copied)
    hook = register_module_forward_pre_hook(lambda module, args: counts.update(passes=int(isinstance(module, whole))))
    yield counts
    hook.remove()


class Caching(Chain):
    """Creates a grid in its first pass and reuses it afterwards."""

    grid: Tensor | None = None

    def forward(self, x):
        if self.grid is None:
            self.grid = torch.linspace(0, 1, 8).mul(2).add(x.new_zeros(8))
        return super().forward(x + self.grid)


@pytest.mark.parametrize("name", ["chain", "residual", "depthwise", "no batch norm", "signal"])
def test_observing_and_folding_take_three_passes_and_a_fourth_for_the_gradients(name, work):
    model, batch = network_and_inputs(name)
    observe_network(model, batch, OPTIONS)
    assert work == {"passes": 3, "copies": 2}  # observed, repeated, folded; copies: the folded one and the one with slots
    work.clear()
    observe_network(model, batch, replace(OPTIONS, gradients=True))
    assert work == {"passes": 4, "copies": 3}


def test_functions_that_layers_compute_cost_five_passes_and_three_copies(work):
    model, batch = network_and_inputs("attention")
    observe_network(model, batch, OPTIONS)
    # Unchanged; its calls at two batch sizes, and the same with layers; then as for any network.
    assert work["passes"] == 1 + 2 + 2 + 3


def test_state_created_in_the_first_pass_costs_one_pass(work):
    observe_network(make(Caching), Batch(images(2)), OPTIONS)
    assert work == {"passes": 4, "copies": 2}


@pytest.fixture
def observed():
    calibration = calibration_of("residual")
    network = observe_network(make(Residual), calibration.fitting[0], SETTINGS.options)
    return network, calibration, range_candidates(network, calibration, SETTINGS), outputs_of(network.folded, calibration.held_out)


def test_sensitivity_rows_share_one_copy_and_cached_rows_need_none(observed, work, tmp_path):
    network, calibration, candidates, reference = observed
    cache = Cache(tmp_path)
    table = sensitivity_table(network, candidates, calibration, reference, "classification", SETTINGS, cache)
    rows = sum(len(SETTINGS.weight_bits) + len(SETTINGS.activation_bits) for name in network.names)
    assert len(table.measured) == rows
    assert work == {"passes": (1 + rows) * len(calibration.held_out), "copies": 1}
    work.clear()
    assert sensitivity_table(network, candidates, calibration, reference, "classification", SETTINGS, cache) == table
    assert not work


def test_candidates_of_all_bit_widths_are_matched_in_one_pass(observed, work):
    network, calibration, candidates, _ = observed
    targets = batch_norm_targets(network, calibration, SETTINGS)
    work.clear()
    matched_candidates(network, candidates, targets, calibration)
    assert work == {"passes": len(calibration.fitting), "copies": len(SETTINGS.weight_bits)}


def test_every_pass_and_copy_of_a_light_calibration_has_a_reason(work):
    model, inputs = make(Residual), images(40)
    result = anybit.calibrate(model, inputs, "4bit", cache=False, **LIGHT)
    fitting, held_out = (ceil(result.report["inputs"][part] / LIGHT["batch_size"]) for part in ("fitting", "held_out"))
    layers, schemes = len(result.scheme), len(result.report["schemes"])
    rows = layers * (len(LIGHT["weight_bits"]) + len(LIGHT["activation_bits"]))
    passes = {
        "outputs that are compared, on batches of two sizes": 2,
        "the copy, while the user's network is away": 1,
        "whether the network's inputs survive their bits": 1,
        "observed, repeated, folded": 3,
        "outputs of the float network": fitting + held_out,
        "rows an input of the example": 1,
        "ranges, moments, targets, matching": 4 * fitting,
        "floor and rows of the table": (1 + rows) * held_out,
        "schemes": schemes * held_out,
        "ranges and candidates of the chosen one": 2 * held_out,
        "the two units that the solution captures anew, float and quantized, and what it gives": 4 * (fitting + held_out) + held_out,
        "batch-norm tuning, and what it gives": 1 + held_out,
        "edge ranges of the float network": fitting,
        "edge ranges of the finished one, and what they give": fitting + held_out,
        "the fingerprint: quantized, float, and quantized on nudged inputs": 3,
    }
    copies = {
        "one whose outputs are read, the user's network, and one that is held against it": 3,
        "folded, prepared": 2,
        "a network for each bit-width": len(LIGHT["weight_bits"]),
        "the table's": 1,
        "schemes": schemes,
        "ranges, candidates, solved and tuned ones of the chosen one, and one with edge ranges of its own": 5,
    }
    assert work == {"passes": sum(passes.values()), "copies": sum(copies.values())}
