"""Prepare a supernet: the network with switchable quantizers, its subnets, and its stored codes."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from anybit.data.batches import Batch
from anybit.data.samples import Samples
from anybit.errors import InvalidInput, InvalidSetting, SchemeMismatch
from anybit.loops.training import drawn_batches
from anybit.methods.multiquant import MultiQuant, SwitchableInput, SwitchableWeight
from anybit.methods.settings import MultiQuantSettings
from anybit.networks import batchnorm
from anybit.networks.candidates import activation_candidate, check_finite_samples
from anybit.networks.capture import input_samples
from anybit.networks.cost import CostModel
from anybit.networks.layers import QuantizedLayer, float_weight, from_rows, prepare, quantized_layers, weight_rows
from anybit.networks.observed import ObservedNetwork, observe_network
from anybit.networks.options import LayerOptions
from anybit.networks.refusals import as_observed
from anybit.numerics.bits import MAX_BITS
from anybit.numerics.quantizers import UniformQuantizer
from anybit.numerics.ranges import weight_scale
from anybit.scheme import FLOAT, Precision, Scheme
from anybit.supernets.settings import SupernetSettings
from anybit.supernets.store import STORE_BITS


def held_out_split(samples: Samples, settings: SupernetSettings) -> tuple[Samples, Samples]:
    """Return (training samples, samples that the search evaluates on), split by the training's seed."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(settings.train.seed)).tolist()
    count = min(max(1, round(len(samples) * settings.held_out)), len(samples) - 1)
    return samples.subset(order[count:]), samples.subset(order[:count])


def bn_batches(samples: Samples, settings: SupernetSettings) -> list[Batch]:
    """Return training inputs for batch-norm statistics, drawn once, augmented as in training; the same in every process."""
    if len(samples) < 2:
        raise InvalidInput(f"{len(samples)} training input(s) are too few for batch-norm statistics. Give at least 2; hundreds work well.")
    return drawn_batches(samples, settings.train, settings.bn_images)


def observe_supernet(model: nn.Module, example: Batch, settings: SupernetSettings) -> ObservedNetwork:
    """Return the float network observed and folded, each layer with the precisions to train."""
    pruned = next((pattern for pattern, precision in settings.keep.items() if precision.weight_bits == 0), None)
    if pruned is not None:
        raise InvalidSetting(f"--keep='{pruned}=W0': a supernet prunes no layer. Keep it at 2 to 8 bits, or float.")
    return observe_network(model, example, LayerOptions(settings.bits, settings.bits, settings.keep, gradients=True))


def make_multiquant(network: ObservedNetwork, batches: Sequence[Batch], settings: SupernetSettings, classes: int | None) -> MultiQuant:
    """Return the unfolded network with switchable quantizers in its slots, each bit-width with its range of least squared error."""
    unfolded = copy.deepcopy(network.float_model)
    batchnorm.flip_negative(unfolded, network.norms)
    model = prepare(unfolded, network.names, [name for name, options in network.choices.items() if options[0].weight_bits is None])
    with as_observed(network.folded, network.calls):
        samples = input_samples(network.folded, network.calls, batches, 2**17, settings.train.seed)
    check_finite_samples(samples)
    options = settings.multiquant
    for name, layer in quantized_layers(model).items():
        rows = weight_rows(layer, float_weight(layer)).detach()
        weights, inputs = bit_widths(network.choices[name])
        scales = {bits: weight_scale(rows if options.per_channel else rows.reshape(1, -1), bits) for bits in weights}
        starts = {bits: activation_candidate(samples[name], bits, "mse") for bits in inputs}
        fill_slots(layer, scales, {bits: (start.scale, start.zero_point) for bits, start in starts.items()}, options)
    return prepared_multiquant(model, network.choices, network.norms, settings, classes)


def prepared_multiquant(
    model: nn.Module, choices: Mapping, norms: Mapping[str, str], settings: SupernetSettings, classes: int | None
) -> MultiQuant:
    """Return the method on a network whose slots are filled."""
    method = MultiQuant(model, choices, settings.multiquant, classes, settings.train.seed)
    if settings.multiquant.batch_norm == "switch":
        method.switch_norms(norms)
    return method


