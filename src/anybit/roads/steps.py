"""Steps of calibrate, each a function of (network, data, settings) that changes none of its arguments."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from anybit.allocation.choice import Choice, Judge, choose_scheme
from anybit.allocation.sensitivity import SensitivityTable
from anybit.budget import Budget
from anybit.data.batches import Labels
from anybit.data.samples import Calibration, Samples
from anybit.data.tasks import LabelledOutputs, Metric, Task
from anybit.environment import StageClock
from anybit.errors import InvalidFile
from anybit.files.cache import Cache
from anybit.loops.closed_form import solve_weight
from anybit.loops.moments import float_moments
from anybit.loops.reconstruction import ReconstructionSettings, parallel
from anybit.methods import batchnorm_tuning
from anybit.methods.table import rounding_named, sensitivity_named, solver_named
from anybit.networks import batchnorm
from anybit.networks.candidates import (
    Candidates,
    activation_candidate,
    apply_scheme,
    check_finite_samples,
    frozen_candidate,
    weight_candidate,
)
from anybit.networks.capture import MemoryBudget, input_samples
from anybit.networks.edges import edge_grids, observe_edge_ranges, read_codes
from anybit.networks.integers import rounded_edges
from anybit.networks.layer_types import type_of
from anybit.networks.layers import float_weight, quantized_layers, weight_rows
from anybit.networks.observed import ObservedNetwork
from anybit.networks.states import restore
from anybit.progress import tell, track
from anybit.roads.memory import OBSERVED, memory_to_capture, samples_at_once
from anybit.roads.settings import CalibrateSettings
from anybit.scheme import Precision, Scheme

FINE = 8
"""Bit-width from which weights are rounded to nearest: a solver is only worth its time for coarser grids."""


def worth_solving(scheme: Mapping[str, Precision]) -> bool:
    """Return whether some layer's grid is coarse enough for a solver."""
    return any(bits is not None and bits < FINE for one in scheme.values() for bits in (one.weight_bits, one.activation_bits))


def range_candidates(network: ObservedNetwork, calibration: Calibration, settings: CalibrateSettings) -> Candidates:
    """Return every layer's weights rounded to nearest at each of its bit-widths, and its input range at each activation bit-width."""
    samples = finite_samples(network, calibration, settings)
    layers = quantized_layers(network.prepared)
    edges = rounded_edges(network.wiring, layers, network.largest)
    candidates = Candidates(edges=edge_candidates(network, calibration, settings))
    grids = edge_grids(candidates.edges, edges.names)
    for name, choices in network.choices.items():
        precisions = [*choices, settings.sensitivity_base] if len(choices) > 1 else choices
        for bits in sorted({p.weight_bits for p in precisions if p.weight_bits}):
            candidates.weights[name, bits] = weight_candidate(layers[name], bits, settings.estimator)
        for bits in sorted({p.activation_bits for p in precisions if p.activation_bits}):
            candidate = candidates.activations[name, bits] = activation_candidate(samples[name], bits, settings.estimator)
            if bits == 8:
                read_codes(candidate.scale, candidate.zero_point, edges.reads.get(name, ()), grids)
    return candidates


def edge_candidates(network: ObservedNetwork, calibration: Calibration, settings: CalibrateSettings) -> dict[str, tuple[float, float]]:
    """Return the range of every edge in the float network, with least squared error if the largest scheme rounds the edge."""
    searched = rounded_edges(network.wiring, quantized_layers(network.prepared), network.largest).names
    chunk_size = samples_at_once(network.wiring, OBSERVED, settings.memory, settings.batch_size)
    return observe_edge_ranges(network.folded, network.wiring, calibration.fitting, chunk_size, searched, settings.seed)


def solved_candidates(network: ObservedNetwork, ranged: Candidates, calibration: Calibration, settings: CalibrateSettings) -> Candidates:
    """Return the candidates with codes below 8 bits chosen by the solver, on the float network's inputs, with one pass for all
    bit-widths."""
    solver = solver_named(settings.solver)
    assert solver is not None
    names = sorted({name for name, bits in ranged.weights if bits < FINE}, key=network.names.index)
    budget = MemoryBudget(memory_to_capture(network, calibration, settings))
    moments = float_moments(network.folded, names, calibration.fitting, calibration.count()[0], settings.seed, budget)
    solved = replace(ranged, weights=dict(ranged.weights))
    for name in track(list(moments), "solution of candidates", str):
        read, float_layer = moments.pop(name), network.folded.get_submodule(name)
        for (layer, bits), rounded in ranged.weights.items():
            if layer == name and bits < FINE:
                solved.weights[name, bits] = solve_weight(float_layer, rounded.codes, rounded.scale, bits, read, solver)
    return solved


