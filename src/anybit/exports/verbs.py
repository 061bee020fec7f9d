"""From a run folder to a file that a runtime executes, one function per verb: export, verify, bench and profile."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anybit.onnx  # isort: skip  # noqa: F401 - raises if a package is missing

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import nn

from anybit.calls import public
from anybit.data.batches import Batch, call, check_finite, in_evaluation_mode, map_tensors, read_output
from anybit.data.samples import Samples
from anybit.data.tasks import Metric, check_metric_on, compare_exported, keeping_task, outputs_of
from anybit.environment import environment
from anybit.errors import InvalidInput, InvalidSetting
from anybit.exports.formats import check_new_file
from anybit.files.cache import LIMIT, Cache, open_cache, trim_cache
from anybit.networks.canonical import Canonical
from anybit.networks.observed import observe_network
from anybit.networks.options import LayerOptions
from anybit.onnx.file import (
    FUNCTIONS,
    LINEARS,
    PROBE,
    Exported,
    check_shapes,
    exported,
    ideal_bytes,
    load,
    measured_in,
    outputs,
    save,
    session,
)
from anybit.onnx.floats import input_tensors, probe_of
from anybit.onnx.latency import load_table, measure_latency
from anybit.onnx.latency import save_table as keep_table
from anybit.onnx.timing import faster, in_turns, openvino_runner
from anybit.onnx.verification import RUN, flipped_codes, verify_file
from anybit.progress import enter, plan, tell, track
from anybit.reports.bars import shown_in_notebooks
from anybit.runs.opened import Run, first_of, inputs_for, opened
from anybit.scheme import Precision, parsed_keep
from anybit.sources.inputs import as_samples, check_outputs, compared, load_data
from anybit.sources.labels import task_of_labels
from anybit.sources.models import adapted_network, load_model, with_model_defaults
from anybit.sources.preprocessing import Preprocessing, check_applies

EXAMPLES = 32
"""Inputs that an export runs: a few identify its tensors, all give the ranges that the run lacks."""

CHECKED = 64
"""Inputs on which codes are compared one by one."""


@public
def export(
    run: Run,
    onnx: str | Path,
    *,
    model: nn.Module | str | None = None,
    data: Any = None,
    tables: bool = False,
    weight_only: bool = False,
    overwrite: bool = False,
    cache: str | Path | bool = True,
) -> dict[str, Any]:
    """Write a run as an ONNX file with weights packed at their bits, which runs on int8 kernels. Returns a summary of the file.

    run     a run folder, or a result
    model   as for `load`;   data  inputs of the network, of which a few are run; by default those of the run
    tables  write SiLU, GELU and other functions of one tensor as tables of 256 codes: exact, and slower than computing them in float
    weight_only  keep the weights of linears with float inputs packed at run time, at 2, 4 or 8 bits: faster for a few rows
    cache   folder of the network's graph, without weights, for later exports, `verify` and `bench`; True: the user's cache, False: none

    Raises UnsupportedModel naming the operator if the network cannot be exported; no file is left then.
    """
    path = Path(onnx)
    check_new_file(path, overwrite)
    canonical, file = opened(run, model)
    example = _first(inputs_for(run, file, canonical.model, data), EXAMPLES, canonical.model)
    with _graphs(cache) as graph_cache:
        graphs = exported(canonical, example, {RUN: file.sha256}, tables, weight_only, cache=graph_cache)
    save(graphs.integer, path)
    layers = len(canonical.scheme)
    report = {
        "file": str(path),
        "bytes": path.stat().st_size,
        "ideal_bytes": ideal_bytes(canonical),
        "layers": layers,
        "integer_layers": len(graphs.plan.integer),
        "edges": len(set(graphs.plan.edges.values())),
        "measured_edges": list(measured_in(graphs.integer)),
        "text_length": graphs.length,
    }
    tell("result", **report)
    return report


@contextmanager
def _graphs(cache: str | Path | bool) -> Iterator[Cache]:
    """Yield the cache of exported graphs, which is trimmed to its limit after one is added."""
    graphs = open_cache(cache)
    yield graphs
    if graphs.folder is not None and graphs.counts["made"]:
        trim_cache(graphs.folder, LIMIT)


def _loaded(model: nn.Module | str, weights: str | Path | None) -> nn.Module:
    """Return the network, adapted; load it if it is a reference. Raises InvalidSetting if weights are given for a network."""
    if isinstance(model, str):
        return load_model(model, None if weights is None else str(weights))
    if weights is not None:
        raise InvalidSetting(
            f"The weights {weights} are for a model given by reference, but a network was given. Load them into it yourself."
        )
    return adapted_network(model)


def _exported_again(
    canonical: Canonical, provenance: Mapping[str, str], file: ir.Model, inputs: Samples, cache: str | Path | bool
) -> Exported:
    """Export the network in the way that the file was exported, and on the same inputs, so that its cached graph is reused."""
    properties = file.metadata_props
    tables, weight_only = properties.get(FUNCTIONS) == "tables", properties.get(LINEARS) == "packed"
    with _graphs(cache) as graph_cache:
        example = _first(inputs, EXAMPLES, canonical.model)
        return exported(canonical, example, provenance, tables, weight_only, measured_in(file), graph_cache)


def _first(samples: Samples, count: int, model: nn.Module) -> Batch:
    """Return the first samples. Raises InvalidInput or UnsupportedModel if they, or the model's outputs on them, are NaN or infinite."""
    if len(samples) == 0:
        raise InvalidInput("The data is empty. Give inputs of the network with --data.")
    batch = next(samples.subset(range(min(count, len(samples)))).batches(count))
    check_outputs(model, batch)
    return batch


