"""One function a verb, each a list of stages. The command line and `anybit.*` call the same ones."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anybit import growth, searches, stages, subnets, training
from anybit.allocation import fixed_bytes
from anybit.batches import Batch, Calibration, Samples, check_finite, draw, split, tensors_in
from anybit.candidates import Candidates, apply_scheme, to_tensors
from anybit.checkpoint import (
    Canonical,
    SchemeFile,
    is_own,
    new_folder,
    read_candidates,
    read_canonical,
    read_scheme,
    remember,
    runs_in,
    write_candidates,
    write_canonical,
    write_report,
)
from anybit.cost import CostModel
from anybit.errors import InvalidFile, InvalidInput, InvalidSetting, SchemeMismatch, UnsupportedModel
from anybit.evaluation import Metric, check_labels, check_metric, guess_task, outputs_of
from anybit.evaluation import evaluate as evaluate_model
from anybit.files import read_json, read_settings, validated
from anybit.layers import float_weight
from anybit.processes import join_processes, share_state
from anybit.progress import tell
from anybit.references import Preprocessing, absolute, as_samples, code_of, completed, covered, load_data, load_model
from anybit.refusals import check_network, check_rows, copied, once_a_batch, restore
from anybit.reporting import StageClock, environment
from anybit.reports.page import run_page, runs_page
from anybit.resume import LIMIT, Recall, code_version, digest, machine, results_folder, trim
from anybit.scheme import Budget, Precision, Scheme
from anybit.searches import Search
from anybit.sensitivity import SensitivityTable, rows_to_measure
from anybit.stages import Bench, CalibrateSettings, Judge, Network, as_ranges
from anybit.subnet_search import SearchSettings
from anybit.supernet import JSON as SUPERNET_JSON
from anybit.supernet import POLISH, Supernet, check_whole, polished, read_supernet, read_supernet_file, uniform_schemes, width_scores
from anybit.wiring import observe


@dataclass
class Result:
    """What a road ends with: the canonical model (its bits in `scheme`), and the report. `save` writes the run folder."""

    canonical: Canonical
    report: dict[str, Any]
    about: dict[str, Any]
    candidates: Candidates | None = None
    table: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        return self.canonical.model

    @property
    def scheme(self) -> Scheme:
        return self.canonical.scheme

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the run folder, all of it or nothing."""
        with new_folder(Path(folder), overwrite) as draft:
            self.write(draft)
        remember(Path(folder))
        return Path(folder)

    def write(self, folder: Path) -> None:
        """The run folder's files, into a folder that is there."""
        write_canonical(folder, self.canonical, self.about)
        size = (folder / "model.safetensors").stat().st_size
        assert size == self.report["result"]["bytes"], f"counted {self.report['result']['bytes']} bytes, wrote {size}"
        write_report(folder, self.report)
        (folder / "report.html").write_text(run_page(self.report), encoding="utf8")
        if self.candidates is not None:
            write_candidates(folder, self.candidates, self.table)


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
    """From a trained network, a few hundred inputs and a budget to a low-bit network.

    model     a network, or a reference to one ("file.py:function")
    data      inputs (labels, where there are any, serve reports and a budget of "drop=" alone): a data set, arrays, Samples, or a reference
    budget    "4bit", "120kB", "12.5%", "bops=2.1G", "4bit,bops=2G", ...; a list gives a list of results that share their candidates
    weights   a state dict's file, loaded into a network that is given by reference
    preprocessing  of images that are given by reference; recorded, with the references made absolute, for later verbs
    test      labelled data for the report; nothing is chosen on it
    metric    a function of (outputs, labels), higher is better: reported, and what a budget of "drop=" counts in instead of top-1
    device    where to compute; the result is on the CPU
    cache     keep every result of a stage, in this folder or (True) in the user's cache directory: a run that was killed, or has another
              budget, takes up what was finished, and ends with the same bytes
    settings  fields of `stages.CalibrateSettings`

    Raises InvalidSetting, InvalidInput, UnsupportedModel or InfeasibleBudget; each message says what, where and what to do.
    """
    wanted = CalibrateSettings(**settings)
    budgets = [Budget.parse(b) for b in budget] if isinstance(budget, (list, tuple)) else [Budget.parse(budget) if budget else None]
    twice = [text for text, count in Counter(map(str, budgets)).items() if count > 1]
    if twice:
        raise InvalidSetting(f"Budget {twice[0]} is asked for twice. Name each budget once.")
    model, preprocessing, about = _followed_model(model, weights, data, preprocessing, wanted.task)
    samples = draw(_samples(data, workers, preprocessing, model), wanted.samples, wanted.seed).on(device)
    if test is None:
        _check_metric(metric, samples)
    tests = None if test is None else _checked_tests(_samples(test, workers, preprocessing, model).on(device), model)
    clock = StageClock()
    recall = recall_in(cache)
    bench = prepare_bench(on_device(model, device).eval(), samples, wanted, [one for one in budgets if one], clock, metric, recall)
    saved = {
        "table": bench.table.to_json(),
        "choices": {name: [str(precision) for precision in precisions] for name, precisions in bench.network.choices.items()},
        "settings": wanted.to_json(),
    }
    results = [_finish(bench, one, about, saved, StageClock(list(clock.stages)), tests) for one in budgets]
    _settle(recall)
    return results if isinstance(budget, (list, tuple)) else results[0]


def recall_in(cache: str | Path | bool) -> Recall:
    """Results kept in this folder, in the user's cache directory (True), or not at all."""
    if isinstance(cache, bool):
        return Recall(results_folder() if cache else None)
    return Recall(Path(cache))


def _settle(recall: Recall) -> None:
    """Tell what was taken up, and keep the cache within its limit."""
    if recall.counts["recalled"]:
        made = recall.counts["made"]
        tell("note", note=f"{recall.counts['recalled']} results taken up from the cache, {made} made anew")
    if recall.folder is not None:
        trim(recall.folder, LIMIT)


