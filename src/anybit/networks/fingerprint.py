"""A network's outputs on random inputs, stored with a run, to tell whether a network is the one that the run was made from.

A run's files do not contain everything that the network computes with: buffers that are not persistent, plain attributes and the code
itself are missing, but they show in the outputs. Inputs have the shapes and ranges of the run's own inputs, of which nothing else is
stored. Activations are not quantized, so that rounding differences between machines stay small.
"""

import copy
import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anybit.data.batches import Batch, call, evaluating, tensors_in
from anybit.errors import InvalidFile
from anybit.networks.layers import quantized_layers
from anybit.networks.wiring import without_replacing

TOLERANCE = 1e-3
"""Relative to the outputs' root mean square: above differences between machines, below those of another network."""
NUMBERS, OUTPUTS, VALUES = 2**20, 16, 64
"""At most this many numbers are drawn as inputs, and at most this many values of this many outputs are stored."""
STEP = 2.0**-5
"""Range of drawn numbers in standard deviations; they are stored as int8 codes."""


@dataclass(frozen=True)
class Fingerprint:
    """`structure` of the inputs as JSON, which refers to the tensors in `inputs`; `outputs` of the canonical model and of the `float`
    network: at most [VALUES] of each output, evenly spaced."""

    structure: Any
    inputs: list[Tensor]
    outputs: list[Tensor]
    floats: list[Tensor]


def fingerprint_of(model: nn.Module, batch: Batch, float_model: nn.Module | None = None) -> Fingerprint | None:
    """Return the fingerprint of a canonical model and its float network; `batch` is an example of their inputs.

    None if no such inputs can be drawn: the network rejects them, or its outputs jump (a detector's boxes after suppression), so that two
    machines might disagree.
    """
    drawn: list[Tensor] = []
    try:
        batch = batch.to("cpu")
        structure = _drawn(batch.head(2 if _numbers(batch) <= NUMBERS // 64 else 1).inputs, drawn, torch.Generator().manual_seed(0))
        if sum(tensor.numel() for tensor in drawn) > NUMBERS:
            return None
        inputs = inputs_of(structure, drawn)
        outputs = _outputs(model, inputs)
        floats = [] if float_model is None else _outputs(float_model, inputs)
        nudged = _outputs(model, inputs_of(structure, drawn, nudge=1e-5))
    except Exception:  # the network's own code may raise any error
        return None
    if not outputs or not all(torch.isfinite(values).all() for values in (*outputs, *floats)):
        return None
    return Fingerprint(structure, drawn, outputs, floats) if distance(nudged, outputs) <= TOLERANCE / 4 else None


def outputs_on(model: nn.Module, fingerprint: Fingerprint) -> list[Tensor]:
    """Return some values of a network's outputs on the fingerprint's inputs."""
    return _outputs(model, inputs_of(fingerprint.structure, fingerprint.inputs))


def distance(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference of two values, relative to the expected output's root mean square; infinity if shapes differ."""
    if [len(values) for values in outputs] != [len(values) for values in expected]:
        return torch.inf
    largest = 0.0
    for one, other in zip(outputs, expected, strict=True):
        if len(one):
            difference = float((one - other).abs().max() / other.double().square().mean().sqrt().clamp(min=1e-6))
            largest = max(largest, torch.inf if math.isnan(difference) else difference)
    return largest


def _numbers(batch: Batch) -> int:
    return sum(tensor.numel() for tensor in tensors_in(batch.inputs))


def _drawn(value: Any, drawn: list[Tensor], generator: torch.Generator) -> Any:
    """Draw numbers like those in `value` into `drawn`; returns the structure around them. Raises TypeError for any other value."""
    if isinstance(value, Tensor):
        drawn.append(_codes(value, generator))
        place: dict[str, Any] = {"tensor": len(drawn) - 1, "type": str(value.dtype).removeprefix("torch.")}
        if not value.is_floating_point():
            return place
        spread, mean = torch.std_mean(value.double(), correction=0)
        return place | {"step": float(spread) * STEP, "mean": float(mean)}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _drawn(one, drawn, generator) for key, one in value.items()}}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_drawn(one, drawn, generator) for one in value]}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    raise TypeError(type(value).__name__)