@public
@shown_in_notebooks
@keeping_task()
def verify(
    run: Run,
    onnx: str | Path,
    *,
    model: nn.Module | str | None = None,
    data: Any = None,
    metric: Metric | None = None,
    samples: int | None = 64,
    workers: int = 0,
    cache: str | Path | bool = True,
) -> dict[str, Any]:
    """Check an exported file against its run on real inputs. In the report, `ok` says whether all promises hold, `failures` lists those
    that do not.

    run, model, cache   as for `export`, whose graph is reused
    data      inputs, labelled if accuracy is wanted; by default those of the run
    metric    a function of (outputs, labels), higher is better: compared as well
    samples   number of inputs to run, from the first (None: all); codes are compared one by one on at most 64

    Raises InvalidFile if the file is not one of anybit's, InvalidInput if the data do not fit the network.
    """
    # Long by its arguments and their documentation.
    path = Path(onnx)
    canonical, file = opened(run, model)
    integer = load(path)
    inputs = inputs_for(run, file, canonical.model, data, workers, metric)
    inputs = compared(canonical.model, inputs, file.outputs or {}, task_of_labels(None, file.task))
    first = _first(inputs, CHECKED, canonical.model)
    inputs = first_of(inputs, samples)
    batches = list(inputs.batches(CHECKED))
    check_finite(batches)
    check_shapes(integer, batches)
    check_metric_on(canonical.model, batches, metric)
    plan([("graph", 3.0), ("kernels and codes", 3.0), ("runtime", 1.0), ("simulation", 1.0)], measured=False)
    enter("graph")
    graphs = _exported_again(canonical, {RUN: file.sha256}, integer, inputs, cache)
    enter("kernels and codes")
    verdict = verify_file(path, integer, graphs, canonical.model, first)
    report = verdict.to_json() | {"quantized_layers": len(canonical.scheme), "environment": _environment()}
    if not verdict.numbers:  # it could not be run
        tell("result", ok=report["ok"], failures=report["failures"])
        return report
    predicted = _predicted(session(path, torch.get_num_threads()), canonical.model, batches)
    simulated = outputs_of(graphs.model, track(batches, "simulation"))
    report |= {"inputs": len(inputs)} | compare_exported(simulated, predicted, batches, file.task, metric)
    report["simulation"]["flipped_codes"] = flipped_codes(graphs, probe_of(first, 8))
    tell("result", ok=report["ok"], failures=report["failures"], accuracy=report.get("accuracy"))
    return report


def _predicted(running: Any, model: nn.Module, batches: Sequence[Batch]) -> torch.Tensor:
    """Run the file and read its outputs, in the containers in which the network returns them."""
    with torch.no_grad():
        output = call(model, batches[0].head(2).inputs)
    parts = []
    for batch in track(batches, "runtime"):
        tensors = [torch.from_numpy(array) for array in outputs(running, [batch])]
        parts.append(read_output(_filled(output, tensors), batch))
    return torch.cat(parts)


