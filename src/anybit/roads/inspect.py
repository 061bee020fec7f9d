"""Inspect a network: its layers, coverage, and the cost of each bit-width."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from anybit.calls import public
from anybit.data.batches import Batch, check_finite, in_evaluation_mode
from anybit.environment import StageClock
from anybit.errors import InvalidInput, InvalidSetting
from anybit.exports.trial import try_export
from anybit.networks.copies import checked_copy
from anybit.networks.layers import float_weight
from anybit.networks.observed import ObservedNetwork, observe_network, unobserved_network
from anybit.networks.refusals import check_network
from anybit.progress import plan
from anybit.roads.settings import CalibrateSettings
from anybit.scheme import Precision
from anybit.settings import takes
from anybit.sources.inputs import check_outputs, compared, first_samples, samples_from
from anybit.sources.models import adapted_network, load_model

OBSERVING, EXPORTING = "observe and fold", "trial export"
"""Stages of an inspection, of which the second takes most of the time."""


@public
@takes(CalibrateSettings)
def inspect(
    model: nn.Module | str, data: Any = None, *, export: bool = True, cache: str | Path | bool = True, **settings: Any
) -> dict[str, Any]:
    """Return layers, shapes, coverage, the cost of each bit-width, and whether the network can be exported, as a dict.

    `data` needs one input. Without it, results of a forward pass are None (shapes of inputs and outputs, MACs, BOPs, folds, blocks),
    unused layers count as covered, and sizes are those without folding.

    export   try an ONNX export, which takes seconds of torch's exporter once per network
    cache    folder of the exported graph, as for `export`
    """
    chosen = CalibrateSettings.of(**settings)
    options = replace(chosen.options, gradients=False, curvature=False)
    model = load_model(model, None, chosen.task) if isinstance(model, str) else adapted_network(model)
    check_network(model)
    if data is None and chosen.outputs:
        raise InvalidSetting("--outputs has no effect without data, on which outputs are read. Leave it out, or give --data.")
    if data is None:
        network, trial = unobserved_network(model, options), {"ok": None, "reason": "it needs data"}
    else:
        clock = StageClock()
        plan([(OBSERVING, 1.0), *([(EXPORTING, 4.0)] if export else [])], measured=False)
        with clock.stage(OBSERVING):
            copied, batch = _observable(model, data, chosen.outputs)
            network = observe_network(copied, batch, options)
            check_outputs(copied, batch)
        trial = {"ok": None, "reason": "it was not tried"}
        if export:
            with clock.stage(EXPORTING):
                trial = try_export(network, batch, cache)
    blocks = {layer: unit.name for unit in network.units for layer in unit.layers if unit.name != layer}
    layers = {name: _layer_row(network, name, data is not None, blocks.get(name), options.weight_bits) for name in network.names}
    uniform = {bits: network.costs.summary(network.uniform(bits, options.activation_bits[-1])) for bits in options.weight_bits}
    for row in uniform.values() if data is None else ():
        row["bops"] = None
    return {
        "layers": layers,
        "uncovered": dict(network.uncovered),
        "unfolded": dict(network.unfolded),
        "unread": list(network.unread),
        "float_bytes": network.costs.float_bytes,
        "uniform": uniform,
        "export": trial,
    }


def _layer_row(network: ObservedNetwork, name: str, observed: bool, block: str | None, weight_bits: Sequence[int | None]) -> dict[str, Any]:
    """Describe a layer; without observation, results of a forward pass are None."""
    layer = network.float_model.get_submodule(name)
    return {
        "class": type(layer).__name__,
        "weight": list(float_weight(layer).shape),
        **_seen(network, name, observed),
        "folds": network.norms.get(name),
        "calls": network.wiring.calls[name] if observed else None,
        "block": block,
        "choices": [str(precision) for precision in network.choices[name]],
        "bytes": {bits: network.costs.layer_bytes(name, Precision(bits)) for bits in weight_bits},
    }


def _observable(model: nn.Module, data: Any, outputs: Mapping[str, float]) -> tuple[nn.Module, Batch]:
    samples = samples_from(data, 0, model=model)
    if len(samples) == 0:
        raise InvalidInput("The data set is empty. Give at least one input, or leave out --data.")
    network = in_evaluation_mode(checked_copy(model, first_samples(samples)))
    check_finite([first_samples(samples)])
    return network, first_samples(compared(network, samples, outputs))


def _seen(network: ObservedNetwork, name: str, observed: bool) -> dict[str, Any]:
    """Return a layer's shapes and multiply-accumulates for one sample; with several rows per sample, shapes start with their number."""
    if not observed:
        return {"input": None, "output": None, "macs": None}
    count = network.wiring.batch_size
    first = network.wiring.operation(name)
    shapes = {"input": first.read, "output": first.shape}
    single = {key: list(shape[1:] if not shape or shape[0] == count else (shape[0] // count, *shape[1:])) for key, shape in shapes.items()}
    return {**single, "macs": network.costs.layers[name].macs}
