"""Layers that read the network's own inputs and cannot resolve them with few bits: inputs that lie far from zero, or whose channels have
different units (Kelvin beside Pascal).

A layer's input has one range for all channels, which includes zero. Its step follows the largest value of any channel, while the layer
depends on how much each channel varies.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from anybit.data.batches import Batch, call, evaluating, tensors_in
from anybit.networks.layers import float_weight
from anybit.networks.wiring import LAYER, RESHAPES, Operation, Wiring

WORST = 0.01
"""Error of the rounded inputs, relative to the layer's outputs, above which it is reported."""
FINER = 16
"""Factor by which a range per channel would have to reduce the error; else the bits are too few, not the inputs at fault."""


@torch.no_grad()
def coarse_layers(model: nn.Module, wiring: Wiring, bits: Mapping[str, int], batch: Batch) -> dict[str, float]:
    """Return layer -> relative error of its outputs when its inputs are rounded to `bits`, for layers where it is large.

    bits   layer to examine -> the most bits that its input may have
    """
    layers = {op.name: model.get_submodule(op.name) for op in wiring.operations if op.name in bits and _reads_inputs(wiring, op)}
    layers = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)}
    read: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        read.setdefault(names[module], tensors_in((args, kwargs))[0].detach())

    names = {layer: name for name, layer in layers.items()}
    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers.values()]
    try:
        if layers:
            with evaluating(model):
                call(model, batch.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    errors = {name: _error(layers[name], tensor.float(), bits[name]) for name, tensor in read.items()}
    return {name: error for name, error in errors.items() if error > WORST}


def _reads_inputs(wiring: Wiring, op: Operation) -> bool:
    """Return whether a layer reads an input of the network, possibly reshaped."""
    if op.kind != LAYER or not op.inputs:
        return False
    value = op.inputs[0]
    while (maker := wiring.maker(value)) is not None and maker.kind in RESHAPES and maker.inputs:
        value = maker.inputs[0]
    return value in wiring.input_values


def _error(layer: nn.Module, x: Tensor, bits: int) -> float:
    """Return the squared error of the layer's outputs from rounding `x`, over their variance; 0 if ranges per channel would not help."""
    channels = x if isinstance(layer, nn.Linear) else x.movedim(-1 - len(layer.kernel_size), -1)  # type: ignore[arg-type]
    rows, highest = channels.reshape(-1, channels.shape[-1]), 2**bits - 1
    low, high = rows.amin(0), rows.amax(0)
    step = (high.max().clamp(min=0) - low.min().clamp(max=0)) / highest
    energy = _energy(layer)
    signal = (energy * rows.var(0, correction=0)).sum()
    error = (energy * ((rows / step).round() * step - rows).square().mean(0)).sum()
    finer = (energy * ((high - low) / highest) ** 2).sum() / 12
    return float(error / signal) if signal > 0 and error > FINER * finer else 0.0


def _energy(layer: nn.Module) -> Tensor:
    """Return the sum of the squared weights of each input channel."""
    weight, groups = float_weight(layer).detach(), getattr(layer, "groups", 1)
    return weight.reshape(groups, -1, weight.shape[1], weight[0, 0].numel()).square().sum((1, 3)).flatten()


def coarse_in_words(errors: Mapping[str, float], bits: Mapping[str, int]) -> Iterable[str]:
    """Yield a sentence about each of these layers."""
    for name, error in errors.items():
        yield (
            f"{name} reads inputs that lie far from zero or have unlike units: rounding them to {bits[name]} bits costs "
            f"{100 * error:.0f} % of the variance of its outputs. Normalize them (subtract each one's mean, divide by its deviation), or "
            f"keep the layer float: --keep='{name}=float'"
        )
