"""HAWQ-V2: predict the loss of each layer's quantization from the mean trace of its Hessian, instead of measuring it.

    L(W + E) - L(W)  =  1/2 E^T H E  =  Tr(H) / n  ||E||^2 / 2           at a minimum; E is the rounding error of n weights
    Tr(H)            =  mean over v of  v^T H v,   v of random signs      Hutchinson; H v is the gradient of v^T (gradient of L)

The same holds for a layer's inputs, over the elements of all samples. One set of signs for all tensors gives every trace from one product:
terms between two tensors have mean zero. The cost does not depend on the number of bit-widths.

Source: Dong, Yao, Arfeen, Gholami, Mahoney, Keutzer, "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks", NeurIPS 2020
(arXiv 1911.03852), equations 8 to 12. Deviations:

  * L is the distance of the outputs to the float network's, which needs no labels. The float network is its minimum, so that H is the
    Fisher information where the distance is a divergence: the estimate is also that of FIT (Zandonati et al., 2022).
  * The factor 1/2, which the paper drops, makes the estimate a loss, as the measured table holds: `total` predicts the scheme's.
  * E is the error of rounding to nearest, as published, whatever the candidates are. A solver's error is larger, but not random: it lies
    where the Hessian is small, which a mean trace cannot tell.
  * 16 products for each batch (published: up to 50 in all).
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from anybit.allocation.sensitivity import Row, SensitivityTable, rows_to_measure
from anybit.data.batches import Batch, predict
from anybit.data.tasks import Task, distance, named_task, outputs_of
from anybit.files.cache import Cache
from anybit.networks.candidates import Candidates, apply_scheme
from anybit.networks.layer_types import type_of
from anybit.networks.layers import QuantizedLayer, float_weight, quantized_layers, weight_rows
from anybit.networks.rounding import Grid, round_edges
from anybit.numerics.quantizers import UniformQuantizer
from anybit.numerics.ranges import weight_scale
from anybit.progress import tell, track
from anybit.scheme import FLOAT, Precision, Scheme

PRODUCTS = 16
"""Products of the Hessian with random signs, for each batch."""
SEED = 0


class Watched(nn.Module):
    """Input slot of a layer that keeps the inputs of a pass, and sums the squared rounding errors of the candidates over all passes."""

    def __init__(self, quantizers: Mapping[int, UniformQuantizer]):
        super().__init__()
        self.quantizers = quantizers
        self.inputs: list[Tensor] = []
        self.errors: dict[int, float] = dict.fromkeys(quantizers, 0.0)

    def forward(self, x: Tensor, operand: int | None = None) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        self.inputs.append(x)
        with torch.no_grad():
            for bits, quantizer in self.quantizers.items():
                self.errors[bits] += float((quantizer(x, operand) - x).double().square().sum())
        return x


def hawq_sensitivity(
    prepared: nn.Module,
    candidates: Candidates,
    choices: Mapping[str, Sequence[Precision]],
    held_out: list[Batch],
    reference: Tensor,
    task: Task | str,
    cache: Cache = Cache(),
    edges: Mapping[str, Grid] = {},
) -> SensitivityTable:
    """Estimate every row that `choices` (layer -> precisions) needs, as `measure_sensitivity` measures it.

    `reference` are the float model's outputs on `held_out`. The base is float, and a pair of weights and inputs the sum of two rows.
    """
    float_scheme = Scheme({name: options[0] if len(options) == 1 else FLOAT for name, options in choices.items()})

    def measured_floor() -> float:
        return distance(outputs_of(round_edges(apply_scheme(prepared, float_scheme, candidates), edges), held_out), reference, task)

    def estimated() -> dict[str, float]:
        rows = _estimate(apply_scheme(prepared, float_scheme, candidates), candidates, choices, held_out, reference, task)
        return {f"{layer} {precision}": loss for (layer, precision), loss in rows.items()}

    floor = cache.value("floor", measured_floor, float)
    losses = cache.value("Hessian traces", estimated, dict)
    measured = {}
    for layer, precision in rows_to_measure(choices, pairs=False):
        measured[layer, precision] = losses.get(f"{layer} {precision}", 0.0)  # nothing to choose: its loss is the same in every scheme
        tell("sensitivity", layer=layer, precision=str(precision), loss=measured[layer, precision])
    return SensitivityTable(measured, FLOAT, sum(map(len, held_out)), False, floor)


def _estimate(
    model: nn.Module,
    candidates: Candidates,
    choices: Mapping[str, Sequence[Precision]],
    held_out: list[Batch],
    reference: Tensor,
    task: Task | str,
) -> dict[Row, float]:
    """Return (layer, W or A precision) -> predicted loss of rounding it in the float `model`, whose slots are used."""
    layers = {name: layer for name, layer in quantized_layers(model).items() if len(choices[name]) > 1}
    if not layers:
        return {}
    slots = {name: Watched(_input_quantizers(name, candidates)) for name in layers}
    for name, slot in slots.items():
        layers[name].input_quantizer = slot
    traces, sizes = hessian_traces(model, slots, held_out, reference, task)
    rows = {}
    for name, layer in layers.items():
        mean = {key: max(trace, 0.0) / sizes[key] for key, trace in traces.items() if key[0] == name}  # noise may make it negative
        for bits, error in _weight_errors(name, layer, candidates).items():
            rows[name, Precision(bits, None)] = mean.get((name, "weight"), 0.0) * error / 2
        for bits, error in slots[name].errors.items():
            rows[name, Precision(None, bits)] = mean.get((name, "inputs"), 0.0) * error / 2
    return rows


Traces = dict[tuple[str, str], float]


def hessian_traces(
    model: nn.Module, slots: Mapping[str, Watched], batches: Sequence[Batch], reference: Tensor, task: Task | str
) -> tuple[Traces, Traces]:
    """Return ((layer, "weight" or "inputs") -> trace of the Hessian of the mean distance to the outputs, numbers in the tensor).

    `slots` are in the layers of these names in the prepared `model`. Inputs count for each call and sample.
    """
    traces: Traces = defaultdict(float)
    sizes: Traces = defaultdict(float)
    layers = {name: model.get_submodule(name) for name in slots}
    weights = {name: float_weight(layer) for name, layer in layers.items() if type_of(layer).has_weights}
    for weight in weights.values():
        weight.requires_grad_(True)
    sizes |= {(name, "weight"): weight.numel() for name, weight in weights.items()}
    generator = torch.Generator(reference.device).manual_seed(SEED)
    for batch in track(batches, "sensitivity", lambda batch: f"{len(batch)} samples"):
        with torch.enable_grad(), sdpa_kernel([SDPBackend.MATH]):  # fused attention has first derivatives alone
            outputs = predict(model, batch)
            loss = named_task(task).distance.loss(outputs, outputs.detach(), reference)
            tensors: list[tuple[tuple[str, str], Tensor]] = [((name, "weight"), weight) for name, weight in weights.items()]
            for name, slot in slots.items():
                tensors += [((name, "inputs"), x) for x in slot.inputs if x.is_floating_point()]
                slot.inputs.clear()
            for key, quadratic in _quadratic_forms(loss, tensors, generator):
                traces[key] += quadratic / PRODUCTS
        for (name, kind), tensor in tensors:
            sizes[name, kind] += tensor.numel() if kind == "inputs" else 0
    return traces, sizes


def _quadratic_forms(
    loss: Tensor, tensors: Sequence[tuple[tuple[str, str], Tensor]], generator: torch.Generator
) -> Iterator[tuple[tuple[str, str], float]]:
    """Yield (key, v^T H v) of each tensor, for each of PRODUCTS sets of signs v."""
    every = [tensor for _, tensor in tensors]
    gradients = torch.autograd.grad(loss, every, create_graph=True, allow_unused=True)
    used = [at for at, gradient in enumerate(gradients) if gradient is not None and gradient.requires_grad]
    for _ in range(PRODUCTS if used else 0):
        signs = [torch.randint(0, 2, one.shape, generator=generator, device=one.device).to(one.dtype) * 2 - 1 for one in every]
        products = torch.autograd.grad(
            [gradients[at] for at in used], every, [signs[at] for at in used], retain_graph=True, allow_unused=True
        )
        for (key, _), sign, product in zip(tensors, signs, products, strict=True):
            if product is not None:
                yield key, float((sign * product).double().sum())


def _weight_errors(name: str, layer: QuantizedLayer, candidates: Candidates) -> dict[int, float]:
    """Return weight bits -> squared error of rounding to nearest, for the bits of the candidates."""
    errors = {}
    rows = weight_rows(layer, float_weight(layer)).detach()
    for bits in sorted({bits for owner, bits in candidates.weights if owner == name}):
        quantizer = UniformQuantizer(bits, True, weight_scale(rows, bits, "mse"))
        errors[bits] = float((quantizer(rows) - rows).double().square().sum())
    return errors


def _input_quantizers(name: str, candidates: Candidates) -> dict[int, UniformQuantizer]:
    """Return activation bits -> quantizer of the layer's candidate."""
    return {
        bits: UniformQuantizer(bits, False, one.scale, one.zero_point)
        for (owner, bits), one in candidates.activations.items()
        if owner == name
    }
