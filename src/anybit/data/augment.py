"""Augmentation of training pictures."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from anybit.data.batches import Batch
from anybit.data.options import parse_augmentations
from anybit.errors import InvalidSetting


def augmented(batch: Batch, augment: str, global_size: int, generator: torch.Generator, share: tuple[int, int] = (0, 1)) -> Batch:
    """Mirror or shift each picture of the batch at random; the draws are of the global batch, of which this is a `share`."""
    inputs, (which, of) = batch.inputs, share
    for kind, pixels in parse_augmentations(augment):
        if not isinstance(inputs, Tensor) or inputs.dim() != 4:
            raise InvalidSetting(f"augment {augment!r} needs pictures: one 4-d input tensor. Leave it off for this data.")
        if kind == "flip":
            flips = torch.rand(global_size, generator=generator)[which::of] < 0.5
            inputs = inputs.clone()
            inputs[flips] = inputs[flips].flip(-1)
        else:
            shifts = torch.randint(0, 2 * pixels + 1, (global_size, 2), generator=generator)[which::of].tolist()
            padded, (height, width) = F.pad(inputs, (pixels,) * 4), inputs.shape[-2:]
            inputs = torch.stack([p[:, y : y + height, x : x + width] for p, (y, x) in zip(padded, shifts, strict=True)])
    return replace(batch, inputs=inputs)


def channels_last(batch: Batch) -> Batch:
    """Put the channels of pictures innermost in memory: convolutions hand the layout on."""
    if isinstance(batch.inputs, Tensor) and batch.inputs.dim() == 4:
        return replace(batch, inputs=batch.inputs.contiguous(memory_format=torch.channels_last))
    return batch
