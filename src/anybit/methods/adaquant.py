"""AdaQuant: layer-wise and block-wise calibration on a few unlabelled inputs.

    argmin over V, weight scale, input scale, bias      || W X - Q(W + V) Q(X) ||^2

V is free and continuous, so a weight may move by more than one level (AdaRound only picks up or down). The error is taken after the
activation that follows the unit, where one was observed to. Two forms share one loop, `reconstruct`:

    parallel     X is the float network's: units are independent of each other, and any mix of them can be put together
    sequential   the quantized side sees what the already quantized network gives it: for the scheme that has been chosen

Source: Hubara, Nahshan, Hanani, Banner, Soudry, "Accurate Post Training Quantization With Small Calibration Sets", ICML 2021, eq. 2 and
section 3.1. Deviations, each for a reason that the benchmarks measure:

  * The weight is kept in units of its own step, v = W / scale, and scales as logarithms, so that one learning rate fits every layer and
    bit-width (the paper's absolute 1e-5 cannot move a 2-bit weight).
  * Cosine decay of the learning rates to zero, which settles weights that flip between two codes.
  * Optional dropping of quantization: a random half of the unit's input elements stays float, and so does a random half of each inner
    activation (Wei et al., "QDrop", ICLR 2022).
  * Held-out inputs decide which state is kept: all steps are run, the error on them is looked at a few times on the way, and the best
    state looked at is kept, or the rounded start if nothing beats it. Nothing stops early: it costs what all steps cost.

Bias tuning (section 3.5): the biases alone are trained end to end on the KL divergence to the float network's outputs; the best state on
held-out inputs is kept. The KL is a mean over samples (the release also divides by the number of classes).
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from anybit.data.batches import real
from anybit.data.samples import Calibration
from anybit.errors import AnybitError
from anybit.files.cache import Cache, Entry
from anybit.networks.capture import Captured, MemoryBudget, capture, carry, chunks, give_back
from anybit.networks.layers import QuantizedLayer, fill, float_weight, from_rows, quantized_layers, weight_rows
from anybit.networks.states import put_back, snapshot
from anybit.networks.wiring import Unit, Wiring
from anybit.numerics.affine import fake_quantize
from anybit.numerics.quantizers import LearnedInput, UniformQuantizer
from anybit.progress import tell, track


@dataclass(frozen=True)
class AdaQuantSettings:
    """steps of Adam a unit; batch_size; learning rates, each relative: to a tensor's own step (weights), its logarithm (scales), its mean
    magnitude (biases); drop: share of elements whose activation quantization is skipped; checks: how often held-out error is looked at (all
    steps are run whatever it is)."""

    steps: int = 300
    batch_size: int = 32
    weight_rate: float = 1e-2
    scale_rate: float = 1e-3
    input_rate: float = 1e-3
    bias_rate: float = 2e-3
    drop: float = 0.0
    checks: int = 6
    seed: int = 0


class LearnedWeight(nn.Module):
    """Q(W + V) with v = (W + V) / scale and log(scale) free: the weight slot of a layer while it is reconstructed."""

    def __init__(self, in_steps: Tensor, quantizer: UniformQuantizer):
        super().__init__()
        self.bits, self.limits = quantizer.bits, quantizer.limits
        self.in_steps = nn.Parameter(in_steps.clone())
        self.log_scale = nn.Parameter(quantizer.scale.log())

    def forward(self, rows: Tensor) -> Tensor:
        one, zero = torch.ones((), dtype=rows.dtype), torch.zeros((), dtype=rows.dtype)
        return fake_quantize(self.in_steps, one, zero, *self.limits) * self.log_scale.exp()

    def freeze(self) -> UniformQuantizer:
        return UniformQuantizer(self.bits, True, self.log_scale.exp())


class DroppedInput(LearnedInput):
    """A learned range that leaves a share `drop` of the elements float while training."""

    def __init__(self, quantizer: UniformQuantizer, drop: float):
        super().__init__(quantizer)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        quantized = super().forward(x)
        return mix(x, quantized, self.drop) if self.training and self.drop else quantized


def relative_error(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error over the target's power, of real tokens alone where `mask` says which they are."""
    output, target = real(output, mask), real(target, mask)
    return (output - target).square().sum() / target.square().sum().clamp_min(1e-30)


def mix(x: Tensor, quantized: Tensor, drop: float) -> Tensor:
    """`quantized` with a random share `drop` of its elements replaced by those of `x`."""
    # Random bytes, eight to a draw, and a lerp at weight 0 or 1 (exact): several times faster on a CPU than rand and where.
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    kept_float = (words.view(torch.uint8)[: x.numel()] <= max(round(256 * drop), 1) - 1).to(x.dtype)  # "<" would wrap at a share of 1
    return torch.lerp(quantized, x, kept_float.view(x.shape))


