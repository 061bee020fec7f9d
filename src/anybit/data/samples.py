"""Samples: a data set, drawn and split by seed."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from anybit.data.batches import Batch, Reader, Targets, map_tensors, padded, stacked, tensors_in
from anybit.data.reading import Batches, Drawn, OtherItem, given, length_of, loaded, name_of, reading, whole
from anybit.errors import InvalidInput, InvalidSetting
from anybit.files.contents import contents_of

BATCH_BYTES = 2**32
"""Most bytes of a batch of images, whose size is an option."""


@dataclass(frozen=True)
class Samples:
    """A data set whose items are an input, or several and finally a label; `labelled` says which.

    `workers` processes load them; their number affects only speed, unless the data set draws at random: each worker draws from `seed` and
    its own number. `collate` makes a batch of items, as a DataLoader's collate_fn does. `split` returns (inputs, label) of an item, or of
    the result of a custom `collate`, if their order does not say it. `loading` are further arguments for the DataLoader; `reader` reads the
    model's output for these samples. `black` is the value of a black pixel in each channel, or in all, if known. An array data set returns
    whole batches through `__getitems__`. `name` is the data set's name in messages.
    `classes`: labels are class numbers, although they are stored as floats or in a column; `one_hot`: they are zeros and a one for each
    class, along this dimension of a batch's labels. `unlabelled` is a sentence that says why there are no labels, with a space at its end.
    `targets` splits an item as `split`, with labels that only a custom metric reads; `listed`: labels are such, `Targets`.
    """

    dataset: Dataset | Sequence
    labelled: bool
    workers: int = 0
    device: str = "cpu"
    seed: int = 0
    collate: Callable[[list], Any] = stacked
    loading: Mapping[str, Any] = field(default_factory=dict)
    reader: Reader | None = None
    split: Callable[[Any], tuple[Any, Any]] | None = None
    black: tuple[float, ...] | None = None
    name: str = ""
    classes: bool = False
    one_hot: int | None = None
    unlabelled: str = ""
    targets: Callable[[Any], tuple[Any, Any]] | None = None
    listed: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.labelled, bool):
            raise InvalidSetting(f"Samples: labelled {self.labelled!r} must be True or False.")
        if isinstance(self.workers, bool) or not isinstance(self.workers, int) or self.workers < 0:
            raise InvalidSetting(f"Samples: workers {self.workers!r} must be a whole number, at least 0.")

    def __len__(self) -> int:
        return length_of(self.dataset, self.name)

    def on(self, device: str) -> "Samples":
        """Return the samples with their batches on `device`."""
        return replace(self, device=device)

    def for_metric(self) -> "Samples":
        """Return the samples with the labels that only a custom metric reads, if they have such."""
        if self.targets is None:
            return self
        return replace(self, labelled=True, split=self.targets, targets=None, listed=True, unlabelled="")

    def subset(self, indices: Sequence[int]) -> "Samples":
        """Return only these samples, in this order."""
        return replace(self, dataset=Drawn(cast(Dataset, self.dataset), list(indices)))

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield all samples in order, `size` at a time. A sample that would be left alone joins the batch before it, since some networks
        break on batches of one (`squeeze()`)."""
        if size < 1 or self.workers < 0:
            raise InvalidSetting(f"batch size {size} must be at least 1 and workers {self.workers} at least 0.")
        needed = min(size, len(self)) * getattr(whole(self.dataset)[0], "sample_bytes", 0)
        if needed > BATCH_BYTES:
            raise InvalidSetting(
                f"A batch of {min(size, len(self))} such images takes {needed / 2**30:.1f} GiB. Give a smaller --batch-size or --size."
            )
        generator = torch.Generator().manual_seed(self.seed)
        parts, own = _parts(len(self), size), given(self.dataset)[1]
        batches = Batches(self.dataset, parts, self._collate, self.name)
        for part, batch in zip(parts, loaded(batches, min(self.workers, len(parts)), generator=generator, **self.loading), strict=True):
            labels, reader = batch.labels if self.labelled else None, batch.reader or self.reader
            if isinstance(labels, Tensor):
                labels = self._read(labels, batch, reader)
            places = tuple(part) if own is None else tuple(own[index] for index in part)
            inputs = map_tensors(batch.inputs, _as_float32)
            yield replace(batch, inputs=inputs, labels=labels, reader=reader, places=places).to(self.device)

    def _read(self, labels: Tensor, batch: Batch, reader: Reader | None) -> Tensor:
        """Return labels that are numbers, as the reader and their form ask for."""
        labels = labels if reader is None else reader.align(labels, batch)
        labels = labels if self.one_hot is None else from_one_hot(labels, self.one_hot)
        return as_class_numbers(labels) if self.classes else labels

    def by_length(self) -> "Samples":
        """Return the samples sorted by length, if the data set knows lengths, so that batches need less padding."""
        lengths = _lengths(self.dataset)
        return self if lengths is None else self.subset(sorted(range(len(self)), key=lambda index: lengths[index]))

    def _collate(self, items) -> Batch:
        if isinstance(items, Batch):  # an array data set has made the batch already
            return items
        if self.split is not None:
            return self._split(items)
        inputs, labels = self._collated(items), None
        if isinstance(inputs, Mapping) and "labels" in inputs:  # the names that transformers' collators use
            inputs = dict(inputs)
            return Batch(inputs, _as_labels(inputs.pop("labels")))
        if self.labelled:
            *inputs, labels = inputs
            inputs, labels = inputs[0] if len(inputs) == 1 else inputs, _as_labels(labels)
        return Batch(_as_inputs(inputs), labels)

    def _collated(self, items: list) -> Any:
        if self.collate is stacked:
            return stacked(items)
        with reading(f"The collate_fn of {self.name or name_of(self.dataset)}", "Repair it."):
            return self.collate(items)

    def _pair(self, item: Any, place: int) -> tuple[Any, Any]:
        """Return (inputs, label) of the item at a place of a batch."""
        assert self.split is not None
        try:
            return self.split(item)
        except InvalidInput as error:
            raise OtherItem(str(error), place) from error

    def _split(self, items: list) -> Batch:
        assert self.split is not None
        if self.collate is stacked:
            pairs = [self._pair(item, place) for place, item in enumerate(items)]
            read = [label for _, label in pairs]
            own, labels_of_own = padded([own for own, _ in pairs], [] if self.listed else read)
            inputs, labels = stacked(own), read if self.listed else stacked(labels_of_own) if self.labelled else None
        else:
            inputs, labels = self.split(self._collated(items))
        if self.listed:
            return Batch(_as_inputs(inputs), _targets_of(labels, len(items)))
        return Batch(_as_inputs(inputs), _as_labels(labels) if self.labelled else None)


