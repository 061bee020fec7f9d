"""The stages of training roads: a float network made trainable under a budget, and what was trained frozen into the canonical form."""

import copy
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
from anybit.evaluation import Metric
from anybit.evaluation import evaluate as evaluate_model
from anybit.layers import prepare, quantized_layers
from anybit.methods.csq import CSQSettings, Growth, check_budget, plane_choices
from anybit.methods.lsq import FixedScheme, LSQSettings
from anybit.quantizers import LearnedInput, UniformQuantizer
from anybit.scheme import Budget, Precision, Scheme
from anybit.stages import CalibrateSettings, Network
from anybit.training import Trainee, TrainSettings

PLAIN = 2048
"""Training inputs, not augmented, from which ranges start and batch-norm statistics are estimated before a freeze; fewer of large ones."""
PLAIN_BYTES = 2**28


@dataclass(frozen=True)
class GrowSettings:
    """activation_bits  of every layer's input, 2..8, with a learned range; None leaves activations float
    keep             shell pattern on layer names -> precision
    from_scratch     forget the trained weights
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
        """From one flat set of names, each a field of this class, of CSQSettings or of TrainSettings."""
        parts: dict[str, dict[str, Any]] = {"csq": {}, "train": {}, "": {}}
        for name, value in settings.items():
            home = next((p for p, c in (("csq", CSQSettings), ("train", TrainSettings), ("", cls)) if name in c.__dataclass_fields__), None)
            if home is None:
                raise InvalidSetting(f"grow has no setting {name!r}.")
            parts[home][name] = value
        return cls(csq=CSQSettings(**parts["csq"]), train=TrainSettings(**parts["train"]), **parts[""])

    def to_json(self) -> dict[str, Any]:
        flat = {name: value for name, value in asdict(self).items() if name not in ("csq", "lsq", "train", "keep")}
        flat["keep"] = {pattern: str(precision) for pattern, precision in self.keep.items()}
        return flat | {"csq": asdict(self.csq), "lsq": asdict(self.lsq), "train": self.train.to_json()}


def plain_batches(samples: Samples, settings: GrowSettings) -> list[Batch]:
    """A few training inputs, drawn once, as they are."""
    return list(draw(samples, _few(samples), settings.train.seed).batches(min(settings.train.batch_size, 256)))


def watched_batches(tests: Samples) -> list[Batch]:
    """The test samples that every epoch is reported on: the first ones."""
    return list(tests.subset(range(min(len(tests), _few(tests)))).batches(256))


def _few(samples: Samples) -> int:
    """PLAIN, or as many as PLAIN_BYTES hold."""
    first = next(samples.subset([0]).batches(1))
    return max(2, min(PLAIN, PLAIN_BYTES // sum(tensor.nbytes for tensor in tensors_in(first.inputs))))


def forget(model: nn.Module, seed: int) -> None:
    """Every module's parameters as it makes them new, in place."""
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def observe_trainable(model: nn.Module, example: Batch, settings: GrowSettings, scheme: Scheme | None) -> Network:
    """The float network observed and folded, each layer with what it may end with: the planes' bit-widths, or `scheme`'s alone."""
    widths = tuple(range(2, settings.csq.planes + 2))
    wanted = CalibrateSettings(weight_bits=widths, activation_bits=(settings.activation_bits,), keep=settings.keep)
    network = stages.observe_network(model, example, wanted)
    if scheme is not None:
        scheme.check_names(network.names)
        Scheme(dict.fromkeys(network.names, Precision())).check_names(scheme)
        return replace(network, choices={name: [scheme[name]] for name in network.names})
    planes = plane_choices(settings.csq, settings.activation_bits)
    choices = {}
    for name, options in network.choices.items():
        free = len(options) == len(widths)
        inputs = options[0].activation_bits
        choices[name] = [Precision(p.weight_bits, inputs) for p in planes] if free else list(options)
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
    samples = input_samples(network.folded, network.names, plain, 2**17, settings.train.seed)
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
