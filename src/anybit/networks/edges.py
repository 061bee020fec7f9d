"""Edges: the ranges of the tensors between layers, and the canonical model that rounds those that a runtime holds as codes."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anybit.data.batches import Batch, unpadded
from anybit.networks.canonical import Canonical
from anybit.networks.integers import computes_on_integers, rounded_edges
from anybit.networks.layer_types import type_of
from anybit.networks.layers import float_bias, quantized_layers, scheme_of
from anybit.networks.rounding import Grid, round_edges
from anybit.networks.wiring import LAYER, Wiring, observe
from anybit.numerics.quantizers import UniformQuantizer
from anybit.numerics.ranges import range_ends

Ends = Mapping[str, tuple[float, float]]
"""Edge -> (low, high), float32."""

SEARCHED = 2**13
"""Number of values of an edge on which its range is searched."""

LARGEST_BIAS = 2**30
"""Headroom in an int32 bias for the sum that it joins."""
SMALLEST_SCALE = 1e-30
"""Narrower ranges count as empty, because their quotients overflow float32."""


def edge_grid(low: float, high: float) -> Grid:
    """Return (scale, float32; zero point) of an 8-bit edge from `low` to `high`, extended to include 0."""
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    scale = float(np.float32((high - low) / 255))
    scale = scale if scale > SMALLEST_SCALE else 1.0
    return scale, int(np.clip(np.rint(-low / scale), 0, 255))


def edge_grids(ends: Ends, names: Iterable[str]) -> dict[str, Grid]:
    """Return the grids of those of the edges `names` whose ranges are known."""
    return {name: edge_grid(*ends[name]) for name in names if name in ends}


@torch.no_grad()
def with_edges(model: nn.Module, wiring: Wiring, ends: Ends, tables: bool = False) -> nn.Module:
    """Let canonical `model` round its edges as the exported file does, in place, and return it.

    An 8-bit layer that reads an edge adopts its grid. Biases of integer layers become those of the file.
    """
    layers = quantized_layers(model)
    scheme = scheme_of(model)
    edges = rounded_edges(wiring, layers, scheme, tables)
    grids = edge_grids(ends, edges.names)
    for layer, read in edges.reads.items():
        quantizer = layers[layer].input_quantizer
        if isinstance(quantizer, UniformQuantizer) and quantizer.bits == 8:
            read_codes(quantizer.scale, quantizer.zero_point, read, grids)
    for name, precision in scheme.items():
        if computes_on_integers(layers[name], precision):
            _round_bias(layers[name])
    return round_edges(model, grids)


def _round_bias(layer: nn.Module) -> None:
    """Round the bias of an integer layer as kernels store it, in place: in units of the input's scale times each channel's."""
    bias, weights, inputs = float_bias(layer), layer.weight_quantizer, layer.input_quantizer
    if bias is None or not isinstance(weights, UniformQuantizer) or not isinstance(inputs, UniformQuantizer):
        return
    units = (weights.scale.flatten() * inputs.scale).double()
    codes = (bias.double() / units).round()
    bias.copy_(torch.where(codes.abs() <= LARGEST_BIAS, codes * units, bias.double()))


def read_codes(scale: Tensor, zero_point: Tensor, read: Sequence[str | None], grids: Mapping[str, Grid]) -> None:
    """Give an 8-bit layer the grids of the edges that it reads, in place: one per operand, None if it reads none."""
    for operand, edge in enumerate(read):
        if edge is not None and edge in grids:
            scale.view(-1)[operand], zero_point.view(-1)[operand] = grids[edge]


def observe_edge_ranges(
    model: nn.Module, wiring: Wiring, batches: Sequence[Batch], chunk_size: int = 8, searched: Collection[str] = (), seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return (low, high) of every edge of the model over `batches`, `chunk_size` samples at a time; edges are not rounded meanwhile.

    Infinite values, which masks write where nothing is to be read, have no code and are ignored.
    searched  edges whose range minimizes the squared error at 8 bits; the range of others is (minimum, maximum)
    """
    names, pairs = set(wiring.edges()), _token_pairs(model, wiring)
    ends: dict[str, tuple[float, float]] = {}
    samples: dict[str, list[Tensor]] = {name: [] for name in searched}
    chunks = [chunk for batch in batches for chunk in batch.parts(chunk_size)]
    each, generator = max(1, SEARCHED // max(1, len(chunks))), torch.Generator().manual_seed(seed)
    mask: Tensor | None = None

    def widen(name: str, tensor: Tensor) -> None:
        if name in names and tensor.is_floating_point():
            tensor = _unpadded_pairs(tensor, mask) if name in pairs and mask is not None else unpadded(tensor, mask)
            ends[name] = _widened(ends.get(name), tensor)
            if name in samples:
                flat = tensor.reshape(-1)
                flat = flat if len(flat) <= each else flat[torch.randint(len(flat), (each,), generator=generator)]
                samples[name].append(flat[flat.isfinite()])

    for chunk in chunks:
        mask = chunk.mask
        observe(model, chunk, widen)
    for name, parts in samples.items():
        if name in ends:
            low, high = range_ends(torch.cat([*parts, torch.tensor(ends[name], device=parts[0].device)]).float(), 8)
            ends[name] = float(low), float(high)
    return {name: ends.get(name, (0.0, 0.0)) for name in wiring.edges()}


def _widened(ends: tuple[float, float] | None, tensor: Tensor) -> tuple[float, float]:
    """Return the range extended to `tensor`."""
    if tensor.numel() and not all(end.isfinite() for end in tensor.aminmax()):
        tensor = tensor[tensor.isfinite()]
    if not tensor.numel():
        return ends or (0.0, 0.0)
    low, high = map(float, tensor.aminmax())
    return (low, high) if ends is None else (min(ends[0], low), max(ends[1], high))


def finished(canonical: Canonical, wiring: Wiring, batches: Sequence[Batch]) -> Canonical:
    """Return the canonical form with the ranges of its edges observed on `batches`, and these rounded."""
    layers, scheme = quantized_layers(canonical.model), canonical.scheme
    searched = rounded_edges(wiring, layers, scheme).names
    ends = observe_edge_ranges(canonical.model, wiring, batches, searched=searched)
    return replace(canonical, model=with_edges(canonical.model, wiring, ends), edges=ends)


def as_ranges(record: Mapping[str, Any], wiring: Wiring) -> dict[str, tuple[float, float]]:
    """Return stored edge ranges, in the order of the wiring."""
    return {name: (float(record[name][0]), float(record[name][1])) for name in wiring.edges()}


def _token_pairs(model: nn.Module, wiring: Wiring) -> set[str]:
    """Return the names of tensors with a number for each pair of tokens, [N, heads, T, T]: products of queries and keys, and functions of
    them. Masks write huge numbers where one of the pair is padding."""
    names: set[str] = set()
    values: set[int] = set()
    for op in wiring.operations:
        layer = model.get_submodule(op.name) if op.kind == LAYER else None
        if (layer is None and values & set(op.inputs)) or (layer is not None and type_of(layer).pairs_tokens(layer)):
            names.add(op.name)
            values |= set(op.outputs)
    return names


def _unpadded_pairs(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return the numbers of `tensor` [N, ..., T, T] for pairs of two real tokens; all numbers of a tensor of another shape."""
    count, length = mask.shape
    if tensor.dim() < 3 or tensor.shape[0] != count or tensor.shape[-2:] != (length, length):
        return tensor
    between = [1] * (tensor.dim() - 3)
    pairs = mask.view(count, *between, length, 1) & mask.view(count, *between, 1, length)
    return tensor[pairs.expand(tensor.shape)]
