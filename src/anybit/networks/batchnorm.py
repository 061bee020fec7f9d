"""Fold batch norms before quantization, and correct the statistics after it.

Fold:   W' = W gamma / sqrt(var + eps)        b' = (b - mean) gamma / sqrt(var + eps) + beta        (per output channel)

Tune:   quantization shifts the mean and the deviation of every channel. With mu_q, sigma_q of the quantized layer's output and the
        desired mu_f, sigma_f,

        gain = sigma_f / sigma_q        W' = W gain        scale' = scale gain        b' = (b - mu_q) gain + mu_f

        Weight and scale are multiplied by the same positive factor, so no integer code changes.

Source: Hubara et al., "Accurate Post Training Quantization With Small Calibration Sets", ICML 2021, section 3.4 (batch-norm tuning).
Deviation: the paper takes mu_f = beta and sigma_f = |gamma|, the statistics of augmented training images. By default the float network's
statistics on the *same* calibration images are matched instead, which removes the shift between the two sets of images;
`target="prior"` selects the paper's form.
"""

import copy
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anybit.data.batches import Batch, call, evaluating, map_tensors, read_output
from anybit.errors import UnsupportedModel
from anybit.networks.layer_types import COVERED, type_of
from anybit.networks.layers import float_bias, float_weight, from_rows, weight_rows
from anybit.networks.norms import (
    BatchNorm,
    gain_and_shift,
    gamma_and_beta,
    is_norm,
    keeps_statistics,
    only_normalizes_first,
    running_statistics,
    tracking_norms,
    without_normalization,
)
from anybit.networks.wiring import BATCH_NORM, LAYER, RESHAPES, Wiring, observe_outputs
from anybit.numerics.quantizers import UniformQuantizer

SIZES = (1.0, 1e3, 1e-3)
"""Factors of a layer's inputs at which it is tested: a clamp shows at one of them."""


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation of each output channel, [channels] each."""

    mean: Tensor
    deviation: Tensor


def foldable(model: nn.Module, wiring: Wiring) -> dict[str, str]:
    """Return layer -> the norm that can fold into it: its only reader, both called once, with running statistics."""
    pairs = {}
    for layer in wiring.layer_names():
        norm = wiring.batch_norm_after(layer)
        if norm is not None and _obstacle(model, wiring, layer, norm) is None:
            pairs[layer] = norm
    return pairs


def _obstacle(model: nn.Module, wiring: Wiring, name: str, norm_name: str) -> str | None:
    """Return why the norm cannot fold into the layer whose only reader it is; None if it can."""
    layer, norm = model.get_submodule(name), model.get_submodule(norm_name)
    if norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm):
        return "hooks, or a forward of this one object, are at work on it"
    if not keeps_statistics(norm):
        return "it has no running statistics and normalizes each batch by its own"
    if not type_of(layer).sums:
        return f"it reads {name}, whose outputs are not weighted sums"
    if layer.weight.dtype != torch.float32:
        return f"the weight of {name} is {layer.weight.dtype}, which lacks the precision for folding"
    if name in wiring.read_weights:
        return f"the weight of {name} is also used elsewhere"
    if not only_normalizes_first(norm, wiring.operation(norm_name).shape):
        return f"the forward of {type(norm).__name__} does not begin with a normalization by running statistics"
    return None


def unfolded(model: nn.Module, wiring: Wiring, pairs: Mapping[str, str]) -> dict[str, str]:
    """Return norm -> why it is not folded, for each norm that ran and is in none of `pairs`."""
    norms = dict.fromkeys(op.name for op in wiring.operations if op.kind == BATCH_NORM and op.name not in pairs.values())
    return {name: _reason(model, wiring, name) for name in norms}


def _reason(model: nn.Module, wiring: Wiring, name: str) -> str:
    operation = wiring.operation(name)
    if wiring.calls[name] > 1:
        return f"it runs {wiring.calls[name]} times in one forward pass"
    if not operation.inputs:
        return "the operation that computes its input was not observed"
    value = operation.inputs[0]
    maker = wiring.maker(value)
    while maker is not None and maker.kind in RESHAPES and wiring.only_reader(value) is not None:
        value = maker.inputs[0]
        maker = wiring.maker(value)
    if maker is None:
        return "it reads the network's input"
    if maker.kind != LAYER:
        return f"it reads the output of {maker.name}, which is not a layer"
    if wiring.batch_norm_after(maker.name) == name:
        return _obstacle(model, wiring, maker.name, name) or "folding it changes the network's outputs"
    if wiring.calls[maker.name] > 1:
        return f"{maker.name} before it runs {wiring.calls[maker.name]} times in one forward pass"
    if wiring.only_reader(value) is None:
        return f"the output of {maker.name} is also read elsewhere"
    return f"it does not normalize all channels of {maker.name} before it"


@dataclass(frozen=True)
class Folded:
    """A folded copy of a network: the folded pairs, the statistics of their batch norms, and the copy's wiring."""

    model: nn.Module
    norms: dict[str, str]
    promised: dict[str, ChannelStatistics]
    wiring: Wiring


