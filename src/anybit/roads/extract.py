"""Extract a subnet of a supernet or of a search, and polish it."""

import glob
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anybit.allocation.choice import Judge
from anybit.allocation.sensitivity import SensitivityTable
from anybit.budget import LATENCY, Budget, budget_check, check_is_counted
from anybit.calls import checking, public
from anybit.data.batches import Batch, check_finite, in_evaluation_mode
from anybit.data.samples import Samples, draw, mirrored, split
from anybit.data.tasks import Metric, keeping_task, outputs_of, outputs_of_each, task_of
from anybit.data.tasks import evaluate as evaluate_model
from anybit.environment import StageClock, environment
from anybit.errors import InvalidFile, InvalidSetting
from anybit.files.cache import Cache, open_cache
from anybit.files.contents import digest
from anybit.files.strict import read_json
from anybit.networks.candidates import ActivationCandidate, Candidates, frozen_candidate, to_tensors
from anybit.networks.canonical import Canonical
from anybit.networks.edges import finished
from anybit.networks.fingerprint import fingerprint_of
from anybit.networks.layers import quantized_layers
from anybit.networks.observed import observe_network
from anybit.networks.wiring import observe
from anybit.numerics.quantizers import UniformQuantizer
from anybit.progress import plan, tell
from anybit.reports.bars import shown_in_notebooks
from anybit.roads.expected import Calibration, extract_stages
from anybit.roads.inputs import checked_tests, read_alike, supernet_data
from anybit.roads.keys import key_of_run
from anybit.roads.latencies import measured_latencies, supernet_with_latencies
from anybit.roads.memory import check_memory
from anybit.roads.polish import polish_scheme
from anybit.roads.result import Result, layer_costs, test_scores
from anybit.roads.search import best_within
from anybit.roads.settings import CalibrateSettings, check_subnet
from anybit.roads.steps import CalibrationState, batch_norm_targets
from anybit.runs.scheme_file import read_scheme
from anybit.scheme import FLOAT, Scheme, check_whole
from anybit.settings import takes
from anybit.sources.inputs import compared, samples_from
from anybit.sources.labels import task_of_labels
from anybit.sources.preprocessing import Preprocessing
from anybit.supernets.folder import load_supernet
from anybit.supernets.prepared import bn_batches, held_out_split
from anybit.supernets.supernet import Supernet

POLISH = (
    "samples", "held_out", "batch_size", "seed", "unit", "blocks", "steps", "drop", "mirror", "sequential", "bn_tuning", "bias_tuning",
    "tune_scales", "bn_prior", "bn_target", "memory",
)  # fmt: skip
"""Settings of calibrate that also apply to polishing a subnet."""


@torch.no_grad()
def candidates_of(canonical: Canonical) -> Candidates:
    """Return the candidates in the slots of a canonical model."""
    candidates = Candidates()
    for name, layer in quantized_layers(canonical.model).items():
        weights, inputs = layer.weight_quantizer, layer.input_quantizer
        if isinstance(weights, UniformQuantizer):
            candidates.weights[name, weights.bits] = frozen_candidate(layer)
        if isinstance(inputs, UniformQuantizer):
            candidates.activations[name, inputs.bits] = ActivationCandidate(inputs.scale, inputs.zero_point)
    return candidates


def polished(
    supernet: Supernet,
    canonical: Canonical,
    samples: Samples,
    bn: Sequence[Batch],
    settings: CalibrateSettings,
    cache: Cache = Cache(),
) -> tuple[Canonical, list[dict[str, Any]]]:
    """Polish a subnet from its own codes and ranges, towards the outputs of the shared weights without quantizers: sequential AdaQuant,
    batch-norm tuning, bias tuning, each kept only if the held-out loss falls. Returns (canonical, ladder)."""
    scheme = canonical.scheme
    calibration = split(draw(samples, settings.samples, settings.seed), settings.seed, settings.held_out, settings.batch_size)
    if settings.mirror:
        calibration = mirrored(calibration)
    example = calibration.fitting[0].head(2)
    fixed = replace(settings, keep={glob.escape(name): precision for name, precision in scheme.items()})
    network = observe_network(supernet.as_float(bn), example, fixed.options)
    check_memory(network, calibration, settings)
    own = replace(candidates_of(canonical), edges=dict(canonical.edges))
    with torch.no_grad():
        references = outputs_of_each(network.float_model, calibration.fitting)
        reference = outputs_of(network.float_model, calibration.held_out)
    targets = batch_norm_targets(network, calibration, settings)
    table = SensitivityTable({(name, precision): 0.0 for name, precision in scheme.items()}, FLOAT, 0)
    cache = key_of_run(cache, network, calibration, [*references, reference], settings)
    cache = cache.keyed(digest(to_tensors(own).values()), settings.to_json())
    judge = Judge(network, own, calibration.held_out, reference, task_of(reference, example.reader, supernet.task), cache=cache)
    state = CalibrationState(network, calibration, settings, own, own, table, judge, targets, references, own)
    done = polish_scheme(state, scheme)
    supernet.method.switch(scheme)  # as before the float network was created
    return Canonical(in_evaluation_mode(done.model), network.norms, done.edges), done.ladder[1:]


