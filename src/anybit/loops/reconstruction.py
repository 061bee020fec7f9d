"""Reconstruction: fit the quantized layers of a unit until its output is the float one's, on a few unlabelled inputs.

    argmin over roundings, input scales, biases      || f(X) - f_Q(X_Q) ||^2 / || f(X) ||^2  +  penalties

f is a unit, a layer or block, with the activation that was observed to follow it; f_Q the same with its weights rounded by a `Rounding`,
which decides what of a weight is trained, and its inputs quantized in ranges whose scales are trained as logarithms. Two forms share one
loop, `reconstruct`:

    parallel     X_Q is X, the float network's input: units are independent of each other, and any mix of them can be put together
    sequential   X_Q is what the already quantized network gives the unit: for the scheme that has been chosen

  * A layer that runs several times in a pass is fitted to all its calls at once.
  * Learning rates decay to zero along a cosine, which settles weights that flip between two codes.
  * Quantization may be dropped: a random share of the unit's input elements stays float, and so does a share of each inner activation
    (Wei et al., "QDrop", ICLR 2022).
  * Held-out inputs decide which state is taken: all steps are run, the error of the final codes is looked at a few times on the way, and
    the best state looked at is taken, or the rounded start if nothing beats it. Nothing stops early: it costs what all steps cost.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from anybit.data.batches import unpadded
from anybit.data.samples import Calibration
from anybit.errors import AnybitError
from anybit.files.cache import Cache, Entry
from anybit.networks.capture import Captured, MemoryBudget, capture_calls, carry, chunks, give_back
from anybit.networks.layers import QuantizedLayer, freeze_slots, quantized_layers
from anybit.networks.states import put_back, snapshot
from anybit.networks.wiring import Unit, Wiring
from anybit.numerics.quantizers import LearnedInput, UniformQuantizer, frozen
from anybit.progress import tell, track


class Rounding(Protocol):
    """The rounding of one layer's weight: an `nn.Module` that is in the layer's weight slot while its unit is reconstructed.

    resumes   whether the sequential form may start at the codes of the parallel form; else it starts at the float weights
    """

    resumes: bool
    training: bool

    def __init__(self, start: Tensor, quantizer: UniformQuantizer):
        """`start` is the float weight, [channels, fan-in], in units of the scale of `quantizer`, to whose codes it rounds."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the weight of a forward pass, [channels, fan-in]; in evaluation mode that of the final codes."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return Adam's groups: params and lr."""

    def penalty(self, progress: float) -> Tensor | None:
        """Return what a step adds to the relative error, 0-d, when `progress` (0 to 1) of the steps are done; None adds nothing."""

    def freeze(self, rows: Tensor) -> tuple[Tensor, UniformQuantizer]:
        """Return the values of the final codes, [channels, fan-in], and the quantizer that leaves them as they are."""


@dataclass(frozen=True)
class ReconstructionSettings:
    """rounding, steps (of Adam a unit), batch_size, seed
    input_rate, bias_rate  learning rates: of the logarithms of input scales, and of biases relative to their mean magnitude
    drop                   share of elements whose activation quantization is skipped
    checks                 how often held-out error is looked at; all steps are run whatever it is
    memory                 bytes that captured tensors may take before they spill to disk
    """

    rounding: type[Rounding]
    steps: int = 300
    batch_size: int = 32
    input_rate: float = 1e-3
    bias_rate: float = 2e-3
    drop: float = 0.0
    checks: int = 6
    seed: int = 0
    memory: int = 2**31

    @property
    def name(self) -> str:
        """The rounding's name, as its paper has it."""
        return self.rounding.__name__


# What a unit is fitted to


def mix(x: Tensor, quantized: Tensor, drop: float) -> Tensor:
    """Replace a random share `drop` of the elements of `quantized` by those of `x`."""
    # Random bytes, eight to a draw, and a lerp at weight 0 or 1 (exact): several times faster on a CPU than rand and where.
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    stays_float = (words.view(torch.uint8)[: x.numel()] <= max(round(256 * drop), 1) - 1).to(x.dtype)  # "<" would wrap at a share of 1
    return torch.lerp(quantized, x, stays_float.view(x.shape))