def finite_samples(network: ObservedNetwork, calibration: Calibration, settings: CalibrateSettings) -> dict[str, list[Tensor]]:
    """Return values of each layer's input on the fitting inputs. Raises InvalidInput naming the first layer with a non-finite input."""
    samples = input_samples(network.folded, network.calls, calibration.fitting, 2**17, settings.seed)
    check_finite_samples(samples)
    return samples


def batch_norm_targets(
    network: ObservedNetwork, calibration: Calibration, settings: CalibrateSettings
) -> Mapping[str, batchnorm.ChannelStatistics]:
    """Return the target statistics of every folded layer's outputs: the float network's on the fitting inputs, or beta and |gamma|."""
    if settings.bn_target == "prior":
        return network.promised
    return batchnorm.channel_statistics(network.folded, network.norms, calibration.fitting)


def matched_candidates(
    network: ObservedNetwork,
    candidates: Candidates,
    targets: Mapping[str, batchnorm.ChannelStatistics],
    calibration: Calibration,
    prior_weight: float = 0.0,
) -> Candidates:
    """Return the candidates with every layer's output statistics matched to the float network's (batch-norm tuning, layer by layer)."""
    variants = _variants(network, candidates)
    batchnorm_tuning.match_layers(network.folded, list(variants.values()), targets, calibration.fitting, prior_weight)
    return _with_weights_of(variants, network, candidates)


def _variants(network: ObservedNetwork, candidates: Candidates) -> dict[int, nn.Module]:
    """Return bits -> the network with the candidates of these bits as weights, for layers that have one, and float activations."""
    variants = {}
    for bits in sorted({bits for _, bits in candidates.weights}):
        scheme = {name: Precision(bits, None) for name in network.names if (name, bits) in candidates.weights}
        variants[bits] = apply_scheme(network.prepared, Scheme(scheme), candidates)
    return variants


def _with_weights_of(variants: Mapping[int, nn.Module], network: ObservedNetwork, candidates: Candidates) -> Candidates:
    """Return candidates with weights from `variants`, and activation ranges from `candidates`."""
    changed = replace(candidates, weights=dict(candidates.weights))
    for bits, model in variants.items():
        for name in network.names:
            if (name, bits) in candidates.weights:
                changed.weights[name, bits] = frozen_candidate(model.get_submodule(name))
    return changed


def free_weights(network: ObservedNetwork, ranged: Candidates, scheme: Mapping[str, Precision]) -> dict[str, Tensor]:
    """Return each layer's float weight in units of its estimated scale, [channels, fan-in], from which reconstruction starts."""
    starts = {}
    for name, precision in scheme.items():
        if precision.weight_bits:
            layer = network.prepared.get_submodule(name)
            rows = weight_rows(layer, float_weight(layer)).detach()
            starts[name] = rows / ranged.weights[name, precision.weight_bits].scale
    return starts


def reconstructed_candidates(
    network: ObservedNetwork,
    candidates: Candidates,
    ranged: Candidates,
    calibration: Calibration,
    settings: CalibrateSettings,
    cache: Cache = Cache(),
) -> tuple[Candidates, dict]:
    """Reconstruct every layer separately, at every candidate bit-width; returns (candidates, each layer's errors)."""
    variants = _variants(network, candidates)
    starts = {
        bits: free_weights(network, ranged, {n: Precision(bits) for n in network.names if (n, bits) in candidates.weights})
        for bits in variants
    }
    layers = quantized_layers(network.prepared)
    free = [name for name, options in network.choices.items() if type_of(layers[name]).sums and any(p.weight_bits for p in options)]
    units = network.wiring.units(free, [])
    loop = reconstruction_settings(network, calibration, settings, settings.candidate_steps)
    errors = parallel(variants, network.folded, units, starts, network.wiring, calibration, loop, cache)
    return _with_weights_of(variants, network, candidates), errors


def reconstruction_settings(
    network: ObservedNetwork, calibration: Calibration, settings: CalibrateSettings, steps: int
) -> ReconstructionSettings:
    """Return the settings of the reconstruction loop."""
    return ReconstructionSettings(
        rounding_named(settings.rounding),
        solver_named(settings.solver),
        steps=steps,
        batch_size=settings.step_batch,
        drop=settings.drop,
        seed=settings.seed,
        memory=memory_to_capture(network, calibration, settings),
    )


