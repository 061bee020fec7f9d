"""The inputs of a road: its network, samples and test data, checked before any work."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from anybit.data.batches import Batch, in_evaluation_mode, join
from anybit.data.samples import Calibration, Samples
from anybit.data.tasks import Metric, check_metric
from anybit.errors import InvalidInput, InvalidSetting, naming
from anybit.files.whole import check_place, claimed
from anybit.loops.processes import join_processes
from anybit.networks.coarse import coarse_in_words
from anybit.networks.copies import checked_copy, copied
from anybit.networks.observed import ObservedNetwork, activation_bits
from anybit.networks.refusals import check_network
from anybit.networks.wiring import observe
from anybit.runs.names import SUPERNET_JSON
from anybit.runs.trusted import is_trusted
from anybit.sources.callables import absolute
from anybit.sources.images import common_classes
from anybit.sources.inputs import check_outputs, compared, first_samples, samples_from
from anybit.sources.labels import task_of_labels, with_class_numbers
from anybit.sources.libraries import DRAWN
from anybit.sources.models import adapted_network, load_model, with_model_defaults
from anybit.sources.preprocessing import Preprocessing, check_applies
from anybit.sources.references import RANDOM, check_device
from anybit.supernets.supernet import Supernet

Function = TypeVar("Function", bound=Callable[..., Any])


def follow_model(
    model: nn.Module | str, weights: str | Path | None, data: Any, test: Any, preprocessing: Preprocessing, task: str | None
) -> tuple[nn.Module, Preprocessing, dict[str, Any]]:
    """Return (the network, the preprocessing, the provenance that a run records, with absolute references).

    Class folders of data and test data are numbered together.
    """
    check_applies(preprocessing, [data, test])
    provenance: dict[str, Any] = {}
    if isinstance(model, str):
        place = weights if weights in (None, RANDOM) else str(Path(weights).resolve())
        provenance["model"] = {"reference": absolute(model), "weights": place}
        model = load_model(model, provenance["model"]["weights"], task)
    elif weights is not None:
        raise InvalidSetting(
            f"The weights {weights} are for a model given by reference, but a network was given. Load them into it yourself."
        )
    model = adapted_network(model)
    check_network(model)
    preprocessing = with_model_defaults(preprocessing, model, [data, test])
    if preprocessing.classes is None and (classes := common_classes([data, test])):
        preprocessing = replace(preprocessing, classes=classes)
    if isinstance(data, str):
        provenance |= {"data": {"reference": absolute(data)}, "preprocessing": preprocessing.to_json()}
    return model, preprocessing, provenance


def read_alike(tests: Samples | None, samples: Samples, model: nn.Module, task: str | None) -> Samples | None:
    """Return the test samples with the samples' reader, unless they have one, and labels as the task, or the model's outputs, ask for.
    Rows of labels in the samples that are not one-hot are several labels in the tests, too."""
    if tests is None:
        return None
    tests = replace(tests, reader=samples.reader) if tests.reader is None else tests
    labels = first_samples(samples).labels
    return with_class_numbers(model, tests, task, one_hot=not isinstance(labels, Tensor) or labels.dim() < 2)


def unread_in_words(network: ObservedNetwork) -> str:
    """Write a note on layers on which no compared output depends; empty if there are none."""
    if not network.unread:
        return ""
    names = ", ".join(network.unread)
    return f"no compared output depends on {names}, so a budget gives them the fewest bits. Change that with --outputs or --keep"


def notes_on(network: ObservedNetwork) -> list[str]:
    """Return the notes to print about a network before the work."""
    return [note for note in (unread_in_words(network), *coarse_in_words(network.coarse, activation_bits(network))) if note]


def described_inputs(provenance: Mapping[str, Any], network: ObservedNetwork, more: Sequence[str] = ()) -> dict[str, Any]:
    """Return what a report says of a run's inputs: notes on the network, such as random weights, and `more`; and the preprocessing."""
    drawn = DRAWN if provenance.get("model", {}).get("weights") == RANDOM else ""
    notes = [*filter(None, [drawn]), *notes_on(network), *more]
    preprocessing = provenance.get("preprocessing")
    return ({"notes": notes} if notes else {}) | ({"preprocessing": preprocessing} if preprocessing else {})


def check_metric_has_labels(metric: Metric | None, samples: Samples) -> None:
    if metric is not None and not samples.labelled:
        raise InvalidSetting(
            f"A metric needs labels, and these inputs have none. {samples.unlabelled}Give labelled data to --data or --test, or drop "
            "--metric."
        )
    if samples.reader is not None and samples.reader.task is not None:
        check_metric(metric, samples.reader.task)


