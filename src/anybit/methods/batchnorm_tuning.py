"""Batch-norm tuning: match the output statistics of quantized layers to those of the float network."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from anybit.data.batches import Batch, call, join
from anybit.errors import InvalidSetting
from anybit.networks.batchnorm import ChannelStatistics, channel_sums, scale_weight, statistics_from_sums, twin_statistics
from anybit.networks.layer_types import type_of
from anybit.networks.layers import float_weight


@torch.no_grad()
def tune(model: nn.Module, targets: Mapping[str, ChannelStatistics], batches: list[Batch], prior_weight: float = 0.0) -> dict[str, float]:
    """Match each layer's output statistics to `targets`, in place, in one forward pass over all `batches` joined into one.

    The layers are corrected in the order in which they run, during the pass, so that every layer reads inputs that are already corrected.
    `prior_weight` in [0, 1) mixes the target into the measured statistics (0: only measured). A channel that is constant in either network
    keeps its gain of 1, and only its mean is matched. Returns each layer's largest gain. Source: see `networks.batchnorm`.
    """
    if not 0 <= prior_weight < 1:
        raise InvalidSetting(f"prior_weight {prior_weight} must be at least 0 and below 1.")
    largest: dict[str, float] = {}

    def correct(name: str, layer: nn.Module, output: Tensor) -> Tensor:
        target = targets[name]
        gain, shift = _correction(statistics_from_sums(*channel_sums(layer, output)), target, prior_weight)
        _scale_channels(layer, gain, shift)
        largest[name] = float(gain.max())
        per_channel = type_of(layer).per_channel
        return output.mul_(per_channel(gain, output)).add_(per_channel(shift, output))

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
    models: Sequence[nn.Module],
    targets: Mapping[str, ChannelStatistics],
    batches: Iterable[Batch],
    prior_weight: float = 0.0,
) -> None:
    """Match each quantized layer of `models` as `tune` does, in place, on the float network's inputs of that layer, for candidates.

    One pass of the float network over `batches` serves all models.
    """
    layers = {name: [model.get_submodule(name) for model in models] for name in targets}
    twins = {name: [layer for layer in copies if layer.weight_quantizer is not None] for name, copies in layers.items()}
    measured = twin_statistics(float_model, twins, batches)
    for name, target in targets.items():
        for layer, statistics in zip(twins[name], measured[name], strict=True):
            _scale_channels(layer, *_correction(statistics, target, prior_weight))


def _correction(measured: ChannelStatistics, target: ChannelStatistics, prior_weight: float) -> tuple[Tensor, Tensor]:
    """Return (gain, shift) of each channel that move the measured statistics to the target's."""
    mean = torch.lerp(measured.mean, target.mean, prior_weight)
    deviation = torch.lerp(measured.deviation, target.deviation, prior_weight)
    alive = (deviation > 1e-6) & (target.deviation > 1e-6)
    gain = torch.where(alive, target.deviation / deviation.clamp_min(1e-6), 1.0)
    return gain, target.mean - mean * gain


@torch.no_grad()
def _scale_channels(layer: nn.Module, gain: Tensor, shift: Tensor) -> None:
    """Multiply the layer's output channels by `gain` and add `shift`, without changing the integer codes of its weight."""
    scale_weight(layer, gain)
    bias = layer._parameters["bias"]
    if bias is None:
        layer.bias = nn.Parameter(shift.to(float_weight(layer).dtype))
    else:
        bias.copy_(bias * gain + shift)
