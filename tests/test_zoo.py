"""The harness for public networks: random weights that do not hide errors, realistic inputs, failures with their kind."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import anybit
from benchmarks.tables.zoo import apart, failure_of, row_of
from benchmarks.zoo.__main__ import NETWORKS
from benchmarks.zoo.inputs import Inputs, Source, images
from benchmarks.zoo.lively import enliven
from benchmarks.zoo.network import ZooNetwork
from benchmarks.zoo.steps import Reference, run_steps


class NoisySource(Source):
    def normalized_images(self, count, size):
        return torch.randn(count, 3, size, size, generator=self.generator())


def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()


def steps_of(build, inputs=images(8)):
    entries = []
    run_steps(ZooNetwork(build, inputs), NoisySource(), False, lambda entry: entries.append(dict(entry)))
    return entries[-1]


def test_the_tables_name_many_networks_without_their_libraries():
    for library, least in (("torchvision", 30), ("timm", 80), ("transformers", 100)):
        assert sum(name.startswith(library) for name in NETWORKS) >= least


def test_lively_norms_vary_by_channel_and_have_the_statistics_of_their_inputs():
    network, inputs = small(), torch.randn(16, 3, 8, 8)
    nn.init.zeros_(network[1].weight)  # as in the last norm of a residual block
    enliven(network, inputs, 0)
    norm = network[1]
    assert norm.weight.min() >= 0.3 and norm.weight.std() > 0.05 and norm.bias.std() > 0.05
    seen = network[0](inputs).transpose(0, 1).flatten(1)
    assert (norm.running_mean - seen.mean(1)).abs().max() < 0.5 * seen.std(1).max()
    assert (norm.running_var / seen.var(1)).log().abs().max() < 1


def test_texts_have_different_lengths_and_are_padded_to_the_longest():
    batch = next(iter(Inputs(vocabulary=99, padding=1).loader(Source())))
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape == (8, int(lengths.max())) and len(set(lengths.tolist())) > 2
    assert ((batch["input_ids"] == 1) == (batch["attention_mask"] == 0)).all()


def test_entry_has_the_coverage():
    entry = steps_of(small)
    assert entry["failures"] == [] and entry["covered"] == 1.0 and entry["layers"] == 2
    assert entry["macs"] == 8 * 27 * 36 + 8 * 36 * 4


@pytest.mark.parametrize(("error", "kind"), [(anybit.UnsupportedModel("no, thank you"), "refusal"), (KeyError("lost"), "crash")])
def test_failure_is_recorded_with_its_kind(monkeypatch, error, kind):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr(anybit, "inspect", failing)
    entry = steps_of(small)
    (failure,) = entry["failures"]
    assert (failure["step"], failure["kind"], failure["class"]) == ("inspect", kind, type(error).__name__)
    assert "covered" not in entry and "running" not in entry
    assert failure_of(entry).startswith(f"inspect: {kind}: ")


def test_decibels_weight_outputs_equally():
    reference = Reference([], [[torch.ones(2, 3), 1000 * torch.ones(2)]])
    assert reference.decibels([[1.1 * torch.ones(2, 3), 1100 * torch.ones(2)]]) == pytest.approx(20)


def test_row_is_empty_for_steps_not_reached():
    entry = {"seconds": {"inspect": 1.0}, "failures": [], "pass_seconds": 0.1, "covered": 0.5, "W8A8": {"simulation_db": 30.0}}
    assert apart(entry) is None
    assert row_of("a", entry) == ["`a`", "50.0 %", "", "30.0", "", "", "", "1", "10", ""]