def _followed_model(
    model: nn.Module | str, weights: str | Path | None, data: Any, preprocessing: Preprocessing, task: str | None
) -> tuple[nn.Module, Preprocessing, dict[str, Any]]:
    """(the network, the preprocessing, what a run records of where the network and its data came from, references made absolute)."""
    about: dict[str, Any] = {}
    if isinstance(model, str):
        about["model"] = {"reference": absolute(model), "weights": None if weights is None else str(Path(weights).resolve())}
        model = load_model(model, about["model"]["weights"], task)
    elif weights is not None:
        raise InvalidSetting(f"The weights {weights} go with a model's reference, and a network was given. Load them into it yourself.")
    model = covered(model)
    check_network(model)
    preprocessing = completed(preprocessing, model)
    if isinstance(data, str):
        about |= {"data": {"reference": absolute(data)}, "preprocessing": preprocessing.to_json()}
    return model, preprocessing, about


def _check_metric(metric: Metric | None, samples: Samples) -> None:
    if metric is not None and not samples.labelled:
        raise InvalidSetting("A metric needs labels, and these inputs have none. Give labelled data, to --data or --test, or no --metric.")
    if samples.reader is not None:
        check_metric(metric, samples.reader.task)


def _checked_tests(samples: Samples, model: nn.Module) -> Samples:
    """The test samples, refused before any work where they have no labels or the model does not take them."""
    if not samples.labelled or len(samples) == 0:
        raise InvalidInput("The test data has no samples with labels. Give a labelled set to --test, or leave it out.")
    check_inputs(model, samples)
    return samples


def check_inputs(model: nn.Module, samples: Samples) -> None:
    """Raise InvalidInput where the model refuses the first samples."""
    observe(copied(model).cpu(), next(samples.on("cpu").subset(range(min(2, len(samples)))).batches(2)))


def on_device(model: nn.Module, device: str) -> nn.Module:
    """A copy of the model on `device`."""
    model = copied(model)
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidSetting(f"--device {device} cannot be used here: {error}") from error


def prepare_bench(
    model: nn.Module,
    samples: Samples,
    settings: CalibrateSettings,
    budgets: Sequence[Budget],
    clock: StageClock,
    metric: Metric | None = None,
    recall: Recall = Recall(),
) -> Bench:
    """Everything up to the sensitivity table; budgets that no scheme can meet are refused before the long work."""
    with clock.stage("observe and fold"):
        calibration = split(samples, settings.seed, settings.held_out, settings.batch_size)
        check_finite(calibration.fitting + calibration.held_out)
        if settings.mirror:
            calibration = stages.mirrored(calibration)
        network = _with_latencies(stages.observe_network(model, _example(calibration), settings), budgets)
        stages.check_memory(network, calibration, settings)
        for budget in budgets:
            stages.check_feasible(network, budget)
    with clock.stage("float outputs"), torch.no_grad(), once_a_batch(network.folded, network.used_once):
        references = [outputs_of(network.folded, [batch]) for batch in calibration.fitting]
        check_rows(network.folded, references, calibration.fitting)
        reference = outputs_of(network.folded, calibration.held_out)
        task = stages.task_of(settings, reference, calibration.held_out[0])
        if samples.labelled:
            check_labels(reference, torch.cat([batch.labels for batch in calibration.held_out]), task)
        if not all(torch.isfinite(outputs).all() for outputs in (reference, *references)):
            stages.finite_samples(network, calibration, settings)  # names the layer, where it is one's input
            raise UnsupportedModel(
                "The float network's outputs are NaN or infinite on the calibration data. Check the network and the data."
            )
        recall = stages.recall_of_run(recall, network, calibration, [*references, reference], settings)
    with clock.stage("ranges"):
        ranged = candidates = stages.recalled_candidates(
            recall, "ranges", network, lambda: stages.range_candidates(network, calibration, settings)
        )
    recall = stages.under_settings(recall, settings, stages.MATCHING)
    targets: Mapping[str, Any] = {}
    matched = None
    if settings.bn_tuning and network.norms:
        with clock.stage("matching of candidates"):
            targets = stages.batch_norm_targets(network, calibration, settings)
            match = partial(stages.matched_candidates, network, candidates, targets, calibration, settings.bn_prior)
            candidates = stages.recalled_candidates(recall, "matching of candidates", network, match)
    errors: dict[str, Any] = {}
    if settings.does("parallel") and (settings.parallel is True or stages.has_choice(network)):
        matched = candidates
        recall = stages.under_settings(recall, settings, stages.PARALLEL)
        with clock.stage("parallel AdaQuant"):
            candidates, errors = stages.reconstructed_candidates(network, candidates, ranged, calibration, settings, recall)
    recall = stages.under_settings(recall, settings, stages.SENSITIVITY).under(task)
    with clock.stage("sensitivity"):
        table = stages.sensitivity_table(network, candidates, calibration, reference, task, settings, recall)
    judge = Judge(network, candidates, calibration.held_out, reference, task, metric, recall.under(metric and code_of(metric)))
    return Bench(network, calibration, settings, ranged, candidates, table, judge, targets, references, matched, errors)


def _with_latencies(network: Network, budgets: Sequence[Budget]) -> Network:
    """The network with this machine's measured latencies among its costs, where a budget limits them."""
    if all(budget.limit("latency") is None for budget in budgets):
        return network
    from anybit.onnx.latency import recalled  # optional packages

    found = recalled(network)
    if found is None:
        raise InvalidSetting("A budget of latency needs a table measured on this machine: run anybit profile on this model and data first.")
    return replace(network, costs=replace(network.costs, latency=found[0]))


def _supernet_with_latencies(supernet: Supernet, samples: Samples, budgets: Sequence[Budget]) -> Supernet:
    """The supernet with this machine's measured latencies among its costs, where a budget limits them."""
    if all(budget.limit("latency") is None for budget in budgets):
        return supernet
    from anybit.onnx.file import PROBE  # what `profile` observes: padded texts have the length of so many

    first = next(samples.on("cpu").subset(range(min(PROBE, len(samples)))).batches(PROBE))
    network = _with_latencies(subnets.observe_supernet(supernet.network, first, supernet.settings), budgets)
    return replace(supernet, costs=replace(supernet.costs, latency=network.costs.latency))


