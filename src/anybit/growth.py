"""The stages of training roads: a float network made trainable under a budget, and what was trained frozen into the canonical form."""

import copy
import glob
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from anybit import batchnorm, stages
from anybit.batches import Batch, Samples, draw, tensors_in
from anybit.candidates import activation_candidate, check_finite_samples
from anybit.capture import input_samples
from anybit.checkpoint import Canonical
from anybit.errors import InvalidSetting
from anybit.evaluation import TASKS, Metric
from anybit.evaluation import evaluate as evaluate_model
from anybit.layers import prepare, quantized_layers
from anybit.methods.csq import CSQSettings, Growth, check_budget, plane_choices
from anybit.methods.lsq import FixedScheme, LSQSettings
from anybit.quantizers import LearnedInput, UniformQuantizer
from anybit.refusals import once_a_batch
from anybit.scheme import Budget, Precision, Scheme, match_patterns
from anybit.stages import CalibrateSettings, Network
from anybit.training import Trainee, TrainSettings

PLAIN = 2048
"""Training inputs, not augmented, from which ranges start and batch-norm statistics are estimated before a freeze; fewer of large ones."""
PLAIN_BYTES = 2**28


@dataclass(frozen=True)
class GrowSettings:
    """activation_bits  of every layer's input, 2..8, with a learned range; None leaves activations float
    keep             shell pattern on layer names -> precision
    from_scratch     forget the trained weights; they are learned before they are decided with fix 0.6 and gate_rate 0.03
    task             "classification" or "regression", where the outputs do not tell
    csq, train       the method's settings and the loop's
    """

    activation_bits: int | None = 8
    keep: Mapping[str, Precision] = field(default_factory=dict)
    from_scratch: bool = False
    task: str | None = None
    csq: CSQSettings = field(default_factory=CSQSettings)
    lsq: LSQSettings = field(default_factory=LSQSettings)
    train: TrainSettings = field(default_factory=TrainSettings)

    @classmethod
    def of(cls, **settings: Any) -> "GrowSettings":
        """From one flat set of names, each a field of this class, of TrainSettings, or of the methods' settings that have it."""
        homes = {"csq": CSQSettings, "lsq": LSQSettings, "train": TrainSettings, "": cls}
        parts = {home: {n: v for n, v in settings.items() if n in kind.__dataclass_fields__} for home, kind in homes.items()}
        unknown = [name for name in settings if not any(name in part for part in parts.values())]
        if unknown:
            raise InvalidSetting(f"grow has no setting {unknown[0]!r}.")
        inner = {home: kind(**parts[home]) for home, kind in homes.items() if home}
        return cls(**inner, **parts[""])

    def __post_init__(self):
        if self.task is not None and self.task not in TASKS:
            raise InvalidSetting(f"task {self.task!r} is unknown. Choose from {', '.join(TASKS)}.")

    def to_json(self) -> dict[str, Any]:
        flat = {name: value for name, value in asdict(self).items() if name not in ("csq", "lsq", "train", "keep")}
        flat["keep"] = {pattern: str(precision) for pattern, precision in self.keep.items()}
        return flat | {"csq": asdict(self.csq), "lsq": asdict(self.lsq), "train": self.train.to_json()}


def plain_batches(samples: Samples, settings: TrainSettings) -> list[Batch]:
    """A few training inputs, drawn once, as they are, in batches of one size."""
    count, size = min(_few(samples), len(samples)), min(settings.batch_size, 256)
    return list(draw(samples, count - count % size or count, settings.seed).batches(size))


def watched_batches(tests: Samples, seed: int) -> list[Batch]:
    """The test samples that every epoch is reported on, drawn once: many sets are sorted by class."""
    return list(draw(tests, _few(tests), seed).batches(256))


