"""Patches: the rows of a layer's input that its weight is multiplied with, at random places, gathered without an `unfold`."""

import math
from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybit.data.batches import unpadded

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def real_rows(layer: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the layer's input without padding: for a linear, its real tokens by `mask` [N, T], as [tokens, features]; else all of it."""
    return unpadded(x, mask).reshape(-1, x.shape[-1]) if isinstance(layer, nn.Linear) else x


def draw_places(layer: nn.Module, shape: Sequence[int], count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` of the places at which the layer computes an output from an input of this `shape`, or all if there are fewer.

    Places are indices into [samples, output places], flattened; for a linear, into its tokens.
    """
    total = math.prod(shape[:-1]) if isinstance(layer, nn.Linear) else shape[0] * math.prod(_output_places(layer, shape[2:]))
    if total <= count:
        return torch.arange(total)
    return torch.randint(total, (count,), generator=generator)


def patches(layer: nn.Module, x: Tensor, places: Tensor) -> Tensor:
    """Gather the rows [groups, places, fan-in] of input `x` that are multiplied with the layer's weight rows [channels, fan-in].

    `layer` is a linear, or a convolution, possibly transposed, of 1 to 3 dimensions. Columns are in the order of its weight's rows.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])[places][None]
    kernel, stride, dilation = _kernel(layer)
    padded = _padded(layer, x)
    flat = padded.flatten(2)
    strides = [math.prod(padded.shape[2 + axis + 1 :]) for axis in range(len(kernel))]
    sizes = _output_places(layer, x.shape[2:])
    sample, corner = _corners(places.to(x.device), sizes, stride, strides)
    taps = torch.tensor(
        [sum(at * d * s for at, d, s in zip(tap, dilation, strides, strict=True)) for tap in product(*map(range, kernel))], device=x.device
    )
    if isinstance(layer, TRANSPOSED):
        taps = taps.flip(0)  # its kernel spreads one input over outputs, so an output sees it reversed
    gathered = flat[sample[:, None], :, corner[:, None] + taps]  # [places, taps, channels]
    return gathered.transpose(1, 2).unflatten(1, (_groups(layer), -1)).flatten(2).transpose(0, 1)


def _groups(layer: nn.Module) -> int:
    assert isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED))
    return layer.groups


def _kernel(layer: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return (kernel size, stride, dilation) of the plain convolution that the layer computes over its padded input."""
    assert isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED))
    stride = (1,) * len(layer.kernel_size) if isinstance(layer, TRANSPOSED) else layer.stride
    return layer.kernel_size, stride, layer.dilation


def _padded(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the input with the layer's padding; for a transposed layer, also with the zeros that its stride inserts between values."""
    assert isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED))
    kernel = layer.kernel_size
    if isinstance(layer, TRANSPOSED):
        apart = [int(stride) for stride in layer.stride]
        spread = x.new_zeros(*x.shape[:2], *((size - 1) * stride + 1 for size, stride in zip(x.shape[2:], apart, strict=True)))
        spread[(slice(None), slice(None), *(slice(None, None, stride) for stride in apart))] = x
        around = [d * (k - 1) - p for d, k, p in zip(layer.dilation, kernel, map(int, layer.padding), strict=True)]
        ends = [(before, before + int(extra)) for before, extra in zip(around, layer.output_padding, strict=True)]
        return F.pad(spread, [size for pair in reversed(ends) for size in pair])
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)


def _output_places(layer: nn.Module, sizes: Sequence[int]) -> list[int]:
    """Return the output size along each dimension for an input of these `sizes`."""
    assert isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED))
    if isinstance(layer, TRANSPOSED):
        each = zip(sizes, layer.stride, layer.padding, layer.dilation, layer.kernel_size, layer.output_padding, strict=True)
        return [(size - 1) * s - 2 * int(p) + d * (k - 1) + extra + 1 for size, s, p, d, k, extra in each]
    ends = layer._reversed_padding_repeated_twice[::-1]
    around = [ends[2 * axis] + ends[2 * axis + 1] for axis in range(len(sizes))]
    each_plain = zip(sizes, around, layer.stride, layer.dilation, layer.kernel_size, strict=True)
    return [(size + pad - d * (k - 1) - 1) // s + 1 for size, pad, s, d, k in each_plain]


def _corners(places: Tensor, sizes: Sequence[int], stride: Sequence[int], strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return (sample, index of the patch's first tap in the flattened padded input) of each place."""
    corner = torch.zeros_like(places)
    for size, step, apart in zip(reversed(sizes), reversed(stride), reversed(strides), strict=True):
        corner = corner + places % size * step * apart
        places = places // size
    return places, corner