def _as_float32(tensor: Tensor) -> Tensor:
    """Return floats of other types as float32, as arrays are read."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _as_inputs(inputs: Any) -> Any:
    """Return inputs in the form of a forward's arguments: one tensor, a tuple of several, or a dictionary."""
    if isinstance(inputs, (list, tuple)):
        return inputs[0] if len(inputs) == 1 and not isinstance(inputs[0], Mapping) else tuple(inputs)
    return inputs


def _targets_of(labels: Any, count: int) -> Targets:
    """Return the labels of a batch, a list, or a dictionary of tensors with a row per sample, as one label per sample."""
    if isinstance(labels, (list, tuple)) and len(labels) == count:
        return Targets(labels)
    if isinstance(labels, Mapping) and all(tensor.dim() and len(tensor) == count for tensor in tensors_in(labels)):
        return Targets(map_tensors(dict(labels), operator.itemgetter(row)) for row in range(count))
    raise InvalidInput(
        f"The labels of a batch of {count} samples are a {type(labels).__name__}, not a list with one label per sample. Let the collate_fn "
        "return one."
    )


def have_form_of_classes(labels: Tensor, outputs: Tensor) -> bool:
    """Return whether labels are floats, or in a column, one for each row of class scores."""
    if labels.is_complex() or labels.numel() == outputs.numel() or outputs.dim() < 2:
        return False
    in_column = labels.dim() == outputs.dim() and labels.shape[1] == 1
    return in_column or (labels.dim() == outputs.dim() - 1 and labels.is_floating_point())


