"""Candidates: each layer's weights at each weight bit-width, its ranges at each activation bit-width, and the edges' ranges.

A precision combines one of each, so that five by three choices cost five reconstructions and three ranges, not fifteen.
`apply_scheme` installs the chosen ones in a copy of the prepared model: the canonical form.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from anybit.errors import InvalidFile, InvalidInput, SchemeMismatch, some
from anybit.networks.layer_types import type_of
from anybit.networks.layers import (
    Pruned,
    QuantizedLayer,
    fill,
    float_bias,
    float_weight,
    from_rows,
    quantized_layers,
    weight_quantizer_of,
    weight_rows,
)
from anybit.numerics.packing import pack, unpack
from anybit.numerics.quantizers import UniformQuantizer
from anybit.numerics.ranges import LARGEST, activation_range, weight_scale
from anybit.scheme import Precision, Scheme, check_names


@dataclass(frozen=True)
class WeightCandidate:
    """codes int8 [channels, fan-in], scale [channels, 1], bias [channels] or None (the layer has none)."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class ActivationCandidate:
    """scale and integer zero point, both 0-d; both [2] for the operands of a matmul."""

    scale: Tensor
    zero_point: Tensor


@dataclass
class Candidates:
    """(layer, bits) -> candidate, separately for weights and activations; edges: name -> (low, high) at 8 bits."""

    weights: dict[tuple[str, int], WeightCandidate] = field(default_factory=dict)
    activations: dict[tuple[str, int], ActivationCandidate] = field(default_factory=dict)
    edges: dict[str, tuple[float, float]] = field(default_factory=dict)

    def on(self, device: str) -> "Candidates":
        """Return the candidates on `device`."""

        def moved(candidate):
            return type(candidate)(*(None if part is None else part.to(device) for part in vars(candidate).values()))

        weights, activations = ({key: moved(c) for key, c in held.items()} for held in (self.weights, self.activations))
        return Candidates(weights, activations, self.edges)


def weight_candidate(layer: nn.Module, bits: int, estimator: str) -> WeightCandidate:
    """Round the layer's own weights to nearest within an estimated range."""
    rows = weight_rows(layer, float_weight(layer).detach()).float()
    quantizer = UniformQuantizer(bits, True, weight_scale(rows, bits, estimator))
    bias = float_bias(layer)
    return WeightCandidate(quantizer.codes(rows).to(torch.int8), quantizer.scale, None if bias is None else bias.detach().clone())


def frozen_candidate(layer: nn.Module) -> WeightCandidate:
    """Return the candidate in the filled slot of a layer."""
    quantizer = weight_quantizer_of(layer)
    codes = quantizer.codes(weight_rows(layer, float_weight(layer))).to(torch.int8)
    bias = float_bias(layer)
    return WeightCandidate(codes, quantizer.scale.clone(), None if bias is None else bias.detach().clone())


def activation_candidate(samples: Sequence[Tensor], bits: int, estimator: str) -> ActivationCandidate:
    """Return the range for a sample of the layer's input values, or for both operands of a matmul."""
    ranges = [activation_range(sample, bits, estimator) for sample in samples]
    return ActivationCandidate(*ranges[0]) if len(ranges) == 1 else ActivationCandidate(*map(torch.stack, zip(*ranges, strict=True)))


def install(layer: nn.Module, weights: WeightCandidate | None, inputs: ActivationCandidate | None, precision: Precision) -> None:
    """Fill the layer's slots from candidates, in place."""
    weight_quantizer: nn.Module | None = None
    if weights is not None:
        assert precision.weight_bits is not None  # the candidate's bits
        weight_quantizer = put_weight(layer, weights, precision.weight_bits)
    elif precision.weight_bits == 0:
        weight_quantizer = Pruned()
    input_quantizer = None
    if inputs is not None:
        assert precision.activation_bits is not None
        input_quantizer = UniformQuantizer(precision.activation_bits, False, inputs.scale, inputs.zero_point)
    fill(layer, weight_quantizer, input_quantizer)


