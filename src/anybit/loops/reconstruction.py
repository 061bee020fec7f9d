"""Reconstruction: fit the quantized layers of a unit until its output is the float one's, on a few unlabelled inputs.

    argmin over roundings, input scales, biases      || f(X) - f_Q(X_Q) ||^2 / || f(X) ||^2  +  penalties

f is a unit, a layer or block, with the activation that was observed to follow it; f_Q the same with its weights rounded by a `Rounding`,
which decides what of a weight is trained, and its inputs quantized in ranges whose scales are trained as logarithms. Two forms share one
loop, `reconstruct`:

    parallel     X_Q is X, the float network's input: units are independent of each other, and any mix of them can be put together
    sequential   X_Q is what the already quantized network gives the unit: for the scheme that has been chosen

  * Learning rates decay to zero along a cosine, which settles weights that flip between two codes.
  * Quantization may be dropped: a random share of the unit's input elements stays float, and so does a share of each inner activation
    (Wei et al., "QDrop", ICLR 2022).
  * Held-out inputs decide which state is taken: all steps are run, the error of the final codes is looked at a few times on the way, and
    the best state looked at is taken, or the rounded start if nothing beats it. Nothing stops early: it costs what all steps cost.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
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
from anybit.loops.moments import Moments, Solver, Sums, as_stored, has_patches, matrix, reading, rows_drawn
from anybit.networks.capture import Captured, MemoryBudget, capture, carry, chunks, give_back
from anybit.networks.layers import QuantizedLayer, float_weight, freeze_slots, quantized_layers, weight_rows
from anybit.networks.patches import draw_places, patches, real_rows
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
    solver                 chooses each layer's codes in closed form before it is trained; None: training starts from `starts`
    drop                   share of elements whose activation quantization is skipped
    checks                 how often held-out error is looked at; all steps are run whatever it is
    memory                 bytes that captured tensors may take before they spill to disk
    """

    rounding: type[Rounding]
    solver: Solver | None = None
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
    """The float inputs and outputs of one unit, and the inputs that it will really see (None: the float ones).

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


def capture_sides(
    model: nn.Module | None, float_model: nn.Module, unit: Unit, calibration: Calibration, budget: MemoryBudget, chunk: int
) -> list[UnitData]:
    """Capture what the unit is fitted to and judged on; the quantized side is left out where there is no `model`."""
    sides = []
    for batches, count in zip((calibration.fitting, calibration.held_out), calibration.count(), strict=True):
        float_side = capture(float_model, unit.name, batches, count, budget, outputs=True)
        quantized_side = None if model is None else capture(model, unit.name, batches, count, budget)
        sides.append(UnitData(float_side, quantized_side, len(batches) if float_side.masks else count, chunk))
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


def relative_error(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the squared error over the target's power, 0-d, without the padding where `mask` says what is none."""
    output, target = unpadded(output, mask), unpadded(target, mask)
    return (output - target).square().sum() / target.square().sum().clamp_min(1e-30)


