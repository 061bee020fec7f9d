"""The stages of train once, up to the supernet: its settings and data, the network with switchable quantizers, its batch norms."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from anybit import batchnorm, stages
from anybit.batches import Batch, Samples, draw
from anybit.candidates import activation_candidate, check_finite_samples
from anybit.capture import input_samples
from anybit.cost import CostModel
from anybit.errors import InvalidFile, InvalidInput, InvalidSetting, SchemeMismatch
from anybit.evaluation import TASKS
from anybit.files import read_settings, validated
from anybit.layers import float_weight, from_rows, prepare, quantized_layers, weight_rows
from anybit.methods.multiquant import MultiQuant, MultiQuantSettings, SwitchableInput, SwitchableNorm, SwitchableWeight
from anybit.quantizers import UniformQuantizer
from anybit.ranges import weight_scale
from anybit.refusals import once_a_batch
from anybit.scheme import FLOAT, MAX_BITS, Precision, Scheme, check_bits
from anybit.stages import CalibrateSettings, Network
from anybit.store import STORE_BITS
from anybit.training import TrainSettings, epoch_batches
from anybit.wiring import BATCH_NORMS


@dataclass(frozen=True)
class SupernetSettings:
    """bits             bit-widths of weights and inputs, 2..8
    keep             shell pattern on layer names -> precision
    task             "classification" or "regression", where the outputs do not tell
    held_out         share of the training data that is not trained on: the search evaluates on it
    bn_images        training inputs, augmented as in training, from which batch-norm statistics are estimated anew for a subnet
    multiquant, train  the method's settings and the loop's
    """

    bits: tuple[int, ...] = (2, 4, 6, 8)
    keep: Mapping[str, Precision] = field(default_factory=dict)
    task: str | None = None
    held_out: float = 0.1
    bn_images: int = 4096
    multiquant: MultiQuantSettings = field(default_factory=MultiQuantSettings)
    train: TrainSettings = field(default_factory=TrainSettings)

    @classmethod
    def of(cls, **settings: Any) -> "SupernetSettings":
        """From one flat set of names, each a field of this class, of TrainSettings or of MultiQuantSettings."""
        homes = {"multiquant": MultiQuantSettings, "train": TrainSettings, "": cls}
        parts = {home: {n: v for n, v in settings.items() if n in kind.__dataclass_fields__} for home, kind in homes.items()}
        unknown = [name for name in settings if not any(name in part for part in parts.values())]
        if unknown:
            raise InvalidSetting(f"train has no setting {unknown[0]!r}.")
        weight = settings.get("label_weight", MultiQuantSettings.label_weight)
        if settings.get("label", MultiQuantSettings.label) == "one-hot" and weight != MultiQuantSettings.label_weight:
            raise InvalidSetting(f"label_weight {weight} has no part in one-hot labels. Choose label adaptive or teacher, or leave it out.")
        return cls(**{home: kind(**parts[home]) for home, kind in homes.items() if home}, **parts[""])

    def __post_init__(self):
        if len(set(self.bits)) < len(self.bits) or len(self.bits) < 2:
            raise InvalidSetting(f"bits {', '.join(map(str, self.bits))}: give at least two bit-widths, each once.")
        for bits in self.bits:
            check_bits(bits)
        if self.task is not None and self.task not in TASKS:
            raise InvalidSetting(f"task {self.task!r} is unknown. Choose from {', '.join(TASKS)}.")
        if not 0 < self.held_out < 1:
            raise InvalidSetting(f"held_out {self.held_out} must be between 0 and 1: the search evaluates on that share.")
        if self.bn_images < 2:
            raise InvalidSetting(f"bn_images {self.bn_images} are too few for batch-norm statistics. Give at least 2; hundreds work well.")
        if self.multiquant.batch_norm == "switch" and self.train.compile:
            raise InvalidSetting("A batch norm for each bit-width cannot be compiled: every scheme would be compiled anew. Leave off one.")

    def to_json(self) -> dict[str, Any]:
        flat = {name: value for name, value in asdict(self).items() if name not in ("multiquant", "train", "keep")}
        rates = {str(bits): factor for bits, factor in self.multiquant.step_rates.items()}
        return flat | {
            "bits": list(self.bits),
            "keep": {pattern: str(precision) for pattern, precision in self.keep.items()},
            "multiquant": asdict(self.multiquant) | {"step_rates": rates},
            "train": self.train.to_json(),
        }


def held_out_split(samples: Samples, settings: SupernetSettings) -> tuple[Samples, Samples]:
    """(what is trained on, what the search evaluates on), by the training's seed."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(settings.train.seed)).tolist()
    kept = min(max(1, round(len(samples) * settings.held_out)), len(samples) - 1)
    return samples.subset(order[kept:]), samples.subset(order[:kept])