@torch.no_grad()
def put_weight(layer: nn.Module, weights: WeightCandidate, bits: int) -> UniformQuantizer:
    """Fill the layer's weight slot from a candidate and set its weight and bias, in place; returns the quantizer."""
    quantizer = UniformQuantizer(bits, True, weights.scale)
    float_weight(layer).copy_(from_rows(layer, quantizer.values(weights.codes.float())))
    if weights.bias is not None:
        bias = float_bias(layer)
        assert bias is not None  # a candidate has a bias if its layer has
        bias.copy_(weights.bias)
    layer.weight_quantizer = quantizer
    return quantizer


def apply_scheme(prepared: nn.Module, scheme: Scheme, candidates: Candidates) -> nn.Module:
    """Return a copy of the prepared model with each layer's slots filled as `scheme` says: the canonical form, with float edges."""
    model = copy.deepcopy(prepared)
    layers = quantized_layers(model)
    check_names(scheme, layers, "The model")
    for name, precision in scheme.items():
        _install_chosen(name, layers[name], precision, candidates)
    return model


@contextmanager
def swapped(model: nn.Module, prepared: nn.Module, name: str, precision: Precision, candidates: Candidates) -> Iterator[None]:
    """Give one layer of `model`, a canonical form of `prepared`, another precision inside the block, and restore it exactly afterwards.

    Inside the block, `model` equals the result of `apply_scheme` with this layer at `precision`, without another copy.
    """
    layer, source = model.get_submodule(name), prepared.get_submodule(name)
    assert isinstance(layer, QuantizedLayer)
    slots = layer.weight_quantizer, layer.input_quantizer
    own = [tensor for tensor in layer._parameters.values() if tensor is not None]
    values = [tensor.detach().clone() for tensor in own]
    try:
        with torch.no_grad():
            for tensor, original in zip(own, (p for p in source._parameters.values() if p is not None), strict=True):
                tensor.copy_(original)
        _install_chosen(name, layer, precision, candidates)
        yield
    finally:
        layer.weight_quantizer, layer.input_quantizer = slots
        with torch.no_grad():
            for tensor, value in zip(own, values, strict=True):
                tensor.copy_(value)


def _install_chosen(name: str, layer: nn.Module, precision: Precision, candidates: Candidates) -> None:
    """Fill the layer's slots with the candidates of a precision. Raises SchemeMismatch if there is none."""
    input_bits = precision.activation_bits if type_of(layer).reads_numbers else None
    try:
        weights = candidates.weights[name, precision.weight_bits] if precision.weight_bits else None
        inputs = candidates.activations[name, input_bits] if input_bits else None
    except KeyError as error:
        raise SchemeMismatch(f"There is no candidate for {name} at {precision}. Prepare that bit-width, too.") from error
    install(layer, weights, inputs, precision)


def to_tensors(candidates: Candidates) -> dict[str, Tensor]:
    """Return the candidates as named tensors for a file: packed codes, scales and biases."""
    tensors = {}
    for (name, bits), weights in candidates.weights.items():
        tensors[f"{name}|W{bits}|codes"] = torch.from_numpy(pack(weights.codes.cpu().numpy(), bits))
        tensors[f"{name}|W{bits}|scale"] = weights.scale.flatten()
        if weights.bias is not None:
            tensors[f"{name}|W{bits}|bias"] = weights.bias
    for (name, bits), inputs in candidates.activations.items():
        tensors[f"{name}|A{bits}"] = torch.stack([inputs.scale, inputs.zero_point])
    tensors |= {f"{name}|edge": torch.tensor(ends, dtype=torch.float32) for name, ends in candidates.edges.items()}
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


KEY = re.compile(
    r"(?P<name>.*)\|(?:W(?P<weight_bits>[2-8])\|(?P<part>codes|scale|bias)|A(?P<activation_bits>[2-8])|(?P<edge>edge))", re.DOTALL
)
"""Names of a candidate's tensors."""


