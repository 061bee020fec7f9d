"""Bias tuning: train the biases of a quantized network, end to end, towards the float network's outputs.

    argmin over biases      KL( softmax of the float outputs || softmax of the quantized outputs ),  mean over samples

Where outputs are no class scores, the squared error over the float outputs' power takes the place of the KL divergence.

Source: Hubara, Nahshan, Hanani, Banner, Soudry, "Accurate Post Training Quantization With Small Calibration Sets", ICML 2021,
section 3.5. Deviations: the release also divides the divergence by the number of classes; held-out inputs decide which epoch's state is
taken; scales may be trained too.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybit.data.batches import Batch, predict
from anybit.data.tasks import compares_classes, distance, outputs_of
from anybit.loops.reconstruction import relative_error
from anybit.networks.layers import float_weight, freeze_slots, quantized_layers, weight_rows
from anybit.numerics.quantizers import LearnedInput, UniformQuantizer
from anybit.progress import tell, track


@dataclass(frozen=True)
class BiasTuningSettings:
    """epochs (over the fitting inputs), rate (of Adam), seed
    scales      train the scales too, as logarithms
    patience    epochs without a lower held-out loss after which tuning stops
    chunk_size  samples that are in memory at once, a batch's gradients being summed over its chunks; None: all
    """

    epochs: int = 6
    rate: float = 1e-3
    scales: bool = False
    patience: int = 3
    seed: int = 0
    chunk_size: int | None = None


class ScaledCodes(nn.Module):
    """Fixed integer codes times a free scale: the weight slot of a layer while its outputs are tuned."""

    def __init__(self, quantizer: UniformQuantizer, rows: Tensor):
        super().__init__()
        self.bits = quantizer.bits
        self.register_buffer("codes", quantizer.codes(rows))
        self.log_scale = nn.Parameter(quantizer.scale.log())

    def forward(self, rows: Tensor) -> Tensor:
        return self.codes * self.log_scale.exp()

    def freeze(self, rows: Tensor) -> tuple[Tensor, UniformQuantizer]:
        return self(rows), UniformQuantizer(self.bits, True, self.log_scale.exp())


def tune_biases(
    model: nn.Module,
    fitting: list[Batch],
    references: list[Tensor],
    held_out: list[Batch],
    held_out_reference: Tensor,
    task: str,
    settings: BiasTuningSettings,
) -> dict[str, float]:
    """Train the biases of the quantized layers, in place, towards the float outputs `references`, one tensor a fitting batch.

    No integer code changes. The best state on held-out inputs is taken; `epochs` 0 means that the start was best. With `scales` the
    weight and input scales are trained too, which the paper does not do; calibration inputs are often the network's own training data,
    on which more freedom can fit more than it should.
    """
    layers = {name: layer for name, layer in quantized_layers(model).items() if isinstance(layer.weight_quantizer, UniformQuantizer)}
    slots = {name: (layer.weight_quantizer, layer.input_quantizer) for name, layer in layers.items()}
    before = distance(outputs_of(model, held_out), held_out_reference, task)
    result = {"before": before, "after": before, "epochs": 0}
    if settings.scales:
        _free_scales(layers.values())
    parameters = [p for layer in layers.values() for p in _tuned_parameters(layer)]
    if not parameters:
        return result
    for parameter in parameters:
        parameter.requires_grad_(True)  # the user's network may have been frozen
    optimizer = torch.optim.Adam(parameters, lr=settings.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * len(fitting))
    generator = torch.Generator().manual_seed(settings.seed)
    best = [parameter.detach().clone() for parameter in parameters]
    for epoch in track(range(1, settings.epochs + 1), "bias tuning"):
        for index in torch.randperm(len(fitting), generator=generator).tolist():
            optimizer.zero_grad()
            _add_gradients(model, fitting[index], references[index], task, settings.chunk_size)
            optimizer.step()
            schedule.step()
        after = distance(outputs_of(model, held_out), held_out_reference, task)
        tell("tuning", epoch=epoch, loss=after)
        if after < result["after"]:
            result |= {"after": after, "epochs": epoch}
            best = [parameter.detach().clone() for parameter in parameters]
        elif epoch - result["epochs"] >= settings.patience:
            break
    with torch.no_grad():
        for parameter, values in zip(parameters, best, strict=True):
            parameter.copy_(values)
    if settings.scales and result["epochs"]:
        for layer in layers.values():
            freeze_slots(layer)
    else:  # exp(log(scale)) is not bitwise the scale: an unchanged model gets its own quantizers back
        for name, layer in layers.items():
            layer.weight_quantizer, layer.input_quantizer = slots[name]
    return result


def _add_gradients(model: nn.Module, batch: Batch, reference: Tensor, task: str, chunk_size: int | None) -> None:
    """Add the gradients of the batch's loss, `chunk_size` samples at a time."""
    done = 0
    for inputs in batch.parts(chunk_size or len(batch)):
        with torch.enable_grad():
            outputs = predict(model, inputs)
            target = reference[done : done + len(outputs)]
            (output_loss(outputs, target, task) * _share(target, reference, task)).backward()
        done += len(outputs)


def _share(chunk: Tensor, whole: Tensor, task: str) -> float | Tensor:
    """Return the weight of a chunk's `output_loss` in that of the whole: its share of the rows, or of the power."""
    return len(chunk) / len(whole) if compares_classes(task) else chunk.square().sum() / whole.square().sum().clamp_min(1e-30)


def _free_scales(layers: Iterable[nn.Module]) -> None:
    for layer in layers:
        layer.weight_quantizer = ScaledCodes(layer.weight_quantizer, weight_rows(layer, float_weight(layer)).detach())
        if isinstance(layer.input_quantizer, UniformQuantizer):
            layer.input_quantizer = LearnedInput(layer.input_quantizer)


def _tuned_parameters(layer: nn.Module) -> Iterator[nn.Parameter]:
    if getattr(layer, "bias", None) is not None:
        yield layer.bias
    for slot in (layer.weight_quantizer, layer.input_quantizer):
        if isinstance(slot, ScaledCodes | LearnedInput):
            yield slot.log_scale


def output_loss(outputs: Tensor, reference: Tensor, task: str) -> Tensor:
    """Return what `data.tasks.distance` measures, 0-d, differentiable and in the model's own precision."""
    if compares_classes(task):
        return F.kl_div(F.log_softmax(outputs, -1), F.log_softmax(reference, -1), reduction="none", log_target=True).sum(-1).mean()
    return relative_error(outputs, reference)
