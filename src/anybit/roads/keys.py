"""Cache keys: everything that a stored result depends on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from anybit.data.batches import Batch, Targets, first_tensor, tensors_in
from anybit.data.contents import contents_of_samples
from anybit.data.samples import Calibration, Samples
from anybit.data.tasks import Metric
from anybit.environment import code_version, machine
from anybit.files.cache import Cache, Entry
from anybit.files.contents import contents_of, digest, network_contents
from anybit.loops.checkpoint import CONTENTS
from anybit.networks.candidates import Candidates, from_tensors, to_tensors
from anybit.networks.layers import float_weight, quantized_layers, weight_rows
from anybit.networks.norms import BATCH_NORMS
from anybit.networks.observed import ObservedNetwork
from anybit.roads.settings import CalibrateSettings
from anybit.supernets.supernet import Supernet

# Settings by the first result that depends on them: earlier results survive a change. All others count from the beginning.
SOLVING = ("solver",)
MATCHING = ("bn_tuning", "bn_prior", "bn_target")
PARALLEL = ("rounding", "candidate_steps", "step_batch", "drop")
SENSITIVITY = ("pairs", "sensitivity")
LATER = ("pipeline", "parallel", "alternatives", "memory", "steps", "start", "sequential", "bias_tuning", "tune_scales")


def key_of_run(
    cache: Cache, network: ObservedNetwork, calibration: Calibration, outputs: Sequence[Tensor], settings: CalibrateSettings
) -> Cache:
    """Key `cache` by everything that a network's ranges depend on: its weights, code and attributes, inputs and float `outputs`, layers
    and choices, settings, anybit's code, and the machine."""
    early = {key: value for key, value in settings.to_json().items() if key not in (*SOLVING, *MATCHING, *PARALLEL, *SENSITIVITY, *LATER)}
    operations = [[op.name, op.kind, list(op.shape)] for op in network.wiring.operations]
    choices = {name: [str(precision) for precision in precisions] for name, precisions in network.choices.items()}
    units = [[unit.name, list(unit.layers)] for unit in network.units]
    return cache.keyed(
        code_version(), machine(first_tensor(calibration.fitting[0].inputs).device),
        digest(network.float_model.state_dict()), network_contents(network.float_model),
        data_digest(calibration), digest(outputs), operations, choices, units, early,
    )  # fmt: skip


def data_digest(calibration: Calibration) -> str:
    """Return the SHA-256 of the inputs and labels of a run, except labels that only a metric reads."""
    return _numbers_digest([*calibration.fitting, *calibration.held_out])


def _numbers_digest(batches: Sequence[Batch]) -> str:
    labels = [batch.labels if isinstance(batch.labels, Tensor) else None for batch in batches]
    return digest([tensor for batch, own in zip(batches, labels, strict=True) for tensor in tensors_in([batch.inputs, own])])


def metric_digest(metric: Metric | None, batches: Sequence[Batch]) -> str | None:
    """Return the SHA-256 of a custom metric and of the labels that only it reads; None without a metric."""
    targets = [batch.labels for batch in batches if isinstance(batch.labels, Targets)]
    return None if metric is None else contents_of(metric, reading=True) + (contents_of(targets) if targets else "")


def weights_digest(network: ObservedNetwork) -> str:
    """Return the SHA-256 of the float network's weights, without values that a pass changes, such as counters."""
    state = network.float_model.state_dict()
    return digest({name: one for name, one in state.items() if name not in network.moving and not name.endswith("num_batches_tracked")})


def keyed_by_settings(cache: Cache, settings: CalibrateSettings, names: Sequence[str]) -> Cache:
    """Key `cache` by these settings as well."""
    return cache.keyed({name: settings.to_json()[name] for name in names})


def cached_candidates(cache: Cache, name: str, network: ObservedNetwork, make: Callable[[], Candidates]) -> Candidates:
    """Return the candidates of `make`, or those that an earlier run stored."""
    layers = quantized_layers(network.prepared)
    rows = {layer: weight_rows(layers[layer], float_weight(layers[layer])) for layer in network.names}
    shapes = {layer: (len(one), one.shape[1]) for layer, one in rows.items()}
    device = str(next(network.prepared.parameters()).device)
    return cache(name, lambda: Entry(None, to_tensors(make())), lambda entry: from_tensors(entry.tensors, shapes).on(device))


def key_of_supernet(cache: Cache, supernet: Supernet, batches: Sequence[Batch], metric: Metric | None) -> Cache:
    """Key `cache` by everything that a score depends on besides the scheme: the supernet's tensors and code, all data, the metric's code.

    Values that change with the subnet are left out: the chosen bits, and batch-norm statistics, which follow from the data.
    """
    norms = tuple(f"{name}." for name, module in supernet.model.named_modules() if isinstance(module, BATCH_NORMS))
    fixed = {
        name: buffer
        for name, buffer in supernet.model.named_buffers()
        if name.endswith("_quantizer.start") or not (name.startswith(norms) or "_quantizer." in name)
    }
    numbers = dict(supernet.model.named_parameters()) | fixed
    return cache.keyed(
        code_version(), machine(first_tensor(batches[0].inputs).device), digest(numbers), network_contents(supernet.network),
        _numbers_digest(batches), supernet.settings.to_json(), metric_digest(metric, batches),
    )  # fmt: skip


def training_identity(model: nn.Module, samples: Samples, first: Batch, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that must agree to resume training: weights and code of the network, all data, every setting."""
    flat = {f"{key}.{k}" if isinstance(value, dict) else key: v for key, value in settings.items() for k, v in _items(value)}
    return {
        "weights": digest(model.state_dict().values()),
        "samples": len(samples),
        "data": digest(tensors_in([first.inputs, first.labels])),
        CONTENTS: contents_of_samples(samples),
        **{f"module {name}".strip(): contents for name, contents in network_contents(model).items()},
        **flat,
    }


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else [("", value)]