def _codes(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return int8 codes for floats; for integers, numbers between their minimum and maximum, unless they are a mask."""
    if like.is_floating_point():
        return torch.randn(like.shape, generator=generator).div(STEP).round().clamp(-127, 127).to(torch.int8)
    if like.is_complex():
        raise TypeError("complex")
    low, high = (int(like.min()), int(like.max())) if like.numel() else (0, 0)
    if low >= 0 and high <= 1:
        return torch.full(like.shape, high, dtype=like.dtype)
    return torch.randint(low, high + 1, like.shape, generator=generator).to(like.dtype)


def inputs_of(structure: Any, drawn: Sequence[Tensor], nudge: float = 0.0) -> Any:
    """Return inputs for the network. `nudge` changes floats by this relative amount. Raises InvalidFile for a malformed structure."""
    return _placed(structure, dict(enumerate(drawn)), nudge)


def _placed(structure: Any, drawn: dict[int, Tensor], nudge: float) -> Any:
    kind, content = next(iter(structure.items())) if isinstance(structure, dict) and structure else ("", None)
    if kind == "tensor":
        return _tensor(structure, drawn, nudge)
    if kind == "value":
        return content
    if kind == "dict" and isinstance(content, dict):
        return {key: _placed(one, drawn, nudge) for key, one in content.items()}
    if kind in ("list", "tuple") and isinstance(content, list):
        return {"list": list, "tuple": tuple}[kind](_placed(one, drawn, nudge) for one in content)
    raise InvalidFile("its inputs have no structure")


def _tensor(place: Mapping[str, Any], drawn: dict[int, Tensor], nudge: float) -> Tensor:
    codes = drawn.pop(place["tensor"], None) if type(place["tensor"]) is int else None
    dtype, step, mean = getattr(torch, str(place.get("type")), None), place.get("step"), place.get("mean")
    if codes is None or not isinstance(dtype, torch.dtype) or dtype.is_complex:
        raise InvalidFile(
            f"there is no input {reprlib.repr(place['tensor'])} of type {reprlib.repr(place.get('type'))}, or it is named twice"
        )
    if not dtype.is_floating_point:
        return codes.to(dtype)
    if type(step) is not float or type(mean) is not float:
        raise InvalidFile(f"input {place['tensor']} has no step or no mean")
    values = codes.float() * step + mean
    return (values + nudge * values.roll(1, -1) if values.dim() else values).to(dtype)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    if any(tensor.device.type != "cpu" for tensor in model.parameters()):  # an accelerator rounds more coarsely
        model = copy.deepcopy(model).cpu()
    with evaluating(model), without_replacing(), _floats_read(model), _buffers_restored(model):
        tensors = [tensor for tensor in tensors_in(call(model, inputs)) if tensor.is_floating_point()]
    flat = [tensor.float().cpu().flatten() for tensor in tensors[:OUTPUTS]]
    return [values[torch.linspace(0, len(values) - 1, min(VALUES, len(values))).long()].clone() for values in flat]


@contextmanager
def _floats_read(model: nn.Module) -> Iterator[None]:
    """Leave the layers' inputs float inside the block."""
    quantizers = [(layer, layer.input_quantizer) for layer in quantized_layers(model).values()]
    for layer, _ in quantizers:
        layer.input_quantizer = None
    try:
        yield
    finally:
        for layer, quantizer in quantizers:
            layer.input_quantizer = quantizer


@contextmanager
def _buffers_restored(model: nn.Module) -> Iterator[None]:
    """Restore buffers after the block."""
    before = [(module, dict(module._buffers)) for module in model.modules()]
    for module, buffers in before:
        module._buffers.update({name: buffer.clone() for name, buffer in buffers.items() if buffer is not None})
    try:
        yield
    finally:
        for module, buffers in before:
            module._buffers.clear()
            module._buffers.update(buffers)
