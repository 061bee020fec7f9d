"""Data of one unit: its inputs and outputs in the float network, and its inputs in the quantized network."""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from anybit.data.batches import unpadded
from anybit.data.samples import Calibration
from anybit.networks.capture import Captured, MemoryBudget, capture_calls, carry, chunks
from anybit.networks.layers import QuantizedLayer, quantized_layers
from anybit.networks.wiring import Unit, Wiring


def mix(x: Tensor, quantized: Tensor, drop: float) -> Tensor:
    """Replace a random share `drop` of the elements of `quantized` by those of `x`."""
    # Random bytes, eight to a draw, and a lerp at weight 0 or 1 (exact): several times faster on a CPU than rand and where.
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    stays_float = (words.view(torch.uint8)[: x.numel()] <= max(round(256 * drop), 1) - 1).to(x.dtype)  # "<" would wrap at a share of 1
    return torch.lerp(quantized, x, stays_float.view(x.shape))


@dataclass(frozen=True)
class UnitData:
    """The float inputs and outputs of one unit, and its inputs in the quantized network (None: the float ones).

    `count` samples, or for padded data, whose batches stay whole, `count` batches. At most `chunk` samples are processed at once.
    """

    float_side: Captured
    quantized_side: Captured | None
    count: int
    chunk: int = 32

    def draw(self, size: int) -> Tensor:
        """Draw the indices of `size` random samples, or of one batch."""
        return torch.randint(self.count, (1 if self.float_side.masks else min(size, self.count),))

    def parts(self, limit: int | None = None) -> Iterator[Tensor]:
        """Yield the indices of all samples (of the first `limit`), one forward pass at a time."""
        return chunks(min(self.count, limit or self.count), 1 if self.float_side.masks else self.chunk)

    def mask(self, indices: Tensor) -> Tensor | None:
        """Return the mask of these samples' real tokens; None without padding."""
        return self.float_side.masks[int(indices)] if self.float_side.masks else None

    def arguments(self, indices: Tensor, drop: float = 0.0) -> tuple[tuple, dict]:
        """Return (args, kwargs) of some samples on the quantized side, with a share `drop` of the elements float."""
        args, kwargs = (self.quantized_side or self.float_side).batch(indices)
        if self.quantized_side is None or not drop:
            return args, kwargs
        float_args, float_kwargs = self.float_side.batch(indices)
        mixed = tuple(_mix_argument(f, q, drop) for f, q in zip(float_args, args, strict=True))
        return mixed, {key: _mix_argument(float_kwargs[key], value, drop) for key, value in kwargs.items()}

    def float_arguments(self, indices: Tensor) -> tuple[tuple, dict]:
        """Return (args, kwargs) of some samples on the float side."""
        return self.float_side.batch(indices)

    def targets(self, indices: Tensor) -> Tensor:
        """Return the float outputs of some samples."""
        return self.float_side.outputs(indices)


