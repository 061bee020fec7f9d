"""The stages of the calibrate road. Each is a function of (network, data, settings) that changes nothing it was given and returns
tensors and a JSON record, so that `roads` can compose them, users can call them one by one, and their results can be stored.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from anybit import batchnorm
from anybit.allocation import Allocation, allocate, best_allocations, least_costs, make_problem
from anybit.batches import Batch, Calibration, real, tensors_in
from anybit.candidates import (
    Candidates,
    activation_candidate,
    apply_scheme,
    check_finite_samples,
    check_finite_weights,
    from_tensors,
    frozen_candidate,
    put_back,
    snapshot,
    to_tensors,
    weight_candidate,
)
from anybit.capture import give_back, input_samples
from anybit.cost import CostModel
from anybit.errors import InfeasibleBudget, InvalidFile, InvalidSetting, SchemeMismatch, UnsupportedModel
from anybit.evaluation import COUNTED, TASKS, Metric, distance, guess_task, outputs_of, score
from anybit.layers import check_float32, check_plain_use, coverage, float_weight, prepare, quantized_layers, takes_groups, weight_rows
from anybit.matmul import Matmul
from anybit.methods.adaquant import AdaQuantSettings, BiasTuningSettings, parallel, sequential, tune_biases
from anybit.progress import tell
from anybit.quantizers import UniformQuantizer
from anybit.ranges import ESTIMATORS
from anybit.refusals import check_differentiable, check_network, check_outputs, moving_state, restore, state_of
from anybit.resume import Kept, Recall, code_version, digest, machine
from anybit.scheme import FLOAT, Budget, Condition, Precision, Scheme, check_bits, match_patterns
from anybit.sensitivity import SensitivityTable, measure_sensitivity
from anybit.wiring import LAYER, Unit, Wiring, observe

PIPELINES = ("advanced", "light")


@dataclass(frozen=True)
class CalibrateSettings:
    """Every choice of the calibrate road; `None` in a step's switch means: as the pipeline has it.

    weight_bits, activation_bits  what a layer may get (None among the activation bits: float activations)
    keep                          shell pattern on layer names -> precision, overriding the above
    pipeline                      "advanced" (with AdaQuant and bias tuning) or "light" (no back-propagation)
    parallel, sequential, bn_tuning, bias_tuning  switches of the steps
    samples, held_out             inputs drawn, fitting and held-out together, and the share held out
    estimator                     range estimator: "mse", "minmax" or "percentile"
    unit                          what is reconstructed at once: "block" or "layer"; `blocks` names the blocks instead of finding them
    steps, candidate_steps        of Adam a unit, sequential and for each candidate
    step_batch                    inputs that such a step sees; of padded texts it sees a whole batch
    start                         where sequential AdaQuant starts: "ranges", "matched" statistics (as ranges where no batch norm folds), or
                                  None: the codes of parallel AdaQuant where it ran, else ranges
    drop                          share of activation quantizations dropped while reconstructing (0: none)
    mirror                        also fit to the mirror images of 4-d inputs
    sensitivity_base              precision of the other layers while one is measured
    pairs                         measure (W, A) pairs instead of summing a W and an A measurement
    alternatives                  how many of the best schemes are measured before one is chosen
    tune_scales                   bias tuning trains the scales too (off in the paper)
    bn_prior                      weight of the target in the measured statistics, of candidates and in batch-norm tuning alike
    bn_target                     "float" or "prior" (the paper's form)
    memory                        bytes of activations that are held at once: what a step of work needs, and what is captured, the rest of
                                  which spills to disk
    group                         a weight scale for each so many inputs of a channel, in linears and embeddings that have a multiple of
                                  them and no batch norm; None: one a channel
    """

    weight_bits: tuple[int, ...] = (2, 3, 4, 6, 8)
    activation_bits: tuple[int | None, ...] = (4, 6, 8)
    keep: Mapping[str, Precision] = field(default_factory=dict)
    pipeline: str = "advanced"
    parallel: bool | None = None
    sequential: bool | None = None
    bn_tuning: bool = True
    bias_tuning: bool | None = None
    samples: int = 1024
    held_out: float = 0.2
    batch_size: int = 64
    seed: int = 0
    estimator: str = "mse"
    unit: str = "block"
    blocks: tuple[str, ...] | None = None
    steps: int = 300
    candidate_steps: int = 60
    step_batch: int = 32
    start: str | None = None
    drop: float = 0.0
    mirror: bool = False
    sensitivity_base: Precision = FLOAT
    pairs: bool = False
    alternatives: int = 5
    tune_scales: bool = False
    bn_prior: float = 0.0
    bn_target: str = "float"
    memory: int = 2**31
    group: int | None = None
    task: str | None = None

    def __post_init__(self):
        parsed = {pattern: Precision.parse(p) if isinstance(p, str) else p for pattern, p in self.keep.items()}
        object.__setattr__(self, "keep", parsed)
        if isinstance(self.sensitivity_base, str):
            object.__setattr__(self, "sensitivity_base", Precision.parse(self.sensitivity_base))
        for name in ("weight_bits", "activation_bits"):
            values = getattr(self, name)
            if not values:
                raise InvalidSetting(f"{name.replace('_', '-')} is empty. Give at least one bit-width.")
            for bits in values:
                if not (bits is None and name == "activation_bits"):
                    check_bits(bits, name.replace("_", " ").removesuffix("s") + "-width")
        for name, allowed in (
            ("pipeline", PIPELINES),
            ("estimator", ESTIMATORS),
            ("unit", ("block", "layer")),
            ("bn_target", ("float", "prior")),
            ("start", (None, "ranges", "matched")),
        ):
            if getattr(self, name) not in allowed:
                raise InvalidSetting(f"{name} {getattr(self, name)!r} is unknown. Choose from {', '.join(filter(None, allowed))}.")
        if self.task is not None and self.task not in TASKS:
            raise InvalidSetting(f"task {self.task!r} is unknown. Choose from {', '.join(TASKS)}.")
        if not 0 < self.held_out < 1 or not 0 <= self.drop <= 1 or self.samples < 2 or self.steps < 1:
            raise InvalidSetting("held_out must be between 0 and 1, drop from 0 to 1, samples at least 2 and steps at least 1.")
        for name, least in (
            ("batch_size", 1),
            ("step_batch", 1),
            ("candidate_steps", 1),
            ("alternatives", 1),
            ("memory", 0),
            ("bn_prior", 0),
        ):
            if getattr(self, name) < least:
                raise InvalidSetting(f"{name} {getattr(self, name)} must be at least {least}.")
        if self.alternatives > 100:  # each is a program to solve and a network to measure
            raise InvalidSetting(f"alternatives {self.alternatives} must be at most 100.")
        if self.group is not None and self.group < 2:
            raise InvalidSetting(f"group {self.group} must be at least 2 weights: 128, 64 and 32 are usual.")
        if self.bn_prior >= 1:
            raise InvalidSetting(f"bn_prior {self.bn_prior} must be below 1.")

    def does(self, step: str) -> bool:
        """Whether `step` runs: its switch, or what the pipeline has."""
        switch = getattr(self, step)
        return self.pipeline == "advanced" if switch is None else switch

    def to_json(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["keep"] = {pattern: str(precision) for pattern, precision in self.keep.items()}
        values["sensitivity_base"] = str(self.sensitivity_base)
        for step in ("parallel", "sequential", "bias_tuning"):
            values[step] = self.does(step)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


@dataclass(frozen=True)
class Network:
    """A float network made ready: folded, with empty slots, observed. Nothing here is changed by any stage, except what the network's own
    forward changes: `moving` holds those buffers as they were given."""

    float_model: nn.Module
    folded: nn.Module
    prepared: nn.Module
    wiring: Wiring
    norms: Mapping[str, str]
    promised: Mapping[str, batchnorm.ChannelStatistics]
    choices: Mapping[str, Sequence[Precision]]
    uncovered: Mapping[str, str]
    units: Sequence[Unit]
    costs: CostModel
    moving: Mapping[str, Tensor | None] = field(default_factory=dict)

    @property
    def used_once(self) -> list[str]:
        """Layers that are not kept float in everything: they must run once in every pass."""
        return [name for name, options in self.choices.items() if options != [FLOAT]]

    @property
    def names(self) -> list[str]:
        """Layers in the scheme, in call order."""
        return list(self.choices)

    def uniform(self, weight_bits: int, activation_bits: int | None) -> Scheme:
        """These bits everywhere, except in kept layers; embeddings have no activation bits, matmuls no weights."""
        wanted = (Precision(weight_bits, activation_bits), Precision(weight_bits, None), Precision(None, activation_bits))
        return Scheme({n: next((p for p in wanted if p in options), options[0]) for n, options in self.choices.items()})


def observe_network(model: nn.Module, example: Batch, settings: CalibrateSettings) -> Network:
    """Observe, check, fold and prepare copies of `model`; `example` is a small batch of inputs."""
    check_network(model)
    check_finite_weights(model)
    check_float32(model, _not_kept_float(coverage(model)[0], settings))  # before a type that differs makes the network refuse its input
    given = state_of(model)
    wiring = observe(model, example)
    names, uncovered = coverage(model, wiring)
    if not names:
        others = "".join(f" {name or 'The network itself'}: {why}." for name, why in uncovered.items())
        raise UnsupportedModel(f"The model has no layer to quantize: no convolution, linear or embedding ran on the data.{others}")
    kept = match_patterns(settings.keep, names)
    kept_float = [name for name, precision in kept.items() if precision.weight_bits is None]
    check_plain_use(wiring, [name for name in names if name not in kept_float])
    moving = moving_state(model, example, given)
    check_outputs(model, example)
    folded, norms, promised = batchnorm.fold_checked(model, batchnorm.foldable(model, wiring), example)
    wiring = observe(folded, example)
    for network in (model, folded):
        restore(network, moving)
    prepared = prepare(folded, names, kept_float, _groups(folded, [name for name in names if name not in norms], settings))
    layers = quantized_layers(prepared)
    choices = {name: _choices(layers[name], kept.get(name), settings) for name in names}
    blocks = wiring.blocks(list(settings.blocks) if settings.blocks is not None else None) if settings.unit == "block" else []
    fitted = {name for name in names if is_reconstructed(layers[name]) and any(p.weight_bits for p in choices[name])}
    units = [unit for unit in wiring.units(names, blocks) if fitted & set(unit.layers)]
    costs = CostModel.of(prepared, names, wiring, len(wiring.edges()), model)
    if settings.does("bias_tuning"):
        check_differentiable(prepared, [unit.name for unit in units if unit.name not in names], example)
    return Network(model, folded, prepared, wiring, norms, promised, choices, uncovered, units, costs, moving)


def _not_kept_float(names: Sequence[str], settings: CalibrateSettings) -> list[str]:
    kept = match_patterns(settings.keep, names)
    return [name for name in names if name not in kept or kept[name].weight_bits is not None]


def is_reconstructed(layer: nn.Module) -> bool:
    """Whether AdaQuant has anything to do: not for an embedding, whose words are looked up and never summed, so that rounding each to
    nearest is the least error already; nor for a matmul."""
    return not isinstance(layer, (nn.Embedding, Matmul))


def _groups(model: nn.Module, names: Sequence[str], settings: CalibrateSettings) -> dict[str, int]:
    """layer -> group size, of the layers that take it; raises InvalidSetting where none does."""
    if settings.group is None:
        return {}
    groups = {name: settings.group for name in names if takes_groups(model.get_submodule(name), settings.group)}
    if not groups:
        raise InvalidSetting(f"group {settings.group} divides the inputs of no linear or embedding of this network. Choose another size.")
    return groups


def unobserved_network(model: nn.Module, settings: CalibrateSettings) -> Network:
    """What can be said of `model` before any input is seen: nothing folded, no units, no shapes."""
    check_network(model)
    check_finite_weights(model)
    names, uncovered = coverage(model)
    if not names:
        raise UnsupportedModel("The model has no layer to quantize: no convolution, linear or embedding.")
    kept = match_patterns(settings.keep, names)
    kept_float = [name for name, precision in kept.items() if precision.weight_bits is None]
    prepared = prepare(model, names, kept_float, _groups(model, names, settings))
    layers = quantized_layers(prepared)
    choices = {name: _choices(layers[name], kept.get(name), settings) for name in names}
    costs = CostModel.of(prepared, names, None, 0, model)
    return Network(model, model, prepared, Wiring((), {}, {}, (), (), 0), {}, {}, choices, uncovered, [], costs)


def _choices(layer: nn.Module, kept: Precision | None, settings: CalibrateSettings) -> list[Precision]:
    weight_bits: Sequence[int | None] = sorted(settings.weight_bits) if kept is None else (kept.weight_bits,)
    activation_bits = sorted(settings.activation_bits, key=lambda bits: bits or 32) if kept is None else (kept.activation_bits,)
    if isinstance(layer, nn.Embedding):  # it reads numbers of words
        activation_bits = (None,)
    if isinstance(layer, Matmul):  # it reads activations alone
        weight_bits = (None,)
    return [Precision(w, a) for w in weight_bits for a in activation_bits]


def check_kinds(scheme: Scheme, network: Network) -> None:
    """Raise SchemeMismatch where a scheme gives bits to what a layer does not have."""
    for name, precision in scheme.items():
        layer = network.folded.get_submodule(name)
        if isinstance(layer, nn.Embedding) and precision.activation_bits is not None:
            raise SchemeMismatch(f"{name} is an embedding, whose input is no activation: write {Precision(precision.weight_bits)}.")
        if isinstance(layer, Matmul) and precision.weight_bits is not None:
            raise SchemeMismatch(
                f"{name} is a product of activations, without weights: write {Precision(None, precision.activation_bits)}."
            )


# Settings by the first result that depends on them: a change of one leaves what was made before it. All others count from the beginning.
MATCHING = ("bn_tuning", "bn_prior", "bn_target")
PARALLEL = ("candidate_steps", "step_batch", "drop")
SENSITIVITY = ("pairs",)
LATER = ("pipeline", "parallel", "alternatives", "memory", "steps", "start", "sequential", "bias_tuning", "tune_scales")


def recall_of_run(
    recall: Recall, network: Network, calibration: Calibration, outputs: Sequence[Tensor], settings: CalibrateSettings
) -> Recall:
    """`recall` under all that the ranges of a network depend on: weights, inputs and float `outputs` (what the network's code does shows
    there), layers and choices, settings, and the code and machine that compute."""
    early = {key: value for key, value in settings.to_json().items() if key not in (*MATCHING, *PARALLEL, *SENSITIVITY, *LATER)}
    data = [tensor for batch in [*calibration.fitting, *calibration.held_out] for tensor in tensors_in([batch.inputs, batch.labels])]
    operations = [[op.name, op.kind, list(op.shape)] for op in network.wiring.operations]
    choices = {name: [str(precision) for precision in precisions] for name, precisions in network.choices.items()}
    units = [[unit.name, list(unit.layers)] for unit in network.units]
    return recall.under(
        code_version(), machine(data[0].device), digest(network.float_model.state_dict().values()), digest(data), digest(outputs),
        operations, choices, units, early,
    )  # fmt: skip


def under_settings(recall: Recall, settings: CalibrateSettings, names: Sequence[str]) -> Recall:
    """`recall` under these settings too."""
    return recall.under({name: settings.to_json()[name] for name in names})


def recalled_candidates(recall: Recall, name: str, network: Network, make: Callable[[], Candidates]) -> Candidates:
    """Candidates that `make` gives, or that an earlier run kept."""
    layers = quantized_layers(network.prepared)
    shapes = {layer: tuple(weight_rows(layers[layer], float_weight(layers[layer])).shape) for layer in network.names}
    device = str(next(network.prepared.parameters()).device)
    return recall(name, lambda: Kept(None, to_tensors(make())), lambda kept: from_tensors(kept.tensors, shapes).on(device))


def range_candidates(network: Network, calibration: Calibration, settings: CalibrateSettings) -> Candidates:
    """Every layer's weights rounded to nearest at each of its bit-widths, and its input range at each activation bit-width."""
    samples = finite_samples(network, calibration, settings)
    layers = quantized_layers(network.prepared)
    candidates = Candidates()
    for name, choices in network.choices.items():
        precisions = [*choices, settings.sensitivity_base] if len(choices) > 1 else choices
        for bits in sorted({p.weight_bits for p in precisions if p.weight_bits}):
            candidates.weights[name, bits] = weight_candidate(layers[name], bits, settings.estimator)
        for bits in sorted({p.activation_bits for p in precisions if p.activation_bits}):
            candidates.activations[name, bits] = activation_candidate(samples[name], bits, settings.estimator)
    return candidates


def finite_samples(network: Network, calibration: Calibration, settings: CalibrateSettings) -> dict[str, list[Tensor]]:
    """Values of each layer's input on the fitting inputs; raises InvalidInput naming the first layer whose input is not finite."""
    samples = input_samples(network.folded, network.used_once, calibration.fitting, 2**17, settings.seed)
    check_finite_samples(samples)
    return samples


def batch_norm_targets(
    network: Network, calibration: Calibration, settings: CalibrateSettings
) -> Mapping[str, batchnorm.ChannelStatistics]:
    """What every folded layer's output statistics should be: the float network's on the fitting inputs, or beta and |gamma|."""
    if settings.bn_target == "prior":
        return network.promised
    return batchnorm.channel_statistics(network.folded, network.norms, calibration.fitting)


def matched_candidates(
    network: Network,
    candidates: Candidates,
    targets: Mapping[str, batchnorm.ChannelStatistics],
    calibration: Calibration,
    prior_weight: float = 0.0,
) -> Candidates:
    """The same candidates with every layer's output statistics matched to the float network's (batch-norm tuning, layer by layer)."""
    return _with_weights(
        network, candidates, lambda model, names: batchnorm.match_layers(
            network.folded, model, {name: targets[name] for name in targets if name in names}, calibration.fitting, prior_weight
        )
    )  # fmt: skip


def _variants(network: Network, candidates: Candidates) -> dict[int, nn.Module]:
    """bits -> the network with the weights of all layers that have a candidate of these bits, activations float."""
    variants = {}
    for bits in sorted({bits for _, bits in candidates.weights}):
        scheme = {name: Precision(bits, None) for name in network.names if (name, bits) in candidates.weights}
        variants[bits] = apply_scheme(network.prepared, Scheme(scheme), candidates)
    return variants


def _with_weights(network: Network, candidates: Candidates, change) -> Candidates:
    changed = Candidates(dict(candidates.weights), candidates.activations)
    for bits, model in _variants(network, candidates).items():
        names = [name for name in network.names if (name, bits) in candidates.weights]
        change(model, names)
        for name in names:
            changed.weights[name, bits] = frozen_candidate(model.get_submodule(name))
    return changed


def free_weights(network: Network, ranged: Candidates, scheme: Mapping[str, Precision]) -> dict[str, Tensor]:
    """Each layer's float weight in units of its estimated scale, [channels, fan-in]: where AdaQuant starts from."""
    starts = {}
    for name, precision in scheme.items():
        if precision.weight_bits:
            layer = network.prepared.get_submodule(name)
            rows = weight_rows(layer, float_weight(layer)).detach()
            starts[name] = rows / ranged.weights[name, precision.weight_bits].scale
    return starts


def reconstructed_candidates(
    network: Network,
    candidates: Candidates,
    ranged: Candidates,
    calibration: Calibration,
    settings: CalibrateSettings,
    recall: Recall = Recall(),
) -> tuple[Candidates, dict]:
    """AdaQuant in its parallel form, a layer at a time, at every candidate bit-width: (candidates, each layer's errors)."""
    variants = _variants(network, candidates)
    starts = {
        bits: free_weights(network, ranged, {n: Precision(bits) for n in network.names if (n, bits) in candidates.weights})
        for bits in variants
    }
    layers = quantized_layers(network.prepared)
    free = [name for name, options in network.choices.items() if is_reconstructed(layers[name]) and any(p.weight_bits for p in options)]
    units = network.wiring.units(free, [])
    changed = Candidates(dict(candidates.weights), candidates.activations)
    wanted, room = adaquant_settings(settings, settings.candidate_steps), memory_to_capture(network, calibration, settings)
    errors = parallel(variants, network.folded, units, starts, network.wiring, calibration, wanted, room, recall)
    for bits, model in variants.items():
        for name in network.names:
            if (name, bits) in candidates.weights:
                changed.weights[name, bits] = frozen_candidate(model.get_submodule(name))
    return changed, errors


def adaquant_settings(settings: CalibrateSettings, steps: int) -> AdaQuantSettings:
    return AdaQuantSettings(steps=steps, batch_size=settings.step_batch, drop=settings.drop, seed=settings.seed)


def has_choice(network: Network) -> bool:
    """Whether any layer has more than one precision to choose from."""
    return any(len(precisions) > 1 for precisions in network.choices.values())


def sensitivity_table(
    network: Network,
    candidates: Candidates,
    calibration: Calibration,
    reference: Tensor,
    task: str,
    settings: CalibrateSettings,
    recall: Recall = Recall(),
) -> SensitivityTable:
    """The table on the held-out inputs."""
    base, pairs = settings.sensitivity_base, settings.pairs
    return measure_sensitivity(network.prepared, candidates, network.choices, calibration.held_out, reference, task, base, pairs, recall)


@dataclass(frozen=True)
class Judge:
    """Measures schemes on the held-out inputs: their distance to the float outputs and, with labels, their accuracy.

    `metric` is the user's own, higher is better; where it is given, a limit on the drop counts in it and not in top-1.
    """

    network: Network
    candidates: Candidates
    held_out: list[Batch]
    reference: Tensor
    task: str
    metric: Metric | None = None
    recall: Recall = field(default_factory=Recall)

    def of_scheme(self, scheme: Scheme) -> dict[str, float]:
        """Measure a scheme made of the candidates as they are."""
        made = partial(apply_scheme, self.network.prepared, scheme, self.candidates)
        return self.recall.value(f"measured {scheme}", lambda: self.of_model(made()), as_scores)

    def of_model(self, model: nn.Module) -> dict[str, float]:
        """{"loss": distance, and where there are labels what the task counts ("top1", ...), "metric": the user's}."""
        return self.of_outputs(outputs_of(model, self.held_out))

    def of_outputs(self, outputs: Tensor) -> dict[str, float]:
        """The same of outputs on the held-out inputs."""
        result = {"loss": distance(outputs, self.reference, self.task)}
        counted = COUNTED[self.task]
        if self.labels is not None and counted is not None:
            told = score(outputs, self.labels, self.task, reader=self.held_out[0].reader)
            result |= {counted: told[counted]} if counted in told else {}
        if self.labels is not None and self.metric is not None:
            result["metric"] = float(self.metric(outputs, self.labels))
        return result

    @property
    def counted(self) -> str | None:
        """What a limit on the drop counts in."""
        return COUNTED[self.task] if self.metric is None else "metric"

    @property
    def labels(self) -> Tensor | None:
        labels = [batch.labels for batch in self.held_out]
        return None if any(part is None for part in labels) else torch.cat(labels)


def as_scores(record: Mapping[str, Any]) -> dict[str, float]:
    """A kept record of what `Judge.of_model` measured."""
    return {"loss": float(record["loss"])} | {str(key): float(value) for key, value in record.items()}


@dataclass(frozen=True)
class Choice:
    """The scheme that won, the solver's allocation behind the comparison, and every scheme that was measured."""

    scheme: Scheme
    allocation: Allocation | None
    measured: list[dict[str, Any]]

    def certificate(self, seed: int) -> dict[str, Any]:
        """The solver's certificate of its best scheme, and which of the measured ones was taken."""
        chosen = next((row["name"] for row in self.measured if row["scheme"] == self.scheme), None)
        solved = (
            {**self.allocation.certificate(), "predicted_loss": self.allocation.predicted_loss, "seed": seed} if self.allocation else {}
        )
        return {**solved, "chosen": chosen}

    def to_json(self) -> dict[str, Any]:
        """All of it, for `from_json`."""
        allocation = None if self.allocation is None else {**vars(self.allocation), "scheme": self.allocation.scheme.to_json()}
        measured = [{**row, "scheme": row["scheme"].to_json()} for row in self.measured]
        return {"scheme": self.scheme.to_json(), "allocation": allocation, "measured": measured}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Choice":
        """The choice that `to_json` told of."""
        told = data["allocation"]
        allocation = None if told is None else Allocation(**{**told, "scheme": Scheme.parse(told["scheme"])})
        return cls(Scheme.parse(data["scheme"]), allocation, [{**row, "scheme": Scheme.parse(row["scheme"])} for row in data["measured"]])


def chosen_scheme(bench: "Bench", budget: Budget | None) -> Choice:
    """`choose_scheme`, or what it gave an earlier run."""
    network, judge = bench.network, bench.judge
    latency = None if network.costs.latency is None else asdict(network.costs.latency)
    recall = judge.recall.under("allocation", budget and str(budget), bench.settings.alternatives, latency)

    def read(told: Mapping[str, Any]) -> Choice:
        choice = Choice.from_json(told)
        for scheme in (choice.scheme, *(row["scheme"] for row in choice.measured)):
            if set(scheme) != set(network.choices):
                raise InvalidFile("its layers are not the network's")
        return choice

    return recall.value("allocation", lambda: choose_scheme(network, bench.table, budget, bench.settings, judge).to_json(), read)


def choose_scheme(network: Network, table: SensitivityTable, budget: Budget | None, settings: CalibrateSettings, judge: Judge) -> Choice:
    """Solve for `budget`, measure the best schemes and every uniform one that fits, and take the best measured.

    Under a limit on the loss, the best is the smallest that keeps it.
    """
    if budget is None:
        largest = Scheme({name: precisions[-1] for name, precisions in network.choices.items()})
        return Choice(largest, None, [measured_row(network, table, "largest", largest, judge)])
    if budget.limit("drop") is not None:
        return _choose_by_drop(network, table, budget, settings, judge)
    problem = make_problem(network.choices, table, network.costs, budget)
    loss_limit = budget.limit("loss")
    if loss_limit is not None:
        size = make_problem(network.choices, table, network.costs, Budget.parse("100%")).costs["bytes"]
        solutions = least_costs(problem, size, loss_limit - table.floor)
    else:
        solutions = best_allocations(problem)
    found = list(islice(solutions, settings.alternatives))
    rows = [measured_row(network, table, f"allocated {index}", solution.scheme, judge) for index, solution in enumerate(found, 1)]
    rows += uniform_rows(network, table, budget, settings, judge)
    if loss_limit is None:
        best = min(rows, key=lambda row: row["measured"])
    else:  # the smallest that keeps the limit when measured; where none does, the smallest that was predicted to
        best = min((row for row in rows if row["measured"] <= loss_limit), key=lambda row: row["bytes"], default=rows[0])
    return Choice(best["scheme"], found[0], rows)


def check_feasible(network: Network, budget: Budget) -> None:
    """Raise InfeasibleBudget, naming the least that is possible, before any long work: costs need no measurement."""
    nothing_lost = SensitivityTable({(name, p): 0.0 for name, options in network.choices.items() for p in options}, FLOAT, 0)
    allocate(make_problem(network.choices, nothing_lost, network.costs, budget))


def uniform_rows(
    network: Network, table: SensitivityTable, budget: Budget, settings: CalibrateSettings, judge: Judge
) -> list[dict[str, Any]]:
    """Every uniform scheme (kept layers aside) that fits the budget, measured."""
    schemes = {Precision(w, a): network.uniform(w, a) for w in settings.weight_bits for a in settings.activation_bits}
    return [
        measured_row(network, table, f"uniform {precision}", scheme, judge)
        for precision, scheme in schemes.items()
        if fits(network.costs, scheme, budget)
    ]


def fits(costs: CostModel, scheme: Scheme, budget: Budget) -> bool:
    """Whether the scheme's costs meet every condition on bits, bytes, percent, BOPs and latency."""
    amounts = costs.summary(scheme)
    amounts["bits"] = amounts.pop("weight_bits")
    return all(amounts[c.quantity] <= c.limit * (1 + 1e-12) for c in budget.conditions if c.quantity in amounts)


def measured_row(network: Network, table: SensitivityTable, name: str, scheme: Scheme, judge: Judge) -> dict[str, Any]:
    """What the table predicts of a scheme, what the held-out inputs say, and its costs."""
    measured = judge.of_scheme(scheme)
    loss = measured.pop("loss")
    row = {"name": name, "scheme": scheme, "predicted": table.total(scheme), "measured": loss, **measured, **network.costs.summary(scheme)}
    tell("scheme", **row)
    return row


def _choose_by_drop(network: Network, table: SensitivityTable, budget: Budget, settings: CalibrateSettings, judge: Judge) -> Choice:
    """The smallest scheme whose metric (or top-1) on the held-out inputs is within the allowed drop: bisection on mean weight bits."""
    if judge.labels is None or judge.counted is None:
        raise InvalidSetting(
            "A budget of drop= needs labelled data, and a --metric where the network is no classifier. Give them, or use loss=."
        )
    float_score = judge.of_outputs(judge.reference)[judge.counted]
    others = tuple(c for c in budget.conditions if c.quantity != "drop")
    rows: list[dict[str, Any]] = []
    passed: tuple[Scheme, Allocation] | None = None
    largest = Scheme({name: options[-1] for name, options in network.choices.items()})
    low, high = float(min(settings.weight_bits)), network.costs.weight_bits(largest)
    for attempt in range(8):
        # The easiest scheme first: where that one fails, no smaller one is worth a look.
        bits = high if attempt == 0 else (low + high) / 2
        trial = Budget(f"{bits}bit", (*others, Condition("bits", bits)))
        try:
            allocation = next(best_allocations(make_problem(network.choices, table, network.costs, trial)))
        except InfeasibleBudget:
            if attempt == 0:
                raise
            low = bits
            continue
        row = measured_row(network, table, f"allocated at {bits:.2f} bits", allocation.scheme, judge)
        rows.append(row)
        lost = float_score - row[judge.counted]
        if lost <= budget.limit("drop"):
            passed, high = (allocation.scheme, allocation), bits
        elif attempt == 0:
            raise InfeasibleBudget(
                f"Even the largest scheme loses {lost:.4g} points of {judge.counted} on the held-out inputs, "
                f"more than {budget.limit('drop'):g}. "
                f"Allow more bits or raise the budget to drop={lost:.4g}%."
            )
        else:
            low = bits
    return Choice(*passed, rows)


@dataclass(frozen=True)
class Bench:
    """What all budgets of one run share.

    ranged         candidates rounded to nearest in estimated ranges; `candidates` those after matching and parallel AdaQuant
    matched        candidates after matching alone, where parallel AdaQuant came after it; None where it did not run
    targets        what each folded layer's output statistics should be
    references     the float network's outputs, one tensor a fitting batch
    errors         parallel AdaQuant's errors, by layer and bits
    """

    network: Network
    calibration: Calibration
    settings: CalibrateSettings
    ranged: Candidates
    candidates: Candidates
    table: SensitivityTable
    judge: Judge
    targets: Mapping[str, batchnorm.ChannelStatistics]
    references: Sequence[Tensor] = ()
    matched: Candidates | None = None
    errors: Mapping[str, Any] = field(default_factory=dict)


def polish(bench: Bench, scheme: Scheme) -> tuple[nn.Module, list[dict[str, Any]], dict[str, Any]]:
    """Sequential AdaQuant, batch-norm tuning and bias tuning of `scheme`, each kept only where the held-out error says so.

    Returns (the canonical model, the ladder: what was measured after each step and whether it was kept, each unit's errors).
    """
    network, calibration, settings, judge = bench.network, bench.calibration, bench.settings, bench.judge
    recall = judge.recall.under("polish", scheme.to_json())
    ranged = apply_scheme(network.prepared, scheme, bench.ranged)
    candidate = apply_scheme(network.prepared, scheme, bench.candidates)
    rounded = recall.value("ranges", lambda: judge.of_model(ranged), as_scores)
    matched = recall.value("candidates", lambda: judge.of_model(candidate), as_scores)
    better = not rounded["loss"] < matched["loss"]
    model, errors = (candidate if better else ranged), {}
    ladder = [{"step": "ranges", "kept": not better, **rounded}, {"step": "candidates", "kept": better, **matched}]
    for row in ladder:
        tell("step", **row)

    def offer(step: str, changed: nn.Module, names: Sequence[str], change: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """`change` works on the layers `names` of `changed`, in place; what it tells. The network is `changed` where that is better."""
        nonlocal model

        def make() -> Kept:
            told = change()
            return Kept({"told": told, "measured": judge.of_model(changed)}, snapshot(changed, names))

        def read(kept: Kept) -> tuple[dict[str, Any], dict[str, float]]:
            found = dict(kept.record["told"]), as_scores(kept.record["measured"])
            put_back(changed, names, kept.tensors)
            return found

        told, measured = recall(step, make, read)
        give_back()
        kept = measured["loss"] < next(row["loss"] for row in reversed(ladder) if row["kept"])
        ladder.append({"step": step, "kept": kept, **measured, **{key: told[key] for key in told if key in ("images", "epochs")}})
        tell("step", **ladder[-1])
        if kept:
            model = changed
        return told

    if settings.does("sequential"):
        recall = under_settings(recall, settings, ("steps", "start", *PARALLEL))
        changed, starts = sequential_start(bench, scheme)
        wanted = adaquant_settings(settings, settings.steps)
        room, units = memory_to_capture(network, calibration, settings), recall.under("units")
        fit = partial(sequential, changed, network.folded, network.units, starts, network.wiring, calibration, wanted, room, units)
        errors = offer("sequential AdaQuant", changed, list(starts), fit)
    if settings.bn_tuning and bench.targets:
        changed = copy.deepcopy(model)
        batches = within_memory(network.wiring, calibration.fitting, settings.memory)
        images = sum(map(len, batches))
        recall = recall.under("batch-norm tuning", settings.does("sequential"), images)

        def tune(changed: nn.Module = changed) -> dict[str, Any]:
            batchnorm.tune(changed, bench.targets, batches, settings.bn_prior)
            return {"images": images}

        offer("batch-norm tuning", changed, list(bench.targets), tune)
    if settings.does("bias_tuning"):
        changed = copy.deepcopy(model)
        coded = [name for name, layer in quantized_layers(changed).items() if isinstance(layer.weight_quantizer, UniformQuantizer)]
        part = samples_at_once(network.wiring, TRAINED, settings.memory, settings.batch_size)
        recall = under_settings(recall, settings, ("tune_scales",)).under(part)
        wanted = BiasTuningSettings(scales=settings.tune_scales, seed=settings.seed, part=part)
        references = list(bench.references)
        fit = partial(tune_biases, changed, calibration.fitting, references, calibration.held_out, judge.reference, judge.task, wanted)
        offer("bias tuning", changed, coded, fit)
    return model, ladder, errors


def sequential_start(bench: Bench, scheme: Scheme) -> tuple[nn.Module, dict[str, Tensor]]:
    """Where sequential AdaQuant starts: (model, free weights).

    After the parallel form, at its codes: many trained weights rest beside a rounding threshold, where the next optimizer's first step
    would flip thousands of codes at once; a weight set to its code stays until its gradient says otherwise. Without it, or where
    `settings.start` asks for it, at the float weights, in their estimated ranges or with matched statistics: matching widens the scales
    to restore the deviation of each channel, which mends a shift of means at once and leaves more rounding error to undo.
    """
    free = free_weights(bench.network, bench.ranged, scheme)
    candidates = {None: bench.ranged, "ranges": bench.ranged, "matched": bench.matched or bench.candidates}[bench.settings.start]
    if bench.settings.start is None and bench.matched is not None:
        candidates = bench.candidates
        free = {name: candidates.weights[name, scheme[name].weight_bits].codes.float() for name in free}
    return apply_scheme(bench.network.prepared, scheme, candidates), free


RUNNING = 5
"""Of its largest tensor, how many a forward pass holds at once."""
TRAINED = 3
"""Of each tensor, how many a forward and backward pass holds at once: the value, its quantized form, a gradient."""


OBSERVED = 2
"""Of each tensor, how many a pass holds that observes all of them."""


def sample_bytes(wiring: Wiring) -> dict[str, int]:
    """Operation -> bytes of what one sample is in its output."""
    return {op.name: 4 * torch.Size(op.shape).numel() // wiring.batch_size for op in wiring.operations}


def working_memory(network: Network, padded: bool, settings: CalibrateSettings) -> dict[str, tuple[int, str]]:
    """What the steps of a run hold of activations, however little is captured: kind of step -> (bytes, what would take less)."""
    sizes = sample_bytes(network.wiring)
    needs = {"a forward pass": (RUNNING * settings.batch_size * max(sizes.values()), "--batch-size")}
    if settings.does("sequential") or settings.does("parallel"):
        step = settings.batch_size if padded else settings.step_batch
        inside = [
            sum(sizes[op.name] for op in network.wiring.operations if op.name in unit.layers or f"{op.owner}.".startswith(f"{unit.name}."))
            for unit in network.units
        ]
        needs["a step of AdaQuant"] = (TRAINED * step * max(inside, default=0), "--batch-size" if padded else "--step-batch")
    if settings.does("bias_tuning"):
        needs["tuning biases on one input"] = (TRAINED * sum(sizes.values()), "--no-bias-tuning")
    needs["observing one input"] = (OBSERVED * sum(sizes.values()), "smaller inputs")
    return needs


def check_memory(network: Network, calibration: Calibration, settings: CalibrateSettings) -> None:
    """Raise InvalidSetting, naming the least that works, where a step alone takes more than the memory that is allowed."""
    needs = working_memory(network, calibration.fitting[0].mask is not None, settings)
    step, (least, instead) = max(needs.items(), key=lambda item: item[1][0])
    if settings.memory < least:
        raise InvalidSetting(
            f"memory {settings.memory / 1e6:.4g}MB is less than the {_megabytes(least)} of activations that {step} holds. "
            f"Give at least --memory {_megabytes(least)}, or less to do at once: {instead}."
        )


def _megabytes(count: int) -> str:
    return f"{-(-count // 10**6)}MB"


def memory_to_capture(network: Network, calibration: Calibration, settings: CalibrateSettings) -> int:
    """Bytes that captured activations may take beside a step of AdaQuant."""
    needs = working_memory(network, calibration.fitting[0].mask is not None, settings)
    return max(0, settings.memory - max(least for least, _ in needs.values()))


def samples_at_once(wiring: Wiring, copies: int, memory: int, most: int) -> int:
    """How many samples a pass that holds so many copies of every tensor has room for, from 1 to `most`."""
    return min(most, max(1, memory // (copies * sum(sample_bytes(wiring).values()))))


def within_memory(wiring: Wiring, batches: list[Batch], memory: int) -> list[Batch]:
    """As many of the first batches as one joined forward pass can hold."""
    room = max(1, memory // (RUNNING * max(sample_bytes(wiring).values())))
    kept, count = [], 0
    for batch in batches:
        if kept and count + len(batch) > room:
            break
        kept.append(batch)
        count += len(batch)
    return kept


def edge_ranges(model: nn.Module, wiring: Wiring, batches: Sequence[Batch], part: int = 8) -> dict[str, tuple[float, float]]:
    """(low, high) of every edge of the finished model over `batches`, for integer runtimes; every tensor of `part` samples at once."""
    names, pairs = set(wiring.edges()), _token_pairs(model, wiring)
    ends: dict[str, tuple[float, float]] = {}

    mask: Tensor | None = None

    def widen(name: str, tensor: Tensor) -> None:
        if name in names and tensor.is_floating_point():
            tensor = _of_real_pairs(tensor, mask) if name in pairs and mask is not None else real(tensor, mask)
            low, high = ends.get(name, (float("inf"), float("-inf")))
            ends[name] = (min(low, float(tensor.min())), max(high, float(tensor.max())))

    for batch in batches:
        for some in batch.parts(part):
            mask = some.mask
            observe(model, some, widen)
    return {name: ends.get(name, (0.0, 0.0)) for name in wiring.edges()}


def as_ranges(record: Mapping[str, Any], wiring: Wiring) -> dict[str, tuple[float, float]]:
    """A kept record of edge ranges."""
    return {name: (float(record[name][0]), float(record[name][1])) for name in wiring.edges()}


def _token_pairs(model: nn.Module, wiring: Wiring) -> set[str]:
    """Names of the tensors with a number for each pair of tokens, [N, heads, T, T]: products of queries and keys, and what functions make
    of them. Where one of the pair is padding, a mask has put a huge number."""
    names: set[str] = set()
    values: set[int] = set()
    for op in wiring.operations:
        layer = model.get_submodule(op.name) if op.kind == LAYER else None
        if (layer is None and values & set(op.inputs)) or (isinstance(layer, Matmul) and layer.transposed):
            names.add(op.name)
            values |= set(op.outputs)
    return names


def _of_real_pairs(tensor: Tensor, mask: Tensor) -> Tensor:
    """The numbers of `tensor` [N, ..., T, T] that are of two real tokens; all of a tensor of another shape."""
    count, length = mask.shape
    if tensor.dim() < 3 or tensor.shape[0] != count or tensor.shape[-2:] != (length, length):
        return tensor
    between = [1] * (tensor.dim() - 3)
    pairs = mask.view(count, *between, length, 1) & mask.view(count, *between, 1, length)
    return tensor[pairs.expand(tensor.shape)]


def rounded(network: Network, batches: Sequence[Batch], scheme: Scheme) -> nn.Module:
    """The canonical model of `scheme` by rounding to nearest over whole ranges: for speed and size, where accuracy does not matter."""
    samples, layers = input_samples(network.folded, network.names, batches, 2**12, 0), quantized_layers(network.prepared)
    candidates = Candidates()
    for name, precision in scheme.items():
        if bits := precision.weight_bits:
            candidates.weights[name, bits] = weight_candidate(layers[name], bits, "minmax")
        if bits := precision.activation_bits:
            candidates.activations[name, bits] = activation_candidate(samples[name], bits, "minmax")
    return apply_scheme(network.prepared, scheme, candidates).eval()


def task_of(settings: CalibrateSettings, reference: Tensor, batch: Batch) -> str:
    return settings.task or guess_task(reference, batch.reader)


def mirrored(calibration: Calibration) -> Calibration:
    """The same split, the fitting inputs joined by their mirror images; images are 4-d tensors, anything else is refused."""
    for batch in calibration.fitting:
        if not isinstance(batch.inputs, Tensor) or batch.inputs.dim() != 4:
            raise InvalidSetting("mirror needs images: one 4-d input tensor. Leave it off for this data.")
    flipped = [replace(batch, inputs=batch.inputs.flip(-1)) for batch in calibration.fitting]
    return Calibration([*calibration.fitting, *flipped], calibration.held_out)
