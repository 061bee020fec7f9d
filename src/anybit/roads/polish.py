"""Polish a scheme: sequential reconstruction, batch-norm tuning, bias tuning and edge ranges, each kept only if the held-out loss falls."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from anybit.allocation.choice import Judge, as_scores
from anybit.files.cache import Cache, Entry
from anybit.files.contents import digest
from anybit.loops.reconstruction import sequential
from anybit.methods import batchnorm_tuning
from anybit.methods.bias_tuning import BiasTuningSettings, tune_biases
from anybit.methods.table import rounding_named
from anybit.networks.capture import give_back
from anybit.networks.edges import Ends, as_ranges, observe_edge_ranges, with_edges
from anybit.networks.layers import quantized_layers
from anybit.networks.rounding import edge_grids as edge_grids_of
from anybit.networks.states import put_back, snapshot
from anybit.numerics.quantizers import UniformQuantizer
from anybit.progress import enter, tell
from anybit.roads.keys import PARALLEL, keyed_by_settings
from anybit.roads.memory import OBSERVED, TRAINED, samples_at_once, within_memory
from anybit.roads.steps import CalibrationState, free_weights, reconstruction_settings, worth_solving
from anybit.scheme import Scheme


@dataclass
class _Ladder:
    """The best network so far, its edges' ranges and every step's measurements; `cache` is keyed by all that the next step depends on."""

    judge: Judge
    cache: Cache
    model: nn.Module
    rows: list[dict[str, Any]]
    edges: Ends

    def climb(self, step: str, changed: nn.Module, names: Sequence[str], change: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Apply `change` to the layers `names` of `changed`, in place; keep `changed` if the held-out loss falls. Returns the step's
        record."""

        def make() -> Entry:
            record = change()
            with_edges(changed, self.judge.network.wiring, self.edges)  # layers that read codes may have learned their own ranges
            return Entry({"told": record, "measured": self.judge.of_model(changed)}, snapshot(changed, names))

        def read(entry: Entry) -> tuple[dict[str, Any], dict[str, float]]:
            record, scores = dict(entry.record["told"]), as_scores(entry.record["measured"])
            put_back(changed, names, entry.tensors)
            return record, scores

        enter(step)
        record, scores = self.cache(step, make, read)
        give_back()
        self.take(step, changed, {**scores, **{key: record[key] for key in record if key in ("images", "epochs")}})
        return record

    def take(self, step: str, changed: nn.Module, scores: Mapping[str, float]) -> bool:
        """Keep `changed` if its held-out loss is the lowest so far; returns whether it is."""
        better = scores["loss"] < next(row["loss"] for row in reversed(self.rows) if row["kept"])
        self.rows.append({"step": step, "kept": better, **scores})
        tell("step", **self.rows[-1])
        if better:
            self.model = changed
        return better


@dataclass(frozen=True)
class Polished:
    """The canonical model, the ranges of its edges, the ladder (each step's measurements and whether it was kept), and each unit's
    errors."""

    model: nn.Module
    edges: Ends
    ladder: list[dict[str, Any]]
    errors: dict[str, Any]


def polish_scheme(state: CalibrationState, scheme: Scheme) -> Polished:
    """Reconstruct, tune batch norm and biases of `scheme`, and observe its edges, keeping each step only if the held-out loss falls."""
    ladder, errors = _start(state, scheme), {}
    if state.settings.does("sequential") or (state.settings.solver != "none" and worth_solving(scheme)):
        errors = _reconstruct(state, scheme, ladder)
    if state.settings.bn_tuning and state.targets:
        _tune_batch_norm(state, ladder)
    if state.settings.does("bias_tuning"):
        _tune_biases(state, ladder)
    _observe_edges(state, ladder)
    return Polished(ladder.model, ladder.edges, ladder.rows, errors)


def _start(state: CalibrationState, scheme: Scheme) -> _Ladder:
    """Measure the scheme rounded to nearest and with the candidates; start from the better one."""
    judge, network = state.judge, state.network
    cache = judge.cache.keyed("polish", scheme.to_json())
    ranged, candidate = network.apply(scheme, state.ranged), network.apply(scheme, state.candidates)
    rounded = cache.value("ranges", lambda: judge.of_model(ranged), as_scores)
    matched = cache.value("candidates", lambda: judge.of_model(candidate), as_scores)
    better = not rounded["loss"] < matched["loss"]
    rows = [{"step": "ranges", "kept": not better, **rounded}, {"step": "candidates", "kept": better, **matched}]
    for row in rows:
        tell("step", **row)
    return _Ladder(judge, cache, candidate if better else ranged, rows, as_ranges(state.candidates.edges, network.wiring))