@dataclass(frozen=True)
class RepeatedData(UnitData):
    """The data of a layer that runs several times in a pass; the samples of its `calls` are numbered one call after the other."""

    calls: tuple[UnitData, ...] = ()

    @classmethod
    def of(cls, calls: Sequence[UnitData]) -> "RepeatedData":
        first = calls[0]
        return cls(first.float_side, first.quantized_side, sum(call.count for call in calls), first.chunk, tuple(calls))

    def _within(self, indices: Tensor) -> tuple[UnitData, Tensor]:
        """Return (the call to which these samples belong, their indices in it)."""
        start, first = 0, int(indices.min())
        for call in self.calls:
            if first < start + call.count:
                return call, indices - start
            start += call.count
        raise IndexError(first)

    def draw(self, size: int) -> Tensor:
        """Draw the indices of `size` random samples of one call, chosen with probability proportional to its samples."""
        place = torch.randint(self.count, (1,))
        call, own = self._within(place)
        return place - own + call.draw(size)

    def parts(self, limit: int | None = None) -> Iterator[Tensor]:
        """Yield the indices of all samples (of the first `limit`, equally many of each call), one forward pass at a time."""
        start = 0
        for call in self.calls:
            yield from (start + indices for indices in call.parts(limit and max(1, limit // len(self.calls))))
            start += call.count

    def mask(self, indices: Tensor) -> Tensor | None:
        call, own = self._within(indices)
        return call.mask(own)

    def arguments(self, indices: Tensor, drop: float = 0.0) -> tuple[tuple, dict]:
        call, own = self._within(indices)
        return call.arguments(own, drop)

    def float_arguments(self, indices: Tensor) -> tuple[tuple, dict]:
        call, own = self._within(indices)
        return call.float_arguments(own)

    def targets(self, indices: Tensor) -> Tensor:
        call, own = self._within(indices)
        return call.targets(own)


def _mix_argument(float_item: Any, quantized_item: Any, drop: float) -> Any:
    is_float = isinstance(quantized_item, Tensor) and quantized_item.is_floating_point()
    return mix(float_item, quantized_item, drop) if is_float else quantized_item


def capture_sides(
    model: nn.Module | None, float_model: nn.Module, unit: Unit, calibration: Calibration, budget: MemoryBudget, chunk: int
) -> list[UnitData]:
    """Capture the unit's fitting and held-out data; without a `model`, the quantized side is left out."""
    sides = []
    for batches, count in zip((calibration.fitting, calibration.held_out), calibration.count(), strict=True):
        float_side = capture_calls(float_model, unit.name, batches, count, budget, outputs=True, constant=[True] * unit.calls)
        quantized_side: Sequence[Captured | None] = [None] * unit.calls
        if model is not None:
            quantized_side = capture_calls(model, unit.name, batches, count, budget, constant=[one.constant for one in float_side])
        counts = [1 if one.constant else len(batches) if one.masks else count for one in float_side]
        calls = [UnitData(*call, chunk) for call in zip(float_side, quantized_side, counts, strict=True)]
        sides.append(calls[0] if len(calls) == 1 else RepeatedData.of(calls))
    return sides


def carried_side(
    side: UnitData, model: nn.Module, float_model: nn.Module, previous: Unit, unit: Unit, wiring: Wiring, budget: MemoryBudget
) -> UnitData:
    """Compute the data of `unit` from that of the `previous` one, whose output is its only input, so that nothing before it runs again."""
    finish = wiring.activation_after(previous.name) or identity
    before, float_module = model.get_submodule(previous.name), float_model.get_submodule(unit.name)
    read = wiring.module_inputs[unit.name]
    device, whole = side.float_side.device, side.float_side.masks is not None

    def quantized_output(indices: Tensor) -> Tensor:
        args, kwargs = side.arguments(indices)
        return finish(before(*args, **kwargs))

    def float_output_of(indices: Tensor) -> Tensor:
        args, kwargs = read.filled(float_input.rows(indices).to(device))
        return float_module(*args, **kwargs)

    float_input = carry(lambda indices: finish(side.targets(indices)), side.count, budget, whole, side.chunk)
    float_output = carry(float_output_of, side.count, budget, whole, side.chunk)
    quantized_input = carry(quantized_output, side.count, budget, whole, side.chunk)
    float_side = Captured(read.filled(float_input), float_output, device, side.float_side.masks)
    return replace(side, float_side=float_side, quantized_side=Captured(read.filled(quantized_input), None, device))


def relative_error(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the squared error over the target's power, 0-d, without padding by `mask`."""
    output, target = unpadded(output, mask), unpadded(target, mask)
    # In units of a power of two, which changes no digit: squares of values from 1e19 on, or below 1e-19, are beyond float32.
    largest = target.detach().abs().amax()
    unit = torch.ldexp(torch.ones_like(largest), -torch.frexp(largest).exponent.clamp_min(-126))
    output, target = output * unit, target * unit
    return (output - target).square().sum() / target.square().sum().clamp_min(1e-30)


@torch.no_grad()
def unit_error(module: nn.Module, data: UnitData, finish: Callable[[Tensor], Tensor], limit: int | None = None) -> float:
    """Return squared error over power of the unit's output on (the first `limit` samples of) `data`, without dropping."""
    error, power = 0.0, 0.0
    for indices in data.parts(limit):
        args, kwargs = data.arguments(indices)
        target = unpadded(finish(data.targets(indices)), data.mask(indices))
        error += float((unpadded(finish(module(*args, **kwargs)), data.mask(indices)) - target).double().square().sum())
        power += float(target.double().square().sum())
    return error / max(power, sys.float_info.min)


def layers_in(module: nn.Module) -> dict[str, QuantizedLayer]:
    return {"": module} if isinstance(module, QuantizedLayer) else quantized_layers(module)


def identity(output: Tensor) -> Tensor:
    return output


def states_of(layers: Mapping[str, QuantizedLayer]) -> dict[str, dict[str, Tensor]]:
    """Copy the fitted state of each layer; other buffers of the module are left out."""
    return {name: copy.deepcopy(layer.state_dict()) for name, layer in layers.items()}


def load_states(layers: Mapping[str, QuantizedLayer], states: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name, layer in layers.items():
        layer.load_state_dict(states[name])