@public
@checking(budget=budget_check(check_is_counted))
@shown_in_notebooks
@takes(CalibrateSettings, only=POLISH)
@keeping_task()
def extract(
    run: str | Path | Supernet,
    budget: str | Budget | None = None,
    *,
    scheme: Scheme | str | Path | None = None,
    data: Any = None,
    test: Any = None,
    model: nn.Module | str | None = None,
    metric: Metric | None = None,
    workers: int = 0,
    polish: bool = False,
    cache: str | Path | bool = True,
    **settings: Any,
) -> Result:
    """Return a subnet of a supernet, or of a search, in the canonical form.

    budget, scheme  exactly one: the best known subnet that fits, or a scheme that names every layer (a Scheme, a run folder, or a JSON file
                    of layer -> precision)
    data            unlabelled training data to estimate batch-norm statistics from; without it, the stored ones of this scheme or of the
                    nearest are used, and the report says which
    test, metric, model, workers  as for `calibrate`
    polish          also calibrate it on `data`: sequential AdaQuant, batch-norm and bias tuning from its own codes and ranges, each kept
                    only if the held-out loss falls; the settings below and `cache` are those of `calibrate` that apply to these steps

    Raises InfeasibleBudget if no subnet fits, SchemeMismatch if a precision was not trained, InvalidSetting or InvalidFile otherwise.
    """
    # Long, because it is the list of the road's stages, each of which needs results of those before it.
    options = CalibrateSettings.of(**settings)
    check_subnet(budget, scheme, polish, data)
    if settings and not polish:
        raise InvalidSetting(
            f"{next(iter(settings))} does not apply to an extraction without polish. Leave it out, or give --polish and --data."
        )
    if metric is not None and test is None:
        raise InvalidSetting("A metric is reported on test data, but there is none. Give --test, or leave out --metric.")
    limits = None if budget is None else Budget.parse(budget, check_is_counted)
    for note in options.notes_on_effect() if polish else ():
        tell("note", note=note)
    supernet = run if isinstance(run, Supernet) else load_supernet(run, model)
    clock = StageClock()
    samples = None if data is None else supernet_data(run, supernet, data, workers)
    if limits is not None and samples is not None:
        supernet = supernet_with_latencies(supernet, samples, [limits])
    chosen = best_within(run, supernet, limits) if limits is not None else _scheme_from(scheme)
    check_whole(chosen, supernet.choices)
    supernet.model.cpu()
    drawn = 1 if samples is None else min(len(samples), supernet.settings.bn_images)
    tested = drawn if test is not None else 0
    polishing = Calibration.of_model(supernet.model, options, options.samples, tested, 1).of_polish() if polish else []
    plan(extract_stages(drawn, tested, polishing), measured=False)
    with clock.stage("extract"):
        fitting = None if samples is None else held_out_split(samples, supernet.settings)[0]
        batches = None if fitting is None else bn_batches(fitting, supernet.settings)
        check_finite(batches or [])
        statistics = supernet.switch(chosen, batches)
        canonical = _with_observed_edges(supernet, supernet.canonical(), batches)
    tests = None
    if test is not None:
        read_as = task_of_labels(supernet.settings.task, supernet.task)
        preprocessing = Preprocessing.from_json(supernet.about.get("preprocessing", {}))
        tests = checked_tests(samples_from(test, workers, preprocessing, canonical.model, metric=metric), canonical.model)
        tests = (
            compared(canonical.model, tests, supernet.settings.outputs, read_as)
            if samples is None
            else read_alike(tests, samples, canonical.model, read_as)
        )
    ladder: list[dict[str, Any]] = []
    if polish:
        if tests is not None:  # check labels and metric before the work
            evaluate_model(canonical.model, tests.batches(256), supernet.task, metric)
        assert fitting is not None and batches is not None  # polishing requires data
        with clock.stage("polish"):
            canonical, ladder = polished(supernet, canonical, fitting, batches, options, open_cache(cache))
    example = batches[0] if batches else supernet.example
    canonical.fingerprint = None if example is None else fingerprint_of(canonical.model, example)
    scheme = canonical.scheme
    report: dict[str, Any] = {
        "version": 1,
        "road": "train once",
        **({"ladder": ladder} if polish else {}),
        "budget": str(budget) if budget else None,
        "statistics": statistics,
        "result": supernet.costs.summary(scheme),
        "float_bytes": supernet.costs.float_bytes,
        "layers": layer_costs(supernet.costs, scheme),
        "settings": supernet.settings.to_json(),
        "environment": environment(),
        "certificate": {},
    }
    if limits is not None and limits.limit(LATENCY.name) is not None and batches is not None:
        with clock.stage("latency"):
            report["latency"] = measured_latencies(supernet.costs, canonical, batches[0])
    if tests is not None:
        with clock.stage("test"):
            report["test"] = evaluate_model(canonical.model, tests.batches(256), supernet.task, metric)
    tell("result", budget=report["budget"], **report["result"], **test_scores(report))
    provenance = {**supernet.about, "budget": report["budget"], "task": supernet.task}
    provenance["outputs"] = dict(supernet.settings.outputs) or None
    return Result(canonical, report | {"stages": clock.stages}, provenance)


def _with_observed_edges(supernet: Supernet, canonical: Canonical, batches: list[Batch] | None) -> Canonical:
    """Return the subnet with its edges observed on `batches` and rounded; without any, with the supernet's stored ranges."""
    if batches is None:
        canonical.edges = supernet.stored_edges()
        return canonical
    return finished(canonical, observe(canonical.model, batches[0].head(2)), batches[:8])


def _scheme_from(scheme: Scheme | str | Path | None) -> Scheme:
    """Return the scheme in a run folder or JSON file; a Scheme unchanged."""
    if isinstance(scheme, Scheme):
        return scheme
    assert scheme is not None  # checked by `check_subnet`
    path = Path(scheme)
    if path.is_dir():
        return read_scheme(path).scheme
    layers = read_json(path)
    if not isinstance(layers, dict) or not all(isinstance(text, str) for text in layers.values()):
        raise InvalidFile(f"{path} is not a scheme: write a JSON object of layer -> precision, or name a run folder.")
    try:
        return Scheme.parse(layers)
    except InvalidSetting as error:
        raise InvalidFile(f"{path}: {error}") from error
