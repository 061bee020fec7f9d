"""Samples from the references of `--data`, or from data in memory."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    default_collate,
)

from anybit.data.batches import (
    Batch,
    check_finite,
    check_finite_outputs,
    check_plain,
    evaluating,
    naming_sample,
    predict,
    stacked,
    tensors_in,
)
from anybit.data.options import TEXT_SUFFIXES, parse_columns, suffix_of
from anybit.data.outputs import output_reader
from anybit.data.readers import token_reader
from anybit.data.reading import Drawn, elements_of, item_of, length_of
from anybit.data.samples import ArrayDataset, NamedArrays, Samples
from anybit.data.tasks import Metric
from anybit.data.texts import read_rows
from anybit.errors import InvalidInput, InvalidSetting, naming, some
from anybit.networks.copies import copied
from anybit.networks.states import check_finite_weights
from anybit.progress import tell
from anybit.sources.arrays import array_of, names_of_inputs, read_samples, samples_of_arrays
from anybit.sources.callables import call_user_function, import_optional, load_callable
from anybit.sources.images import ImageFolder
from anybit.sources.items import are_texts, as_column, is_batch, read_items, rows_of, runs, samples_of_items
from anybit.sources.labels import with_class_numbers
from anybit.sources.models import huggingface, is_transformers
from anybit.sources.preprocessing import Preprocessing, applicable
from anybit.sources.references import check_data, check_part, is_of_arrays, split_subset

BYTES = 2**31
"""Most bytes held of an iterable of unknown length; more are an error."""


def load_data(
    reference: str,
    preprocessing: Preprocessing = Preprocessing(),
    workers: int = 0,
    model: nn.Module | None = None,
    most: int | None = None,
) -> Samples:
    """Return the samples that `reference` names: an image folder, `file.npy`, `file.npz` or `file.npz#test`, texts, or a function that
    returns a data set or loader. Texts are tokenized by the tokenizer of `model`, and arrays may have the names of its inputs."""
    path, subset = split_subset(reference)
    check_part(path, subset)
    if is_of_arrays(path) and not Path(path).is_dir():
        if preprocessing.size or preprocessing.resize:
            raise InvalidSetting("--size and --resize apply to image folders; images in arrays are used unchanged.")
        return _read_by(model, read_samples(Path(path), subset, preprocessing, workers, model))
    if Path(path).is_dir():
        dataset = ImageFolder(Path(path), preprocessing, _channels_for(model, Path(path), preprocessing))
        for note in dataset.notes:
            tell("note", note=note)
        if dataset.unlabelled:
            tell("note", note=f"the images are used without labels: {dataset.unlabelled}")
        why = f"In {path}, {dataset.unlabelled}. " if dataset.unlabelled else f"The images of {path} are not in a folder for each class. "
        return _read_by(model, Samples(dataset, dataset.labelled, workers, black=preprocessing.black, unlabelled=why))
    if reference.startswith("hf:") or (suffix_of(path) in TEXT_SUFFIXES and Path(path).is_file()):
        return _texts(reference, preprocessing, workers, model)
    if ":" not in reference:
        with naming("--data="):
            check_data(reference)
    dataset = call_user_function(load_callable(reference, "--data"), f"--data={reference}")
    with naming(f"{reference}: "):
        return replace(as_samples(dataset, workers, model, most), name=reference)


def _channels_for(model: nn.Module | None, folder: Path, preprocessing: Preprocessing) -> int:
    """Return the number of channels of the images that the network reads: one if it runs on grey images alone, which is noted, else 3."""
    if model is None or any(isinstance(module, nn.Conv2d) and module.in_channels == 3 for module in model.modules()):
        return 3
    pixels = replace(preprocessing, mean=None, std=None)  # of as many channels as the images will have
    network = copied(model).cpu()
    if any(runs(_images(folder, pixels, channels).subset([0]), network) is not (channels == 1) for channels in (3, 1)):
        return 3
    tell("note", note="the network reads images of one channel, so those in folders are converted to grey")
    return 1


def _images(folder: Path, preprocessing: Preprocessing, channels: int) -> Samples:
    dataset = ImageFolder(folder, preprocessing, channels)
    return Samples(dataset, dataset.labelled)


def _texts(reference: str, preprocessing: Preprocessing, workers: int, model: nn.Module | None) -> Samples:
    """Return the samples of a text file or of a Hugging Face data set."""
    if not is_transformers(model):
        raise InvalidSetting(
            f"--data={reference} holds texts, which need the tokenizer of a Hugging Face model: give --model=hf:FOLDER. For another "
            "network give a function that returns a data set of tokens."
        )
    place, subset = split_subset(reference)
    heads = huggingface("heads", f"--data={reference}")
    if place.startswith("hf:"):
        import_optional("datasets", "datasets", f"--data={reference}")
        rows = heads.hub_rows(place[3:], subset, parse_columns(preprocessing.columns))
    else:
        rows = read_rows(Path(place), preprocessing.columns)
    samples = heads.text_samples(model, rows, reference, preprocessing.length, preprocessing.stride, workers)
    lacks = f"{reference} has no column of labels that this network's head reads: --columns='label=NAME' names one. "
    return samples if samples.labelled else replace(samples, unlabelled=lacks)


def _read_by(model: nn.Module | None, samples: Samples) -> Samples:
    """Give the samples the reader of a Hugging Face model, which has several outputs."""
    if samples.reader is not None or not is_transformers(model):
        return samples
    return replace(samples, reader=huggingface("heads", "the model").reader_of(model))


def as_samples(data: Any, workers: int = 0, model: nn.Module | None = None, most: int | None = None) -> Samples:
    """Turn data in memory into samples: Samples, a DataLoader, a data set, a list of samples or of batches, an iterable of either, a tensor
    or array, or (x, y). The forward of `model` determines which parts of an item are inputs.

    If `model` is a Hugging Face model, its head determines how outputs are read. A DataLoader provides its data set, its collate_fn and its
    way of loading; samples, order and batch size are chosen here. Of an iterable, the first `most` samples are held (None: all). Raises
    InvalidInput if the data is empty or of an unsupported kind.
    """
    if isinstance(data, (list, tuple)) and len(data) and isinstance(data[0], str):
        raise InvalidInput("Plain texts cannot be used: write them to a file (--data=texts.tsv), or give tokens.")
    if isinstance(data, (torch.Tensor, tuple, Mapping)):
        check_plain(data)
    return _read_by(model, _as_samples(_without_none(data), workers, model, most))


def _without_none(data: Any) -> Any:
    """Return (x, y, None) as (x, y), and (x, None) as x."""
    if not isinstance(data, tuple) or not any(map(_is_array, data)):
        return data
    parts = tuple(part for part in data if part is not None)
    return parts[0] if len(parts) == 1 < len(data) else parts if len(parts) < len(data) else data


def _as_samples(data: Any, workers: int, model: nn.Module | None, most: int | None) -> Samples:
    if isinstance(data, Samples):
        return _samples_by_names(data, model) if length_of(data.dataset, data.name) else data
    if isinstance(data, DataLoader):
        return _samples_of_loader(data, workers, model, most)
    if _is_array(data):
        return samples_of_arrays({"x": array_of(data)}, None, workers)
    if (of_arrays := _samples_of_columns(data, workers, model)) is not None:
        return of_arrays
    if _is_indexed(data):
        if length_of(data) == 0:
            raise InvalidInput("The data set is empty.")
        if isinstance(data, Sequence) and _holds_batches([item_of(data, index) for index in range(min(2, len(data)))], model):
            return samples_of_items(rows_of(elements_of(data)), workers, model)
        return samples_of_items(data, workers, model)
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes, Mapping)):
        return _samples_of_iterable(data, workers, model, most)
    raise InvalidInput(f"Data of type {type(data).__name__} cannot be used. Give a data set with a length, a loader, or arrays (x, y).")


def _samples_of_columns(data: Any, workers: int, model: nn.Module | None) -> Samples | None:
    """Return samples of a tuple or mapping of arrays, or of nested ones; None for other data."""
    if (nested := _nested_arrays(data)) is not None:
        if not len(nested):
            raise InvalidInput("The data set is empty.")
        return samples_of_items(nested, workers, model)
    columns = _columns_of(data)
    if columns and all(map(_is_array, columns.values())):
        if any(len(array) == 0 for array in columns.values() if array.ndim):
            raise InvalidInput("The data set is empty.")
        kind = dict if isinstance(data, Mapping) else tuple
        return _samples_of_arrays({str(name): array_of(array) for name, array in columns.items()}, kind, workers, model)
    return None


def _samples_by_names(samples: Samples, model: nn.Module | None) -> Samples:
    """Return the samples with dictionaries read as those of a data set: the name of an entry says whether it is the label."""
    if samples.split is not None or samples.reader is not None or samples.collate is not stacked:
        return samples
    item = item_of(samples.dataset, 0, samples.name)
    nested = samples.labelled and isinstance(item, (tuple, list)) and len(item) > 0
    texts = item[0] if nested else item
    targets = nested and isinstance(item[-1], (Mapping, list, tuple))
    if not targets and (not isinstance(texts, Mapping) or not (samples.labelled or "labels" in texts)):
        return samples
    read, form = read_items(samples.dataset, samples.workers, model)
    if targets and form.label is None and form.target is None:
        return samples
    if samples.labelled and form.label is None and form.target is None:
        raise InvalidInput(
            f"The data is said to be labelled, but its items are dictionaries of {some([str(key) for key in item])}, none of which is "
            "a label. Name it 'labels', or give anybit.Samples(data, labelled=False)."
        )
    if form.note:
        tell("note", note=form.note)
    return replace(samples, labelled=read.labelled, split=form, targets=read.targets, unlabelled=read.unlabelled)


def _columns_of(data: Any) -> Mapping[Any, Any]:
    """Return the columns of a mapping or a tuple, where lists of numbers or texts beside an array are arrays, too, as are two lists of one
    length whose elements differ in shape; {} for other data."""
    if isinstance(data, Mapping):
        return data
    if not isinstance(data, tuple) or len(data) < 2:
        return {}
    if _is_array(data[0]):
        return {place: _as_array(part) for place, part in enumerate(data)}
    columns = [_as_array(part) for part in data]
    if all(map(_is_array, columns)) and not _is_array(data[-1]) and _are_rows_and_labels(columns):
        columns[0] = columns[0].astype(np.float32) if columns[0].dtype == np.float64 else columns[0]  # as torch reads lists
        return dict(enumerate(columns))
    return dict(enumerate(data))


def _as_array(part: Any) -> Any:
    """Return a list of numbers or of texts as an array, anything else unchanged."""
    if are_texts(part):
        return np.asarray(part)
    return part if (array := as_column(part)) is None else array


def _are_rows_and_labels(columns: Sequence[Any]) -> bool:
    """Return whether two arrays are rows and their labels, not two samples: of one length, but different shapes."""
    return len(columns) == 2 and len(columns[0]) == len(columns[1]) and columns[0].shape != columns[1].shape


class _Nested(Sequence):
    """Items ((a, b), label) or ({"a": a, "b": b}, label) of arrays ((A, B), labels) or ({"a": A, "b": B}, labels)."""

    def __init__(self, inputs: Any, labels: Any):
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(self.inputs, Mapping):
            return {name: array[index] for name, array in self.inputs.items()}, self.labels[index]
        return tuple(array[index] for array in self.inputs), self.labels[index]


def _nested_arrays(data: Any) -> _Nested | None:
    """Return the items of ((A, B), labels) and ({"a": A}, labels), arrays of one length; None for other data."""
    if not isinstance(data, tuple) or len(data) != 2 or not isinstance(data[0], (tuple, list, Mapping)) or not len(data[0]):
        return None
    inputs = data[0] if isinstance(data[0], Mapping) else dict(enumerate(data[0]))
    labels = _as_array(data[1])
    if not _is_array(labels) or not all(map(_is_array, inputs.values())):
        return None
    arrays = {str(name) if isinstance(data[0], Mapping) else f"input {name}": array_of(array) for name, array in inputs.items()}
    checked = samples_of_arrays(arrays, array_of(labels), 0, where="The data: ").dataset
    assert isinstance(checked, NamedArrays | ArrayDataset)
    own = map(ArrayDataset, arrays.values())
    return _Nested(dict(zip(inputs, own, strict=True)) if isinstance(data[0], Mapping) else tuple(own), checked.y)


def _is_array(data: Any) -> bool:
    return isinstance(data, (torch.Tensor, np.ndarray))


def _is_indexed(data: Any) -> bool:
    """Return whether the data is a list, or a data set read by index."""
    indexed = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    return indexed and not isinstance(data, (str, bytes, Mapping, IterableDataset))


def _samples_of_arrays(columns: dict[str, np.ndarray], kind: type, workers: int, model: nn.Module | None) -> Samples:
    """Return samples of arrays whose rows form items, tuples or dictionaries: (x, y), (x1, x2) of a network with two inputs, ..."""
    samples_of_arrays(_in_messages(columns, kind, model), None, workers, where="The data: ")
    dataset = samples_of_arrays(columns, None, workers).dataset
    arrays = dataset.arrays if isinstance(dataset, NamedArrays) else {"x": dataset}
    items, form = read_items(_Rows(arrays, kind), workers, model)
    inputs = [str(key) for key in form.inputs or columns]
    names = inputs if form.named else ["x"] if len(inputs) == 1 else names_of_inputs(model)[: len(inputs)]
    if form.note:
        tell("note", note=form.note)
    if form.whole or len(names) < len(inputs):
        return items
    label = None if form.label is None else columns[str(form.label)]
    return samples_of_arrays({name: columns[key] for name, key in zip(names, inputs, strict=True)}, label, workers)


def _in_messages(columns: Mapping[str, np.ndarray], kind: type, model: nn.Module | None) -> dict[str, np.ndarray]:
    """Return the arrays under the names that they have for the user: those of a tuple have places only."""
    if kind is dict:
        return dict(columns)
    if len(columns) == 2 and len(names_of_inputs(model)) < 2:
        return dict(zip(("inputs", "labels"), columns.values(), strict=True))
    return {f"rows in element {place}": array for place, array in columns.items()}


class _Rows(Sequence):
    """Arrays of one length as items, tuples or dictionaries."""

    def __init__(self, arrays: Mapping[str, Any], kind: type):
        self.arrays, self.kind = arrays, kind

    def __len__(self) -> int:
        return min(map(len, self.arrays.values()))

    def __getitem__(self, index: Any) -> Any:
        row = {name: array[index] for name, array in self.arrays.items()}
        return row if self.kind is dict else tuple(row.values())


def _holds_batches(elements: Sequence, model: nn.Module | None) -> bool:
    """Return whether the network runs on these elements of a list as batches, not as samples. Raises InvalidInput if it runs on both."""
    if model is None or not all(map(is_batch, elements)):
        return False
    answers, network = [], copied(model).cpu()
    for items in (elements, rows_of(elements)):
        try:
            answers.append(runs(read_items(items, 0, model)[0], network))
        except InvalidInput:
            answers.append(False)
    if all(answers):
        raise InvalidInput(
            "Elements of the data run both as samples and as batches. Say which: anybit.Samples(data, labelled=False) if each is "
            "a sample (True if the last of its tensors is the label), torch.utils.data.DataLoader(list(data), batch_size=None) if each "
            "is a batch."
        )
    return answers[1]


def _samples_of_iterable(data: Iterable, workers: int, model: nn.Module | None, most: int | None) -> Samples:
    """Return samples of an iterable: a stream of samples, or of batches. Raises InvalidInput if it is empty."""
    iterator = elements_of(data)
    first = list(islice(iterator, 2))
    if not first:
        raise InvalidInput("The data set is empty.")
    batches = not isinstance(data, IterableDataset) and _holds_batches(first, model)
    return samples_of_items(_held(chain(first, iterator), batches, most), workers, model)


def _held(elements: Iterable[Any], batches: bool, most: int | None) -> list[Any]:
    """Return samples of an iterable: the first `most` (None: all). Raises InvalidInput if all take more than BYTES."""
    held: list[Any] = []
    size = 0
    for element in elements:
        held += rows_of([element]) if batches else [element]
        size += sum(tensor.nbytes for tensor in tensors_in(element))
        if most is not None and len(held) >= most:
            tell("note", note=f"the first {most} samples of data that has no length are used")
            return held[:most]
        if size > BYTES:
            raise InvalidInput(
                f"The data has no length, and its first {len(held)} samples take {size >> 20} MiB. Give a data set with a length."
            )
    return held


def _sampled(loader: DataLoader) -> Any:
    """Return the loader's data set, or the subset that its sampler names; other samplers are noted, since samples are drawn here."""
    batches = loader.batch_sampler
    sampler: Any
    if type(batches) is BatchSampler:
        sampler = batches.sampler
    elif isinstance(batches, Sequence):
        sampler = [index for batch in batches for index in batch]
    else:
        sampler = batches
    if isinstance(sampler, SubsetRandomSampler):
        sampler = list(sampler.indices)
    everything = isinstance(sampler, RandomSampler) and not sampler.replacement and sampler.num_samples >= len(sampler.data_source)
    if isinstance(sampler, SequentialSampler) or everything:
        return loader.dataset
    if isinstance(sampler, (Sequence, np.ndarray, torch.Tensor)):
        indices = [int(index) for index in sampler]
        if len(set(indices)) == len(indices):
            return Drawn(loader.dataset, indices)
    tell(
        "note",
        note=f"the {type(sampler).__name__} of the DataLoader is not used: samples are drawn evenly from its whole data set. For some of "
        "them give a torch.utils.data.Subset",
    )
    return loader.dataset


