"""Reconstruction: fit the quantized layers of a unit to its float output, on a few unlabelled inputs.

    argmin over roundings, input scales, biases      || f(X) - f_Q(X_Q) ||^2 / || f(X) ||^2  +  penalties

f is a unit, a layer or block, with the activation that was observed to follow it. f_Q is the same with its weights rounded by a `Rounding`,
which decides what is trained, and its inputs quantized with ranges whose scales are trained as logarithms. Two forms share one loop,
`reconstruct`:

    parallel     X_Q is X, the float network's input: units are independent, and can be combined in any mix
    sequential   X_Q is the unit's input in the network quantized so far: for a chosen scheme

  * A layer that runs several times in a pass is fitted to all its calls.
  * Learning rates decay to zero along a cosine, so that weights stop flipping between two codes.
  * Quantization may be dropped: a random share of the unit's input elements stays float, and so does a share of each inner activation
    (Wei et al., "QDrop", ICLR 2022).
  * Held-out inputs choose the state: all steps run, the error of the final codes is measured a few times on the way, and the best of these
    states is kept, or the rounded start if none beats it. Nothing stops early, so the time does not depend on the errors.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from anybit.data.samples import Calibration
from anybit.errors import AnybitError
from anybit.files.cache import Cache, Entry
from anybit.loops.closed_form import solve_unit
from anybit.loops.moments import Solver
from anybit.loops.units import (
    UnitData,
    capture_sides,
    carried_side,
    identity,
    layers_in,
    load_states,
    mix,
    relative_error,
    states_of,
    unit_error,
)
from anybit.networks.capture import MemoryBudget, give_back
from anybit.networks.layers import QuantizedLayer, float_weight, freeze_slots, weight_rows
from anybit.networks.states import put_back, snapshot
from anybit.networks.wiring import Unit, Wiring
from anybit.numerics.quantizers import LearnedInput, UniformQuantizer, frozen
from anybit.progress import inside, tell, track


class Rounding(Protocol):
    """The rounding of one layer's weight: an `nn.Module` in the layer's weight slot while its unit is reconstructed.

    resumes   whether the sequential form may start at the codes of the parallel form; else it starts at the float weights
    """

    resumes: bool
    training: bool

    def __init__(self, start: Tensor, quantizer: UniformQuantizer):
        """Start from the float weight `start`, [channels, fan-in], in units of the scale of `quantizer`, to whose codes it rounds."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the weight of a forward pass, [channels, fan-in]; in evaluation mode that of the final codes."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return Adam's groups: params and lr."""

    def penalty(self, progress: float) -> Tensor | None:
        """Return the penalty added to the relative error, 0-d, after a share `progress` of the steps; None adds nothing."""

    def freeze(self, rows: Tensor) -> tuple[Tensor, UniformQuantizer]:
        """Return the values of the final codes, [channels, fan-in], and the quantizer that leaves them unchanged."""


@dataclass(frozen=True)
class ReconstructionSettings:
    """rounding, steps (of Adam per unit), batch_size, seed
    input_rate, bias_rate  learning rates: of the logarithms of input scales, and of biases relative to their mean magnitude
    solver                 chooses each layer's codes in closed form before training; None: training starts from `starts`
    drop                   share of elements whose activation quantization is skipped
    checks                 how often the held-out error is measured; all steps run in any case
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
        """Return the rounding's name, as in its paper."""
        return self.rounding.__name__


class DroppedInput(LearnedInput):
    """A learned range that leaves a share `drop` of the elements float during training."""

    def __init__(self, quantizer: UniformQuantizer, drop: float):
        super().__init__(quantizer)
        self.drop = drop

    def forward(self, x: Tensor, operand: int | None = None) -> Tensor:
        quantized = super().forward(x, operand)
        return mix(x, quantized, self.drop) if self.training and self.drop else quantized


# The loop


