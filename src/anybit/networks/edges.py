"""Edge ranges: the range of every tensor between layers, observed on the finished network."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from anybit.data.batches import Batch, unpadded
from anybit.networks.layer_types import type_of
from anybit.networks.wiring import LAYER, Wiring, observe

SMALLEST_SCALE = 1e-30
"""Below it a range is as good as empty, and its quotients leave float32."""


def edge_grid(low: float, high: float) -> tuple[float, int]:
    """Return (scale, a float32; zero point) of the 8 bits of an edge that reaches from `low` to `high`, 0 included."""
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    scale = float(np.float32((high - low) / 255))
    scale = scale if scale > SMALLEST_SCALE else 1.0
    return scale, int(np.clip(np.rint(-low / scale), 0, 255))


def observe_edge_ranges(model: nn.Module, wiring: Wiring, batches: Sequence[Batch], chunk_size: int = 8) -> dict[str, tuple[float, float]]:
    """(low, high) of every edge of the finished model over `batches`, for integer runtimes; `chunk_size` samples at once."""
    names, pairs = set(wiring.edges()), _token_pairs(model, wiring)
    ends: dict[str, tuple[float, float]] = {}

    mask: Tensor | None = None

    def widen(name: str, tensor: Tensor) -> None:
        if name in names and tensor.is_floating_point():
            tensor = _unpadded_pairs(tensor, mask) if name in pairs and mask is not None else unpadded(tensor, mask)
            low, high = ends.get(name, (float("inf"), float("-inf")))
            ends[name] = (min(low, float(tensor.min())), max(high, float(tensor.max())))

    for batch in batches:
        for chunk in batch.parts(chunk_size):
            mask = chunk.mask
            observe(model, chunk, widen)
    return {name: ends.get(name, (0.0, 0.0)) for name in wiring.edges()}


def as_ranges(record: Mapping[str, Any], wiring: Wiring) -> dict[str, tuple[float, float]]:
    """Return a kept record of edge ranges."""
    return {name: (float(record[name][0]), float(record[name][1])) for name in wiring.edges()}


def _token_pairs(model: nn.Module, wiring: Wiring) -> set[str]:
    """Names of the tensors with a number for each pair of tokens, [N, heads, T, T]: products of queries and keys, and what functions make
    of them. Where one of the pair is padding, a mask has put a huge number."""
    names: set[str] = set()
    values: set[int] = set()
    for op in wiring.operations:
        layer = model.get_submodule(op.name) if op.kind == LAYER else None
        if (layer is None and values & set(op.inputs)) or (layer is not None and type_of(layer).pairs_tokens(layer)):
            names.add(op.name)
            values |= set(op.outputs)
    return names


def _unpadded_pairs(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return the numbers of `tensor` [N, ..., T, T] that are of two real tokens; all of a tensor of another shape."""
    count, length = mask.shape
    if tensor.dim() < 3 or tensor.shape[0] != count or tensor.shape[-2:] != (length, length):
        return tensor
    between = [1] * (tensor.dim() - 3)
    pairs = mask.view(count, *between, length, 1) & mask.view(count, *between, 1, length)
    return tensor[pairs.expand(tensor.shape)]
