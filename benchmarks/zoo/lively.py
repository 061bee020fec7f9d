"""Random weights that hide no error: scales and shifts of norms differ by channel, and running statistics are those of real inputs.

Constructors leave gammas at one, and shifts, position tables and layer scales at zero: a fold that forgets one of them, or a channel that
is scaled wrongly, would not show. Matrices keep the constructor's values, unless these are so small that a block adds next to nothing.

Shifts of batch norms are about as large as the values that they shift. Around zero, each norm and activation would magnify the difference
between two inputs, and a deep chain of them would turn float32's own rounding into noise, as in no trained network (measured with noise of
0.1 % on every layer's output: at the network's output, 8,000 times as much for Inception-v4, 180 for MobileNetV2; with shifts, 49 and 5).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from anybit.data.batches import call


@torch.no_grad()
def enliven(network: nn.Module, inputs: Any, seed: int) -> None:
    """Randomize, in place, the parameters that constructors leave constant, and set running statistics by a pass over `inputs`."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        offset = "gemma" in type(module).__name__.lower()  # their norms scale by one plus the weight
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.copy_(_lively(module, name, parameter, generator, offset))
    with _statistics_of(network, generator):
        call(network, inputs)


def _lively(module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator, offset: bool) -> Tensor:
    def normal(deviation: float) -> Tensor:
        return deviation * torch.randn(parameter.shape, generator=generator)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(parameter.shape, generator=generator)

    vector, norm = sum(size > 1 for size in parameter.shape) < 2, "norm" in type(module).__name__.lower()
    constant = parameter.numel() > 0 and bool((parameter == parameter.flatten()[0]).all())
    if vector and norm:
        batch = getattr(module, "running_var", None) is not None
        if "bias" in name or "beta" in name:
            return 1 + normal(0.5) if batch else normal(0.2)
        return uniform(0.3, 0.9) if batch else uniform(-0.5, 0.5) if offset else uniform(0.5, 1.5)
    if not constant:
        return parameter if vector else _wide_enough(module, name, parameter)
    if "bias" in name or not vector:  # a table: positions, relative positions, queries
        return normal(0.1 if vector else 0.5)
    level = float(parameter.flatten()[0])
    return uniform(0.2, 0.6) if abs(level) < 0.05 else level * uniform(0.5, 1.5)


def _wide_enough(module: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """Scale up a matrix whose products are less than half as large as their inputs, and a small embedding to a deviation of 0.5."""
    if isinstance(module, nn.Embedding):
        least = 0.5
    elif parameter.dim() >= 2 and "weight" in name:
        transposed = type(module).__name__ == "Conv1D"  # transformers' linear, stored [in, out]
        least = 1 / math.sqrt(parameter.shape[0] if transposed else parameter[0].numel())
    else:
        return parameter
    deviation = float(parameter.std())
    return parameter * (least / deviation) if 0 < deviation < least / 2 else parameter


@contextmanager
def _statistics_of(network: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Set running statistics in the pass inside the block: close to those of each norm's first input."""
    seen: set[nn.Module] = set()

    def see(module: nn.Module, inputs: tuple) -> None:
        if module in seen or not inputs:
            return
        seen.add(module)
        channels = inputs[0].transpose(0, 1).flatten(1)
        deviation = channels.std(1) + 1e-3
        noise = torch.randn(2, len(channels), generator=generator)
        module.running_mean.copy_(channels.mean(1) + 0.1 * noise[0] * deviation)  # type: ignore[operator,union-attr]
        module.running_var.copy_(deviation.square() * (0.2 * noise[1]).exp())  # type: ignore[operator,union-attr]

    norms = [module for module in network.modules() if isinstance(getattr(module, "running_var", None), Tensor)]
    handles = [module.register_forward_pre_hook(see) for module in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
