"""Count the cost of a layer at a precision: bits, bytes of the file, BOPs. `budget.py` turns these counts into the quantities of a budget.

All counts are exact: `file_size` of a scheme is the size of the file on disk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from anybit.budget import cost_quantities
from anybit.networks.latency import LatencyTable
from anybit.networks.layer_types import type_of
from anybit.networks.layers import float_weight, rows_shape
from anybit.networks.states import STORED_TYPES, leftovers, spec_of
from anybit.networks.wiring import Wiring
from anybit.numerics.packing import PACKED_METADATA, PackedLayer, TensorSpec, file_bytes, layout, packed_bytes
from anybit.scheme import FLOAT_BITS, Precision, Scheme

HEADER_SLACK = 64
"""Most bytes of a file's header that depend on the choice (digits of offsets and shapes); reserved when bytes are limited."""


@dataclass(frozen=True)
class LayerSize:
    """A layer's weight as rows x columns, multiply-accumulates of one sample, and number of activation operands (two for a matmul)."""

    rows: int
    columns: int
    macs: int
    operands: int = 1

    @property
    def weights(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class CostModel:
    """Costs of every scheme of one prepared model.

    layers       name -> LayerSize, in the scheme's order
    leftover     float32 numbers of the state dict outside of covered weights (biases, norms, uncovered layers)
    others       entries of another type, stored under their own keys
    edges        number of stored edge ranges
    float_bytes  size of the float32 weights' file
    latency      measured on this machine, or None
    """

    layers: Mapping[str, LayerSize]
    leftover: int
    others: Mapping[str, TensorSpec]
    edges: int
    float_bytes: int
    latency: LatencyTable | None = None

    @classmethod
    def of(cls, prepared: nn.Module, names: list[str], wiring: Wiring | None, edges: int, float_model: nn.Module) -> "CostModel":
        """Count the costs of `prepared`, whose layers `names` have slots; `wiring` gives the shapes, `float_model` the size to compare
        with.

        Without a wiring, multiply-accumulates are unknown and count 0.
        """
        layers = {}
        for name in names:
            layer = prepared.get_submodule(name)
            macs = macs_per_sample(layer, name, wiring) if wiring else 0
            layers[name] = LayerSize(*rows_shape(layer), macs, type_of(layer).operands)
        float32 = [name for name in names if float_weight(prepared.get_submodule(name)).dtype == torch.float32]
        leftover, others = leftovers(prepared, float32)  # a weight of another type is stored under its own key
        numbers = sum(tensor.numel() for tensor in leftover.values())
        stored = {key: spec_of(t) for key, t in others.items()}
        layout([], edges, numbers, stored)  # raises for names that a file cannot hold
        float_state = {key: TensorSpec(STORED_TYPES[t.dtype], tuple(t.shape)) for key, t in float_model.state_dict().items()}
        return cls(layers, numbers, stored, edges, file_bytes(float_state))

    def weight_bits(self, scheme: Scheme) -> float:
        """Return the mean stored bits per weight."""
        total = sum(self.layers[name].weights for name in scheme)
        return sum(self.layers[name].weights * precision.stored_weight_bits for name, precision in scheme.items()) / total

    def bops(self, scheme: Scheme) -> int:
        """Return the bit operations of one sample."""
        return sum(self.layer_bops(name, precision) for name, precision in scheme.items())

    def layer_bops(self, name: str, precision: Precision) -> int:
        """Return multiply-accumulates times weight bits times activation bits; for a matmul, times the bits of both operands."""
        size, activation_bits = self.layers[name], precision.activation_bits or FLOAT_BITS
        return size.macs * (activation_bits if size.operands == 2 else precision.stored_weight_bits) * activation_bits

    def layer_bytes(self, name: str, precision: Precision) -> int:
        """Return the bytes that the layer's weight and quantizers add to the file, except for the header."""
        size = self.layers[name]
        inputs = 5 * size.operands if precision.activation_bits else 0
        if precision.weight_bits is None:
            return size.weights * 4 + inputs
        return packed_bytes(size.weights, precision.weight_bits) + (4 * size.rows if precision.weight_bits else 0) + inputs

    def file_size(self, scheme: Scheme) -> int:
        """Return the exact bytes of model.safetensors."""
        stored = [
            PackedLayer(size.rows, size.columns, precision.weight_bits, size.operands * bool(precision.activation_bits))
            for name, precision in scheme.items()
            for size in [self.layers[name]]
        ]
        float_layers = sum(
            self.layers[name].weights
            for name, precision in scheme.items()
            if precision.weight_bits is None and f"{name}.weight" not in self.others
        )
        return file_bytes(layout(stored, self.edges, self.leftover + float_layers, self.others), PACKED_METADATA)

    def overhead(self, scheme: Scheme) -> int:
        """Return the bytes of the file that no choice of bits changes, up to a few bytes of header."""
        return self.file_size(scheme) - sum(self.layer_bytes(name, precision) for name, precision in scheme.items())

    def fixed_bytes(self, choices: Mapping[str, Sequence[Precision]]) -> int:
        """Return the bytes of the file that no choice of bits changes, up to `HEADER_SLACK` of header."""
        most = {name: max(choices[name], key=lambda p: (bool(p.weight_bits), bool(p.activation_bits))) for name in choices}
        return self.overhead(Scheme(most))

    def reserved_bytes(self, choices: Mapping[str, Sequence[Precision]]) -> int:
        """Return `fixed_bytes` plus room for the part of the header that depends on the choice."""
        return self.fixed_bytes(choices) + HEADER_SLACK

    def summary(self, scheme: Scheme) -> dict:
        """Return every quantity of one scheme, for a report."""
        return {cost.report_key: cost.total(self, scheme) for cost in cost_quantities() if cost.is_known(self)}


def macs_per_sample(layer: nn.Module, name: str, wiring: Wiring) -> int:
    """Count the multiply-accumulates of one sample in all calls of the layer, from the observed shapes."""
    weights, count = float_weight(layer).numel(), type_of(layer).macs
    return sum(count(weights, run.read, run.shape, wiring.batch_size) for run in wiring.runs(name))
