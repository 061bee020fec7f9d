"""Augmentation of training images."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from anybit.data.batches import Batch
from anybit.data.options import parse_augmentations
from anybit.data.samples import Samples, draw
from anybit.errors import InvalidSetting

FEW = 256
"""Number of images in which black is looked for."""


def augmented(
    batch: Batch,
    augment: str,
    global_size: int,
    generator: torch.Generator,
    share: tuple[int, int] = (0, 1),
    border: Sequence[float] = (0.0,),
) -> Batch:
    """Mirror or shift each image of the batch at random; the draws are those of the global batch, of which this is a `share`.

    border   padding value of shifted images, for each channel or for all
    """
    inputs, (which, of) = batch.inputs, share
    for kind, pixels in parse_augmentations(augment):
        if not isinstance(inputs, Tensor) or inputs.dim() != 4:
            raise InvalidSetting(f"augment {augment!r} needs images: one 4-d input tensor. Leave it off for this data.")
        if kind == "flip":
            flips = torch.rand(global_size, generator=generator)[which::of] < 0.5
            inputs = inputs.clone()
            inputs[flips] = inputs[flips].flip(-1)
        else:
            shifts = torch.randint(0, 2 * pixels + 1, (global_size, 2), generator=generator)[which::of].tolist()
            height, width = inputs.shape[-2:]
            padded = inputs.new_tensor(border)[:, None, None].expand(*inputs.shape[:2], height + 2 * pixels, width + 2 * pixels).clone()
            padded[..., pixels : pixels + height, pixels : pixels + width] = inputs
            inputs = torch.stack([p[:, y : y + height, x : x + width] for p, (y, x) in zip(padded, shifts, strict=True)])
    return replace(batch, inputs=inputs)


def border_of(samples: Samples, augment: str, border: str, seed: int) -> tuple[float, ...]:
    """Return the padding value of shifted images, for each channel or for all.

    "black" pads as if before the normalization, as in the training of most networks; if the normalization is unknown, the least value of
    each channel in a few images counts as black. "mean" pads with zeros, the mean of normalized images.
    """
    if border == "mean" or not any(kind == "crop" for kind, _ in parse_augmentations(augment)):
        return (0.0,)
    if samples.black is not None:
        return samples.black
    with torch.random.fork_rng(devices=[]):  # for data sets that draw at random
        batches = draw(samples, FEW, seed).batches(64)
        darkest = [
            batch.inputs.float().amin((0, 2, 3)) for batch in batches if isinstance(batch.inputs, Tensor) and batch.inputs.dim() == 4
        ]
    return tuple(torch.stack(darkest).amin(0).tolist()) if darkest else (0.0,)


def channels_last(batch: Batch) -> Batch:
    """Put the channels of images innermost in memory, a layout that convolutions propagate."""
    if isinstance(batch.inputs, Tensor) and batch.inputs.dim() == 4:
        return replace(batch, inputs=batch.inputs.contiguous(memory_format=torch.channels_last))
    return batch