def are_one_hot(labels: Tensor | np.ndarray, dimension: int) -> bool:
    """Return whether labels are zeros and one one along this dimension."""
    ones = labels == 1
    return bool(((labels == 0) | ones).all() and (ones.sum(dimension) == 1).all())


def from_one_hot(labels: Tensor, dimension: int) -> Tensor:
    """Return the class numbers of one-hot labels. Raises InvalidInput if some have no class, or several."""
    if not are_one_hot(labels, dimension):
        raise InvalidInput(
            "Labels are read as one-hot, by the task or because the first ones are, but later ones have no class or several. Give each "
            "one class, or name the task of independent labels: --task=multi-label."
        )
    return (labels == 1).long().argmax(dimension)


def as_class_numbers(labels: Tensor) -> Tensor:
    """Return class numbers as int64, without the dimension of a column. Raises InvalidInput for fractions, NaN and numbers beyond 2^53."""
    if (wrong := fractions(labels)).any():
        raise InvalidInput(
            f"A label is {float(labels[wrong][0]):g}, and labels are read as class numbers, by the task or because the first ones "
            "are whole. Give whole numbers, or leave such samples out."
        )
    return (labels[:, 0] if labels.dim() > 1 and labels.shape[1] == 1 else labels).long()


def fractions(labels: Tensor) -> Tensor:
    """Return which labels are no whole numbers that a float holds exactly."""
    if not labels.is_floating_point():
        return torch.zeros_like(labels, dtype=torch.bool)
    return (labels != labels.round()) | (labels.abs() >= 2**53)


def _as_labels(labels: Any) -> Tensor:
    """Return labels as a tensor, integers as int64. Raises InvalidInput for anything but numbers."""
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(
            f"Labels of type {type(labels).__name__} are not numbers: {' '.join(str(error).split())}. Give the inputs alone."
        ) from error
    return labels if labels.is_floating_point() or labels.is_complex() else labels.long()


def _parts(count: int, size: int) -> list[list[int]]:
    """Split the numbers up to `count` into runs of `size`; a single leftover joins the last run, more form a shorter one."""
    starts = list(range(0, count, size))
    if size > 1 and len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return [list(range(start, end)) for start, end in pairwise([*starts, count])]


def _lengths(dataset: Any) -> Sequence[int] | None:
    """Return the lengths of the samples, also through subsets, if the data set knows them; else None."""
    if isinstance(dataset, Subset):
        lengths = _lengths(dataset.dataset)
        return None if lengths is None else [lengths[index] for index in dataset.indices]
    return getattr(dataset, "lengths", None)


CHANNELS = (1, 3, 4)
"""Numbers of channels of grey and colour images, without and with transparency."""


class ArrayDataset(Dataset):
    """Images uint8 [N, H, W, C] (or [N, H, W], one channel), or any other array [N, ...], with labels [N] or None.

    Images are divided by 255, laid out as [N, C, H, W] and normalized by `mean` and `std` of each channel. Integers stay integers
    (tokens), complex numbers complex, other numbers become float32. Returns whole batches at once.
    """

    def __init__(self, x, y=None, mean: Sequence[float] | None = None, std: Sequence[float] | None = None):
        self.x, self.y = x, y
        self.is_image = x.dtype.name == "uint8" and x.ndim in (3, 4)
        if self.is_image and x.ndim == 4 and x.shape[3] not in CHANNELS and x.shape[1] in CHANNELS:
            raise InvalidInput(
                f"Arrays uint8 are images [N, H, W, channels], but these are {list(x.shape)}, as if channels came second. Write "
                "x.transpose(0, 2, 3, 1) of the array, or give floats, which are used unchanged."
            )
        self.mean = None if mean is None else torch.tensor(mean)[:, None, None]
        self.std = None if std is None else torch.tensor(std)[:, None, None]
        channels = x.shape[3 if self.is_image else 1] if x.ndim == 4 else 1
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and not (self.is_image or x.ndim == 4):
                raise InvalidSetting(f"--{name} applies to images; these arrays are {x.dtype} {list(x.shape)}. Leave it out.")
            if values is not None and len(values) not in (1, channels):
                raise InvalidSetting(f"--{name} has {len(values)} numbers for images of {channels} channels. Give one per channel.")

    def __len__(self) -> int:
        return len(self.x)

    def contents_digest(self) -> str:
        """Return a SHA-256 over the arrays and the way they are read."""
        return contents_of([self.x, self.y, self.mean, self.std])

    def __getitem__(self, index: int):
        batch = self.__getitems__([index])
        return batch.inputs[0] if batch.labels is None else (batch.inputs[0], batch.labels[0])

    def __getitems__(self, indices: list[int]) -> Batch:
        x = torch.from_numpy(self.x[indices])
        if self.is_image:
            x = (x.permute(0, 3, 1, 2) if x.dim() == 4 else x[:, None]).float() / 255
        if self.mean is not None:
            x = x - self.mean
        if self.std is not None:
            x = x / self.std
        labels = _labels(self.y, indices)
        if x.is_complex():
            return Batch(x.contiguous().to(torch.complex64), labels)
        return Batch(x.contiguous() if x.dtype in (torch.int64, torch.int32, torch.bool) else x.contiguous().float(), labels)