def fold_checked(model: nn.Module, pairs: Mapping[str, str], example: Batch, outputs: Tensor) -> Folded:
    """Fold a copy, observe it, and compare its outputs with `outputs`, those of the model on `example`.

    A layer with a custom forward (an activation or a clamp inside, a standardized weight) may not be affine in its weight, and a batch norm
    may be read outside of its call: such layers keep their batch norm. Raises UnsupportedModel if the outputs still differ.
    """
    own_forward = {name for name in pairs if _has_own_forward(model.get_submodule(name))}
    affine = _affine_layers(model, own_forward, example)
    pairs = {name: norm for name, norm in pairs.items() if name not in own_forward - affine}
    plain = {name: norm for name, norm in pairs.items() if name not in own_forward}
    for chosen in (lambda: pairs, lambda: plain, lambda: _harmless(model, plain, example, outputs)):
        folding = chosen()
        folded, promised = fold(model, folding)
        wiring = _wiring_if_same(folded, example, outputs)
        if wiring is not None:
            return Folded(folded, dict(folding), promised, wiring)
    raise UnsupportedModel(
        f"Folding the batch norms of {', '.join(pairs)} changes the network's outputs. Fold them yourself before the run."
    )


def _has_own_forward(layer: nn.Module) -> bool:
    """Return whether the layer may compute something other than its type does."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return "forward" in vars(layer) or bool(hooks) or type(layer) not in COVERED


@torch.no_grad()
def _affine_layers(model: nn.Module, names: set[str], example: Batch) -> set[str]:
    """Return those of the layers that are affine in weight and bias on their inputs of `example`, also when these are scaled."""
    read: dict[str, tuple[Any, Any]] = {}

    def listen(name: str) -> Callable:
        def keep(layer: nn.Module, args: Any, kwargs: Any) -> None:
            read.setdefault(name, map_tensors((args, kwargs), Tensor.clone))

        return keep

    hooks = [model.get_submodule(name).register_forward_pre_hook(listen(name), with_kwargs=True) for name in names]
    try:
        with evaluating(model):
            call(model, example.inputs) if names else None
    finally:
        for hook in hooks:
            hook.remove()
    return {name for name, (args, kwargs) in read.items() if _is_affine(model.get_submodule(name), args, kwargs)}


def _is_affine(layer: nn.Module, args: Any, kwargs: Any) -> bool:
    """Return whether each output channel scales with its weight and bias, and shifts with its bias, at every input scale."""
    with suppress(Exception):  # a forward that accepts no other inputs is not checked
        plain, changed = copy.deepcopy(layer).eval(), copy.deepcopy(layer).eval()
        rows = weight_rows(layer, float_weight(layer))
        factors = torch.linspace(-1.5, 2, len(rows), device=rows.device)
        scale_weight(changed, factors)
        bias = float_bias(layer)
        bias = torch.zeros_like(factors) if bias is None else bias
        for size in SIZES:
            own_args, own_kwargs = map_tensors((args, kwargs), partial(_scaled, size=size))
            before = plain(*own_args, **own_kwargs)
            addend = before.abs().max()
            changed.bias = nn.Parameter(bias * factors + addend)
            after = changed(*own_args, **own_kwargs)
            shape = [-1] if type_of(layer).channels_last else [-1, *[1] * (before.dim() - 2)]
            if (after - (before * factors.view(shape) + addend)).abs().max() > 1e-4 * addend.clamp_min(1e-30):
                return False
        return True
    return False


def _scaled(tensor: Tensor, size: float) -> Tensor:
    return tensor * size if tensor.is_floating_point() else tensor


def _harmless(model: nn.Module, pairs: Mapping[str, str], example: Batch, outputs: Tensor) -> dict[str, str]:
    """Return those of `pairs` that change no output when folded one at a time."""
    return {layer: norm for layer, norm in pairs.items() if _wiring_if_same(fold(model, {layer: norm})[0], example, outputs)}


@torch.no_grad()
def _wiring_if_same(folded: nn.Module, example: Batch, before: Tensor) -> Wiring | None:
    """Observe `folded` and return its wiring if its outputs on `example` equal those `before` the fold, else None."""
    with suppress(Exception):  # the forward may access attributes that only a batch norm has
        wiring, output = observe_outputs(folded, example)
        after = read_output(output, example)
        if not torch.isfinite(before).all():
            return wiring  # the data or the network is at fault, and a later check says so
        same = (before - after).abs().max() <= 1e-3 * before.abs().max().clamp_min(1e-6)
        return wiring if same else None
    return None


@torch.no_grad()
def fold(model: nn.Module, pairs: Mapping[str, str]) -> tuple[nn.Module, dict[str, ChannelStatistics]]:
    """Return a copy of `model` with each batch norm of `pairs` folded into its layer, and the expected statistics of each (beta, |gamma|).

    A layer whose weight slot is filled keeps its codes and its scales are multiplied, so gamma must be positive.
    """
    folded = copy.deepcopy(model)
    promised = {}
    for layer_name, norm_name in pairs.items():
        layer, norm = folded.get_submodule(layer_name), folded.get_submodule(norm_name)
        gain, shift = gain_and_shift(norm)  # in double precision: the fold must not cost the float network anything
        own = float_bias(layer)
        scale_weight(layer, gain)
        layer.bias = nn.Parameter((shift if own is None else own.double() * gain + shift).to(float_weight(layer).dtype))
        promised[layer_name] = _promised(norm)
        _become(norm, without_normalization(norm))
    return folded, promised


def _promised(norm: nn.Module) -> ChannelStatistics:
    """Return beta and |gamma|, the channel statistics during training."""
    (mean, _), (gamma, beta) = running_statistics(norm), gamma_and_beta(norm)
    return ChannelStatistics(
        torch.zeros_like(mean) if beta is None else beta.detach().clone(), torch.ones_like(mean) if gamma is None else gamma.detach().abs()
    )


@torch.no_grad()
def flip_negative(model: nn.Module, pairs: Mapping[str, str]) -> None:
    """Make every gamma of `pairs` positive, in place, without changing the outputs: weight, biases, mean and gamma change sign.

    Needed before quantized weights are trained: a scale cannot be multiplied by a negative gamma.
    """
    for layer_name, norm_name in pairs.items():
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        gamma, _ = gamma_and_beta(norm)
        if gamma is None:
            continue
        sign = torch.where(gamma < 0, -1.0, 1.0)
        weight = float_weight(layer)
        weight.copy_(from_rows(layer, weight_rows(layer, weight) * sign[:, None]))
        for tensor in (float_bias(layer), running_statistics(norm)[0], gamma):
            if tensor is not None:
                tensor.mul_(sign)


def folded_gammas(model: nn.Module, pairs: Mapping[str, str]) -> list[nn.Parameter]:
    """Return the gammas that fold into scales and must stay positive; with a norm for each bit-width, those of all of them."""
    norms = [module for name in pairs.values() for module in model.get_submodule(name).modules() if is_norm(module)]
    return [norm.weight for norm in norms if isinstance(norm.weight, nn.Parameter)]


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[Batch], norms: Sequence[BatchNorm] | None = None) -> None:
    """Set the running statistics of every batch norm (or of `norms`) to those of `batches`, in place; all else is in evaluation mode."""
    if norms is None:
        norms = tracking_norms(model)
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        seen = 0
        for batch in batches:
            seen += len(batch)
            for norm in norms:
                norm.momentum = len(batch) / seen  # an average over all samples
            call(model, batch.inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _become(module: nn.Module, other: nn.Module) -> None:
    """Turn `module` into `other` wherever the network holds it: under several names, in a list, in a function's closure."""
    module.__class__, module.__dict__ = type(other), vars(other)