class DroppedInput(LearnedInput):
    """A learned range that leaves a share `drop` of the elements float while training."""

    def __init__(self, quantizer: UniformQuantizer, drop: float):
        super().__init__(quantizer)
        self.drop = drop

    def forward(self, x: Tensor, operand: int | None = None) -> Tensor:
        quantized = super().forward(x, operand)
        return mix(x, quantized, self.drop) if self.training and self.drop else quantized


@dataclass(frozen=True)
class UnitData:
    """The float inputs and outputs of one call of a unit, and the inputs that it will really see (None: the float ones).

    `count` samples; of padded data, whose batches stay whole, `count` batches. At most `chunk` samples are looked at at once.
    """

    float_side: Captured
    quantized_side: Captured | None
    count: int
    chunk: int = 32

    def draw(self, size: int) -> Tensor:
        """Draw the indices of `size` random samples, or of one batch."""
        return torch.randint(self.count, (1 if self.float_side.masks else min(size, self.count),))

    def parts(self, limit: int | None = None) -> Iterator[Tensor]:
        """Yield the indices of everything (of the first `limit`), a forward pass at a time."""
        return chunks(min(self.count, limit or self.count), 1 if self.float_side.masks else self.chunk)

    def mask(self, indices: Tensor) -> Tensor | None:
        """Return which tokens of these samples are no padding; None where nothing is padded."""
        return self.float_side.masks[int(indices)] if self.float_side.masks else None

    def arguments(self, indices: Tensor, drop: float = 0.0) -> tuple[tuple, dict]:
        """Return (args, kwargs) of some samples on the quantized side, a share `drop` of their elements float."""
        args, kwargs = (self.quantized_side or self.float_side).batch(indices)
        if self.quantized_side is None or not drop:
            return args, kwargs
        float_args, float_kwargs = self.float_side.batch(indices)
        mixed = tuple(_mix_argument(f, q, drop) for f, q in zip(float_args, args, strict=True))
        return mixed, {key: _mix_argument(float_kwargs[key], value, drop) for key, value in kwargs.items()}

    def targets(self, indices: Tensor) -> Tensor:
        """Return the float outputs of some samples."""
        return self.float_side.outputs(indices)


def _mix_argument(float_item: Any, quantized_item: Any, drop: float) -> Any:
    is_float = isinstance(quantized_item, Tensor) and quantized_item.is_floating_point()
    return mix(float_item, quantized_item, drop) if is_float else quantized_item


Calls = Sequence[UnitData]
"""The data of a unit, call by call."""


def capture_sides(
    model: nn.Module | None, float_model: nn.Module, unit: Unit, calibration: Calibration, budget: MemoryBudget, chunk: int
) -> list[Calls]:
    """Capture what the unit is fitted to and judged on; the quantized side is left out where there is no `model`."""
    sides: list[Calls] = []
    for batches, count in zip((calibration.fitting, calibration.held_out), calibration.count(), strict=True):
        float_side = capture_calls(float_model, unit.name, batches, count, budget, outputs=True, constant=[True] * unit.calls)
        quantized_side: Sequence[Captured | None] = [None] * unit.calls
        if model is not None:
            quantized_side = capture_calls(model, unit.name, batches, count, budget, constant=[one.constant for one in float_side])
        counts = [1 if one.constant else len(batches) if one.masks else count for one in float_side]
        sides.append([UnitData(*call, chunk) for call in zip(float_side, quantized_side, counts, strict=True)])
    return sides


