"""Calibrate: turn a trained network into a low-bit one, with a few hundred inputs and a budget."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anybit.allocation.choice import Choice, Judge, check_feasible, drop_in_words
from anybit.budget import DROP, LATENCY, Budget, budget_check, cost_quantities, listed, parse_budgets
from anybit.calls import checking, public
from anybit.data.batches import Batch, check_finite, check_finite_outputs, in_evaluation_mode, naming_sample
from anybit.data.samples import Calibration, Samples, draw, mirrored, split
from anybit.data.tasks import (
    LabelledOutputs,
    Metric,
    WeightedErrors,
    joined,
    labels_fit,
    labels_in,
    measure,
    outputs_of,
    outputs_of_each,
    task_of,
)
from anybit.data.tasks import evaluate as evaluate_model
from anybit.environment import StageClock, environment
from anybit.errors import InvalidSetting
from anybit.files.cache import Cache, open_cache, report_and_trim
from anybit.methods.table import rounding_named
from anybit.networks.canonical import Canonical
from anybit.networks.edges import as_ranges
from anybit.networks.fingerprint import fingerprint_of
from anybit.networks.observed import ObservedNetwork, has_choice, observe_network, with_coarse
from anybit.networks.refusals import as_observed, check_rows
from anybit.networks.states import restore
from anybit.progress import plan, tell
from anybit.reports.bars import shown_in_notebooks
from anybit.roads import expected
from anybit.roads.inputs import (
    check_metric_has_labels,
    checked_tests,
    compared,
    described_inputs,
    example_of,
    follow_model,
    notes_on,
    on_device,
    read_alike,
)
from anybit.roads.keys import (
    MATCHING,
    PARALLEL,
    SENSITIVITY,
    SOLVING,
    cached_candidates,
    data_digest,
    key_of_run,
    keyed_by_settings,
    metric_digest,
    weights_digest,
)
from anybit.roads.latencies import measured_latencies, with_latencies
from anybit.roads.memory import check_memory
from anybit.roads.polish import polish_scheme
from anybit.roads.result import Result, Results, layer_costs, test_scores
from anybit.roads.settings import CalibrateSettings
from anybit.roads.steps import (
    CalibrationState,
    batch_norm_targets,
    chosen_scheme,
    finite_samples,
    float_tested,
    matched_candidates,
    notes_on_chance,
    range_candidates,
    reconstructed_candidates,
    sensitivity_table,
    solved_candidates,
)
from anybit.scheme import Scheme
from anybit.settings import Need, takes
from anybit.sources.inputs import samples_from
from anybit.sources.preprocessing import Preprocessing


@public
@checking(budget=budget_check())
@shown_in_notebooks
@takes(CalibrateSettings)
@torch.inference_mode(False)
def calibrate(
    model: nn.Module | str,
    data: Any,
    budget: str | Budget | Sequence[str | Budget] | None = None,
    *,
    weights: str | Path | None = None,
    preprocessing: Preprocessing = Preprocessing(),
    test: Any = None,
    metric: Metric | None = None,
    workers: int = 0,
    device: str = "cpu",
    cache: str | Path | bool = True,
    **settings: Any,
) -> "Result | list[Result]":
    """Turn a trained network into a low-bit one, with a few hundred inputs and a budget.

    model     a network, or a reference to one ("file.py:function")
    data      inputs: a data set, an array [N, ...] or (x, y) of them, Samples, or a reference; labels are used only by reports and
              "drop=" budgets
    budget    "4bit", "120kB", "12.5%", "bops=2.1G", "4bit,bops=2G", ...; a list returns a list of results that share their candidates,
              which prints as a table
    weights   file of a state dict, loaded into a network given by reference
    preprocessing  of images given by reference; recorded for later verbs, with absolute references
    test      labelled data for the report; nothing is chosen on it
    metric    a function of (outputs, labels), higher is better: reported, and used by "drop=" budgets in place of top-1; labels
              such as {"boxes": ..., "labels": ...} are a list, one per sample
    workers   number of processes that load data
    device    where to compute; the result is on the CPU
    cache     store the result of every stage, in this folder or (True) in the user's cache directory: a run that was killed, or has another
              budget, reuses finished results, and ends with the same bytes

    Raises InvalidSetting, InvalidInput, UnsupportedModel or InfeasibleBudget; each message says what, where and what to do.
    """
    # Long by its arguments and their documentation; the stages are in prepare_state.
    options = CalibrateSettings.of(**settings)
    several = isinstance(budget, (list, tuple))
    if several and not budget:
        raise InvalidSetting("budget is an empty list. Give budgets, such as ['4bit', '3bit'], or none to keep 8 bits where possible.")
    budgets = [None] if budget is None else list(parse_budgets(listed(budget)))
    measures = any(one is not None and one.loss() is not DROP for one in budgets)
    idle = Need(("alternatives",), measures, "without a budget of which the best schemes are measured", "a budget", amounts=True)
    for note in options.notes_on_effect([idle]):
        tell("note", note=note)
    model, preprocessing, provenance = follow_model(model, weights, data, test, preprocessing, options.task)
    samples = samples_from(data, workers, preprocessing, model, options.samples, metric)
    samples = draw(samples, options.samples, options.seed).on(device)
    if test is None:
        check_metric_has_labels(metric, samples)
    network = in_evaluation_mode(on_device(model, device, samples))
    samples = compared(network, samples, options.outputs, options.task)
    tests = None if test is None else checked_tests(samples_from(test, workers, preprocessing, model, metric=metric).on(device), network)
    tests = read_alike(tests, samples, network, options.task)
    clock = StageClock()
    entries = open_cache(cache)
    plan(
        expected.Calibration.of_model(network, options, len(samples), 0 if tests is None else len(tests), len(budgets)).stages(),
        measured=False,
    )
    state = prepare_state(network, samples, options, [one for one in budgets if one], clock, metric, entries, tests)
    saved = {
        "table": state.table.to_json(),
        "choices": {name: [str(precision) for precision in precisions] for name, precisions in state.network.choices.items()},
        "settings": options.to_json(),
        "network": weights_digest(state.network),
        "data": data_digest(state.calibration),
    }
    results = [finish(state, one, provenance, saved, StageClock(list(clock.stages))) for one in budgets]
    report_and_trim(entries)
    return Results(results) if several else results[0]


def prepare_state(
    model: nn.Module,
    samples: Samples,
    settings: CalibrateSettings,
    budgets: Sequence[Budget],
    clock: StageClock,
    metric: Metric | None = None,
    cache: Cache = Cache(),
    tests: Samples | None = None,
) -> CalibrationState:
    """Run everything up to the sensitivity table. Raises for infeasible budgets, bad labels and bad metrics before the long work.

    Long, because it is the list of the road's stages, each computed or taken from the cache, whose key every stage extends.
    """
    with clock.stage("observe and fold"):
        network, calibration, example = _observed(model, samples, settings, budgets)
    with clock.stage("float outputs"), torch.no_grad(), as_observed(network.float_model, network.calls):
        references = outputs_of_each(network.float_model, calibration.fitting)
        held_out = outputs_of_each(network.float_model, calibration.held_out)
        check_rows(network.float_model, [*references, *held_out], calibration.fitting + calibration.held_out, example)
        reference = joined(held_out)
        labels = labels_in(calibration.held_out)
        on_labels = LabelledOutputs(reference, labels, calibration.held_out[0].reader) if labels is not None else None
        if on_labels is None and tests is not None:
            on_labels = LabelledOutputs.of(network.float_model, [next(tests.batches(settings.batch_size))])
        shown = joined([*references, reference]) if reference.dim() == 2 else reference
        task = task_of(shown, calibration.held_out[0].reader, settings.task, on_labels, model)
        scored = labels is not None and labels_fit(
            reference, labels, task, needed=metric is None and any(one.loss() is DROP for one in budgets)
        )
        if not all(torch.isfinite(outputs).all() for outputs in (reference, *references)):
            finite_samples(network, calibration, settings)  # names the layer if the cause is a layer's input
            check_finite_outputs([*references, *held_out], calibration.fitting + calibration.held_out)
        restore(network.float_model, network.moving)
        cache = key_of_run(cache, network, calibration, [*references, reference], settings)
        if labels is not None and metric is not None:
            tell_of_drop(budgets, metric, measure(metric, task.tensors(reference), labels))
    forward = clock.stages[-1]["seconds"] / sum(calibration.count())
    tested = 0 if tests is None else len(tests)
    plan(expected.Calibration.of_network(network, settings, calibration.count(), tested, max(len(budgets), 1), forward).stages())
    float_test = None if tests is None else float_tested(network, tests, task, metric, settings.batch_size, clock)
    notes = notes_on_chance(float_test, reference, labels if scored else None, task)
    with clock.stage("ranges"):
        ranged = candidates = cached_candidates(cache, "ranges", network, lambda: range_candidates(network, calibration, settings))
    cache = keyed_by_settings(cache, settings, SOLVING)
    if settings.solver != "none":
        with clock.stage("solution of candidates"):
            solve = partial(solved_candidates, network, ranged, calibration, settings)
            candidates = cached_candidates(cache, "solution of candidates", network, solve)
    cache = keyed_by_settings(cache, settings, MATCHING)
    targets: Mapping[str, Any] = {}
    matched = None
    if settings.bn_tuning and network.norms:
        with clock.stage("matching of candidates"):
            targets = batch_norm_targets(network, calibration, settings)
            match = partial(matched_candidates, network, candidates, targets, calibration, settings.bn_prior)
            candidates = cached_candidates(cache, "matching of candidates", network, match)
    errors: dict[str, Any] = {}
    if settings.does("parallel") and (settings.parallel is True or has_choice(network)):
        matched = candidates
        cache = keyed_by_settings(cache, settings, PARALLEL)
        with clock.stage(f"parallel {rounding_named(settings.rounding).__name__}"):
            candidates, errors = reconstructed_candidates(network, candidates, ranged, calibration, settings, cache)
    cache = keyed_by_settings(cache, settings, SENSITIVITY).keyed(task.name)
    with clock.stage("sensitivity"):
        table = sensitivity_table(network, candidates, calibration, reference, task, settings, cache)
    cache = cache.keyed(metric_digest(metric, calibration.held_out))
    judge = Judge(network, candidates, calibration.held_out, reference, task, metric, cache, scored)
    return CalibrationState(
        network, calibration, settings, ranged, candidates, table, judge, targets, references, matched, errors, float_test, notes
    )


def _observed(
    model: nn.Module, samples: Samples, settings: CalibrateSettings, budgets: Sequence[Budget]
) -> tuple[ObservedNetwork, Calibration, Batch]:
    """Return (the observed network, its fitting and held-out inputs, two of them). Raises for infeasible budgets and too little memory."""
    calibration = split(samples, settings.seed, settings.held_out, settings.batch_size)
    check_finite(calibration.fitting + calibration.held_out)
    if settings.mirror:
        calibration = mirrored(calibration)
    example = example_of(calibration)
    network = with_latencies(observe_network(model, example, settings.options), budgets)
    with naming_sample(network.float_model, calibration.fitting[0], "the first batch of the data"):
        network = with_coarse(network, calibration.fitting[0])
    for note in notes_on(network):
        tell("note", note=note)
    check_memory(network, calibration, settings)
    for budget in budgets:
        check_feasible(network, budget)
    return network, calibration, example


def finish(
    state: CalibrationState,
    budget: Budget | None,
    provenance: Mapping[str, Any],
    saved: Mapping[str, Any],
    clock: StageClock,
) -> Result:
    """Return the polished, measured result for one budget; `saved` is stored beside the candidates, for later budgets."""
    network = state.network
    with clock.stage("allocation"):
        choice = chosen_scheme(state, budget)
        tell("allocation", budget=budget and str(budget), certificate=choice.certificate(state.settings.seed), scheme=choice.scheme)
    with clock.stage("polish"):
        polished = polish_scheme(state, choice.scheme)
        model, edges = polished.model, polished.edges
        if budget is not None and (drop := budget.limit(DROP.name)) is not None and not _within_drop(state, drop, model):
            # Polishing is judged by the loss, but the candidates must meet the allowed drop.
            model = network.apply(choice.scheme, state.candidates)
            edges = as_ranges(state.candidates.edges, network.wiring)
    restore(model, network.moving)
    canonical = Canonical(in_evaluation_mode(model), network.norms, edges)
    report = _report(state, canonical.scheme, choice, budget) | {"ladder": polished.ladder, "units": polished.errors}
    report |= described_inputs(provenance, network, state.notes) | _float_held_out(state.judge)
    if isinstance(apart := state.judge.task.distance, WeightedErrors):
        with clock.stage("outputs"):
            of_each = apart.of_each(outputs_of(canonical.model, state.calibration.held_out), state.judge.reference)
        report["outputs"] = {name: float(errors.mean()) for name, errors in of_each.items()}
    if (test := state.float_test) is not None:
        with clock.stage("test"):
            batches = test.samples.batches(state.settings.batch_size)
            scores = evaluate_model(canonical.model, batches, state.judge.task, state.judge.metric, test.outputs)
        report |= {"float_test": test.scores, "test": scores}
    restore(canonical.model, network.moving)  # restore the original values, which scoring may change
    canonical.model.cpu()
    canonical.fingerprint = fingerprint_of(canonical.model, state.calibration.fitting[0], network.float_model)
    if budget is not None and budget.limit(LATENCY.name) is not None:
        with clock.stage("latency"):
            report["latency"] = measured_latencies(network.costs, canonical, state.calibration.fitting[0].to("cpu"))
    report["stages"] = clock.stages
    tell("result", budget=report["budget"], **report["result"], **test_scores(report))
    provenance = {**provenance, "budget": report["budget"], "certificate": report["certificate"], "task": state.judge.task.name}
    provenance["outputs"] = dict(state.settings.outputs) or None
    return Result(canonical, report, provenance, state.candidates, dict(saved))


def _float_held_out(judge: Judge) -> dict[str, Any]:
    """Return the float network's scores on the held-out inputs, beside which those of the schemes are read."""
    scores = judge.of_outputs(judge.reference)
    del scores["loss"]
    return {"float_held_out": scores} if scores else {}