@torch.no_grad()
def channel_statistics(model: nn.Module, layers: Iterable[str], batches: Iterable[Batch]) -> dict[str, ChannelStatistics]:
    """Return mean and deviation of each layer's output channels over `batches`, computed in double precision."""
    outputs_of_layer = {name: lambda args, kwargs, output: [output] for name in layers}
    return {name: statistics for name, (statistics,) in _statistics(model, outputs_of_layer, batches).items()}


@torch.no_grad()
def twin_statistics(
    model: nn.Module, twins: Mapping[str, Sequence[nn.Module]], batches: Iterable[Batch]
) -> dict[str, list[ChannelStatistics]]:
    """Return the statistics of each layer's `twins`, quantized copies that read the same inputs as the layer in `model`, in one pass."""
    outputs_of_twins = {
        name: lambda args, kwargs, output, copies=copies: (twin(*args, **kwargs) for twin in copies) for name, copies in twins.items()
    }
    return _statistics(model, outputs_of_twins, batches)


def _statistics(
    model: nn.Module, outputs: Mapping[str, Callable[..., Iterable[Tensor]]], batches: Iterable[Batch]
) -> dict[str, list[ChannelStatistics]]:
    """Return statistics of the tensors that `outputs` (layer -> function of its arguments and output) computes in every call."""
    sums: dict[str, list[tuple]] = {}

    def listen(name: str) -> Callable:
        def add(layer: nn.Module, args, kwargs, output: Tensor) -> None:
            parts = [channel_sums(layer, one) for one in outputs[name](args, kwargs, output)]
            totals = sums.get(name, [(0, 0.0, 0.0)] * len(parts))
            sums[name] = [tuple(map(operator.add, total, part)) for total, part in zip(totals, parts, strict=True)]

        return add

    hooks = [model.get_submodule(name).register_forward_hook(listen(name), with_kwargs=True) for name in outputs]
    try:
        for batch in batches:
            call(model, batch.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: [statistics_from_sums(*total) for total in sums[name]] for name in outputs}


