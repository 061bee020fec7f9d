"""Train one network for every bit-width."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from anybit.calls import public
from anybit.data.batches import check_finite
from anybit.data.tasks import Metric, labelled_outputs, outputs_of, task_of
from anybit.data.tasks import evaluate as evaluate_model
from anybit.environment import StageClock, environment
from anybit.errors import InvalidInput
from anybit.loops.processes import share_state
from anybit.loops.training import train_epochs
from anybit.networks import batchnorm
from anybit.networks.edges import observe_edge_ranges
from anybit.progress import plan, tell
from anybit.reports.bars import shown_in_notebooks
from anybit.roads.expected import training_stages
from anybit.roads.grow import few_batches, watched_batches
from anybit.roads.inputs import check_trains, checkpoint_place, claiming_checkpoint, described_inputs, on_device, training_inputs
from anybit.roads.keys import training_identity
from anybit.roads.result import test_scores
from anybit.settings import takes
from anybit.sources.inputs import check_outputs
from anybit.sources.preprocessing import Preprocessing
from anybit.supernets.prepared import bn_batches, held_out_split, make_multiquant, observe_supernet, to_store
from anybit.supernets.settings import SupernetSettings
from anybit.supernets.supernet import Supernet, uniform_schemes, width_scores


@public
@claiming_checkpoint
@shown_in_notebooks
@takes(SupernetSettings)
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
    """Train one network for every bit-width (MultiQuant): a supernet, of which any scheme of those bits is a subnet.

    model       a trained network, or a reference to one
    data        labelled training data: a data set, arrays, Samples, or a reference; a share is held out for the search
    weights, preprocessing, metric, workers, device  as for `calibrate`
    test        labelled data for the report of every bit-width after every epoch; nothing is chosen on it
    checkpoint  a file that is written after every epoch, and resumed from if it exists

    The result's weights are those of the store: rounded to 8 bits. Raises the errors of `grow`.
    """
    # Long, because it is the list of the road's stages, each of which needs results of those before it.
    options = SupernetSettings.of(**settings)
    for note in options.notes_on_effect():
        tell("note", note=note)
    place = checkpoint_place(checkpoint)
    clock = StageClock()
    float_model, samples, tests, provenance = training_inputs(
        model, weights, data, test, metric, preprocessing, workers, device, options.task, options.outputs
    )
    check_trains(samples, options.train.distill)
    ends = ["store", *(["test"] if tests is not None else [])]
    plan(training_stages(len(samples), options.train.epochs, 0 if tests is None else len(tests), ends), measured=None)
    with clock.stage("observe and fold"):
        if len(samples) < 2:
            raise InvalidInput(f"{len(samples)} training sample(s) are too few. Give at least two, one to train on and one to hold out.")
        fitting, _ = held_out_split(samples, options)
        few = few_batches(fitting, options.train)
        check_finite(few)
        share_state(float_model)
        network = observe_supernet(float_model, few[0].head(2), options)
        check_outputs(float_model, few[0])
        outputs = outputs_of(float_model, few[:1])
        task = task_of(outputs, few[0].reader, options.task, labelled_outputs(float_model, few[0]), float_model)
        method = make_multiquant(network, few, options, task.classes(outputs))
    edges = network.wiring.edges()
    supernet = Supernet(
        on_device(network.float_model, "cpu"),
        method,
        options,
        network.norms,
        network.costs,
        edges,
        task.name,
        about=provenance,
        example=few[0].head(2),
    )
    report: dict[str, Any] = {}
    bn = bn_batches(fitting, options) if options.multiquant.batch_norm == "reestimate" else None
    if tests is not None:
        report["float_test"] = evaluate_model(float_model, tests.batches(256), task, metric)
        watched = watched_batches(tests, options.train.seed)
    identity = None
    if place is not None:
        with clock.stage("contents of the data"):
            identity = training_identity(float_model, samples, few[0], options.to_json())
    with clock.stage("training"), torch.random.fork_rng(devices=[]):
        epochs = train_epochs(
            method,
            fitting,
            options.train,
            task,
            float_model if options.train.distill else None,
            batchnorm.folded_gammas(method.model, network.norms),
            place,
            identity,
            None if tests is None else lambda: {"widths": width_scores(supernet, bn, watched, metric)},
            passes=0 if tests is None else len(options.bits) * sum(map(len, [*(bn or []), *watched])),
        )
    if tests is not None:
        report["float_store"] = width_scores(supernet, bn, list(tests.batches(256)), metric)
    with clock.stage("store"):
        to_store(method)
        for scheme in uniform_schemes(supernet).values():
            supernet.learn(scheme, bn, lambda model: observe_edge_ranges(model, network.wiring, few))
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
        **described_inputs(provenance, network),
        "settings": options.to_json(),
        "environment": environment(),
        "stages": clock.stages,
    }
    tell("result", subnets=supernet.report["subnets"], **test_scores(report))
    return supernet
