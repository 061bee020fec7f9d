"""Polish a scheme: sequential AdaQuant, batch-norm tuning and bias tuning, each kept only if held-out loss falls."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from anybit.allocation.choice import as_scores
from anybit.files.cache import Entry
from anybit.methods import batchnorm_tuning
from anybit.methods.adaquant import sequential
from anybit.methods.bias_tuning import BiasTuningSettings, tune_biases
from anybit.networks.candidates import apply_scheme
from anybit.networks.capture import give_back
from anybit.networks.layers import quantized_layers
from anybit.networks.states import put_back, snapshot
from anybit.numerics.quantizers import UniformQuantizer
from anybit.progress import tell
from anybit.roads.keys import PARALLEL, keyed_by_settings
from anybit.roads.memory import TRAINED, memory_to_capture, samples_at_once, within_memory
from anybit.roads.steps import CalibrationState, adaquant_settings, free_weights
from anybit.scheme import Scheme


def polish_scheme(bench: CalibrationState, scheme: Scheme) -> tuple[nn.Module, list[dict[str, Any]], dict[str, Any]]:
    """Sequential AdaQuant, batch-norm tuning and bias tuning of `scheme`, each kept only where the held-out error says so.

    Returns (the canonical model, the ladder: what was measured after each step and whether it was kept, each unit's errors).
    """
    network, calibration, settings, judge = bench.network, bench.calibration, bench.settings, bench.judge
    recall = judge.recall.keyed("polish", scheme.to_json())
    ranged = apply_scheme(network.prepared, scheme, bench.ranged)
    candidate = apply_scheme(network.prepared, scheme, bench.candidates)
    rounded = recall.value("ranges", lambda: judge.of_model(ranged), as_scores)
    matched = recall.value("candidates", lambda: judge.of_model(candidate), as_scores)
    better = not rounded["loss"] < matched["loss"]
    model, errors = (candidate if better else ranged), {}
    ladder = [{"step": "ranges", "kept": not better, **rounded}, {"step": "candidates", "kept": better, **matched}]
    for row in ladder:
        tell("step", **row)

    def offer(step: str, changed: nn.Module, names: Sequence[str], change: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """`change` works on the layers `names` of `changed`, in place; what it tells. The network is `changed` where that is better."""
        nonlocal model

        def make() -> Entry:
            told = change()
            return Entry({"told": told, "measured": judge.of_model(changed)}, snapshot(changed, names))

        def read(kept: Entry) -> tuple[dict[str, Any], dict[str, float]]:
            found = dict(kept.record["told"]), as_scores(kept.record["measured"])
            put_back(changed, names, kept.tensors)
            return found

        told, measured = recall(step, make, read)
        give_back()
        kept = measured["loss"] < next(row["loss"] for row in reversed(ladder) if row["kept"])
        ladder.append({"step": step, "kept": kept, **measured, **{key: told[key] for key in told if key in ("images", "epochs")}})
        tell("step", **ladder[-1])
        if kept:
            model = changed
        return told

    if settings.does("sequential"):
        recall = keyed_by_settings(recall, settings, ("steps", "start", *PARALLEL))
        changed, starts = sequential_start(bench, scheme)
        wanted = adaquant_settings(settings, settings.steps)
        room, units = memory_to_capture(network, calibration, settings), recall.keyed("units")
        fit = partial(sequential, changed, network.folded, network.units, starts, network.wiring, calibration, wanted, room, units)
        errors = offer("sequential AdaQuant", changed, list(starts), fit)
    if settings.bn_tuning and bench.targets:
        changed = copy.deepcopy(model)
        batches = within_memory(network.wiring, calibration.fitting, settings.memory)
        images = sum(map(len, batches))
        recall = recall.keyed("batch-norm tuning", settings.does("sequential"), images)

        def tune(changed: nn.Module = changed) -> dict[str, Any]:
            batchnorm_tuning.tune(changed, bench.targets, batches, settings.bn_prior)
            return {"images": images}

        offer("batch-norm tuning", changed, list(bench.targets), tune)
    if settings.does("bias_tuning"):
        changed = copy.deepcopy(model)
        coded = [name for name, layer in quantized_layers(changed).items() if isinstance(layer.weight_quantizer, UniformQuantizer)]
        part = samples_at_once(network.wiring, TRAINED, settings.memory, settings.batch_size)
        recall = keyed_by_settings(recall, settings, ("tune_scales",)).keyed(part)
        wanted = BiasTuningSettings(scales=settings.tune_scales, seed=settings.seed, part=part)
        references = list(bench.references)
        fit = partial(tune_biases, changed, calibration.fitting, references, calibration.held_out, judge.reference, judge.task, wanted)
        offer("bias tuning", changed, coded, fit)
    return model, ladder, errors


def sequential_start(bench: CalibrationState, scheme: Scheme) -> tuple[nn.Module, dict[str, Tensor]]:
    """Where sequential AdaQuant starts: (model, free weights).

    After the parallel form, at its codes: many trained weights rest beside a rounding threshold, where the next optimizer's first step
    would flip thousands of codes at once; a weight set to its code stays until its gradient says otherwise. Without it, or where
    `settings.start` asks for it, at the float weights, in their estimated ranges or with matched statistics: matching widens the scales
    to restore the deviation of each channel, which mends a shift of means at once and leaves more rounding error to undo.
    """
    free = free_weights(bench.network, bench.ranged, scheme)
    candidates = {None: bench.ranged, "ranges": bench.ranged, "matched": bench.matched or bench.candidates}[bench.settings.start]
    if bench.settings.start is None and bench.matched is not None:
        candidates = bench.candidates
        free = {name: candidates.weights[name, scheme[name].weight_bits].codes.float() for name in free}
    return apply_scheme(bench.network.prepared, scheme, candidates), free