def channel_sums(layer: nn.Module, output: Tensor) -> tuple[int, Tensor, Tensor]:
    """Return (values per channel, their sums, the sums of their squares), the latter two [channels] in double precision.

    Each sample's channel is summed first, where its values are contiguous: far faster than reducing across samples at once.
    """
    if type_of(layer).channels_last:
        rows = output.flatten(0, -2).double()
        return len(rows), rows.sum(0), rows.square().sum(0)
    places = tuple(range(2, output.dim()))
    sums = output.sum(places) if places else output
    norms = torch.linalg.vector_norm(output, 2, places) if places else output
    return output.numel() // output.shape[1], sums.double().sum(0), norms.double().square().sum(0)


def statistics_from_sums(count: int, total: Tensor, squares: Tensor) -> ChannelStatistics:
    mean = total / count
    return ChannelStatistics(mean.float(), (squares / count - mean.square()).clamp_min(0).sqrt().float())


@torch.no_grad()
def scale_weight(layer: nn.Module, gain: Tensor) -> None:
    """Multiply the rows of the layer's weight by `gain`; if it is quantized, its scales, so that the codes stay."""
    quantizer = getattr(layer, "weight_quantizer", None)
    weight = float_weight(layer)
    rows = weight_rows(layer, weight)
    if isinstance(quantizer, UniformQuantizer):
        codes = quantizer.codes(rows)
        quantizer.scale.copy_(quantizer.scale * gain[:, None])
        weight.copy_(from_rows(layer, quantizer.values(codes)))
    else:
        weight.copy_(from_rows(layer, rows * gain[:, None]))