@dataclass(frozen=True)
class UnitData:
    """What one unit is fitted to: its float inputs with the float outputs, and the inputs it will really see (None: the float ones).

    `count` samples; of padded data, whose batches are kept whole, `count` batches. At most `chunk` samples are looked at at once.
    """

    float_side: Captured
    quantized_side: Captured | None
    count: int
    chunk: int = 32

    def draw(self, size: int) -> Tensor:
        """Indices of `size` random samples, or of one batch."""
        return torch.randint(self.count, (1 if self.float_side.masks else min(size, self.count),))

    def parts(self, limit: int | None = None) -> Iterator[Tensor]:
        """Indices of everything (of the first `limit`), a forward pass at a time."""
        return chunks(min(self.count, limit or self.count), 1 if self.float_side.masks else self.chunk)

    def mask(self, indices: Tensor) -> Tensor | None:
        """Which tokens of these samples are real; None where nothing is padded."""
        return self.float_side.masks[int(indices)] if self.float_side.masks else None

    def arguments(self, indices: Tensor, drop: float = 0.0) -> tuple[tuple, dict]:
        """(args, kwargs) of some samples on the quantized side, a share `drop` of their elements float."""
        args, kwargs = (self.quantized_side or self.float_side).batch(indices)
        if self.quantized_side is None or not drop:
            return args, kwargs
        float_args, float_kwargs = self.float_side.batch(indices)
        mixed = tuple(_mix_argument(f, q, drop) for f, q in zip(float_args, args, strict=True))
        return mixed, {key: _mix_argument(float_kwargs[key], value, drop) for key, value in kwargs.items()}

    def targets(self, indices: Tensor) -> Tensor:
        """The float outputs of some samples."""
        return self.float_side.outputs(indices)