def bn_batches(samples: Samples, settings: SupernetSettings) -> list[Batch]:
    """Training inputs for batch-norm statistics, drawn once, augmented as in training; all of them in every process."""
    if len(samples) < 2:
        raise InvalidInput(f"{len(samples)} training input(s) are too few for batch-norm statistics. Give at least 2; hundreds work well.")
    with torch.random.fork_rng(devices=[]):
        return list(epoch_batches(draw(samples, settings.bn_images, settings.train.seed), settings.train, -1, share=(0, 1)))


def observe_supernet(model: nn.Module, example: Batch, settings: SupernetSettings) -> Network:
    """The float network observed and folded, each layer with the precisions that it is trained for."""
    pruned = next((pattern for pattern, precision in settings.keep.items() if precision.weight_bits == 0), None)
    if pruned is not None:
        raise InvalidSetting(f"--keep {pruned}=W0: a supernet prunes no layer. Keep it at 2 to 8 bits, or float.")
    return stages.observe_network(model, example, CalibrateSettings(settings.bits, settings.bits, settings.keep))


def make_multiquant(network: Network, plain: Sequence[Batch], settings: SupernetSettings, classes: int | None) -> MultiQuant:
    """The unfolded network with switchable quantizers in its slots, each bit-width in its range of least squared error."""
    unfolded = copy.deepcopy(network.float_model)
    batchnorm.flip_negative(unfolded, network.norms)
    model = prepare(unfolded, network.names, [name for name, options in network.choices.items() if options[0].weight_bits is None])
    with once_a_batch(network.folded, network.used_once):
        samples = input_samples(network.folded, network.used_once, plain, 2**17, settings.train.seed)
    check_finite_samples(samples)
    wanted = settings.multiquant
    for name, layer in quantized_layers(model).items():
        rows = weight_rows(layer, float_weight(layer)).detach()
        weights, inputs = widths_of(network.choices[name])
        scales = {bits: weight_scale(rows if wanted.per_channel else rows.reshape(1, -1), bits) for bits in weights}
        starts = {bits: activation_candidate(samples[name], bits, "mse") for bits in inputs}
        fill_slots(layer, scales, {bits: (start.scale, start.zero_point) for bits, start in starts.items()}, wanted)
    return prepared_multiquant(model, network.choices, network.norms, settings, classes)


def prepared_multiquant(
    model: nn.Module, choices: Mapping, norms: Mapping[str, str], settings: SupernetSettings, classes: int | None
) -> MultiQuant:
    """The method on a network whose slots are filled."""
    method = MultiQuant(model, choices, settings.multiquant, classes, settings.train.seed)
    if settings.multiquant.batch_norm == "switch":
        method.switch_norms(norms)
    return method


def widths_of(options: Sequence[Precision]) -> tuple[list[int], list[int]]:
    """Bit-widths of a layer's weights and of its input, ascending; without float."""
    return sorted({p.weight_bits for p in options if p.weight_bits}), sorted({p.activation_bits for p in options if p.activation_bits})


def fill_slots(
    layer: nn.Module, scales: Mapping[int, Tensor], ranges: Mapping[int, tuple[Tensor, Tensor]], wanted: MultiQuantSettings
) -> None:
    """Switchable quantizers in a layer's slots, where there are bits to switch."""
    layer.weight_quantizer = SwitchableWeight(scales, wanted.step_rates) if scales else None
    layer.input_quantizer = SwitchableInput(ranges, wanted.step_rates, wanted.offset_rate > 0) if ranges else None


def uniform(choices: Mapping[str, Sequence[Precision]], bits: int) -> Scheme:
    """Every layer at `bits`; kept layers, which have no choice, as they are kept. Raises SchemeMismatch where `bits` was not trained."""
    chosen = {}
    for name, options in choices.items():
        wanted = [p for p in options if p != FLOAT and {p.weight_bits, p.activation_bits} <= {bits, None}]
        if not wanted and len(options) > 1:
            there = ", ".join(str(width) for width in widths_of(options)[0] or widths_of(options)[1])
            raise SchemeMismatch(f"{name} was not trained at {bits} bits. Choose from {there}, or train again with those --bits.")
        chosen[name] = (wanted or list(options))[0]
    return Scheme(chosen)