def reconstruct(
    module: nn.Module,
    starts: Mapping[str, Tensor],
    fitting: UnitData,
    held_out: UnitData,
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
    errors = {"before": _error(module, held_out, finish), "fitted_before": _error(module, fitting, finish, held_out.count)}
    if not settings.steps:
        return {**errors, "after": errors["before"], "fitted_after": errors["fitted_before"], "steps": 0}

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
    fitted_after = _error(module, fitting, finish, held_out.count)
    return {**errors, "after": best, "fitted_after": fitted_after, "steps": steps}


def _descend(
    module: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    fitting: UnitData,
    finish: Callable[[Tensor], Tensor],
    settings: ReconstructionSettings,
) -> Iterator[int]:
    """Run Adam with cosine decay on random batches; yields after each step."""
    optimizer = torch.optim.Adam([group for layer in layers.values() for group in _parameter_groups(layer, settings)])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    _set_training(layers, True)
    for step in range(1, settings.steps + 1):
        indices = fitting.draw(settings.batch_size)
        args, kwargs = fitting.arguments(indices, settings.drop)
        loss = relative_error(finish(module(*args, **kwargs)), finish(fitting.targets(indices)), fitting.mask(indices))
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
def _error(module: nn.Module, data: UnitData, finish: Callable[[Tensor], Tensor], limit: int | None = None) -> float:
    """Return squared error over power of the unit's output on (the first `limit` samples of) `data`, nothing dropped."""
    error, power = 0.0, 0.0
    for indices in data.parts(limit):
        args, kwargs = data.arguments(indices)
        target = unpadded(finish(data.targets(indices)), data.mask(indices))
        error += float((unpadded(finish(module(*args, **kwargs)), data.mask(indices)) - target).square().sum())
        power += float(target.square().sum())
    return error / max(power, 1e-30)


def _layers_in(module: nn.Module) -> dict[str, QuantizedLayer]:
    return {"": module} if isinstance(module, QuantizedLayer) else quantized_layers(module)


def _identity(output: Tensor) -> Tensor:
    return output


# In closed form


@torch.no_grad()
def solve_unit(
    module: nn.Module,
    float_module: nn.Module,
    names: Sequence[str],
    fitting: UnitData,
    held_out: UnitData,
    activation: Callable[[Tensor], Tensor] | None,
    settings: ReconstructionSettings,
) -> dict[str, float]:
    """Choose the codes of the layers `names` of `module` by the solver, in place, each on what those before it give it.

    The start is put back where the unit's error on held-out inputs has not fallen. Returns errors `rounded` and `solved`.
    """
    assert settings.solver is not None
    finish, layers = activation or _identity, {name: _layers_in(module)[name] for name in names}
    layers = {name: layer for name, layer in layers.items() if has_patches(layer)}
    rounded = _error(module, held_out, finish)
    before = _states(layers)
    places, float_rows = _float_patches(float_module, list(layers), fitting, settings)
    for name, layer in layers.items():
        float_layer = float_module.get_submodule(name)
        sums: Sums | None = None
        for number, indices in enumerate(fitting.parts()):
            x = _input_of(module, layer, fitting, indices)
            x = x if layer.input_quantizer is None else layer.input_quantizer(x)
            rows = patches(layer, real_rows(layer, x, fitting.mask(indices)), places[name][number])
            sums = sums or Sums(rows, MemoryBudget(settings.memory), 2)
            sums.add(float_rows[name][number].to(rows.device), rows)
        assert sums is not None
        solve_layer(layer, float_layer, sums.moments(float_layer.bias is not None), settings.solver)
        del float_rows[name]
    solved = _error(module, held_out, finish)
    if not solved < rounded:
        _load(layers, before)
    return {"rounded": rounded, "solved": solved}


@torch.no_grad()
def solve_layer(layer: QuantizedLayer, float_layer: nn.Module, moments: Moments, solver: Solver) -> None:
    """Put the solver's codes, scales and bias into the filled slot of `layer`, in place."""
    quantizer, weight = frozen(layer.weight_quantizer), matrix(float_layer)
    scale = quantizer.scale.view(*weight.shape[:2], -1)
    rounded = quantizer.codes(weight_rows(layer, float_weight(layer))).view(weight.shape)
    codes, scale = solver(weight, moments, scale, quantizer.bits, rounded)
    values = codes * scale.repeat_interleave(weight.shape[-1] // scale.shape[-1], -1)
    float_weight(layer).copy_(as_stored(layer, values))
    layer.weight_quantizer = UniformQuantizer(quantizer.bits, True, scale.reshape(-1, 1))
    float_bias, bias = float_layer.bias, layer.bias
    if float_bias is not None and bias is not None:
        means = moments.means
        bias.copy_(float_bias + ((weight @ means[0][:, :, None]) - (values @ means[1][:, :, None])).flatten())


def starts_of(module: nn.Module, names: Sequence[str], rounding: type[Rounding]) -> dict[str, Tensor]:
    """Return the codes of layers as the weights that training starts from, [rows, columns] in units of their scale."""
    layers = _layers_in(module)
    return {name: frozen(layers[name].weight_quantizer).codes(weight_rows(layers[name], float_weight(layers[name]))) for name in names}


def _float_patches(
    float_module: nn.Module, names: Sequence[str], fitting: UnitData, settings: ReconstructionSettings
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """(places, patches at them) of the inputs of the layers `names` in the float unit, chunk by chunk."""
    budget, generator = MemoryBudget(settings.memory // 2), torch.Generator().manual_seed(settings.seed)
    places: dict[str, list[Tensor]] = {name: [] for name in names}
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    layers = {name: float_module.get_submodule(name) for name in names}
    mask: Tensor | None = None
    share = 0.0

    def read(name: str, layer: nn.Module, x: Tensor) -> None:
        x = real_rows(layer, x, mask)
        places[name].append(draw_places(layer, x.shape, max(1, round(share * rows_drawn(layer))), generator))
        drawn = patches(layer, x, places[name][-1])
        rows[name].append(budget.allocate(tuple(drawn.shape), drawn.dtype).copy_(drawn))

    with reading(layers, read):
        for indices in fitting.parts():
            mask, share = fitting.mask(indices), len(indices) / fitting.count
            args, kwargs = fitting.float_side.batch(indices)
            float_module(*args, **kwargs)
    return places, rows


def _input_of(module: nn.Module, layer: nn.Module, data: UnitData, indices: Tensor) -> Tensor:
    """Return what `layer` inside `module` reads of some samples on the quantized side."""
    args, kwargs = data.arguments(indices)
    seen: list[Tensor] = []

    def read(name: str, layer: nn.Module, x: Tensor) -> None:
        seen.append(x)
        raise _Reached

    with reading({"": layer}, read), suppress(_Reached):
        module(*args, **kwargs)
    return seen[0]


class _Reached(Exception):
    """End a forward pass at the layer that is read."""


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
    sides: list[UnitData] = []
    through: list[Unit] = []  # the units since the one that `sides` are of, which is the first

    def reach(unit: Unit) -> list[UnitData]:
        """Return what `unit` sees, from the nearest of the units before it whose data are at hand or must be captured."""
        nonlocal sides, through
        path = [*through, unit]
        fresh = [at for at, (before, after) in enumerate(pairwise(path), 1) if not wiring.feeds(before.name, after.name)]
        if fresh or not sides:
            path = path[fresh[-1] if fresh else 0 :]
            sides = capture_sides(model, float_model, path[0], calibration, MemoryBudget(settings.memory // 2), settings.batch_size)
        for before, after in pairwise(path):
            budget = MemoryBudget(settings.memory // 2)  # this unit's tensors and the previous one's are held at once
            sides = [_carried_side(side, model, float_model, before, after, wiring, budget) for side in sides]
        through = []
        return sides

    for unit in track(units, f"sequential {settings.name}"):
        cache = cache.keyed(unit.name)  # and on every unit before it
        name = f"sequential {settings.name} of {unit.name}"
        report[unit.name] = _cached_unit(name, model, float_model, unit, starts, partial(reach, unit), wiring, settings, cache)
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
            errors = _cached_unit(name, model, float_model, unit, starts[bits], sides, wiring, settings, cache)
            report.setdefault(unit.name, {})[bits] = errors
            tell("unit", unit=unit.name, bits=bits, **errors)
        del sides  # what was captured goes before the next is
        give_back()
    return report


def _cached_unit(
    name: str,
    model: nn.Module,
    float_model: nn.Module,
    unit: Unit,
    starts: Mapping[str, Tensor],
    sides: Callable[[], list[UnitData]],
    wiring: Wiring,
    settings: ReconstructionSettings,
    cache: Cache,
) -> dict[str, float]:
    """Reconstruct the unit, in place, on what `sides` gives, or restore it as an earlier run left it; returns its errors."""
    layers = [name for name in unit.layers if name in starts]

    def make() -> Entry:
        inner = {layer.removeprefix(unit.name).lstrip("."): starts[layer] for layer in layers}
        fitting, held_out = sides()
        module, finish = model.get_submodule(unit.name), wiring.activation_after(unit.name)
        solved = {}
        if settings.solver is not None:
            solved = solve_unit(module, float_model.get_submodule(unit.name), list(inner), fitting, held_out, finish, settings)
            inner = starts_of(module, list(inner), settings.rounding)
        errors = reconstruct(module, inner, fitting, held_out, finish, settings)
        return Entry({**errors, **solved}, snapshot(model, layers))

    def read(entry: Entry) -> dict[str, float]:
        put_back(model, layers, entry.tensors)
        return {key: int(value) if key == "steps" else float(value) for key, value in entry.record.items()}

    return cache(name, make, read)
