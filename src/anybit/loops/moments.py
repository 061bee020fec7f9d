"""Second moments of layer inputs, from patches: all that a closed-form solver needs from the data."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from anybit.data.batches import Batch, call, tensors_in
from anybit.networks.capture import MemoryBudget
from anybit.networks.layer_types import type_of
from anybit.networks.layers import float_weight
from anybit.networks.patches import draw_places, patches, real_rows
from anybit.numerics.quadratic import Full, Quadratic, Thin

NUMBERS = 2**24
"""Numbers of a layer's inputs that are read as patches, whose count lies between the next two."""
PATCHES = (4096, 16384)
"""Fewest and most patches; but at least `RANK` times the size of one, which bounds the rank of its covariance."""
RANK = 4
THIN = 0.25
"""Rows as a share of the fan-in, below which they are stored themselves: products with them are cheaper than with the whole matrix."""


@dataclass(frozen=True)
class Moments:
    """Moments of X, the float network's inputs of a layer, and Xq, its inputs in the quantized network, as rows [groups, rows, fan-in].

    form      mean of (Xq - mean)^T (Xq - mean); with plain squares, no mean is subtracted
    cross     mean of (X - mean)^T (Xq - mean), [groups, fan-in, fan-in]; with a thin form, X's factor; None if X is Xq
    means     of X and of Xq, [groups, fan-in]
    """

    form: Quadratic
    cross: Tensor | None
    means: tuple[Tensor, Tensor]


class Sums:
    """Accumulate moments, one chunk of rows after the other. `sides` is 2 if Xq differs from X.

    While there are fewer rows than `THIN` of the fan-in, the rows themselves are stored.
    """

    def __init__(self, first: Tensor, budget: MemoryBudget, sides: int):
        self.count, self.budget = 0, budget
        self.origin = first.mean(1, keepdim=True)  # so that values far from zero keep their precision
        self.sums = [torch.zeros_like(self.origin[:, 0]) for _ in range(sides)]
        self.products: list[Tensor] = []
        self.rows: list[list[Tensor]] = [[] for _ in range(sides)]

    def add(self, x: Tensor, quantized: Tensor | None = None) -> None:
        """Add rows of X and, if they differ, the rows of Xq at the same places."""
        self.count += x.shape[1]
        rows = [one - self.origin for one in (x, quantized) if one is not None]
        for total, one in zip(self.sums, rows, strict=True):
            total += one.sum(1)
        if not self.products and self.count <= THIN * x.shape[2]:
            for stored, one in zip(self.rows, rows, strict=True):
                stored.append(self.budget.allocate(tuple(one.shape), one.dtype).copy_(one))
            return
        if not self.products:
            groups, _, fan_in = x.shape
            self.products = [self.budget.allocate((groups, fan_in, fan_in), x.dtype).zero_() for _ in rows]
            for earlier in zip(*self.rows, strict=True):
                self._multiply([one.to(x.device) for one in earlier])
            self.rows = []
        self._multiply(rows)

    def _multiply(self, rows: Sequence[Tensor]) -> None:
        seen = rows[-1].transpose(1, 2)
        for product, one in zip(self.products, rows, strict=True):
            product += (seen @ one).to(product.device)  # Xq^T X, then Xq^T Xq

    def moments(self, centred: bool) -> Moments:
        """Return the moments so far: about the means if `centred`, else about zero."""
        means = [total / self.count for total in self.sums]
        origin = self.origin.squeeze(1)
        ends = means[0] + origin, means[-1] + origin
        if not self.products:
            offsets = [-mean[:, None] if centred else self.origin for mean in means]
            factors = [
                (torch.cat(rows, 1).to(offset.device) + offset) / math.sqrt(self.count)
                for rows, offset in zip(self.rows, offsets, strict=True)
            ]
            return Moments(Thin(factors[-1]), None if len(factors) == 1 else factors[0], ends)
        seen = means[-1]
        forms = []
        for product, mean in zip(self.products, means, strict=True):
            moment = product.to(mean.device) / self.count
            moment = moment - seen[:, :, None] * mean[:, None, :]
            if not centred:
                moment = moment + (seen + origin)[:, :, None] * (mean + origin)[:, None, :]
            forms.append(moment)
        hessian = (forms[-1] + forms[-1].transpose(1, 2)) / 2
        return Moments(Full(hessian), None if len(forms) == 1 else forms[0].transpose(1, 2), ends)


class Solver(Protocol):
    """Choose a layer's codes in closed form."""

    def __call__(self, weight: Tensor, moments: Moments, scale: Tensor, bits: int, rounded: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes, [groups, channels, fan-in], and scales, [groups, channels, k], for the float `weight`, [groups, channels, fan-in].

        `scale`, of least squared weight error, has k equal parts per channel's fan-in, and `rounded` are its codes.
        """


def has_patches(layer: nn.Module) -> bool:
    """Return whether the layer's outputs are sums of products of weights and patches of its input."""
    kind = type_of(layer)
    return kind.has_weights and kind.sums


def matrix(layer: nn.Module) -> Tensor:
    """Return the stored weight as [groups, channels, fan-in]."""
    rows = type_of(layer).rows(layer, float_weight(layer).detach())
    return rows.unflatten(0, (getattr(layer, "groups", 1), -1))


def patches_drawn(layer: nn.Module) -> int:
    """Return the number of patches to draw from the layer's inputs."""
    groups, _, fan_in = matrix(layer).shape
    least, most = PATCHES
    return max(RANK * fan_in, min(most, max(least, NUMBERS // (groups * fan_in))))


@contextmanager
def reading(layers: Mapping[str, nn.Module], read: Callable[[str, nn.Module, Tensor], Any]) -> Iterator[None]:
    """Call `read` with name, layer and input at every call of `layers` inside the block."""

    def hook(name: str, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        read(name, layer, tensors_in((args, kwargs))[0].detach())

    hooks = [layer.register_forward_pre_hook(partial(hook, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


@torch.no_grad()
def float_moments(
    model: nn.Module, names: Sequence[str], batches: Iterable[Batch], count: int, seed: int, budget: MemoryBudget
) -> dict[str, Moments]:
    """Return the moments of each layer's inputs in `model` over batches with `count` samples, in one pass, with X and Xq the same."""
    layers = {name: model.get_submodule(name) for name in names}
    layers = {name: layer for name, layer in layers.items() if has_patches(layer)}
    if not layers:
        return {}
    sums: dict[str, Sums] = {}
    generator = torch.Generator().manual_seed(seed)
    mask: Tensor | None = None
    share = 0.0

    def read(name: str, layer: nn.Module, x: Tensor) -> None:
        x = real_rows(layer, x, mask)
        rows = patches(layer, x, draw_places(layer, x.shape, max(1, round(share * patches_drawn(layer))), generator))
        if name not in sums:
            sums[name] = Sums(rows, budget, 1)
        sums[name].add(rows)

    with reading(layers, read):
        for batch in batches:
            mask, share = batch.mask, len(batch) / count
            call(model, batch.inputs)
    return {name: one.moments(layers[name].bias is not None) for name, one in sums.items()}