class NamedArrays(Dataset):
    """Several arrays of one length, under the names of the network's inputs, each read as by `ArrayDataset`, with labels or None."""

    def __init__(self, arrays: Mapping[str, Any], y=None, mean: Sequence[float] | None = None, std: Sequence[float] | None = None):
        self.y = y
        self.arrays = {name: ArrayDataset(x, None, *((mean, std) if x.ndim == 4 else ())) for name, x in arrays.items()}

    def __len__(self) -> int:
        return min(map(len, self.arrays.values()))

    def __getitem__(self, index: int):
        inputs, labels = {name: one[index] for name, one in self.arrays.items()}, _labels(self.y, [index])
        return inputs if labels is None else (inputs, labels[0])

    def __getitems__(self, indices: list[int]) -> Batch:
        inputs = {name: one.__getitems__(indices).inputs for name, one in self.arrays.items()}
        return Batch(inputs, _labels(self.y, indices))


def _labels(y: Any, indices: list[int]) -> Tensor | None:
    """Return the labels of these samples, integers as int64."""
    return None if y is None else _as_labels(np.asarray(y[indices]))


@dataclass(frozen=True)
class Calibration:
    """The fitting inputs and the held-out inputs of a run, disjoint, as batches in memory."""

    fitting: list[Batch]
    held_out: list[Batch]

    def count(self) -> tuple[int, int]:
        """Return the number of (fitting, held-out) inputs."""
        return sum(map(len, self.fitting)), sum(map(len, self.held_out))


def draw(samples: Samples, count: int, seed: int) -> Samples:
    """Draw `count` samples (all, if there are fewer) without replacement, by `seed`."""
    if len(samples) == 0:
        raise InvalidInput("The data set is empty. Give at least 2 inputs (a few hundred work well).")
    return samples.subset(torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:count].tolist())


def split(samples: Samples, seed: int, held_out: float, batch_size: int) -> Calibration:
    """Split once, by seed; `held_out` is the share excluded from fitting (at least one input on each side)."""
    total = len(samples)
    if total < 2:
        raise InvalidInput(f"{total} input(s) to calibrate on: at least 2 are needed, one to fit and one to hold out. Give a few hundred.")
    cut = min(max(1, round(total * held_out)), total - 1)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    return Calibration(
        list(samples.subset(order[cut:]).by_length().batches(batch_size)),
        list(samples.subset(order[:cut]).by_length().batches(batch_size)),
    )


def mirrored(calibration: Calibration) -> Calibration:
    """Add the mirror images of the fitting inputs. Raises InvalidSetting unless inputs are images, one 4-d tensor."""
    flipped = []
    for batch in calibration.fitting:
        if not isinstance(batch.inputs, Tensor) or batch.inputs.dim() != 4:
            raise InvalidSetting("mirror needs images: one 4-d input tensor. Leave it off for this data.")
        flipped.append(replace(batch, inputs=batch.inputs.flip(-1)))
    return Calibration([*calibration.fitting, *flipped], calibration.held_out)
