"""Evaluate a network on labelled data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from anybit.calls import public
from anybit.data.tasks import Metric
from anybit.data.tasks import evaluate as evaluate_model
from anybit.errors import InvalidInput
from anybit.progress import tell
from anybit.reports.bars import shown_in_notebooks
from anybit.roads.inputs import check_inputs, on_device
from anybit.runs.names import SCHEME
from anybit.runs.opened import Run, load, recorded_preprocessing, recorded_task
from anybit.runs.scheme_file import read_scheme
from anybit.sources.inputs import check_outputs, compared, first_samples, samples_from
from anybit.sources.models import adapted_network, load_model, with_model_defaults
from anybit.sources.preprocessing import Preprocessing, check_applies, overridden


@public
@shown_in_notebooks
def evaluate(
    model: nn.Module | Run,
    data: Any,
    metric: Metric | None = None,
    task: str | None = None,
    batch_size: int = 128,
    workers: int = 0,
    device: str = "cpu",
    preprocessing: Preprocessing = Preprocessing(),
    outputs: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Score a network on labelled data: the task's own scores, and the user's metric. Returns name -> score.

    model   a network, a result, a run folder, or a reference as for `--model`; task, outputs and preprocessing default to those of
            the result or run
    data, workers, device, preprocessing  as for `calibrate`
    metric    a function of (outputs, labels), higher is better; labels such as {"boxes": ..., "labels": ...} are a list, one per sample
    outputs   names or numbers of the outputs to read (-> any weight); labels belong to the first, and the metric gets a tuple

    Raises InvalidInput for missing labels, or labels that do not fit the outputs.
    """
    recorded = recorded_outputs(model)
    network, preprocessing, task = _network(model, data, preprocessing, task)
    return scores_of(network, data, metric, task, batch_size, workers, device, preprocessing, outputs or recorded)


def scores_of(
    model: nn.Module,
    data: Any,
    metric: Metric | None,
    task: str | None,
    batch_size: int,
    workers: int,
    device: str,
    preprocessing: Preprocessing,
    outputs: Mapping[str, float] | None,
) -> dict[str, Any]:
    """Score a network as `evaluate` does, with the preprocessing of the options and the run."""
    samples = samples_from(data, workers, with_model_defaults(preprocessing, model, [data]), model, metric=metric)
    if len(samples) == 0:
        raise InvalidInput("The data is empty. Give at least one labelled sample.")
    network = on_device(model, device, samples)
    check_inputs(network, samples)
    samples = compared(network, samples, outputs or {}, task)
    check_outputs(network, first_samples(samples.on(device)).to(device))
    if not samples.labelled:
        raise InvalidInput(f"Evaluation needs labels, and this data has none. {samples.unlabelled}Give a labelled set to --data or --test.")
    scores = evaluate_model(network, samples.on(device).batches(batch_size), task, metric)
    tell("result", **scores)
    return scores


def _network(
    model: nn.Module | Run, data: Any, preprocessing: Preprocessing, task: str | None
) -> tuple[nn.Module, Preprocessing, str | None]:
    """Return (the network, preprocessing, task) of a network, result, run or reference."""
    if isinstance(model, nn.Module):
        check_applies(preprocessing, [data])
        return adapted_network(model), preprocessing, task
    if not isinstance(model, str | Path):
        recorded = Preprocessing.from_json(model.about.get("preprocessing", {}))
        check_applies(preprocessing, [data], recorded)
        return model.canonical.model, overridden(recorded, preprocessing), task or recorded_task(model)
    run = Path(model) if (Path(model) / SCHEME).is_file() else None
    return evaluated_network(run, str(model) if run is None else None, None, data, preprocessing, task)


def recorded_outputs(model: nn.Module | Run) -> Mapping[str, float]:
    """Return the outputs that a result or a run folder compared; {} if it names none, or `model` is neither."""
    if isinstance(model, nn.Module):
        return {}
    if not isinstance(model, str | Path):
        return model.about.get("outputs") or {}
    return (read_scheme(Path(model)).outputs or {}) if (Path(model) / SCHEME).is_file() else {}


def evaluated_network(
    run: Path | None, model: str | None, weights: str | None, data: Any, preprocessing: Preprocessing, task: str | None
) -> tuple[nn.Module, Preprocessing, str | None]:
    """Return (the network, preprocessing, task) of a run, by default as recorded, or of a float network given by reference."""
    recorded = Preprocessing() if run is None else recorded_preprocessing(run)
    check_applies(preprocessing, [data], recorded)
    if run is not None:
        return load(run, model), overridden(recorded, preprocessing), task or recorded_task(run)
    assert model is not None  # given unless there is a run
    return load_model(model, weights, task), preprocessing, task