def _carried_side(
    side: UnitData, model: nn.Module, float_model: nn.Module, previous: Unit, unit: Unit, wiring: Wiring, budget: MemoryBudget
) -> UnitData:
    """Compute the data of `unit` from that of the `previous` one, whose output is its whole input: nothing before it runs again."""
    finish = wiring.activation_after(previous.name) or _identity
    before, float_module = model.get_submodule(previous.name), float_model.get_submodule(unit.name)
    device, whole = side.float_side.device, side.float_side.masks is not None

    def quantized_output(indices: Tensor) -> Tensor:
        args, kwargs = side.arguments(indices)
        return finish(before(*args, **kwargs))

    float_input = carry(lambda indices: finish(side.targets(indices)), side.count, budget, whole, side.chunk)
    float_output = carry(lambda indices: float_module(float_input.rows(indices).to(device)), side.count, budget, whole, side.chunk)
    quantized_input = carry(quantized_output, side.count, budget, whole, side.chunk)
    float_side = Captured(((float_input,), {}), float_output, device, side.float_side.masks)
    return replace(side, float_side=float_side, quantized_side=Captured(((quantized_input,), {}), None, device))


# The loop


def squares(output: Tensor, target: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the squared error and the target's power, 0-d, without the padding where `mask` says what is none."""
    output, target = unpadded(output, mask), unpadded(target, mask)
    return (output - target).square().sum(), target.square().sum()


def _step_error(module: nn.Module, fitting: Calls, finish: Callable[[Tensor], Tensor], settings: ReconstructionSettings) -> Tensor:
    """Return the squared error over the target's power, 0-d, on samples that are drawn anew: of each call, or, of batches that stay whole,
    of one."""
    size = max(1, settings.batch_size // len(fitting))
    if len(fitting) > 1 and fitting[0].float_side.masks:
        fitting = [fitting[int(torch.randint(len(fitting), ()))]]
    errors, powers = [], []
    for call in fitting:
        indices = call.draw(size)
        args, kwargs = call.arguments(indices, settings.drop)
        error, power = squares(finish(module(*args, **kwargs)), finish(call.targets(indices)), call.mask(indices))
        errors.append(error)
        powers.append(power)
    return torch.stack(errors).sum() / torch.stack(powers).sum().clamp_min(1e-30)


def reconstruct(
    module: nn.Module,
    starts: Mapping[str, Tensor],
    fitting: Calls,
    held_out: Calls,
    activation: Callable[[Tensor], Tensor] | None,
    settings: ReconstructionSettings,
) -> dict[str, float]:
    """Fit the quantized layers of `module`, in place, so that its output is the float one's; returns errors before and after.

    `module` is a layer or block of a canonical model, its slots filled. `starts` gives the free weight of each layer (by its name inside
    `module`; "" is the module itself) as [channels, fan-in] in units of the quantizer's scale; it must round to the layer's codes.
    The errors are relative to the target's power, after the activation: `before` and `after` on held-out inputs, `fitted_before` and
    `fitted_after` on as many fitted ones. `steps` is the step whose state was taken; 0 means that nothing beat the start.
    """
    layers = {name: layer for name, layer in _layers_in(module).items() if isinstance(layer.weight_quantizer, UniformQuantizer)}
    if not layers:
        return {}
    finish = activation or _identity
    before = _states(layers)
    errors = {"before": _error(module, held_out, finish), "fitted_before": _error(module, fitting, finish, held_out[0].count)}

    for name, layer in layers.items():
        layer.weight_quantizer = cast(nn.Module, settings.rounding(starts[name], frozen(layer.weight_quantizer)))
        if isinstance(layer.input_quantizer, UniformQuantizer):
            layer.input_quantizer = DroppedInput(layer.input_quantizer, settings.drop)
    best, steps, state = errors["before"], 0, None
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(settings.seed)
        for step in _descend(module, layers, fitting, finish, settings):
            if step % max(25, settings.steps // settings.checks) == 0 or step == settings.steps:  # a look costs about three steps
                _set_training(layers, False)
                error = _error(module, held_out, finish)
                _set_training(layers, True)
                if error < best:
                    best, steps, state = error, step, _states(layers)

    if state is not None:
        _load(layers, state)
    for layer in layers.values():
        freeze_slots(layer)
    if state is None:
        _load(layers, before)
    fitted_after = _error(module, fitting, finish, held_out[0].count)
    return {**errors, "after": best, "fitted_after": fitted_after, "steps": steps}


def _descend(
    module: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    fitting: Calls,
    finish: Callable[[Tensor], Tensor],
    settings: ReconstructionSettings,
) -> Iterator[int]:
    """Run Adam with cosine decay on random batches; yields after each step."""
    optimizer = torch.optim.Adam([group for layer in layers.values() for group in _parameter_groups(layer, settings)])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    _set_training(layers, True)
    for step in range(1, settings.steps + 1):
        loss = _step_error(module, fitting, finish, settings)
        for layer in layers.values():
            penalty = _rounding(layer).penalty(step / settings.steps)
            loss = loss if penalty is None else loss + penalty
        if not torch.isfinite(loss):
            raise AnybitError(f"The reconstruction error became {float(loss)} at step {step}. Lower the learning rates.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield step


def _rounding(layer: QuantizedLayer) -> Rounding:
    """Return the rounding in the layer's weight slot, which `reconstruct` has put there."""
    return cast(Rounding, layer.weight_quantizer)


def _parameter_groups(layer: QuantizedLayer, settings: ReconstructionSettings) -> list[dict[str, Any]]:
    groups = _rounding(layer).parameter_groups()
    if isinstance(layer.input_quantizer, LearnedInput):
        groups.append({"params": [layer.input_quantizer.log_scale], "lr": settings.input_rate})
    if (bias := getattr(layer, "bias", None)) is not None:
        groups.append({"params": [bias], "lr": settings.bias_rate * _typical(bias)})
    return groups


def _typical(bias: Tensor) -> float:
    """Return the mean magnitude of a layer's biases, 1 where they are all zero."""
    return float(bias.detach().abs().mean()) or 1.0


def _states(layers: Mapping[str, QuantizedLayer]) -> dict[str, dict[str, Tensor]]:
    """Copy what is fitted, layer by layer; what else the module has in buffers is its own."""
    return {name: copy.deepcopy(layer.state_dict()) for name, layer in layers.items()}


def _load(layers: Mapping[str, QuantizedLayer], states: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name, layer in layers.items():
        layer.load_state_dict(states[name])


def _set_training(layers: Mapping[str, QuantizedLayer], on: bool) -> None:
    """Train roundings and drop inputs, or give the values of the final codes; the rest of the module stays in evaluation mode."""
    for layer in layers.values():
        for slot in (layer.weight_quantizer, layer.input_quantizer):
            if slot is not None:
                slot.train(on)


@torch.no_grad()
def _error(module: nn.Module, data: Calls, finish: Callable[[Tensor], Tensor], limit: int | None = None) -> float:
    """Return squared error over power of the unit's output on (the first `limit` samples of) `data`, nothing dropped."""
    error, power = 0.0, 0.0
    for call in data:
        for indices in call.parts(limit):
            args, kwargs = call.arguments(indices)
            one, other = squares(finish(module(*args, **kwargs)), finish(call.targets(indices)), call.mask(indices))
            error, power = error + float(one), power + float(other)
    return error / max(power, 1e-30)


def _layers_in(module: nn.Module) -> dict[str, QuantizedLayer]:
    return {"": module} if isinstance(module, QuantizedLayer) else quantized_layers(module)


def _identity(output: Tensor) -> Tensor:
    return output


# Its two forms


def sequential(
    model: nn.Module,
    float_model: nn.Module,
    units: Sequence[Unit],
    starts: Mapping[str, Tensor],
    wiring: Wiring,
    calibration: Calibration,
    settings: ReconstructionSettings,
    cache: Cache = Cache(),
) -> dict[str, dict[str, float]]:
    """Reconstruct the units of `model`, in place, one after the other: each sees what the already quantized network gives it.

    `float_model` is the folded network that `model` was prepared from, `starts` the free weights of all layers (see `reconstruct`). What a
    unit sees is carried over from the unit before it where that is all that feeds it, and captured from the inputs on otherwise. Returns
    each unit's errors.

    `cache` has the result of each unit that an earlier run finished. Units that are taken from it are still carried through to the next one
    that it does not have, since what is carried and what is captured may differ in their last bits.
    """
    report: dict[str, dict[str, float]] = {}
    sides: list[Calls] = []
    through: list[Unit] = []  # the units since the one that `sides` are of, which is the first

    def reach(unit: Unit) -> list[Calls]:
        """Return what `unit` sees, from the nearest of the units before it whose data are at hand or must be captured."""
        nonlocal sides, through
        path = [*through, unit]
        fresh = [at for at, (before, after) in enumerate(pairwise(path), 1) if not wiring.feeds(before.name, after.name)]
        if fresh or not sides:
            path = path[fresh[-1] if fresh else 0 :]
            sides = capture_sides(model, float_model, path[0], calibration, MemoryBudget(settings.memory // 2), settings.batch_size)
        for before, after in pairwise(path):
            budget = MemoryBudget(settings.memory // 2)  # this unit's tensors and the previous one's are held at once
            sides = [[_carried_side(call, model, float_model, before, after, wiring, budget) for call in side] for side in sides]
        through = []
        return sides

    for unit in track(units, f"sequential {settings.name}"):
        cache = cache.keyed(unit.name)  # and on every unit before it
        name = f"sequential {settings.name} of {unit.name}"
        report[unit.name] = _cached_unit(name, model, unit, starts, partial(reach, unit), wiring, settings, cache)
        through.append(unit)
        tell("unit", unit=unit.name, **report[unit.name])
        give_back()
    return report


def parallel(
    variants: Mapping[int, nn.Module],
    float_model: nn.Module,
    units: Sequence[Unit],
    starts: Mapping[int, Mapping[str, Tensor]],
    wiring: Wiring,
    calibration: Calibration,
    settings: ReconstructionSettings,
    cache: Cache = Cache(),
) -> dict[str, dict[int, dict[str, float]]]:
    """Reconstruct every unit of every variant (bits -> model), in place, with the float network's inputs: no unit depends on another,
    so layers of any bits can be put together afterwards. What a unit sees is captured once for all variants, unless `cache` has the results
    of all of them.
    """
    report: dict[str, dict[int, dict[str, float]]] = {}
    for unit in track(units, f"parallel {settings.name}"):
        sides = functools.cache(
            partial(capture_sides, None, float_model, unit, calibration, MemoryBudget(settings.memory), settings.batch_size)
        )
        for bits, model in variants.items():
            name = f"parallel {settings.name} of {unit.name} at W{bits}"
            errors = _cached_unit(name, model, unit, starts[bits], sides, wiring, settings, cache)
            report.setdefault(unit.name, {})[bits] = errors
            tell("unit", unit=unit.name, bits=bits, **errors)
        del sides  # what was captured goes before the next is
        give_back()
    return report


def _cached_unit(
    name: str,
    model: nn.Module,
    unit: Unit,
    starts: Mapping[str, Tensor],
    sides: Callable[[], list[Calls]],
    wiring: Wiring,
    settings: ReconstructionSettings,
    cache: Cache,
) -> dict[str, float]:
    """Reconstruct the unit, in place, on what `sides` gives, or restore it as an earlier run left it; returns its errors."""
    layers = [name for name in unit.layers if name in starts]

    def make() -> Entry:
        inner = {layer.removeprefix(unit.name).lstrip("."): starts[layer] for layer in layers}
        fitting, held_out = sides()
        errors = reconstruct(model.get_submodule(unit.name), inner, fitting, held_out, wiring.activation_after(unit.name), settings)
        return Entry(errors, snapshot(model, layers))

    def read(entry: Entry) -> dict[str, float]:
        put_back(model, layers, entry.tensors)
        return {key: int(value) if key == "steps" else float(value) for key, value in entry.record.items()}

    return cache(name, make, read)
