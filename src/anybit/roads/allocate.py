"""Meet new budgets from the stored candidates and sensitivity table of a calibrate run."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from anybit.allocation.choice import Judge
from anybit.allocation.sensitivity import SensitivityTable, rows_to_measure
from anybit.budget import DROP, Budget, budget_check
from anybit.calls import checking, public
from anybit.data.batches import check_finite, check_finite_outputs
from anybit.data.samples import Calibration, draw, mirrored, split
from anybit.data.tasks import Metric, joined, keeping_task, labels_fit, labels_in, outputs_of_each, task_of
from anybit.environment import StageClock
from anybit.errors import InvalidFile, InvalidSetting, SchemeMismatch
from anybit.files.cache import open_cache
from anybit.files.contents import digest
from anybit.networks.candidates import Candidates, to_tensors
from anybit.networks.layers import float_bias
from anybit.networks.observed import ObservedNetwork, observe_network
from anybit.progress import plan, tell
from anybit.reports.bars import shown_in_notebooks
from anybit.roads import expected
from anybit.roads.calibrate import finish, tell_of_drop
from anybit.roads.inputs import check_metric_has_labels, checked_tests, example_of, on_device, read_alike
from anybit.roads.keys import data_digest, key_of_run, metric_digest, weights_digest
from anybit.roads.latencies import with_latencies
from anybit.roads.memory import check_memory
from anybit.roads.result import Result
from anybit.roads.settings import CalibrateSettings
from anybit.roads.steps import CalibrationState, batch_norm_targets, edge_candidates, float_tested
from anybit.runs.candidates import read_candidates
from anybit.runs.fingerprint import check_float
from anybit.runs.folder import runs_in
from anybit.runs.opened import float_model_of, followed_reference, recorded_data
from anybit.runs.scheme_file import SchemeFile, read_scheme
from anybit.sources.callables import absolute
from anybit.sources.inputs import compared, samples_from
from anybit.sources.labels import task_of_labels
from anybit.sources.preprocessing import Preprocessing


@public
@checking(budget=budget_check())
@shown_in_notebooks
@keeping_task()
def allocate(
    run: str | Path,
    budget: str | Budget,
    data: Any = None,
    model: nn.Module | str | None = None,
    workers: int = 0,
    *,
    test: Any = None,
    metric: Metric | None = None,
    device: str = "cpu",
    batch_size: int | None = None,
    memory: int | None = None,
    cache: str | Path | bool = True,
) -> Result:
    """Meet a new budget from the candidates and sensitivity table of a finished calibrate run, without new reconstruction.

    The best schemes are measured on held-out inputs and batch norm is tuned, on `data` or, for the user's own runs, on the recorded data.
    `run` is the run folder, or one with several runs; `test` is labelled data for the report; `batch_size` and `memory` (in bytes) default
    to those of the run; the other arguments are as in `calibrate`.

    Raises InfeasibleBudget if no scheme fits, SchemeMismatch if the model is another, and InvalidFile if the run has no valid candidates.
    """
    # Long, because it is the list of the road's stages, each of which needs results of those before it.
    limits = Budget.parse(budget)
    folder = next(iter(runs_in(Path(run))), Path(run))  # runs of one calibrate share their candidates: any of them works
    file = read_scheme(folder)
    float_model = float_model_of(folder, file, model)
    with _naming_weights(file, model):
        check_float(folder, file.fingerprint, float_model)
    float_model = on_device(float_model, device)
    shapes = {name: (record.rows, record.columns) for name, record in file.layers.items()}
    candidates, saved = read_candidates(folder, shapes)
    candidates = candidates.on(device)
    overrides: dict[str, Any] = {"batch_size": batch_size, "memory": memory}
    place = folder / "candidates.json"
    recorded_settings = CalibrateSettings.from_json(saved["settings"], f"{place}: settings")
    table = _table_from(saved["table"], place)
    settings = replace(recorded_settings, **{name: value for name, value in overrides.items() if value is not None})
    clock = StageClock()
    recorded = Preprocessing.from_json(file.preprocessing)
    samples = samples_from(recorded_data(folder, file) if data is None else data, workers, recorded, float_model, settings.samples, metric)
    samples = samples.on(device)
    if test is None:
        check_metric_has_labels(metric, samples)
    read_as = task_of_labels(settings.task, file.task)
    if "outputs" in saved["settings"]:  # else its table only covers the first output
        samples = compared(float_model, samples, settings.outputs, read_as)
    tests = None if test is None else samples_from(test, workers, recorded, float_model, metric=metric).on(device)
    tests = None if tests is None else checked_tests(tests, float_model)
    tests = read_alike(tests, samples, float_model, read_as)
    with clock.stage("observe and fold"):
        calibration = split(draw(samples, settings.samples, settings.seed), settings.seed, settings.held_out, settings.batch_size)
        check_finite(calibration.fitting + calibration.held_out)
        if settings.mirror:
            calibration = mirrored(calibration)
        network = with_latencies(
            observe_network(float_model, example_of(calibration), replace(settings.options, gradients=False, curvature=False)), [limits]
        )
        check_memory(network, calibration, replace(settings, sequential=False, parallel=False, bias_tuning=False), floor=0)
        _check_shapes(network, shapes, folder)
        check_saved(network, candidates, table, saved["choices"], place)
        with _naming_weights(file, model):
            _check_weights(network, saved.get("network"), folder)
        notes = [] if data is not None or batch_size is not None else _notes_on_data(calibration, saved.get("data"), folder)
        if set(candidates.edges) != set(network.wiring.edges()):  # a run that rounded none
            candidates = replace(candidates, edges=edge_candidates(network, calibration, settings))
        started = time.perf_counter()
        held_out = outputs_of_each(network.float_model, calibration.held_out)
        check_finite_outputs(held_out, calibration.held_out)
        reference = joined(held_out)
        forward = (time.perf_counter() - started) / max(len(reference), 1)
        targets = batch_norm_targets(network, calibration, settings) if settings.bn_tuning and network.norms else {}
        entries = key_of_run(open_cache(cache), network, calibration, [reference], settings)
        entries = entries.keyed(digest(to_tensors(candidates).values()), saved["table"], settings.to_json())
        entries = entries.keyed(metric_digest(metric, calibration.held_out))
    task, labels = task_of(reference, calibration.held_out[0].reader, file.task), labels_in(calibration.held_out)
    scored = labels is not None and labels_fit(reference, labels, task, needed=metric is None and limits.loss() is DROP)
    judge = Judge(network, candidates, calibration.held_out, reference, task, metric, entries, scored)
    light = replace(settings, sequential=False, bias_tuning=False)
    tested = 0 if tests is None else len(tests)
    plan(expected.Calibration.of_network(network, light, calibration.count(), tested, 1, forward).of_allocation())
    if metric is not None and labels is not None:
        tell_of_drop([limits], metric, judge.of_outputs(reference)["metric"])  # a failing metric raises before the work
    float_test = None if tests is None else float_tested(network, tests, task, metric, settings.batch_size, clock)
    state = CalibrationState(network, calibration, light, candidates, candidates, table, judge, targets, float_test=float_test, notes=notes)
    provenance = {"model": followed_reference(folder, file, model), "data": file.data, "preprocessing": file.preprocessing}
    if data is not None:
        provenance["data"] = {"reference": absolute(data)} if isinstance(data, str) else {}
    return finish(
        state,
        limits,
        provenance,
        {key: saved[key] for key in ("table", "choices", "settings", "network", "data") if key in saved},
        clock,
    )


def _check_shapes(network: ObservedNetwork, shapes: Mapping[str, tuple[int, int]], folder: Path) -> None:
    """Raise SchemeMismatch if the layers are not those of the run in `folder`, with these (rows, columns)."""
    observed = {name: (size.rows, size.columns) for name, size in network.costs.layers.items()}
    if observed != shapes:
        different = sorted(set(observed.items()) ^ set(shapes.items()))[0][0]
        raise SchemeMismatch(f"The model is not the one that {folder} was calibrated from: layer {different} differs. Check --model.")


@contextmanager
def _naming_weights(file: SchemeFile, model: nn.Module | str | None) -> Iterator[None]:
    """Name the file from which a run's network has its weights in an error about these."""
    try:
        yield
    except SchemeMismatch as error:
        weights = file.model.get("weights")
        if isinstance(model, nn.Module) or not isinstance(weights, str):
            raise
        raise SchemeMismatch(
            f"{error} The run's network has its weights from --weights={weights}: restore that file if it has changed since."
        ) from error


