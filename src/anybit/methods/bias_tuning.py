"""Bias tuning: train the biases of a quantized network towards the float network's outputs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anybit.data.batches import Batch, predict
from anybit.data.tasks import Task, distance, named_task, outputs_of
from anybit.networks.layers import QuantizedLayer, float_bias, float_weight, freeze_slots, quantized_layers, weight_rows
from anybit.numerics.quantizers import LearnedInput, UniformQuantizer, frozen
from anybit.progress import tell, track


@dataclass(frozen=True)
class BiasTuningSettings:
    """epochs over the fitting inputs; rate of Adam; scales: train the scales too (as logarithms); patience in epochs; part: samples in
    memory at once, with a batch's gradients summed over its parts (None: all)."""

    epochs: int = 6
    rate: float = 1e-3
    scales: bool = False
    patience: int = 3
    seed: int = 0
    part: int | None = None


class ScaledCodes(nn.Module):
    """Weight slot of a layer during tuning: fixed integer codes times a free scale."""

    codes: Tensor

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
    task: Task | str,
    settings: BiasTuningSettings,
) -> dict[str, float]:
    """Train the biases of the quantized layers, in place, towards the float outputs `references`, one tensor per fitting batch.

    No integer code changes. The best state on held-out inputs is kept; the returned `epochs` is 0 if the start was best. With `scales`,
    weight and input scales are trained too, which the paper does not do; calibration inputs are often the network's own training data, to
    which more freedom can overfit.
    """
    layers = {name: layer for name, layer in quantized_layers(model).items() if isinstance(layer.weight_quantizer, UniformQuantizer)}
    slots = {name: (layer.weight_quantizer, layer.input_quantizer) for name, layer in layers.items()}

    def loss() -> float:
        return distance(outputs_of(model, held_out), held_out_reference, task)

    def add_gradients(index: int) -> None:
        _add_gradients(model, fitting[index], references[index], task, settings.part)

    before = loss()
    result = {"before": before, "after": before, "epochs": 0}
    if settings.scales:
        _free_scales(layers.values())
    parameters = [p for layer in layers.values() for p in _tuned_parameters(layer)]
    if not parameters:
        return result
    for parameter in parameters:
        parameter.requires_grad_(True)  # the user's network may have frozen parameters
    result |= _descend(parameters, add_gradients, loss, before, len(fitting), settings)
    if settings.scales and result["epochs"]:
        for layer in layers.values():
            freeze_slots(layer)
    else:  # exp(log(scale)) is not bitwise the scale, so an unchanged model gets its own quantizers back
        for name, layer in layers.items():
            layer.weight_quantizer, layer.input_quantizer = slots[name]
    return result


def _descend(
    parameters: Sequence[nn.Parameter],
    add_gradients: Callable[[int], None],
    loss: Callable[[], float],
    before: float,
    batches: int,
    settings: BiasTuningSettings,
) -> dict[str, float]:
    """Train the parameters, in place, on batches 0 to `batches`, and leave them at their least held-out loss; return it and its epoch."""
    optimizer = torch.optim.Adam(parameters, lr=settings.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * batches)
    generator = torch.Generator().manual_seed(settings.seed)
    best = [parameter.detach().clone() for parameter in parameters]
    least, best_epoch = before, 0
    for epoch in track(range(1, settings.epochs + 1), "bias tuning", lambda epoch: f"epoch {epoch}"):
        for index in torch.randperm(batches, generator=generator).tolist():
            optimizer.zero_grad()
            add_gradients(index)
            optimizer.step()
            schedule.step()
        after = loss()
        tell("tuning", epoch=epoch, loss=after)
        if after < least:
            least, best_epoch = after, epoch
            best = [parameter.detach().clone() for parameter in parameters]
        elif epoch - best_epoch >= settings.patience:
            break
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    return {"after": least, "epochs": best_epoch}


def _add_gradients(model: nn.Module, batch: Batch, reference: Tensor, task: Task | str, part: int | None) -> None:
    """Add the gradients of the batch's loss, at most `part` samples at a time."""
    done = 0
    for inputs in batch.parts(part or len(batch)):
        with torch.enable_grad():
            outputs = predict(model, inputs)
            target = reference[done : done + len(outputs)]
            named_task(task).distance.loss(outputs, target, reference).backward()
        done += len(outputs)


def _free_scales(layers: Iterable[QuantizedLayer]) -> None:
    for layer in layers:
        layer.weight_quantizer = ScaledCodes(frozen(layer.weight_quantizer), weight_rows(layer, float_weight(layer)).detach())
        if isinstance(layer.input_quantizer, UniformQuantizer):
            layer.input_quantizer = LearnedInput(layer.input_quantizer)


def _tuned_parameters(layer: QuantizedLayer) -> Iterator[nn.Parameter]:
    bias = float_bias(layer)  # None for an embedding
    if isinstance(bias, nn.Parameter):
        yield bias
    for slot in (layer.weight_quantizer, layer.input_quantizer):
        if isinstance(slot, ScaledCodes | LearnedInput):
            yield slot.log_scale
