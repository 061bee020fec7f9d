"""Second moments of what layers read, from patches of their inputs: all that a solver in closed form needs of the data."""

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

NUMBERS = 2**24
"""Numbers of a layer's inputs that are read, in patches of so many that are between the next two."""
PATCHES = (4096, 16384)
"""Patches at least and at most; but at least `RANK` times the numbers of one, which are what its covariance has ranks."""
RANK = 4


@dataclass(frozen=True)
class Moments:
    """Describe X, the float network's inputs of a layer, and Xq, those that it really sees, as rows [groups, rows, fan-in].

    hessian   mean of (Xq - mean)^T (Xq - mean), [groups, fan-in, fan-in]; with plain squares, no mean is taken off
    cross     mean of (X - mean)^T (Xq - mean), the same; `hessian` itself where X is Xq
    means     of X and of Xq, [groups, fan-in]
    """

    hessian: Tensor
    cross: Tensor
    means: tuple[Tensor, Tensor]


class Sums:
    """Add up moments, a chunk of rows after the other. `sides` is 2 where Xq is not X."""

    def __init__(self, first: Tensor, budget: MemoryBudget, sides: int):
        groups, _, fan_in = first.shape
        self.count = 0
        self.origin = first.mean(1, keepdim=True)  # so that values far from zero leave digits to their differences
        self.sums = [first.new_zeros(groups, fan_in) for _ in range(sides)]
        self.products = [budget.allocate((groups, fan_in, fan_in), first.dtype).zero_() for _ in range(sides)]

    def add(self, x: Tensor, quantized: Tensor | None = None) -> None:
        """Add rows of X and, where they differ, those of the same places of Xq."""
        self.count += x.shape[1]
        rows = [one - self.origin for one in (x, quantized) if one is not None]
        for total, one in zip(self.sums, rows, strict=True):
            total += one.sum(1)
        seen = rows[-1].transpose(1, 2)
        for product, one in zip(self.products, rows, strict=True):
            product += (seen @ one).to(product.device)  # Xq^T X, then Xq^T Xq

    def moments(self, centred: bool) -> Moments:
        """Return the moments of what was added, about the means or, not `centred`, about zero."""
        means = [total / self.count for total in self.sums]
        origin = self.origin.squeeze(1)
        seen = means[-1]
        found = []
        for product, mean in zip(self.products, means, strict=True):
            about = product.to(mean.device) / self.count
            about = about - seen[:, :, None] * mean[:, None, :]
            if not centred:
                about = about + (seen + origin)[:, :, None] * (mean + origin)[:, None, :]
            found.append(about)
        hessian = (found[-1] + found[-1].transpose(1, 2)) / 2
        cross = hessian if len(found) == 1 else found[0].transpose(1, 2)
        return Moments(hessian, cross, (means[0] + origin, seen + origin))


class Solver(Protocol):
    """Choose a layer's codes in closed form."""

    def __call__(self, weight: Tensor, moments: Moments, scale: Tensor, bits: int, rounded: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes, [groups, channels, fan-in], and scales, [groups, channels, k], for the float `weight`, [groups, channels, fan-in].

        `scale` is that of least squared weight error, of k equal parts of a channel's fan-in, and `rounded` are its codes.
        """


def has_patches(layer: nn.Module) -> bool:
    """Return whether the layer's outputs are sums of products of weights with patches of its input."""
    kind = type_of(layer)
    return kind.has_weights and kind.sums


def matrix(layer: nn.Module) -> Tensor:
    """Return the stored weight as [groups, channels, fan-in]."""
    rows = type_of(layer).rows(layer, float_weight(layer).detach())
    return rows.unflatten(0, (getattr(layer, "groups", 1), -1))


def patches_drawn(layer: nn.Module) -> int:
    """Return how many patches are drawn of the layer's inputs."""
    groups, _, fan_in = matrix(layer).shape
    least, most = PATCHES
    return max(RANK * fan_in, min(most, max(least, NUMBERS // (groups * fan_in))))


@contextmanager
def reading(layers: Mapping[str, nn.Module], read: Callable[[str, nn.Module, Tensor], Any]) -> Iterator[None]:
    """Call `read` with the name, the layer and its input of every call of `layers` inside the block."""

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
    """Return the moments of each layer's inputs in `model` over batches of `count` samples, in one pass: X and Xq are the same."""
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