def from_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> Candidates:
    """Return the candidates that `to_tensors` wrote, for layers with weights of these (rows, columns). Raises InvalidFile if malformed."""
    parts: dict[tuple[str, int], dict[str, Tensor]] = {}
    candidates = Candidates()
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None or (match["name"] not in shapes and not match["edge"]):
            raise InvalidFile(f"{key} belongs to no layer of the network")
        if match["edge"]:
            candidates.edges[match["name"]] = _ends_from(key, tensor)
        elif match["part"]:
            parts.setdefault((match["name"], int(match["weight_bits"])), {})[match["part"]] = tensor
        else:
            bits = int(match["activation_bits"])
            candidates.activations[match["name"], bits] = _activation_from(key, tensor, bits)
    for (name, bits), stored in parts.items():
        candidates.weights[name, bits] = _weights_from(f"{name} at W{bits}", stored, bits, *shapes[name])
    return candidates


def _weights_from(where: str, parts: Mapping[str, Tensor], bits: int, rows: int, columns: int) -> WeightCandidate:
    codes, scale, bias = (parts.get(part) for part in ("codes", "scale", "bias"))
    if codes is None or codes.dtype != torch.uint8 or codes.dim() != 1:
        raise InvalidFile(f"{where}: the packed codes are missing or not bytes")
    if scale is None or scale.dtype != torch.float32 or scale.shape != (rows,):
        raise InvalidFile(f"{where}: it needs one scale for each of {rows} rows")
    if bias is not None and (not bias.is_floating_point() or bias.dim() != 1 or not torch.isfinite(bias).all()):
        raise InvalidFile(f"{where}: the bias is not a vector of finite numbers")
    _check_scales(where, scale)
    unpacked = torch.from_numpy(unpack(codes.numpy(), bits, rows * columns)).view(rows, columns)
    return WeightCandidate(unpacked, scale[:, None], bias)


def _activation_from(key: str, tensor: Tensor, bits: int) -> ActivationCandidate:
    if tensor.dtype != torch.float32 or tensor.shape not in ((2,), (2, 2)):
        raise InvalidFile(f"{key} is not a scale and zero point")
    scale, zero_point = tensor
    _check_scales(key, scale)
    if not ((zero_point == zero_point.round()) & (zero_point >= 0) & (zero_point < 2**bits)).all():
        raise InvalidFile(f"{key}: zero point {zero_point.tolist()} is not an integer from 0 to {2**bits - 1}")
    return ActivationCandidate(scale, zero_point)


def _ends_from(key: str, tensor: Tensor) -> tuple[float, float]:
    if tensor.dtype != torch.float32 or tensor.shape != (2,) or not -torch.inf < tensor[0] <= tensor[1] < torch.inf:
        raise InvalidFile(f"{key} is not a range")
    low, high = tensor.tolist()
    return low, high


def _check_scales(where: str, scale: Tensor) -> None:
    if not (torch.isfinite(scale).all() and (scale > 0).all()):
        raise InvalidFile(f"{where}: a scale is not a positive finite number")


def check_finite_samples(samples: Mapping[str, Sequence[Tensor]]) -> None:
    """Raise InvalidInput naming the first layer whose input is not finite, or too large for a scale."""
    for name, operands in samples.items():
        if not all(torch.isfinite(sample).all() for sample in operands):
            raise InvalidInput(f"The input of layer {name} is NaN or infinite on the calibration data. Check the data and the network.")
    largest = {name: max((float(one.abs().max()) for one in operands if one.numel()), default=0.0) for name, operands in samples.items()}
    if huge := [name for name, value in largest.items() if value > LARGEST]:
        raise InvalidInput(
            f"The input of layer {some(huge, 3)} reaches {largest[huge[0]]:.3g} on the calibration data; a scale for values beyond "
            f"{LARGEST:.1g} overflows float32. Check the data and the network, or --keep='{_pattern_of(huge, samples)}=float'."
        )


def _pattern_of(chosen: Sequence[str], names: Iterable[str]) -> str:
    """Return the name of the first of the layers, with "*" for numbers if that matches all that are chosen and no other."""
    pattern = re.sub(r"\b\d+\b", "*", chosen[0])
    return pattern if [name for name in names if fnmatchcase(name, pattern)] == list(chosen) else chosen[0]