def _latencies(costs: CostModel, canonical: Canonical, example: Batch) -> dict[str, float]:
    """What the table predicted of the finished network, and what it takes once exported; seconds of one sample."""
    from anybit.onnx.latency import latency_of

    return {"predicted": costs.latency.total(canonical.scheme), **latency_of(canonical, example)}


def _example(calibration: Calibration) -> Batch:
    padded = calibration.fitting[0].mask is not None
    return calibration.fitting[-1 if padded else 0].head(2)  # texts go by length: the longest


def _finish(
    bench: Bench,
    budget: Budget | None,
    about: Mapping[str, Any],
    saved: Mapping[str, Any],
    clock: StageClock,
    test: Samples | None = None,
) -> Result:
    """One budget's scheme, polished, measured and reported; `saved` goes beside the candidates, for budgets to come."""
    network = bench.network
    with clock.stage("allocation"):
        choice = stages.chosen_scheme(bench, budget)
        tell("allocation", budget=budget and str(budget), certificate=choice.certificate(bench.settings.seed), scheme=choice.scheme)
    with clock.stage("polish"):
        model, ladder, errors = stages.polish(bench, choice.scheme)
        if budget is not None and budget.limit("drop") is not None:
            model = _within_drop(bench, budget, choice.scheme, model)
    with clock.stage("edge ranges"):
        part = stages.samples_at_once(network.wiring, stages.OBSERVED, bench.settings.memory, 8)
        recall = bench.judge.recall.under("edges", digest(model.state_dict().values()), part)
        observe_edges = partial(stages.edge_ranges, model, network.wiring, bench.calibration.fitting, part)
        edges = recall.value("edge ranges", observe_edges, partial(as_ranges, wiring=network.wiring))
    restore(model, network.moving)
    canonical = Canonical(model.eval(), network.norms, edges)
    report = _report(bench, canonical.scheme, choice, budget) | {"ladder": ladder, "units": errors}
    if test is not None:
        with clock.stage("test"):
            report |= _tests(bench, canonical.model, test)
    canonical.model.cpu()
    if budget is not None and budget.limit("latency") is not None:
        with clock.stage("latency"):
            report["latency"] = _latencies(network.costs, canonical, bench.calibration.fitting[0].to("cpu"))
    report["stages"] = clock.stages
    tell("result", budget=report["budget"], **report["result"], **_scores(report))
    about = {**about, "budget": report["budget"], "certificate": report["certificate"], "task": bench.judge.task}
    return Result(canonical, report, about, bench.candidates, dict(saved))