def _samples_of_loader(loader: DataLoader, workers: int, model: nn.Module | None, most: int | None) -> Samples:
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        held = _held(elements_of(loader), True, most)
        if not held:
            raise InvalidInput("The data set is empty.")
        return samples_of_items(held, workers, model)
    dataset = _sampled(loader)
    loading = {name: getattr(loader, name) for name in ("worker_init_fn", "multiprocessing_context", "timeout")}
    if length_of(dataset) == 0:
        raise InvalidInput("The data set is empty.")
    if loader.collate_fn is default_collate:
        return replace(samples_of_items(dataset, workers or loader.num_workers, model), loading=loading)
    return replace(samples_of_items(dataset, workers or loader.num_workers, model, loader.collate_fn), loading=loading)


def samples_from(
    data: Any,
    workers: int,
    preprocessing: Preprocessing = Preprocessing(),
    model: nn.Module | None = None,
    most: int | None = None,
    metric: Metric | None = None,
) -> Samples:
    """Turn a reference, or data in memory, into samples: the first `most` of an iterable; with the labels that only a metric reads, if
    there is one."""
    if isinstance(data, str):
        samples = load_data(data, applicable(preprocessing, data), workers, model, most)
    else:
        samples = as_samples(data, workers, model, most)
    return samples if metric is None else samples.for_metric()


