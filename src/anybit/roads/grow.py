"""Grow: train a network to a budget while its mixed-precision scheme grows."""

import copy
import glob
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anybit.allocation.choice import check_feasible
from anybit.budget import Budget, budget_check, check_counts_weights
from anybit.calls import checking, public
from anybit.data.batches import Batch, check_finite, in_evaluation_mode, tensors_in
from anybit.data.samples import Samples, draw
from anybit.data.tasks import Metric, Task, labelled_outputs, outputs_of, task_of
from anybit.data.tasks import evaluate as evaluate_model
from anybit.environment import StageClock, environment
from anybit.errors import InvalidInput, InvalidSetting
from anybit.loops.processes import share_state
from anybit.loops.settings import TrainSettings
from anybit.loops.trainee import Trainee
from anybit.loops.training import drawn_batches, train_epochs
from anybit.methods.table import GROW_METHODS, grow_method_named
from anybit.networks import batchnorm
from anybit.networks.candidates import activation_candidate, check_finite_samples
from anybit.networks.canonical import Canonical
from anybit.networks.capture import input_samples
from anybit.networks.edges import finished
from anybit.networks.fingerprint import fingerprint_of
from anybit.networks.layers import prepare, quantized_layers
from anybit.networks.observed import ObservedNetwork, check_kinds, observe_network
from anybit.networks.options import LayerOptions
from anybit.networks.refusals import as_observed
from anybit.numerics.quantizers import LearnedInput, UniformQuantizer
from anybit.progress import plan, tell
from anybit.reports.bars import shown_in_notebooks
from anybit.roads.expected import training_stages
from anybit.roads.inputs import check_trains, checkpoint_place, claiming_checkpoint, described_inputs, training_inputs
from anybit.roads.keys import training_identity
from anybit.roads.result import Result, layer_costs, test_scores
from anybit.roads.settings import GrowSettings
from anybit.runs.scheme_file import read_scheme
from anybit.scheme import Precision, Scheme, match_patterns
from anybit.settings import takes
from anybit.sources.inputs import check_outputs
from anybit.sources.preprocessing import Preprocessing

FEW = 2048
"""Number of training inputs, augmented as in training, for initial ranges and for batch-norm statistics before a freeze; fewer if they
are large."""
FEW_BYTES = 2**28


def few_batches(samples: Samples, settings: TrainSettings) -> list[Batch]:
    """Return a few training inputs, drawn once and augmented as in training, in batches of one size."""
    return drawn_batches(samples, settings, _few(samples))


def watched_batches(tests: Samples, seed: int) -> list[Batch]:
    """Return the test samples for every epoch's report, drawn at random once, because many data sets are sorted by class."""
    return list(draw(tests, _few(tests), seed).batches(256))