def _reconstruct(state: CalibrationState, scheme: Scheme, ladder: _Ladder) -> dict[str, Any]:
    """Reconstruct one unit after the other; returns each unit's errors."""
    network, calibration, settings = state.network, state.calibration, state.settings
    ladder.cache = keyed_by_settings(ladder.cache, settings, ("steps", "start", "sequential", "pipeline", *PARALLEL))
    changed, starts = sequential_start(state, scheme)
    steps = settings.steps if settings.does("sequential") else 0
    loop, units = reconstruction_settings(network, calibration, settings, steps), ladder.cache.keyed("units")
    if not worth_solving(scheme):
        loop = replace(loop, solver=None)
    fit = partial(sequential, changed, network.folded, network.units, starts, network.wiring, calibration, loop, units)
    return ladder.climb(f"sequential {loop.name}" if steps else "sequential solution", changed, list(starts), fit)


def _tune_batch_norm(state: CalibrationState, ladder: _Ladder) -> None:
    changed = copy.deepcopy(ladder.model)
    batches = within_memory(state.network.wiring, state.calibration.fitting, state.settings.memory)
    images = sum(map(len, batches))
    ladder.cache = ladder.cache.keyed("batch-norm tuning", state.settings.does("sequential"), images)

    def tune() -> dict[str, Any]:
        batchnorm_tuning.tune(changed, state.targets, batches, state.settings.bn_prior)
        return {"images": images}

    ladder.climb("batch-norm tuning", changed, list(state.targets), tune)


def _tune_biases(state: CalibrationState, ladder: _Ladder) -> None:
    settings, judge, calibration = state.settings, state.judge, state.calibration
    changed = copy.deepcopy(ladder.model)
    coded = [name for name, layer in quantized_layers(changed).items() if isinstance(layer.weight_quantizer, UniformQuantizer)]
    part = samples_at_once(state.network.wiring, TRAINED, settings.memory, settings.batch_size)
    ladder.cache = keyed_by_settings(ladder.cache, settings, ("tune_scales",)).keyed(part)
    tuning = BiasTuningSettings(scales=settings.tune_scales, seed=settings.seed, part=part)
    references = list(state.references)
    fit = partial(tune_biases, changed, calibration.fitting, references, calibration.held_out, judge.reference, judge.task, tuning)
    ladder.climb("bias tuning", changed, coded, fit)


def _observe_edges(state: CalibrationState, ladder: _Ladder) -> None:
    """Re-estimate the ranges of the edges in the finished network."""
    wiring, rounded = state.network.wiring, edge_grids_of(ladder.model)
    if not rounded:
        return
    enter("edge ranges")
    changed = copy.deepcopy(ladder.model)
    chunk_size = samples_at_once(wiring, OBSERVED, state.settings.memory, state.settings.batch_size)
    cache = ladder.cache.keyed("edges", digest(changed.state_dict().values()), chunk_size)
    observe = partial(observe_edge_ranges, changed, wiring, state.calibration.fitting, chunk_size, list(rounded), state.settings.seed)
    edges = cache.value("edge ranges", observe, partial(as_ranges, wiring=wiring))
    with_edges(changed, wiring, edges)
    scores = cache.value("edge ranges, measured", lambda: ladder.judge.of_model(changed), as_scores)
    if ladder.take("edge ranges", changed, scores):
        ladder.edges = edges


def sequential_start(state: CalibrationState, scheme: Scheme) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the start of sequential reconstruction: (model, free weights).

    After AdaQuant's parallel form, it starts at that form's codes: many trained weights rest beside a rounding threshold, where the next
    optimizer's first step would flip thousands of codes at once; a weight at its code stays until its gradient moves it. Otherwise (without
    the parallel form, with another rounding, or if `settings.start` says so) it starts at the float weights, with their estimated ranges or
    with matched statistics: matching widens the scales to restore each channel's deviation, which corrects shifted means at once but leaves
    more rounding error to undo.
    """
    start, network = state.settings.start, state.network
    free = free_weights(state.network, state.ranged, scheme)
    if start is None and state.matched is not None and rounding_named(state.settings.rounding).resumes:
        coded = {name: bits for name in free if (bits := scheme[name].weight_bits)}
        free = {name: state.candidates.weights[name, bits].codes.float() for name, bits in coded.items()}
        return network.apply(scheme, state.candidates), free
    matched = state.matched or state.candidates
    return network.apply(scheme, matched if start == "matched" else state.ranged), free