def _check_weights(network: ObservedNetwork, digest_in_run: str | None, folder: Path) -> None:
    """Raise SchemeMismatch if the weights are not those from which the run in `folder` was made; old runs have no digest."""
    if digest_in_run not in (None, weights_digest(network)):
        raise SchemeMismatch(
            f"The weights are not those that {folder} was calibrated from: they were trained since, or belong to another network. Give "
            "the original ones (--model), or run calibrate on these."
        )


def _notes_on_data(calibration: Calibration, digest_in_run: str | None, folder: Path) -> list[str]:
    """Print and return a note if the recorded data, in the run's own batches, have changed since; old runs have no digest."""
    if digest_in_run in (None, data_digest(calibration)):
        return []
    note = (
        f"the data have changed since {folder} was made: its candidates and sensitivities are of the earlier data, and the scheme is "
        "measured on these. Run `calibrate` again to fit these"
    )
    tell("note", note=note)
    return [note]


def _table_from(data: Any, path: Path) -> SensitivityTable:
    try:
        return SensitivityTable.from_json(data)
    except InvalidSetting as error:
        raise InvalidFile(f"{path}: table: {error}") from error


def check_saved(
    network: ObservedNetwork, candidates: Candidates, table: SensitivityTable, choices: Mapping[str, Sequence[str]], path: Path
) -> None:
    """Raise InvalidFile if candidates.json, at `path`, belongs to another network or lacks rows that an allocation needs."""
    possible = {name: [str(precision) for precision in options] for name, options in network.choices.items()}
    if possible != dict(choices):
        different = next(name for name in {**possible, **choices} if possible.get(name) != choices.get(name))
        difference = f"choices of {different} are {choices.get(different)}, but its settings give {possible.get(different)}"
        raise InvalidFile(f"{path}: {difference}. Run calibrate again.")
    lacking = next((row for row in rows_to_measure(network.choices, table.pairs) if row not in table.measured), None)
    if lacking:
        raise InvalidFile(f"{path}: the table has no row of {lacking[0]} at {lacking[1]}. Run calibrate again.")
    for (name, bits), candidate in candidates.weights.items():
        own, saved = float_bias(network.prepared.get_submodule(name)), candidate.bias
        if (None if own is None else own.shape) != (None if saved is None else saved.shape):
            raise InvalidFile(f"{path}: the bias of {name} at W{bits} does not have the layer's shape. Run calibrate again.")