def reconstruct(
    module: nn.Module,
    starts: Mapping[str, Tensor],
    fitting: UnitData,
    held_out: UnitData,
    finish: Callable[[Tensor], Tensor],
    settings: ReconstructionSettings,
) -> dict[str, float]:
    """Fit the quantized layers of `module`, in place, to the float output; returns errors before and after.

    `module` is a layer or block of a canonical model, its slots filled. `starts` gives the free weight of each layer (by its name inside
    `module`; "" is the module itself) as [channels, fan-in] in units of the quantizer's scale; it must round to the layer's codes.
    The errors are relative to the target's power, after the activation: `before` and `after` on held-out inputs, `fitted_before` and
    `fitted_after` on as many fitting ones. `steps` is the step whose state was kept; 0 means that none beat the start.
    """
    layers = {name: layer for name, layer in layers_in(module).items() if isinstance(layer.weight_quantizer, UniformQuantizer)}
    if not layers:
        return {}
    before = states_of(layers)
    errors = {"before": unit_error(module, held_out, finish), "fitted_before": unit_error(module, fitting, finish, held_out.count)}

    for name, layer in layers.items():
        layer.weight_quantizer = cast(nn.Module, settings.rounding(starts[name], frozen(layer.weight_quantizer)))
        if isinstance(layer.input_quantizer, UniformQuantizer):
            layer.input_quantizer = DroppedInput(layer.input_quantizer, settings.drop)
    best, steps, state = errors["before"], 0, None
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(settings.seed)
        for step in _descend(module, layers, fitting, finish, settings):
            if step % max(25, settings.steps // settings.checks) == 0 or step == settings.steps:  # a measurement costs about three steps
                _set_training(layers, False)
                error = unit_error(module, held_out, finish)
                _set_training(layers, True)
                if error < best:
                    best, steps, state = error, step, states_of(layers)

    if state is not None:
        load_states(layers, state)
    for layer in layers.values():
        freeze_slots(layer)
    if state is None:
        load_states(layers, before)
    fitted_after = unit_error(module, fitting, finish, held_out.count)
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
        inside(step, settings.steps)
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
    """Return the rounding in the layer's weight slot, put there by `reconstruct`."""
    return cast(Rounding, layer.weight_quantizer)


def _parameter_groups(layer: QuantizedLayer, settings: ReconstructionSettings) -> list[dict[str, Any]]:
    groups = _rounding(layer).parameter_groups()
    if isinstance(layer.input_quantizer, LearnedInput):
        groups.append({"params": [layer.input_quantizer.log_scale], "lr": settings.input_rate})
    if (bias := getattr(layer, "bias", None)) is not None:
        groups.append({"params": [bias], "lr": settings.bias_rate * _typical(bias)})
    return groups


def _typical(bias: Tensor) -> float:
    """Return the mean magnitude of a layer's biases, or 1 if all are zero."""
    return float(bias.detach().abs().mean()) or 1.0


def _set_training(layers: Mapping[str, QuantizedLayer], on: bool) -> None:
    """Switch roundings and dropped inputs to training, or to the final codes; the rest of the module stays in evaluation mode."""
    for layer in layers.values():
        for slot in (layer.weight_quantizer, layer.input_quantizer):
            if slot is not None:
                slot.train(on)


# Its two forms


@dataclass
class _CarriedData:
    """The data of one unit, carried on to later ones.

    sides    the data, in the network quantized so far and in the float network
    passed   the units since the one that `sides` belong to, which is the first
    """

    model: nn.Module
    float_model: nn.Module
    wiring: Wiring
    calibration: Calibration
    settings: ReconstructionSettings
    sides: list[UnitData] = field(default_factory=list)
    passed: list[Unit] = field(default_factory=list)

    def reach(self, unit: Unit) -> list[UnitData]:
        """Return the data of `unit`, from the nearest earlier unit whose data are available or must be captured."""
        memory, path = self.settings.memory // 2, [*self.passed, unit]  # a unit's tensors and the previous one's are held at once
        fresh = [at for at, (before, after) in enumerate(pairwise(path), 1) if not self.wiring.feeds(before.name, after.name)]
        if fresh or not self.sides:
            path = path[fresh[-1] if fresh else 0 :]
            self.sides = capture_sides(
                self.model, self.float_model, path[0], self.calibration, MemoryBudget(memory), self.settings.batch_size
            )
        for before, after in pairwise(path):
            budget = MemoryBudget(memory)
            self.sides = [carried_side(side, self.model, self.float_model, before, after, self.wiring, budget) for side in self.sides]
        self.passed = []
        return self.sides


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
    """Reconstruct the units of `model`, in place, one after the other, each with its inputs in the network quantized so far.

    `float_model` is the folded network that `model` was prepared from, `starts` the free weights of all layers (see `reconstruct`). A
    unit's inputs are computed from the previous unit's if they depend on nothing else, and captured from the network's inputs otherwise.
    Returns each unit's errors.

    `cache` holds the result of each unit that an earlier run finished. Inputs are still carried through such units to the next one that is
    missing, since carried and captured inputs may differ in their last bits.
    """
    report: dict[str, dict[str, float]] = {}
    data = _CarriedData(model, float_model, wiring, calibration, settings)
    for unit in track(units, f"sequential {settings.name if settings.steps else 'solution'}", lambda unit: unit.name):
        cache = cache.keyed(unit.name)  # and on every unit before it
        name = f"sequential {settings.name} of {unit.name}"
        finish = wiring.activation_after(unit.name) or identity
        fit = partial(_fit_unit, model, float_model, unit, starts, partial(data.reach, unit), finish, settings)
        report[unit.name] = _cached_unit(name, model, [layer for layer in unit.layers if layer in starts], fit, cache)
        data.passed.append(unit)
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
    """Reconstruct every unit of every variant (bits -> model), in place, with the float network's inputs. No unit depends on another, so
    that layers of any bits can be combined afterwards. A unit's data are captured once for all variants, unless `cache` has the results of
    all of them.
    """
    report: dict[str, dict[int, dict[str, float]]] = {}
    for unit in track(units, f"parallel {settings.name}", lambda unit: unit.name):
        sides = functools.cache(
            partial(capture_sides, None, float_model, unit, calibration, MemoryBudget(settings.memory), settings.batch_size)
        )
        finish = wiring.activation_after(unit.name) or identity
        for bits, model in variants.items():
            name = f"parallel {settings.name} of {unit.name} at W{bits}"
            fit = partial(_fit_unit, model, float_model, unit, starts[bits], sides, finish, settings)
            errors = _cached_unit(name, model, [layer for layer in unit.layers if layer in starts[bits]], fit, cache)
            report.setdefault(unit.name, {})[bits] = errors
            tell("unit", unit=unit.name, bits=bits, **errors)
        del sides  # free the captured data before the next capture
        give_back()
    return report


def _cached_unit(name: str, model: nn.Module, layers: Sequence[str], fit: Callable[[], dict[str, float]], cache: Cache) -> dict[str, float]:
    """Let `fit` change the layers of `model`, in place, or restore the state that an earlier run stored; returns the unit's errors."""

    def read(entry: Entry) -> dict[str, float]:
        put_back(model, layers, entry.tensors)
        return {key: int(value) if key == "steps" else float(value) for key, value in entry.record.items()}

    return cache(name, lambda: Entry(fit(), snapshot(model, layers)), read)


def _fit_unit(
    model: nn.Module,
    float_model: nn.Module,
    unit: Unit,
    starts: Mapping[str, Tensor],
    sides: Callable[[], Sequence[UnitData]],
    finish: Callable[[Tensor], Tensor],
    settings: ReconstructionSettings,
) -> dict[str, float]:
    """Solve the unit's layers that have a start in closed form, if there is a solver, and train them, in place; returns its errors."""
    inner = {layer.removeprefix(unit.name).lstrip("."): starts[layer] for layer in unit.layers if layer in starts}
    module, float_module = model.get_submodule(unit.name), float_model.get_submodule(unit.name)
    fitting, held_out = sides()
    solved: dict[str, float] = {}
    if settings.solver is not None:
        solved = solve_unit(module, float_module, list(inner), (fitting, held_out), finish, settings.solver, settings.seed, settings.memory)
        inner = _solved_starts(module, float_module, list(inner), settings.rounding)
    if not settings.steps:
        return {**solved, "after": solved["solved"], "steps": 0}
    return reconstruct(module, inner, fitting, held_out, finish, settings) | solved


def _solved_starts(module: nn.Module, float_module: nn.Module, names: Sequence[str], rounding: type[Rounding]) -> dict[str, Tensor]:
    """Return the start of training in the scales of the solution (see `reconstruct`): its codes, or the float weights."""
    starts = {}
    for name in names:
        layer = layers_in(module)[name]
        quantizer = frozen(layer.weight_quantizer)
        rows = weight_rows(layer, float_weight(layer if rounding.resumes else float_module.get_submodule(name)))
        starts[name] = quantizer.codes(rows) if rounding.resumes else (rows / quantizer.scale).detach()
    return starts