def tell_of_drop(budgets: Sequence[Budget], metric: Metric, float_score: float) -> None:
    """Note what "drop=" budgets mean for a user's metric, whose scale they do not say."""
    for budget in budgets:
        if budget.loss() is DROP:
            tell("note", note=drop_in_words(budget, metric, float_score))


def _within_drop(state: CalibrationState, drop: float, polished: nn.Module) -> bool:
    """Return whether the polished model loses no more than the allowed drop."""
    return state.judge.lost(state.judge.float_score(), state.judge.of_model(polished)) <= drop


def _report(state: CalibrationState, scheme: Scheme, choice: Choice, budget: Budget | None) -> dict[str, Any]:
    """Return the JSON report, without measured schemes, tests and times."""
    network, settings = state.network, state.settings
    layers = {
        name: {**row, "predicted_loss": state.table.loss(name, scheme[name])} for name, row in layer_costs(network.costs, scheme).items()
    }
    rows = [{**row, "scheme": row["scheme"].to_json(), "chosen": row["scheme"] == choice.scheme} for row in choice.measured]
    return {
        "version": 1,
        "budget": str(budget) if budget else None,
        "result": network.costs.summary(scheme),
        "float_bytes": network.costs.float_bytes,
        "layers": layers,
        "schemes": rows,
        "table": _table(state),
        "certificate": choice.certificate(settings.seed),
        "candidate_errors": {name: {str(bits): row for bits, row in rows.items()} for name, rows in state.errors.items()},
        "inputs": dict(zip(("fitting", "held_out"), state.calibration.count(), strict=True)),
        "uncovered": dict(network.uncovered),
        "settings": settings.to_json(),
        "environment": environment(),
    }


def _table(state: CalibrationState) -> dict[str, Any]:
    """Return the predicted loss and costs of every candidate precision, from which other budgets can be met without the network."""
    choices, costs = state.network.choices, state.network.costs
    shown = [cost for cost in cost_quantities() if cost.counted is cost and cost.recorded == "candidates"]
    return {
        "floor": state.table.floor,
        "fixed_bytes": costs.fixed_bytes(choices),
        "weights": sum(size.weights for size in costs.layers.values()),
        "layers": {
            name: {
                str(p): {"loss": state.table.loss(name, p)} | {cost.name: cost.layer(costs, name, p) for cost in shown} for p in precisions
            }
            for name, precisions in choices.items()
        },
    }
