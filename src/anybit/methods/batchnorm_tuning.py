"""Batch-norm tuning: match the output statistics of quantized layers to those of the float network."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from anybit.data.batches import Batch, call, map_tensors, tensors_in
from anybit.errors import InvalidSetting
from anybit.networks.batchnorm import ChannelStatistics, channel_statistics, channel_sums, scale_weight, statistics_from_sums
from anybit.networks.layers import float_weight


@torch.no_grad()
def tune(model: nn.Module, targets: Mapping[str, ChannelStatistics], batches: list[Batch], prior_weight: float = 0.0) -> dict[str, float]:
    """Match each layer's output statistics to `targets`, in place, in one forward pass over all `batches` joined into one.

    The layers are corrected in the order in which they run, each while its output passes by, so every layer sees inputs that its
    predecessors have already put right. `prior_weight` in [0, 1) mixes the target into the measured statistics (0: measured alone).
    A channel that is constant in either network keeps its gain of 1 and only its mean is matched. Returns each layer's largest gain.
    """
    if not 0 <= prior_weight < 1:
        raise InvalidSetting(f"prior_weight {prior_weight} must be at least 0 and below 1.")
    largest: dict[str, float] = {}

    def correct(name: str, layer: nn.Module, output: Tensor) -> Tensor:
        target = targets[name]
        gain, shift = _correction(statistics_from_sums(*channel_sums(layer, output)), target, prior_weight)
        _scale_channels(layer, gain, shift)
        largest[name] = float(gain.max())
        shape = [1, -1] + [1] * (output.dim() - 2) if not isinstance(layer, nn.Linear) else [-1]
        return output.mul_(gain.view(shape)).add_(shift.view(shape))

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda layer, args, output, name=name: correct(name, layer, output))
        for name in targets
    ]
    try:
        call(model, join(batches).inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return largest


@torch.no_grad()
def match_layers(
    float_model: nn.Module,
    model: nn.Module,
    targets: Mapping[str, ChannelStatistics],
    batches: Iterable[Batch],
    prior_weight: float = 0.0,
) -> None:
    """Match each layer of `model`, in place, while it is fed with the float network's inputs: for candidates."""
    measured = channel_statistics(float_model, targets, batches, twins=model)
    for name, target in targets.items():
        _scale_channels(model.get_submodule(name), *_correction(measured[name], target, prior_weight))


def _correction(measured: ChannelStatistics, target: ChannelStatistics, prior_weight: float) -> tuple[Tensor, Tensor]:
    """Return (gain, shift) of each channel that take the measured statistics to the target's."""
    mean = torch.lerp(measured.mean, target.mean, prior_weight)
    deviation = torch.lerp(measured.deviation, target.deviation, prior_weight)
    alive = (deviation > 1e-6) & (target.deviation > 1e-6)
    gain = torch.where(alive, target.deviation / deviation.clamp_min(1e-6), 1.0)
    return gain, target.mean - mean * gain


@torch.no_grad()
def _scale_channels(layer: nn.Module, gain: Tensor, shift: Tensor) -> None:
    """Multiply the layer's output channels by `gain` and add `shift`, leaving the integer codes of its weight as they are."""
    scale_weight(layer, gain)
    if layer.bias is None:
        layer.bias = nn.Parameter(shift.to(float_weight(layer).dtype))
    else:
        layer.bias.copy_(layer.bias * gain + shift)


def join(batches: list[Batch]) -> Batch:
    """Return all `batches` as one."""
    flat = [iter(tensors) for tensors in zip(*(tensors_in(batch.inputs) for batch in batches), strict=True)]
    joined = iter([torch.cat(list(tensors)) for tensors in flat])
    return Batch(map_tensors(batches[0].inputs, lambda _: next(joined)), None, batches[0].reader)
