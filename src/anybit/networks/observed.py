"""Observe, fold and prepare a float network; every road starts from the result."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from anybit.data.batches import Batch, evaluating, in_evaluation_mode, predict, read_output
from anybit.data.outputs import OutputReader
from anybit.errors import SchemeMismatch, UnsupportedModel
from anybit.networks import batchnorm
from anybit.networks.candidates import Candidates, activation_candidate, apply_scheme, weight_candidate
from anybit.networks.capture import input_samples
from anybit.networks.coarse import coarse_layers
from anybit.networks.cost import CostModel
from anybit.networks.edges import with_edges
from anybit.networks.layer_types import type_of
from anybit.networks.layers import check_float32, check_plain_use, coverage, float_weight, prepare, quantized_layers
from anybit.networks.options import LayerOptions, group_sizes, layer_choices
from anybit.networks.refusals import (
    changed,
    check_curvature,
    check_differentiable,
    check_network,
    check_outputs,
    check_runs_again,
    moving_state,
    observed_pass,
)
from anybit.networks.rewrites import calls_functions, rewritten
from anybit.networks.states import check_finite_weights, check_sizes, restore, state_of
from anybit.networks.wiring import Unit, Wiring
from anybit.numerics.bits import MAX_BITS
from anybit.scheme import FLOAT, Precision, Scheme, match_patterns


@dataclass(frozen=True)
class ObservedNetwork:
    """A float network, folded, with empty slots, and observed. No stage changes it, except for buffers that the network's own forward
    changes: `moving` holds their values from before any pass. `unfolded` are the norms that stay, with the reason; `unread` the layers on
    which no compared output depends; `coarse` those whose inputs a few bits cannot resolve."""

    float_model: nn.Module
    folded: nn.Module
    prepared: nn.Module
    wiring: Wiring
    norms: Mapping[str, str]
    promised: Mapping[str, batchnorm.ChannelStatistics]
    choices: Mapping[str, Sequence[Precision]]
    uncovered: Mapping[str, str]
    units: Sequence[Unit]
    costs: CostModel
    options: LayerOptions
    moving: Mapping[str, Tensor | None] = field(default_factory=dict)
    unfolded: Mapping[str, str] = field(default_factory=dict)
    unread: Sequence[str] = ()
    coarse: Mapping[str, float] = field(default_factory=dict)

    @property
    def calls(self) -> dict[str, int]:
        """Return layer -> number of calls per pass, except for layers that stay entirely float."""
        return {name: self.wiring.calls[name] for name, options in self.choices.items() if options != [FLOAT]}

    @property
    def names(self) -> list[str]:
        """Return the layers of the scheme, in call order."""
        return list(self.choices)

    @property
    def largest(self) -> Scheme:
        """Return the scheme with every layer's last choice."""
        return Scheme({name: options[-1] for name, options in self.choices.items()})

    @property
    def smallest(self) -> Scheme:
        """Return the scheme with every layer's first choice."""
        return Scheme({name: options[0] for name, options in self.choices.items()})

    def wider(self) -> dict[int, Scheme]:
        """Return bits -> the largest scheme if layers that no pattern fixes might get so many, for all bits above their own."""
        pinned = match_patterns(self.options.keep, self.choices)
        free = {name: options[-1] for name, options in self.choices.items() if name not in pinned and options[-1].weight_bits}
        own = max((precision.weight_bits or 0 for precision in free.values()), default=MAX_BITS)
        return {
            bits: self.largest.replace({name: Precision(bits, precision.activation_bits) for name, precision in free.items()})
            for bits in range(own + 1, MAX_BITS + 1)
        }

    def apply(self, scheme: Scheme, candidates: Candidates) -> nn.Module:
        """Return the canonical form of `scheme` from `candidates`, with its edges rounded."""
        return with_edges(apply_scheme(self.prepared, scheme, candidates), self.wiring, candidates.edges)

    def uniform(self, weight_bits: int, activation_bits: int | None) -> Scheme:
        """Return the scheme with these bits everywhere, except in kept layers; embeddings have no activation bits, matmuls no weight
        bits."""
        precisions = (Precision(weight_bits, activation_bits), Precision(weight_bits, None), Precision(None, activation_bits))
        return Scheme({n: next((p for p in precisions if p in options), options[0]) for n, options in self.choices.items()})