def settings_from_json(data: Mapping[str, Any]) -> SupernetSettings:
    """What `SupernetSettings.to_json` wrote. Raises InvalidFile where it is something else."""
    where = "settings"
    parts = {key: validated(dict[str, Any], data.get(key), f"{where}: {key}") for key in ("multiquant", "train")}
    texts = validated(dict[str, float], parts["multiquant"].get("step_rates", {}), f"{where}: step_rates")
    patterns = validated(dict[str, str], data.get("keep", {}), f"{where}: keep")
    try:
        rates = {int(bits): factor for bits, factor in texts.items()}
        keep = {pattern: Precision.parse(text) for pattern, text in patterns.items()}
    except ValueError as error:
        raise InvalidFile(f"{where}: {error}") from error
    inner = {key: value for key, value in parts["multiquant"].items() if key != "step_rates"}
    multiquant = read_settings(MultiQuantSettings, inner, f"{where}: multiquant", {"step_rates": rates})
    train = read_settings(TrainSettings, parts["train"], f"{where}: train")
    flat = {key: value for key, value in data.items() if key not in ("multiquant", "train", "keep")}
    return read_settings(SupernetSettings, flat, where, {"keep": keep, "multiquant": multiquant, "train": train})


def folded_gammas(method: MultiQuant, norms: Mapping[str, str]) -> list[nn.Parameter]:
    """The gammas that will be folded into scales, and so must stay above zero: of every bit-width, where each has its own."""
    found = []
    for name in norms.values():
        module = method.model.get_submodule(name)
        found += [norm.weight for norm in (module.norms if isinstance(module, SwitchableNorm) else [module]) if norm.weight is not None]
    return found


# Batch norm


def active_norms(model: nn.Module) -> list[nn.Module]:
    """The batch norms that the network at hand computes with, in order of definition."""
    idle = {
        id(norm) for module in model.modules() if isinstance(module, SwitchableNorm) for norm in module.norms if norm is not module.chosen()
    }
    return [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.running_mean is not None and id(m) not in idle]


def statistics_of(model: nn.Module) -> Tensor:
    """Means and variances of all active batch norms, one after another, [numbers]."""
    parts = [part for norm in active_norms(model) for part in (norm.running_mean, norm.running_var)]
    return torch.cat(parts).clone() if parts else torch.zeros(0)


@torch.no_grad()
def set_statistics(model: nn.Module, statistics: Tensor) -> None:
    """Put back what `statistics_of` read."""
    at = 0
    for norm in active_norms(model):
        for part in (norm.running_mean, norm.running_var):
            part.copy_(statistics[at : at + part.numel()])
            at += part.numel()


def distance(one: Scheme, other: Scheme, costs: CostModel) -> float:
    """Mean difference in bits, of weights and inputs together, over all weights."""
    total = sum(size.weights for size in costs.layers.values())
    return sum(
        costs.layers[name].weights
        * (
            abs(one[name].stored_weight_bits - other[name].stored_weight_bits)
            + abs((one[name].activation_bits or 32) - (other[name].activation_bits or 32))
        )
        for name in one
    ) / (2 * total)


# The store


@torch.no_grad()
def to_store(method: MultiQuant) -> dict[str, tuple[Tensor, Tensor]]:
    """Round the shared weights to the store's 8 bits, in place; layer -> (int8 codes [rows, columns], step [rows, 1]).

    The step is the one trained for 8 bits where there is one, and else holds the largest weight of each row. Trained weights gather at the
    thresholds of low bit-widths: of the two codes around a weight, the nearest is taken unless the other keeps more of its lower codes.
    """
    stored = {}
    for name, layer in method.layers.items():
        weights = layer.weight_quantizer
        if isinstance(weights, SwitchableWeight):
            rows = weight_rows(layer, float_weight(layer))
            if MAX_BITS in weights.widths:
                scale = weights.scales()[weights.widths.index(MAX_BITS)].expand(len(rows), 1)
            else:
                scale = weight_scale(rows, STORE_BITS, "minmax")
            quantizer = UniformQuantizer(STORE_BITS, True, scale)
            nearest = quantizer.codes(rows)
            other = (nearest + torch.sign(rows / quantizer.scale - nearest)).clamp(*quantizer.limits)
            codes = torch.where(
                _changed(weights, rows, quantizer.values(other)) < _changed(weights, rows, quantizer.values(nearest)), other, nearest
            )
            float_weight(layer).copy_(from_rows(layer, quantizer.values(codes)))
            stored[name] = (codes.to(torch.int8), quantizer.scale)
    return stored


def _changed(weights: SwitchableWeight, rows: Tensor, rounded: Tensor) -> Tensor:
    """How many of a weight's codes rounding changes, one of fewer bits counting for more than all of more bits, [rows, columns]."""
    changed = torch.zeros_like(rows)
    for bits, scale in zip(weights.widths, weights.scales(), strict=True):
        quantizer = UniformQuantizer(bits, True, scale.expand(len(rows), 1))
        changed += (quantizer.codes(rows) != quantizer.codes(rounded)) * 4.0**-bits
    return changed