def _scores(report: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured on test data."""
    return {key: report[key] for key in ("test", "float_test") if key in report}


def _within_drop(bench: Bench, budget: Budget, scheme: Scheme, polished: nn.Module) -> nn.Module:
    """The polished model, or the candidates that met the allowed drop where polishing (judged by the loss) has left it."""
    judge = bench.judge
    if judge.of_outputs(judge.reference)[judge.counted] - judge.of_model(polished)[judge.counted] <= budget.limit("drop"):
        return polished
    return apply_scheme(bench.network.prepared, scheme, bench.candidates)


def _report(bench: Bench, scheme: Scheme, choice: stages.Choice, budget: Budget | None) -> dict[str, Any]:
    """The JSON report, before what was tried, tests and times."""
    network, settings = bench.network, bench.settings
    layers = {
        name: {**row, "predicted_loss": bench.table.loss(name, scheme[name])} for name, row in _layer_costs(network.costs, scheme).items()
    }
    rows = [{**row, "scheme": row["scheme"].to_json(), "chosen": row["scheme"] == choice.scheme} for row in choice.measured]
    return {
        "version": 1,
        "budget": str(budget) if budget else None,
        "result": network.costs.summary(scheme),
        "float_bytes": network.costs.float_bytes,
        "layers": layers,
        "schemes": rows,
        "table": _table(bench),
        "certificate": choice.certificate(settings.seed),
        "candidate_errors": {name: {str(bits): row for bits, row in rows.items()} for name, rows in bench.errors.items()},
        "inputs": dict(zip(("fitting", "held_out"), bench.calibration.count(), strict=True)),
        "uncovered": dict(network.uncovered),
        "settings": settings.to_json(),
        "environment": environment(),
    }


def _table(bench: Bench) -> dict[str, Any]:
    """Every candidate precision's predicted loss and costs: what other budgets would give can be told from it, without the network."""
    choices, costs = bench.network.choices, bench.network.costs
    return {
        "floor": bench.table.floor,
        "fixed_bytes": fixed_bytes(choices, costs),
        "weights": sum(size.weights for size in costs.layers.values()),
        "layers": {
            name: {
                str(p): {"loss": bench.table.loss(name, p), "bytes": costs.layer_bytes(name, p), "bops": costs.layer_bops(name, p)}
                for p in precisions
            }
            for name, precisions in choices.items()
        },
    }


def _tests(bench: Bench, model: nn.Module, samples: Samples) -> dict[str, Any]:
    network, judge, size = bench.network, bench.judge, bench.settings.batch_size
    reference = outputs_of(network.folded, samples.batches(size))
    return {
        "float_test": evaluate_model(network.folded, samples.batches(size), judge.task, judge.metric),
        "test": evaluate_model(model, samples.batches(size), judge.task, judge.metric, reference),
    }


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
    """Train a network to a budget: its mixed-precision scheme grows meanwhile (CSQ).

    model       a network, or a reference to one; trained, or with `from_scratch` its architecture alone
    train       labelled data (or unlabelled, with distill=1): a data set, arrays, Samples, or a reference
    budget      of weights: "3bit", "80kB", "12.5%"; None keeps every plane
    scheme      instead of a budget: a scheme, or the run that has it; it is fixed, and trained with learned steps (LSQ)
    weights, preprocessing  as for `calibrate`
    test        labelled data for the report, looked at after every epoch, soft and frozen; nothing is chosen on it
    checkpoint  a file that is written after every epoch and continued from where it is found
    settings    fields of `growth.GrowSettings`, `methods.csq.CSQSettings` and `training.TrainSettings`

    Raises InvalidSetting, InvalidInput, UnsupportedModel or InfeasibleBudget; AnybitError where the loss stops being a number.
    """
    wanted = growth.GrowSettings.of(**settings)
    if isinstance(budget, (list, tuple)):
        raise InvalidSetting("grow takes one budget: every budget is a training of its own.")
    if budget is not None and scheme is not None:
        raise InvalidSetting("Give a budget or a scheme, not both: a scheme has its bits already.")
    budget = Budget.parse(budget) if budget is not None else None
    scheme = read_scheme(Path(scheme)).scheme if isinstance(scheme, (str, Path)) else scheme
    clock = StageClock()
    float_model, samples, tests, about = _training_inputs(model, weights, train, test, metric, preprocessing, workers, device, wanted.task)
    with clock.stage("observe and fold"):
        if len(samples) == 0:
            raise InvalidInput("The training data is empty.")
        plain = growth.plain_batches(samples, wanted.train)
        check_finite(plain)
        share_state(float_model)
        start = growth.forgotten(float_model, plain, wanted.train.seed) if wanted.from_scratch else float_model
        share_state(start)
        network = growth.observe_trainable(start, plain[0].head(2), wanted, scheme)
        if budget is not None:
            growth.check_feasible(network, budget)
        task = wanted.task or guess_task(outputs_of(float_model, plain[:1]), plain[0].reader)
        trainee = growth.make_trainee(network, plain, budget, scheme is not None, wanted)
    if tests is not None:  # before the long work, which bad labels or a bad metric would waste
        reference = outputs_of(float_model, tests.batches(256))
        float_test = evaluate_model(float_model, tests.batches(256), task, metric)
        watched = growth.watched_batches(tests, wanted.train.seed)
    with clock.stage("training"), torch.random.fork_rng(devices=[]):
        epochs = training.train(
            trainee,
            samples,
            wanted.train,
            task,
            float_model if wanted.train.distill else None,
            growth.folded_gammas(trainee.model, network),
            None if checkpoint is None else Path(checkpoint),
            _identity(float_model, samples, plain[0], {"budget": str(budget), "scheme": scheme and str(scheme), **wanted.to_json()}),
            None if tests is None else lambda: growth.soft_and_frozen(trainee, network, plain, watched, task, metric),
        )
    with clock.stage("freeze"):
        canonical = growth.frozen(trainee, network, plain)
    with clock.stage("edge ranges"):
        canonical.edges = stages.edge_ranges(canonical.model, network.wiring, plain)
    report = {
        "version": 1,
        "road": "grow",
        "budget": str(budget) if budget else None,
        "result": network.costs.summary(canonical.scheme),
        "float_bytes": network.costs.float_bytes,
        "layers": _layer_costs(network.costs, canonical.scheme),
        "epochs": epochs,
        "uncovered": dict(network.uncovered),
        "settings": wanted.to_json(),
        "environment": environment(),
    }
    if tests is not None:
        with clock.stage("test"):
            report["float_test"] = float_test
            report["test"] = evaluate_model(canonical.model, tests.batches(256), task, metric, reference)
    canonical.model.cpu()
    report["stages"] = clock.stages
    certificate = {**trainee.decisions().get("certificate", {}), "seed": wanted.train.seed}
    about |= {"budget": str(budget) if budget else None, "task": task, "certificate": certificate}
    tell("allocation", budget=report["budget"], certificate=certificate, scheme=canonical.scheme)
    tell("result", budget=report["budget"], **report["result"], **_scores(report))
    return Result(canonical, report | {"certificate": certificate}, about)


def _training_inputs(
    model: nn.Module | str,
    weights: str | Path | None,
    data: Any,
    test: Any,
    metric: Metric | None,
    preprocessing: Preprocessing,
    workers: int,
    device: str,
    task: str | None,
) -> tuple[nn.Module, Samples, Samples | None, dict[str, Any]]:
    """(the float network, training samples, test samples, what a run records of them), on this process's device."""
    if metric is not None and test is None:
        raise InvalidSetting("A metric is reported on the test data, and there is none. Give --test, or no --metric.")
    model, preprocessing, about = _followed_model(model, weights, data, preprocessing, task)
    device = join_processes(device)
    float_model = on_device(model, device).eval()
    samples = _samples(data, workers, preprocessing, model).on(device)
    tests = None if test is None else _checked_tests(_samples(test, workers, preprocessing, model).on(device), model)
    return float_model, samples, tests, about


@torch.inference_mode(False)
def train(
    model: nn.Module | str,
    data: Any,
    *,
    weights: str | Path | None = None,
    preprocessing: Preprocessing = Preprocessing(),
    test: Any = None,
    metric: Metric | None = None,
    checkpoint: str | Path | None = None,
    workers: int = 0,
    device: str = "cpu",
    **settings: Any,
) -> Supernet:
    """Train one network for every bit-width (MultiQuant): a supernet, which any scheme of those bits makes a subnet of, at once.

    model       a trained network, or a reference to one
    data        labelled training data: a data set, arrays, Samples, or a reference; a share of it is held out for the search
    weights, preprocessing, workers, device  as for `calibrate`
    test        labelled data on which every bit-width is reported after every epoch; nothing is chosen on it
    checkpoint  a file that is written after every epoch and continued from where it is found
    settings    fields of `subnets.SupernetSettings`, `methods.multiquant.MultiQuantSettings` and `training.TrainSettings`

    The result's weights are those of the store: rounded to 8 bits. Raises as `grow` does.
    """
    wanted = subnets.SupernetSettings.of(**settings)
    clock = StageClock()
    float_model, samples, tests, about = _training_inputs(model, weights, data, test, metric, preprocessing, workers, device, wanted.task)
    with clock.stage("observe and fold"):
        if len(samples) < 2:
            raise InvalidInput(f"{len(samples)} training sample(s): at least two are needed, one to train on and one to hold out.")
        fitting, _ = subnets.held_out_split(samples, wanted)
        plain = growth.plain_batches(fitting, wanted.train)
        check_finite(plain)
        share_state(float_model)
        network = subnets.observe_supernet(float_model, plain[0].head(2), wanted)
        outputs = outputs_of(float_model, plain[:1])
        task = wanted.task or guess_task(outputs, plain[0].reader)
        method = subnets.make_multiquant(network, plain, wanted, outputs.shape[-1] if task == "classification" else None)
    edges = network.wiring.edges()
    supernet = Supernet(on_device(float_model, "cpu"), method, wanted, network.norms, network.costs, edges, task, about=about)
    report: dict[str, Any] = {}
    bn = subnets.bn_batches(fitting, wanted) if wanted.multiquant.batch_norm == "reestimate" else None
    if tests is not None:
        report["float_test"] = evaluate_model(float_model, tests.batches(256), task, metric)
        watched = growth.watched_batches(tests, wanted.train.seed)
    with clock.stage("training"), torch.random.fork_rng(devices=[]):
        epochs = training.train(
            method,
            fitting,
            wanted.train,
            task,
            float_model if wanted.train.distill else None,
            subnets.folded_gammas(method, network.norms),
            None if checkpoint is None else Path(checkpoint),
            _identity(float_model, samples, plain[0], wanted.to_json()),
            None if tests is None else lambda: {"widths": width_scores(supernet, bn, watched, metric)},
        )
    if tests is not None:
        report["float_store"] = width_scores(supernet, bn, list(tests.batches(256)), metric)
    with clock.stage("store"):
        subnets.to_store(method)
        for scheme in uniform_schemes(supernet).values():
            supernet.learn(scheme, bn, lambda model: stages.edge_ranges(model, network.wiring, plain))
    if tests is not None:
        with clock.stage("test"):
            report["test"] = width_scores(supernet, None, list(tests.batches(256)), metric)
    method.model.cpu()
    supernet.report = {
        "version": 1,
        "road": "train once",
        **report,
        "subnets": {name: network.costs.summary(scheme) for name, scheme in uniform_schemes(supernet).items()},
        "float_bytes": network.costs.float_bytes,
        "bn_images": sum(map(len, bn)) if bn else 0,
        "inputs": {"fitting": len(fitting), "held_out": len(samples) - len(fitting)},
        "epochs": epochs,
        "uncovered": dict(network.uncovered),
        "settings": wanted.to_json(),
        "environment": environment(),
        "stages": clock.stages,
    }
    tell("result", subnets=supernet.report["subnets"], **_scores(report))
    return supernet


def load_supernet(folder: str | Path, model: nn.Module | str | None = None) -> Supernet:
    """The supernet that `train` or `search` saved; `model` as for `load`."""
    folder = Path(folder)
    file = read_supernet_file(folder)
    supernet = read_supernet(folder, _float_model(folder, file, model, SUPERNET_JSON))
    if not is_own(folder, SUPERNET_JSON):  # what is saved of it is one's own: no stranger's reference goes on into that
        supernet.about |= {"model": {"reference": absolute(model)} if isinstance(model, str) else {}, "data": {}}
    return supernet


def search(
    run: str | Path | Supernet,
    data: Any = None,
    budget: str | Budget | Sequence[str | Budget] = (),
    *,
    model: nn.Module | str | None = None,
    images: int = 2500,
    bn_images: int | None = None,
    metric: Metric | None = None,
    workers: int = 0,
    device: str = "cpu",
    cache: str | Path | bool = True,
    **settings: Any,
) -> Search:
    """The best schemes of a supernet along the whole range of costs, and for each budget the best of those that fit it.

    data        the supernet's training data; subnets are evaluated on the share that was held out of it
    images      held-out samples that subnets are evaluated on; as many others measure the front again
    bn_images   training inputs on which batch norm is estimated for each subnet that is evaluated, where fewer than the supernet's will do:
                most of the time goes there. The front is measured again, and kept, with the supernet's
    cache       keep every evaluation, in this folder or (True) in the user's cache directory: a search that was interrupted, or has another
                budget, does not repeat them. Scores of another supernet, data or metric are never taken
    settings    fields of `SearchSettings`

    Raises InfeasibleBudget, naming the least, where no subnet fits a budget.
    """
    wanted = SearchSettings(**settings)
    supernet = run if isinstance(run, Supernet) else load_supernet(run, model)
    budgets = [Budget.parse(one) for one in ([budget] if isinstance(budget, (str, Budget)) else budget)]
    samples = _supernet_data(run, supernet, data, workers).on(device)
    supernet = _supernet_with_latencies(supernet, samples, budgets)
    for one in budgets:
        searches.check_fits(supernet, one)
    on_device(torch.nn.Identity(), device)  # refused by name where there is none
    supernet.model.to(device)
    recall = _under_supernet(recall_in(cache), supernet, samples, metric)
    try:
        found = searches.searched(supernet, samples, budgets, wanted, images, bn_images, metric, recall)
        if supernet.costs.latency is not None:  # counted for these budgets
            found.supernet = replace(supernet, costs=replace(supernet.costs, latency=None))
        return found
    finally:
        supernet.model.cpu()


def _under_supernet(recall: Recall, supernet: Supernet, samples: Samples, metric: Metric | None) -> Recall:
    """`recall` under what a score depends on besides the scheme: the supernet's numbers, the data, the metric's code."""
    first = next(samples.on("cpu").subset(range(min(64, len(samples)))).batches(64))
    numbers = [*supernet.model.parameters(), *(tensor for name, tensor in supernet.model.named_buffers() if name.endswith(".start"))]
    data = [len(samples), digest(tensors_in([first.inputs, first.labels]))]
    return recall.under(
        code_version(), machine(numbers[0].device), digest(numbers), data, supernet.settings.to_json(), metric and code_of(metric)
    )


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
    """A subnet of a supernet, or of a search, in the canonical form.

    budget, scheme  one of them: the best known subnet that fits, or a scheme that names every layer (a Scheme, a run folder, or a JSON file
                    of layer -> precision)
    data            unlabelled training data, from which batch-norm statistics are estimated; without it the stored ones of this scheme, or
                    of the nearest, are taken, and the report says which
    polish          then calibrate it on `data`: sequential AdaQuant, batch-norm and bias tuning from its own codes and ranges, each kept
                    where held-out inputs say so; `settings` are those of `calibrate` that such steps have, and `cache` is as there
    """
    if (budget is None) == (scheme is None):
        raise InvalidSetting("Say which subnet: a budget, or a scheme.")
    if polish and data is None:
        raise InvalidSetting("Polishing needs inputs: give training data with --data.")
    without_part = [name for name in settings if not polish or name not in POLISH]
    if without_part:
        raise InvalidSetting(f"{without_part[0]} has no part in it. With polish, choose from {', '.join(POLISH)}.")
    supernet = run if isinstance(run, Supernet) else load_supernet(run, model)
    clock = StageClock()
    samples = None if data is None else _supernet_data(run, supernet, data, workers)
    limits = None if budget is None else Budget.parse(budget)
    if limits is not None and samples is not None:
        supernet = _supernet_with_latencies(supernet, samples, [limits])
    wanted = _scheme_from(scheme) if limits is None else searches.best_within(run, supernet, limits)
    check_whole(wanted, supernet.choices)
    supernet.model.cpu()
    with clock.stage("extract"):
        batches = None
        if samples is not None:
            fitting, _ = subnets.held_out_split(samples, supernet.settings)
            batches = subnets.bn_batches(fitting, supernet.settings)
        statistics = supernet.switch(wanted, batches)
        canonical = supernet.canonical()
        if batches is None:
            canonical.edges = supernet.stored_edges()
        else:
            wiring = observe(canonical.model, batches[0].head(2))
            canonical.edges = stages.edge_ranges(canonical.model, wiring, batches[:8])
    ladder: list[dict[str, Any]] = []
    if polish:
        with clock.stage("polish"):
            canonical, ladder = polished(supernet, canonical, fitting, batches, CalibrateSettings(**settings), recall_in(cache))
    scheme = canonical.scheme
    report = {
        "version": 1,
        "road": "train once",
        **({"ladder": ladder} if polish else {}),
        "budget": str(budget) if budget else None,
        "statistics": statistics,
        "result": supernet.costs.summary(scheme),
        "float_bytes": supernet.costs.float_bytes,
        "layers": _layer_costs(supernet.costs, scheme),
        "settings": supernet.settings.to_json(),
        "environment": environment(),
        "certificate": {},
    }
    if limits is not None and limits.limit("latency") is not None and batches is not None:
        with clock.stage("latency"):
            report["latency"] = _latencies(supernet.costs, canonical, batches[0])
    if test is not None:
        with clock.stage("test"):
            preprocessing = Preprocessing.from_json(supernet.about.get("preprocessing", {}))
            tests = _checked_tests(_samples(test, workers, preprocessing, canonical.model), canonical.model)
            report["test"] = evaluate_model(canonical.model, tests.batches(256), supernet.task, metric)
    tell("result", budget=report["budget"], **report["result"], **_scores(report))
    about = {**supernet.about, "budget": report["budget"], "task": supernet.task}
    return Result(canonical, report | {"stages": clock.stages}, about)


def _scheme_from(scheme: Scheme | str | Path) -> Scheme:
    """The scheme of a run folder or of a JSON file; a scheme itself."""
    if isinstance(scheme, Scheme):
        return scheme
    path = Path(scheme)
    if path.is_dir():
        return read_scheme(path).scheme
    layers = read_json(path)
    if not isinstance(layers, dict) or not all(isinstance(text, str) for text in layers.values()):
        raise InvalidFile(f"{path} is no scheme: write a JSON object of layer -> precision, or name a run folder.")
    try:
        return Scheme.parse(layers)
    except InvalidSetting as error:
        raise InvalidFile(f"{path}: {error}") from error


def _supernet_data(run: str | Path | Supernet, supernet: Supernet, data: Any, workers: int) -> Samples:
    """The data, preprocessed as the supernet's was; without any, what the supernet recorded, where it is this user's own."""
    if data is None:
        data = supernet.about.get("data", {}).get("reference")
        if not isinstance(data, str) or isinstance(run, Supernet) or not is_own(Path(run), SUPERNET_JSON):
            raise InvalidSetting("The supernet does not name data that may be followed. Give its training data with --data.")
    return _samples(data, workers, Preprocessing.from_json(supernet.about.get("preprocessing", {})), supernet.model)


def _identity(model: nn.Module, samples: Samples, first: Batch, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What must agree for a training to be continued: weights, data (its length and some preprocessed inputs), every setting."""
    flat = {f"{key}.{k}" if isinstance(value, dict) else key: v for key, value in settings.items() for k, v in _items(value)}
    return {
        "weights": digest(model.state_dict().values()),
        "samples": len(samples),
        "data": digest(tensors_in([first.inputs, first.labels])),
        **flat,
    }


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else [("", value)]


def _layer_costs(costs: CostModel, scheme: Scheme) -> dict[str, Any]:
    """What each layer is and costs at its precision."""
    return {
        name: {
            "precision": str(precision),
            "weights": costs.layers[name].weights,
            "macs": costs.layers[name].macs,
            "bytes": costs.layer_bytes(name, precision),
        }
        for name, precision in scheme.items()
    }


def allocate(
    run: str | Path,
    budget: str | Budget,
    data: Any = None,
    model: nn.Module | str | None = None,
    workers: int = 0,
    *,
    metric: Metric | None = None,
    device: str = "cpu",
    batch_size: int | None = None,
    memory: int | None = None,
    cache: str | Path | bool = True,
) -> Result:
    """A new budget from a saved calibrate run: its candidates and table, no new reconstruction.

    The best schemes are measured on held-out inputs and batch norm is tuned: on `data`, or on the data that the run recorded, where the
    run is this user's own. `batch_size` and `memory` are the run's where they are not given; the others are as in `calibrate`.
    """
    folder = next(iter(runs_in(Path(run))), Path(run))  # runs of one calibrate share their candidates: any of them serves
    file = read_scheme(folder)
    float_model = on_device(_float_model(folder, file, model), device)
    shapes = {name: (record.rows, record.columns) for name, record in file.layers.items()}
    candidates, saved = read_candidates(folder, shapes)
    candidates = candidates.on(device)
    given: dict[str, Any] = {"batch_size": batch_size, "memory": memory}
    place = folder / "candidates.json"
    recorded_settings, table = _settings_from(saved["settings"], place), _table_from(saved["table"], place)
    settings = replace(recorded_settings, **{name: value for name, value in given.items() if value is not None})
    clock = StageClock()
    recorded = Preprocessing.from_json(file.preprocessing)
    samples = _samples(_recorded_data(folder, file) if data is None else data, workers, recorded, float_model).on(device)
    _check_metric(metric, samples)
    with clock.stage("observe and fold"):
        calibration = split(draw(samples, settings.samples, settings.seed), settings.seed, settings.held_out, settings.batch_size)
        if settings.mirror:
            calibration = stages.mirrored(calibration)
        network = _with_latencies(stages.observe_network(float_model, _example(calibration), settings), [Budget.parse(budget)])
        stages.check_memory(network, calibration, replace(settings, sequential=False, parallel=False, bias_tuning=False))
        found = {name: (size.rows, size.columns) for name, size in network.costs.layers.items()}
        if found != shapes:
            different = sorted(set(found.items()) ^ set(shapes.items()))[0][0]
            raise SchemeMismatch(f"The model is not the one that {folder} was made from: layer {different} differs. Check --model.")
        check_saved(network, candidates, table, saved["choices"], place)
        reference = outputs_of(network.folded, calibration.held_out)
        targets = stages.batch_norm_targets(network, calibration, settings) if settings.bn_tuning and network.norms else {}
        recall = stages.recall_of_run(recall_in(cache), network, calibration, [reference], settings)
        recall = recall.under(digest(to_tensors(candidates).values()), saved["table"], settings.to_json(), metric and code_of(metric))
    judge = Judge(network, candidates, calibration.held_out, reference, file.task, metric, recall)
    light = replace(settings, sequential=False, bias_tuning=False)
    bench = Bench(network, calibration, light, candidates, candidates, table, judge, targets)
    about = {"model": _followed(folder, file, model), "data": file.data, "preprocessing": file.preprocessing}
    if data is not None:
        about["data"] = {"reference": absolute(data)} if isinstance(data, str) else {}
    return _finish(bench, Budget.parse(budget), about, {key: saved[key] for key in ("table", "choices", "settings")}, clock)


def _followed(folder: Path, file: SchemeFile, model: nn.Module | str | None) -> dict[str, Any]:
    """What a result records of its model: a reference that was followed, or was this user's own before; no stranger's."""
    if isinstance(model, str):
        return {"reference": absolute(model), "weights": file.model.get("weights")}
    return file.model if model is None or is_own(folder) else {}


def _recorded_data(folder: Path, file: SchemeFile) -> str:
    reference = file.data.get("reference")
    if not isinstance(reference, str) or not is_own(folder):
        raise InvalidSetting(f"{folder} does not name data that may be followed. Give inputs of the network with --data.")
    return reference


def _settings_from(data: Any, path: Path) -> CalibrateSettings:
    """The settings that candidates.json, at `path`, holds."""
    where = f"{path}: settings"
    texts = {**validated(dict[str, Any], data, where)}
    keep = validated(dict[str, str], texts.pop("keep", {}), f"{where}: keep")
    try:
        parsed = {
            "keep": {pattern: Precision.parse(text) for pattern, text in keep.items()},
            "sensitivity_base": Precision.parse(texts.pop("sensitivity_base", "float")),
        }
    except InvalidSetting as error:
        raise InvalidFile(f"{where}: {error}") from error
    return read_settings(CalibrateSettings, texts, where, parsed)


def _table_from(data: Any, path: Path) -> SensitivityTable:
    try:
        return SensitivityTable.from_json(data)
    except InvalidSetting as error:
        raise InvalidFile(f"{path}: table: {error}") from error


def check_saved(
    network: Network, candidates: Candidates, table: SensitivityTable, choices: Mapping[str, Sequence[str]], path: Path
) -> None:
    """Raise InvalidFile where candidates.json, at `path`, lacks what an allocation for the network needs, or is of another network."""
    found = {name: [str(precision) for precision in options] for name, options in network.choices.items()}
    if found != dict(choices):
        different = next(name for name in {**found, **choices} if found.get(name) != choices.get(name))
        said = f"choices of {different} are {choices.get(different)}, and its settings give {found.get(different)}"
        raise InvalidFile(f"{path}: {said}. Run calibrate again.")
    lacking = next((row for row in rows_to_measure(network.choices, table.pairs) if row not in table.measured), None)
    if lacking:
        raise InvalidFile(f"{path}: the table has no row of {lacking[0]} at {lacking[1]}. Run calibrate again.")
    for (name, bits), candidate in candidates.weights.items():
        bias = getattr(network.prepared.get_submodule(name), "bias", None)
        if (bias is None) != (candidate.bias is None) or (bias is not None and bias.shape != candidate.bias.shape):
            raise InvalidFile(f"{path}: the bias of {name} at W{bits} is not of the layer's shape. Run calibrate again.")


def load(folder: str | Path, model: nn.Module | str | None = None) -> nn.Module:
    """The saved model, ready to run on preprocessed inputs, its bits in `.scheme`; outputs are bitwise those that were saved.

    `model` is the float network's architecture (a network or a reference). It may be left out for a run that this user's own anybit
    wrote, and for timm:, torchvision: and hf: references; a reference in any other folder is code from elsewhere and is not followed.
    """
    canonical, _ = opened(folder, model)
    canonical.model.scheme = canonical.scheme
    return canonical.model


def opened(folder: str | Path, model: nn.Module | str | None = None) -> tuple[Canonical, SchemeFile]:
    """A run folder's canonical form and its scheme file; `model` as for `load`."""
    folder = Path(folder)
    file = read_scheme(folder)
    return read_canonical(folder, _float_model(folder, file, model), file), file


def inputs_for(folder: str | Path, file: SchemeFile, model: nn.Module, data: Any = None, workers: int = 0) -> Samples:
    """Samples for a run folder and its `model`: `data`, preprocessed as the run's own, or what the run was made with."""
    folder = Path(folder)
    reference = _recorded_data(folder, file) if data is None else data
    return _samples(reference, workers, Preprocessing.from_json(file.preprocessing), model)


def first_of(inputs: Samples, count: int | None) -> Samples:
    """The first `count` samples, all where None; raises where there are none."""
    if count is not None and count < 1:
        raise InvalidSetting(f"--samples {count} must be at least 1.")
    if len(inputs) == 0:
        raise InvalidInput("The data is empty. Give inputs of the network with --data.")
    return inputs if count is None else inputs.subset(range(min(count, len(inputs))))


def _float_model(folder: Path, file: Any, model: nn.Module | str | None, named_in: str = "scheme.json") -> nn.Module:
    """The float network of a folder: `model`, or the reference that `file`, read from `named_in`, holds."""
    if isinstance(model, nn.Module):
        model = covered(model)
        check_network(model)
        return model
    if model is not None:
        return load_model(model, file.model.get("weights"), file.task)
    reference = file.model.get("reference")
    if not isinstance(reference, str):
        raise InvalidSetting(f"{folder} does not say which network it is of. Give it: load(folder, model=...) or --model.")
    if not is_own(folder, named_in) and not re.fullmatch(r"hf:.+|(timm|torchvision):[\w.]+", reference):
        raise InvalidSetting(
            f"{folder} was not written by your own anybit, and its model reference {reference!r} is code. "
            "If you trust it, name it yourself: load(folder, model=...) or --model."
        )
    return load_model(reference, file.model.get("weights"), file.task)


def evaluate(
    model: nn.Module,
    data: Any,
    metric: Metric | None = None,
    task: str | None = None,
    batch_size: int = 128,
    workers: int = 0,
    device: str = "cpu",
    preprocessing: Preprocessing = Preprocessing(),
) -> dict[str, Any]:
    """What the task counts (`evaluation.score`), and the user's metric, of a network on labelled data."""
    model = covered(model)
    samples = _samples(data, workers, completed(preprocessing, model), model)
    if len(samples) == 0:
        raise InvalidInput("There is nothing to evaluate on: the data is empty.")
    check_inputs(model, samples)
    scores = evaluate_model(on_device(model, device), samples.on(device).batches(batch_size), task, metric)
    tell("result", **scores)
    return scores


def inspect(model: nn.Module, data: Any = None, **settings: Any) -> dict[str, Any]:
    """Layers, shapes, what is covered, and what each bit-width would cost.

    `data` needs one input. Without it, what only a forward pass shows is None (shapes of inputs and outputs, MACs, BOPs, folds, blocks),
    a layer that never runs is taken for covered, and the sizes are those with every batch norm unfolded.
    """
    wanted, model = CalibrateSettings(**settings), covered(model)
    check_network(model)
    network = stages.unobserved_network(model, wanted) if data is None else stages.observe_network(*_observable(model, data), wanted)
    blocks = {layer: unit.name for unit in network.units for layer in unit.layers if unit.name != layer}
    layers = {
        name: {
            "class": type(network.float_model.get_submodule(name)).__name__,
            "weight": list(float_weight(network.float_model.get_submodule(name)).shape),
            **_seen(network, name, data is not None),
            "folds": network.norms.get(name),
            "block": blocks.get(name),
            "choices": [str(precision) for precision in network.choices[name]],
            "bytes": {bits: network.costs.layer_bytes(name, Precision(bits)) for bits in wanted.weight_bits},
        }
        for name in network.names
    }
    uniform = {bits: network.costs.summary(network.uniform(bits, wanted.activation_bits[-1])) for bits in wanted.weight_bits}
    for row in uniform.values() if data is None else ():
        row["bops"] = None
    return {"layers": layers, "uncovered": dict(network.uncovered), "float_bytes": network.costs.float_bytes, "uniform": uniform}


def _observable(model: nn.Module, data: Any) -> tuple[nn.Module, Batch]:
    samples = _samples(data, 0, model=model)
    batch = next(iter(samples.subset(range(min(2, len(samples)))).batches(2)), None)
    if batch is None:
        raise InvalidInput("The data set is empty; inspect needs at least one input.")
    return copied(model).eval(), batch


def _seen(network: Network, name: str, observed: bool) -> dict[str, Any]:
    """One sample's shapes and multiply-accumulates of a layer; a layer that sees several rows a sample has their number in front."""
    if not observed:
        return {"input": None, "output": None, "macs": None}
    count = network.wiring.batch_size
    shapes = {"input": network.wiring.input_shapes[name], "output": network.wiring.operation(name).shape}
    single = {key: list(shape[1:] if shape[0] == count else (shape[0] // count, *shape[1:])) for key, shape in shapes.items()}
    return {**single, "macs": network.costs.layers[name].macs}


def save_all(results: Result | Sequence[Result], output: str | Path, overwrite: bool = False) -> list[Path]:
    """Write one result to `output`, or each of several to `output/<budget>/` with a common report.json in `output`."""
    output = Path(output)
    if isinstance(results, Result):
        return [results.save(output, overwrite)]
    if len(results) == 1:
        return [results[0].save(output, overwrite)]
    names = [str(result.report["budget"] or "largest").replace("/", "_") for result in results]
    with new_folder(output, overwrite) as draft:
        for name, result in zip(names, results, strict=True):
            (draft / name).mkdir()
            result.write(draft / name)
        reports = {name: result.report for name, result in zip(names, results, strict=True)}
        write_report(draft, {"version": 1, "budgets": reports})
        (draft / "report.html").write_text(runs_page(reports), encoding="utf8")
    for name in names:
        remember(output / name)
    return [output / name for name in names]


def preprocessing_of(run: str | Path) -> Preprocessing:
    """The preprocessing that a run recorded."""
    return Preprocessing.from_json(read_scheme(Path(run)).preprocessing)


def task_of(run: str | Path) -> str:
    """The task that a run recorded."""
    return read_scheme(Path(run)).task


def _samples(data: Any, workers: int, preprocessing: Preprocessing = Preprocessing(), model: nn.Module | None = None) -> Samples:
    return load_data(data, preprocessing, workers, model) if isinstance(data, str) else as_samples(data, workers, model)
