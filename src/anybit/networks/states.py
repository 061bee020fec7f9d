"""State of a network: copied, compared, restored, and checked."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from anybit.errors import InvalidFile, UnsupportedModel
from anybit.networks.candidates import ActivationCandidate, Candidates, from_tensors, frozen_candidate, to_tensors
from anybit.networks.layers import QuantizedLayer, float_bias, float_weight, from_rows, quantized_layers, rows_shape
from anybit.networks.norms import is_norm, keeps_statistics, running_statistics
from anybit.numerics.affine import dequantize
from anybit.numerics.packing import TensorSpec
from anybit.numerics.quantizers import UniformQuantizer
from anybit.numerics.ranges import LARGEST


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state dict."""
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def restore(model: nn.Module, state: Mapping[str, Tensor | None]) -> None:
    """Restore buffers to the values in `state`, in place."""
    for key, tensor in state.items():
        owner, _, buffer = key.rpartition(".")
        setattr(model.get_submodule(owner), buffer, None if tensor is None else tensor.clone())


def snapshot(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the contents of these layers of a canonical model by name, to be stored: codes, ranges and biases, or float weights for layers
    without codes."""
    held = Candidates()
    floats: dict[str, Tensor] = {}
    layers = quantized_layers(model)
    for name in names:
        layer = layers[name]
        if isinstance(layer.weight_quantizer, UniformQuantizer):
            held.weights[name, layer.weight_quantizer.bits] = frozen_candidate(layer)
        else:
            bias = float_bias(layer)
            floats |= {f"{name}|weight": float_weight(layer)} | ({} if bias is None else {f"{name}|bias": bias})
        if isinstance(layer.input_quantizer, UniformQuantizer):
            quantizer = layer.input_quantizer
            held.activations[name, quantizer.bits] = ActivationCandidate(quantizer.scale, quantizer.zero_point)
    return to_tensors(held) | {key: tensor.detach().cpu().clone() for key, tensor in floats.items()}


@torch.no_grad()
def put_back(model: nn.Module, names: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    """Restore the result of `snapshot`, in place, in layers of the same bits. Raises InvalidFile if it does not fit them."""
    quantized = quantized_layers(model)
    layers = {name: quantized[name] for name in names}
    floats = {f"{name}|{part}" for name in layers for part in ("weight", "bias")}
    shapes = {name: rows_shape(layer) for name, layer in layers.items()}
    held = from_tensors({key: tensor for key, tensor in tensors.items() if key not in floats}, shapes)
    changes: list[tuple[Tensor, Tensor]] = []  # all are checked before the first is applied
    for name, layer in layers.items():
        weights, inputs = layer.weight_quantizer, layer.input_quantizer
        if isinstance(weights, UniformQuantizer):
            candidate = held.weights[name, weights.bits]
            values = dequantize(candidate.codes.float(), candidate.scale, torch.zeros(()))
            changes += [(weights.scale, candidate.scale), (float_weight(layer), from_rows(layer, values))]
            bias = candidate.bias
        else:
            changes.append((float_weight(layer), tensors[f"{name}|weight"]))
            bias = tensors.get(f"{name}|bias")
        if bias is not None:
            if layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros(layer.weight.shape[0], device=float_weight(layer).device))
            changes.append((layer.bias, bias))
        if isinstance(inputs, UniformQuantizer):
            input_candidate = held.activations[name, inputs.bits]
            changes += [(inputs.scale, input_candidate.scale), (inputs.zero_point, input_candidate.zero_point)]
    for target, value in changes:
        if target.shape != value.shape:
            raise InvalidFile(f"a tensor is {tuple(value.shape)} where the network has {tuple(target.shape)}")
    for target, value in changes:
        target.copy_(value)


def check_sizes(layers: Mapping[str, nn.Module]) -> None:
    """Raise UnsupportedModel naming the first layer whose weight or bias, after folding, is too large to be quantized."""
    for name, layer in layers.items():
        for key, tensor in (("weight", float_weight(layer)), ("bias", float_bias(layer))):
            largest = 0.0 if tensor is None or not tensor.numel() else float(tensor.detach().abs().max())
            if not largest <= LARGEST:
                raise UnsupportedModel(
                    f"{name}: the {key}, with its batch norm folded in, reaches {largest:.3g}; a scale for values "
                    f"beyond {LARGEST:.1g} overflows float32. Repair the network, or --keep='{name}=float'."
                )


def check_finite_weights(model: nn.Module) -> None:
    """Raise UnsupportedModel naming the first parameter or buffer that holds NaN or infinity, or a variance below zero."""
    for name, tensor in model.state_dict().items():
        if (tensor.is_floating_point() or tensor.is_complex()) and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise UnsupportedModel(f"{name} holds {count} value(s) that are NaN or infinite. Repair or retrain the network first.")
    for name, module in model.named_modules():
        if is_norm(module) and keeps_statistics(module) and (running_statistics(module)[1] < 0).any():
            least = float(running_statistics(module)[1].min())
            raise UnsupportedModel(f"{name} has a variance of {least:.3g}, below zero. Repair it: {name}.running_var.clamp_(min=0).")


STORED_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16",
}  # fmt: skip


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """Return the stored type and shape of a tensor."""
    return TensorSpec(STORED_TYPES[tensor.dtype], tuple(tensor.shape))


def leftovers(prepared: nn.Module, names: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the state dict without the weights of layers `names` and without quantizers: (float32 entries, all others), in its order."""
    coded = {id(prepared.get_submodule(name)) for name in names}
    places = [(name, module) for name, module in prepared.named_modules(remove_duplicate=False) if isinstance(module, QuantizedLayer)]
    skipped = {f"{name}.weight" for name, module in places if id(module) in coded}  # under every name that the network has for it
    quantizers = tuple(f"{name}.{slot}_quantizer." for name, _ in places for slot in ("weight", "input"))
    float32: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in prepared.state_dict().items():
        if key not in skipped and not key.startswith(quantizers):
            (float32 if tensor.dtype == torch.float32 else others)[key] = tensor
    return float32, others


def check_state(model: nn.Module, path: Path) -> None:
    """Raise InvalidFile naming the first tensor of a loaded model that is not finite, or the first negative variance."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InvalidFile(f"{path}: {name} would hold NaN or infinity. Restore the file or run again.")
    for name, module in model.named_modules():
        if is_norm(module) and keeps_statistics(module) and (running_statistics(module)[1] < 0).any():
            raise InvalidFile(f"{path}: {name} has a variance of {running_statistics(module)[1].min():g}. Restore the file or run again.")