def reconstruct(
    module: nn.Module,
    starts: dict[str, Tensor],
    fitting: UnitData,
    held_out: UnitData,
    activation: Callable[[Tensor], Tensor] | None,
    settings: AdaQuantSettings,
) -> dict[str, float]:
    """Fit the quantized layers of `module`, in place, so that its output is the float one's; returns errors before and after.

    `module` is a layer or block of a canonical model, its slots filled. `starts` gives the free weight of each layer (by its name inside
    `module`; "" is the module itself) as [channels, fan-in] in units of the quantizer's scale; it must round to the layer's codes.
    The errors are relative to the target's power, after the activation: `before` and `after` on held-out inputs, `fitted_before` and
    `fitted_after` on as many fitted ones. `steps` is the step whose state was kept; 0 means that nothing beat the start.
    """
    layers = {name: layer for name, layer in _layers_in(module).items() if isinstance(layer.weight_quantizer, UniformQuantizer)}
    if not layers:
        return {}
    finish = activation or _identity
    before = _states(layers)
    errors = {"before": _error(module, held_out, finish), "fitted_before": _error(module, fitting, finish, held_out.count)}

    for name, layer in layers.items():
        layer.weight_quantizer = LearnedWeight(starts[name], layer.weight_quantizer)
        if isinstance(layer.input_quantizer, UniformQuantizer):
            layer.input_quantizer = DroppedInput(layer.input_quantizer, settings.drop)
    best = {"error": errors["before"], "steps": 0, "state": None}
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(settings.seed)
        for step in _descend(module, layers, fitting, finish, settings):
            if step % max(25, settings.steps // settings.checks) == 0 or step == settings.steps:  # a look costs about three steps
                _set_dropping(layers, False)
                error = _error(module, held_out, finish)
                _set_dropping(layers, True)
                if error < best["error"]:
                    best = {"error": error, "steps": step, "state": _states(layers)}

    if best["state"] is not None:
        _load(layers, best["state"])
    _freeze(layers)
    if best["state"] is None:
        _load(layers, before)
    fitted_after = _error(module, fitting, finish, held_out.count)
    return {**errors, "after": best["error"], "fitted_after": fitted_after, "steps": best["steps"]}


def _states(layers: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """What is fitted, layer by layer; what else the module keeps in buffers is its own."""
    return {name: copy.deepcopy(layer.state_dict()) for name, layer in layers.items()}


def _load(layers: Mapping[str, nn.Module], states: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name, layer in layers.items():
        layer.load_state_dict(states[name])


def sequential(
    model: nn.Module,
    float_model: nn.Module,
    units: Sequence[Unit],
    starts: Mapping[str, Tensor],
    wiring: Wiring,
    calibration: Calibration,
    settings: AdaQuantSettings,
    memory: int,
    recall: Cache = Cache(),
) -> dict[str, dict[str, float]]:
    """Reconstruct the units of `model`, in place, one after the other: each sees what the already quantized network gives it.

    `float_model` is the folded network that `model` was made from, `starts` the free weights of all layers (see `reconstruct`), `memory`
    the bytes that captured tensors may take before they spill to disk. What a unit sees is carried over from the unit before it where
    that is all that feeds it, and captured from the inputs on otherwise. Returns each unit's errors.

    `recall` keeps what each unit has come to and takes it up again. Units that it takes up are still carried through to the next one that
    it does not have, since what is carried and what is captured may differ in their last bits.
    """
    report: dict[str, dict[str, float]] = {}
    sides: list[UnitData] = []
    through: list[Unit] = []  # the units since the one that `sides` are of, which is the first

    def reach(unit: Unit) -> list[UnitData]:
        """What `unit` sees, from the nearest of the units before it whose data are at hand or must be captured."""
        nonlocal sides, through
        path = [*through, unit]
        fresh = [at for at, (before, after) in enumerate(pairwise(path), 1) if not wiring.feeds(before.name, after.name)]
        if fresh or not sides:
            path = path[fresh[-1] if fresh else 0 :]
            sides = _capture_sides(model, float_model, path[0], calibration, MemoryBudget(memory // 2), settings.batch_size)
        for before, after in pairwise(path):
            budget = MemoryBudget(memory // 2)  # this unit's tensors and the previous one's are held at once
            sides = [_carried_side(side, model, float_model, before, after, wiring, budget) for side in sides]
        through = []
        return sides

    for unit in track(units, "sequential AdaQuant"):
        recall = recall.keyed(unit.name)  # and on every unit before it
        name = f"sequential AdaQuant of {unit.name}"
        report[unit.name] = _recalled_unit(name, model, unit, starts, partial(reach, unit), wiring, settings, recall)
        through.append(unit)
        tell("unit", unit=unit.name, **report[unit.name])
        give_back()
    return report


def _carried_side(
    side: UnitData, model: nn.Module, float_model: nn.Module, previous: Unit, unit: Unit, wiring: Wiring, budget: MemoryBudget
) -> UnitData:
    """The data of `unit` from that of the `previous` one, whose output is its whole input: nothing before it runs again."""
    finish = wiring.activation_after(previous.name) or _identity
    before, float_module = model.get_submodule(previous.name), float_model.get_submodule(unit.name)

    whole = side.float_side.masks is not None

    def quantized_output(indices: Tensor) -> Tensor:
        args, kwargs = side.arguments(indices)
        return finish(before(*args, **kwargs))

    device = side.float_side.device
    float_input = carry(lambda indices: finish(side.targets(indices)), side.count, budget, whole, side.chunk)
    float_output = carry(lambda indices: float_module(float_input.rows(indices).to(device)), side.count, budget, whole, side.chunk)
    quantized_input = carry(quantized_output, side.count, budget, whole, side.chunk)
    float_side = Captured(((float_input,), {}), float_output, device, side.float_side.masks)
    return replace(side, float_side=float_side, quantized_side=Captured(((quantized_input,), {}), None, device))


def parallel(
    variants: Mapping[int, nn.Module],
    float_model: nn.Module,
    units: Sequence[Unit],
    starts: Mapping[int, Mapping[str, Tensor]],
    wiring: Wiring,
    calibration: Calibration,
    settings: AdaQuantSettings,
    memory: int,
    recall: Cache = Cache(),
) -> dict[str, dict[int, dict[str, float]]]:
    """Reconstruct every unit of every variant (bits -> model), in place, with the float network's inputs: no unit depends on another,
    so layers of any bits can be put together afterwards. What a unit sees is captured once for all variants, unless `recall` has kept what
    all of them have come to.
    """
    report: dict[str, dict[int, dict[str, float]]] = {}
    for unit in track(units, "parallel AdaQuant"):
        sides = cache(partial(_capture_sides, None, float_model, unit, calibration, MemoryBudget(memory), settings.batch_size))
        for bits, model in variants.items():
            name = f"parallel AdaQuant of {unit.name} at W{bits}"
            result = _recalled_unit(name, model, unit, starts[bits], sides, wiring, settings, recall)
            report.setdefault(unit.name, {})[bits] = result
            tell("unit", unit=unit.name, bits=bits, **result)
        sides = None
        give_back()
    return report


def _recalled_unit(
    name: str,
    model: nn.Module,
    unit: Unit,
    starts: Mapping[str, Tensor],
    sides: Callable[[], list[UnitData]],
    wiring: Wiring,
    settings,
    recall: Cache,
) -> dict[str, float]:
    """The unit reconstructed, in place, on what `sides` gives, or as an earlier run left it; its errors."""
    layers = [name for name in unit.layers if name in starts]

    def make() -> Entry:
        errors = _reconstruct_unit(model, unit, starts, *sides(), wiring, settings)
        return Entry(errors, snapshot(model, layers))

    def read(kept: Entry) -> dict[str, float]:
        put_back(model, layers, kept.tensors)
        return {key: int(value) if key == "steps" else float(value) for key, value in kept.record.items()}

    return recall(name, make, read)


def _capture_sides(
    model: nn.Module | None, float_model: nn.Module, unit: Unit, calibration: Calibration, budget: MemoryBudget, chunk: int
) -> list[UnitData]:
    """What the unit is fitted to and judged on; the quantized side is left out where there is no `model`."""
    sides = []
    for batches, count in zip((calibration.fitting, calibration.held_out), calibration.count(), strict=True):
        float_side = capture(float_model, unit.name, batches, count, budget, outputs=True)
        quantized_side = None if model is None else capture(model, unit.name, batches, count, budget)
        sides.append(UnitData(float_side, quantized_side, len(batches) if float_side.masks else count, chunk))
    return sides


def _reconstruct_unit(
    model: nn.Module, unit: Unit, starts: Mapping[str, Tensor], fitting: UnitData, held_out: UnitData, wiring: Wiring, settings
) -> dict[str, float]:
    inner = {layer.removeprefix(unit.name).lstrip("."): starts[layer] for layer in unit.layers if layer in starts}
    return reconstruct(model.get_submodule(unit.name), inner, fitting, held_out, wiring.activation_after(unit.name), settings)


def _descend(module: nn.Module, layers: dict[str, nn.Module], fitting: UnitData, finish, settings: AdaQuantSettings):
    """Adam with cosine decay on random batches; yields after each step."""
    optimizer = torch.optim.Adam(_parameter_groups(layers.values(), settings))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    _set_dropping(layers, True)
    for step in range(1, settings.steps + 1):
        indices = fitting.draw(settings.batch_size)
        args, kwargs = fitting.arguments(indices, settings.drop)
        loss = relative_error(finish(module(*args, **kwargs)), finish(fitting.targets(indices)), fitting.mask(indices))
        if not torch.isfinite(loss):
            raise AnybitError(f"The reconstruction error became {float(loss)} at step {step}. Lower the learning rates.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield step


def _parameter_groups(layers: Iterable[nn.Module], settings: AdaQuantSettings) -> list[dict]:
    layers = list(layers)
    inputs = [layer.input_quantizer for layer in layers if isinstance(layer.input_quantizer, LearnedInput)]
    biases = [layer.bias for layer in layers if getattr(layer, "bias", None) is not None]
    groups = [
        {"params": [layer.weight_quantizer.in_steps for layer in layers], "lr": settings.weight_rate},
        {"params": [layer.weight_quantizer.log_scale for layer in layers], "lr": settings.scale_rate},
        {"params": [quantizer.log_scale for quantizer in inputs], "lr": settings.input_rate},
        *({"params": [bias], "lr": settings.bias_rate * _typical(bias)} for bias in biases),
    ]
    return [group for group in groups if group["params"]]


def _typical(bias: Tensor) -> float:
    """The mean magnitude of a layer's biases, 1 where they are all zero."""
    return float(bias.detach().abs().mean()) or 1.0


def _freeze(layers: dict[str, nn.Module]) -> None:
    """Turn learned quantizers into canonical ones and round the stored weights onto their grids."""
    for layer in layers.values():
        learned, inputs = layer.weight_quantizer, layer.input_quantizer
        with torch.no_grad():
            float_weight(layer).copy_(from_rows(layer, learned(weight_rows(layer, float_weight(layer)))))
        fill(layer, learned.freeze(), inputs.freeze() if isinstance(inputs, LearnedInput) else inputs)


@torch.no_grad()
def _error(module: nn.Module, data: UnitData, finish: Callable[[Tensor], Tensor], limit: int | None = None) -> float:
    """Squared error over power of the unit's output on (the first `limit` samples of) `data`, nothing dropped."""
    error, power = 0.0, 0.0
    for indices in data.parts(limit):
        args, kwargs = data.arguments(indices)
        target = real(finish(data.targets(indices)), data.mask(indices))
        error += float((real(finish(module(*args, **kwargs)), data.mask(indices)) - target).square().sum())
        power += float(target.square().sum())
    return error / max(power, 1e-30)


def _layers_in(module: nn.Module) -> dict[str, nn.Module]:
    return {"": module} if isinstance(module, QuantizedLayer) else quantized_layers(module)


def _set_dropping(layers: dict[str, nn.Module], on: bool) -> None:
    for layer in layers.values():
        if isinstance(layer.input_quantizer, DroppedInput):
            layer.input_quantizer.train(on)


def _mix_argument(float_item, quantized_item, drop: float):
    is_float = isinstance(quantized_item, Tensor) and quantized_item.is_floating_point()
    return mix(float_item, quantized_item, drop) if is_float else quantized_item


def _identity(output: Tensor) -> Tensor:
    return output