def check_trains(samples: Samples, distill: float) -> None:
    """Raise InvalidInput if training needs labels that the samples lack."""
    if distill < 1 and not samples.labelled:
        raise InvalidInput(f"Training needs labels, and this data has none. {samples.unlabelled}Give labelled data, or --distill=1.")


def checked_tests(samples: Samples, model: nn.Module) -> Samples:
    """Return the test samples. Raises InvalidInput before any work if they have no labels or do not fit the model."""
    if not samples.labelled or len(samples) == 0:
        raise InvalidInput(f"The test data has no samples with labels. {samples.unlabelled}Give a labelled set to --test, or leave it out.")
    check_inputs(model, samples)
    return samples


def check_inputs(model: nn.Module, samples: Samples) -> None:
    """Raise InvalidInput if the model fails on the first samples."""
    observe(copied(model).cpu(), first_samples(samples))


def on_device(model: nn.Module, device: str, samples: Samples | None = None) -> nn.Module:
    """Return a copy of the model on `device`; with samples, check that it reproduces the model's outputs on the first of them."""
    with naming("--device="):
        check_device(device)
    model = copied(model) if samples is None else checked_copy(model, first_samples(samples))
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidSetting(f"--device={device} cannot be used here: {error}") from error


def example_of(calibration: Calibration) -> Batch:
    """Return two fitting inputs, or one if batches of one cannot be joined."""
    padded = calibration.fitting[0].mask is not None
    example = calibration.fitting[-1 if padded else 0].head(2)  # texts are sorted by length: the longest
    if len(example) == 1 and len(calibration.fitting) > 1 and not padded:
        with suppress(RuntimeError):  # if their shapes differ
            return join([example, calibration.fitting[1].head(1)])
    return example


def checkpoint_place(checkpoint: str | Path | None) -> Path | None:
    """Return the file of the checkpoint. Raises InvalidSetting before any work if it cannot be written."""
    if checkpoint is None:
        return None
    path = Path(checkpoint)
    check_place(path, "--checkpoint")
    if path.is_dir():
        raise InvalidSetting(f"{path} is a folder. Name a file with --checkpoint.")
    return path


def claiming_checkpoint(function: Function) -> Function:
    """Decorate a training: of several at once with one checkpoint, the first goes on, and the others are refused."""

    @functools.wraps(function)
    def called(*arguments: Any, **keywords: Any) -> Any:
        place = checkpoint_place(keywords.get("checkpoint"))
        if place is None or os.environ.get("RANK", "0") != "0":  # processes of one training share it
            return function(*arguments, **keywords)
        with claimed(place, "--checkpoint"):
            return function(*arguments, **keywords)

    return called  # type: ignore[return-value]


def training_inputs(
    model: nn.Module | str,
    weights: str | Path | None,
    data: Any,
    test: Any,
    metric: Metric | None,
    preprocessing: Preprocessing,
    workers: int,
    device: str,
    task: str | None,
    outputs: Mapping[str, float],
) -> tuple[nn.Module, Samples, Samples | None, dict[str, Any]]:
    """Return (the float network, training samples, test samples, their provenance), on this process's device."""
    if metric is not None and test is None:
        raise InvalidSetting("A metric is reported on test data, but there is none. Give --test, or leave out --metric.")
    model, preprocessing, provenance = follow_model(model, weights, data, test, preprocessing, task)
    device = join_processes(device)
    samples = samples_from(data, workers, preprocessing, model).on(device)
    float_model = in_evaluation_mode(on_device(model, device, samples))
    samples = compared(float_model, samples, outputs, task)
    tests = None
    if test is not None:
        tests = checked_tests(samples_from(test, workers, preprocessing, model, metric=metric).on(device), float_model)
    return float_model, samples, read_alike(tests, samples, float_model, task), provenance


def supernet_data(run: str | Path | Supernet, supernet: Supernet, data: Any, workers: int, metric: Metric | None = None) -> Samples:
    """Return the data, preprocessed as for the supernet; by default the recorded data of the user's own supernet."""
    if data is None:
        data = supernet.about.get("data", {}).get("reference")
        if not isinstance(data, str) or isinstance(run, Supernet) or not is_trusted(Path(run), SUPERNET_JSON):
            raise InvalidSetting("The supernet does not name data that anybit may load. Give its training data with --data.")
    preprocessing = Preprocessing.from_json(supernet.about.get("preprocessing", {}))
    samples = samples_from(data, workers, preprocessing, supernet.model, metric=metric)
    samples = compared(supernet.network, samples, supernet.settings.outputs, task_of_labels(supernet.settings.task, supernet.task))
    check_outputs(supernet.network, first_samples(samples))
    return samples
