"""Solve a unit in closed form: the codes of its layers, one after the other, from the moments of their inputs."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from anybit.loops.moments import Moments, Solver, Sums, has_patches, matrix, patches_drawn, reading
from anybit.loops.units import UnitData, layers_in, load_states, states_of, unit_error
from anybit.networks.candidates import WeightCandidate, put_weight
from anybit.networks.capture import MemoryBudget
from anybit.networks.layers import QuantizedLayer, float_bias, float_weight, weight_rows
from anybit.networks.patches import draw_places, patches, real_rows
from anybit.numerics.quantizers import frozen

Drawn = list[list[tuple[Tensor, Tensor]]]
"""Places and the float network's patches [groups, places, fan-in] there, for each chunk and each call in it."""


@torch.no_grad()
def solve_unit(
    module: nn.Module,
    float_module: nn.Module,
    names: Sequence[str],
    sides: tuple[UnitData, UnitData],
    finish: Callable[[Tensor], Tensor],
    solver: Solver,
    seed: int,
    memory: int,
) -> dict[str, float]:
    """Choose the codes of the layers `names` of `module` by `solver`, in place, each given the layers solved before it.

    `sides` are the fitting and the held-out data, `finish` the activation after the unit. The start is restored unless the unit's error on
    held-out inputs falls. Returns that error `before` and `solved`, after the possible restoration.
    """
    fitting, held_out = sides
    layers = {name: layer for name in names if has_patches(layer := layers_in(module)[name])}
    rounded, before = unit_error(module, held_out, finish), states_of(layers)
    drawn = float_patches({name: float_module.get_submodule(name) for name in layers}, float_module, fitting, seed, memory // 2)
    for name, layer in layers.items():
        float_layer = float_module.get_submodule(name)
        moments = _moments(module, layer, fitting, drawn.pop(name), memory // 2, float_bias(float_layer) is not None)
        quantizer = frozen(layer.weight_quantizer)
        codes = quantizer.codes(weight_rows(layer, float_weight(layer)))
        candidate = solve_weight(float_layer, codes, quantizer.scale, quantizer.bits, moments, solver)
        put_weight(layer, candidate, quantizer.bits)
    solved = unit_error(module, held_out, finish)
    if not solved < rounded:
        load_states(layers, before)
    return {"before": rounded, "solved": min(rounded, solved)}


@torch.no_grad()
def solve_weight(float_layer: nn.Module, rounded: Tensor, scale: Tensor, bits: int, moments: Moments, solver: Solver) -> WeightCandidate:
    """Return the solver's candidate for a layer; `rounded` and `scale` are codes and scales of rounding to nearest, as in a candidate.

    The bias compensates for the change of the inputs' means.
    """
    weight = matrix(float_layer)
    codes, scales = solver(weight, moments, scale.view(*weight.shape[:2], -1), bits, rounded.view(weight.shape).to(weight.dtype))
    bias = float_bias(float_layer)
    if bias is not None:
        values = codes * scales.repeat_interleave(weight.shape[-1] // scales.shape[-1], -1)
        x, quantized = moments.means
        bias = bias.detach() + (weight @ x[:, :, None] - values @ quantized[:, :, None]).flatten()
    return WeightCandidate(codes.reshape(rounded.shape).to(torch.int8), scales.reshape(-1, 1), bias)


def _moments(module: nn.Module, layer: QuantizedLayer, data: UnitData, drawn: Drawn, memory: int, centred: bool) -> Moments:
    """Return the moments of the layer's inputs at the drawn places: X as drawn there, and Xq as `module` computes it now."""
    sums: Sums | None = None
    for indices, calls in zip(data.parts(), drawn, strict=True):
        inputs = _inputs_of(module, layer, data, indices, len(calls))
        for x, (places, float_rows) in zip(inputs, calls, strict=True):
            seen = x if layer.input_quantizer is None else layer.input_quantizer(x)
            rows = patches(layer, real_rows(layer, seen, data.mask(indices)), places)
            sums = sums or Sums(rows, MemoryBudget(memory), 2)
            sums.add(float_rows.to(rows.device), rows)
    assert sums is not None  # there is at least one chunk
    return sums.moments(centred)


def float_patches(layers: Mapping[str, nn.Module], float_module: nn.Module, data: UnitData, seed: int, memory: int) -> dict[str, Drawn]:
    """Draw places in every call of `layers` in the float unit, and gather its patches there."""
    budget, generator = MemoryBudget(memory), torch.Generator().manual_seed(seed)
    drawn: dict[str, Drawn] = {name: [] for name in layers}
    mask: Tensor | None = None
    share, left = 0.0, math.inf

    def read(name: str, layer: nn.Module, x: Tensor) -> None:
        nonlocal left
        x = real_rows(layer, x, mask)
        places = draw_places(layer, x.shape, max(1, round(share * patches_drawn(layer))), generator)
        rows = patches(layer, x, places)
        drawn[name][-1].append((places, budget.allocate(tuple(rows.shape), rows.dtype).copy_(rows)))
        left -= 1
        if not left:
            raise _Reached

    with reading(layers, read):
        for indices in data.parts():
            mask, share = data.mask(indices), len(indices) / data.count
            for calls in drawn.values():
                calls.append([])
            args, kwargs = data.float_arguments(indices)
            with suppress(_Reached):
                float_module(*args, **kwargs)
            left = sum(len(calls[0]) for calls in drawn.values())  # the first pass shows which call is the last
    return drawn


def _inputs_of(module: nn.Module, layer: nn.Module, data: UnitData, indices: Tensor, calls: int) -> list[Tensor]:
    """Return the inputs of the calls of `layer` inside `module`, for some samples on the quantized side; the pass ends at the last call."""
    args, kwargs = data.arguments(indices)
    seen: list[Tensor] = []

    def read(name: str, layer: nn.Module, x: Tensor) -> None:
        seen.append(x)
        if len(seen) == calls:
            raise _Reached

    with reading({"": layer}, read), suppress(_Reached):
        module(*args, **kwargs)
    return seen


class _Reached(Exception):
    """End a forward pass at the last call of the layer to read."""
