"""Cache keys: everything that a stored result depends on."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from anybit.data.batches import Batch, tensors_in
from anybit.data.samples import Calibration, Samples
from anybit.data.tasks import Metric
from anybit.environment import code_version, machine
from anybit.files.cache import LIMIT, Cache, Entry, digest, results_folder, trim_cache
from anybit.networks.candidates import Candidates, from_tensors, to_tensors
from anybit.networks.layers import float_weight, quantized_layers, weight_rows
from anybit.networks.observed import ObservedNetwork
from anybit.progress import tell
from anybit.roads.settings import CalibrateSettings
from anybit.sources.callables import code_of
from anybit.supernets.supernet import Supernet

# Settings by the first result that depends on them: a change of one leaves what was made before it. All others count from the beginning.
SOLVING = ("solver",)
MATCHING = ("bn_tuning", "bn_prior", "bn_target")
PARALLEL = ("rounding", "candidate_steps", "step_batch", "drop")
SENSITIVITY = ("pairs",)
LATER = ("pipeline", "parallel", "alternatives", "memory", "steps", "start", "sequential", "bias_tuning", "tune_scales")


def key_of_run(
    recall: Cache, network: ObservedNetwork, calibration: Calibration, outputs: Sequence[Tensor], settings: CalibrateSettings
) -> Cache:
    """`recall` under all that the ranges of a network depend on: weights, inputs and float `outputs` (what the network's code does shows
    there), layers and choices, settings, and the code and machine that compute."""
    early = {key: value for key, value in settings.to_json().items() if key not in (*SOLVING, *MATCHING, *PARALLEL, *SENSITIVITY, *LATER)}
    data = [tensor for batch in [*calibration.fitting, *calibration.held_out] for tensor in tensors_in([batch.inputs, batch.labels])]
    operations = [[op.name, op.kind, list(op.shape)] for op in network.wiring.operations]
    choices = {name: [str(precision) for precision in precisions] for name, precisions in network.choices.items()}
    units = [[unit.name, list(unit.layers)] for unit in network.units]
    return recall.keyed(
        code_version(), machine(data[0].device), digest(network.float_model.state_dict().values()), digest(data), digest(outputs),
        operations, choices, units, early,
    )  # fmt: skip


def keyed_by_settings(recall: Cache, settings: CalibrateSettings, names: Sequence[str]) -> Cache:
    """`recall` under these settings too."""
    return recall.keyed({name: settings.to_json()[name] for name in names})


def cached_candidates(recall: Cache, name: str, network: ObservedNetwork, make: Callable[[], Candidates]) -> Candidates:
    """Candidates that `make` gives, or that an earlier run kept."""
    layers = quantized_layers(network.prepared)
    rows = {layer: weight_rows(layers[layer], float_weight(layers[layer])) for layer in network.names}
    shapes = {layer: (len(one), one.shape[1]) for layer, one in rows.items()}
    device = str(next(network.prepared.parameters()).device)
    return recall(name, lambda: Entry(None, to_tensors(make())), lambda kept: from_tensors(kept.tensors, shapes).on(device))


def open_cache(cache: str | Path | bool) -> Cache:
    """Results kept in this folder, in the user's cache directory (True), or not at all."""
    if isinstance(cache, bool):
        return Cache(results_folder() if cache else None)
    return Cache(Path(cache))


def settle(recall: Cache) -> None:
    """Tell what was taken up, and keep the cache within its limit."""
    if recall.counts["recalled"]:
        made = recall.counts["made"]
        tell("note", note=f"{recall.counts['recalled']} results taken up from the cache, {made} made anew")
    if recall.folder is not None:
        trim_cache(recall.folder, LIMIT)


def key_of_supernet(recall: Cache, supernet: Supernet, samples: Samples, metric: Metric | None) -> Cache:
    """`recall` under what a score depends on besides the scheme: the supernet's numbers, the data, the metric's code."""
    first = next(samples.on("cpu").subset(range(min(64, len(samples)))).batches(64))
    numbers = [*supernet.model.parameters(), *(tensor for name, tensor in supernet.model.named_buffers() if name.endswith(".start"))]
    data = [len(samples), digest(tensors_in([first.inputs, first.labels]))]
    return recall.keyed(
        code_version(), machine(numbers[0].device), digest(numbers), data, supernet.settings.to_json(), metric and code_of(metric)
    )


def training_identity(model: nn.Module, samples: Samples, first: Batch, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that must agree to continue a training: weights, data (its length and some preprocessed inputs), every setting."""
    flat = {f"{key}.{k}" if isinstance(value, dict) else key: v for key, value in settings.items() for k, v in _items(value)}
    return {
        "weights": digest(model.state_dict().values()),
        "samples": len(samples),
        "data": digest(tensors_in([first.inputs, first.labels])),
        **flat,
    }


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else [("", value)]