def _filled(output: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """Return `output` with `tensors` in place of its own, in order; `tensors` if it has containers that cannot be filled, such as
    dataclasses, of which no reader reads a tensor by name."""
    rest = iter(tensors)
    filled = map_tensors(output, lambda _: next(rest))
    return tensors if next(rest, None) is not None else filled


@public
def bench(
    run: Run,
    onnx: str | Path | None = None,
    *,
    model: nn.Module | str | None = None,
    data: Any = None,
    rounds: int = 20,
    batch_size: int = 1,
    threads: int = 1,
    cache: str | Path | bool = True,
) -> dict[str, Any]:
    """Measure the exported file's size against its bits, and its latency against the float network's in the same runtime, alternating.

    run, model, data, cache   as for `export`, whose graph is reused
    onnx         the exported file; None exports in memory
    rounds       rounds of both files, about 0.05 s each
    batch_size, threads   inputs per call, and threads of the runtime

    Returns a report: bytes, and for each runtime the median ratio of latencies with its quartiles.
    """
    canonical, file = opened(run, model)
    inputs = inputs_for(run, file, canonical.model, data)
    if batch_size > len(inputs):
        count = len(inputs)
        raise InvalidSetting(f"--batch-size={batch_size} is more than the data's {count} inputs. Give at most --batch-size={count}.")
    with _graphs(cache) as graph_cache:
        graphs = exported(canonical, _first(inputs, EXAMPLES, canonical.model), cache=graph_cache)
    integer = graphs.integer if onnx is None else load(Path(onnx))
    first = _first(inputs, max(batch_size, PROBE), canonical.model)
    check_shapes(integer, [first])
    report = measured(graphs.floating, integer, probe_of(first, batch_size), rounds, threads) | {"ideal_bytes": ideal_bytes(canonical)}
    tell("result", **{key: value for key, value in report.items() if key != "environment"})
    return report


@public
def profile(
    model: nn.Module | str,
    data: Any,
    *,
    weights: str | Path | None = None,
    preprocessing: Preprocessing = Preprocessing(),
    keep: Mapping[str, Precision | str] | None = None,
    rounds: int = 20,
    overwrite: bool = False,
    workers: int = 0,
    cache: str | Path | bool = True,
) -> dict[str, Any]:
    """Measure each layer's time in float and on integers on this machine, and store it for latency budgets.

    model, data, weights, preprocessing, keep  as for `calibrate`
    rounds      rounds of the exported networks, about 0.05 s each
    overwrite   measure again even if the network was measured on this machine and runtime before
    cache       folder of the network's graph, as for `export`

    Returns seconds per sample: of each layer, of its boundaries, and of whole networks.
    """
    check_applies(preprocessing, [data])
    network = _loaded(model, weights)
    adjusted = with_model_defaults(preprocessing, network, [data])
    samples = load_data(data, adjusted, workers, network) if isinstance(data, str) else as_samples(data, workers, network)
    batch = _first(samples, PROBE, network)
    ready = observe_network(in_evaluation_mode(network), batch, LayerOptions((8,), (8, None), parsed_keep(keep or {})))
    recorded = None if overwrite else load_table(ready)
    if recorded is None:
        with _graphs(cache) as graph_cache:
            table, provenance = measure_latency(ready, batch, rounds, cache=graph_cache)
        keep_table(ready, table, provenance)
    else:
        table, provenance = recorded
    tell("result", measured=provenance["measured"], rest=table.rest, layers=table.layers)
    return {
        "layers": {name: {**row, "boundaries": table.boundary * table.crossing([name])} for name, row in table.layers.items()},
        "rest": dict(table.rest),
        "recalled": recorded is not None,
        **provenance,
        "environment": _environment(),
    }


def measured(floating: ir.Model, integer: ir.Model, inputs: Batch, rounds: int, threads: int = 1) -> dict[str, Any]:
    """Measure bytes and latency of both graphs, alternating, in every installed runtime."""
    files = {name: ir.to_proto(graph).SerializeToString() for name, graph in (("float32", floating), ("exported", integer))}
    feeds = [tensor.numpy() for tensor in input_tensors(inputs)]
    runners = {}
    for name, graph in (("float32", floating), ("exported", integer)):
        running = session(graph, threads)
        feed = dict(zip([value.name for value in running.get_inputs()], feeds, strict=True))
        runners[name] = lambda running=running, feed=feed: running.run(None, feed)
    report: dict[str, Any] = {
        "bytes": len(files["exported"]),
        "float_bytes": len(files["float32"]),
        "batch_size": len(feeds[0]),
        "threads": threads,
        "rounds": rounds,
        "onnxruntime": _compared(runners, rounds),
        "environment": _environment(),
    }
    others = {name: openvino_runner(content, feeds, threads) for name, content in files.items()}
    if all(others.values()):
        report["openvino"] = _compared(others, rounds)
    return report


def _environment() -> dict[str, Any]:
    return environment() | {"onnxruntime": onnxruntime.__version__}


def _compared(runners: dict[str, Any], rounds: int) -> dict[str, Any]:
    times = in_turns(runners, rounds)
    medians = {f"{name}_seconds": float(np.median(values)) for name, values in times.items()}
    return medians | {"faster": faster(times, "exported", "float32")}