def _few(samples: Samples) -> int:
    """Return FEW, or as many as fit into FEW_BYTES."""
    first = next(samples.subset([0]).batches(1))
    return max(2, min(FEW, FEW_BYTES // sum(tensor.nbytes for tensor in tensors_in(first.inputs))))


def grow_method_name(method: str | None, has_scheme: bool) -> str:
    """Return the method, by default LSQ with a scheme and CSQ without. Raises InvalidSetting if it does not fit."""
    fitting = [name for name in GROW_METHODS if grow_method_named(name).needs_scheme == has_scheme]
    if method is None:
        return fitting[0]
    if method not in fitting:
        trouble = "grows a scheme of its own: leave out --scheme" if has_scheme else "trains a scheme: give one with --scheme=RUN"
        raise InvalidSetting(f"Method {method} {trouble}, or choose {' or '.join(f'--method={one}' for one in fitting)}.")
    return method


def reinitialized(model: nn.Module, batches: Sequence[Batch], seed: int) -> nn.Module:
    """Return a copy with newly initialised parameters and batch-norm statistics from `batches`."""
    fresh = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in fresh.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    batchnorm.reestimate(fresh, batches)
    return fresh


def observe_trainable(model: nn.Module, example: Batch, settings: GrowSettings, scheme: Scheme | None, method: str) -> ObservedNetwork:
    """Observe and fold the float network; layers have the method's choices, or only those of `scheme`."""
    options = grow_method_named(method).layer_choices(getattr(settings, method), settings.activation_bits)
    widths = tuple(precision.weight_bits for precision in options if precision.weight_bits)
    fixed = {} if scheme is None else {glob.escape(name): p for name, p in scheme.items() if p.weight_bits is None}
    keep = settings.keep if scheme is None else fixed
    network = observe_network(model, example, LayerOptions(widths, (settings.activation_bits,), keep, gradients=True))
    if scheme is not None:
        scheme.check_names(network.names)
        Scheme(dict.fromkeys(network.names, Precision())).check_names(scheme)
        check_kinds(scheme, network)
        return replace(network, choices={name: [scheme[name]] for name in network.names})
    pinned = match_patterns(settings.keep, network.names)
    choices = {
        name: list(own)
        if name in pinned or not network.costs.layers[name].weights
        else [Precision(precision.weight_bits, own[0].activation_bits) for precision in options]
        for name, own in network.choices.items()
    }
    return replace(network, choices=choices)


def make_trainee(network: ObservedNetwork, batches: Sequence[Batch], budget: Budget | None, settings: GrowSettings, method: str) -> Trainee:
    """Prepare the unfolded network with learned ranges in its input slots, and attach the method to its weight slots."""
    unfolded = copy.deepcopy(network.float_model)
    batchnorm.flip_negative(unfolded, network.norms)
    float_weights = [name for name, options in network.choices.items() if options[0].weight_bits is None]
    model = prepare(unfolded, network.names, float_weights)
    layers = quantized_layers(model)
    with as_observed(network.folded, network.calls):
        samples = input_samples(network.folded, network.calls, batches, 2**17, settings.train.seed)
    check_finite_samples(samples)
    for name, options in network.choices.items():
        bits = options[0].activation_bits
        if bits is not None:
            start = activation_candidate(samples[name], bits, "mse")
            layers[name].input_quantizer = LearnedInput(UniformQuantizer(bits, False, start.scale, start.zero_point))
    return grow_method_named(method).attach(model, network, budget, getattr(settings, method))


def frozen(trainee: Trainee, network: ObservedNetwork, batches: Sequence[Batch]) -> Canonical:
    """Freeze and fold a copy of the network as trained so far, with batch norm re-estimated on `batches`."""
    model = copy.deepcopy(trainee.model)
    trainee.freeze(model)
    batchnorm.reestimate(model, batches)
    model, _ = batchnorm.fold(model, network.norms)
    return Canonical(in_evaluation_mode(model).requires_grad_(True), network.norms)


def soft_and_frozen(
    trainee: Trainee, network: ObservedNetwork, batches: Sequence[Batch], test: Sequence[Batch], task: Task, metric: Metric | None
) -> dict[str, Any]:
    """Score the network on `test`, as trained and as it would be frozen now, both with batch-norm statistics from `batches`."""
    soft = copy.deepcopy(trainee.model)
    batchnorm.reestimate(soft, batches)
    return {
        "soft": evaluate_model(soft, test, task, metric),
        "frozen": evaluate_model(frozen(trainee, network, batches).model, test, task, metric),
    }


@public
@claiming_checkpoint
@checking(budget=budget_check(check_counts_weights))
@shown_in_notebooks
@takes(GrowSettings)
@torch.inference_mode(False)
def grow(
    model: nn.Module | str,
    train: Any,
    budget: str | Budget | None = None,
    *,
    scheme: Scheme | str | Path | None = None,
    weights: str | Path | None = None,
    preprocessing: Preprocessing = Preprocessing(),
    test: Any = None,
    metric: Metric | None = None,
    checkpoint: str | Path | None = None,
    workers: int = 0,
    device: str = "cpu",
    **settings: Any,
) -> Result:
    """Train a network to a budget while its mixed-precision scheme grows, or at a scheme.

    model       a trained network, or a reference to one; with `from_scratch` only its architecture is used
    train       labelled data (unlabelled with distill=1): a data set, arrays, Samples, or a reference
    budget      of weights: "3bit", "80kB", "12.5%"; None leaves every layer as large as it starts
    scheme      instead of a budget: a fixed scheme, or a run to take it from. `method` is LSQ with a scheme and CSQ without
    weights, preprocessing, metric, workers, device  as for `calibrate`
    test        labelled data for the report of every epoch, soft and frozen; nothing is chosen on it
    checkpoint  a file that is written after every epoch, and resumed from if it exists

    Raises InvalidSetting, InvalidInput, UnsupportedModel or InfeasibleBudget; AnybitError if the loss becomes NaN.
    """
    # Long, because it is the list of the road's stages, each of which needs results of those before it.
    grow_settings = GrowSettings.of(**settings)
    budget, scheme = _parsed_target(budget, scheme)
    method = grow_method_name(grow_settings.method, scheme is not None)
    needs = grow_settings.needs_of(method, budget is not None, scheme)
    grow_settings.check_effect(needs)
    for note in grow_settings.notes_on_effect(needs):
        tell("note", note=note)
    place = checkpoint_place(checkpoint)
    clock = StageClock()
    float_model, samples, tests, provenance = training_inputs(
        model, weights, train, test, metric, preprocessing, workers, device, grow_settings.task, grow_settings.outputs
    )
    check_trains(samples, grow_settings.train.distill)
    ends = ["freeze", "edge ranges", *(["test"] if tests is not None else [])]
    plan(training_stages(len(samples), grow_settings.train.epochs, 0 if tests is None else len(tests), ends), measured=None)
    with clock.stage("observe and fold"):
        if len(samples) == 0:
            raise InvalidInput("The training data is empty.")
        few = few_batches(samples, grow_settings.train)
        check_finite(few)
        share_state(float_model)
        start = reinitialized(float_model, few, grow_settings.train.seed) if grow_settings.from_scratch else float_model
        share_state(start)
        network = observe_trainable(start, few[0].head(2), grow_settings, scheme, method)
        if budget is not None:
            grow_method_named(method).check_budget(budget, network)
            check_feasible(network, budget)
        check_outputs(float_model, few[0])
        outputs, on_labels = outputs_of(float_model, few[:1]), labelled_outputs(float_model, few[0])
        task = task_of(outputs, few[0].reader, grow_settings.task, on_labels, float_model)
        trainee = make_trainee(network, few, budget, grow_settings, method)
    if tests is not None:  # before the long work, so that bad labels or metrics do not waste it
        reference = outputs_of(float_model, tests.batches(256))
        float_test = evaluate_model(float_model, tests.batches(256), task, metric)
        watched = watched_batches(tests, grow_settings.train.seed)
    identity = None
    if place is not None:
        with clock.stage("contents of the data"):
            chosen = {"budget": str(budget), "scheme": scheme and str(scheme), **grow_settings.to_json()}
            identity = training_identity(float_model, samples, few[0], chosen)
    with clock.stage("training"), torch.random.fork_rng(devices=[]):
        epochs = train_epochs(
            trainee,
            samples,
            grow_settings.train,
            task,
            float_model if grow_settings.train.distill else None,
            batchnorm.folded_gammas(trainee.model, network.norms),
            place,
            identity,
            None if tests is None else lambda: soft_and_frozen(trainee, network, few, watched, task, metric),
            passes=0 if tests is None else 2 * sum(map(len, [*few, *watched])),
        )
    with clock.stage("freeze"):
        canonical = frozen(trainee, network, few)
    with clock.stage("edge ranges"):
        canonical = finished(canonical, network.wiring, few)
    report = _report(network, canonical.scheme, budget, epochs, described_inputs(provenance, network), grow_settings, method)
    if tests is not None:
        with clock.stage("test"):
            report["float_test"] = float_test
            report["test"] = evaluate_model(canonical.model, tests.batches(256), task, metric, reference)
    canonical.model.cpu()
    canonical.fingerprint = fingerprint_of(canonical.model, few[0])
    report["stages"] = clock.stages
    certificate = {**trainee.decisions().get("certificate", {}), "seed": grow_settings.train.seed}
    provenance |= {
        "budget": str(budget) if budget else None,
        "task": task.name,
        "certificate": certificate,
        "outputs": dict(grow_settings.outputs) or None,
    }
    tell("allocation", budget=report["budget"], certificate=certificate, scheme=canonical.scheme)
    tell("result", budget=report["budget"], **report["result"], **test_scores(report))
    return Result(canonical, report | {"certificate": certificate}, provenance)


def _parsed_target(budget: str | Budget | None, scheme: Scheme | str | Path | None) -> tuple[Budget | None, Scheme | None]:
    """Return the parsed budget and the scheme, of a run if it is a path. Raises InvalidSetting unless at most one of them is given."""
    if isinstance(budget, (list, tuple)):
        raise InvalidSetting("grow takes one budget, because each needs its own training. Run grow once per budget.")
    if budget is not None and scheme is not None:
        raise InvalidSetting("Give a budget or a scheme, not both: a scheme already fixes the bits.")
    parsed = Budget.parse(budget, check_counts_weights) if budget is not None else None
    return parsed, read_scheme(Path(scheme)).scheme if isinstance(scheme, (str, Path)) else scheme


def _report(
    network: ObservedNetwork,
    scheme: Scheme,
    budget: Budget | None,
    epochs: list[dict[str, Any]],
    notes: Mapping[str, Any],
    settings: GrowSettings,
    method: str,
) -> dict[str, Any]:
    """Return the JSON report, without tests and times."""
    return {
        "version": 1,
        "road": "grow",
        "budget": str(budget) if budget else None,
        "result": network.costs.summary(scheme),
        "float_bytes": network.costs.float_bytes,
        "layers": layer_costs(network.costs, scheme),
        "epochs": epochs,
        "uncovered": dict(network.uncovered),
        **notes,
        "settings": settings.to_json() | {"method": method},
        "environment": environment(),
    }