def _few(samples: Samples) -> int:
    """PLAIN, or as many as PLAIN_BYTES hold."""
    first = next(samples.subset([0]).batches(1))
    return max(2, min(PLAIN, PLAIN_BYTES // sum(tensor.nbytes for tensor in tensors_in(first.inputs))))


def forgotten(model: nn.Module, plain: Sequence[Batch], seed: int) -> nn.Module:
    """A copy whose modules have made their parameters new, with batch-norm statistics of `plain`."""
    fresh = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in fresh.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    batchnorm.reestimate(fresh, plain)
    return fresh


def observe_trainable(model: nn.Module, example: Batch, settings: GrowSettings, scheme: Scheme | None) -> Network:
    """The float network observed and folded, each layer with what it may end with: the planes' bit-widths, or `scheme`'s alone."""
    widths = tuple(range(2, settings.csq.planes + 2))
    fixed = {} if scheme is None else {glob.escape(name): p for name, p in scheme.items() if p.weight_bits is None}
    keep = settings.keep if scheme is None else fixed
    network = stages.observe_network(model, example, CalibrateSettings(widths, (settings.activation_bits,), keep))
    if scheme is not None:
        scheme.check_names(network.names)
        Scheme(dict.fromkeys(network.names, Precision())).check_names(scheme)
        stages.check_kinds(scheme, network)
        return replace(network, choices={name: [scheme[name]] for name in network.names})
    kept = match_patterns(settings.keep, network.names)
    choices = {
        name: list(options)
        if name in kept or not network.costs.layers[name].weights
        else plane_choices(settings.csq, options[0].activation_bits)
        for name, options in network.choices.items()
    }
    return replace(network, choices=choices)


def check_feasible(network: Network, budget: Budget) -> None:
    """Raise InfeasibleBudget or InvalidSetting where the planes cannot end at `budget`, naming the least or the most."""
    check_budget(budget, Scheme({name: options[-1] for name, options in network.choices.items()}), network.costs)
    stages.check_feasible(network, budget)


def make_trainee(network: Network, plain: Sequence[Batch], budget: Budget | None, fixed: bool, settings: GrowSettings) -> Trainee:
    """The unfolded network with gates (or, at a fixed scheme, learned steps) in its weight slots and learned ranges in its input slots."""
    unfolded = copy.deepcopy(network.float_model)
    batchnorm.flip_negative(unfolded, network.norms)
    kept_float = [name for name, options in network.choices.items() if options[0].weight_bits is None]
    model = prepare(unfolded, network.names, kept_float)
    layers = quantized_layers(model)
    with once_a_batch(network.folded, network.used_once):
        samples = input_samples(network.folded, network.used_once, plain, 2**17, settings.train.seed)
    check_finite_samples(samples)
    for name, options in network.choices.items():
        bits = options[0].activation_bits
        if bits is not None:
            start = activation_candidate(samples[name], bits, "mse")
            layers[name].input_quantizer = LearnedInput(UniformQuantizer(bits, False, start.scale, start.zero_point))
    if fixed:
        return FixedScheme(model, Scheme({name: options[0] for name, options in network.choices.items()}), network.costs, settings.lsq)
    return Growth(model, network.choices, network.costs, budget, settings.csq)


def folded_gammas(model: nn.Module, network: Network) -> list[nn.Parameter]:
    """The gammas that will be folded into scales, and so must stay above zero."""
    norms = [model.get_submodule(norm) for norm in network.norms.values()]
    return [norm.weight for norm in norms if norm.weight is not None]


def frozen(trainee: Trainee, network: Network, plain: Sequence[Batch]) -> Canonical:
    """The canonical form of what was trained so far: batch norm re-estimated on `plain`, frozen, folded. The trainee is left as it is."""
    model = copy.deepcopy(trainee.model)
    trainee.freeze(model)
    batchnorm.reestimate(model, plain)
    model, _ = batchnorm.fold(model, network.norms)
    return Canonical(model.eval().requires_grad_(True), network.norms)


def soft_and_frozen(
    trainee: Trainee, network: Network, plain: Sequence[Batch], test: Sequence[Batch], task: str, metric: Metric | None
) -> dict[str, Any]:
    """What the network as it trains and the network as it would be frozen now score on `test`, both with statistics of `plain`."""
    soft = copy.deepcopy(trainee.model)
    batchnorm.reestimate(soft, plain)
    return {
        "soft": evaluate_model(soft, test, task, metric),
        "frozen": evaluate_model(frozen(trainee, network, plain).model, test, task, metric),
    }