def first_samples(samples: Samples) -> Batch:
    """Return the first two samples, or the only one."""
    if len(samples) == 0:
        raise InvalidInput("The data set is empty. Give at least one input.")
    return next(samples.on("cpu").subset(range(min(2, len(samples)))).batches(2))


@torch.no_grad()
def check_outputs(model: nn.Module, batch: Batch) -> None:
    """Raise InvalidInput if an input is NaN or infinite; UnsupportedModel if the model's outputs are, naming the weight if one is."""
    check_finite([batch])
    own = copied(model)
    with evaluating(own), naming_sample(own, batch, "the first batch of the data"):
        outputs = predict(own, batch)
    if not torch.isfinite(outputs).all():
        check_finite_weights(model)
        check_finite_outputs([outputs], [batch])


def compared(model: nn.Module, samples: Samples, outputs: Mapping[str, float], task: str | None = None) -> Samples:
    """Return the samples with a reader of the outputs to compare, `outputs` or all, if the network has several, and with class numbers as
    `with_class_numbers` reads them.

    Raises InvalidSetting if `outputs` names an unknown one, or the samples have the reader of a head.
    """
    if samples.reader is not None:
        if outputs:
            raise InvalidSetting(f"--outputs: this network's head for {samples.reader.task} already determines the outputs. Leave it out.")
        return with_class_numbers(model, samples, task)
    batches = [next(samples.subset(range(count)).batches(count)) for count in (2, 3) if count <= len(samples)] or [first_samples(samples)]
    own = copied(model)  # a first pass may change it
    reader, others = output_reader(own, batches, outputs)
    if reader is not None and len(reader.outputs) > 1:
        shown = ", ".join(map(str, reader.outputs))
        tell("note", note=f"outputs compared, each by its squared error over its mean square: {shown}. --outputs chooses and weighs them")
    if others:
        tell("note", note="outputs not compared: " + ", ".join(f"{name} ({why})" for name, why in others.items()))
    return with_class_numbers(model, replace(samples, reader=reader or token_reader(own, batches[0])), task)