def observe_network(model: nn.Module, example: Batch, options: LayerOptions) -> ObservedNetwork:
    """Observe, check, fold and prepare copies of `model`; `example` is a small batch of inputs."""
    check_network(model)
    check_finite_weights(model)
    covered, _ = coverage(model)
    # Before a mismatched type makes the network reject its input.
    known = replace(options, keep={pattern: kept for pattern, kept in options.keep.items() if fnmatch.filter(covered, pattern)})
    check_float32(model, [name for name in covered if name not in known.float_layers(covered)])  # functions are no layers yet
    before = state_of(model)
    first = observed_pass(model, example)
    if calls_functions(model, first.wiring):
        _put_buffers_back(model, before)
        model = rewritten(model, example)
        before, first = state_of(model), observed_pass(model, example)
    names, uncovered = coverage(model, first.wiring)
    if not names:
        others = "".join(f" {name}: {why}." for name, why in uncovered.items())
        raise UnsupportedModel(f"The model has no layer to quantize: no convolution, linear or embedding ran on the data.{others}")
    pinned, float_layers = match_patterns(options.keep, names), options.float_layers(names)
    check_plain_use(first.wiring, [name for name in names if name not in float_layers])
    moving, last = moving_state(model, example, before, first)
    with torch.no_grad():
        outputs = read_output(last.output, example)
    check_outputs(model, outputs, example)
    fold = batchnorm.fold_checked(model, batchnorm.foldable(model, first.wiring), example, outputs)
    folded, norms, wiring = fold.model, fold.norms, fold.wiring
    check_runs_again(names, wiring)
    unfolded = batchnorm.unfolded(model, first.wiring, norms)
    for network in (model, folded):
        restore(network, moving)
    prepared = prepare(folded, names, float_layers, group_sizes(folded, [name for name in names if name not in norms], options.group))
    layers = quantized_layers(prepared)
    check_sizes({name: layers[name] for name in names if name not in float_layers})
    constant = wiring.constant_layers()
    choices = {name: layer_choices(layers[name], pinned.get(name), options, name in constant) for name in names}
    blocks = wiring.blocks(list(options.blocks) if options.blocks is not None else None) if options.unit == "block" else []
    fitted = {name for name in names if type_of(layers[name]).sums and any(p.weight_bits for p in choices[name])}
    units = [unit for unit in wiring.units(names, blocks) if fitted & set(unit.layers)]
    costs = CostModel.of(prepared, names, wiring, len(wiring.edges()), model)
    if options.gradients:
        check_differentiable(prepared, [unit.name for unit in units if unit.name not in names], example)
    unread = unread_layers(folded, wiring, [name for name in names if choices[name] != [FLOAT]], example)
    if options.curvature:
        check_curvature(prepared, [name for name in names if len(choices[name]) > 1 and name not in unread], example)
    return ObservedNetwork(
        model, folded, prepared, wiring, norms, fold.promised, choices, uncovered, units, costs, options, moving, unfolded, unread
    )


@torch.no_grad()
def unread_layers(model: nn.Module, wiring: Wiring, names: Sequence[str], example: Batch) -> list[str]:
    """Return those of the layers on which no compared output depends: without their weights, the outputs are bitwise the same."""
    reader = example.reader
    places = [one.place for one in reader.outputs] if isinstance(reader, OutputReader) else None if reader is not None else [0]
    behind = wiring.layers_behind(places)
    suspects = [name for name in names if name not in behind and type_of(model.get_submodule(name)).has_weights]
    if not suspects:
        return []

    def is_unread(name: str) -> bool:
        weight = float_weight(model.get_submodule(name))
        own = weight.clone()
        weight.zero_()
        try:
            return torch.equal(predict(model, example), before)
        finally:
            weight.copy_(own)

    with evaluating(model):
        before = predict(model, example)
        return list(filter(is_unread, suspects))


def _put_buffers_back(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Undo a pass's changes to buffers; no pass may change parameters."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    restore(model, {key: tensor for key, tensor in changed(before, model.state_dict()).items() if key not in parameters})


def unobserved_network(model: nn.Module, options: LayerOptions) -> ObservedNetwork:
    """Describe `model` before any input is seen: not folded, without units or shapes."""
    check_network(model)
    check_finite_weights(model)
    names, uncovered = coverage(model)
    if not names:
        raise UnsupportedModel("The model has no layer to quantize: no convolution, linear or embedding.")
    pinned, float_layers = match_patterns(options.keep, names), options.float_layers(names)
    prepared = prepare(model, names, float_layers, group_sizes(model, names, options.group))
    layers = quantized_layers(prepared)
    choices = {name: layer_choices(layers[name], pinned.get(name), options) for name in names}
    costs = CostModel.of(prepared, names, None, 0, model)
    return ObservedNetwork(model, model, prepared, Wiring((), {}, {}, (), (), 0), {}, {}, choices, uncovered, [], costs, options)


def check_kinds(scheme: Scheme, network: ObservedNetwork) -> None:
    """Raise SchemeMismatch if a scheme gives bits to an operand that the layer lacks."""
    for name, precision in scheme.items():
        layer = network.folded.get_submodule(name)
        kind = type_of(layer)
        possible = Precision(precision.weight_bits if kind.has_weights else None, precision.activation_bits if kind.reads_numbers else None)
        if precision != possible:
            raise SchemeMismatch(f"{name} {kind.refusal}: write {possible}.")


def with_coarse(network: ObservedNetwork, batch: Batch) -> ObservedNetwork:
    """Return the network with the layers whose inputs a few bits cannot resolve on `batch`."""
    return replace(network, coarse=coarse_layers(network.folded, network.wiring, activation_bits(network), batch))


def activation_bits(network: ObservedNetwork) -> dict[str, int]:
    """Return layer -> the most bits that its input may have, for layers whose input may be quantized."""
    most = {name: [p.activation_bits for p in choices if p.activation_bits] for name, choices in network.choices.items()}
    return {name: max(bits) for name, bits in most.items() if bits}


def has_choice(network: ObservedNetwork) -> bool:
    """Return whether any layer has more than one precision to choose from."""
    return any(len(precisions) > 1 for precisions in network.choices.values())


def rounded_to_nearest(network: ObservedNetwork, batches: Sequence[Batch], scheme: Scheme) -> nn.Module:
    """Round to nearest over whole ranges and return the canonical model: for speed and size, when accuracy does not matter."""
    samples, layers = input_samples(network.folded, network.names, batches, 2**12, 0), quantized_layers(network.prepared)
    candidates = Candidates()
    for name, precision in scheme.items():
        if bits := precision.weight_bits:
            candidates.weights[name, bits] = weight_candidate(layers[name], bits, "minmax")
        if bits := precision.activation_bits:
            candidates.activations[name, bits] = activation_candidate(samples[name], bits, "minmax")
    return in_evaluation_mode(apply_scheme(network.prepared, scheme, candidates))
