"""A batch: the arguments of `forward`, and optional labels. Samples become batches here and nowhere else."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from anybit.errors import AnybitError, InvalidInput, UnsupportedModel

Inputs = Tensor | tuple | dict
Network = TypeVar("Network", bound=nn.Module)


class Targets(list):
    """Labels that are not numbers, one per sample as the data's items hold them (dictionaries of boxes, lists): only a custom metric reads
    them."""


Labels = Tensor | Targets
IGNORED = -100
"""The label of a token or place that is not scored, as in PyTorch's cross-entropy."""


class Reader(Protocol):
    """Reads the predictions of a task from a model's output, and scores them beyond the task's own scores."""

    @property
    def task(self) -> str | None:
        """Return the task of the head; None if the outputs decide."""

    @property
    def unit(self) -> str:
        """Return the unit of a prediction: "samples", or the tokens, texts or windows of a sample."""

    def read(self, output: Any, batch: "Batch") -> Tensor:
        """Return one row per prediction, with the same shape in every batch: rows are compared with the float model's, and scored."""

    def score(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Return scores by name; {} if there are none."""

    def align(self, labels: Tensor, batch: "Batch") -> Tensor:
        """Return the labels of the predictions that `read` returns, from the labels of the batch's samples."""


@dataclass(frozen=True)
class Batch:
    """`inputs`: a tensor, a tuple (positional arguments) or a dict (keyword arguments); `labels`: numbers [N, ...], `Targets` or
    None.

    `reader` reads the model's output; None reads its first tensor. `places` are the samples' numbers in the data, if known.
    """

    inputs: Inputs
    labels: Labels | None = None
    reader: Reader | None = None
    places: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(first_tensor(self.inputs))

    @property
    def named(self) -> dict:
        """Return the inputs by name, also if the forward receives them as one dictionary; {} if they have no names."""
        only = self.inputs[0] if isinstance(self.inputs, tuple) and len(self.inputs) == 1 else self.inputs
        return only if isinstance(only, dict) else {}

    @property
    def mask(self) -> Tensor | None:
        """Return the mask of real tokens, bool [N, T]; None if samples are not padded."""
        mask = self.named.get("attention_mask")
        return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def to(self, device: torch.device | str) -> "Batch":
        """Move the batch to `device`."""
        inputs, labels = map_tensors((self.inputs, self.labels), lambda tensor: tensor.to(device))
        return Batch(inputs, labels, self.reader, self.places)

    def head(self, count: int) -> "Batch":
        """Return the inputs of the first samples, without labels."""
        return Batch(map_tensors(self.inputs, lambda tensor: tensor[:count]), None, self.reader, self._places(slice(count)))

    def parts(self, size: int) -> Iterator["Batch"]:
        """Yield the inputs of the samples, at most `size` at a time, without labels."""
        for start in range(0, len(self), size):
            chunk = slice(start, start + size)
            yield Batch(map_tensors(self.inputs, operator.itemgetter(chunk)), None, self.reader, self._places(chunk))

    def _places(self, rows: slice) -> tuple[int, ...] | None:
        return None if self.places is None or len(self.places) != len(self) else self.places[rows]

    def name_of(self, row: int, where: str) -> str:
        """Return the name of a sample in messages: by its number in the data, or else in this batch, which is `where`."""
        places = self._places(slice(None))
        return f"sample {row} of {where}" if places is None else f"sample {places[row]} of the data"


def predict(model: nn.Module, batch: Batch) -> Tensor:
    """Run `model` on the batch and return the predictions that the batch's reader reads from its output."""
    return read_output(call(model, batch.inputs), batch)


def token_mask(tokens: Tensor, batch: Batch) -> Tensor | None:
    """Return the mask, bool [N, T], of the real tokens in an output tensor [N, T, ...]; None if the inputs have none.

    For an encoder-decoder, the tokens are its decoder's.
    """
    inputs = batch.named
    mask = inputs.get("decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == tokens.shape[:2] else None


def are_token_classes(batch: Batch) -> bool:
    """Return whether the labels of padded texts are an integer for each token."""
    labels, mask = batch.labels, batch.mask
    return mask is not None and isinstance(labels, Tensor) and labels.shape == mask.shape and not labels.is_floating_point()


def of_other_length(batch: Batch) -> Batch:
    """Return the inputs of padded texts without their last token, or, if there is only one, with that repeated. Raises ValueError for
    other inputs."""
    mask = batch.mask
    if mask is None:
        raise ValueError("there is no mask of tokens")
    return Batch(map_tensors(batch.inputs, lambda tensor: _of_other_length(tensor, mask)))


def _of_other_length(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return a tensor of tokens [N, T, ...] without the last, or, if there is only one, with that repeated; others unchanged."""
    if tensor.shape[:2] != mask.shape:
        return tensor
    return tensor[:, :-1] if tensor.shape[1] > 1 else torch.cat([tensor, tensor], 1)


@contextmanager
def naming_sample(model: nn.Module, batch: Batch, where: str) -> Iterator[None]:
    """Raise InvalidInput if a pass of `model` on the batch, which is `where`, fails inside the block: for the first sample on which it
    fails alone, or else the batch."""
    try:
        yield
    except (AnybitError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model may raise any error on inputs that it rejects
        number = next((index for index, sample in enumerate(batch.parts(1)) if _fails(model, sample, type(error))), None)
        if number is not None:
            batch, where = list(batch.parts(1))[number], batch.name_of(number, where)
        held = ", ".join(map(_range_of, tensors_in(batch.inputs)))
        message = " ".join(str(error).split()).rstrip(".")
        raise InvalidInput(
            f"The model refuses {where} ({held}): {type(error).__name__}: {message}. Repair such samples, or leave them out."
        ) from error


def _fails(model: nn.Module, batch: Batch, kind: type[Exception]) -> bool:
    """Return whether a pass on the batch raises this kind of error."""
    try:
        with torch.no_grad():
            predict(model, batch)
    except Exception as error:
        return type(error) is kind
    return False


def _range_of(tensor: Tensor) -> str:
    """Describe a tensor by type, shape and range: int64 [1, 7] from 3 to 99."""
    kind = f"{tensor.dtype}".removeprefix("torch.")
    if tensor.is_complex() or not tensor.numel():
        return f"{kind} {list(tensor.shape)}"
    return f"{kind} {list(tensor.shape)} from {tensor.min().item():g} to {tensor.max().item():g}"


def not_plain(tensor: Tensor) -> str:
    """Return what kind of tensor this is and how it becomes a plain one, as "sparse (torch.sparse_coo). Make it ..."; "" if it is."""
    if tensor.is_nested:
        return "a nested tensor. Make it dense first: torch.nested.to_padded_tensor(tensor, 0.0)."
    if tensor.is_meta:
        return "on the meta device and holds no numbers. Compute it on the CPU."
    if tensor.layout is not torch.strided:
        return f"sparse ({tensor.layout}). Make it dense first: to_dense()."
    return f"quantized ({tensor.dtype}). Make it float first: dequantize()." if tensor.is_quantized else ""


def check_plain(value: Any) -> None:
    """Raise InvalidInput if a tensor of the data is sparse, quantized, nested or on the meta device."""
    for tensor in tensors_in(value):
        if why := not_plain(tensor):
            raise InvalidInput(f"A tensor of the data is {why}")


def read_output(output: Any, batch: Batch) -> Tensor:
    """Return the predictions that the batch's reader reads from a model's output; a single number of one sample is a row, too. Raises
    UnsupportedModel if that is no plain tensor."""
    if batch.reader is not None:
        return batch.reader.read(output, batch)
    tensor = first_tensor(output)
    if why := not_plain(tensor):
        raise UnsupportedModel(f"The network's first output is {why}")
    return tensor[None] if not tensor.dim() and len(batch) == 1 else tensor


def unpadded(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """Return the values of `tensor` at real tokens, by `mask` [N, T]; all of them if its dimensions do not match tokens.

    Tokens are the last dimension but one, [N, ..., T, features], or are flattened, [N T, features]. In a tensor shared by all samples,
    [1, ..., T, features], a token is real if any sample has one there.
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
    """Run `model` on a copy of a batch's inputs, which its forward may modify."""
    return run(model, map_tensors(inputs, Tensor.clone))


def run(model: nn.Module, inputs: Inputs) -> Any:
    """Run `model` on the inputs without copying them."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def in_evaluation_mode(model: Network) -> Network:
    """Put `model` into evaluation mode and return it; a network's own `train` may forget to return it."""
    model.eval()
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode inside the block, and restore every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def map_leaves(value: Any, leaf: type | tuple[type, ...], function: Callable[[Any], Any]) -> Any:
    """Map every `leaf` in nested tuples, lists and dicts."""
    if isinstance(value, leaf):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_leaves(item, leaf, function) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple, whose class may check its fields
        named: Any = type(value)
        return named._make(map_leaves(item, leaf, function) for item in value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_leaves(item, leaf, function) for item in value)
    return value


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Map every tensor in nested tuples, lists and dicts."""
    return map_leaves(value, Tensor, function)


def tensors_in(value: Any) -> list[Tensor]:
    """List every tensor in nested tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if value is None or isinstance(value, (int, float, str)):  # the most calls
        return []
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if hasattr(value, "__dataclass_fields__"):
        return [tensor for name in value.__dataclass_fields__ for tensor in tensors_in(getattr(value, name))]
    return []


def first_tensor(value: Any) -> Tensor:
    """Return the first tensor in `value`: the logits, if a model has several outputs."""
    tensors = tensors_in(value)
    if not tensors:
        raise InvalidInput(f"No tensor in a {type(value).__name__}: inputs and outputs must hold at least one.")
    return tensors[0]


def join_labels(labels: Sequence[Labels]) -> Labels:
    """Join the labels of batches. Raises InvalidInput if they differ in shape, or only some are numbers."""
    if all(isinstance(one, Targets) for one in labels):
        return Targets(target for one in labels for target in one)
    tensors = [one for one in labels if isinstance(one, Tensor)]
    other = next((one for one in tensors if one.shape[1:] != tensors[0].shape[1:]), None)
    if other is not None or len(tensors) < len(labels):
        shapes = "only some are numbers" if other is None else f"{list(tensors[0].shape)} and {list(other.shape)}"
        raise InvalidInput(f"Labels of batches differ in shape: {shapes}. Give all labels the same shape.")
    return torch.cat(tensors)


def join(batches: list[Batch]) -> Batch:
    """Join all `batches` into one."""
    flat = [iter(tensors) for tensors in zip(*(tensors_in(batch.inputs) for batch in batches), strict=True)]
    joined = iter([torch.cat(list(tensors)) for tensors in flat])
    return Batch(map_tensors(batches[0].inputs, lambda _: next(joined)), None, batches[0].reader)


def padded(items: list, labels: list) -> tuple[list, list]:
    """Pad texts of different lengths, dictionaries with an attention_mask [T], and labels of their tokens at the end: with zeros, which the
    mask excludes, and IGNORED. All else is returned unchanged."""
    if all(isinstance(item, tuple) and len(item) == 1 for item in items):  # dictionaries that a forward receives whole
        alone, labels = padded([item[0] for item in items], labels)
        return [(item,) for item in alone], labels
    if not all(isinstance(item, Mapping) and getattr(item.get("attention_mask"), "ndim", 0) == 1 for item in items):
        return items, labels
    columns = {name: _to_one_length([item[name] for item in items], 0) for name in items[0] if all(name in item for item in items)}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)], _to_one_length(labels, IGNORED)


def _to_one_length(values: list, fill: int) -> list:
    """Pad arrays that only differ in their first dimension."""
    if not all(isinstance(value, (Tensor, np.ndarray)) and value.ndim for value in values) or len({len(value) for value in values}) < 2:
        return values
    tensors, longest = [torch.as_tensor(value) for value in values], max(map(len, values))
    return [torch.cat([tensor, tensor.new_full((longest - len(tensor), *tensor.shape[1:]), fill)]) for tensor in tensors]


def stacked(items: list) -> Any:
    """Stack items into one batch, with texts padded to one length. Raises InvalidInput if their shapes or names differ."""
    check_plain(items)
    _check_names(items)
    try:
        return default_collate(padded(items, [])[0])
    except TypeError as error:
        raise InvalidInput(
            f"The samples cannot be joined into a batch: {error}. Give tensors, tuples or dicts, or a loader's collate_fn."
        ) from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InvalidInput(f"The samples do not fit into one batch: {reason}. {_same_shape(items)}") from error


def _check_names(items: list) -> None:
    """Raise InvalidInput if dictionaries have other entries than the first: those of some items alone would be left out."""
    if not all(isinstance(item, Mapping) for item in items):
        return
    other = next((item for item in items if set(item) != set(items[0])), None)
    if other is not None:
        raise InvalidInput(
            f"An item of the data, a dict of {', '.join(map(str, other))}, has other parts than the first, a dict of "
            f"{', '.join(map(str, items[0]))}. Give all items the same parts."
        )


def _same_shape(items: list) -> str:
    """Return advice on giving samples of these kinds one shape."""
    sizes = {tuple(tensor.shape) for tensor in tensors_in(items)}
    if any(len(size) == 3 and size[0] in (1, 3, 4) for size in sizes):
        return "Give all the same shape (--size for images)."
    if any(len(size) == 1 for size in sizes):
        return "Give all the same length, or texts as dictionaries with an attention_mask [T], which are padded."
    return "Give all the same shape."


def check_finite(batches: Iterable[Batch]) -> None:
    """Raise InvalidInput if an input contains NaN or infinity, or if a sample is only padding."""
    for index, batch in enumerate(batches):
        if batch.mask is not None and not batch.mask.any(1).all():
            sample = int(torch.nonzero(~batch.mask.any(1))[0])
            raise InvalidInput(f"{_capital(batch.name_of(sample, f'batch {index}'))} is only padding. Leave empty texts out.")
        check_numbers(index, batch)


def check_numbers(index: int, batch: Batch) -> None:
    """Raise InvalidInput if an input of the batch, which is number `index`, contains NaN or infinity."""
    for tensor in tensors_in(batch.inputs):
        if (tensor.is_floating_point() or tensor.is_complex()) and not torch.isfinite(tensor).all():
            sample = int(torch.nonzero(~torch.isfinite(tensor.reshape(len(tensor), -1)).all(1))[0])
            raise InvalidInput(
                f"{_capital(batch.name_of(sample, f'batch {index} of the data'))} holds NaN or infinity, or a number beyond float32's "
                "3.4e38, which becomes infinity. Clean or scale the inputs."
            )


def check_finite_outputs(outputs: Iterable[Tensor], batches: Iterable[Batch]) -> None:
    """Raise UnsupportedModel if the network's outputs on a batch are NaN or infinite."""
    for index, (one, batch) in enumerate(zip(outputs, batches, strict=True)):
        if not torch.isfinite(one).all():
            row = int(torch.nonzero(~torch.isfinite(one.reshape(len(one), -1)).all(1))[0])
            where = batch.name_of(row, f"batch {index}") if len(one) == len(batch) else f"batch {index}"
            raise UnsupportedModel(f"The network's outputs are NaN or infinite on {where}. Check the network and the data.")


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]