def sensitivity_table(
    network: ObservedNetwork,
    candidates: Candidates,
    calibration: Calibration,
    reference: Tensor,
    task: Task | str,
    settings: CalibrateSettings,
    cache: Cache = Cache(),
) -> SensitivityTable:
    """Return the sensitivity table, measured or predicted on the held-out inputs."""
    measuring = {"base": settings.sensitivity_base, "pairs": settings.pairs} if settings.sensitivity == "measured" else {}
    edges = rounded_edges(network.wiring, quantized_layers(network.prepared), network.largest)
    return sensitivity_named(settings.sensitivity)(
        network.prepared, candidates, network.choices, calibration.held_out, reference, task, cache=cache,
        edges=edge_grids(candidates.edges, edges.names), **measuring,
    )  # fmt: skip


KNOWN = 30
"""Least labelled samples on which an accuracy is compared with chance."""


@dataclass(frozen=True)
class FloatTest:
    """Labelled test data, with the float network's outputs and scores on it."""

    samples: Samples
    outputs: Tensor
    scores: Mapping[str, Any]
    note: str = ""


def float_tested(
    network: ObservedNetwork, tests: Samples, task: Task, metric: Metric | None, batch_size: int, clock: StageClock
) -> FloatTest:
    """Score the float network before the long work, so that bad labels or a failing metric do not waste it."""
    with clock.stage("float test"):
        on_tests = LabelledOutputs.of(network.float_model, tests.batches(batch_size))
        restore(network.float_model, network.moving)
        scores = on_tests.scores(task, metric)
        note = chance_in_words(on_tests.outputs, on_tests.labels, task, "test data")
        return FloatTest(tests, on_tests.outputs, scores, note)


def chance_in_words(outputs: Tensor, labels: Labels, task: Task, where: str) -> str:
    """Write a note on a network that classifies no better than by always naming the most frequent class; empty where it does, or where
    the samples are too few to know. Weights that were not loaded show by this."""
    outputs = task.judged(outputs)
    if (
        not isinstance(labels, Tensor)
        or task.counted != "top1"
        or labels.dim() != 1
        or labels.is_complex()
        or outputs.dim() != 2
        or len(labels) < KNOWN
    ):
        return ""
    right = float((outputs.argmax(1).cpu() == labels.cpu()).double().mean())
    frequent = float(labels.unique(return_counts=True)[1].max()) / len(labels)
    if frequent == 1 or right > frequent + 2 * math.sqrt(frequent * (1 - frequent) / len(labels)):
        return ""
    return (
        f"the float network's top-1 accuracy on the {where} is {100 * right:.1f} %, which {len(labels)} samples do not distinguish "
        f"from always naming the most frequent class ({100 * frequent:.1f} %): its weights may not be loaded (--weights=FILE), or the "
        "labels numbered otherwise than its outputs"
    )


def notes_on_chance(float_test: FloatTest | None, outputs: Tensor, labels: Labels | None, task: Task) -> list[str]:
    """Print and return the note on a float network that is at chance on the test data, or else on held-out inputs with `labels`."""
    note = float_test.note if float_test else "" if labels is None else chance_in_words(outputs, labels, task, "held-out inputs")
    if note:
        tell("note", note=note)
    return [note] if note else []


def chosen_scheme(state: "CalibrationState", budget: Budget | None) -> Choice:
    """Return the result of `choose_scheme`, or the one that an earlier run stored."""
    network, judge = state.network, state.judge
    latency = None if network.costs.latency is None else asdict(network.costs.latency)
    cache = judge.cache.keyed("allocation", budget and str(budget), state.settings.alternatives, latency)

    def read(record: Mapping[str, Any]) -> Choice:
        choice = Choice.from_json(record)
        for scheme in (choice.scheme, *(row["scheme"] for row in choice.measured)):
            if set(scheme) != set(network.choices):
                raise InvalidFile("its layers are not the network's")
        return choice

    return cache.value(
        "allocation", lambda: choose_scheme(network, state.table, budget, state.settings.alternatives, judge).to_json(), read
    )


@dataclass(frozen=True)
class CalibrationState:
    """The state that all budgets of one run share.

    ranged         candidates rounded to nearest with estimated ranges; `candidates` those after matching and parallel reconstruction
    matched        candidates after matching, if parallel reconstruction followed; else None
    targets        target statistics of each folded layer's outputs
    references     the float network's outputs, one tensor per fitting batch
    errors         parallel reconstruction's errors, by layer and bits
    notes          on the float network, for the report
    float_test     the float network on the test data, or None
    """

    network: ObservedNetwork
    calibration: Calibration
    settings: CalibrateSettings
    ranged: Candidates
    candidates: Candidates
    table: SensitivityTable
    judge: Judge
    targets: Mapping[str, batchnorm.ChannelStatistics]
    references: Sequence[Tensor] = ()
    matched: Candidates | None = None
    errors: Mapping[str, Any] = field(default_factory=dict)
    float_test: FloatTest | None = None
    notes: Sequence[str] = ()