def bit_widths(options: Sequence[Precision]) -> tuple[list[int], list[int]]:
    """Return the bit-widths of a layer's weights and of its input, ascending, without float."""
    return sorted({p.weight_bits for p in options if p.weight_bits}), sorted({p.activation_bits for p in options if p.activation_bits})


def fill_slots(
    layer: QuantizedLayer, scales: Mapping[int, Tensor], ranges: Mapping[int, tuple[Tensor, Tensor]], settings: MultiQuantSettings
) -> None:
    """Put switchable quantizers into a layer's slots if there are bits to switch."""
    layer.weight_quantizer = SwitchableWeight(scales, settings.step_rates) if scales else None
    layer.input_quantizer = SwitchableInput(ranges, settings.step_rates, settings.offset_rate > 0) if ranges else None


def uniform(choices: Mapping[str, Sequence[Precision]], bits: int) -> Scheme:
    """Return every layer at `bits`; kept layers, which have no choice, as they are. Raises SchemeMismatch if `bits` was not trained."""
    chosen = {}
    for name, options in choices.items():
        matching = [p for p in options if p != FLOAT and {p.weight_bits, p.activation_bits} <= {bits, None}]
        if not matching and len(options) > 1:
            trained = ", ".join(str(width) for width in bit_widths(options)[0] or bit_widths(options)[1])
            raise SchemeMismatch(f"{name} was not trained at {bits} bits. Choose from {trained}, or train again with those --bits.")
        chosen[name] = (matching or list(options))[0]
    return Scheme(chosen)


def bit_distance(one: Scheme, other: Scheme, costs: CostModel) -> float:
    """Return the mean difference in bits, of weights and inputs together, over all weights."""
    total = sum(size.weights for size in costs.layers.values())
    return sum(
        costs.layers[name].weights
        * (
            abs(one[name].stored_weight_bits - other[name].stored_weight_bits)
            + abs((one[name].activation_bits or 32) - (other[name].activation_bits or 32))
        )
        for name in one
    ) / (2 * total)


# The store


@torch.no_grad()
def to_store(method: MultiQuant) -> dict[str, tuple[Tensor, Tensor]]:
    """Round the shared weights to the store's 8 bits, in place; returns layer -> (int8 codes [rows, columns], step [rows, 1]).

    The step is the trained one of 8 bits, or else fits the largest weight of each row. Trained weights gather at the thresholds of low
    bit-widths: of the two codes around a weight, the nearest is taken unless the other preserves more of its lower codes.
    """
    stored = {}
    for name, layer in method.layers.items():
        weights = layer.weight_quantizer
        if isinstance(weights, SwitchableWeight):
            rows = weight_rows(layer, float_weight(layer))
            if MAX_BITS in weights.widths:
                scale = weights.scales()[weights.widths.index(MAX_BITS)].expand(len(rows), 1)
            else:
                scale = weight_scale(rows, STORE_BITS, "minmax")
            quantizer = UniformQuantizer(STORE_BITS, True, scale)
            nearest = quantizer.codes(rows)
            other = (nearest + torch.sign(rows / quantizer.scale - nearest)).clamp(*quantizer.limits)
            codes = torch.where(
                _changed_codes(weights, rows, quantizer.values(other)) < _changed_codes(weights, rows, quantizer.values(nearest)),
                other,
                nearest,
            )
            float_weight(layer).copy_(from_rows(layer, quantizer.values(codes)))
            stored[name] = (codes.to(torch.int8), quantizer.scale)
    return stored


def _changed_codes(weights: SwitchableWeight, rows: Tensor, rounded: Tensor) -> Tensor:
    """Count how many of a weight's codes rounding changes, with fewer bits taking precedence over more, [rows, columns]."""
    changed = torch.zeros_like(rows)
    for bits, scale in zip(weights.widths, weights.scales(), strict=True):
        quantizer = UniformQuantizer(bits, True, scale.expand(len(rows), 1))
        changed += (quantizer.codes(rows) != quantizer.codes(rounded)) * 4.0**-bits
    return changed
