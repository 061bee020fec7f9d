"""A batch is what `forward` takes, plus optional labels; samples become batches here and nowhere else.

The one seeded split into fitting and held-out inputs is made here, once a run.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from anybit.errors import InvalidInput, InvalidSetting

Inputs = Tensor | tuple | dict


class Reader(Protocol):
    """What a task reads in a model's output, and scores of its own beside those of `evaluation`."""

    task: str
    unit: str
    """What a prediction is of: "samples", or the tokens, texts or windows that a sample has."""

    def read(self, output: Any, batch: "Batch") -> Tensor:
        """One row a prediction, of one shape in every batch: what is compared with the float model's, and scored."""

    def score(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """By name; {} where there are none."""


@dataclass(frozen=True)
class Batch:
    """`inputs`: a tensor, a tuple (positional) or a dict (keyword arguments); `labels`: int64 [N] or None.

    `reader` reads the model's output; None reads its first tensor.
    """

    inputs: Inputs
    labels: Tensor | None = None
    reader: Reader | None = None

    def __len__(self) -> int:
        return len(first_tensor(self.inputs))

    @property
    def mask(self) -> Tensor | None:
        """bool [N, T]: which of the tokens are real and which padding; None where samples are not padded to one length."""
        mask = self.inputs.get("attention_mask") if isinstance(self.inputs, dict) else None
        return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`."""
        labels = None if self.labels is None else self.labels.to(device)
        return Batch(map_tensors(self.inputs, lambda t: t.to(device)), labels, self.reader)

    def head(self, count: int) -> "Batch":
        """The inputs of its first samples, without labels."""
        return Batch(map_tensors(self.inputs, lambda tensor: tensor[:count]), None, self.reader)

    def parts(self, size: int) -> Iterator["Batch"]:
        """The inputs of its samples, at most `size` at a time, without labels."""
        for start in range(0, len(self), size):
            yield Batch(map_tensors(self.inputs, lambda tensor, start=start: tensor[start : start + size]), None, self.reader)


def predict(model: nn.Module, batch: Batch) -> Tensor:
    """What the batch's reader reads in the output of `model`."""
    output = call(model, batch.inputs)
    return first_tensor(output) if batch.reader is None else batch.reader.read(output, batch)


def real(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """The values of `tensor` that belong to real tokens, by `mask` [N, T]; all of it where its dimensions are not those of tokens.

    Tokens run along the last dimension but one, [N, ..., T, features], or are flattened, [N T, features]; what all samples share,
    [1, ..., T, features], has a real token where any sample has.
    """
    if mask is None or tensor.dim() < 2:
        return tensor
    if tensor.dim() == 2:
        return tensor[mask.flatten()] if len(tensor) == mask.numel() > len(mask) else tensor
    if len(tensor) == 1:
        mask = mask.any(0, keepdim=True)
    if len(tensor) != len(mask) or tensor.shape[-2] != mask.shape[1]:
        return tensor
    between = [1] * (tensor.dim() - 3)
    return tensor[mask.view(len(mask), *between, -1).expand(tensor.shape[:-1])]


def call(model: nn.Module, inputs: Inputs) -> Any:
    """`model` on the inputs of a batch."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def map_leaves(value: Any, leaf: type, function: Callable[[Any], Any]) -> Any:
    """`value` with every `leaf` in its nested tuples, lists and dicts mapped."""
    if isinstance(value, leaf):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_leaves(item, leaf, function) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple takes its fields one by one
        return type(value)(*(map_leaves(item, leaf, function) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_leaves(item, leaf, function) for item in value)
    return value


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """`value` with every tensor mapped."""
    return map_leaves(value, Tensor, function)


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    if hasattr(value, "__dataclass_fields__"):
        return [tensor for name in value.__dataclass_fields__ for tensor in tensors_in(getattr(value, name))]
    return []


def first_tensor(value: Any) -> Tensor:
    """The first tensor in `value`: the logits, where a model gives several outputs."""
    tensors = tensors_in(value)
    if not tensors:
        raise InvalidInput(f"No tensor in a {type(value).__name__}: inputs and outputs must hold at least one.")
    return tensors[0]


def stacked(items: list) -> Any:
    """Items as one batch, tensor beside tensor; raises InvalidInput where their shapes differ."""
    try:
        return default_collate(items)
    except TypeError as error:
        raise InvalidInput(
            f"The samples cannot be made a batch: {error}. Give tensors, tuples or dicts, or a loader's collate_fn."
        ) from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InvalidInput(f"The samples do not fit into one batch: {reason}. Give all the same shape (--size for pictures).") from error


@dataclass(frozen=True)
class Samples:
    """A data set whose items are an input, or (input, label); `labelled` says which.

    `workers` processes load them, which changes nothing but speed, unless the data set draws at random: each worker draws from `seed`
    and its own number. `collate` makes a batch of items, as a DataLoader's collate_fn does;
    `loading` are other arguments for the DataLoader; `reader` reads the model's output on them. An array data set answers whole batches
    through `__getitems__`.
    """

    dataset: Dataset | Sequence
    labelled: bool
    workers: int = 0
    device: str = "cpu"
    seed: int = 0
    collate: Callable[[list], Any] = stacked
    loading: Mapping[str, Any] = field(default_factory=dict)
    reader: Reader | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def on(self, device: str) -> "Samples":
        """The same samples, their batches on `device`."""
        return replace(self, device=device)

    def subset(self, indices: Sequence[int]) -> "Samples":
        """These samples alone, in this order."""
        return replace(self, dataset=Subset(self.dataset, list(indices)))

    def batches(self, size: int) -> Iterator[Batch]:
        """All samples in order, `size` at a time."""
        if size < 1 or self.workers < 0:
            raise InvalidSetting(f"batch size {size} must be at least 1 and workers {self.workers} at least 0.")
        generator = torch.Generator().manual_seed(self.seed)
        how: dict[str, Any] = {"num_workers": self.workers, "collate_fn": self._collate, "generator": generator, **self.loading}
        for batch in DataLoader(self.dataset, batch_size=size, **how):
            labels = batch.labels if self.labelled else None
            yield replace(batch, labels=labels, reader=batch.reader or self.reader).to(self.device)

    def by_length(self) -> "Samples":
        """The same samples with those of like length together, where the data set tells lengths: batches are padded less."""
        lengths = _lengths(self.dataset)
        return self if lengths is None else self.subset(sorted(range(len(self)), key=lambda index: lengths[index]))

    def _collate(self, items) -> Batch:
        if isinstance(items, Batch):  # an array data set has made the batch already
            return items
        inputs, labels = self.collate(items), None
        if isinstance(inputs, Mapping) and "labels" in inputs:  # as transformers' own collators call them
            inputs = dict(inputs)
            return Batch(inputs, torch.as_tensor(inputs.pop("labels")))
        if self.labelled:
            *inputs, labels = inputs
            inputs, labels = inputs[0] if len(inputs) == 1 else inputs, torch.as_tensor(labels)
        if isinstance(inputs, (list, tuple)):
            inputs = inputs[0] if len(inputs) == 1 else tuple(inputs)
        return Batch(inputs, labels)


def _lengths(dataset: Any) -> Sequence[int] | None:
    """The samples' lengths that a data set tells, seen through subsets."""
    if isinstance(dataset, Subset):
        lengths = _lengths(dataset.dataset)
        return None if lengths is None else [lengths[index] for index in dataset.indices]
    return getattr(dataset, "lengths", None)


class ArrayDataset(Dataset):
    """Images uint8 [N, H, W, C] (or [N, H, W], one channel), or any other array [N, ...], with labels [N] or None.

    Images are divided by 255, laid out as [N, C, H, W] and normalized by `mean` and `std` of each channel. Integers stay integers
    (tokens), complex numbers complex, other numbers become float32. Answers whole batches at once.
    """

    def __init__(self, x, y=None, mean: Sequence[float] | None = None, std: Sequence[float] | None = None):
        self.x, self.y = x, y
        self.is_image = x.dtype.name == "uint8" and x.ndim in (3, 4)
        self.mean = None if mean is None else torch.tensor(mean)[:, None, None]
        self.std = None if std is None else torch.tensor(std)[:, None, None]
        channels = x.shape[3 if self.is_image else 1] if x.ndim == 4 else 1
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and not (self.is_image or x.ndim == 4):
                raise InvalidSetting(f"--{name} is of pictures; these arrays are {x.dtype} {list(x.shape)}. Leave it out.")
            if values is not None and len(values) not in (1, channels):
                raise InvalidSetting(f"--{name} has {len(values)} numbers for pictures of {channels} channels. Give one a channel.")

    def __len__(self) -> int:
        return len(self.x)

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
        labels = None if self.y is None else torch.from_numpy(self.y[indices])
        if labels is not None and not labels.is_floating_point():
            labels = labels.long()
        if x.is_complex():
            return Batch(x.contiguous().to(torch.complex64), labels)
        return Batch(x.contiguous() if x.dtype in (torch.int64, torch.int32) else x.contiguous().float(), labels)


@dataclass(frozen=True)
class Calibration:
    """The inputs a run fits to and the ones it is judged on, disjoint, as batches in memory."""

    fitting: list[Batch]
    held_out: list[Batch]

    def count(self) -> tuple[int, int]:
        """(fitting, held-out) number of inputs."""
        return sum(map(len, self.fitting)), sum(map(len, self.held_out))


def draw(samples: Samples, count: int, seed: int) -> Samples:
    """`count` samples (all, where there are fewer) drawn without replacement by `seed`."""
    if len(samples) == 0:
        raise InvalidInput("The data set is empty. Give at least 2 inputs (a few hundred work well).")
    return samples.subset(torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:count].tolist())


def split(samples: Samples, seed: int, held_out: float, batch_size: int) -> Calibration:
    """The one seeded split; `held_out` is the share kept from fitting (at least one input on each side)."""
    total = len(samples)
    if total < 2:
        raise InvalidInput(f"{total} input(s) to calibrate on: at least 2 are needed, one to fit and one to hold out. Give a few hundred.")
    kept = min(max(1, round(total * held_out)), total - 1)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    return Calibration(
        list(samples.subset(order[kept:]).by_length().batches(batch_size)),
        list(samples.subset(order[:kept]).by_length().batches(batch_size)),
    )


def check_finite(batches: Iterable[Batch]) -> None:
    """Raise InvalidInput where an input holds NaN or infinity, or a sample nothing but padding."""
    for index, batch in enumerate(batches):
        if batch.mask is not None and not batch.mask.any(1).all():
            sample = int(torch.nonzero(~batch.mask.any(1))[0])
            raise InvalidInput(f"Batch {index} of the data holds a sample that is all padding (sample {sample}). Leave empty texts out.")
        for tensor in tensors_in(batch.inputs):
            if (tensor.is_floating_point() or tensor.is_complex()) and not torch.isfinite(tensor).all():
                sample = int(torch.nonzero(~torch.isfinite(tensor.reshape(len(tensor), -1)).all(1))[0])
                raise InvalidInput(f"Batch {index} of the data holds NaN or infinity (sample {sample} of the batch). Clean the inputs.")
